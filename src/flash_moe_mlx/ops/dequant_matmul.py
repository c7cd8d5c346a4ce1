"""Product of many rows with a quantised matrix: the projections and experts of a prompt on a GPU."""

import mlx.core as mx

from .backend import backend, use_kernels, use_reference
from .dequantize import KERNEL_BITS, dense_matrix

TILE_BYTES = 128 << 20
"""Size of the dequantised weights held at a time, as float32."""

LAZY_BYTES = 32 << 20
"""Size of 16-bit tiles that are not waited for. What products reserve, twice the largest matrix of a layer in float32,
holds four such matrices, and the others of a layer are smaller."""

GROUP_BYTES = 256 << 20
"""Size of the dequantised weights of one projection of several experts, as float32. On an H200, a prompt of 2,048
tokens at 35B dimensions took 3.0 s with 16 MB, 1.4 s with 64 MB and 1.0 s with 256 MB: it is bound by launches and
allocations."""

GROUP_EXPERTS = 64
"""Maximum number of experts that share a grouped product, however small they are."""


def dequantizes() -> bool:
    """Return whether products dequantise their matrices: on CUDA."""
    return backend() == "cuda" and not use_reference()


def experts_at_once(hidden_size: int, intermediate_size: int) -> int:
    """Return how many experts share a grouped product."""
    return min(max(1, GROUP_BYTES // (hidden_size * intermediate_size * mx.float32.size)), GROUP_EXPERTS)


def product_scratch_bytes(matrix_bytes: int, hidden_size: int, intermediate_size: int) -> int:
    """Return the maximum memory that products need besides their arguments and results.

    Args:
        matrix_bytes: Size of the largest dense matrix, as float32.
        hidden_size: Width of the experts' input, H.
        intermediate_size: Intermediate width of an expert, I.
    """
    if not dequantizes():
        return 0
    expert_bytes = hidden_size * intermediate_size * mx.float32.size
    experts = experts_at_once(hidden_size, intermediate_size) * expert_bytes
    # A tile and its copy in x's dtype; for experts, two projections' packed parts, their weights and copies of them.
    return 2 * min(TILE_BYTES, matrix_bytes) + 4 * experts


def passing_records(record_bytes: int, hidden_size: int, intermediate_size: int) -> int:
    """Return how many experts' records fit in what products reserve besides the dense matrices of two runs.

    Those take 12 of the 16 bytes that are reserved for each of an expert's H x I weights, so this is twice as many
    experts as share a product with 4 bits, and fewer with 8.

    Args:
        record_bytes: Size of an expert's record.
        hidden_size: Width of the experts' input, H.
        intermediate_size: Intermediate width of an expert, I.
    """
    at_once = experts_at_once(hidden_size, intermediate_size)
    return min(2 * at_once, at_once * hidden_size * intermediate_size * mx.float32.size // record_bytes)


def dequant_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int, lazy: bool = False
) -> mx.array:
    """Multiply many rows of x with an affine-quantised matrix.

    Takes the arguments, and has the result and errors, of ``mx.quantized_matmul`` with ``transpose=True``, which it
    calls except on CUDA. There MLX compiles its product from CUTLASS when it first meets a quantisation and a dtype,
    which takes minutes and fails if CUDA's ``crt`` headers are not installed. So on CUDA, tiles of the matrix are
    dequantised and multiplied by cuBLAS (in TF32 if x is float32, unless MLX_ENABLE_TF32=0). That moves each weight
    through the GPU's memory a few more times; a prompt's experts come from the disk at a hundredth of that rate.

    Each large tile is evaluated before the next is made, since MLX keeps a graph's inputs until all of it has run. With
    ``lazy``, the caller is responsible for evaluating often enough.
    """
    if not dequantizes():
        return mx.quantized_matmul(
            x, weight, scales.astype(x.dtype), biases.astype(x.dtype), group_size=group_size, bits=bits
        )
    tile = max(1, TILE_BYTES // (4 * x.shape[-1]))
    has_kernel, parts = use_kernels() and bits in KERNEL_BITS, []
    for first in range(0, weight.shape[0], tile):
        rows = slice(first, first + tile)
        matrix = weight[rows], scales[rows], biases[rows]
        if has_kernel:
            dense = dense_matrix(*matrix, bits=bits, group_size=group_size, dtype=x.dtype)
        else:
            # In float32, then rounded once: in bfloat16, the product with the scale would be rounded too.
            floats = (part.astype(mx.float32) for part in matrix[1:])
            dense = mx.dequantize(matrix[0], *floats, group_size=group_size, bits=bits).astype(x.dtype)
        parts.append(x @ dense.T)
        small = has_kernel and dense.dtype.size == 2 and dense.nbytes <= LAZY_BYTES
        del dense
        if not (lazy or small):
            mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
