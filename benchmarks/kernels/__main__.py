"""Prints the table: ``python -m benchmarks.kernels [--quick] [--tune] [--json FILE]``, from the repository's top."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx

from flash_moe_mlx.ops.backend import backend
from flash_moe_mlx.ops.expert_ffn import plan_experts
from flash_moe_mlx.ops.geometry import choose_geometry

from . import cases
from .measure import Row, copy_bandwidth

HEADER = "work                                      us    (min..max)      other us  ratio     GB/s  of copy  rel rms"


def line(row: Row, copy: float) -> str:
    other = f"{row.theirs_us:9.1f} {row.theirs_us / row.ours_us:6.2f}" if row.theirs_us else " " * 16
    close = f"{row.relative_rms:.1e}" if row.relative_rms is not None else ""
    low, high = row.spread
    return (
        f"{row.name:38} {row.ours_us:8.1f} ({low:.1f}..{high:.1f})".ljust(66)
        + f"{other} {row.gigabytes_per_second:8.0f} {row.gigabytes_per_second / copy:7.0%}  {close}"
    )


class Table:
    """Rows, printed as they come."""

    def __init__(self, copy: float):
        self.copy, self.rows = copy, []
        print(f"backend {backend()}, device {mx.device_info().get('device_name', '')}, copy {copy:.0f} GB/s")
        print(HEADER, flush=True)

    def add(self, measure: Callable[[], Row], suffix: str = "") -> None:
        row = measure()
        row.name += suffix
        self.rows.append(row)
        print(line(row, self.copy), flush=True)


def moe_rows(table: Table, models: tuple[cases.Model, ...], calls: int, samples: int) -> None:
    work = [(model, 4, (4, 8, 10)) for model in models] + [(models[0], 2, (4, 10))]
    for model, bits, choices in work:
        layer = cases.Layer(model, bits)
        for experts in choices:
            for fused in (True, False):
                table.add(
                    lambda k=experts, on=layer, f=fused: cases.moe_layer(on, k, fused=f, calls=calls, samples=samples)
                )


def tuning_rows(table: Table, calls: int, samples: int) -> None:
    """Other spreads of the same kernels over threads, to choose the defaults from."""
    spreads = ((1, 8), (2, 8), (4, 8), (1, 4), (2, 4), (4, 4), (8, 4), (2, 2))
    for bits, model, experts in ((4, cases.MODELS[0], 10), (2, cases.MODELS[0], 10), (4, cases.MODELS[2], 8)):
        layer = cases.Layer(model, bits)
        pair = [(bits, cases.GROUP)]
        for rows, simd_groups in spreads:
            plan = plan_experts(
                layer.layout,
                choose_geometry("tuning", model.hidden, pair * 2, rows=rows, simd_groups=simd_groups),
                choose_geometry("tuning", model.width, pair, rows=rows, simd_groups=simd_groups),
            )
            for name in ("expert_gate_up", "expert_down"):
                table.add(
                    lambda n=name, k=experts, on=layer, p=plan: cases.expert_kernel(
                        on, n, k, p, calls=calls, samples=samples
                    ),
                    f" {rows}x{simd_groups}",
                )
    for bits in (4, 2):
        for rows, simd_groups, chunk in ((4, 4, 0), (2, 8, 0), (2, 4, 0), (8, 4, 0), (4, 8, 32), (8, 8, 32)):
            made = choose_geometry("tuning", 4096, [(bits, cases.GROUP)], rows=rows, simd_groups=simd_groups)
            if chunk and (bits == 4 or made.chunk == chunk):
                continue
            made = replace(made, chunk=chunk or made.chunk)
            table.add(
                lambda b=bits, g=made: cases.matvec(16384, 4096, b, 1, copies=16, samples=samples, geometry=g),
                f" {rows}x{simd_groups} c{made.chunk}",
            )
    for lanes, rows, simd_groups in ((32, 1, 4), (32, 4, 4), (16, 1, 4), (8, 2, 4), (8, 1, 8), (4, 1, 4)):
        tuning = {"lanes": lanes, "rows": rows, "simd_groups": simd_groups}
        suffix = f" {lanes}l {rows}x{simd_groups}"
        table.add(lambda t=tuning: cases.delta_step(16, 64, 128, calls=32, samples=samples, **t), suffix)
        table.add(lambda t=tuning: cases.delta_prompt(512, 16, 64, 128, samples=samples, **t), suffix)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smallest model and few samples: does it run?")
    parser.add_argument("--tune", action="store_true", help="other spreads over threads as well (GPU only)")
    parser.add_argument("--mlx-lm-loop", action="store_true", help="time mlx-lm's gated delta loop too: slow on CUDA")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    mx.random.seed(0)
    calls, samples, copies = (2, 1, 2) if options.quick else (32, 9, 16)
    table = Table(copy_bandwidth(2**26 if options.quick else 2**30))
    if options.quick:
        models: tuple[cases.Model, ...] = (cases.Model("small", 256, 128, 16),)
        shape, heads = (512, 256), (2, 4, 64)
    else:
        models, shape, heads = cases.MODELS, (16384, 4096), (16, 64, 128)
    moe_rows(table, models, calls, samples)
    for bits in (4, 2, 8) if not options.quick else (4,):
        table.add(lambda b=bits: cases.matvec(*shape, b, 1, copies=copies, samples=samples))
    for rows in (2, 4, 8):
        table.add(lambda m=rows: cases.matvec(*shape, 4, m, copies=copies, samples=samples))
    table.add(lambda: cases.delta_step(*heads, calls=calls, samples=samples))
    table.add(lambda: cases.delta_conv_step(*heads, calls=calls, samples=samples))
    table.add(lambda: cases.delta_prompt(512 if not options.quick else 8, *heads, samples=min(samples, 3)))
    if options.tune and backend() != "cpu":
        tuning_rows(table, calls, samples)
    if options.mlx_lm_loop:
        print(f"mlx-lm's own loop, 16 tokens: {cases.mlx_lm_prompt(16, *heads):.0f} us", flush=True)
    if options.json:
        rows = [asdict(row) | {"of_copy": row.gigabytes_per_second / table.copy} for row in table.rows]
        options.json.write_text(json.dumps({"backend": backend(), "copy_gb_s": table.copy, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
