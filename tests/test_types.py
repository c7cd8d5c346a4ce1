"""What pages and examples print is accepted by mypy and pyright, and editors know what load() returns."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_moe_mlx import load

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REVEAL = """
from typing import Any, assert_type
from flash_moe_mlx import StreamingEngine, StreamingModel, load, load_model
from flash_moe_mlx.stats import StreamingStats

model, tokenizer = load("x", memory_limit="8GB")
assert_type(model, StreamingModel)
assert_type(model.streaming, StreamingEngine)
assert_type(model.streaming.stats(), StreamingStats)
_, _, config = load("x", return_config=True)
assert_type(config, dict[str, Any])
assert_type(load_model("x"), StreamingModel)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The examples, and one file per page of its blocks in order."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "revealed.py").write_text(REVEAL)
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        blocks = BLOCK.findall(page.read_text())
        assert blocks
        (folder / f"page_{page.stem.lower()}.py").write_text("path = 'x'\n" + "\n".join(blocks))
    examples = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "embed_in_fastapi.py"]
    return [str(path) for path in (*folder.glob("*.py"), *examples)]


@pytest.mark.slow
def test_mypy_accepts_pages_and_examples(sources: list[str]):
    for source in sources:  # each is a program of its own
        assert Path(source).is_file()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports=silent"]
    options = ["--allow-untyped-defs", "--allow-incomplete-defs", "--no-warn-unreachable", "--scripts-are-modules"]
    done = subprocess.run([*command, *options, *sources], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which pyright runs on")
def test_pyright_accepts_pages_and_examples(sources: list[str]):
    pytest.importorskip("pyright", reason="needs pyright: pip install 'flash_moe_mlx[dev]'")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_models_and_engines_print_as_one_line():
    model, _ = load(ROOT / "src" / "flash_moe_mlx" / "demo", memory_limit="14MB", max_context=128)
    with model.streaming as engine:
        assert repr(engine).startswith("StreamingEngine(") and "of 128 experts" in repr(engine)
        assert repr(model).endswith(f"8 layers, {engine!r})") and "\n" not in repr(model)
        assert "<table>" in engine._repr_html_()
    assert repr(engine) == engine._repr_html_() == "StreamingEngine(closed)"
