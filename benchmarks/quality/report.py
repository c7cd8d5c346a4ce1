"""From cells' lines to results.json, and from there to the tables and the plot of docs/quality.md."""

import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from .cases import ANSWERS_PER_CATEGORY, CALLS
from .cells import Cell, cells, read_config
from .measure import read_lines

Z = 1.959964  # 95 % of a normal distribution
ANSWERS = 11 * ANSWERS_PER_CATEGORY
RESULTS = Path(__file__).parent / "results.json"
PAGE, IMAGE = Path("docs/quality.md"), Path("docs/images/quality.svg")


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share. Reference: Wilson 1927, doi:10.1080/01621459.1927.10502953."""
    share, spread = right / of, Z * Z / of
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def perplexity(lines: list[dict[str, Any]]) -> list[float]:
    """Return the perplexity per token and its 95 % interval, for which each case counts as one observation."""
    tokens = sum(line["tokens"] for line in lines)
    mean = sum(line["nll"] for line in lines) / tokens
    squares = sum((line["nll"] - mean * line["tokens"]) ** 2 for line in lines)
    half = Z * math.sqrt(squares * len(lines) / max(1, len(lines) - 1)) / tokens
    return [round(math.exp(x), 5) for x in (mean, mean - half, mean + half)]


def summary(lines: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a cell's figures; ``base`` has the lines of the cell with 16 bits."""
    figures: dict[str, Any] = {}
    for kind, name in (("call", "calls"), ("answer", "answers")):
        if chosen := [line for line in lines if line["kind"] == kind]:
            figures[name] = {"right": sum(line["right"] for line in chosen), "of": len(chosen)}
            if "nll" in chosen[0]:
                figures[name]["perplexity"] = perplexity(chosen)
    outcomes = Counter(line["outcome"] for line in lines if line["kind"] == "call")
    figures["calls"] |= {"json": outcomes["json"], "broken": outcomes["broken"], "no_call": outcomes["no call"]}
    right = {line["case"]: line["right"] for line in base}
    if any(line["case"] not in right for line in lines):
        return figures
    pairs = Counter((right[line["case"]], line["right"]) for line in lines)
    return figures | {"lost": pairs[True, False], "gained": pairs[False, True]}


def collect(work: Path, expected: tuple[int, int] = (CALLS, ANSWERS)) -> dict[str, Any]:
    """Return the figures of every cell whose calls are finished, by model, with answers if those are finished too."""
    models = {}
    for folder in sorted(path.parent for path in work.glob("*/cells")):
        config = read_config(folder / "checkpoints" / "16")
        base = read_lines(folder / "cells" / "16.jsonl")
        rows = {}
        for cell in cells(config["num_experts_per_tok"], config["num_hidden_layers"]):
            lines = read_lines(folder / "cells" / f"{cell.name}.jsonl")
            if len(lines) < sum(expected):
                lines = [line for line in lines if line["kind"] == "call"]
            if len(lines) in (expected[0], sum(expected)):
                rows[cell.name] = {"bytes_per_token": cell.bytes_per_token(config), **summary(lines, base)}
        shape = ("hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        models[folder.name] = {"shape": {name: config[name] for name in shape}, "cells": rows}
    return models


def in_words(cell: Cell, own_k: int) -> str:
    """Return a cell's name in the table."""
    storage = cell.storage
    text = {16: "bfloat16", 0: "no routed experts"}.get(storage.bits, f"{storage.bits} bits")
    if storage.mode != "affine":
        text = storage.mode
    elif storage.group_size != 64:
        text += f", groups of {storage.group_size}"
    if storage.down_bits:
        text += f", down_proj {storage.down_bits}"
    if storage.layer_bits:
        layers = sorted(storage.layer_bits)
        text += f", layers {layers[0]} to {layers[-1]} at {storage.layer_bits[layers[0]]}"
    if cell.experts_per_token:
        text += f", K {cell.experts_per_token} of {own_k}"
    if cell.activation_bits:
        text += ", 8-bit activations"
    return text + (", schema" if cell.schema else "")


def share(right: int, of: int) -> str:
    low, high = wilson(right, of)
    return f"{right / of:.1%} ({low:.1%} to {high:.1%})".replace("%", " %")


def table(model: dict[str, Any]) -> str:
    """Return a model's Markdown table, by bytes per token, and the names of the cells that it lacks."""
    k, layers = model["shape"]["num_experts_per_tok"], model["shape"]["num_hidden_layers"]
    rows = [
        "| experts | KB per token | calls right | calls in JSON | answers right | perplexity, calls "
        "| perplexity, answers | lost, gained |",
        "| --- | ---: | --- | --- | --- | --- | --- | --- |",
    ]
    known = [(cell, model["cells"][cell.name]) for cell in cells(k, layers) if cell.name in model["cells"]]
    for cell, row in sorted(known, key=lambda pair: (pair[0].schema, -pair[1]["bytes_per_token"])):
        calls, answers = row["calls"], row.get("answers")
        loss = [
            f"{p[0]:.4f} ± {(p[2] - p[1]) / 2:.4f}" if (p := part and part.get("perplexity")) else ""
            for part in (calls, answers)
        ]
        parts = [
            in_words(cell, k), f"{row['bytes_per_token'] / 1000:.0f}", share(calls["right"], calls["of"]),
            share(calls["json"], calls["of"]), share(answers["right"], answers["of"]) if answers else "", *loss,
            f"{row['lost']}, {row['gained']}" if "lost" in row else "",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(parts)} |")
    left_out = [in_words(cell, k) for cell in cells(k, layers) if cell.name not in model["cells"]]
    return "\n".join([*rows, *(["", f"Not run: {'; '.join(left_out)}."] if left_out else [])])


def filled(page: str, models: dict[str, Any]) -> str:
    """Return the page with each model's table between its marks."""
    for name, model in models.items():
        marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = table(model)
        page = re.sub(marks, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)
    return page


def digest(models: dict[str, Any]) -> str:
    """Return a number that tells whether the plot was drawn from these figures."""
    return f"{zlib.crc32(json.dumps(models, sort_keys=True).encode()):08x}"


def draw(models: dict[str, Any], image: Path) -> None:
    """Draw bytes per token against the share of wrong calls, with the Pareto front."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "quality"
    mpl.rcParams["svg.fonttype"] = "none"
    ink, blue, grey = "#7d8590", "#2f81f7", "#a0a7b0"
    figure = Figure(figsize=(9, 4.2 * len(models)), layout="constrained")
    plots = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axes, (name, model) in zip(plots, models.items(), strict=True):
        k, layers = model["shape"]["num_experts_per_tok"], model["shape"]["num_hidden_layers"]
        points = []
        for cell in cells(k, layers):
            row = model["cells"].get(cell.name)
            if row and row["bytes_per_token"] and not cell.schema:  # the scale is logarithmic
                calls = row["calls"]
                points.append((row["bytes_per_token"] / 1000, calls["right"], calls["of"], in_words(cell, k)))
        best = 1.01
        front = []
        for x, right, of, text in sorted(points, key=lambda p: (p[0], -p[1])):
            wrong, (low, high) = 1 - right / of, wilson(of - right, of)
            on_front = wrong < best
            colour = blue if on_front else grey
            ends = [[100 * (wrong - low)], [100 * (high - wrong)]]
            axes.errorbar(x, 100 * wrong, yerr=ends, fmt="o", ms=4, lw=1, color=colour)
            if on_front:
                best = wrong
                front.append((x, 100 * wrong))
                axes.annotate(text, (x, 100 * wrong), xytext=(4, 4), textcoords="offset points", fontsize=7, color=ink)
        axes.plot(*zip(*front, strict=True), color=blue, lw=1, drawstyle="steps-post")
        axes.set_xscale("log")
        axes.set_xlim(80, 12_000)
        axes.set_xticks(
            [100, 200, 500, 1000, 2000, 5000, 10_000], ["100", "200", "500", "1000", "2000", "5000", "10000"]
        )
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50, 100], ["0", "0.5", "1", "2", "5", "10", "20", "50", "100"])
        axes.set_title(f"{name}: {model['shape']['num_experts']} experts, K {k}", color=ink, fontsize=10)
        axes.set_xlabel("expert bytes per token, KB", color=ink)
        axes.set_ylabel("tool calls wrong, %", color=ink)
        axes.tick_params(colors=ink, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
    image.parent.mkdir(exist_ok=True)
    figure.savefig(image, transparent=True, metadata={"Date": None, "Description": digest(models)})


def write_report(work: Path, root: Path) -> None:
    """Write results.json from the cells of ``work``, then the page's tables and the plot."""
    models = collect(work)
    RESULTS.write_text(json.dumps(models, indent=1) + "\n")
    page = root / PAGE
    page.write_text(filled(page.read_text(), models))
    draw(models, root / IMAGE)
