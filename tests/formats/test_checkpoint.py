"""The location of experts in every layout, and every checkpoint that must be refused, with its message."""

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import safetensors

from flash_moe_mlx.errors import CheckpointError, CorruptError, MissingTensorError, RequestError, UnsupportedModelError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization
from flash_moe_mlx.formats.safetensors_header import DTYPE_BITS, TensorInfo

from ..support.checkpoints import FORMATS, hf_tensors, make_checkpoint, text_config, write_checkpoint, write_raw

STEM = "language_model.model.layers.0.mlp.switch_mlp"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_layouts(tmp_path: Path, format: str, shards: int):
    config = text_config(moe_intermediate_size=32, num_experts=6)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, format, config=config, shards=shards))
    assert checkpoint.format == format
    assert checkpoint.directory == tmp_path
    assert checkpoint.config == json.loads((tmp_path / "config.json").read_text())
    assert checkpoint.moe_layers == (0, 1, 2, 3)
    assert [checkpoint.num_experts(layer) for layer in range(4)] == [6] * 4
    layout = checkpoint.layout(0)
    assert [(part.name, part.dtype, part.shape) for part in layout.parts] == [
        ("gate_proj.weight", "BF16", (32, 64)), ("up_proj.weight", "BF16", (32, 64)),
        ("down_proj.weight", "BF16", (64, 32)),
    ]  # fmt: skip
    assert (layout.hidden_size, layout.intermediate_size) == (64, 32)
    assert all(checkpoint.layout(layer) is layout for layer in range(4))
    assert set(checkpoint.expert_files) <= set(tmp_path.glob("*.safetensors"))
    stored = set(checkpoint.tensors)
    experts = {n for n in stored if ".switch_mlp." in n or ".mlp.experts." in n}
    skipped = {n for n in stored if n.startswith(("model.visual.", "mtp."))}
    assert bool(skipped) == (format == "hf-fused")
    assert set(checkpoint.dense) == stored - experts - skipped
    assert any(n.endswith("shared_expert.gate_proj.weight") for n in checkpoint.dense)


@pytest.mark.parametrize("format", FORMATS)
def test_ranges_hold_the_experts_bytes(tmp_path: Path, format: str):
    """Bytes of all formats are those of the model that was written, and cover the record's parts exactly."""
    config = text_config(moe_intermediate_size=32, num_experts=3)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, format, config=config, shards=2, seed=5))
    model = hf_tensors(config, seed=5)
    for layer in checkpoint.moe_layers:
        gate_up = model[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = model[f"model.layers.{layer}.mlp.experts.down_proj"]
        for expert in range(3):
            expected = {"gate_proj": gate_up[expert, :32], "up_proj": gate_up[expert, 32:], "down_proj": down[expert]}
            record = bytearray(checkpoint.layout(layer).record_bytes)
            covered = 0
            for r in checkpoint.ranges(layer, expert):
                with r.path.open("rb") as file:
                    file.seek(r.file_offset)
                    record[r.record_offset : r.record_offset + r.nbytes] = file.read(r.nbytes)
                covered += r.nbytes
            assert covered == checkpoint.layout(layer).payload_bytes
            for part in checkpoint.layout(layer).parts:
                data = bytes(memoryview(mx.contiguous(expected[part.projection]).view(mx.uint8)))
                assert record[part.offset : part.offset + part.nbytes] == data


def test_neighbours_are_one_range(tmp_path: Path):
    fused = Checkpoint.open(make_checkpoint(tmp_path / "a", "hf-fused"))
    assert [r.nbytes for r in fused.ranges(0, 3)] == [2 * 64 * 64 * 2, 64 * 64 * 2]  # gate and up, down
    odd = text_config(moe_intermediate_size=3)  # gate ends at 384 bytes: the record's next part is padded to 16
    assert len(Checkpoint.open(make_checkpoint(tmp_path / "b", "hf-fused", config=odd)).ranges(0, 3)) == 2
    odd = text_config(moe_intermediate_size=3, hidden_size=36)  # 216 bytes: padding in the record, none in the file
    assert len(Checkpoint.open(make_checkpoint(tmp_path / "c", "hf-fused", config=odd)).ranges(0, 3)) == 3
    assert len(Checkpoint.open(make_checkpoint(tmp_path / "d", bits=4)).ranges(0, 3)) == 9


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.block_sparse_moe.switch_mlp.{}.weight", 0),
        ("model.layers.7.mlp.switch_mlp.{}.weight", 7),
        ("layers.3.feed_forward.switch_mlp.{}.weight", 3),
        ("backbone.layers.2.mixer.switch_mlp.{}.weight", 2),
        ("model.layers.1.mlp.experts.switch_mlp.{}.weight", 1),
        ("model.layers.1.switch_mlp.{}.weight", 1),
    ],
)
def test_other_models_names(tmp_path: Path, name: str, layer: int):
    tensors = {name.format(f"{p}_proj"): mx.zeros((2, 64, 64)) for p in ("gate", "up", "down")}
    tensors |= {"model.layers.0.mlp.gate.weight": mx.zeros((2, 64)), "model.embed_tokens.weight": mx.zeros((8, 64))}
    skipped = ("mtp.fc", "language_model.mtp.layers.0.mlp.experts.gate_up_proj", "vision_tower.layers.0.experts.x")
    tensors |= {name: mx.zeros((2, 64)) for name in skipped}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"model_type": "mixtral", "num_hidden_layers": 8}, tensors))
    assert checkpoint.moe_layers == (layer,)
    assert set(checkpoint.dense) == {"model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"}
    assert checkpoint.num_experts(layer) == 2


def test_quantization_by_either_name(tmp_path: Path):
    mlx = Checkpoint.open(make_checkpoint(tmp_path / "mlx", bits=4, overrides={"o_proj": None, "down_proj": (6, 32)}))
    for module, expected in {
        "language_model.model.layers.0.mlp.gate": Quantization(8, 64),
        "language_model.model.layers.0.mlp.switch_mlp.up_proj": Quantization(4, 64),
        "language_model.model.layers.0.mlp.switch_mlp.down_proj": Quantization(6, 32),
        "language_model.model.layers.3.self_attn.q_proj": Quantization(4, 64),
        "language_model.model.layers.3.self_attn.o_proj": None,
        "language_model.model.layers.3.mlp.shared_expert.down_proj": Quantization(6, 32),
        "language_model.lm_head": Quantization(4, 64),
        "language_model.model.norm": None,
    }.items():
        assert mlx.quantization(module) == expected, module
    with pytest.raises(MissingTensorError, match=r"'language_model\.model\.layers\.0\.mlp\.nothing\.weight'"):
        mlx.quantization("language_model.model.layers.0.mlp.nothing")
    for format in ("hf-fused", "hf-per-expert"):
        hf = Checkpoint.open(make_checkpoint(tmp_path / format, format))
        for module in ("model.layers.0.mlp.gate", "model.layers.3.mlp.switch_mlp.up_proj", "lm_head"):
            assert hf.quantization(f"language_model.{module}") is None  # as mlx-lm names it
    assert hf.quantization("model.layers.0.mlp.experts.0.gate_proj") is None  # as it is stored
    assert hf.quantization("model.layers.0.mlp.gate") is None


def test_requests_that_make_no_sense(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    with pytest.raises(RequestError, match=r"layer must have routed experts, got 4\. Ask for one of \(0, 1, 2, 3\)"):
        checkpoint.layout(4)
    for expert in (-1, 8):
        with pytest.raises(RequestError, match=f"experts 0 to 7, got {expert}"):
            checkpoint.ranges(0, expert)


def test_opening_reads_no_data(tmp_path: Path):
    """A layer of 512 experts of 397B's size, 7 GiB in a sparse file, opens at once."""
    shapes = {"gate_proj": (512, 1024, 4096), "up_proj": (512, 1024, 4096), "down_proj": (512, 4096, 1024)}
    header, end = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * shape[1] * shape[2]
        header[f"{STEM}.{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    path = write_raw(tmp_path / "model.safetensors", header)
    try:
        os.truncate(path, path.stat().st_size + end)
    except OSError as error:
        pytest.skip(f"the file system has no such sparse files: {error}")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_moe", "num_hidden_layers": 1}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layout(0).record_bytes == 3 * 2 * 1024 * 4096
    assert checkpoint.ranges(0, 511)[-1].file_offset > 2**32


def test_a_long_name_costs_no_more_than_its_length():
    name = "layers.0." * 1_000_000 + "switch_mlp"
    info = TensorInfo(name, Path("model.safetensors"), "F32", (), 0, 4)
    with pytest.raises(UnsupportedModelError):
        Checkpoint(Path("x"), {}, {name: info})


# --- what is refused ---


def write_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    for key, value in changes.items():
        target = text if key in text else config
        target[key] = value
    path.write_text(json.dumps(config))


def rewrite(directory: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = mx.load(str(path))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(path), {name: mx.contiguous(value) for name, value in tensors.items()}, {"format": "mlx"})


def refused(directory: Path, kind: type[CheckpointError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        Checkpoint.open(directory)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith("[")
    assert ", got " in text
    assert text.endswith(".")
    assert len(text) < 600


def test_not_a_checkpoint(tmp_path: Path):
    refused(tmp_path / "nothing", CheckpointError, "got no such path. Check the path")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", CheckpointError, "got a file")
    refused(Path("a\0b"), CheckpointError, "must be a checkpoint's directory")
    refused(tmp_path, MissingTensorError, r"\[config.json\] must be in .*, got no such file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, MissingTensorError, "must hold .safetensors files, got none")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "valid JSON"),
        ("{", "valid JSON"),
        ("[]", "JSON object"),
        ('"text"', "JSON object"),
        ("{" + '"a":{' * 50_000, "nested too deeply"),
        ('{"num_experts": ' + "9" * 10_000 + "}", "valid JSON"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_broken_config(tmp_path: Path, config: str, message: str):
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(config)
    refused(tmp_path, CorruptError, message)


def test_config_is_not_readable(tmp_path: Path):
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, CheckpointError, "must be a file")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], type[CheckpointError], str]] = {
    "fewer experts": ({"num_experts": 4}, CorruptError, "the 4 experts of config.json, got 8"),
    "experts as text": ({"num_experts": "8"}, CorruptError, "num_experts must be an integer from 0 to .*, got '8'"),
    "experts a bool": ({"num_experts": True}, CorruptError, "num_experts must be an integer"),
    "another hidden size": ({"hidden_size": 128}, CorruptError, "hidden_size 128, got 64"),
    "another expert width": ({"moe_intermediate_size": 128}, CorruptError, "moe_intermediate_size 128, got 64"),
    "more layers": ({"num_hidden_layers": 6}, MissingTensorError, "all 6 layers .* layer 4 has none"),
    "absurdly more layers": ({"num_hidden_layers": 10**9}, MissingTensorError, "layer 4 has none"),
    "fewer layers": ({"num_hidden_layers": 3}, CorruptError, "got 3 and experts in layer 3"),
    "hqq": (
        {"quantization_config": {"quant_method": "hqq", "bits": 4, "group_size": 64}}, UnsupportedModelError, "'hqq'",
    ),
    "bitnet": ({"quantization_config": {"quant_method": "bitnet"}}, UnsupportedModelError, "'bitnet'"),
    "unknown mode": ({"quantization": {"mode": "nf4", "bits": 4, "group_size": 64}}, UnsupportedModelError, "'nf4'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_config_contradicts_tensors(
    tmp_path: Path, format: str, changes: dict[str, Any], kind: type[CheckpointError], message: str
):
    write_config(make_checkpoint(tmp_path, format), **changes)
    refused(tmp_path, kind, message)


def test_more_experts_in_config_than_files(tmp_path: Path):
    write_config(make_checkpoint(tmp_path / "mlx"), num_experts=9)
    refused(tmp_path / "mlx", CorruptError, "the 9 experts of config.json, got 8")
    write_config(make_checkpoint(tmp_path / "hf", "hf-per-expert"), num_experts=9)
    refused(tmp_path / "hf", MissingTensorError, r"'model\.layers\.0\.mlp\.experts\.8\.gate_proj\.weight'")
    write_config(tmp_path / "hf", num_experts=10**9)
    refused(tmp_path / "hf", MissingTensorError, r"experts\.8\.gate_proj\.weight'.* more")


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_missing_expert_tensor(tmp_path: Path, part: str):
    make_checkpoint(tmp_path, bits=4)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{STEM}.up_proj.{part}"))
    refused(tmp_path, MissingTensorError, rf"layer 0.*({part})")


def test_missing_layer_or_expert(tmp_path: Path):
    make_checkpoint(tmp_path / "mlx")

    def drop_layer(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if ".layers.1.mlp.switch_mlp." in name]:
            del tensors[name]

    rewrite(tmp_path / "mlx", drop_layer)
    refused(tmp_path / "mlx", MissingTensorError, "all 4 layers must have routed experts.*layer 1 has none")
    make_checkpoint(tmp_path / "hf", "hf-per-expert")
    rewrite(tmp_path / "hf", lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    refused(tmp_path / "hf", MissingTensorError, r"layer 2.*none named 'model\.layers\.2\.mlp\.experts\.5\.up_proj")
    make_checkpoint(tmp_path / "fused", "hf-fused")
    rewrite(tmp_path / "fused", lambda t: t.pop("model.language_model.layers.2.mlp.experts.down_proj"))
    refused(tmp_path / "fused", MissingTensorError, r"layer 2.*layers\.2\.mlp\.experts\.down_proj'")


WRONG_TENSORS: dict[str, tuple[str, Callable[[mx.array], mx.array], str]] = {
    "fewer experts in one": ("up_proj.weight", lambda t: t[:7], "must hold 8 experts"),
    "gate wider than up": ("gate_proj.weight", lambda t: mx.concatenate([t, t], 1), "same outputs"),
    "down narrower": ("down_proj.weight", lambda t: t[:, :, :32], "down_proj must have 64 inputs"),
    "two dimensions": ("up_proj.weight", lambda t: t[0], "3 dimensions"),
    "no experts": ("up_proj.weight", lambda t: t[:0], "3 dimensions of at least 1"),
}


@pytest.mark.parametrize(("part", "change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_shapes_that_do_not_fit(tmp_path: Path, part: str, change: Callable[[mx.array], mx.array], message: str):
    make_checkpoint(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{STEM}.{part}": change(tensors[f"{STEM}.{part}"])}))
    refused(tmp_path, CorruptError, message)


def test_fused_shapes_that_do_not_fit(tmp_path: Path):
    """Both matrices transposed, as Llama 4 has them, fit."""
    make_checkpoint(tmp_path, "hf-fused", config=text_config(moe_intermediate_size=48))
    names = [
        f"model.language_model.layers.{i}.mlp.experts.{p}" for i in range(4) for p in ("gate_up_proj", "down_proj")
    ]
    rewrite(tmp_path, lambda tensors: tensors.update({n: tensors[n].swapaxes(1, 2) for n in names}))
    layout = Checkpoint.open(tmp_path).layout(0)
    assert [part.shape for part in layout.parts] == [(48, 64), (48, 64), (64, 48)]
    assert [part.strides for part in layout.parts] == [(1, 96), (1, 96), (1, 64)]
    assert layout.payload_bytes == 3 * 48 * 64 * 2
    rewrite(tmp_path, lambda tensors: tensors.update({names[0]: tensors[names[0]].swapaxes(1, 2)}))
    refused(tmp_path, CorruptError, "or both transposed")
    odd = {
        "layers.0.mlp.experts.gate_up_proj": mx.zeros((2, 7, 8)),
        "layers.0.mlp.experts.down_proj": mx.zeros((2, 8, 3)),
    }
    write_checkpoint(tmp_path / "odd", {"model_type": "x"}, odd)
    refused(tmp_path / "odd", CorruptError, r"gate_up_proj \[E, 2I, H\]")


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F4", "F8_E5M2FNUZ"])
def test_fused_experts_of_dtypes_that_nobody_reads(dtype: str):
    shapes = {"gate_up_proj": (2, 128, 64), "down_proj": (2, 64, 64)}
    names = {f"layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
    infos = {
        name: TensorInfo(name, Path("x"), dtype, shape, 0, prod(shape) * DTYPE_BITS[dtype] // 8)
        for name, shape in names.items()
    }
    with pytest.raises(UnsupportedModelError, match=f"got {dtype}"):
        Checkpoint(Path("x"), {}, infos)


def test_experts_that_differ(tmp_path: Path):
    make_checkpoint(tmp_path, "hf-per-expert")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(mx.float32)}))
    refused(tmp_path, CorruptError, r"experts must be alike.*experts\.3\.up_proj\.weight' F32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.experts.0.gate_proj.absmax", "absmax"),
        ("model.layers.0.mlp.experts.0.gate_proj.weight_zero_point", "weight_zero_point"),
        ("model.layers.0.mlp.experts.gate_up_proj_zeros", "gate_up_proj_zeros"),
        ("model.layers.0.block_sparse_moe.experts.0.w4.weight", "w4.weight"),
        ("model.layers.0.mlp.switch_mlp.fc3.weight", "fc3"),
        ("model.layers.0.mlp.switch_mlp.gate_proj.qzeros", "qzeros"),
        ("model.layers.0.mlp.experts.00.gate_proj.weight", "experts.00"),
    ],
)
def test_experts_of_unknown_kinds(tmp_path: Path, name: str, message: str):
    write_checkpoint(tmp_path, {"model_type": "qwen3_5_moe"}, {name: mx.zeros((2, 64, 64))})
    refused(tmp_path, UnsupportedModelError, message)


def test_models_without_experts_or_with_too_many_sets(tmp_path: Path):
    write_checkpoint(tmp_path / "a", {"model_type": "llama"}, {"model.layers.0.mlp.gate_proj.weight": mx.zeros((4, 4))})
    refused(tmp_path / "a", UnsupportedModelError, r"no routed experts \(model_type 'llama'\)\. Models without")
    experts = {f"layers.0.mlp.switch_mlp.{p}_proj.weight": mx.zeros((2, 64, 64)) for p in ("gate", "up", "down")}
    twice = {f"{side}.{name}": value for side in ("encoder", "decoder") for name, value in experts.items()}
    write_checkpoint(tmp_path / "b", {"model_type": "x"}, twice)
    refused(tmp_path / "b", CorruptError, "layer 0 must have one set of experts")
    mixed = experts | {"layers.1.mlp.experts.gate_up_proj": mx.zeros((2, 128, 64))}
    write_checkpoint(tmp_path / "c", {"model_type": "x"}, mixed)
    refused(tmp_path / "c", UnsupportedModelError, "must store all experts one way")


def test_dtypes_of_experts(tmp_path: Path):
    for dtype, name in ((mx.float16, "F16"), (mx.float32, "F32"), (mx.bfloat16, "BF16")):
        checkpoint = Checkpoint.open(make_checkpoint(tmp_path / name, "hf-fused", dtype=dtype))
        assert {part.dtype for part in checkpoint.layout(0).parts} == {name}
    make_checkpoint(tmp_path / "u8")
    rewrite(tmp_path / "u8", lambda t: t.update({f"{STEM}.up_proj.weight": mx.zeros((8, 64, 64), mx.uint8)}))
    refused(tmp_path / "u8", UnsupportedModelError, "must be F16, BF16, F32 or quantised, got U8")
    make_checkpoint(tmp_path / "u32", bits=4)

    def drop(tensors: dict[str, mx.array]) -> None:
        del tensors[f"{STEM}.up_proj.scales"], tensors[f"{STEM}.up_proj.biases"]

    rewrite(tmp_path / "u32", drop)
    refused(tmp_path / "u32", MissingTensorError, r"layer 0 up_proj\] must have scales to")


def test_expert_bias(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, bits=4, expert_bias=True))
    names = [part.name for part in checkpoint.layout(0).parts]
    assert names[:4] == ["gate_proj.weight", "gate_proj.scales", "gate_proj.biases", "gate_proj.bias"]
    assert checkpoint.layout(0).by_name["down_proj.bias"].shape == (64,)
    rewrite(tmp_path, lambda t: t.update({f"{STEM}.up_proj.bias": mx.zeros((8, 63))}))
    refused(tmp_path, CorruptError, "up_proj.bias must be a float for each of 64 outputs")


def test_layers_may_differ(tmp_path: Path):
    checkpoint = Checkpoint.open(
        make_checkpoint(tmp_path, bits=4, overrides={"layers.2.mlp.switch_mlp.down_proj": (8, 64)})
    )
    assert checkpoint.layout(2).quantization("down_proj") == Quantization(8, 64)
    assert checkpoint.layout(1).quantization("down_proj") == Quantization(4, 64)
    assert checkpoint.layout(2).record_bytes > checkpoint.layout(1).record_bytes


def test_damaged_shards(tmp_path: Path):
    make_checkpoint(tmp_path, bits=4, shards=3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-100])
    refused(tmp_path, CorruptError, r"\[model-00002-of-00003\.safetensors\] .* truncated by 100 bytes\. Download")
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(tmp_path, CorruptError, "git lfs pull")
    second.unlink()
    refused(tmp_path, MissingTensorError, r"none named 'model-00002-of-00003\.safetensors'\. Download the missing")


def test_agrees_with_safetensors_on_all_tensors(tmp_path: Path):
    make_checkpoint(tmp_path, bits=4)
    theirs = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    ours = Checkpoint.open(tmp_path).tensors
    assert {n: (i.dtype, list(i.shape)) for n, i in ours.items()} == {
        n: (t["dtype"], t["shape"]) for n, t in theirs.items()
    }
