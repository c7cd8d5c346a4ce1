"""Tiny checkpoints as mlx-lm itself converts them, with a real tokenizer; and ways to load and ask them."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.models.qwen3_5_moe import Model
from flash_moe_mlx.runtime.loading import load, load_model

from .checkpoints import make_checkpoint, text_config
from .numerics import floats

EOS = 0
VOCABULARY = 320
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (1, 120)).astype(np.uint32)


def logits_of(model: Any) -> list[np.ndarray]:
    """A prompt of 100 tokens, six tokens one by one, two at once, and batches of four and of nine."""
    cache = model.make_cache()
    outputs = [model(mx.array(TOKENS[:, :100]), cache=cache, logits_to_keep=2)]
    outputs += [model(mx.array(TOKENS[:, i : i + 1]), cache=cache) for i in range(100, 106)]
    outputs.append(model(mx.array(TOKENS[:, 106:108]), cache=cache))
    outputs += [model(mx.array(TOKENS[:, :4].T)), model(mx.array(TOKENS[:, :9].T))]
    return [np.array(output.astype(mx.float32)) for output in outputs]


def chat_config(**changes: Any) -> dict[str, Any]:
    """Widths that groups of 128 divide, and a vocabulary for the tokenizer below."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    heads = {"num_experts": 12, "num_experts_per_tok": 3, "vocab_size": VOCABULARY, "eos_token_id": EOS}
    return text_config(**{**sizes, **heads, **changes})


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of bytes, without merges: id 0 ends, 1 to 256 are bytes, and text of any kind comes back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *alphabet, *(f"<|{i}|>" for i in range(VOCABULARY - 1 - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words[EOS]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def convert(
    source: Path,
    directory: Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    predicate: Callable[..., Any] | None = None,
) -> Path:
    """Convert a fused checkpoint as mlx_lm.convert does, by mlx-lm's own functions."""
    model, config = mlx_lm.utils.load_model(source)
    if bits is not None:
        model, config = mlx_lm.utils.quantize_model(model, config, group_size, bits, quant_predicate=predicate)
    mlx_lm.utils.save_model(directory, model)
    mlx_lm.utils.save_config(config, directory / "config.json")
    write_tokenizer(directory)
    return directory


def make_converted(
    directory: Path, *, config: dict[str, Any] | None = None, seed: int = 0, dtype: mx.Dtype = mx.bfloat16, **how: Any
) -> Path:
    """A random model of `chat_config`, converted. ``how`` as in `convert`."""
    source = make_checkpoint(directory / "hub", "hf-fused", config=config or chat_config(), seed=seed, dtype=dtype)
    return convert(source, directory / "mlx", **how)


def load_resident(directory: Path) -> Any:
    """mlx-lm's own model, all of it in memory, in float32."""
    model, _ = mlx_lm.utils.load_model(directory)
    model.set_dtype(mx.float32)
    return model


def smallest_limit(directory: Path, **arguments: Any) -> int:
    """Return the limit that a refusal names: K slots per layer."""
    with pytest.raises(MemoryLimitError) as refused:
        load_model(directory, memory_limit=1, **arguments)
    assert refused.value.smallest_limit_bytes is not None
    return refused.value.smallest_limit_bytes


@contextmanager
def streamed(directory: Path, memory_limit: int | str = "1GB", **arguments: Any) -> Iterator[Model]:
    """Our model, closed at the end."""
    model = load_model(directory, memory_limit=memory_limit, **arguments)
    with model.streaming:
        yield model


@contextmanager
def with_fewest_slots(directory: Path) -> Iterator[tuple[Model, TokenizerWrapper]]:
    """Our model and its tokenizer at the smallest limit, where nearly every step reads; closed at the end."""
    model, tokenizer = load(directory, memory_limit=smallest_limit(directory))
    with model.streaming:
        yield model, tokenizer


def greedy(model: Any, prompt: list[int], count: int, cache: list[Any] | None = None) -> tuple[list[int], float]:
    """The next ``count`` tokens by argmax, and the smallest lead of a first choice over its second."""
    cache = make_prompt_cache(model) if cache is None else cache
    logits = floats(model(mx.array([prompt]), cache=cache)[0, -1])
    tokens, lead = [], float("inf")
    for _ in range(count):
        second, first = np.sort(logits)[-2:]
        lead = min(lead, float(first - second))
        tokens.append(int(logits.argmax()))
        logits = floats(model(mx.array([[tokens[-1]]]), cache=cache)[0, -1])
    return tokens, lead


def make_small(directory: Path) -> Path:
    """A small 4-bit checkpoint in three shards with an index, and its tokenizer."""
    config = text_config(vocab_size=VOCABULARY, eos_token_id=EOS)
    make_checkpoint(directory, bits=4, shards=3, config=config)
    write_tokenizer(directory)
    return directory


def forget_peak() -> None:
    """Count MLX's peak from here: it is the process's, and arrays of other tests may wait in cycles."""
    gc.collect()
    mx.reset_peak_memory()
