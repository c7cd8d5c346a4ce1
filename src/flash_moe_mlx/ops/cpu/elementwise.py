"""Small functions of kernels: exponential, SiLU, reading stored numbers, ordering x for the dot products."""

import numpy as np

from .jit import serial
from .vector_ir import BF16, F16, LANES, load_bf16, load_f16, load_f32, load_u8, store_f32

_LOG2E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@serial
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Logistic function of a float32; a polynomial of Cephes' expf, so that loops of it vectorise."""
    t = min(max(-x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(t * _LOG2E + np.float32(0.5))
    r = t - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    scale = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    # x - x is 0, or NaN where x is NaN or infinite: min and max would have lost a NaN.
    return np.float32(1.0) / (np.float32(1.0) + p * scale)
