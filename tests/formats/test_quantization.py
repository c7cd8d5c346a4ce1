"""Bits and group size from shapes and config.json: what mlx-lm would infer, and what contradicts itself."""

from typing import Any

import mlx.core as mx
import pytest

from flash_moe_mlx.errors import CheckpointError, CorruptError, MissingTensorError, UnsupportedModelError
from flash_moe_mlx.formats.expert_layout import Quantization
from flash_moe_mlx.formats.quantization import QuantizationSettings, Stored, mlx_name
from flash_moe_mlx.formats.schemes import AFFINE

DTYPES = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint8: "U8"}


def stored(width: int, bits: int, group_size: int, *, dtype: mx.Dtype = mx.bfloat16, **more: Any) -> dict[str, Stored]:
    """Return the parts that `mx.quantize` makes of 8 rows."""
    parts = mx.quantize(mx.zeros((8, width), dtype), bits=bits, group_size=group_size, **more)
    names = ("weight", "scales", "biases")[: len(parts)]
    return {name: Stored(DTYPES[part.dtype], tuple(part.shape)) for name, part in zip(names, parts, strict=True)}


def resolve(
    tensors: dict[str, Stored], section: Any = None, in_features: int | None = None, *, exact: bool = True
) -> Quantization | None:
    settings = QuantizationSettings({} if section is None else {"quantization": section})
    return settings.resolve("model x", ("x",), tensors, in_features, exact=exact)


@pytest.mark.parametrize("bits", AFFINE.bits)
@pytest.mark.parametrize("group_size", AFFINE.group_sizes)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_width_settles_it(bits: int, group_size: int, dtype: mx.Dtype):
    tensors, expected = stored(256, bits, group_size, dtype=dtype), Quantization(bits, group_size)
    assert resolve(tensors, in_features=256) == expected
    # Whatever the default says: it is what the conversion was asked for.
    assert resolve(tensors, {"bits": 4, "group_size": 64}, 256) == expected
    assert resolve(tensors, {"bits": 4, "group_size": 64, "x": {"bits": bits, "group_size": group_size}}) == expected
    assert resolve(tensors, {"bits": bits, "group_size": group_size}) == expected


def test_shapes_give_only_the_product():
    tensors = stored(256, 4, 64)
    assert resolve(tensors, {"bits": 8, "group_size": 32}) == Quantization(8, 32)
    assert resolve(tensors, {"bits": 8, "group_size": 32}, 256) == Quantization(4, 64)
    with pytest.raises(
        CorruptError, match=r"2 bits in groups of 128 or 4 bits in groups of 64 or 8 bits .* Add an entry"
    ):
        resolve(tensors)
    assert resolve(stored(256, 5, 32)) == Quantization(5, 32)  # the only 160
    assert resolve(tensors, {"bits": 3, "group_size": 64}) == Quantization(4, 64)  # the default's group size
    assert resolve(tensors, {"bits": 3, "group_size": 64}, 512, exact=False) == Quantization(2, 128)
    assert resolve(tensors, {"bits": 4, "group_size": 64}, 100, exact=False) == Quantization(4, 64)


def test_an_entry_that_contradicts_the_tensors():
    tensors = stored(256, 4, 64)
    base = {"bits": 4, "group_size": 64}
    with pytest.raises(CorruptError, match=r"must be 8 bits in groups of 64, as config\.json says"):
        resolve(tensors, {**base, "x": {"bits": 8, "group_size": 64}})
    with pytest.raises(CorruptError, match=r"must be 8 bits in groups of 32, as config\.json says"):
        resolve(tensors, {**base, "x": {"bits": 8, "group_size": 32}}, 256)
    with pytest.raises(CorruptError, match=r"must be unquantised, as config\.json says"):
        resolve(tensors, {**base, "x": False})
    plain = {"weight": Stored("BF16", (8, 256))}
    with pytest.raises(CorruptError, match=r"must have scales, as config\.json says"):
        resolve(plain, {**base, "x": {"bits": 8}})
    assert resolve(plain, {**base, "x": False}) is None
    assert resolve(plain, base) is None
    assert resolve(tensors, {**base, "x": True}) == Quantization(4, 64)
    assert resolve(stored(256, 8, 64), {**base, "x": {"bits": 8}}) == Quantization(8, 64)  # the rest from the default
    with pytest.raises(CorruptError, match="must have 192 inputs"):
        resolve(tensors, base, 192)
    # A width that is only likely gives way to an entry that fits the shapes, and no other.
    entry = {**base, "x": {"bits": 8, "group_size": 32}}
    assert resolve(tensors, entry, 256, exact=False) == Quantization(8, 32)
    with pytest.raises(CorruptError, match="must be 8 bits in groups of 64"):
        resolve(tensors, {**base, "x": {"bits": 8, "group_size": 64}}, 256, exact=False)


def test_tensors_that_do_not_belong_together():
    good = stored(256, 4, 64)
    for changes, kind, message in [
        ({"scales": None}, MissingTensorError, "no scales"),
        ({"biases": None}, MissingTensorError, "no biases"),
        ({"weight": None}, MissingTensorError, "must have a weight"),
        ({"scales": None, "biases": None}, MissingTensorError, "packed weights"),
        ({"biases": Stored("F32", (8, 4))}, CorruptError, "must be alike"),
        ({"biases": Stored("BF16", (8, 8))}, CorruptError, "must be alike"),
        ({"weight": Stored("U32", (9, 32))}, CorruptError, "the same rows"),
        ({"weight": Stored("U32", (32,))}, CorruptError, "the same rows"),
        ({"weight": Stored("U32", (8, 33))}, CorruptError, "in groups of 32, 64 or 128"),
        ({"weight": Stored("U32", (8, 64 * 7))}, CorruptError, "in groups of 32, 64 or 128"),
        ({"weight": Stored("U32", (8, 0))}, CorruptError, "in groups of 32, 64 or 128"),
        ({"weight": Stored("BF16", (8, 32))}, UnsupportedModelError, "weight BF16, scales BF16"),
        ({"scales": Stored("U8", (8, 4))}, UnsupportedModelError, "scales U8, biases BF16"),
        ({"biases": None, "scales": Stored("I8", (8, 4))}, UnsupportedModelError, "scales I8"),
        ({"biases": None, "scales": Stored("U8", (8, 3))}, CorruptError, "or nvfp4, 4 bits in groups of 16"),
    ]:
        tensors = {name: value for name, value in {**good, **changes}.items() if value is not None}
        with pytest.raises(kind, match=message):
            resolve(tensors, {"bits": 4, "group_size": 64})
    empty = {"weight": Stored("U32", (8, 0)), "scales": Stored("F32", (8, 0)), "biases": Stored("F32", (8, 0))}
    with pytest.raises(CorruptError, match="in groups of"):
        resolve(empty)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_other_modes_of_mlx(mode: str, bits: int, group_size: int):
    """By what the tensors are, by the default, and by an entry."""
    made, expected = stored(256, bits, group_size, mode=mode), Quantization(bits, group_size, mode)
    entry = {"bits": bits, "group_size": group_size, "mode": mode}
    assert resolve(made, {"bits": 4, "group_size": 64}) == expected
    assert resolve(made, entry, 256) == expected
    assert resolve(made, {"bits": 4, "group_size": 64, "x": {"mode": mode}}) == expected
    # What an entry leaves out is not the section's: mlx-lm takes the mode's defaults, and affine.
    assert resolve(stored(256, 8, 64), {**entry, "x": {"bits": 8, "group_size": 64}}) == Quantization(8, 64)
    assert resolve(stored(256, 4, 64), {**entry, "x": {}}) == Quantization(4, 64)
    with pytest.raises(CorruptError, match=r"must be 4 bits in groups of 64, as config\.json says"):
        resolve(made, {**entry, "x": {"bits": 4, "group_size": 64}})
    with pytest.raises(UnsupportedModelError, match=f"must be of {bits} bits in groups of {group_size}, got 2"):
        QuantizationSettings({"quantization": {**entry, "bits": 2}})
    with pytest.raises(UnsupportedModelError, match="must be affine, mxfp4, mxfp8, nvfp4, int4 or fp8, got 'nf4'"):
        QuantizationSettings({"quantization": {**entry, "mode": "nf4"}})


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}, "in groups of -1"),
    "gptq out of order": ({"quantization_config": {"quant_method": "gptq", "desc_act": True}}, "got 'desc_act"),
    "gptq of marlin": ({"quantization_config": {"quant_method": "gptq", "is_marlin_format": True}}, "got 'marlin'"),
    "gptq of bitblas": ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "bitblas"}}, "'bitblas'"),
    "awq": ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "AutoAWQ's gemm .* got 'gemv'"),
    "awq 3": ({"quantization_config": {"quant_method": "awq", "version": 3}}, "got 3"),
    "in text_config": ({"text_config": {"quantization_config": {"quant_method": "bitnet"}}}, "'bitnet'"),
    "modelopt": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "modelopt, FP8"),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        "float-quantized",
    ),
    "no method": ({"quantization_config": {}}, "got method None"),
    "7 bits": ({"quantization": {"bits": 7, "group_size": 64}}, "got 7 in groups of 64"),
    "groups of 16": ({"quantization": {"bits": 4, "group_size": 16}}, "in groups of 16"),
}


@pytest.mark.parametrize(("config", "message"), OTHERS.values(), ids=OTHERS)
def test_refused_methods(config: dict[str, Any], message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        QuantizationSettings(config)


@pytest.mark.parametrize(
    "section",
    ["4bit", 4, [], True, {}, {"bits": 4}, {"bits": "4", "group_size": 64}, {"bits": True, "group_size": 64},
     {"bits": 4.0, "group_size": 64}, {"bits": 4, "group_size": 64, "x": {"bits": []}},
     {"group_size": 64, "x": {"group_size": 64}}],
    ids=str,
)  # fmt: skip
def test_nonsense(section: object):
    with pytest.raises(CorruptError, match=r"^\[config.json\] quantization "):
        QuantizationSettings({"quantization": section}).stated("x")  # an entry is read when its module is


def test_sections_that_are_fine():
    assert QuantizationSettings({}).default is None
    legacy = QuantizationSettings({"quantization_config": {"bits": 4, "group_size": 64, "mode": "affine"}})
    assert legacy.default == Quantization(4, 64)
    both = {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"quant_method": "fp8"}}
    assert QuantizationSettings(both).default == Quantization(4, 64)  # MLX's own section is the one that counts
    assert QuantizationSettings({"text_config": "text", "quantization_config": None}).default is None


def test_null_is_the_modes_own_size():
    """`mlx_lm.convert --quant-predicate mixed_3_6` writes null; MLX takes None as 64."""
    section = {"bits": 4, "group_size": 32, "x": {"bits": 3, "group_size": None, "mode": "affine"}}
    assert resolve(stored(256, 3, 64), section) == Quantization(3, 64)
    packed, scales, _ = mx.quantize(mx.zeros((8, 256)), bits=3, group_size=None)
    assert (packed.shape[1], scales.shape[1]) == (256 * 3 // 32, 256 // 64)
    packed, *_ = mx.quantize(mx.zeros((8, 256)), bits=None, group_size=None)
    assert packed.shape[1] == 256 * 4 // 32


def test_errors_are_checkpoint_errors():
    assert issubclass(UnsupportedModelError, CheckpointError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.0.mlp.gate.weight", "language_model.model.layers.0.mlp.gate.weight"),
        ("language_model.model.layers.0.mlp.gate.weight", "language_model.model.layers.0.mlp.gate.weight"),
        ("model.layers.0.mlp.gate.weight", "language_model.model.layers.0.mlp.gate.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_names_as_mlx_lm_makes_them(name: str, expected: str):
    from mlx_lm.models.qwen3_5 import Model

    class Seam(Model):
        def __init__(self) -> None:
            object.__setattr__(self, "language_model", type("T", (), {"sanitize": staticmethod(lambda w: w)}))

    assert mlx_name(name) == expected
    assert set(Model.sanitize(Seam(), {name: 0})) == {expected}


SKIPPED = {
    "mtp": ("language_model.mtp.layers.0.mlp.gate_proj", {"mode": "mxfp8", "group_size": 32, "bits": 8}),
    "a mode to come": ("vision_tower.blocks.0.attn.qkv", {"mode": "nf4", "group_size": 16, "bits": 4}),
    "sizes to come": ("visual.blocks.0.attn.qkv", {"group_size": 256, "bits": 7}),
    "nonsense": ("visual.blocks.1", {"group_size": "x", "bits": None, "mode": 5}),
}


@pytest.mark.parametrize(("path", "entry"), SKIPPED.values(), ids=SKIPPED)
def test_entries_of_modules_that_are_skipped_may_say_anything(path: str, entry: dict[str, Any]):
    section = {"bits": 4, "group_size": 64, path: entry}
    assert resolve(stored(256, 4, 64), section) == Quantization(4, 64)
    with pytest.raises(CheckpointError):
        resolve(stored(256, 4, 64), {"bits": 4, "group_size": 64, "x": SKIPPED["a mode to come"][1]})


OWN = "language_model.model.layers.0.self_attn.o_proj"
NAMINGS = [OWN, "model.language_model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.o_proj",
           "layers.0.self_attn.o_proj", "language_model.layers.0.self_attn.o_proj"]  # fmt: skip


@pytest.mark.parametrize("key", NAMINGS)
@pytest.mark.parametrize("module", NAMINGS)
def test_entries_under_any_of_the_names_in_use(key: str, module: str):
    """8 bits in groups of 32 and 4 in groups of 64 have the same shapes."""
    section = {"bits": 2, "group_size": 128, key: {"bits": 8, "group_size": 32}}
    settings = QuantizationSettings({"quantization": section})
    paths = (mlx_name(module), module)
    assert settings.resolve(module, paths, stored(256, 8, 32), None, exact=False) == Quantization(8, 32)


@pytest.mark.parametrize("entry", [False, {"bits": 3, "group_size": 32}, {"mode": "nf4", "bits": 4}, {"bits": "x"}])
def test_an_entry_that_mlx_lm_would_not_find_contradicts_nothing(entry: Any):
    """mlx-lm only looks under its own path: tensors take precedence over entries under other paths."""
    tensors, other = stored(256, 4, 64), "model.language_model.layers.0.self_attn.o_proj"
    for key, certain in ((OWN, True), (other, False)):
        settings = QuantizationSettings({"quantization": {"bits": 4, "group_size": 64, key: entry}})
        if certain:
            with pytest.raises(CheckpointError):
                settings.resolve(OWN, (OWN,), tensors, 256, exact=True)
        else:
            assert settings.resolve(OWN, (OWN,), tensors, 256, exact=True) == Quantization(4, 64)


def test_a_known_width_goes_before_an_entry_under_another_name():
    settings = QuantizationSettings(
        {"quantization": {"bits": 2, "group_size": 128, NAMINGS[1]: {"bits": 8, "group_size": 32}}}
    )
    assert settings.resolve(OWN, (OWN,), stored(256, 4, 64), 256, exact=False) == Quantization(4, 64)


OTHER_TOOLS: dict[str, tuple[dict[str, Any], Quantization | None]] = {
    "mxfp4": ({"quant_method": "mxfp4"}, Quantization(4, 32, "mxfp4")),
    "mxfp8": ({"quant_method": "mxfp8"}, Quantization(8, 32, "mxfp8")),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Quantization(4, 16, "nvfp4")),
    "hf_quant_config": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, Quantization(4, 16, "nvfp4"),
    ),
    "compressed-tensors nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, Quantization(4, 16, "nvfp4"),
    ),
    "compressed-tensors int4": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, Quantization(4, 32, "int4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("section", "default"), OTHER_TOOLS.values(), ids=OTHER_TOOLS)
def test_sections_of_other_tools(section: dict[str, Any], default: Quantization | None):
    assert QuantizationSettings({"quantization_config": section}).default == default
    assert QuantizationSettings({"text_config": {"quantization_config": section}}).default == default
    own = {"bits": 8, "group_size": 32}
    assert QuantizationSettings({"quantization": own, "quantization_config": section}).default == Quantization(8, 32)


def test_forms_of_a_mode():
    """A scale per matrix makes it another form of nvfp4; int4 is taken for granted nowhere."""
    nvfp4 = stored(256, 4, 16, mode="nvfp4")
    entry = {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    with_scale = {**nvfp4, "weight_scale_2": Stored("F32", ())}
    for section in (None, entry, {"bits": 4, "group_size": 64, "x": entry}):
        found = resolve(with_scale, section)
        assert found is not None
        assert (found.mode, found.stated) == ("nvfp4 with weight_scale_2", Quantization(4, 16, "nvfp4"))
    with pytest.raises(CorruptError, match="weight_scale_2 F32"):
        resolve({**nvfp4, "weight_scale_2": Stored("F32", (8,))})
    symmetric = {name: part for name, part in stored(256, 4, 32).items() if name != "biases"}
    with pytest.raises(MissingTensorError, match="no biases"):
        resolve(symmetric, {"bits": 4, "group_size": 32})
    assert resolve(symmetric, {"bits": 4, "group_size": 32, "mode": "int4"}) == Quantization(4, 32, "int4")
    blocks = {"weight": Stored("U8", (200, 300)), "weight_scale_inv": Stored("F32", (2, 3))}
    assert resolve(blocks) == Quantization(8, 128, "fp8")
    with pytest.raises(CorruptError, match=r"fp8, 8 bits in groups of 128"):
        resolve({**blocks, "weight_scale_inv": Stored("F32", (2, 2))})
