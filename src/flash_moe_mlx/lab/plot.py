"""Plots of time by phase, routing, and speed against memory limit. Needs matplotlib (the extra ``plot``).

Each function returns a matplotlib Figure, which a notebook displays; `save` writes it to a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError
from ..experts.policies import HALF_LIFE
from ..experts.trace import NOT_RECORDED, RoutingTrace
from ..installation import install_command
from ..planning.plan import Plan
from ..planning.simulation import Replay
from ..stats import format_bytes
from .profiling import PHASES, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["expert_frequency", "expert_heat", "hits_by_layer", "save", "speed_by_limit", "time_by_phase"]

# Okabe and Ito's colours, which most people can tell apart.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#999999")
_ROUTING = {"local": "#0072B2", "uniform": "#E69F00", "trace": "#009E73"}
"""One colour for one kind of routing, in every plot."""
_INK = "#7d8590"  # readable on white and on black


def time_by_phase(profile: Profile) -> "Figure":
    """Plot milliseconds per token by phase, for prefill and decode, as stacked bars."""
    figure, axes = _figure(7, 2.8)
    bars = [
        (name, seconds, tokens)
        for name, seconds, tokens in (
            ("decode", profile.decode, profile.decode_tokens),
            ("prefill", profile.prefill, profile.prefill_tokens),
        )
        if tokens
    ]
    left = np.zeros(len(bars))
    for phase, colour in zip(PHASES, _COLOURS, strict=True):
        widths = np.array([1e3 * seconds[phase] / tokens for _, seconds, tokens in bars])
        axes.barh([name for name, _, _ in bars], widths, left=left, color=colour, label=phase)
        left += widths
    axes.set(xlabel="ms per token, each part waited for", title="Time per token by phase")
    figure.legend(
        ncols=len(PHASES), loc="outside lower center", frameon=False, columnspacing=1, handlelength=1, labelcolor=_INK
    )
    return figure


def hits_by_layer(replay: Replay) -> "Figure":
    """Plot the decode hit rate by layer."""
    figure, axes = _figure(7, 2.8)
    asked = (replay.hits + replay.misses)[1].clip(1)
    axes.bar(range(len(replay.layers)), 100 * replay.hits[1] / asked, color=_ROUTING["trace"])
    axes.axhline(100 * replay.decode_hit_rate, color=_COLOURS[3], linewidth=1, label="all layers")
    _layer_ticks(axes, replay.layers)
    axes.set(xlabel="layer", ylabel="hits, %", ylim=(0, 100), title="Hits of decoded tokens by layer")
    axes.legend(frameon=False, labelcolor=_INK)
    return figure


def expert_frequency(trace: RoutingTrace) -> "Figure":
    """Plot how often each expert of each layer was picked as a heat map, sorted within each layer."""
    figure, axes = _figure(7, 3.6)
    counts = np.zeros((len(trace.layers), trace.num_experts))
    for column in range(len(trace.layers)):
        ids = trace.experts[:, column]
        counts[column] = np.bincount(ids[ids != NOT_RECORDED], minlength=trace.num_experts)
    shares = 100 * counts / max(len(trace.phase), 1)
    image = axes.imshow(-np.sort(-shares, axis=1), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="experts, most used first", ylabel="layer", title="How often each expert was picked")
    bar = figure.colorbar(image, label="tokens that picked it, %")
    _in_ink(bar.ax)
    bar.outline.set_visible(False)
    return figure


def expert_heat(trace: RoutingTrace, moments: Mapping[str, int]) -> "Figure":
    """Plot how hot each expert of each layer is at some moments, as heat maps beside each other.

    Heat is the share of recent tokens that picked an expert, where a token counts half after 32 further ones: of the
    experts in memory, the engine evicts the coldest. Experts keep their places, and colours mean the same in all maps.

    Args:
        trace: Recorded routing.
        moments: Number of tokens from the trace's start, by the title of its map.

    Raises:
        RequestError: If there is no moment, or one that the trace doesn't reach.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    total = len(trace.phase)
    if not moments or not all(1 <= tokens <= total for tokens in moments.values()):
        raise RequestError(f"[plot] moments must be from 1 to {total} tokens, got {list(moments.values())}.")
    figure = Figure(figsize=(7, 3.2), layout="constrained", facecolor="none")
    every = figure.subplots(1, len(moments), sharey=True, squeeze=False)[0]
    for axes, (title, tokens) in zip(every, moments.items(), strict=True):
        heat = 100 * _heat(trace, tokens)
        image = axes.imshow(heat, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=100)
        axes.set(xlabel="expert", title=title)
        _in_ink(axes)
    every[0].set_ylabel("layer")
    step = max(1, len(trace.layers) // 8)
    every[0].set_yticks(range(0, len(trace.layers), step), [str(layer) for layer in trace.layers[::step]])
    bar = figure.colorbar(image, ax=list(every), label="recent tokens that picked it, %")
    _in_ink(bar.ax)
    bar.outline.set_visible(False)
    return figure


def _heat(trace: RoutingTrace, tokens: int) -> np.ndarray:
    """Return the share of the first tokens, the later the weightier, that picked each expert: (layers, experts)."""
    weights = 0.5 ** (np.arange(tokens)[::-1] / HALF_LIFE)
    heat = np.zeros((len(trace.layers), trace.num_experts))
    for column in range(len(trace.layers)):
        ids = trace.experts[:tokens, column]
        known = ids != NOT_RECORDED
        of_each = np.broadcast_to(weights[:, None], ids.shape)
        heat[column] = np.bincount(ids[known], of_each[known], minlength=trace.num_experts)
    return heat / weights.sum()


def speed_by_limit(plan: Plan) -> "Figure":
    """Plot expected decode speed against memory limit, and hit rates on a second axis; mark the best limit.

    If speeds are unknown, there are only hit rates.
    """
    figure, axes = _figure(7, 3.4)
    unit, size = ("GB", 1e9) if plan.sweep[-1].limit_bytes >= 1e9 else ("MB", 1e6)
    limits = [point.limit_bytes / size for point in plan.sweep]
    known = all(e.tokens_per_second is not None for point in plan.sweep for e in point.expectations)
    second = axes.twinx() if known else axes
    for number, first in enumerate(plan.sweep[0].expectations):
        points = [point.expectations[number] for point in plan.sweep]
        colour, label = _ROUTING[first.routing], f"{first.routing} routing"
        hits = [100 * point.hit_rate for point in points]
        if known:
            rates = [point.tokens_per_second or 0.0 for point in points]
            axes.plot(limits, rates, marker="o", color=colour, label=label, clip_on=False, zorder=3)
            second.plot(limits, hits, color=colour, linestyle=":", label=f"{label}, hits", clip_on=False)
        else:
            axes.plot(limits, hits, marker="o", color=colour, label=label, clip_on=False, zorder=3)
    if plan.best is not None:
        best = plan.best.limit_bytes / size
        axes.axvline(best, color=_COLOURS[6], linestyle="--", label=f"best: {best:.3g} {unit}")
    name = Path(plan.model).name
    disk = plan.speed.disk_bytes_per_second
    axes.set(
        xlabel=f"memory limit, {unit}",
        ylabel="tok/s, expected" if known else "hits, %",
        title=f"{name}: K {plan.num_experts_per_tok}, {plan.max_context:,} tokens of context"
        + (f", disk {format_bytes(disk)}/s" if disk else ""),
    )
    highest = max(axes.dataLim.y1, 1e-9) if known else 100
    axes.set_ylim(0, 1.15 * highest)  # room for markers and the title
    if known:
        second.set(ylabel="hits, % (dotted)", ylim=(0, 115), yticks=range(0, 101, 20))
        second.spines["top"].set_visible(False)
        _in_ink(second)
    figure.legend(
        *axes.get_legend_handles_labels(), ncols=4, loc="outside lower center", frameon=False, labelcolor=_INK
    )
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure to a file, in the format given by its suffix.

    Raises:
        RequestError: If matplotlib can't write this format or path.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise _unwritable(path, getattr(error, "strerror", None) or error) from error


def check_path(path: str | Path) -> None:
    """Check that `save` can write a file, before anything is computed for it.

    Raises:
        RequestError: If matplotlib is missing, doesn't know the suffix, or the folder does not exist.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(path)
    if not path.parent.is_dir():
        raise _unwritable(path, f"no folder {path.parent}")
    if path.suffix and path.suffix[1:] not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise _unwritable(path, f"none of the formats {', '.join(sorted(known))}")


def _unwritable(path: str | Path, got: object) -> RequestError:
    return RequestError(f"[plot] {path} must be a file that can be written, got {got}. Try a name that ends in .png.")


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        RequestError: If it is not; says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"[matplotlib] is not installed, and plots need it. Run: {install_command('plot')}"
        ) from error


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    _in_ink(axes)
    return figure, axes


def _in_ink(axes: "Axes") -> None:
    """Write in a grey that can be read on light and dark pages."""
    axes.tick_params(colors=_INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)


def _layer_ticks(axes: "Axes", layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
