"""Starts each engine. All print the same lines: see ``runner.py`` and ``llama_driver.cpp``."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.synthetic import dimensions_of, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
ENGINES = (
    "ours",
    "ours-8bit",
    "llama.cpp",
    "llama.cpp-ra128",
    "mlx-lm",
    "mlx-lm-float32",
    "mlx-optiq",
    "mlx-optiq-float32",
)
READ_AHEAD_KIB = {"llama.cpp-ra128": 128}
"""Of the disk while an engine runs, where it is not the machine's own. A page fault reads this much; llama.cpp faults
its weights in: of 8 MiB, as this project's machine has it, nearly all is thrown away again under a small limit. 128 is
Linux's default."""


@dataclass(frozen=True)
class Places:
    """Locations of the models and of the peers' programs."""

    checkpoint: Path
    local_checkpoint: Path
    gguf: Path
    local_gguf: Path
    llama: Path
    optiq: Path

    @classmethod
    def under(cls, folder: Path) -> "Places":
        """Return the places under the names of docs/performance.md."""
        return cls(
            folder / "s35full",
            folder / "s35local",
            folder / "s35-00001-of-00002.gguf",
            folder / "s35local-00001-of-00002.gguf",
            folder / "llama",
            folder / "optiq",
        )

    def model(self, engine: str, routing: str, layers: int | None = None) -> Path:
        """Return the model of a case. One with fewer layers is linked together if needed."""
        if layers is not None:
            path = self.checkpoint.with_name(f"{self.checkpoint.name}-{layers}-layers")
            if not path.exists():
                dimensions = replace(dimensions_of(self.checkpoint), num_hidden_layers=layers)
                write_checkpoint(path, dimensions, like=self.checkpoint)
            return path
        if engine.startswith("llama.cpp"):
            return self.local_gguf if routing == "local" else self.gguf
        return self.local_checkpoint if routing == "local" else self.checkpoint

    def driver(self) -> Path:
        return self.llama / "bin" / "llama-driver"


def command(
    engine: str, places: Places, model: Path, tokens: Path, prompt: int, decode: int, memory_limit: int | None
) -> tuple[list[str], dict[str, str]]:
    """Return the child's command line and environment.

    Args:
        engine: One of ENGINES.
        places: See there.
        model: What ``places.model`` says, or another.
        tokens: File of token ids.
        prompt: How many go in together.
        decode: How many go in one by one after that.
        memory_limit: Ours alone; None takes the default.
    """
    amounts = ["--prompt", str(prompt), "--decode", str(decode)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    if engine.startswith("llama.cpp"):
        return [str(places.driver()), str(model), str(tokens), *amounts, "--threads", str(THREADS)], environment
    if engine.startswith("mlx-optiq"):
        environment["PYTHONPATH"] += f":{places.optiq}"
    words = [sys.executable, "-m", "benchmarks.peers.runner", engine, str(model), str(tokens), *amounts]
    if memory_limit is not None:
        words += ["--memory-limit", str(memory_limit)]
    return words, environment
