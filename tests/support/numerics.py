"""Tolerances of results: one measure, and one table of its bounds."""

import mlx.core as mx
import numpy as np

RELATIVE_RMS = {"transformers": 2e-5, "mlx-lm": 2e-5, "split": 2e-5}
"""Largest relative RMS of float32 logits, by what they are compared with. 1e-4 is promised, 1e-6 is measured; 2e-5
still sees a wrong epsilon."""


def floats(array: mx.array) -> np.ndarray:
    """Return a numpy array in float32: numpy doesn't know bfloat16, which a GPU's results have."""
    return np.array(array.astype(mx.float32))


def relative_rms(result: mx.array | np.ndarray, reference: mx.array | np.ndarray) -> float:
    """RMS of the difference over the RMS of the reference; infinite where either isn't finite."""
    sides = (floats(side) if isinstance(side, mx.array) else side for side in (result, reference))
    a, b = (np.array(side, dtype=np.float64) for side in sides)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    rms = np.sqrt(((a - b) ** 2).mean() / (b**2).mean())
    return float(rms) if np.isfinite(rms) else float("inf")


def assert_close(name: str, reference: mx.array | np.ndarray, result: mx.array | np.ndarray, rel_rms: float) -> None:
    got = relative_rms(result, reference)
    assert got <= rel_rms, f"{name}: relative RMS must be at most {rel_rms:g}, got {got:.3g}"
