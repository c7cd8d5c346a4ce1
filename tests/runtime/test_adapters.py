"""LoRA adapters of mlx_lm's on models whose experts are streamed, against mlx-lm's resident model with the same one."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from flash_moe_mlx import (
    CheckpointError,
    FlashMoEError,
    MemoryLimitError,
    PrefixCache,
    RequestError,
    UnsupportedModelError,
    load_model,
)
from flash_moe_mlx.runtime import loading

from ..support.command_line import invoke
from ..support.models import forget_peak, greedy, load_resident, make_converted, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.switch_configs import make_config
from ..support.switch_models import MAX_CONTEXT, write_model

RANK = 4
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def dense_keys(model: Any) -> set[str]:
    """Names within a layer of every linear module but the experts'."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    named = [item for layer in model.layers for item in layer.named_modules()]
    return {name for name, module in named if isinstance(module, kinds)}


def write_adapter(resident: Any, path: Path, keys: set[str], **config: Any) -> Path:
    """An adapter with random weights, as mlx_lm's trainer saves one."""
    parameters = {"rank": RANK, "scale": 8.0, "dropout": 0.1, "keys": sorted(keys)}
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, **config}
    linear_to_lora_layers(
        resident, settings["num_layers"], settings["lora_parameters"], settings["fine_tune_type"] == "dora"
    )
    parts = {name: value for name, value in tree_flatten(resident.parameters())
             if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")}  # fmt: skip
    key = mx.random.key(7)
    for name in sorted(parts):
        key, own = mx.random.split(key)
        if not name.endswith(".m"):
            parts[name] = 0.05 * mx.random.normal(parts[name].shape, key=own)
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), parts)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def qwen3_5(path: Path) -> Path:
    return make_converted(path, bits=4)


def qwen3_moe(path: Path) -> Path:
    return write_model(path, make_config("qwen3_moe"), "4-bit g64")


MODELS: dict[str, Callable[[Path], Path]] = {"own": qwen3_5, "mlx-lm's": qwen3_moe}


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A checkpoint, an adapter of all its dense modules, and mlx-lm's model with both."""
    folder = tmp_path_factory.mktemp("adapted")
    directory = MODELS[request.param](folder)
    model = load_resident(directory)
    adapter = write_adapter(model, folder / "adapter", dense_keys(model))
    resident = load_adapters(load_resident(directory), str(adapter))
    resident.eval()
    return directory, adapter, resident


def test_logits_and_tokens_are_mlx_lms(trained: tuple[Path, Path, Any]):
    directory, adapter, resident = trained
    expected = resident(mx.array(IDS))
    with streamed(directory, max_context=MAX_CONTEXT) as plain:
        dense = plain.streaming.stats().dense_bytes
        without = plain(mx.array(IDS))
    limit = smallest_limit(directory, adapter_path=adapter, max_context=MAX_CONTEXT)
    assert limit > smallest_limit(directory, max_context=MAX_CONTEXT)
    with streamed(directory, limit, adapter_path=adapter, max_context=MAX_CONTEXT) as model:
        forget_peak()
        assert_close("logits", expected, model(mx.array(IDS)), RELATIVE_RMS["mlx-lm"])
        assert greedy(model, IDS[0], 24)[0] == greedy(resident, IDS[0], 24)[0]
        stats = model.streaming.stats()
        held = sum(value.nbytes for value in mx.load(str(adapter / "adapters.safetensors")).values())
        assert stats.dense_bytes - dense == held and stats.peak_memory_bytes <= limit and stats.misses > 0
    with pytest.raises(AssertionError, match="relative RMS"):  # the adapter changes something
        assert_close("logits", without, expected, 100 * RELATIVE_RMS["mlx-lm"])


def test_no_kernel_is_compiled_around_modules_without_the_adapter(
    trained: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch
):
    """A GPU's warm-up builds the steps of some layers, which would keep the modules that they were built of."""
    directory, adapter, resident = trained
    monkeypatch.setattr(loading, "use_kernels", lambda: True)
    monkeypatch.setattr(loading, "KernelWarmUp", None)
    with streamed(directory, adapter_path=adapter, max_context=MAX_CONTEXT) as model:
        assert_close("logits", resident(mx.array(IDS)), model(mx.array(IDS)), RELATIVE_RMS["mlx-lm"])


def test_states_in_a_directory_are_the_adapters_own(trained: tuple[Path, Path, Any], tmp_path: Path):
    directory, adapter, _ = trained
    names = set()
    for path in (adapter, None):
        with streamed(directory, adapter_path=path, max_context=MAX_CONTEXT) as model:
            cache = PrefixCache(model, "1MB", tmp_path)
            names |= {str(cache._files._fingerprint)}
            cache.close()
    assert len(names) == 2


def test_dora(tmp_path: Path):
    directory = qwen3_moe(tmp_path)
    adapter = write_adapter(load_resident(directory), tmp_path / "adapter", {"self_attn.q_proj"}, fine_tune_type="dora")
    resident = load_adapters(load_resident(directory), str(adapter))
    resident.eval()
    with streamed(directory, adapter_path=adapter, max_context=MAX_CONTEXT) as model:
        assert_close("logits", resident(mx.array(IDS)), model(mx.array(IDS)), RELATIVE_RMS["mlx-lm"])
    with pytest.raises(UnsupportedModelError, match="must fit the model"):
        load_model(qwen3_5(tmp_path / "own"), adapter_path=adapter)


def test_an_adapter_of_experts_is_refused(tmp_path: Path):
    directory = qwen3_moe(tmp_path)
    model = load_resident(directory)
    adapter = write_adapter(model, tmp_path / "adapter", {"mlp.switch_mlp.up_proj", "self_attn.q_proj"})
    with pytest.raises(
        UnsupportedModelError, match=r"\[adapter_path\] must change dense modules alone, got .*switch_mlp"
    ):
        load_model(directory, adapter_path=adapter)


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("attention")
    directory = qwen3_moe(folder)
    return directory, write_adapter(load_resident(directory), folder / "adapter", {"self_attn.q_proj"})


def damaged(adapter: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with other settings, or without its last weights."""
    target.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["lora_parameters"] |= changes.pop("parameters", {})
    weights = dict(sorted(mx.load(str(adapter / "adapters.safetensors")).items()))
    if changes.pop("fewer", False):
        weights.popitem()
    mx.save_safetensors(str(target / "adapters.safetensors"), weights)
    (target / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full'"),
        ({"parameters": {"rank": 3}}, "must fit the model"),
        ({"parameters": {"keys": ["self_attn.k_proj"]}}, "must fit the model"),
        ({"parameters": {"keys": ["self_attn.q_proj", "self_attn.k_proj"]}}, "every module"),
        ({"lora_parameters": {}}, "must fit the model"),
        ({"fewer": True}, "every module"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_adapter_is_told(attention: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], told: str):
    directory, adapter = attention
    with pytest.raises(UnsupportedModelError, match=re.escape(told)):
        load_model(directory, adapter_path=damaged(adapter, tmp_path / "other", **changes))


def test_files_that_are_none_are_told(attention: tuple[Path, Path], tmp_path: Path):
    directory, adapter = attention
    with pytest.raises(CheckpointError, match=r"\[adapter_path\] must hold adapter_config"):
        load_model(directory, adapter_path=tmp_path)
    broken = damaged(adapter, tmp_path / "broken")
    (broken / "adapters.safetensors").write_bytes(b"no weights")
    with pytest.raises(FlashMoEError, match="must fit the model"):
        load_model(directory, adapter_path=broken)
    with pytest.raises(RequestError, match="activation_bits"):
        load_model(directory, adapter_path=adapter, activation_bits=8)
    with pytest.raises(MemoryLimitError):
        load_model(directory, adapter_path=adapter, memory_limit=1)


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_commands_take_one(command: str, tmp_path: Path):
    options = {"generate": ["Hello"], "chat": [], "serve": ["--port", "0"]}[command]
    done = invoke(command, *options, "--adapter-path", str(tmp_path))
    assert done.exit_code == 2 and "must hold adapter_config.json" in done.stderr
