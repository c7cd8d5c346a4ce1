"""Times the CPU kernels and MLX's own operations in alternation: milliseconds, and gigabytes or gigaflops per second.

    python benchmarks/cpu_kernels.py            # dimensions of Qwen3.5-35B-A3B
    python benchmarks/cpu_kernels.py --rounds 15 --only matvec experts

Warm: kernels are compiled and data touched before the first round. Prints one tab-separated line a case with the median
and the best of the rounds of each side; `x` is the ratio of medians. Sides that take long run fewer times.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from flash_moe_mlx.formats.expert_layout import Quantization, RecordLayout
from flash_moe_mlx.ops.cpu import attention, delta, experts, matmul, threads
from flash_moe_mlx.ops.dequant_matvec import dequant_matvec_reference
from flash_moe_mlx.ops.expert_batch import expert_ffn_batch_reference
from flash_moe_mlx.ops.expert_ffn import expert_ffn_reference
from flash_moe_mlx.ops.gated_delta import conv1d_silu_reference, gated_delta_reference
from flash_moe_mlx.ops.slot_memory import UnifiedSlots

HIDDEN, WIDTH, SLOTS, K = 2048, 512, 64, 8
K_HEADS, V_HEADS, HEAD = 16, 32, 128
SLOW_SECONDS = 0.5
"""A side that took longer once is run three times in all."""

Case = tuple[str, str, float, Callable[[], object], Callable[[], object]]
"""Name, unit of the amount, amount, our side, MLX's."""


def evaluated(*arrays: mx.array) -> tuple[mx.array, ...]:
    mx.eval(*arrays)
    return arrays


def matvec() -> Iterator[Case]:
    x = mx.random.normal((1, HIDDEN))
    for bits in (4, 8, 2, 3, 5, 6):
        weight = (mx.random.normal((16384, HIDDEN)) * 0.02).astype(mx.bfloat16)
        packed = evaluated(*mx.quantize(weight, group_size=64, bits=bits))
        quantization = {"bits": bits, "group_size": 64}
        yield (
            f"matvec 16384x{HIDDEN} {bits} bits",
            "GB",
            packed[0].nbytes / 1e9,
            lambda packed=packed, q=quantization: matmul.quantized_matmul(x, *packed, **q),
            lambda packed=packed, q=quantization: mx.eval(dequant_matvec_reference(x, *packed, **q)),
        )


def make_bank() -> UnifiedSlots:
    """Create random experts of 4 bits."""
    specs = {}
    for projection, (out, columns) in (
        ("gate_proj", (WIDTH, HIDDEN)),
        ("up_proj", (WIDTH, HIDDEN)),
        ("down_proj", (HIDDEN, WIDTH)),
    ):
        specs[projection, "weight"] = ("U32", (out, columns // 8))
        specs[projection, "scales"] = specs[projection, "biases"] = ("BF16", (out, columns // 64))
    quantizations = {projection: Quantization(4, 64) for projection, _ in specs}
    bank = UnifiedSlots(RecordLayout.contiguous(specs, quantizations), SLOTS)
    generator = np.random.default_rng(0)
    for slot in range(SLOTS):
        memory = np.frombuffer(bank.slot(slot), np.uint8)
        memory[:] = generator.integers(0, 256, memory.size, np.uint8)
        for part in bank.layout.parts:
            if part.dtype == "BF16":  # around 0.01
                memory[part.offset : part.offset + part.nbytes].view(np.uint16)[:] = 0x3C20
    return bank


def expert_cases() -> Iterator[Case]:
    bank = make_bank()
    nbytes = bank.layout.payload_bytes
    for tokens in (1, 4):
        x = mx.random.normal((tokens, HIDDEN))
        slots = mx.array(np.random.default_rng(1).permutation(SLOTS)[: tokens * K].reshape(tokens, K).astype(np.uint32))
        mx.eval(x, slots)
        yield (
            f"experts of {tokens} tokens, K {K}, 4 bits",
            "GB",
            tokens * K * nbytes / 1e9,
            lambda x=x, slots=slots: experts.expert_ffn(x, bank, slots),
            lambda x=x, slots=slots: mx.eval(expert_ffn_reference(x, bank, slots)),
        )
    for rows in (4, 16, 64):
        x = evaluated(mx.random.normal((rows, HIDDEN)))[0]
        yield (
            f"one expert, {rows} tokens",
            "GFLOP",
            6e-9 * rows * HIDDEN * WIDTH,
            lambda x=x: experts.expert_ffn_batch(x, bank, 3),
            lambda x=x: mx.eval(expert_ffn_batch_reference(x, bank, 3)),
        )


def product() -> Iterator[Case]:
    for rows in (16, 128, 512):
        weight = (mx.random.normal((4096, HIDDEN)) * 0.02).astype(mx.bfloat16)
        packed = evaluated(*mx.quantize(weight, group_size=64, bits=4))
        x = evaluated(mx.random.normal((rows, HIDDEN)))[0]
        flops = 2e-9 * rows * 4096 * HIDDEN
        yield (
            f"{rows} rows x 4096x{HIDDEN} 4 bits",
            "GFLOP",
            flops,
            lambda packed=packed, x=x: matmul.quantized_matmul(x, *packed, bits=4, group_size=64),
            lambda packed=packed, x=x: mx.eval(dequant_matvec_reference(x, *packed, bits=4, group_size=64)),
        )
        dense = evaluated(weight.astype(mx.float32))[0]
        a, b = np.array(x), np.array(dense)
        yield (
            f"{rows} rows x 4096x{HIDDEN} float32 (against numpy)",
            "GFLOP",
            flops,
            lambda x=x, dense=dense: matmul.dense_matmul(x, dense),
            lambda a=a, b=b: a @ b.T,
        )


def linear_attention() -> Iterator[Case]:
    for steps in (1, 64):
        channels = 2 * K_HEADS * HEAD + V_HEADS * HEAD
        x, window, weight = evaluated(
            mx.random.normal((1, steps, channels)), mx.random.normal((1, 3, channels)), mx.random.normal((channels, 4))
        )
        q, k = evaluated(*(mx.random.normal((1, steps, K_HEADS, HEAD)) for _ in range(2)))
        v, state = evaluated(mx.random.normal((1, steps, V_HEADS, HEAD)), mx.random.normal((1, V_HEADS, HEAD, HEAD)))
        a, b = evaluated(*(mx.random.normal((1, steps, V_HEADS)) for _ in range(2)))
        A_log, dt_bias = evaluated(mx.random.normal((V_HEADS,)), mx.random.normal((V_HEADS,)))
        arrays = (q, k, v, a, b, A_log, dt_bias, state)
        yield (
            f"gated delta, {steps} tokens, {V_HEADS} heads",
            "tokens",
            steps,
            lambda arrays=arrays: delta.gated_delta(*arrays),
            lambda arrays=arrays: mx.eval(gated_delta_reference(*arrays)),
        )
        yield (
            f"convolution, {steps} tokens, {channels} channels",
            "tokens",
            steps,
            lambda x=x, window=window, weight=weight: delta.conv1d_silu(x, window, weight),
            lambda x=x, window=window, weight=weight: mx.eval(conv1d_silu_reference(x, window, weight)),
        )


def full_attention() -> Iterator[Case]:
    for length, keys in ((1, 2048), (1, 8192), (256, 256), (256, 2048)):
        q = mx.random.normal((1, 16, length, 256))
        k, v = mx.random.normal((1, 2, keys, 256)), mx.random.normal((1, 2, keys, 256))
        mx.eval(q, k, v)
        arguments = {"scale": 1 / 16, "mask": "causal" if length > 1 else None}
        yield (
            f"attention, {length} queries x {keys} keys, 16 heads of 256",
            "GFLOP",
            4e-9 * 16 * 256 * length * (keys - (length - 1) / 2),
            lambda q=q, k=k, v=v, a=arguments: attention.attention(q, k, v, **a),
            lambda q=q, k=k, v=v, a=arguments: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, **a)),
        )


CASES = {
    "matvec": matvec,
    "experts": expert_cases,
    "product": product,
    "delta": linear_attention,
    "attention": full_attention,
}


def seconds(side: Callable[[], object]) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def measure(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Time both sides in alternation, after one call of each that does not count."""
    ours()
    slow = seconds(theirs) > SLOW_SECONDS
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds):
        times[0].append(seconds(ours))
        if not slow or round_ < 2:
            times[1].append(seconds(theirs))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    load = os.getloadavg()[0]
    print(f"# {platform.processor() or platform.machine()}, {threads.num_threads()} threads, mlx {mx.__version__}")
    print(f"# load average at the start {load:.1f}; warm, median (best) of {arguments.rounds}")
    print("case\tms\tbest\trate\tunit/s\tmlx ms\tmlx best\tx")
    for name in arguments.only:
        for case, unit, amount, ours, theirs in CASES[name]():
            own, other = measure(ours, theirs, arguments.rounds)
            median, reference = statistics.median(own), statistics.median(other)
            print(
                f"{case}\t{median * 1e3:.3f}\t{min(own) * 1e3:.3f}\t{amount / median:.1f}\t{unit}/s\t"
                f"{reference * 1e3:.2f}\t{min(other) * 1e3:.2f}\t{reference / median:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
