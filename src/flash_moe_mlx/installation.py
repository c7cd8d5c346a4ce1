"""Inspects this installation: the command that adds an extra, and whether MLX has a backend here."""

import json
import os
import shlex
import shutil
import sys
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path

from . import system

NAME = "flash_moe_mlx"

_TELLS = {"cpu": "numba", "cuda12": "mlx-cuda-12", "cuda13": "mlx-cuda-13", "server": "uvicorn", "plot": "matplotlib",
          "mcp": "mcp", "notebook": "ipywidgets", "eval": "lm_eval"}  # fmt: skip
"""One package of each extra, whose presence shows that the extra is installed."""


def install_command(extra: str) -> str:
    """Return a shell command that adds an extra to this installation.

    It fits the way the package was installed: from an index, a checkout, a wheel or a repository, by pip, uv or
    pipx, and into an environment that is activated or not.

    Args:
        extra: Name of an extra in pyproject.toml, such as "server".
    """
    found = _distribution()
    prefix = Path(sys.prefix)
    kept = [name for name in _installed_extras() if name != extra]
    if tool := _tool(prefix):  # these make the environment anew: name what is in it already
        target, editable = _target(found, [*kept, extra])
        return f"{tool}{' --editable' if editable else ''} {shlex.quote(target)}"
    target, editable = _target(found, [extra])
    return f"{_installer(found, prefix)} {'-e ' if editable else ''}{shlex.quote(target)}"


def backend_extra() -> str:
    """Return the extra that gives MLX a backend on this machine."""
    if system.is_macos():
        return ""
    return "cuda13" if os.path.exists("/dev/nvidiactl") else "cpu"


@cache
def backend_fault() -> str | None:
    """Return why MLX can't be imported here and what to do, or None if it can."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        return explain_import(error) or f"[mlx] can't be imported: {error}. Run: {install_command(backend_extra())}"
    return None


def explain_import(error: ImportError) -> str | None:
    """Return what an ImportError means to a user, or None if it is not about MLX's backend."""
    text = str(error)
    if "libmlx" not in text and (error.name or "").partition(".")[0] != "mlx":
        return None
    if system.is_intel_python():
        return "[mlx] needs an arm64 Python on a Mac with Apple silicon; this one is for Intel."
    if extra := backend_extra():
        return (
            f"[mlx] needs a backend on Linux, and there is none ({text.split(':')[0]}). Run: {install_command(extra)}"
        )
    return f"[mlx] can't be imported ({text.split(':')[0]}). Run: pip install --force-reinstall mlx"


def _distribution() -> Distribution | None:
    try:
        return distribution(NAME)
    except PackageNotFoundError:  # run from its sources
        return None


def _target(found: Distribution | None, extras: list[str]) -> tuple[str, bool]:
    """Return what to install, extras included, and whether it is an editable checkout."""
    names = f"[{','.join(extras)}]" if any(extras) else ""
    checkout = Path(__file__).resolve().parents[2]
    direct = found.read_text("direct_url.json") if found else None
    if direct is None:
        if found is None and (checkout / "pyproject.toml").is_file():
            return f"{_shortest(checkout)}{names}", True
        return f"{NAME}{names}", False
    origin = json.loads(direct)
    url = origin["url"]
    if origin.get("dir_info", {}).get("editable"):
        return f"{_shortest(Path(url.removeprefix('file://')))}{names}", True
    if repository := origin.get("vcs_info"):
        return f"{NAME}{names} @ {repository['vcs']}+{url}@{repository['commit_id']}", False
    if "dir_info" in origin:
        return f"{_shortest(Path(url.removeprefix('file://')))}{names}", False
    return f"{NAME}{names} @ {url}", False


def _installer(found: Distribution | None, prefix: Path) -> str:
    """Return the command that installs into this environment."""
    first = shutil.which("python")
    is_active = first is not None and Path(first).parent == prefix / "bin"
    used = (found.read_text("INSTALLER") or "").strip() if found else ""
    if used == "uv":
        return "uv pip install" if is_active else f"uv pip install --python {shlex.quote(_shortest(prefix))}"
    if is_active:
        return "pip install"
    python = Path(sys.executable)
    return f"{shlex.quote(_shortest(python) if python.is_absolute() else str(python))} -m pip install"


def _tool(prefix: Path) -> str | None:
    """Return the command of the tool that keeps this environment to itself, if there is one."""
    parts = prefix.parts
    if "pipx" in parts and "venvs" in parts:
        return "pipx install --force"
    return "uv tool install --force" if ("uv", "tools") in pairwise(parts) else None


def _installed_extras() -> list[str]:
    found = []
    for extra, package in _TELLS.items():
        try:
            distribution(package)
        except PackageNotFoundError:
            continue
        found.append(extra)
    return found


def _shortest(path: Path) -> str:
    """Return a path relative to the current folder if it is inside it."""
    try:
        inside = path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return str(path)
    return str(inside) if path.is_dir() and inside == Path() else (f"./{inside}" if path.is_dir() else str(inside))
