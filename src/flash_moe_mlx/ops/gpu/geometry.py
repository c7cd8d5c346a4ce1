"""How a quantised matvec is spread over lanes: the compile-time constants of the matvec kernels."""

from dataclasses import dataclass

from ...errors import ShapeError
from ...formats.schemes import AFFINE

SIMD_WIDTH = 32
CHUNK = 32
"""Consecutive weights of a row that a lane takes at a time: a word for each bit of a weight."""

STAGED_VALUES = 4096
"""Values of x staged in threadgroup memory at a time, as float32: 18 KiB of the 32 that Metal allows."""


@dataclass(frozen=True)
class Geometry:
    """Spread of one matvec over threads. kernels/README.md draws it.

    Attributes:
        lanes: Lanes that share a row: a power of two up to 32.
        rows: Rows that a lane computes at once.
        simd_groups: SIMD groups a threadgroup.
        tile: Values of x staged at a time: a multiple of CHUNK * lanes, or all.
        scaled_bits: Bits a weight where fields are masked in place, 0 where they are shifted down.
    """

    lanes: int
    rows: int
    simd_groups: int
    tile: int
    scaled_bits: int

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        return (
            ("LANES", self.lanes),
            ("ROWS", self.rows),
            ("SIMD_GROUPS", self.simd_groups),
            ("TILE", self.tile),
            ("SCALED_BITS", self.scaled_bits),
        )

    @property
    def threadgroup(self) -> tuple[int, int, int]:
        return (SIMD_WIDTH, self.simd_groups, 1)

    def grid(self, groups: int, outputs: int) -> tuple[int, int, int]:
        """Threads in all, for ``groups`` threadgroups along x and ``outputs`` rows of the matrix."""
        per_threadgroup = self.simd_groups * (SIMD_WIDTH // self.lanes) * self.rows
        return (SIMD_WIDTH * groups, self.simd_groups * -(-outputs // per_threadgroup), 1)


def choose_lanes(chunks: int) -> int:
    """Lanes that share a row of so many chunks: as many as leave fewest idle in the last step."""
    sizes = (32, 16, 8, 4, 2, 1)
    # max keeps the first of equals: more lanes a row read longer contiguous runs.
    return max(sizes, key=lambda lanes: chunks / (lanes * -(-chunks // lanes)))


def choose_geometry(
    where: str,
    columns: int,
    quantizations: list[tuple[int, int]],
    *,
    rows: int,
    simd_groups: int,
    x_rows: int = 1,
    staged_values: int = STAGED_VALUES,
    lanes: int | None = None,
) -> Geometry:
    """Spread of the matvecs of one kernel, which share x.

    Args:
        where: Name of the caller, for errors.
        columns: Weights a row.
        quantizations: (bits, group size) of each matrix.
        rows: Rows that a lane computes at once.
        simd_groups: SIMD groups a threadgroup.
        x_rows: Rows of x that a threadgroup stages.
        staged_values: Values of x that fit into threadgroup memory.
        lanes: Lanes that share a row; chosen from the columns where it is None.

    Raises:
        ShapeError: If bits or group size are not supported, or columns are not whole groups.
    """
    for bits, group_size in quantizations:
        if not AFFINE.allows(bits, group_size) or columns % group_size:
            raise ShapeError(
                f"[{where}] weights must be of {AFFINE.sizes_in_words} that divide the row, got {bits} bits in groups "
                f"of {group_size}, rows of {columns}. "
                "Set FLASH_MOE_REFERENCE=1 to run MLX's own operations."
            )
    bits = quantizations[0][0]
    same = all(other == bits for other, _ in quantizations)
    lanes = lanes or choose_lanes(columns // CHUNK)
    step = CHUNK * lanes
    tile = min(columns, max(step, staged_values // x_rows // step * step))
    return Geometry(
        lanes=lanes,
        rows=rows,
        simd_groups=simd_groups,
        tile=tile,
        scaled_bits=bits if same and bits in (2, 4, 8) else 0,
    )


def load_width(columns: int, bits: int) -> int:
    """Words that a lane may load at a time, so that every load of every row is aligned: 4, 2 or 1."""
    row_words = columns * bits // 32
    return next(width for width in (4, 2, 1) if bits % width == 0 and row_words % width == 0)
