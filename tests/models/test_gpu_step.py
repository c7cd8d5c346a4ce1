"""A model's single tokens by the GPU's kernels, which run on the CPU through OpenCL: the modules' own results."""

from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_moe_mlx.errors import NonFiniteError, RequestError
from flash_moe_mlx.experts import reader
from flash_moe_mlx.experts.cache import ExpertCache
from flash_moe_mlx.experts.executor import OtherRanks
from flash_moe_mlx.experts.local import LocalExperts
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.models import checks, gpu_step, gpu_token
from flash_moe_mlx.models.config import ModelConfig
from flash_moe_mlx.models.qwen3_next import FusedGatedDeltaNet
from flash_moe_mlx.ops.gated_delta_step import split_columns
from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.ops.gpu.cuda_slots import MappedMemory
from flash_moe_mlx.packing import pack
from flash_moe_mlx.runtime import loading

from ..kernels import opencl
from ..support.checkpoints import make_checkpoint, text_config
from ..support.fake_cuda import FakeRuntime
from ..support.models import VOCABULARY, chat_config, make_converted, smallest_limit, streamed

pytestmark = pytest.mark.skipif(opencl.opencl() is None, reason="needs the OpenCL CPU runtime of the dev extra")

PROMPT, TOKENS = [5, 9, 200, 31], [7, 301, 12]
DELTA = ["norm_matvec", "gated_delta_conv_step", "matvec_residual"]
ATTENTION = ["norm_matvec", "qk_norm_rope", "matvec_residual"]
MOE = ["norm_matvec", "router_topk", "expert_gate_up", "expert_down_combine"]


def router_in_eight_bits(path: str, module: Any) -> bool | dict[str, int]:
    """Quantise router and shared expert's gate in 8 bits, as mlx-lm's conversions do."""
    if path.endswith(("mlp.gate", "shared_expert_gate")):
        return {"group_size": 64, "bits": 8}
    return hasattr(module, "to_quantized")


def test_a_mixer_without_a_step_runs_as_a_module():
    mixer = nn.Linear(4, 4)
    assert gpu_step.mixer_step(mixer) is None
    assert gpu_step.mixer_step(mixer) is None  # also when asked again


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("gpu"), bits=4, predicate=router_in_eight_bits)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that there is a Metal GPU, whose kernels OpenCL runs; returns the names of those that were launched."""
    names: list[str] = []

    def launch(kernel: Any, *arguments: Any) -> list[mx.array]:
        names.append(kernel.name)
        return opencl.launch(kernel, *arguments)

    monkeypatch.setattr(kernel_source, "launch", launch)
    monkeypatch.setattr(gpu_token, "compile_layers", lambda function: function)  # OpenCL computes as it is called
    # The package has a function of the module's name.
    monkeypatch.setattr(import_module("flash_moe_mlx.ops.backend"), "backend", lambda: "metal")
    return names


def logits(model: Any, launched: list[str] | None = None) -> np.ndarray:
    """Of single tokens after a prompt; ``launched`` is emptied between."""
    cache = model.make_cache()
    mx.eval(model(mx.array([PROMPT]), cache=cache))
    if launched is not None:
        launched.clear()
    return np.concatenate([np.array(model(mx.array([[token]]), cache=cache))[0] for token in TOKENS])


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((result - expected) ** 2).sum() / (expected**2).sum()))


def test_single_tokens_are_the_modules(checkpoint: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch):
    with streamed(checkpoint) as model:
        result = logits(model, launched)
        layers = 3 * (DELTA + MOE) + ATTENTION + MOE
        assert launched == len(TOKENS) * [*layers, "dequant_matvec"]
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")
    with streamed(checkpoint) as model:
        assert relative(result, logits(model)) < 1e-5


def test_bits_do_not_depend_on_how_many_slots_there_are(checkpoint: Path, launched: list[str]):
    batch = mx.array([[3], [40], [77]])  # more experts than the fewest slots hold: computed in groups
    with streamed(checkpoint) as model:
        expected = logits(model), np.array(model(batch, cache=model.make_cache()))
    with streamed(checkpoint, smallest_limit(checkpoint)) as model:
        assert np.array_equal(logits(model), expected[0])
        launched.clear()
        assert np.array_equal(np.array(model(batch, cache=model.make_cache())), expected[1])
        assert launched.count("expert_down") > launched.count("expert_down_combine")


def test_a_batch_of_tokens_takes_the_steps_too(checkpoint: Path, launched: list[str]):
    with streamed(checkpoint) as model:
        cache = model.make_cache()
        launched.clear()
        batch = np.array(model(mx.array([[3], [4]]), cache=cache))
        assert launched.count("gated_delta_conv_step") == 3
        assert "qk_norm_rope" not in launched  # a batch's positions are on the GPU
        alone = np.array(model(mx.array([[4]]), cache=model.make_cache()))
    assert relative(batch[1], alone[0]) < 1e-5


def test_joined_projections_are_no_second_copy(checkpoint: Path, launched: list[str]):
    with streamed(checkpoint) as model:
        before = {name: np.array(mx.contiguous(value).view(mx.uint8))
                  for name, value in tree_flatten(model.parameters()) if "layers" in name}  # fmt: skip
        gpu_step.prepare(model.layers)
        mx.clear_cache()
        active = mx.get_active_memory()
        logits(model)
        model.layers[0].linear_attn.in_proj_qkv.weight = mx.array(model.layers[0].linear_attn.in_proj_qkv.weight)
        for name, value in tree_flatten(model.parameters()):
            if "layers" in name:
                assert np.array_equal(np.array(mx.contiguous(value).view(mx.uint8)), before[name]), name
        dense = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        mx.clear_cache()
        assert mx.get_active_memory() - active < 0.2 * dense


def test_other_weights_are_joined_again(checkpoint: Path, launched: list[str]):
    with streamed(checkpoint) as model:
        before = logits(model)
        layer = model.layers[0].linear_attn.in_proj_z
        layer.scales = layer.scales * 2
        changed = logits(model)
        layer.scales = layer.scales / 2
        assert not np.array_equal(changed, before)
        assert np.array_equal(logits(model), before)


def test_a_model_that_is_not_quantised_runs_as_before(tmp_path: Path, launched: list[str]):
    make_checkpoint(tmp_path, "mlx", config=text_config(num_hidden_layers=1))
    with streamed(tmp_path) as model:
        cache = model.make_cache()
        mx.eval(model(mx.array([[3]]), cache=cache))
        assert gpu_step.mixer_step(model.layers[0].linear_attn) is None
        assert gpu_step.moe_step(model.layers[0].mlp) is None
    assert "norm_matvec" not in launched


def test_a_token_without_the_host_has_the_bits_of_one_that_asks_it(checkpoint: Path, launched: list[str]):
    """The host asks for ids while a trace is recorded, and where an expert may be missing."""
    with streamed(checkpoint) as model:
        expected = logits(model)
        assert not model.runs_ahead
        for layer in range(len(model.layers)):
            wanted = list(range(chat_config()["num_experts"]))
            model.streaming.debug_state().cache.acquire(layer, wanted).wait()
        before = model.streaming.counters.copy()
        assert np.array_equal(logits(model), expected)
        assert model.runs_ahead
        since = model.streaming.counters.since(before)
        assert since.misses == 0 and since.hits >= len(TOKENS) * len(model.layers)
        model.streaming.resize(model.streaming.stats().memory_limit_bytes - 1)  # tells policies what was used
        assert not model.streaming.debug_state().reader._used
        layer = model.layers[0].linear_attn.in_proj_z
        layer.scales = layer.scales * 2
        changed = logits(model)
        assert model.runs_ahead and not np.array_equal(changed, expected)


def fetching(checkpoint: Path, slots_per_layer: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load with CUDA's slot memory, whose host memory the kernels here read as well."""
    monkeypatch.setattr(loading, "slot_memory", lambda store, plan: MappedMemory(store, FakeRuntime(delay=0)))
    opened = Checkpoint.open(checkpoint)
    more = sum(opened.layout(layer).record_bytes for layer in opened.moe_layers)
    k = chat_config()["num_experts_per_tok"]
    return streamed(checkpoint, smallest_limit(checkpoint) + (slots_per_layer - k) * more)


@pytest.mark.parametrize(("slots", "packed"), [(4, False), (7, False), (7, True)])
def test_a_token_that_fetches_its_experts_has_the_bits_of_one_that_waits_for_them(
    slots: int,
    packed: bool,
    checkpoint: Path,
    launched: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(reader, "PROMOTION_TOKENS", 2)
    if packed:
        pack(checkpoint, tmp_path / "packed")
        checkpoint = tmp_path / "packed"
    with streamed(checkpoint, smallest_limit(checkpoint)) as model:
        expected = logits(model)
    with fetching(checkpoint, slots, monkeypatch) as model:
        layers, k = len(model.layers), model.config.num_experts_per_tok
        cache = model.streaming.debug_state().cache
        assert cache.num_slots(0) == slots < model.config.num_experts
        for _ in range(3):
            before = model.streaming.counters.copy()
            assert np.array_equal(logits(model, launched), expected)
            assert model.runs_ahead
            assert launched.count("fetch_records") == len(TOKENS) * layers
            model.streaming.debug_state().reader.settle()
            since = model.streaming.counters.since(before)
            assert since.misses > 0
            assert all(len(cache.present(layer)) <= slots - k for layer in range(layers))
        if slots > k:
            assert all(cache.present(layer) for layer in range(layers))
            assert since.hits > len(PROMPT)  # the same tokens again: what they used has been brought in
        with model.streaming.trace(tmp_path / "trace.npz"):
            assert np.array_equal(logits(model), expected)
            assert not model.runs_ahead
        before = model.streaming.counters.copy()
        assert np.array_equal(logits(model), expected)


def test_slots_are_evicted_only_after_what_reads_them(
    checkpoint: Path, launched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unread: list[bool] = []
    landing = ExpertCache.landing

    def watched(cache: ExpertCache, layer: int, count: int) -> list[int]:
        unread.append(model.streaming.debug_state().reader._unread is not None)
        return landing(cache, layer, count)

    monkeypatch.setattr(ExpertCache, "landing", watched)
    with fetching(checkpoint, 7, monkeypatch) as model:
        cache = model.make_cache()
        mx.eval(model(mx.array([PROMPT]), cache=cache))
        with model.streaming.trace(tmp_path / "trace.npz"):
            model(mx.array([[TOKENS[0]]]), cache=cache)
        assert not model.runs_ahead and not unread
        assert model.streaming.debug_state().reader._unread is not None
        model(mx.array([[TOKENS[1]]]), cache=cache)
        assert model.runs_ahead and unread and not any(unread)


def test_slots_that_change_between_tokens_are_seen(
    checkpoint: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    with streamed(checkpoint) as model:
        expected = logits(model)
    with fetching(checkpoint, 7, monkeypatch) as model:
        cache = model.make_cache()
        mx.eval(model(mx.array([PROMPT]), cache=cache))
        found, other = [], np.random.default_rng(0)
        for token in TOKENS:
            found.append(np.array(model(mx.array([[token]]), cache=cache))[0])
            assert model.runs_ahead
            mx.eval(model(mx.array(other.integers(0, VOCABULARY, (1, 30))), cache=model.make_cache()))
            limit = model.streaming.stats().memory_limit_bytes
            model.streaming.resize(limit - 1 if token == TOKENS[0] else limit + 200_000)
        assert np.array_equal(np.concatenate(found), expected)


def test_outputs_of_other_ranks_complete_a_token(
    checkpoint: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Outputs are those of one operation if nothing is missing, and zero where another rank's experts are."""
    resident = LocalExperts.resident
    with streamed(checkpoint) as model:
        expected = logits(model)
        experts = model.config.num_experts
        own = mx.arange(experts) % 2 == 0

        def token(which: mx.array, complete: Any, cache: list[Any]) -> np.ndarray:
            def shared(executor: LocalExperts, k: int) -> Any:
                found = resident(executor, k)
                if found is not None:
                    found.others = OtherRanks(which, complete)
                return found

            monkeypatch.setattr(LocalExperts, "resident", shared)
            model._resident_decoder = None
            return np.array(model(mx.array([[TOKENS[0]]]), cache=cache))[0]

        for layer in range(len(model.layers)):
            model.streaming.debug_state().cache.acquire(layer, list(range(experts))).wait()
        caches = [model.make_cache() for _ in range(2)]
        for cache in caches:
            mx.eval(model(mx.array([PROMPT]), cache=cache))
        every = token(mx.ones(experts, mx.bool_), lambda y: y, caches[0])
        assert model.runs_ahead
        assert np.array_equal(every[0], expected[0])
        halves: list[mx.array] = []

        def both(y: mx.array) -> mx.array:
            halves.append(y)
            return y

        token(own, both, caches[1])
        assert all((np.array(y) == 0).all(axis=-1).any() for y in halves)


def test_what_is_wrong_with_a_lazy_token_is_raised_two_tokens_later(
    checkpoint: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checks, "backend", lambda: "metal")
    with streamed(checkpoint) as model:
        for layer in range(len(model.layers)):
            model.streaming.debug_state().cache.acquire(layer, list(range(chat_config()["num_experts"]))).wait()
        cache = model.make_cache()
        mx.eval(model(mx.array([PROMPT]), cache=cache))
        model(mx.array([[VOCABULARY]]), cache=cache)
        model(mx.array([[1]]), cache=cache)
        with pytest.raises(RequestError, match="token ids"):
            model(mx.array([[1]]), cache=cache)
        model.text_model.norm.weight = model.text_model.norm.weight * float("nan")
        model(mx.array([[1]]), cache=cache)
        model(mx.array([[1]]), cache=cache)
        with pytest.raises(NonFiniteError):
            model(mx.array([[1]]), cache=cache)


@pytest.mark.parametrize("heads", [(2, 4), (1, 4)], ids=["two key heads", "one key head"])
def test_projections_by_key_head_are_split_as_the_module_does(heads: tuple[int, int]):
    """Qwen3-Next's: q, k, v and z of a key head lie together, b and a too."""
    k_heads, v_heads = heads
    made = text_config(linear_num_key_heads=k_heads, linear_num_value_heads=v_heads, linear_value_head_dim=40)
    config = ModelConfig.from_dict({**made, "model_type": "qwen3_next"})
    mixer = FusedGatedDeltaNet(config, "", lambda _: None)
    columns = gpu_step.columns_of(mixer)
    assert columns is not None
    results = [mx.random.normal((3, 1, linear.weight.shape[0])) for linear in mixer.projections()]
    joined = mx.concatenate(results, axis=-1)[:, 0]
    for name, own, expected in zip(
        "qkv z b a".split(),
        split_columns(joined, columns, k_heads, v_heads, 32, 40),
        mixer.split(*results),
        strict=True,
    ):
        assert np.array_equal(np.array(own).reshape(3, -1), np.array(expected).reshape(3, -1)), name
