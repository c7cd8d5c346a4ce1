"""Whatever headers and config.json say, it is understood or refused with a typed error."""

from math import prod
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from flash_moe_mlx.errors import CheckpointError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.safetensors_header import DTYPE_BITS, TensorInfo

words = st.sampled_from(
    ["model", "layers", "0", "1", "00", "9" * 400, "mlp", "experts", "switch_mlp", "gate_proj", "up_proj", "down_proj",
     "gate_up_proj", "gate", "weight", "scales", "biases", "bias", "lm_head", "", "\ud800", "\u0663", "mtp"]
)  # fmt: skip
stacked = st.builds(
    "m.layers.{}.mlp.switch_mlp.{}_proj.{}".format,
    st.integers(0, 1),
    st.sampled_from(["gate", "up", "down"]),
    st.sampled_from(["weight", "scales", "biases", "bias", "global_scale"]),
)
without_gate = st.builds("m.layers.0.mlp.switch_mlp.fc{}.weight".format, st.integers(1, 2))
single = st.builds(
    "m.layers.0.{}.experts.{}.{}.{}".format, st.sampled_from(["mlp", "mixer"]), st.integers(0, 2),
    st.sampled_from(["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]),
    st.sampled_from(["weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale",
                     "qweight", "qzeros", "scales", "g_idx"]),
)  # fmt: skip
fused = st.builds(
    "m.layers.{}.{}{}".format,
    st.integers(0, 1),
    st.sampled_from(["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "block_sparse_moe.input_linear.weight"]),
    st.sampled_from(["", "", "_blocks", "_scales", "_bias"]),
)
names = stacked | without_gate | single | fused | st.lists(words, max_size=7).map(".".join)
shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128]), max_size=4).map(tuple)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["affine", "mxfp4", "nvfp4", "int4", "fp8", "awq", "gptq", "gptq_v2", "4", 4, 16, 32, 64, 128])
)
sections = st.dictionaries(
    st.sampled_from(
        [
            "bits",
            "group_size",
            "mode",
            "quant_method",
            "checkpoint_format",
            "lm_head",
            "m.layers.0.mlp.switch_mlp.up_proj",
        ]
    ),
    leaves | st.dictionaries(st.sampled_from(["bits", "group_size", "mode"]), leaves),
)
keys = ["num_experts", "hidden_size", "num_hidden_layers", "quantization", "quantization_config", "text_config"]
configs = st.dictionaries(st.sampled_from(keys), leaves | sections | st.just({"num_experts": 2}))


DTYPES = ["BF16", "BF16", "F32", "U32", "U8", "F8_E4M3", "F8_E5M2FNUZ", "F6_E2M3", "I32", "F4"]


@settings(max_examples=200, deadline=None)
@given(
    tensors=st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=9),
    config=configs,
)
def test_any_headers_are_understood_or_refused(tensors: dict[str, tuple[str, tuple[int, ...]]], config: Any):
    infos = {}
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        infos[name] = TensorInfo(name, Path("model.safetensors"), dtype, shape, 100, nbytes)
    try:
        checkpoint = Checkpoint(Path("x"), config, infos)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        if not checkpoint.is_streamable:
            return
        for layer in checkpoint.moe_layers:
            for expert in range(checkpoint.num_experts(layer)):
                covered = sum(r.nbytes for r in checkpoint.ranges(layer, expert))
                assert covered == checkpoint.layout(layer).payload_bytes > 0
    assert message.isprintable()
    assert len(message) < 1000
