"""Checks of this library alone: its memory stays within the limit, and unused experts cost nothing."""

import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.cases import OVERHEAD_BYTES, Case
from benchmarks.peers.engines import Places
from benchmarks.peers.measure import Run, measure
from benchmarks.run import limits_of
from benchmarks.synthetic import PRESETS, write_checkpoint

_HOURS = 4 * 3600.0
_PROMPT, _WARMUP, _TOKENS = 256, 400, 64  # after 400 tokens of 8 experts nearly each of 256 was chosen once


def memory(places: Places, limits_gib: list[int], prompt: int, decode: int) -> None:
    """Load, prefill and decode in control groups; print the most anonymous memory against what is allowed.

    Raises:
        SystemExit: If a run was killed, did not end, or held more.
    """
    bad = []
    print("cgroup GiB\tmemory_limit GB\tanonymous GB\tallowed GB\ttokens\tprefill tok/s\tdecode tok/s\tstatus")
    for gib in limits_gib:
        case = Case(f"memory-{gib}gib", gib, "uniform", prompt=prompt, warmup=0, tokens=decode)
        run = measure(case, "ours", places, phase_seconds=_HOURS, limit_seconds=_HOURS)
        allowed = (run.memory_limit or 0) + OVERHEAD_BYTES
        if run.status != "ok" or run.tokens < decode or (run.rss_gb or 0) * 1e9 > allowed:
            bad.append(gib)
        print(
            f"{gib}\t{(run.memory_limit or 0) / 1e9:.3f}\t{run.rss_gb or 0:.3f}\t{allowed / 1e9:.3f}\t{run.tokens}\t"
            f"{run.prompt_tok_s or 0:.2f}\t{run.tok_s or 0:.2f}\t{run.status} {run.note}",
            flush=True,
        )
    if bad:
        raise SystemExit(f"not within the limit, or not to the end, at {bad} GiB")


def experts(places: Places, folder: Path, layers: int, alternations: int) -> None:
    """Decode with E and 2 E experts, all of them in slots and half of E, files in the page cache.

    The larger model gets as many slots as bring it the smaller one's hit rate: its misses are not what is asked about.

    Raises:
        SystemExit: If the time of a token differs by a tenth or more.
    """
    models = {}
    for count in (PRESETS["35b"].num_experts // 2, PRESETS["35b"].num_experts):
        models[count] = folder / f"{count}-experts-{layers}-layers"
        if not (models[count] / "config.json").exists():
            dimensions = replace(PRESETS["35b"], num_hidden_layers=layers, num_experts=count, vocab_size=8192)
            write_checkpoint(models[count], dimensions)
    context = _PROMPT + _WARMUP + _TOKENS + 8
    limits = {count: limits_of(model, context) for count, model in models.items()}
    case = Case("experts", None, "uniform", prompt=_PROMPT, warmup=_WARMUP, tokens=_TOKENS, warm=True)
    half = {count: which[1] for count, which in limits.items()}
    (_, fewer_hits), (more, hits) = (
        (count, measure(case, "ours", places, model=model, memory_limit=half[count]).hit_rate or 0)
        for count, model in models.items()
    )
    half[more] += round((limits[more][2] - half[more]) * (fewer_hits - hits) / (1 - hits))
    bad = False
    print("slots\texperts\tms per token\tmin\tmax\thit rate")
    for share, limit in (("all", {count: which[2] for count, which in limits.items()}), ("half", half)):
        runs: dict[int, list[Run]] = {count: [] for count in models}
        for _ in range(alternations):
            for count, model in models.items():
                runs[count].append(measure(case, "ours", places, model=model, memory_limit=limit[count]))
        medians = []
        for count, own in runs.items():
            times = [run.token_ms or 0 for run in own]
            medians.append(statistics.median(times))
            hits = statistics.median(run.hit_rate or 0 for run in own)
            print(f"{share}\t{count}\t{medians[-1]:.1f}\t{min(times):.1f}\t{max(times):.1f}\t{hits:.3f}", flush=True)
        change = medians[1] / medians[0] - 1
        bad |= abs(change) >= 0.1
        print(f"# {share} in slots: {change:+.1%} with twice the experts")
    if bad:
        raise SystemExit("the time of a token changes by a tenth or more")
