"""Loading mlx-lm's SwitchGLU models: what is read, K by its several names, the hub's layouts, what is refused."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from flash_moe_mlx.errors import CorruptError, FlashMoEError, MissingTensorError, RequestError, UnsupportedModelError
from flash_moe_mlx.runtime.loading import load_model

from ..support.models import load_resident, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.switch_configs import VOCABULARY, make_config
from ..support.switch_models import MAX_CONTEXT, quarter_limit, write_model

CHILD = Path(__file__).parents[1] / "support" / "memory_child.py"
DEMO = Path(__file__).parents[2] / "src" / "flash_moe_mlx" / "demo"
TOLERANCE = RELATIVE_RMS["mlx-lm"]
Tensors = dict[str, mx.array]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own operations, where the wiring is what is tested: kernels would be compiled for every shape."""
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")


K_NAMES: dict[str, str] = {
    "qwen3_moe": "num_experts_per_tok",
    "ernie4_5_moe": "moe_k",
    "gemma4_text": "top_k_experts",
    "hunyuan": "moe_topk",
    "kimi_k3": "num_experts_per_token",
    "qwen3_vl_moe": "num_experts_per_tok",
    "step3p5": "moe_top_k",
}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("model_type", K_NAMES)
def test_fewer_experts_a_token(model_type: str, tmp_path: Path):
    """Equal to mlx-lm's model configured so; named as lossy."""
    config = make_config(model_type)
    directory = write_model(tmp_path / "model", config)
    fewer = copy.deepcopy(config)
    fewer.get("text_config", fewer)[K_NAMES[model_type]] = 2
    resident = load_resident(write_model(tmp_path / "fewer", fewer))
    ids = mx.array(np.random.default_rng(7).integers(0, VOCABULARY, (1, 12)))
    with streamed(directory, max_context=MAX_CONTEXT, num_experts_per_tok=2) as model:
        assert_close("2 experts per token", resident(ids), model(ids), TOLERANCE)
        assert model.streaming.stats().lossy == ("num_experts_per_tok=2 where the model was trained with 4",)
    with streamed(directory, max_context=MAX_CONTEXT, num_experts_per_tok=4) as model:
        assert model.streaming.stats().lossy == ()


@pytest.mark.parametrize(
    ("model_type", "k", "message"),
    [
        ("qwen3_moe", 17, "at most 16"),
        ("llama4", 2, "can't be changed for llama4, got 2"),
        ("mixtral", 1, "can't be changed for mixtral, got 1"),
    ],
)
def test_k_that_cannot_be_had(model_type: str, k: int, message: str, tmp_path: Path):
    """More than there are; more than mlx-lm's model does; a config that leaves K to the model's default."""
    config = make_config(model_type)
    if model_type == "mixtral":
        del config["num_experts_per_tok"]
    directory = write_model(tmp_path, config)
    with pytest.raises(RequestError, match=message):
        load_model(directory, memory_limit="1GB", num_experts_per_tok=k)


def read_bytes() -> int:
    """Bytes that this process has asked files for (Linux)."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text()).group(1))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc (Linux)")
@pytest.mark.parametrize("conversion", ["unquantised", "4-bit g64"])
def test_load_reads_no_expert(conversion: str, tmp_path: Path):
    """Neither from the files nor into memory, in a checkpoint of which experts are nearly all."""
    config = make_config("qwen3_moe", num_experts=64, moe_intermediate_size=512, mlp_only_layers=[])
    directory = write_model(tmp_path, config, conversion)
    size = sum(file.stat().st_size for file in directory.iterdir())
    limit = smallest_limit(directory, max_context=MAX_CONTEXT)  # imports, caches of modules: not counted
    before = read_bytes()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    model: Any = load_model(directory, memory_limit=limit, max_context=MAX_CONTEXT)
    read, peak = read_bytes() - before, mx.get_peak_memory() - held
    with model.streaming:
        stats = model.streaming.stats()
        experts = 3 * 64 * model.streaming.debug_state().demand.layouts[0].record_bytes
        assert experts > 0.9 * size
        assert read < 1.1 * (size - experts) + 200_000, "headers are read twice, and in blocks"
        assert peak <= stats.dense_bytes + stats.slot_bytes + 2_000_000
        assert stats.slot_bytes < experts / 10
        model(mx.array([[1, 2, 3]]))
        assert read_bytes() - before - read >= model.streaming.stats().bytes_read > 0


def per_expert(directory: Path) -> Path:
    """Take stacked experts apart, as the hub's original checkpoints store them; some lose their order in a file."""
    tensors: Tensors = {}
    for name, value in mx.load(str(directory / "model.safetensors")).items():
        stem, is_expert, projection = name.partition(".switch_mlp.")
        if is_expert:
            tensors |= {f"{stem}.experts.{i}.{projection}": part for i, part in enumerate(value)}
        else:
            tensors[name] = value
    mx.save_safetensors(str(directory / "model.safetensors"), dict(reversed(tensors.items())))
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    return directory


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2"])
def test_one_tensor_an_expert(model_type: str, tmp_path: Path):
    directory = per_expert(write_model(tmp_path, make_config(model_type)))
    ids = mx.array(np.random.default_rng(8).integers(0, VOCABULARY, (2, 40)))
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        assert_close("2 x 40 tokens", load_resident(directory)(ids), model(ids), TOLERANCE)


def test_layers_behind_the_models_own_are_skipped(tmp_path: Path):
    """GLM's multi-token-prediction layer, with experts of its own."""
    directory = write_model(tmp_path, make_config("glm4_moe", num_nextn_predict_layers=1))
    tensors = mx.load(str(directory / "model.safetensors"))
    tensors |= {n.replace("layers.2.", "layers.3."): mx.zeros_like(v) for n, v in tensors.items() if "layers.2." in n}
    mx.save_safetensors(str(directory / "model.safetensors"), {**tensors, "model.layers.3.eh_proj.weight": mx.ones(3)})
    (directory / "model.safetensors.index.json").unlink()
    per_expert(directory)
    ids = mx.array([[1, 2, 3, 4]])
    with streamed(directory, max_context=MAX_CONTEXT) as model:
        assert_close("4 tokens", load_resident(directory)(ids), model(ids), TOLERANCE)


def change(directory: Path, config: dict[str, Any] | None = None, tensors: Any = None) -> None:
    """Change what is stored: entries of config.json (None removes one), tensors by a function."""
    path = directory / "config.json"
    stored = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))
    if tensors is not None:
        mx.save_safetensors(
            str(directory / "model.safetensors"), tensors(mx.load(str(directory / "model.safetensors")))
        )
        (directory / "model.safetensors.index.json").unlink(missing_ok=True)


def without(word: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if word not in name}


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def without_gates(tensors: Tensors) -> Tensors:
    names = {"up_proj": "fc1", "down_proj": "fc2"}
    return {
        ".".join(names.get(word, word) for word in name.split(".")): value
        for name, value in without("gate_proj")(tensors).items()
    }


NF4 = {"quantization": {"group_size": 64, "bits": 4, "mode": "nf4"}}
HQQ = {"quantization_config": {"quant_method": "hqq", "bits": 4, "group_size": 128}}
REFUSALS: dict[str, tuple[str, dict[str, Any], Any, type[FlashMoEError], str]] = {
    "dense": (
        "mixtral",
        {"num_local_experts": None},
        without("switch_mlp"),
        UnsupportedModelError,
        "no routed experts",
    ),
    "unknown type": ("mixtral", {"model_type": "gpt6"}, None, UnsupportedModelError, "mlx-lm knows, got 'gpt6'"),
    "no type": ("mixtral", {"model_type": None}, None, UnsupportedModelError, "mlx-lm knows, got None"),
    "key missing": ("qwen3_moe", {"num_attention_heads": None}, None, CorruptError, "must describe a qwen3_moe"),
    "no gate": ("mixtral", {}, without("gate_proj"), MissingTensorError, r"named .*switch_mlp\.gate_proj"),
    "fc1 and up_proj": ("mixtral", {}, renamed("gate_proj", "fc1"), CorruptError, "must have one set of experts"),
    "fc1 for SwitchGLU": ("mixtral", {}, without_gates, MissingTensorError, "must have a gate projection"),
    "unknown mode": ("gpt_oss", NF4, None, UnsupportedModelError, "int4 or fp8, got .nf4."),
    "hqq": ("gpt_oss", HQQ, None, UnsupportedModelError, "got method 'hqq'"),
    "other layers": ("qwen3_moe", {"mlp_only_layers": []}, None, UnsupportedModelError, r"in the layers \[0, 2\]"),
    "tensor missing": (
        "olmoe",
        {},
        without("layers.1.self_attn.q_proj"),
        MissingTensorError,
        "must have model.layers.1",
    ),
    "tensor unknown": ("olmoe", {}, renamed("lm_head", "head"), FlashMoEError, "lm_head|head"),
    "other width": ("olmoe", {"vocab_size": 130}, None, CorruptError, r"must have shape \(130, 128\)"),
    "w1 and switch_mlp": (
        "mixtral",
        {},
        renamed("switch_mlp.gate_proj", "experts.0.w1"),
        UnsupportedModelError,
        "all experts one way.*w1",
    ),
    "fewer layers than stored": ("olmoe", {"num_hidden_layers": 2}, None, CorruptError, "cover every layer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_says_why_it_is_refused(case: str, tmp_path: Path):
    model_type, config, tensors, error, message = REFUSALS[case]
    directory = write_model(tmp_path, make_config(model_type))
    change(directory, config, tensors)
    with pytest.raises(error, match=message) as raised:
        load_model(directory, memory_limit="1GB", max_context=MAX_CONTEXT)
    assert str(raised.value).rstrip().endswith((".", "'"))


def test_a_switch_glu_with_parts_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Like muse_spark's, which has a norm there: its own forward pass would be lost."""
    directory = write_model(tmp_path, make_config("olmoe"))

    class Normed(SwitchGLU):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            return 2 * super().__call__(x, indices)

    monkeypatch.setattr("mlx_lm.models.olmoe.SwitchGLU", Normed)
    with pytest.raises(UnsupportedModelError, match="must be a plain SwitchGLU"):
        load_model(directory, memory_limit="1GB", max_context=MAX_CONTEXT)


WIDE = {
    "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 4096, "num_experts_per_tok": 8,
}  # fmt: skip
LARGER: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**WIDE, "num_experts": 64, "moe_intermediate_size": 256, "mlp_only_layers": []},
    "deepseek_v3": {**WIDE, "n_routed_experts": 64, "moe_intermediate_size": 256, "first_k_dense_replace": 0},
    "gpt_oss": {**WIDE, "num_local_experts": 64, "intermediate_size": 256,
                "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LARGER)
def test_limit_holds(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MLX's own peak through load, a prefill of 512 tokens and 16 of decode, in a process of its own."""
    # Plain MLX operations, there and where the limit is asked for: all they allocate is in MLX's peak.
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")
    directory = write_model(tmp_path, make_config(model_type, **LARGER[model_type]), "4-bit g64")
    smallest = smallest_limit(directory, max_context=1024)
    slots = []
    for limit in (smallest, 2 * smallest):
        command = [sys.executable, str(CHILD), str(directory), str(DEMO), str(limit), "auto", "512", "16", "1024"]
        done = subprocess.run(command, input="\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["load_peak_bytes"] <= report["peak_bytes"] <= report["limit_bytes"] <= limit
        assert report["tokens"] == 16
        slots.append(report["slots"])
    assert slots[0] < slots[1] == report["experts"]
