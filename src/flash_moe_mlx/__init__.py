"""Run Mixture-of-Experts language models larger than memory on MLX by streaming experts from the SSD.

from flash_moe_mlx import load, generate

model, tokenizer = load("path/to/checkpoint", memory_limit="8GB")
print(generate(model, tokenizer, "Explain mixture-of-experts in one line.", max_tokens=100))

Importing the package is cheap: modules (and with them mlx, mlx_lm and transformers) are imported when one of
their names is first used.
"""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.answer import Part
    from .chat.conversation import AnswerEnd, Conversation, ToolCall, ToolOutcome
    from .chat.prompt import chat_prompt
    from .chat.tools import CALCULATOR, load_tools
    from .errors import (
        BackendError,
        CheckpointError,
        ChecksumError,
        CorruptError,
        DiskFullError,
        DistributedError,
        FlashMoEError,
        MemoryLimitError,
        MissingTensorError,
        NonFiniteError,
        PackError,
        RequestError,
        ShapeError,
        ShortReadError,
        StoreError,
        UnsupportedModelError,
    )
    from .experts.engine import StreamingEngine
    from .experts.trace import RoutingTrace
    from .lab.profiling import profile
    from .lab.quality import Quality, quality
    from .packing import pack
    from .packing.verification import verify
    from .planning.plan import Plan, plan
    from .planning.simulation import replay
    from .progress import Progress
    from .runtime.async_generation import stream_generate_async
    from .runtime.generation import GenerationResponse, generate, stream_generate
    from .runtime.grammar import Grammar
    from .runtime.loading import load, load_model
    from .runtime.model_type import StreamingModel
    from .runtime.prefix_cache import PrefixCache
    from .stats import format_bytes

__version__ = "0.1.0"

# MLX ends a GPU's command buffer once its inputs exceed 40 to 50 Mi elements, and counts a layer's slots whole although
# a kernel reads K records of them: four to five command buffers per layer on Metal, and as many CUDA graphs. With this
# value they end by their number of operations; one decoded layer of a 397B model has about 300 Mi elements of inputs,
# and a prompt's large intermediate arrays still end theirs. MLX reads the variable when it first uses the GPU.
os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "1000")
logging.getLogger(__name__).addHandler(logging.NullHandler())  # the application decides what to do with log messages

__all__ = [
    "load",
    "load_model",
    "generate",
    "stream_generate",
    "stream_generate_async",
    "GenerationResponse",
    "StreamingModel",
    "StreamingEngine",
    "Progress",
    "Grammar",
    "PrefixCache",
    "chat_prompt",
    "Conversation",
    "Part",
    "ToolCall",
    "ToolOutcome",
    "AnswerEnd",
    "load_tools",
    "CALCULATOR",
    "pack",
    "verify",
    "plan",
    "Plan",
    "profile",
    "quality",
    "Quality",
    "RoutingTrace",
    "replay",
    "format_bytes",
    "FlashMoEError",
    "CheckpointError",
    "MissingTensorError",
    "NonFiniteError",
    "CorruptError",
    "UnsupportedModelError",
    "MemoryLimitError",
    "StoreError",
    "ShortReadError",
    "ChecksumError",
    "PackError",
    "DiskFullError",
    "DistributedError",
    "ShapeError",
    "RequestError",
    "BackendError",
    "__version__",
]

_MODULES = {
    "load": "runtime.loading",
    "load_model": "runtime.loading",
    "generate": "runtime.generation",
    "stream_generate": "runtime.generation",
    "stream_generate_async": "runtime.async_generation",
    "PrefixCache": "runtime.prefix_cache",
    "chat_prompt": "chat.prompt",
    "Conversation": "chat.conversation",
    "load_tools": "chat.tools",
    "CALCULATOR": "chat.tools",
    "Part": "chat.answer",
    "ToolCall": "chat.conversation",
    "ToolOutcome": "chat.conversation",
    "AnswerEnd": "chat.conversation",
    "StreamingModel": "runtime.model_type",
    "StreamingEngine": "experts.engine",
    "Progress": "progress",
    "RoutingTrace": "experts.trace",
    "replay": "planning.simulation",
    "format_bytes": "stats",
    "GenerationResponse": "runtime.generation",
    "Grammar": "runtime.grammar",
    "pack": "packing",
    "verify": "packing.verification",
    "plan": "planning.plan",
    "Plan": "planning.plan",
    "profile": "lab.profiling",
    "quality": "lab.quality",
    "Quality": "lab.quality",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .progress import import_tqdm

    import_tqdm()
    try:
        value = getattr(import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)
    except ImportError as error:
        from . import errors, installation

        if isinstance(error, errors.BackendError) or not (fault := installation.explain_import(error)):
            raise
        raise errors.BackendError(fault) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
