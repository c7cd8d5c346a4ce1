"""Embeddings and rotations that CPU decoding reads without MLX: equal to MLX's, bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from flash_moe_mlx.formats.expert_layout import Quantization
from flash_moe_mlx.models.cpu_layers import TokenEmbedding
from flash_moe_mlx.models.layers import Embedding
from flash_moe_mlx.models.mixers.attention import _Rotation

ROWS, SIZE = 40, 128


def embedding(bits: int | None, dtype: mx.Dtype, group_size: int = 64) -> Embedding:
    weights = mx.random.normal((ROWS, SIZE), key=mx.random.key(bits or 0))
    if bits is None:
        module = Embedding(ROWS, SIZE, None)
        module.weight = weights.astype(dtype)
        return module
    module = Embedding(ROWS, SIZE, Quantization(bits, group_size))
    module.weight, scales, biases = mx.quantize(weights, group_size, bits)
    module.scales, module.biases = scales.astype(dtype), biases.astype(dtype)
    return module


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(None, 0), (2, 64), (3, 64), (4, 32), (4, 128), (6, 64), (8, 64)])
def test_embeddings_are_those_of_mlx(bits: int | None, group_size: int, dtype: mx.Dtype):
    module = embedding(bits, dtype, group_size)
    expected = np.array(module.embed(mx.arange(ROWS), mx.float32))
    read = TokenEmbedding(module)
    assert np.array_equal(np.stack([read(token) for token in range(ROWS)]), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_embeddings_are_exact_for_any_codes_and_scales(bits: int):
    random = np.random.default_rng(bits)
    module = Embedding(ROWS, SIZE, Quantization(bits, 32))
    module.weight = mx.array(random.integers(0, 2**32, (ROWS, SIZE * bits // 32), dtype=np.uint32))
    for name in ("scales", "biases"):
        exponents = 10.0 ** random.uniform(-4, 4, (ROWS, SIZE // 32))
        module[name] = mx.array((random.normal(size=exponents.shape) * exponents).astype(np.float32)).astype(
            mx.bfloat16
        )
    expected = np.array(module.embed(mx.arange(ROWS), mx.float32))
    read = TokenEmbedding(module)
    assert np.array_equal(np.stack([read(token) for token in range(ROWS)]), expected)


ROPES = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rotations_are_those_of_each_position(name: str):
    half = 8
    rope = initialize_rope(2 * half, 10000.0, False, ROPES[name], 1024)
    rotation = _Rotation(rope, half)
    probe = mx.concatenate([mx.ones((1, 1, 1, half)), mx.zeros((1, 1, 1, half))], axis=-1)
    for position in (0, 1, 63, 64, 65, 300, 299, 363, 364, 5, 70000):
        rotation.turn(position)
        expected = np.array(rope(probe, offset=position)).reshape(2, half)
        assert np.array_equal(np.stack([rotation.cos, rotation.sin]), expected), position
