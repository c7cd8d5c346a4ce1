"""Layers that hold a checkpoint's tensors under its own names, quantised or not, and pick the right op."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..formats.expert_layout import Quantization
from ..ops.dense_matmul import dense_matmul
from ..ops.quantized import Parts, dequantize, lazy_product, product
from ..ops.slot_memory import MLX_DTYPES

QuantizationOf = Callable[[str], Quantization | None]
"""Quantisation of the module at a path; None where it is stored unquantised."""


class Linear(nn.Module):
    """``y = x W^T + b``. W is (out, in), quantised or not; the tensors are filled in by load_weights."""

    def __init__(self, input_dims: int, output_dims: int, quantization: Quantization | None, bias: bool = False):
        super().__init__()
        self.quantization = quantization
        if quantization is None:
            self.weight = mx.zeros((output_dims, input_dims))
        else:
            sizes = quantization.bits, quantization.group_size
            for name, (dtype, shape) in quantization.scheme.specs(output_dims, input_dims, *sizes, "F32").items():
                self[name] = mx.zeros(shape, MLX_DTYPES[dtype])
        if bias:
            self.bias = mx.zeros((output_dims,))

    @property
    def parts(self) -> Parts:
        """The weight and the other parts of its quantisation, by name."""
        names = ("weight",) if self.quantization is None else self.quantization.scheme.parts
        return {name: self[name] for name in names}

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes (..., in) to (..., out), in the dtype of x."""
        if self.quantization is None:
            y = dense_matmul(x, self.weight)
        else:
            y = product(x.reshape(-1, x.shape[-1]), self.parts, self.quantization).reshape(*x.shape[:-1], -1)
        y = y.astype(x.dtype)
        return y + self.bias if "bias" in self else y

    def deferred(self, x: mx.array) -> mx.array:
        """As a call, but nothing is computed until somebody evaluates it: the CPU's own kernels would run at once."""
        if self.quantization is None:
            y = (x @ self.weight.T).astype(x.dtype)
        else:
            y = lazy_product(x, self.parts, self.quantization)
        return y + self.bias if "bias" in self else y


class Embedding(Linear):
    """Token embeddings, quantised or not. Called on hidden states, it is the tied output projection."""

    def __init__(self, vocab_size: int, hidden_size: int, quantization: Quantization | None):
        super().__init__(hidden_size, vocab_size, quantization)

    def embed(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        """Embeddings of token ids: shapes (...) to (..., H), in ``dtype``."""
        if self.quantization is None:
            return self.weight[tokens].astype(dtype)
        # Scales first into dtype: dequantised in bfloat16, the embedding itself would be rounded.
        return dequantize(
            {name: part[tokens] if part.ndim else part for name, part in self.parts.items()}, self.quantization, dtype
        )


class SwiGLU(nn.Module):
    """``W_d (silu(W_g x) * W_u x)``: the shared expert. Reference: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, path: str, quantization_of: QuantizationOf):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, quantization_of(f"{path}.gate_proj"))
        self.up_proj = Linear(hidden_size, intermediate_size, quantization_of(f"{path}.up_proj"))
        self.down_proj = Linear(intermediate_size, hidden_size, quantization_of(f"{path}.down_proj"))

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
