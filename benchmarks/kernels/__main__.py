"""Prints ``flash-moe bench kernels``' table and, with --tune, other spreads over threads.

    python -m benchmarks.kernels [--quick] [--tune] [--json FILE]
    python -m benchmarks.kernels --tune --shard 3/8        # every eighth line: eight processes fill MLX's kernel cache

From the repository's top.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flash_moe_mlx.lab import kernel_cases as cases
from flash_moe_mlx.lab.kernel_table import FULL, QUICK, Layers, Size, Table, Work, standard_work
from flash_moe_mlx.lab.kernel_timing import Row
from flash_moe_mlx.ops.backend import backend
from flash_moe_mlx.ops.gpu.geometry import choose_geometry

# (rows a lane, SIMD groups a threadgroup)
GATE_UP_SPREADS = ((1, 16), (2, 8), (2, 16), (4, 8))
DOWN_SPREADS = ((2, 8), (4, 8), (4, 16))
COMBINE_TILES = (4, 8, 16, 32)  # outputs a threadgroup
PRODUCT_SPREADS = ((1, 8), (2, 8), (2, 16), (4, 4), (4, 16), (8, 8))
DELTA_SPREADS = ((8, 1, 4), (8, 1, 8), (8, 2, 4), (8, 2, 8), (16, 2, 8), (4, 1, 8), (32, 4, 8))


def named(row: Row, suffix: str) -> Row:
    row.name += suffix
    return row


def tuning_work(size: Size, layers: Layers) -> Iterator[Work]:
    """Return the same kernels with other distributions over threads, to choose the defaults from."""

    def layer(model: cases.Model, bits: int, experts: int, n: int, **spread: Any) -> Row:
        made = layers.get(model, bits)
        plan = cases.spread_plan(made, experts, **spread)
        row = cases.moe_layer(made, experts, calls=size.calls, samples=size.samples, plan=plan, launches=n)
        return named(row, f" {n} launches" + "".join(f" {name} {chosen}" for name, chosen in spread.items()))

    def product(bits: int, rows: int, simd_groups: int) -> Row:
        made = choose_geometry("tuning", 4096, [(bits, cases.GROUP)], rows=rows, simd_groups=simd_groups)
        rounds = max(1, size.calls // size.copies)
        row = cases.matvec(
            *size.matrix, bits, 1, copies=size.copies, rounds=rounds, samples=size.samples, geometry=made
        )
        return named(row, f" {rows}x{simd_groups}")

    def delta(lanes: int, rows: int, simd_groups: int, prompt: bool) -> Row:
        spread = {"lanes": lanes, "rows": rows, "simd_groups": simd_groups}
        if prompt:
            row = cases.delta_prompt(size.tokens, *size.heads, calls=size.prompts, samples=size.samples, **spread)
        else:
            row = cases.delta_step(*size.heads, calls=size.calls, states=size.states, samples=size.samples, **spread)
        return named(row, f" {lanes}l {rows}x{simd_groups}")

    for bits, model, choices in (
        (4, size.models[0], (4, 8, 10)), (4, size.models[-1], (4, 8)), (2, size.models[0], (10,)),
    ):  # fmt: skip
        for experts in choices:
            yield partial(layer, model, bits, experts, 3)
            for tile_rows in COMBINE_TILES:
                yield partial(layer, model, bits, experts, 2, tile_rows=tile_rows)
            if experts >= 8:
                for spread in GATE_UP_SPREADS:
                    yield partial(layer, model, bits, experts, 3, gate_up=spread)
                for spread in DOWN_SPREADS:
                    yield partial(layer, model, bits, experts, 3, down=spread)
    for bits in (2, 4):
        for rows, simd_groups in PRODUCT_SPREADS:
            yield partial(product, bits, rows, simd_groups)
    for lanes, rows, simd_groups in DELTA_SPREADS:
        for prompt in (False, True):
            yield partial(delta, lanes, rows, simd_groups, prompt)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smallest model and few samples: does it run?")
    parser.add_argument("--tune", action="store_true", help="other spreads over threads as well (GPU only)")
    parser.add_argument("--shard", help="I/N: every Nth line from the Ith, once each, to compile what they need")
    parser.add_argument("--mlx-lm-loop", action="store_true", help="time mlx-lm's gated delta loop too: slow on CUDA")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    first, step = (int(part) for part in options.shard.split("/")) if options.shard else (0, 1)
    if options.shard:
        size = replace(size, calls=2, prompts=1, copies=2, states=2, samples=1, copy_bytes=2**26)
    layers = Layers()
    work = list(standard_work(size, layers))
    if options.tune and backend() != "cpu":
        work += tuning_work(size, layers)
    table = Table(size, partial(print, flush=True))
    for measure in work[first::step]:
        table.add(measure())
    if options.mlx_lm_loop:
        print(f"mlx-lm's own loop, 16 tokens: {cases.mlx_lm_prompt(16, *size.heads):.0f} us", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table.as_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
