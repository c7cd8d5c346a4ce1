"""Installations work: sdist -> wheel -> empty environment -> text, and the same from an editable install."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import flash_moe_mlx

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "flash_moe_mlx" / "demo"
EXTRA = "" if sys.platform == "darwin" else "[cpu]"

# Everything reachable from a repository root must come from the environment, so this runs with -I elsewhere.
PLACES = """
from pathlib import Path
import flash_moe_mlx
from flash_moe_mlx.ops.gpu.kernel_source import kernel_folder, read_kernel

for kernel in kernel_folder().iterdir():
    if kernel.name.endswith(".metal"):
        read_kernel(kernel.name.removesuffix(".metal"))
print(Path(flash_moe_mlx.__file__).parent)
print(kernel_folder())
"""
GENERATE = (
    PLACES
    + """
import sys
from importlib.resources import files
from flash_moe_mlx import generate, load

model, tokenizer = load(files("flash_moe_mlx") / "demo", memory_limit="64MB", max_context=256)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 + 25?"}], add_generation_prompt=True)
print(flash_moe_mlx.__version__)
print("torch" in sys.modules)
print(generate(model, tokenizer, prompt, max_tokens=30))
"""
)

# One worker of pytest-xdist: the tests share what they build and install.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command run outside the repository and this test's Python path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); `build` makes the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def source_tree(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(distributions[0]) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def sources(folder: Path) -> set[str]:
    """Files below a folder that git would track."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path]):
    wheel = zipfile.ZipFile(distributions[1])
    info = f"flash_moe_mlx-{flash_moe_mlx.__version__}.dist-info"
    names = set(wheel.namelist())
    package = {f"flash_moe_mlx/{name}" for name in sources(ROOT / "src" / "flash_moe_mlx")}
    kernels = {f"flash_moe_mlx/kernels/{name}" for name in sources(ROOT / "kernels")}
    assert {name for name in names if not name.startswith(info)} == package | kernels
    assert kernels
    assert "flash_moe_mlx/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert f"Version: {flash_moe_mlx.__version__}\n" in wheel.read(f"{info}/METADATA").decode()


def test_distributions_are_what_an_index_takes(distributions: tuple[Path, Path]):
    pytest.importorskip("twine", reason="needs twine: pip install 'flash_moe_mlx[dev]'")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *distributions, cwd=distributions[0].parent)
    assert said.count("PASSED") == 2


def test_sdist_holds_what_it_takes_to_build_and_test(source_tree: Path):
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "examples/demo.py",
        "tests/conftest.py",
    ):
        assert (source_tree / name).is_file(), name
    assert sources(source_tree / "kernels") == sources(ROOT / "kernels")
    large = [p for p in source_tree.rglob("*") if p.is_file() and p.stat().st_size > 8_000_000]
    assert large == []


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment: pip and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--quiet", "--no-compile", *arguments, cwd=python.parent)


def test_installed_wheel_generates(python: Path, distributions: tuple[Path, Path], tmp_path: Path):
    install(python, f"{distributions[1]}{EXTRA}")
    package, kernels, version, torch, text = run(python, "-I", "-c", GENERATE, cwd=tmp_path).split("\n", 4)
    assert Path(package).is_relative_to(python.parent.parent)
    assert Path(kernels) == Path(package) / "kernels"
    assert version == flash_moe_mlx.__version__
    assert torch == "False"
    assert "42" in text
    assert sources(Path(kernels)) == sources(ROOT / "kernels")
    run(python, "-m", "pip", "check", cwd=tmp_path)
    # The command, its tools and their processes.
    chat = f"printf 'Use the calculator for 12 * 12.\\nyes\\n' | {python.with_name('flash-moe')} chat"
    assert "gives 144" in run("sh", "-c", chat, cwd=tmp_path)


def test_editable_install_uses_the_source_tree(python: Path, source_tree: Path, tmp_path: Path):
    # Into the same environment, in the wheel's place if that has been there: its dependencies are the same.
    install(python, "--editable", f"{source_tree}{EXTRA}")
    package, kernels = run(python, "-I", "-c", PLACES, cwd=tmp_path).split()
    assert Path(package) == source_tree / "src" / "flash_moe_mlx"
    assert Path(kernels) == source_tree / "kernels"
