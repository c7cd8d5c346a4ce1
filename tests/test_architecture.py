"""The house's rules that a script can check: import order, file length, error handling, names, versions."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import flash_moe_mlx

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "flash_moe_mlx"

# A module imports only from those before it. The same list, with what each does, is in docs/architecture.md.
ORDER = [
    "errors", "record", "machine", "config", "stats", "safetensors_header", "hub_headers", "quantization",
    "expert_tensors", "packed_format", "checkpoint", "trace", "policies", "slots", "routing", "simulation", "budget",
    "file_io", "disk_probe", "io_choice", "record_check", "io_threads", "store", "buffer_cache", "bank", "cache",
    "streaming", "packing", "verification", "ops", "kernel_bench", "moe", "models", "loading", "prefix_cache",
    "generation", "async_generation", "answer", "tools", "conversation", "speed", "planner", "planning", "profiling",
    "plot", "server", "cli",
]  # fmt: skip

MAX_LINES = 500
MAX_ENVIRONMENT_VARIABLES = 5

EXPORTED = {
    "load", "load_model", "generate", "stream_generate", "stream_generate_async", "GenerationResponse",
    "PrefixCache", "chat_prompt", "Conversation", "load_tools",
    "pack", "verify", "plan", "Plan", "profile",
    "FlashMoEError", "CheckpointError", "MissingTensorError", "CorruptError", "UnsupportedModelError",
    "MemoryLimitError", "StoreError", "ShortReadError", "ChecksumError", "PackError", "DiskFullError", "ShapeError",
    "RequestError",
    "__version__",
}  # fmt: skip


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(path: Path) -> str:
    """First part of a module's name inside the package: `ops/expert_ffn.py` -> `ops`."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported_layers(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, layer) of each import of our own package in a module of `package`, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            # `from . import x` names a module too
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "flash_moe_mlx" and len(parts) > 1:
                yield node.lineno, parts[1]


def import_faults(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of the module at `path`."""
    layer = layer_of(path)
    if layer not in ORDER:
        return [f"{path.name}: module {layer!r} has no place in ORDER"]
    package = ("flash_moe_mlx", *path.relative_to(SRC).parts[:-1])
    faults = []
    for line, target in imported_layers(source, package):
        if target in ORDER and ORDER.index(target) > ORDER.index(layer):
            faults.append(f"{path.name}:{line}: {layer} imports {target}, which comes after it")
    return faults


@pytest.mark.parametrize(
    "path",
    [path for path in python_files("src") if path.parent != SRC or path.name not in ("__init__.py", "__main__.py")],
    ids=lambda path: str(path.relative_to(SRC)),
)
def test_imports_run_one_way(path: Path):
    assert import_faults(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("source", "module", "faults"),
    [
        ("from .errors import ShapeError", "store.py", 0),
        ("from .loading import load", "store.py", 1),
        ("def f():\n    from . import cli", "store.py", 1),
        ("from ..record import RecordLayout", "ops/expert_ffn.py", 0),
        ("from .quantized import x", "ops/expert_ffn.py", 0),
        ("from ..moe import StreamingMoE", "ops/expert_ffn.py", 1),
        ("import flash_moe_mlx.server", "moe.py", 1),
        ("import os", "utils.py", 1),
    ],
)
def test_import_check_finds_faults(source: str, module: str, faults: int):
    assert len(import_faults(source, SRC / module)) == faults


def heavy_imports(statement: str) -> set[str]:
    """Which of the slow libraries are loaded after `statement`, in a fresh interpreter."""
    heavy = {"mlx", "mlx_lm", "numba", "torch", "transformers"}
    code = f"import sys; {statement}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", [path.stem for path in python_files("src") if layer_of(path) in ORDER[: ORDER.index("store")]]
)
def test_what_reads_only_headers_needs_no_mlx(module: str):
    assert heavy_imports(f"import flash_moe_mlx.{module}") == set()


def test_importing_the_package_is_light():
    assert heavy_imports("import flash_moe_mlx; flash_moe_mlx.MemoryLimitError") == set()
    assert "mlx" in heavy_imports("import mlx.core")


def test_exported_names_are_pinned():
    assert set(flash_moe_mlx.__all__) == EXPORTED
    assert set(dir(flash_moe_mlx)) >= EXPORTED
    for name in EXPORTED:
        assert getattr(flash_moe_mlx, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flash_moe_mlx.no_such_name


def test_every_error_is_exported():
    from flash_moe_mlx import errors

    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= EXPORTED


@pytest.mark.parametrize(
    "path",
    [*python_files("src", "tests", "benchmarks", "examples"), *sorted((ROOT / "kernels").glob("*"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_is_longer_than_500_lines(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def broad_handlers(source: str) -> list[int]:
    """Lines of handlers that catch everything."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(c is None or (isinstance(c, ast.Name) and c.id in ("Exception", "BaseException")) for c in caught):
                lines.append(node.lineno)
    return lines


def test_no_broad_except():
    assert {str(path): lines for path in python_files("src") if (lines := broad_handlers(path.read_text()))} == {}
    assert broad_handlers("try: f()\nexcept (OSError, Exception): pass") == [2]
    assert broad_handlers("try: f()\nexcept: pass") == [2]


def environment_variables(source: str) -> set[str]:
    """What `os.environ` and `os.getenv` are asked for, as it is written: a name in quotes, or an expression."""
    asked = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            asked.add(ast.unparse(node.slice))
        elif isinstance(node, ast.Call) and re.search(r"environ\.\w+$|getenv$", ast.unparse(node.func)):
            asked.add(ast.unparse(node.args[0]))
    return asked


def test_few_environment_variables():
    sample = "os.environ['A'], os.environ.get('B', ''), os.getenv('C'), environ[D], os.environ.setdefault('A', '')"
    assert environment_variables(sample) == {"'A'", "'B'", "'C'", "D"}
    asked = set().union(*(environment_variables(path.read_text()) for path in python_files("src")))
    assert len(asked) <= MAX_ENVIRONMENT_VARIABLES, asked


def checking_asserts(source: str) -> list[int]:
    """Lines of asserts that do more than tell mypy that something is not None, or of which type it is."""
    narrowing = re.compile(r"\w[\w.]* is not None|isinstance\(.*\)")
    tests = [(node.lineno, node.test) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [line for line, test in tests if not narrowing.fullmatch(ast.unparse(test))]


def test_input_is_not_checked_with_assert():
    """`python -O` drops asserts."""
    assert checking_asserts("assert self.x is not None\nassert isinstance(x, int)\nassert x > 0") == [3]
    found = {str(path): checking_asserts(path.read_text()) for path in python_files("src")}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_version_is_in_one_place():
    version = flash_moe_mlx.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", version)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    stated = re.compile(rf"""version\s*=\s*["']{re.escape(version)}["']""")
    assert [path for path in [*python_files("src"), ROOT / "pyproject.toml"] if stated.search(path.read_text())] == []
    assignments = [path for path in python_files("src") if "__version__ =" in path.read_text()]
    assert assignments == [SRC / "__init__.py"]


def test_no_path_of_a_developers_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|farm|root|home|Users)/[a-z]")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".npz", ".json", ".png") or not path.is_file():
            continue
        if pattern.search(path.read_text(errors="replace")):
            found.append(name)
    assert found == []
