"""Long steps are reported to whoever watches, drawn on terminals and nowhere else."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest

import flash_moe_mlx
from flash_moe_mlx import generate, load, progress
from flash_moe_mlx.progress import Progress, report, reporting, showing, watching

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "flash_moe_mlx" / "demo"


def test_steps_read_as_a_line():
    assert str(Progress("compiling")) == "compiling"
    assert str(Progress("reading the prompt", 512, 2048, "tokens")) == "reading the prompt, 512 of 2,048 tokens"
    assert str(Progress("loading", 10**9, 2 * 10**9)) == "loading, 1.00 GB of 2.00 GB"


def test_watchers_nest_and_true_leaves_steps_to_the_one_outside():
    outer: list[Progress] = []
    inner: list[Progress] = []
    report("to nobody")
    with watching(outer.append):
        report("a")
        with showing(True):
            report("b")
        with showing(inner.append):
            report("c")
        with watching(None), showing(False):
            report("to nobody")
        report("d")
    assert [moment.step for moment in outer] == ["a", "b", "d"]
    assert [moment.step for moment in inner] == ["c"]
    assert not progress.is_watched()


def test_load_and_generate_say_what_they_do(capfd: pytest.CaptureFixture[str]):
    loading: list[Progress] = []
    answering: list[Progress] = []
    model, tokenizer = load(DEMO, memory_limit="64MB", max_context=256, progress=loading.append)
    with model.streaming:
        prompt = tokenizer.encode("Once upon a time there was a small fox. " * 4)
        generate(model, tokenizer, prompt, max_tokens=2, prefill_step_size=16, progress=answering.append)
    steps = [moment.step for moment in loading]
    assert {"reading headers", "loading the tokenizer", "loading dense weights"} <= set(steps)
    weights = [moment for moment in loading if moment.step == "loading dense weights"]
    assert [moment.done for moment in weights] == sorted({moment.done for moment in weights})
    assert 0 < weights[-1].done < weights[-1].total
    prompts = [moment for moment in answering if moment.step == "reading the prompt"]
    assert [moment.done for moment in prompts] == [*range(0, len(prompt) - 1, 16), len(prompt) - 1]
    assert {(moment.total, moment.unit) for moment in prompts} == {(len(prompt), "tokens")}
    assert capfd.readouterr() == ("", "")  # stderr is no terminal


CHILD = """
import sys, time
from flash_moe_mlx.progress import report, showing

with showing(True):
    report("a quick step")
with showing(True):
    report("compiling \\x1b[31mkernels")
    time.sleep(1.5)
    assert sys.stdout is sys.__stdout__  # what is created meanwhile, such as a line editor, writes to it
    report("loading", 10**9, 2 * 10**9)
    time.sleep(0.5)
    report("")
    print("the answer", flush=True)
"""


def test_a_terminal_shows_one_line_that_goes_away():
    """Slow steps appear, quick ones don't, and the line is gone before text is printed."""
    child = pexpect.spawn(sys.executable, ["-c", CHILD], env={"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm"})
    child.expect(pexpect.EOF, timeout=60)
    shown = child.before.decode()
    assert "quick" not in shown
    assert "compiling \N{REPLACEMENT CHARACTER}[31mkernels" in shown
    assert "loading, 1.00 GB of 2.00 GB" in shown
    before, _, after = shown.partition("the answer")
    assert before.endswith("\x1b[2K") or "\x1b[2K" in before.rpartition("loading")[2]
    assert "loading" not in after


def test_the_command_line_says_what_it_waits_for():
    """Within its first second of a machine that has time for it; here only that it comes before the answer."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "flash_moe_mlx", "generate", "What is 17 + 25?", "--max-tokens", "2"],
        env={"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm", "PATH": "/usr/bin:/bin"},
    )
    child.expect("starting", timeout=60)
    child.expect(pexpect.EOF, timeout=400)
    child.close()
    assert child.exitstatus == 0


class ZMQInteractiveShell:
    """The name by which tqdm, and we, know a notebook's kernel."""


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook without ipywidgets, in which nobody has imported tqdm."""
    kernel = SimpleNamespace(get_ipython=ZMQInteractiveShell)
    for name, module in (("IPython", kernel), ("ipykernel.zmqshell", kernel), ("ipywidgets", None)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("notebook")
def test_a_notebook_without_widgets_gets_no_warning():
    vars(flash_moe_mlx).pop("Progress", None)  # imported at its first use
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert flash_moe_mlx.Progress is Progress
        import tqdm.auto

        tqdm.auto.tqdm(total=1, disable=True).close()
    assert not said


@pytest.mark.usefixtures("notebook")
def test_a_notebooks_bar_is_not_redrawn_for_every_step(capsys: pytest.CaptureFixture[str]):
    with showing(True):
        for done in range(1000):
            report("loading dense weights", done, 1000)
        report("")
    drawn = capsys.readouterr().err
    assert "loading dense weights" in drawn
    assert drawn.count("loading dense weights") < 500


def test_compilation_of_kernels_is_reported():
    numba = pytest.importorskip("numba", reason="needs numba")
    from flash_moe_mlx.ops.cpu import jit  # noqa: F401  # registers the listener

    @numba.njit
    def double(x: int) -> int:
        return 2 * x

    seen: list[Progress] = []
    with watching(seen.append):
        assert double(21) == 42
    assert any("compiling CPU kernels" in moment.step for moment in seen)


def test_a_bar_appears_with_the_first_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with reporting(True, "verify"):
        pass
    assert "verify" not in capsys.readouterr().err
    with reporting(True, "verify") as tell:
        tell(Progress("", 5, 5))
    assert "verify" in capsys.readouterr().err
