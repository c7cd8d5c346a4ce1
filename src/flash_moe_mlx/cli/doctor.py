"""``flash-moe doctor``: report on this machine and suggest changes."""

import mmap
import os
import platform
import tempfile
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .. import __version__, system
from ..installation import backend_fault, install_command
from ..progress import report
from .options import Json, model_path, print_json
from .printable import echo
from .tables import print_paragraphs, print_rows

if TYPE_CHECKING:
    from ..storage.disk_probe import DiskProbe

PACKAGES = (
    "mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy", "numba", "prompt_toolkit", "starlette", "uvicorn",
    "matplotlib",
)  # fmt: skip
EXTRAS = (
    ("server", "uvicorn", "flash-moe serve"),
    ("plot", "matplotlib", "flash-moe plan --plot"),
)
RECORD_BYTES = 1_769_472  # an expert of Qwen3.5-35B-A3B at 4 bits
PROBE_FILE_BYTES = 256 << 20
SLOW_DISK = 1e9
WORKING_SET_SHARE = 0.8  # of a Mac's memory, above which nothing is left to raise


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model whose files the disk probe reads. Default: none.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Where to probe the disk, if no model is named: 256 MB are written and removed. The hub's cache "
            "without it.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    disk: Annotated[bool, typer.Option(help="Probe the disk.")] = True,
    kernels: Annotated[bool, typer.Option(help="Run each kernel once and compare it with its reference.")] = True,
    json: Json = False,
) -> None:
    """Check this machine's backend, memory, kernels and disk.

    Lists the versions installed too, and suggests changes.

    With --model, the disk probe reads that model's experts, bypassing the page cache. Kernels that fail to compile,
    or whose results differ from their references, are listed with the compiler's message.

    Examples:
        flash-moe doctor --json
        flash-moe doctor --no-disk
    """
    report("importing MLX")
    if fault := backend_fault():
        _without_backend(fault, json)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": system.describe_system(),
        "cores": os.cpu_count(),
        "versions": {"flash_moe_mlx": __version__, **{name: _version(name) for name in PACKAGES}},
        **_backend(),
        "memory": _memory(),
        "default_memory_limit_reason": _limit_reason(),
    }
    report("probing the disk")
    probe = (_probe_model(model) if model is not None else _probe_directory(directory)) if disk else None
    found["disk"] = None
    if probe is not None:
        rate = {"bytes_per_second": probe.bytes_per_second, "plausible": probe.is_plausible}
        found["disk"] = asdict(probe) | rate
    report("checking kernels")
    found["kernels"] = _check_kernels() if kernels else None
    found["advice"] = _advice(found)
    if json:
        print_json(found)
        return
    print_rows(_rows(found))
    echo()
    print_paragraphs([f"- {line}" for line in found["advice"]] or ["Nothing to change."])


def _without_backend(fault: str, json: bool) -> NoReturn:
    """Report why nothing can run, and end with exit code 1."""
    found = {
        "python": platform.python_version(),
        "system": system.describe_system(),
        "backend": None,
        "versions": {"flash_moe_mlx": __version__, **{name: _version(name) for name in PACKAGES}},
        "advice": [fault],
    }
    if json:
        print_json(found)
    else:
        echo(f"flash-moe: {fault}", err=True)
    raise typer.Exit(1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _backend() -> dict[str, Any]:
    import mlx.core as mx

    from ..ops import cpu
    from ..ops.backend import backend

    found = {"backend": backend(), "device": mx.device_info(), "cpu_kernels": cpu.available()}
    if found["backend"] == "cuda":
        from ..ops.gpu.cuda_modules import explain_compilation

        found["compilation"] = explain_compilation()
    return found


def _memory() -> dict[str, int | None]:
    from ..machine import cgroup_limit_bytes, default_memory_limit_bytes, physical_memory_bytes
    from ..runtime.loading import default_gpu_memory_limit_bytes

    working_set = system.recommended_working_set_bytes()
    return {
        "physical_bytes": physical_memory_bytes(),
        "cgroup_limit_bytes": cgroup_limit_bytes(),
        "recommended_working_set_bytes": working_set,
        "default_memory_limit_bytes": default_memory_limit_bytes(working_set),
        "default_gpu_memory_limit_bytes": default_gpu_memory_limit_bytes(),
    }


def _check_kernels() -> list[dict[str, Any]]:
    from ..lab.kernel_check import check_kernels

    return [{**asdict(check), "ok": check.ok, "says": str(check)} for check in check_kernels()]


def _limit_reason() -> str:
    from ..runtime.loading import limit_reason

    return limit_reason()


def _probe_model(model: str) -> "DiskProbe":
    from ..formats.checkpoint import Checkpoint
    from ..storage.disk_probe import probe_disk

    checkpoint = Checkpoint.open(Path(model_path(model)))
    return probe_disk(checkpoint.expert_files, checkpoint.layout(checkpoint.moe_layers[0]).record_bytes)


def _probe_directory(directory: Path | None) -> "DiskProbe":
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..storage.disk_probe import probe_disk

    if directory is None:
        cache = Path(HF_HUB_CACHE)
        directory = next(path for path in (cache, *cache.parents) if path.is_dir() and os.access(path, os.W_OK))
    with tempfile.NamedTemporaryFile(dir=directory, prefix="flash-moe-probe-", buffering=0) as file:
        system.avoid_page_cache(file.fileno())
        with closing(mmap.mmap(-1, 1 << 20)) as block:  # page-aligned, as direct writes must be
            block[:] = os.urandom(len(block))  # random data: disks may compress
            for _ in range(PROBE_FILE_BYTES // len(block)):
                file.write(block)
        system.full_sync(file.fileno())
        return probe_disk([Path(file.name)], RECORD_BYTES)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from ..stats import format_bytes

    memory, disk = found["memory"], found["disk"]
    rows = [
        ("backend", found["backend"] + (", without numba" if _lacks_numba(found) else "")),
        ("device", str(found["device"].get("device_name", platform.processor() or "unknown"))),
        ("system", f"{found['system']}, {found['cores']} cores, Python {found['python']}"),
    ]
    if "compilation" in found:
        rows.append(("compilation", found["compilation"]))
    names = {"physical": "physical memory", "cgroup limit": "control group's limit"}
    sizes = ((name.removesuffix("_bytes").replace("_", " "), size) for name, size in memory.items())
    rows += [(names.get(name, name), format_bytes(size)) for name, size in sizes if size is not None]
    rows += [("", found["default_memory_limit_reason"])]
    if checks := found["kernels"]:
        good = [check for check in checks if check["ok"]]
        rows.append(("kernels", f"{len(good)} of {len(checks)} operations are what their references are"))
        rows += [("", f"{check['name']}: {check['says']}") for check in checks if not check["ok"]]
    if disk is not None:
        how = "past the page cache" if disk["direct"] else "through the page cache, which can't be bypassed here"
        rows.append(
            (
                "disk",
                f"{format_bytes(disk['bytes_per_second'])}/s, {disk['num_reads']:,} reads of "
                f"{format_bytes(disk['record_bytes'])} by {disk['num_threads']} threads, {how}",
            )
        )
    return rows + [(name, installed or "not installed") for name, installed in found["versions"].items()]


def _lacks_numba(found: dict[str, Any]) -> bool:
    """Return whether numba is missing, so that MLX's slow CPU kernels would run."""
    return found["backend"] == "cpu" and not found["cpu_kernels"]


def _advice(found: dict[str, Any]) -> list[str]:
    """Return suggested changes, most important first."""
    from ..ops.backend import REFERENCE_SWITCH
    from ..stats import format_bytes

    memory, disk, advice = found["memory"], found["disk"], []
    for package, specifier in _required().items():
        if (installed := found["versions"].get(package)) and installed not in specifier:
            advice.append(f"{package} {installed} must be {specifier}: pip install '{package}{specifier}'.")
    if found["backend"] == "cpu":
        if os.path.exists("/dev/nvidiactl"):
            advice.append(f"There is an NVIDIA GPU that MLX doesn't use: {install_command('cuda13')}")
        if system.is_macos():
            advice.append("MLX runs on the CPU: use a Mac with Apple silicon and an arm64 Python.")
        elif _lacks_numba(found):
            advice.append(f"Everything is 10 to 50 times slower without numba: {install_command('cpu')}")
    for extra, package, what in EXTRAS:
        if found["versions"].get(package, "") is None:
            advice.append(f"{what} needs {package}: {install_command(extra)}")
    if any(not check["ok"] for check in found["kernels"] or ()):
        advice.append(
            f"Kernels failed: report the output of flash-moe doctor --json. {REFERENCE_SWITCH}=1 runs without them."
        )
    working_set = memory["recommended_working_set_bytes"]
    if found["backend"] == "metal" and working_set and working_set < WORKING_SET_SHARE * memory["physical_bytes"]:
        advice.append(
            f"The GPU may use {format_bytes(working_set)} of {format_bytes(memory['physical_bytes'])}. "
            "sudo sysctl iogpu.wired_limit_mb=N raises that until the next start."
        )
    if memory["cgroup_limit_bytes"] and memory["cgroup_limit_bytes"] < memory["physical_bytes"]:
        advice.append(
            f"A control group limits this process to {format_bytes(memory['cgroup_limit_bytes'])}, page cache "
            "included. Raise it if you can."
        )
    if disk is not None and not disk["direct"]:
        advice.append("This file system has no direct reads, so its rate was not measured. Keep models on a local SSD.")
    elif disk is not None and not disk["plausible"]:
        advice.append(
            f"{format_bytes(disk['bytes_per_second'])}/s is more than a disk gives: the files came from memory. "
            "Name a model that is larger than memory, after: sudo purge."
        )
    elif disk is not None and disk["bytes_per_second"] < SLOW_DISK:
        advice.append(
            f"The disk gives {format_bytes(disk['bytes_per_second'])}/s, and speed is bound by it where experts "
            "aren't in memory. Keep models on the fastest SSD."
        )
    return advice


def _required() -> dict[str, Any]:
    """Return the version requirements that this library, if installed, declares for its dependencies."""
    from packaging.requirements import Requirement

    try:
        lines = requires("flash_moe_mlx") or []
    except PackageNotFoundError:  # run from its sources
        return {}
    return {r.name: r.specifier for line in lines if not (r := Requirement(line)).marker}
