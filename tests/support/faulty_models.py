"""Helpers for tests of faults: prompts, a run of a small model, and a store that fails."""

from collections.abc import Callable
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flash_moe_mlx import stream_generate
from flash_moe_mlx.experts.engine import StreamingEngine
from flash_moe_mlx.models.qwen3_5_moe import Model

from .models import VOCABULARY
from .stores import FaultyStore

PROMPT = np.random.default_rng(6).integers(1, VOCABULARY, 17).tolist()
OTHER = np.random.default_rng(7).integers(1, VOCABULARY, 5).tolist()
Loaded = tuple[Model, TokenizerWrapper]


def run(loaded: Loaded, prompt: list[int] = PROMPT) -> list[int]:
    return [response.token for response in stream_generate(*loaded, prompt, 10)]


def inject(model: Model, fault: Callable[[int, int], BaseException | None]) -> FaultyStore:
    """Put a store that fails between the model and its own."""
    return replace_store(model.streaming, fault=fault)


def replace_store(engine: StreamingEngine, **faults: Any) -> FaultyStore:
    """Put a FaultyStore between an engine and its own store."""
    store = FaultyStore(engine.debug_state().store, **faults)
    engine._store = engine._memory.source = store
    return store
