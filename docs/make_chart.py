"""Draws docs/images/peers.svg, the bar chart of the README, from the figures of docs/performance.md.

python docs/make_chart.py
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

IMAGE = Path(__file__).parent / "images" / "peers.svg"
INK, BLUE, LIGHT, GREY = "#7d8590", "#2f81f7", "#9ecbff", "#a0a7b0"

# Decode, tokens per second: medians of 3 runs. 35B-A3B dimensions, synthetic, 2 cores, simulated disk of 4 GB/s, cold.
CASES = ("12 GiB, uniform", "8 GiB, uniform", "4 GiB, uniform", "4 GiB, local")
SERIES = {
    "llama.cpp, read-ahead 128 KiB": ((4.5, 2.7, 1.9, 2.3), GREY),
    "flash_moe_mlx, the same runs": ((5.6, 3.9, 3.8, 4.2), LIGHT),
    "flash_moe_mlx, today": ((6.6, 5.8, 4.4, 5.5), BLUE),
}


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "peers"  # the same bytes in every run
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, (rates, colour)) in enumerate(SERIES.items()):
        bars = axes.bar(
            [case + 0.27 * (place - 1) for case in range(len(CASES))], rates, 0.25, label=name, color=colour
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, color=INK, fontsize=8)
    axes.set_xticks(range(len(CASES)), CASES, color=INK)
    axes.set_title(
        "Qwen3.5-35B-A3B dimensions (19 GB, 4 bits) under a memory limit: decode, tok/s", color=INK, fontsize=10
    )
    axes.set_ylim(0, 8.4)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=3, loc="upper right")
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
