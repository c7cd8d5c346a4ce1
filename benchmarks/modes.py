"""Decode and prompts by quantisation mode on the CPU: mxfp4 or nvfp4 next to affine 4-bit, in alternating processes.

    python -m benchmarks.modes SCRATCH --model gpt-oss-20b [--llama BIN/llama-driver]
    python -m benchmarks.modes SCRATCH --model 35b --slots all fewest --runs 5

The models have true dimensions, but 4 layers and a vocabulary of 2,048: the output projection, which is the same in all
modes of gpt-oss, would hide the differences. gpt-oss differs in the experts alone: mxfp4 in the published form, or
affine 4 bits in groups of 64; the rest is bfloat16. In the other model all matrices have the mode, except for routers.
SCRATCH keeps the checkpoints for the next run. Everything is in the page cache; with fewest slots, K per layer, nearly
all experts of a token are copied from there.

Each run is a new process, and the sides take turns. Prints one tab-separated line per side: medians, and the range, of
the runs' medians; megabytes of weights that a token takes, and its time per megabyte over that of affine 4-bit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .synthetic import PRESETS, write_checkpoint
from .synthetic_gpt_oss import GptOss, write_gpt_oss

LAYERS, VOCABULARY = 4, 2_048
WARM_TOKENS, TOKENS = 8, 32
PROMPTS = 2
ROOT = Path(__file__).resolve().parents[1]
SIDES = {"gpt-oss-20b": ("affine", "mxfp4"), "35b": ("affine", "mxfp4", "nvfp4")}


def write(model: str, mode: str, directory: Path) -> Path:
    """Write the checkpoint of a side, unless it is there."""
    if not (directory / "config.json").exists():
        if model == "gpt-oss-20b":
            dimensions = replace(GptOss(), num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
            return write_gpt_oss(directory, dimensions, form="affine" if mode == "affine" else "published")
        dimensions = replace(PRESETS[model], num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
        write_checkpoint(directory, dimensions, mode=mode)
    return directory


def tokens(prompt: int) -> list[int]:
    return np.random.default_rng(5).integers(3, VOCABULARY, prompt + WARM_TOKENS + TOKENS).tolist()


def time_experts(seconds: list[float]) -> None:
    """Note the time of each call of the experts of a layer of mlx-lm's models, whose inputs are evaluated before."""
    import mlx.core as mx

    from flash_moe_mlx.models.switch_glu import StreamingSwitchGLU

    call = StreamingSwitchGLU.__call__

    def timed(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        if self.routed is None:
            return call(self, x, indices)
        mx.eval(x, indices)
        started = time.perf_counter()
        result = call(self, x, indices)
        mx.eval(result)
        seconds.append(time.perf_counter() - started)
        return result

    StreamingSwitchGLU.__call__ = timed


def child(directory: Path, fewest: bool, prompt: int) -> dict[str, float]:
    """Load a checkpoint and time a prompt and tokens; seconds by name, and bytes of experts per token."""
    import mlx.core as mx

    from flash_moe_mlx import load_model
    from flash_moe_mlx.errors import MemoryLimitError
    from flash_moe_mlx.formats.checkpoint import Checkpoint

    expert_seconds: list[float] = []
    time_experts(expert_seconds)
    how: dict[str, Any] = {"io": "pread", "max_context": 1024}
    limit = 12_000_000_000
    if fewest:
        try:
            load_model(directory, memory_limit=1, **how)
        except MemoryLimitError as error:
            limit = error.smallest_limit_bytes or 0
    model = load_model(directory, memory_limit=limit, **how)
    ids = tokens(prompt)
    checkpoint = Checkpoint.open(directory)
    with model.streaming as engine:
        prompts, decoded, in_experts = [], [], []
        for _ in range(PROMPTS + 1):
            cache = model.make_cache()
            started = time.perf_counter()
            mx.eval(model(mx.array([ids[:prompt]]), cache=cache, logits_to_keep=1))
            prompts.append(time.perf_counter() - started)
        for index, token in enumerate(ids[prompt:]):
            if index == WARM_TOKENS:
                engine.reset_stats()
            expert_seconds.clear()
            started = time.perf_counter()
            mx.eval(model(mx.array([[token]]), cache=cache))
            decoded.append(time.perf_counter() - started)
            in_experts.append(sum(expert_seconds))
        stats = engine.stats()
        layout = checkpoint.layout(0)
        return {
            "token": statistics.median(decoded[WARM_TOKENS:]),
            "experts": statistics.median(in_experts[WARM_TOKENS:]),
            "prompt": statistics.median(prompts[1:]),
            "expert_bytes": (stats.hits + stats.misses) * layout.payload_bytes / TOKENS,
            "dense_bytes": sum(i.nbytes for name, i in checkpoint.dense.items() if "embed" not in name),
            "read_bytes": stats.bytes_read / TOKENS,
        }


def run_child(directory: Path, slots: str, prompt: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.modes", str(directory), "--child", slots, "--prompt", str(prompt)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


def run_llama(driver: Path, gguf: Path, repack: int, prompt: int) -> dict[str, float]:
    """Time llama.cpp on the same ids; its prompt is the first one after the start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids"
        path.write_text(" ".join(map(str, tokens(prompt))))
        options = ["--prompt", str(prompt), "--decode", str(WARM_TOKENS + TOKENS), "--repack", str(repack)]
        command = [str(driver), str(gguf), str(path), *options]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    words = [line.split() for line in lines]
    seconds = [float(parts[2]) for parts in words if parts[0] == "token"]
    first = next(float(parts[2]) for parts in words if parts[0] == "prompt")
    return {"token": statistics.median(seconds[WARM_TOKENS:]), "prompt": first}


def report(model: str, name: str, runs: list[dict[str, float]], base: list[dict[str, float]]) -> None:
    """Print one side's line."""

    def middle(key: str, of: list[dict[str, float]] = runs) -> float:
        return statistics.median(run[key] for run in of)

    def shown(key: str) -> str:
        own = [1e3 * run[key] for run in runs if key in run]
        return f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own and max(own) else "-"

    def per_byte(of: list[dict[str, float]]) -> float:
        if model == "35b":
            return middle("token", of) / (middle("expert_bytes", of) + middle("dense_bytes", of))
        return middle("experts", of) / middle("expert_bytes", of)

    known = "expert_bytes" in runs[0]
    megabytes = [f"{middle(key) / 1e6:.1f}" if known else "-" for key in ("expert_bytes", "dense_bytes", "read_bytes")]
    ratio = f"{per_byte(runs) / per_byte(base):.2f}" if known else "-"
    print("\t".join([name, shown("token"), shown("experts"), shown("prompt"), *megabytes, ratio]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", choices=SIDES, default="gpt-oss-20b")
    parser.add_argument("--slots", nargs="+", choices=("all", "fewest"), default=["all", "fewest"])
    parser.add_argument("--modes", nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--llama", type=Path, help="the program of benchmarks/peers/build_llama.sh, for gpt-oss")
    parser.add_argument("--write", action="store_true", help="write the checkpoints and stop")
    parser.add_argument("--child", choices=("all", "fewest"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(child(a.scratch, a.child == "fewest", a.prompt)))
        return
    sides: dict[str, Callable[[], dict[str, float]]] = {}
    for mode in a.modes or SIDES[a.model]:
        directory = write(a.model, mode, a.scratch / f"{a.model}-{mode}")
        for slots in a.slots:
            sides[f"{mode}, {slots} in slots"] = lambda d=directory, s=slots: run_child(d, s, a.prompt)
    if a.llama:
        from .peers.gguf_gpt_oss import write_gpt_oss_gguf

        gguf = a.scratch / f"{a.model}-mxfp4.gguf"
        if not gguf.exists():
            write_gpt_oss_gguf(a.scratch / f"{a.model}-mxfp4", gguf)
        for repack in (0, 1):
            sides[f"llama.cpp, repack {repack}"] = lambda r=repack: run_llama(a.llama, gguf, r, a.prompt)
    if a.write:
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(a.runs):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            runs[name].append(sides[name]())
            print(f"{name}\t{json.dumps(runs[name][-1])}", file=sys.stderr, flush=True)
    print("side\tms/token\tof which experts\tms/prompt\texpert MB\tdense MB\tread MB\ttime per byte / affine's")
    for name, own in runs.items():
        slots = name.partition(", ")[2]
        report(a.model, name, own, runs.get(f"affine, {slots}", own))


if __name__ == "__main__":
    main()
