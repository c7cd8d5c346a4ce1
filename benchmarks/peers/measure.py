"""One run of one engine on one case: start the child, read its lines, stop it when enough was seen."""

import json
import os
import select
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from benchmarks.peers.cases import OVERHEAD_BYTES, Case
from benchmarks.peers.control_group import control_group, drop_caches, read_ahead
from benchmarks.peers.disk import disk_rate
from benchmarks.peers.engines import READ_AHEAD_KIB, Places, command

VOCABULARY = 1500  # ids stay inside the demo's, whose tokenizer the Python engines borrow
LARGEST_TOKENS = 4096


@dataclass
class Run:
    """Figures of one run; None where the engine doesn't say or the run didn't get there."""

    case: str
    engine: str
    started: str
    commit: str
    status: str = "ok"
    tok_s: float | None = None
    token_ms: float | None = None
    slowest_ms: float | None = None
    warmup: int = 0
    tokens: int = 0
    load_s: float | None = None
    prompt: int = 0
    prompt_tok_s: float | None = None
    hit_rate: float | None = None
    mb_token: float | None = None
    wait_share: float | None = None
    disk_gb_s: float | None = None
    disk_after_gb_s: float | None = None
    disk_depth: int | None = None
    bound_tok_s: float | None = None
    storage_mb_token: float | None = None
    read_ahead_kib: int | None = None
    rss_gb: float | None = None
    memory_limit: int | None = None
    ids: str = ""
    note: str = ""

    @classmethod
    def header(cls) -> str:
        return "\t".join(f.name for f in fields(cls))

    def row(self) -> str:
        return "\t".join(
            "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in asdict(self).values()
        )


@dataclass
class _Seen:
    """The child's output so far."""

    load_s: float | None = None
    prompt_s: float | None = None
    prompt_figures: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    figures: list[list[float]] = field(default_factory=list)
    storage: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    stats: dict[str, object] = field(default_factory=dict)

    def warmup(self, case: Case, seconds: float) -> int:
        """Return the number of warm-up tokens: as many as the case says, or as fit the time."""
        passed = np.cumsum(self.seconds)
        return min(case.warmup, int(np.searchsorted(passed, seconds)) + 1) if self.seconds else 0


def token_file(folder: Path) -> Path:
    path = folder / "tokens"
    ids = np.random.default_rng(5).integers(3, VOCABULARY, LARGEST_TOKENS)
    path.write_text(" ".join(map(str, ids.tolist())))
    return path


def measure(
    case: Case,
    engine: str,
    places: Places,
    *,
    model: Path | None = None,
    memory_limit: int | None = None,
    extra: tuple[str, ...] = (),
    phase_seconds: float = 45,
    limit_seconds: float = 170,
) -> Run:
    """Run an engine on a case: from dropped caches, or from a file that was read through.

    Args:
        case: What to run.
        engine: One of ``engines.ENGINES``.
        places: Where things lie.
        model: Instead of the case's.
        memory_limit: This library's limit; by default the group's limit less the rest of the process.
        extra: More of the child's arguments.
        phase_seconds: The most that warming up takes, and then measuring.
        limit_seconds: After which the child is stopped, whatever it has got to.
    """
    model = model or places.model(engine, case.routing, case.layers)
    if memory_limit is None:
        whole = case.limit_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - 2_000_000_000
        memory_limit = whole - OVERHEAD_BYTES
    run = Run(case.name, engine, time.strftime("%Y-%m-%dT%H:%M:%S"), _commit())
    ours = engine.startswith("ours")
    run.memory_limit = memory_limit if ours else None
    if not case.warm:
        drop_caches()
    before, run.disk_depth = disk_rate(_largest(model), _record_bytes(model))
    run.disk_gb_s = before / 1e9
    if case.warm:
        _read_through(model)
    with tempfile.TemporaryDirectory() as name, open(Path(name) / "errors", "w+") as errors:
        words, environment = command(
            engine, places, model, token_file(Path(name)), case.prompt, case.warmup + case.tokens, memory_limit
        )
        with (
            read_ahead(_largest(model), READ_AHEAD_KIB.get(engine)) as run.read_ahead_kib,
            control_group("flash-moe-peers", case.limit_bytes) as group,
        ):
            words += ["--greedy"] if case.greedy else []
            child = group.start([*words, *extra], environment, errors)
            seen = _listen(child, case, phase_seconds, time.monotonic() + limit_seconds)
            run.status = "killed for memory" if group.killed() else "ok"
            run.rss_gb = group.most_rss_bytes / 1e9
        after, _ = disk_rate(_largest(model), _record_bytes(model))
        run.disk_after_gb_s = after / 1e9
        errors.seek(0)
        if not seen.prompt_s:
            run.status = "time is up" if child.returncode == -15 else run.status if run.status != "ok" else "failed"
            run.note = " ".join(errors.read()[-300:].split())
    _figures(run, seen, case, phase_seconds, (before + after) / 2)
    return run


def _listen(child: subprocess.Popen[str], case: Case, phase_seconds: float, deadline: float) -> _Seen:
    seen = _Seen()
    try:
        for line in _lines(child, deadline):
            kind, *words = line.split(maxsplit=1 if line.startswith("stats") else -1)
            if kind == "load":
                seen.load_s = float(words[0])
            elif kind == "prompt":
                seen.prompt_s = float(words[1])
                seen.prompt_figures = list(map(float, words[2:]))
                seen.storage.append(_storage_bytes(child.pid))
            elif kind == "token":
                seen.seconds.append(float(words[1]))
                seen.ids.append(words[2])
                seen.figures.append(list(map(float, words[3:])))
                seen.storage.append(_storage_bytes(child.pid))
                warm = seen.warmup(case, phase_seconds)
                if sum(seen.seconds[warm:]) > phase_seconds and len(seen.seconds) - warm >= 3:
                    break
            elif kind == "stats":
                seen.stats = json.loads(words[0])
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return seen


def _lines(child: subprocess.Popen[str], deadline: float) -> Iterator[str]:
    assert child.stdout is not None
    descriptor, rest = child.stdout.fileno(), b""
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.decode() for line in lines if line.strip())


def _figures(run: Run, seen: _Seen, case: Case, phase_seconds: float, rate: float) -> None:
    run.load_s, run.prompt = seen.load_s, case.prompt
    run.ids = " ".join(seen.ids) if case.greedy else ""
    if seen.prompt_s:
        run.prompt_tok_s = case.prompt / seen.prompt_s
    if case.measures_prompt:
        run.tok_s = run.prompt_tok_s
        if seen.prompt_figures:
            run.mb_token = seen.prompt_figures[2] / case.prompt / 1e6
        return
    run.warmup = seen.warmup(case, phase_seconds)
    measured = seen.seconds[run.warmup :][: case.tokens]
    run.tokens = len(measured)
    if not measured:
        if seen.seconds:  # so slow that only warming up was seen
            run.note = f"{len(seen.seconds)} tokens in {sum(seen.seconds):.0f} s, all of them warm-up"
            run.tok_s = 1 / seen.seconds[-1]
        return
    middle = statistics.median(measured)
    run.tok_s, run.token_ms, run.slowest_ms = 1 / middle, 1000 * middle, 1000 * max(measured)
    first, last = run.warmup - 1, run.warmup + len(measured) - 1
    # storage has one entry more: the prompt's.
    run.storage_mb_token = (seen.storage[last + 1] - seen.storage[first + 1]) / len(measured) / 1e6
    if seen.figures[last]:
        before = seen.figures[first] if first >= 0 else seen.prompt_figures
        hits, misses, nbytes, wait = (b - a for a, b in zip(before, seen.figures[last], strict=True))
        run.hit_rate = hits / (hits + misses) if hits + misses else None
        run.mb_token = nbytes / len(measured) / 1e6
        run.wait_share = wait / sum(measured)
        if nbytes:
            run.bound_tok_s = rate / (nbytes / len(measured))
    if seen.stats:
        run.note = f"{seen.stats['io']}, {seen.stats['slots']} slots, peak {seen.stats['peak'] / 1e9:.2f} GB"


def _storage_bytes(pid: int) -> int:
    """Return the bytes that the process has read from the device, page faults included."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _read_through(model: Path) -> None:
    for path in sorted(model.glob("*.safetensors")) if model.is_dir() else _parts(model):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(bytearray(1 << 24)):
                pass


def _parts(model: Path) -> list[Path]:
    return sorted(model.parent.glob(model.name.replace("-00001-of-", "-0000?-of-")))


def _largest(model: Path) -> Path:
    """Return the largest file, which holds experts."""
    if model.is_dir():
        return sorted(model.glob("*.safetensors"))[1]
    return _parts(model)[-1]


def _record_bytes(model: Path) -> int:
    """Return the bytes of one expert; a GGUF has the experts of the 35B."""
    if not model.is_dir():
        return 1_769_472
    text = json.loads((model / "config.json").read_text())["text_config"]
    return 3 * text["hidden_size"] * text["moe_intermediate_size"] * 9 // 16


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=7"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
