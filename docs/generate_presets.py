"""Derives the figures of ``flash-moe models`` from the dimensions in planning/presets.json, and writes them there.

Run on a CPU: limits on a GPU are planned by telling the library that it is on Metal. Nothing is downloaded.

python docs/generate_presets.py
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flash_moe_mlx.planning import preset_figures, presets
from flash_moe_mlx.planning.planner import local_hit_rate

FILE = Path(presets.__file__).with_name("presets.json")
PAGE = Path(__file__).with_name("which_model.md")
MACS = {16: 9.7e9, 24: 14.9e9, 32: 20.0e9, 48: 34.2e9, 64: 45.8e9, 128: 92.2e9}
"""Memory of a Mac and its default limit, as in mac.md."""
DISK = 5e9
ENOUGH = 30  # tok/s, above which other things decide


def pretend(name: str) -> None:
    """Make ``backend()`` answer a name wherever it was imported."""
    for module in [module for key, module in sys.modules.items() if key.startswith("flash_moe_mlx")]:
        if hasattr(module, "backend") and callable(module.backend):
            module.backend = lambda: name


@contextmanager
def pretending() -> Iterator[None]:
    pretend("cpu")
    yield
    pretend("cpu")


def table() -> str:
    """The table of which_model.md."""
    lines = ["| model | disk | smallest limit | " + " | ".join(f"{size} GB" for size in MACS) + " |"]
    lines.append("|---" * (len(MACS) + 3) + "|")
    for preset in presets.presets():
        figures = preset.figures
        cells = [cell(figures, limit) for limit in MACS.values()]
        sizes = f"{figures.checkpoint_bytes / 1e9:.0f} GB | {figures.gpu_limit_bytes / 1e9:.1f} GB"
        lines.append(f"| {preset.name} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(figures: presets.Figures, limit_bytes: float) -> str:
    if limit_bytes < figures.gpu_limit_bytes:
        return "-"
    slots = figures.slots(int(limit_bytes), "metal")
    if slots == figures.num_experts:
        return "mlx-lm"
    share = slots / figures.num_experts
    local = local_hit_rate(figures.num_experts, figures.num_experts_per_tok, slots)
    asked = figures.layers * figures.num_experts_per_tok * figures.record_bytes
    worst, best = (DISK / ((1 - hit_rate) * asked) for hit_rate in (min(share, local), local))
    rates = [f"{rate:.2g}" if rate < ENOUGH else f"{ENOUGH}+" for rate in (worst, best)]
    return f"{share:.0%}, {rates[0]} to {rates[1]}" if rates[0] != rates[1] else f"{share:.0%}, {rates[0]}"


def write_page() -> None:
    head, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    tail = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{head}<!-- table -->\n{table()}\n<!-- end -->{tail}")


def main() -> None:
    entries = json.loads(FILE.read_text())
    for entry in entries:
        with tempfile.TemporaryDirectory() as directory, pretending():
            entry["figures"] = preset_figures.measure(
                entry["config"], entry["bits"], Path(directory), lambda: pretend("metal")
            )
        print(entry["name"], {key: round(value / 1e9, 2) for key, value in entry["figures"].items()})
    presets.presets.cache_clear()
    FILE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
    write_page()


if __name__ == "__main__":
    main()
