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

FILE = Path(presets.__file__).with_name("presets.json")


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


def main() -> None:
    entries = json.loads(FILE.read_text())
    for entry in entries:
        with tempfile.TemporaryDirectory() as directory, pretending():
            entry["figures"] = preset_figures.measure(
                entry["config"], entry["bits"], Path(directory), lambda: pretend("metal")
            )
        print(entry["name"], {key: round(value / 1e9, 2) for key, value in entry["figures"].items()})
    FILE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


if __name__ == "__main__":
    main()
