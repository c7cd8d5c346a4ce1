"""Layers that hold a checkpoint's tensors under its own names, quantised or not, and choose the right operation."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from ..formats.expert_layout import Quantization
from ..ops.dense_matmul import dense_matmul
from ..ops.quantized import Parts, dequantize, lazy_product, product
from ..ops.slot_memory import MLX_DTYPES

QuantizationOf = Callable[[str], Quantization | None]
"""Function from a module's path to its quantisation; None for modules stored unquantised."""


class Linear(nn.Module):
    """``y = x W^T + b``, with W of shape (out, in), quantised or not; load_weights fills in the tensors."""

    def __init__(self, input_dims: int, output_dims: int, quantization: Quantization | None, bias: bool = False):
        super().__init__()
        self.quantization = quantization
        self.input_dims = input_dims
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
        """Return the weight and the other parts of its quantisation, by name."""
        names = ("weight",) if self.quantization is None else self.quantization.scheme.parts
        return {name: self[name] for name in names}

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out), in the dtype of x."""
        if self.quantization is None:
            y = dense_matmul(x, self.weight)
        else:
            y = product(x.reshape(-1, x.shape[-1]), self.parts, self.quantization).reshape(*x.shape[:-1], -1)
        y = y.astype(x.dtype)
        return y + self.bias if "bias" in self else y

    def deferred(self, x: mx.array) -> mx.array:
        """Return the same product, lazily: in a plain call, CPU kernels would compute immediately."""
        if self.quantization is None:
            y = (x @ self.weight.T).astype(x.dtype)
        else:
            y = lazy_product(x, self.parts, self.quantization)
        return y + self.bias if "bias" in self else y

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> "LoRALinear":
        """Return the module with an adapter of rank ``r``; mlx_lm's tuner calls this. Nothing drops out."""
        return LoRALinear(self, r, scale)


class LoRALinear(nn.Module):
    """``y = linear(x) + scale (x A) B``, with A of shape (in, r) and B of (r, out).

    Reference: Hu 2021, arXiv:2106.09685.
    """

    def __init__(self, linear: Linear, rank: int, scale: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.zeros((linear.input_dims, rank))
        self.lora_b = mx.zeros((rank, linear["weight"].shape[0]))

    @property
    def weight(self) -> mx.array:
        """The module's own weight."""
        return self.linear["weight"]

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out), in the dtype of x."""
        return self._adapted(x, self.linear(x))

    def deferred(self, x: mx.array) -> mx.array:
        """Return the same product, lazily."""
        return self._adapted(x, self.linear.deferred(x))

    def _adapted(self, x: mx.array, y: mx.array) -> mx.array:
        return y + (self.scale * ((x @ self.lora_a) @ self.lora_b)).astype(x.dtype)


class Embedding(Linear):
    """Token embeddings, quantised or not. When called on hidden states, it is the tied output projection."""

    def __init__(self, vocab_size: int, hidden_size: int, quantization: Quantization | None):
        super().__init__(hidden_size, vocab_size, quantization)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRALinear:
        """Refuse an adapter.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            "[adapter_path] must change linear modules alone, got the embeddings. Train with keys that leave them out."
        )

    def embed(self, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return the embeddings of token ids: (...) to (..., H), in ``dtype``."""
        if self.quantization is None:
            return self.weight[tokens].astype(dtype)
        # Convert the scales first: dequantising in bfloat16 would round the embedding itself.
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
