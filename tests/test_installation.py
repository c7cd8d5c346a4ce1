"""Hints for missing extras fit how the package was installed; a missing backend is said in one line."""

import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import flash_moe_mlx
from flash_moe_mlx import BackendError, installation
from flash_moe_mlx.cli import doctor, main

from .support.command_line import invoke, refusal

ROOT = Path(__file__).resolve().parent.parent
LIBMLX = "libmlx.so: cannot open shared object file: No such file or directory"


class Installed:
    """A distribution's metadata, as pip, uv and pipx write it."""

    def __init__(self, direct_url: Any = None, installer: str = "pip"):
        self.files = {"INSTALLER": f"{installer}\n"}
        if direct_url is not None:
            self.files["direct_url.json"] = json.dumps(direct_url)

    def read_text(self, name: str) -> str | None:
        return self.files.get(name)


EDITABLE = {"url": f"file://{ROOT}", "dir_info": {"editable": True}}
WHEEL = {"url": "file:///dist/flash_moe_mlx-0.1.0-py3-none-any.whl", "archive_info": {}}
GIT = {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}


@pytest.mark.parametrize(
    ("found", "prefix", "is_active", "command"),
    [
        (Installed(), "/env", True, "pip install 'flash_moe_mlx[server]'"),
        (Installed(EDITABLE), "/env", True, "pip install -e '.[server]'"),
        (None, "/env", True, "pip install -e '.[server]'"),
        (Installed(EDITABLE), "/env", False, "/env/bin/python -m pip install -e '.[server]'"),
        (Installed(EDITABLE), f"{ROOT}/.venv", False, ".venv/bin/python -m pip install -e '.[server]'"),
        (Installed(WHEEL), "/env", True, f"pip install 'flash_moe_mlx[server] @ {WHEEL['url']}'"),
        (Installed(GIT), "/env", True, "pip install 'flash_moe_mlx[server] @ git+https://example.org/x.git@abc'"),
        (Installed(EDITABLE, "uv"), "/env", True, "uv pip install -e '.[server]'"),
        (Installed(installer="uv"), "/env", False, "uv pip install --python /env 'flash_moe_mlx[server]'"),
        (Installed(), "/h/pipx/venvs/flash_moe_mlx", False, "pipx install --force 'flash_moe_mlx[cpu,server]'"),
        (Installed(EDITABLE), "/h/uv/tools/x", False, "uv tool install --force --editable '.[cpu,server]'"),
    ],
)  # fmt: skip
def test_hints_fit_the_installation(
    found: Installed | None, prefix: str, is_active: bool, command: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(installation, "_distribution", lambda: found)
    monkeypatch.setattr(installation, "_installed_extras", lambda: ["cpu"])
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(sys, "executable", f"{prefix}/bin/python")
    where = f"{prefix}/bin/python" if is_active else "/usr/bin/python"
    monkeypatch.setattr(installation.shutil, "which", lambda name: where)
    assert installation.install_command("server") == command


def test_every_extra_that_is_told_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert installation._TELLS.keys() <= extras.keys()
    for extra, package in installation._TELLS.items():
        wheels = {"cuda12": "mlx-cuda-12", "cuda13": "mlx-cuda-13"}  # what mlx's own extras of these names install
        assert package == wheels.get(extra) or any(line.startswith(package) for line in extras[extra]), extra


def test_a_missing_backend_is_one_line_with_a_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installation, "backend_extra", lambda: "cpu")

    def fail() -> None:
        raise ImportError(LIBMLX)

    monkeypatch.setattr(main.app, "registered_commands", list(main.app.registered_commands))
    main.app.command()(fail)
    line = refusal("fail")
    assert "needs a backend" in line and "libmlx.so" in line
    command = shlex.split(line.partition("Run: ")[2])
    assert "install" in command and command[-1].endswith("[cpu]")
    assert installation.explain_import(ImportError("no module named x", name="x")) is None


@pytest.mark.parametrize(
    ("machine", "words"), [("x86_64", "needs an arm64 Python"), ("arm64", "--force-reinstall mlx")]
)
def test_on_a_mac_no_extra_is_missing(machine: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert installation.backend_extra() == ""
    assert words in installation.explain_import(ImportError(LIBMLX))


AS_A_MAC = """#!{python}
import platform, sys
platform.system, platform.machine = lambda: "Darwin", lambda: "{machine}"
code = sys.argv[2].replace('sys.version_info < (3, 11)', 'False')
exec(code) if sys.argv[1] == "-c" else print("a virtual environment")
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("machine", "is_fine"), [("x86_64", False), ("arm64", True)])
def test_make_refuses_a_python_under_rosetta(machine: str, is_fine: bool, tmp_path: Path):
    python = tmp_path / "python3"
    python.write_text(AS_A_MAC.format(python=sys.executable, machine=machine))
    python.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={python}", "VENV=new", "new/bin/python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) == is_fine, done.stderr
    assert ("a virtual environment" in done.stdout) == is_fine
    assert ("must be an arm64 Python" in done.stdout and "x86_64 under Rosetta" in done.stdout) != is_fine


def test_python_says_the_same(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise ImportError(LIBMLX)

    monkeypatch.setattr(flash_moe_mlx, "import_module", broken)
    monkeypatch.delitem(vars(flash_moe_mlx), "load", raising=False)
    with pytest.raises(BackendError, match=r"libmlx\.so.*Run: ") as raised:
        _ = flash_moe_mlx.load
    assert isinstance(raised.value, ImportError)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_doctor_without_a_backend(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "backend_fault", lambda: "[mlx] needs a backend. Run: x")
    result = invoke("doctor", *options)
    assert result.exit_code == 1
    if options:
        assert json.loads(result.stdout)["advice"] == ["[mlx] needs a backend. Run: x"]
    else:
        assert (result.stdout, result.stderr) == ("", "flash-moe: [mlx] needs a backend. Run: x\n")


def test_warnings_are_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch):
    import warnings

    def warn() -> None:
        warnings.warn("slow.\nRun: x", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(main.app, "registered_commands", list(main.app.registered_commands))
    main.app.command()(warn)
    result = invoke("warn")
    assert (result.stdout, result.stderr) == ("", "flash-moe: warning: slow. Run: x\n")
