"""Memory and cores available to this process: physical memory, cgroup limits, Metal's recommended working set."""

import os
from pathlib import Path

from .stats import format_bytes
from .system import installed_memory_bytes

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_OVERHEAD_BYTES = 600_000_000
"""Memory of the interpreter, libraries and tokenizer, which ``memory_limit`` doesn't include (docs/quickstart.md)."""

SAFE_SHARE = 0.7
"""Default share of the usable memory; the rest is left to the page cache and other programs."""

LITTLE_SHARE = 0.5
"""Default share of the memory left by the interpreter, on machines where the interpreter takes most of it."""

WORKING_SET_SHARE = 0.9
"""Default share of Metal's recommended working set, which already excludes the system's share."""


def physical_memory_bytes() -> int:
    """Return the installed memory of this machine in bytes."""
    return installed_memory_bytes()


def cgroup_limit_bytes(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the smallest memory limit of this process's control group and its parents (v1 and v2), or None."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            directory, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            directory, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            limits += _read_limit(directory.joinpath(*parts[:depth]) / name)
    return min(limits, default=None)


def _read_limit(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    # cgroup v1 writes "no limit" as a number near 2^63.
    return [int(text)] if text.isdigit() and int(text) < 1 << 60 else []


def usable_memory_bytes() -> int:
    """Return the memory of this machine, or of this process's control group if that is smaller."""
    return min(size for size in (physical_memory_bytes(), cgroup_limit_bytes()) if size is not None)


def default_memory_limit_bytes(
    recommended_working_set_bytes: int | None = None, gpu_memory_bytes: int | None = None
) -> int:
    """Return the default memory limit, a safe share of the usable memory; 0 if nothing is left.

    Args:
        recommended_working_set_bytes: Metal's recommended working set for this GPU, if any.
        gpu_memory_bytes: Dedicated memory of the GPU, if it has any.
    """
    return _default_limit(recommended_working_set_bytes, gpu_memory_bytes)[0]


def explain_default_memory_limit(
    recommended_working_set_bytes: int | None = None, gpu_memory_bytes: int | None = None
) -> str:
    """Explain in words how `default_memory_limit_bytes` was computed."""
    return _default_limit(recommended_working_set_bytes, gpu_memory_bytes)[1]


def _default_limit(working_set: int | None, gpu_memory: int | None) -> tuple[int, str]:
    usable = usable_memory_bytes()
    safe, reason = int(usable * SAFE_SHARE), f"{SAFE_SHARE:.0%} of {format_bytes(usable)} of memory"
    if working_set and int(working_set * WORKING_SET_SHARE) < safe:
        safe = int(working_set * WORKING_SET_SHARE)
        reason = (
            f"{WORKING_SET_SHARE:.0%} of the {format_bytes(working_set)} that Metal recommends "
            "(raised by: sudo sysctl iogpu.wired_limit_mb=N)"
        )
    overhead = format_bytes(PROCESS_OVERHEAD_BYTES)
    limit, reason = safe - PROCESS_OVERHEAD_BYTES, f"{reason}, less {overhead} for the interpreter and its libraries"
    if limit < (little := int((usable - PROCESS_OVERHEAD_BYTES) * LITTLE_SHARE)):
        limit = little
        reason = (
            f"{LITTLE_SHARE:.0%} of what {format_bytes(usable)} of memory have beyond {overhead} for the interpreter "
            "and its libraries"
        )
    # The interpreter uses host memory, so nothing is subtracted for it from a GPU's dedicated memory.
    if gpu_memory and int(gpu_memory * SAFE_SHARE) < limit:
        limit, reason = int(gpu_memory * SAFE_SHARE), f"{SAFE_SHARE:.0%} of {format_bytes(gpu_memory)} of GPU memory"
    return max(limit, 0), reason


def cache_folder() -> Path:
    """Return this library's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_moe_mlx"
