"""SwiGLU feed-forward of routed experts, computed directly on the bytes of their records."""

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from ...formats.expert_layout import Quantization, RecordLayout
from ..numerics import Activation
from ..slot_memory import ExpertRecords
from .arrays import RECORD_KINDS, Output, address, empty, float_at, floats, view
from .elementwise import swiglu
from .kernels import format_of
from .matmul import Matrices, block_products, row_products
from .tile_ir import PACK_BLOCK

BLOCK_ROWS = 512
"""(token, expert) pairs that prefill computes at once. Bounds the scratch memory, three rows of the experts' width per
pair; bits don't depend on it."""

FEW_ROWS = 4
"""Experts with up to this many rows are multiplied row by row: unpacking their weights would cost more."""


def part_addresses(layout: RecordLayout, records: np.ndarray) -> dict[str, np.ndarray]:
    """Return the address of each part of each record, from the records' own addresses, shape (P,), int64."""
    return {part.name: records + part.offset for part in layout.parts}


def bank_addresses(bank: ExpertRecords, slots: np.ndarray) -> dict[str, np.ndarray]:
    """Return the address of each part of the records in ``slots``, shape (P,)."""
    base = address(view(bank.array, np.uint8))
    return part_addresses(bank.layout, base + slots.astype(np.int64) * bank.layout.record_bytes)


def matrices(layout: RecordLayout, projection: str, addresses: Mapping[str, np.ndarray]) -> Matrices:
    """Return one projection of P experts; the caller keeps the memory at ``addresses`` alive."""
    quantization = layout.quantization(projection)
    weight = layout.by_name[f"{projection}.weight"]
    bias = layout.by_name.get(f"{projection}.bias")
    own = {part.part: part for part in layout.quantized_parts(projection)}
    stored = own.get("scales", weight)
    form = format_of(quantization, stored.dtype, weight.rows_apart)
    places = {name: addresses[part.name] for name, part in own.items()}
    return Matrices(
        form,
        weight.shape[0],
        places["weight"],
        places.get("scales"),
        places["scales"] if form.excess else places.get("biases"),
        _factors(quantization, places),
        addresses[bias.name] if bias else None,
        RECORD_KINDS[bias.dtype] if bias else 0,
    )


def _factors(quantization: Quantization | None, places: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return each matrix's factor on its products, read from its record."""
    for name, factor in quantization.scheme.factors.items() if quantization else ():
        stored = (float_at(int(place)) for place in places[name])
        return np.array([factor(value) for value in stored], np.float32)
    return None


def pairs_ffn(
    x: np.ndarray,
    x_rows: np.ndarray,
    layout: RecordLayout,
    addresses: Mapping[str, np.ndarray],
    y: np.ndarray,
    y_rows: np.ndarray,
    activation: Activation | None = None,
) -> None:
    """Compute the feed-forward of P (token, expert) pairs independently.

    Args:
        x: Tokens. Shape (T, H), contiguous float32.
        x_rows: Token of each pair. Shape (P,).
        layout: Layout of the records.
        addresses: Address of each part for each pair; the caller keeps the memory alive.
        y: Result, shape (Q, H), contiguous float32. A pair's bits depend on no other pair.
        y_rows: Row of y for each pair. Shape (P,).
        activation: Function of (up, gate) as MLX arrays, instead of SwiGLU.
    """
    count = len(x_rows)
    pairs, h = np.arange(count), empty(2 * count, layout.intermediate_size)
    up = matrices(layout, "up_proj", addresses)
    gate = matrices(layout, "gate_proj", addresses) if layout.has_gate else up
    both = gate.followed_by(up) if layout.has_gate else None
    if both is not None:
        row_products(x, both, np.arange(2 * count), h, np.tile(x_rows, 2), np.arange(2 * count))
    else:
        if layout.has_gate:
            row_products(x, gate, pairs, h, x_rows, pairs)
        row_products(x, up, pairs, h, x_rows, pairs + count)
    down = matrices(layout, "down_proj", addresses)
    gates = h[:count] if layout.has_gate else h[count:]
    row_products(_activated(gates, h[count:], activation), down, pairs, y, pairs, y_rows)


def blocks_ffn(
    x: np.ndarray,
    x_rows: np.ndarray,
    counts: np.ndarray,
    layout: RecordLayout,
    addresses: Mapping[str, np.ndarray],
    y: np.ndarray,
    y_rows: np.ndarray,
    activation: Activation | None = None,
) -> None:
    """Run ``pairs_ffn`` where ``counts[p]`` consecutive pairs use the p-th of P experts; addresses are per expert."""
    count, experts, starts = len(x_rows), np.arange(len(counts)), np.cumsum(counts) - counts
    pairs, h = np.arange(count), empty(2 * count, layout.intermediate_size)
    up = matrices(layout, "up_proj", addresses)
    gate = matrices(layout, "gate_proj", addresses) if layout.has_gate else up
    both = gate.followed_by(up) if layout.has_gate else None
    if both is not None:
        twice = np.concatenate([starts, starts + count])
        rows = np.tile(x_rows, 2), np.arange(2 * count)
        block_products(x, both, np.arange(2 * len(counts)), h, *rows, twice, np.tile(counts, 2))
    else:
        if layout.has_gate:
            block_products(x, gate, experts, h, x_rows, pairs, starts, counts)
        block_products(x, up, experts, h, x_rows, pairs + count, starts, counts)
    down = matrices(layout, "down_proj", addresses)
    gates = h[:count] if layout.has_gate else h[count:]
    block_products(_activated(gates, h[count:], activation), down, experts, y, pairs, y_rows, starts, counts)


def _activated(gate: np.ndarray, up: np.ndarray, activation: Activation | None) -> np.ndarray:
    if activation is not None:
        return floats(activation(mx.array(up), mx.array(gate)))
    swiglu(gate.reshape(-1), up.reshape(-1))
    return gate


def expert_ffn(x: mx.array, bank: ExpertRecords, slots: mx.array, activation: Activation | None = None) -> mx.array:
    """Compute ``ops.expert_ffn`` on the CPU."""
    table = np.array(slots)
    tokens, k = table.shape
    y = Output(tokens, k, bank.layout.hidden_size)
    addresses = bank_addresses(bank, table.reshape(-1))
    pairs, rows = np.arange(tokens * k), y.array.reshape(tokens * k, bank.layout.hidden_size)
    pairs_ffn(floats(x), pairs // k, bank.layout, addresses, rows, pairs, activation)
    return y.result(mx.float32)


def expert_ffn_batch(x: mx.array, bank: ExpertRecords, slot: int, activation: Activation | None = None) -> mx.array:
    """Compute ``ops.expert_ffn_batch`` on the CPU."""
    rows = floats(x)
    y = Output(len(rows), bank.layout.hidden_size)
    grouped_ffn(rows, bank, [slot], [np.arange(len(rows))], 1, y.array, activation)
    return y.result(mx.float32)


def grouped_ffn(
    x: np.ndarray,
    bank: ExpertRecords,
    slots: Sequence[int],
    pairs: Sequence[np.ndarray],
    k: int,
    y: np.ndarray,
    activation: Activation | None = None,
) -> None:
    """Compute the feed-forward of a group of experts, each on all tokens that chose it.

    Args:
        x: Tokens. Shape (T, H), contiguous float32.
        bank: Slots of one layer.
        slots: Slot of each expert of the group.
        pairs: Each expert's (token, rank) pairs as ``token * k + rank``.
        k: Number of experts per token.
        y: Result, shape (T * k, H), contiguous float32; only these pairs are written.
        activation: Activation instead of SwiGLU.

    A row's bits depend on how many rows its expert has, and on nothing else.
    """
    layout = bank.layout
    most = FEW_ROWS if _fits_tiles(layout) else len(x)
    for few in (True, False):
        chosen = [(slot, own) for slot, own in zip(slots, pairs, strict=True) if (len(own) <= most) == few]
        for block in _blocks(chosen):
            rows = np.concatenate([own for _, own in block])
            counts = np.array([len(own) for _, own in block])
            addresses = bank_addresses(bank, np.array([slot for slot, _ in block]))
            if few:
                each = {name: np.repeat(part, counts) for name, part in addresses.items()}
                pairs_ffn(x, rows // k, layout, each, y, rows, activation)
            else:
                blocks_ffn(x, rows // k, counts, layout, addresses, y, rows, activation)


def _fits_tiles(layout: RecordLayout) -> bool:
    """Return whether rows can be unpacked in blocks, as groups of 32 and more always can."""
    widths = {"gate_proj": layout.hidden_size, "up_proj": layout.hidden_size, "down_proj": layout.intermediate_size}
    return all(widths[name] % PACK_BLOCK == 0 for name in layout.projections)


def _blocks(chosen: Sequence[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Split (slot, pairs) into blocks of at most BLOCK_ROWS pairs."""
    block: list[tuple[int, np.ndarray]] = []
    room = BLOCK_ROWS
    for slot, own in chosen:
        while len(own):
            block.append((slot, own[:room]))
            own, room = own[room:], room - len(block[-1][1])
            if room == 0:
                yield block
                block, room = [], BLOCK_ROWS
    if block:
        yield block
