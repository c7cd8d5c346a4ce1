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

# A wing (a folder, or a module of the package's root) imports only from those before it. docs/architecture.md says what
# each holds. Inside a wing, and over all of them, no file may import in a circle.
WINGS = [
    "errors", "system", "installation", "forks", "stats", "progress", "machine", "formats", "config",
    "storage", "ops", "experts", "models", "packing", "runtime", "chat", "planning", "lab", "plot", "server", "cli",
]  # fmt: skip
# Modules that must work without MLX: what reads headers, plans and simulates.
WITHOUT_MLX = [
    "errors", "system", "forks", "stats", "machine", "config", "formats",
    "storage.file_io", "storage.disk_probe", "storage.io_choice", "storage.record_check", "storage.io_threads",
    "storage.read_progress", "storage.pending_reads",
    "experts.trace",
    "experts.policies", "experts.slots", "experts.budget", "experts.reservations", "experts.memory_plan",
    "models.config", "planning.synthetic_routing", "planning.simulation",
]  # fmt: skip

MAX_LINES = 500
MAX_ENVIRONMENT_VARIABLES = 5  # for users to set
LAUNCHERS_VARIABLES = {"'MLX_HOSTFILE'", "'MLX_RANK'"}  # by which mlx.launch tells a process its place in a ring

EXPORTED = {
    "StreamingModel", "StreamingEngine", "Progress", "CALCULATOR", "Part", "ToolCall", "ToolOutcome", "AnswerEnd",
    "RoutingTrace", "replay", "format_bytes",
    "load", "load_model", "generate", "stream_generate", "stream_generate_async", "GenerationResponse",
    "Grammar", "PrefixCache", "chat_prompt", "Conversation", "load_tools",
    "pack", "verify", "plan", "Plan", "profile", "quality", "Quality",
    "FlashMoEError", "CheckpointError", "MissingTensorError", "CorruptError", "UnsupportedModelError",
    "MemoryLimitError", "StoreError", "ShortReadError", "ChecksumError", "PackError", "DiskFullError", "ShapeError",
    "DistributedError",
    "NonFiniteError", "BackendError", "RequestError",
    "__version__",
}  # fmt: skip


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    """Return a module's dotted name inside the package: `ops/expert_ffn.py` -> `ops.expert_ffn`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, package: tuple[str, ...], modules: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of each import of our own package in a module of `package`, functions included.

    `from . import x` names the module x where there is one, else the package itself.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = (*package[: len(package) - node.level + 1], *base)
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "flash_moe_mlx":
                inside = ".".join(name[1:])
                module = inside if inside in modules else inside.rpartition(".")[0]
                if module:
                    yield node.lineno, module


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which modules each module imports. `sources` maps names such as `ops/__init__.py` to texts."""
    names = {path: module_name(SRC / path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        package = ("flash_moe_mlx", *Path(path).parts[:-1])
        imported = imported_modules(source, package, set(names.values()))
        graph[names[path]] = {module for _, module in imported} - {names[path]}
    return graph


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """List imports from a wing that comes later, and modules whose wing has no place."""
    wing = {module: module.split(".")[0] for module in {*graph, *(m for targets in graph.values() for m in targets)}}
    faults = [f"{module}: no place in WINGS" for module in graph if wing[module] not in WINGS]
    return faults + [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if wing[module] in WINGS and wing[target] in WINGS and WINGS.index(wing[target]) > WINGS.index(wing[module])
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Find modules that import each other in a ring, in order; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for target in sorted(graph.get(module, ())):
                if found := visit(target, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def package_sources() -> dict[str, str]:
    roots = {SRC / "__init__.py", SRC / "__main__.py"}
    return {str(path.relative_to(SRC)): path.read_text() for path in python_files("src") if path not in roots}


def test_imports_run_one_way_between_wings():
    assert upward_imports(import_graph(package_sources())) == []


def test_no_files_import_in_a_circle():
    assert circle(import_graph(package_sources())) == []


@pytest.mark.parametrize(
    ("sources", "up", "ring"),
    [
        ({"storage/store.py": "from ..errors import ShapeError", "errors.py": ""}, 0, 0),
        ({"storage/store.py": "from ..runtime.loading import load", "runtime/loading.py": ""}, 1, 0),
        ({"storage/store.py": "def f():\n    from .. import cli", "cli/__init__.py": ""}, 1, 0),
        ({"ops/a.py": "from ..models.moe_block import StreamingMoE", "models/moe_block.py": ""}, 1, 0),
        ({"models/a.py": "import flash_moe_mlx.server", "server/__init__.py": ""}, 1, 0),
        ({"utils.py": "import os"}, 1, 0),
        ({"ops/a.py": "from . import b", "ops/b.py": "from .cpu import c", "ops/cpu/c.py": "from ..a import f"}, 0, 4),
        ({"ops/a.py": "from .b import f", "ops/b.py": "def g():\n    from .a import f"}, 0, 3),
    ],
)
def test_import_checks_find_faults(sources: dict[str, str], up: int, ring: int):
    graph = import_graph(sources)
    assert len(upward_imports(graph)) == up
    assert len(circle(graph)) == ring


def heavy_imports(statement: str) -> set[str]:
    """Return the slow libraries that are loaded after `statement`, in a fresh interpreter."""
    heavy = {"mlx", "mlx_lm", "numba", "torch", "transformers"}
    code = f"import sys; {statement}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_modules_for_headers_and_plans_need_no_mlx(module: str):
    inside = [name for name in import_graph(package_sources()) if name == module or name.startswith(module + ".")]
    assert heavy_imports("; ".join(f"import flash_moe_mlx.{name}" for name in inside)) == set()


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


@pytest.mark.parametrize(
    "name", re.findall(r"^##+ ([A-Za-z]\w*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
)
def test_every_name_of_the_api_page_can_be_imported(name: str):
    """From the package itself, or as a member of what is called model.streaming there, or of what its calls return."""
    from flash_moe_mlx.experts.engine import StreamingEngine

    if hasattr(StreamingEngine, name) or name in ("StreamingStats", "GenerationStats", "Errors"):
        return
    scope: dict[str, object] = {}
    exec(f"from flash_moe_mlx import {name}", scope)
    assert name in EXPORTED and scope[name] is getattr(flash_moe_mlx, name)


def test_the_plots_have_their_public_name():
    from flash_moe_mlx import plot
    from flash_moe_mlx.lab import plot as defined

    assert plot.__all__ == defined.__all__ != []
    assert all(getattr(plot, name) is getattr(defined, name) for name in plot.__all__)


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


DIFFERENT_ON_MACOS = {
    "F_FULLFSYNC", "F_NOCACHE", "O_DIRECT", "copy_file_range", "fdatasync", "killpg", "mac_ver", "mallopt", "msync",
    "posix_fadvise", "posix_fallocate", "preadv", "pthread_set_qos_class_self_np", "ru_maxrss", "sched_getaffinity",
    "sysconf", "max_recommended_working_set_size", "memory_size",
}  # fmt: skip


def platform_calls(source: str) -> set[str]:
    """Names of what macOS does otherwise, used other than through the module `system`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "system":
            name = ast.unparse(node)
            found |= {name} if node.attr in DIFFERENT_ON_MACOS or name in ("sys.platform", "platform.system") else set()
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").endswith("system"):
            found |= DIFFERENT_ON_MACOS & {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value in DIFFERENT_ON_MACOS:
            found.add(node.value)
    return found


def test_what_macos_does_otherwise_is_in_one_module():
    sample = "import os, sys\nos.preadv(1, [], 0)\nsystem.preadv(1, [], 0)\nos.killpg(1, len(sys.platform))"
    assert platform_calls(sample) == {"os.preadv", "sys.platform", "os.killpg"}
    sample = "from os import fdatasync\nfrom ..system import preadv\ninfo.get('memory_size')"
    assert platform_calls(sample) == {"fdatasync", "memory_size"}
    others = [path for path in python_files("src", "examples") if path != SRC / "system.py"]
    assert {str(path): calls for path in others if (calls := platform_calls(path.read_text()))} == {}


def environment_variables(source: str) -> set[str]:
    """Return the arguments of `os.environ` and `os.getenv` as written: names in quotes, or expressions."""
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
    assert len(asked - LAUNCHERS_VARIABLES) <= MAX_ENVIRONMENT_VARIABLES, asked


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
