"""The model of a terminal chat, which /model exchanges for another."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from ..chat.conversation import Conversation
from ..chat.dialect import dialect_of
from ..chat.mcp_tools import McpTool
from ..chat.tools import CALCULATOR, Tool, load_tools
from ..errors import FlashMoEError, MemoryLimitError, RequestError
from ..formats.config_files import SamplingDefaults
from ..runtime.downloads import downloaded
from ..runtime.prefix_cache import PrefixCache
from ..stats import format_bytes
from .chat_settings import Settings
from .options import model_path
from .printable import echo

PREFIX_CACHE_SHARE = 0.1  # of the memory limit, where no size is given


class ChatModel:
    """The loaded model, and the options that the next one is loaded with. At most one is in memory at any time.

    Attributes:
        name: Name that the user gave; None for the demo.
        model: The model.
        tokenizer: Its tokenizer.
        sampling: Its own sampling, with the command's options in place of what they name.
        tools: Tools that it may call.
        prefix_cache: Its prefix cache, or None.
    """

    def __init__(
        self,
        opened: Callable[[str | None], AbstractContextManager[tuple[Any, Any]]],
        check: Callable[[Path], None],
        sampling_of: Callable[[SamplingDefaults], SamplingDefaults],
        offered: Sequence[Tool | McpTool] = (),
        calculator: bool = True,
        prefix_size: str | None = None,
    ):
        """Prepare to load models.

        Args:
            opened: Loads the model of a name within a context.
            check: Raises if the checkpoint in a directory can't be loaded. Reads only headers.
            sampling_of: Returns the sampling to use, given the model's own.
            offered: Tools for models whose templates know tool calls.
            calculator: Whether to offer the calculator as well.
            prefix_size: Size of the prefix cache; None for a share of the limit.
        """
        self._opened, self._check, self._sampling_of = opened, check, sampling_of
        self._offered, self._calculator, self._prefix_size = offered, calculator, prefix_size
        self._stack = ExitStack()
        self.name: str | None = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.sampling = SamplingDefaults()
        self.tools: list[Tool | McpTool] = []
        self.prefix_cache: PrefixCache | None = None

    def __enter__(self) -> "ChatModel":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.__exit__(*exc_info)  # type: ignore[arg-type]

    def load(self, name: str | None) -> None:
        """Load a model. None must be loaded."""
        self.model, self.tokenizer = self._stack.enter_context(self._opened(name))
        self.name = name
        self.sampling = self._sampling_of(self.model.streaming.sampling)
        calculator = load_tools(CALCULATOR) if self._calculator and self.tokenizer.has_tool_calling else []
        self.tools = [*self._offered, *calculator]
        self.prefix_cache = _prefix_cache(self.model, self._prefix_size)

    def switch(self, name: str, conversation: Conversation, settings: Settings) -> None:
        """Load another model in place of this one, and let the conversation and its settings use it.

        Raises:
            FlashMoEError: If it can't be loaded. This model is then still in use, or was loaded again.
        """
        if self.model.streaming.ranks > 1:
            raise RequestError("[/model] the model can't be exchanged on several ranks. Start another chat.")
        self._check(downloaded(model_path(name)))  # before this one is given up
        before = self.name
        self._close(conversation)
        try:
            self.load(name)
            self._attach(conversation, settings)
        except (FlashMoEError, KeyboardInterrupt):
            self._close(conversation)
            self.load(before)
            self._attach(conversation, settings)
            raise

    def __str__(self) -> str:
        """Return one line: what is loaded, and how it is used."""
        stats = self.model.streaming.stats()
        return (
            f"{self.name or 'the embedded demo'}: {stats.num_slots:,} of {stats.num_experts:,} experts in "
            f"{format_bytes(stats.memory_limit_bytes)}, {self.model.streaming.max_context:,} tokens of context"
        )

    def _attach(self, conversation: Conversation, settings: Settings) -> None:
        if not self.tokenizer.has_chat_template:
            raise RequestError("[/model] the tokenizer must have a chat template, got none. Use flash-moe generate.")
        if self.tools and not dialect_of(self.tokenizer).has_calls:
            self.tools = []
        conversation.model, conversation.tokenizer = self.model, self.tokenizer
        conversation.tools, conversation.prefix_cache = self.tools, self.prefix_cache
        settings.sampling, settings.toolbar = self.sampling, ""
        conversation.sampler = settings.sampler()

    def _close(self, conversation: Conversation) -> None:
        """Close the model, and leave nothing that holds its memory."""
        conversation.model = conversation.tokenizer = conversation.prefix_cache = None
        self.model = self.tokenizer = self.prefix_cache = None
        self._stack.close()
        gc.collect()


def _prefix_cache(model: Any, size: str | None) -> PrefixCache | None:
    if size == "0":
        return None
    if size is not None:
        return PrefixCache(model, size)
    try:
        return PrefixCache(model, int(model.streaming.limit_bytes * PREFIX_CACHE_SHARE))
    except MemoryLimitError:
        echo("The memory limit has no room for a prefix cache: each turn reads the whole conversation.", err=True)
        return None
