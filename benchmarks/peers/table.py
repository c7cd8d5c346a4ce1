"""Tabulates and plots the medians of the runs."""

import csv
import statistics
from pathlib import Path

from benchmarks.peers.cases import CASES, Case

Row = dict[str, str]
_COLUMNS = (
    "case", "engine", "tok/s", "min", "max", "runs", "tokens", "load s", "hit rate", "read MB/token",
    "from disk MB/token", "disk GB/s before", "after", "I/O bound tok/s", "of bound",
    "anonymous GB", "against", "target",
)  # fmt: skip


def read_runs(path: Path, commit: str | None = None) -> list[Row]:
    with open(path) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row for row in rows if commit is None or not row["engine"].startswith("ours") or row["commit"] == commit]


def _of(rows: list[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def _median(rows: list[Row], name: str, form: str = ".3g") -> str:
    values = _of(rows, name)
    return format(statistics.median(values), form) if values else ""


def _ratio(case: Case, engine: str, rows: dict[str, list[Row]]) -> tuple[str, str]:
    """Return our median over each peer's, and the target."""
    against, asked = [], []
    for own, peer, least in case.targets:
        ours, theirs = _of(rows.get(own, []), "tok_s"), _of(rows.get(peer, []), "tok_s")
        if own == engine and ours:
            asked.append(f"{least:g} x {peer}")
            against.append(f"{statistics.median(ours) / statistics.median(theirs):.2f} x" if theirs else "-")
            if case.greedy and theirs:
                against[-1] += _same_tokens(rows[own], rows[peer])
    return ", ".join(against), ", ".join(asked)


def _same_tokens(ours: list[Row], theirs: list[Row]) -> str:
    pairs = [(a["ids"].split(), b["ids"].split()) for a in ours for b in theirs]
    same = all(a[: len(b)] == b[: len(a)] for a, b in pairs)
    return f", {'the same' if same else 'OTHER'} {min(len(ids) for pair in pairs for ids in pair)} tokens"


def table(runs: list[Row]) -> str:
    """Return Markdown with one line per case and engine."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for name, case in CASES.items():
        rows: dict[str, list[Row]] = {}
        for row in runs:
            if row["case"] == name:
                rows.setdefault(row["engine"], []).append(row)
        for engine, own in sorted(rows.items(), key=lambda item: (not item[0].startswith("ours"), item[0])):
            speeds = _of(own, "tok_s")
            bounds = [t / b for t, b in zip(_of(own, "tok_s"), _of(own, "bound_tok_s"), strict=False)]
            failed = sorted({row["status"] for row in own if row["status"] != "ok"})
            cells = [
                name,
                engine,
                f"**{statistics.median(speeds):.3g}**" if speeds else ", ".join(failed) or "-",
                f"{min(speeds):.3g}" if speeds else "",
                f"{max(speeds):.3g}" if speeds else "",
                str(len(own)),
                _median(own, "tokens", ".0f"),
                _median(own, "load_s"),
                _median(own, "hit_rate"),
                _median(own, "mb_token"),
                _median(own, "storage_mb_token"),
                _median(own, "disk_gb_s"),
                _median(own, "disk_after_gb_s"),
                _median(own, "bound_tok_s"),
                f"{statistics.median(bounds):.0%}" if bounds else "",
                _median(own, "rss_gb"),
                *_ratio(case, engine, rows),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[Row], path: Path) -> None:
    """Plot bars of the medians with the span from slowest to fastest run, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [name for name in CASES if any(row["case"] == name for row in runs)]
    engines = sorted({row["engine"] for row in runs}, key=lambda engine: (not engine.startswith("ours"), engine))
    figure, axes = pyplot.subplots(figsize=(11, 5))
    for place, engine in enumerate(engines):
        for at, name in enumerate(cases):
            speeds = _of([row for row in runs if (row["case"], row["engine"]) == (name, engine)], "tok_s")
            if not speeds:
                continue
            middle = statistics.median(speeds)
            span = [[middle - min(speeds)], [max(speeds) - middle]]
            x = at + (place - (len(engines) - 1) / 2) * 0.8 / len(engines)
            axes.bar(x, middle, 0.8 / len(engines), yerr=span, color=f"C{place}", capsize=2)
            axes.annotate(f"{middle:.3g}", (x, max(speeds)), ha="center", va="bottom", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s, median and span")
    axes.set_xticks(range(len(cases)), [name.replace("-", "\n") for name in cases], fontsize=8)
    axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(engines))], engines, fontsize=8)
    axes.set_title("Qwen3.5-35B-A3B dimensions, 4 bits, K 8, 2 cores, 24 GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
