"""Distribution of a quantised matvec over lanes: the compile-time constants of the matvec kernels."""

from dataclasses import dataclass

from ...errors import ShapeError
from ...formats.schemes import AFFINE

SIMD_WIDTH = 32
CHUNK = 32
"""Consecutive weights of a row that a lane takes at a time: as many words as a weight has bits."""

STAGED_VALUES = 4096
"""Values of x staged in threadgroup memory at a time, as float32: 18 KiB of the 32 that Metal allows."""


@dataclass(frozen=True)
class Geometry:
    """Distribution of one matvec over threads. kernels/README.md draws it.

    Attributes:
        lanes: Lanes that share a row: a power of two up to 32.
        rows: Rows that a lane computes at once.
        simd_groups: SIMD groups per threadgroup.
        tile: Number of values of x staged at a time: a multiple of CHUNK * lanes, or all.
        scaled_bits: Bits per weight if fields are masked in place, 0 if they are shifted down.
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
        """Return the total number of threads for ``groups`` threadgroups along x and ``outputs`` rows of the matrix."""
        per_threadgroup = self.simd_groups * (SIMD_WIDTH // self.lanes) * self.rows
        return (SIMD_WIDTH * groups, self.simd_groups * -(-outputs // per_threadgroup), 1)


def choose_lanes(chunks: int) -> int:
    """Return the number of lanes that share a row of ``chunks`` chunks, so that few of them idle in the last step."""
    sizes = (32, 16, 8, 4, 2, 1)
    # max keeps the first of equals: more lanes per row read longer contiguous runs.
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
    """Choose the distribution of the matvecs of one kernel, which share x.

    Args:
        where: Name of the caller, for errors.
        columns: Number of weights per row.
        quantizations: (bits, group size) of each matrix.
        rows: Number of rows that a lane computes at once.
        simd_groups: SIMD groups per threadgroup.
        x_rows: Number of rows of x that a threadgroup stages.
        staged_values: Number of values of x that fit into threadgroup memory.
        lanes: Number of lanes that share a row; None chooses it from the columns.

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
    """Return how many words a lane may load at a time so that all loads of all rows are aligned: 4, 2 or 1."""
    row_words = columns * bits // 32
    return next(width for width in (4, 2, 1) if bits % width == 0 and row_words % width == 0)
