"""Terminal chat: messages, slash commands and confirmation of tool calls."""

import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..chat.answer import Part
from ..chat.conversation import AnswerEnd, Conversation, ToolCall, ToolOutcome
from ..errors import CheckpointError, DistributedError, FlashMoEError, RequestError
from ..formats.safetensors_header import check_depth, load_json, read_bytes
from ..progress import report, watching
from ..runtime.prompt_text import check_text
from ..stats import format_bytes
from .chat_model import ChatModel
from .chat_settings import Settings
from .printable import printable
from .terminal import AnswerView, Reader, Thinking, read_line
from .wording import as_options

MAX_RESULT_LINES = 8  # of a tool's result, shown to the user

COMMANDS = {
    "/help": "this list",
    "/retry": "answer the last message again",
    "/undo": "forget the last message and its answer",
    "/clear": "forget the conversation",
    "/system": "show the system prompt, or set it: /system TEXT",
    "/model": "show the model, or use another: /model qwen3-30b-4bit",
    "/set": "show the settings, or change one: /set temperature 0.7",
    "/copy": "copy the last answer to the clipboard",
    "/stats": "memory, hit rate and bytes read",
    "/tools": "what the model may call",
    "/save": "write the conversation to a JSON file: /save FILE",
    "/load": "continue a saved conversation: /load FILE",
    "/exit": "leave, as /quit, /bye and Ctrl-D do",
}


LEAVE = ("/exit", "/quit", "/bye")
WORDS_TO_LEAVE = ("exit", "quit", "bye")  # alone on a line of a terminal


class ChatSession:
    """An interactive chat. Ctrl-C stops an answer, not the chat."""

    def __init__(
        self,
        conversation: Conversation,
        console: Console,
        read: Reader,
        thinking: Thinking,
        settings: Settings,
        used: ChatModel,
    ):
        self._chat = conversation
        self._console = console
        self._read = read
        self._thinking = thinking
        self._settings = settings
        self._used = used
        self._always: set[str] = set()
        self._view: AnswerView | None = None
        conversation.confirm = self._confirm
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/retry": self._retry,
            "/undo": self._undo,
            "/model": self._model,
            "/clear": self._clear,
            "/set": self._set,
            "/copy": self._copy,
            "/system": self._system,
            "/stats": self._stats,
            "/tools": self._tools,
            "/save": self._save,
            "/load": self._load,
        }

    def greet(self) -> None:
        """Say in the first lines what is loaded, and how it is used."""
        tools = ", ".join(tool.name for tool in self._chat.tools)
        self._note(f"{self._used}, {self._settings.sampling}; tools: {tools or 'none'}. /help lists the commands.")

    def run(self) -> None:
        """Read and answer messages until end of input or /quit."""
        while True:
            report("")
            try:
                line = self._read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._console.is_terminal:
                    raise
                self._note("/exit or Ctrl-D leaves.")
                continue
            name, _, rest = line.partition(" ")
            if name in LEAVE or (line in WORDS_TO_LEAVE and self._console.is_terminal):
                return
            try:
                if name.startswith("/"):
                    self._commands.get(name, self._unknown)(rest.strip())
                elif line:
                    self._turn(line)
            except DistributedError:
                raise
            except FlashMoEError as error:
                if self._chat.model is None:  # /model could not even load the last one again
                    raise
                self._console.print(Text(printable(as_options(str(error))), style="red"))

    def _turn(self, text: str) -> None:
        end: AnswerEnd | None = None
        check_text(text, "message")
        try:
            with (
                AnswerView(self._console, self._thinking) as self._view,
                watching(self._view.step),
                closing(self._chat.send(text)) as events,
            ):
                for event in events:
                    match event:
                        case Part(kind=kind, text=piece):
                            self._view.write(kind, piece)
                        case AnswerEnd():
                            self._view.finish()
                            end = event
                        case ToolCall():
                            self._say(f"[bold]calls[/bold] {escape(printable(str(event)))}")
                        case ToolOutcome():
                            self._show_result(event)
        except KeyboardInterrupt:
            if not self._console.is_terminal:
                raise
            self._note("interrupted")
            return
        finally:
            self._view = None
            if not self._console.is_terminal:
                self._console.print()
        if end is not None and self._console.is_terminal:
            self._show_end(end)

    def _show_end(self, end: AnswerEnd) -> None:
        response = end.response
        tokens = response.prompt_tokens + response.generation_tokens
        self._settings.toolbar = (
            f" {response.generation_tps:.1f} tok/s | hit rate {response.streaming.hit_rate:.0%} | "
            f"context {tokens:,} of {self._chat.model.streaming.max_context:,}"
        )
        cut = "; cut at --max-tokens" if response.finish_reason == "length" else ""
        self._note(
            f"{response.prompt_tokens:,} prompt tokens ({response.cached_tokens:,} cached), "
            f"{response.generation_tokens:,} tokens, {response.generation_tps:.1f} tok/s, "
            f"hit rate {response.streaming.hit_rate:.0%}{cut}"
        )

    def _show_result(self, outcome: ToolOutcome) -> None:
        lines = printable(outcome.result.text).splitlines() or [""]
        more = f"\n({len(lines) - MAX_RESULT_LINES:,} more lines)" if len(lines) > MAX_RESULT_LINES else ""
        word = "gives" if outcome.result.ok else "fails:"
        self._say(f"[dim]{word} {escape(chr(10).join(lines[:MAX_RESULT_LINES]))}{more}[/dim]")

    def _confirm(self, call: ToolCall) -> bool:
        if call.name in self._always:
            return True
        while True:
            try:
                answer = read_line(f"Run {printable(call.name)}? yes, no, always: ").strip().lower()
            except EOFError:
                answer = "no"
            if answer in ("a", "always"):
                self._always.add(call.name)
            if answer in ("y", "yes", "a", "always"):
                return True
            if answer in ("n", "no"):
                return False

    def _say(self, markup: str) -> None:
        self._console.print(printable(markup), highlight=False)

    def _note(self, text: str) -> None:
        self._say(f"[dim]{escape(text)}[/dim]")

    # Slash commands, given what follows their name.

    def _unknown(self, _: str) -> None:
        self._note("There is no such command. /help lists them.")

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            self._say(f"[bold]{name:<9}[/bold]{escape(meaning)}")
        self._note("Enter sends, Alt-Enter or Ctrl-J starts a new line, Ctrl-C stops an answer.")

    def _retry(self, _: str) -> None:
        text = self._forget_turn()
        if text is None:
            self._note("There is nothing to answer again.")
        else:
            self._turn(text)

    def _undo(self, _: str) -> None:
        text = self._forget_turn()
        self._note("There is nothing to undo." if text is None else f"Forgotten: {text}")

    def _forget_turn(self) -> str | None:
        """Remove the last message of the user and what followed, and return its text."""
        messages = self._chat.messages
        places = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if not places:
            return None
        text = str(messages[places[-1]]["content"])
        del messages[places[-1] :]
        return text

    def _model(self, name: str) -> None:
        if name:
            try:
                self._used.switch(name, self._chat, self._settings)
            except KeyboardInterrupt:
                if not self._console.is_terminal or self._chat.model is None:
                    raise
                self._note("interrupted")
            report("")
        self._note(f"{self._used}, {self._settings.sampling}.")
        if not name:
            self._note("flash-moe models lists others; the conversation is kept.")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            self._settings.change(name, value.strip())
            self._chat.sampler = self._settings.sampler()
            self._chat.max_tokens = self._settings.max_tokens
        self._note(str(self._settings))

    def _copy(self, _: str) -> None:
        answers = [message["content"] for message in self._chat.messages if message["role"] == "assistant"]
        if not answers or not self._console.is_terminal:
            self._note("There is nothing to copy.")
            return
        # OSC 52: the terminal puts it on the clipboard, also through SSH.
        self._console.file.write(f"\x1b]52;c;{b64encode(answers[-1].encode()).decode()}\x07")
        self._console.file.flush()
        self._note(f"{len(answers[-1]):,} characters were given to the terminal's clipboard.")

    def _clear(self, _: str) -> None:
        self._chat.messages.clear()
        self._note("The conversation is forgotten.")

    def _system(self, text: str) -> None:
        if text:
            check_text(text, "/system")
            self._chat.system = text
        self._note(self._chat.system or "There is no system prompt.")

    def _stats(self, _: str) -> None:
        self._console.print(Text(printable(str(self._chat.model.streaming.stats()))))
        cache = self._chat.prefix_cache
        if cache is not None:
            self._note(f"prefix cache {format_bytes(cache.nbytes)} of {format_bytes(cache.max_bytes)}")
        tokens = len(self._chat.prompt()[0]) if self._chat.messages else 0
        self._note(f"context {tokens:,} of {self._chat.model.streaming.max_context:,} tokens")

    def _tools(self, _: str) -> None:
        for tool in self._chat.tools:
            always = " (always run)" if tool.name in self._always else ""
            self._say(f"[bold]{escape(tool.name)}[/bold]{always} {escape(tool.schema['function']['description'])}")
        if not self._chat.tools:
            self._note("There are none.")

    def _save(self, name: str) -> None:
        path = _file(name, "/save")
        saved = {"system": self._chat.system, "messages": self._chat.messages}
        try:
            path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", "utf-8", errors="replace")
        except OSError as error:
            raise RequestError(f"[/save] {path} must be writable, got {error.strerror}. Check the path.") from error
        self._note(f"{len(self._chat.messages)} messages are in {path}.")

    def _load(self, name: str) -> None:
        path = _file(name, "/load")
        self._chat.system, self._chat.messages = read_conversation(path)
        self._note(f"{len(self._chat.messages)} messages were in {path}.")


def read_conversation(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the system prompt and messages of a file written by /save.

    Raises:
        RequestError: If the file was not written by /save.
    """
    try:
        saved = load_json(read_bytes(path, "Check the path."), path.name, "Check the path.")
        check_depth(saved, path.name, "Check the path.")
    except CheckpointError as error:
        raise RequestError(f"[/load] {path} must be a saved conversation, got another file: {error}") from error
    if not (
        isinstance(saved, dict)
        and isinstance(system := saved.get("system"), str)
        and isinstance(messages := saved.get("messages"), list)
        and all(map(_is_message, messages))
    ):
        raise RequestError(f"[/load] {path} must be a saved conversation, got another file. Check the path.")
    for text in (system, *(value for message in messages for value in _texts(message))):
        check_text(text, f"/load {path}")
    return system, messages


def _texts(value: Any) -> Iterator[str]:
    """Yield every text of a message, including its tool calls' arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def _is_message(message: Any) -> bool:
    """Return whether a message has the form that `Conversation` produces."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "tool"):
        return False
    texts = {"role", "content", "reasoning_content", "tool_call_id", "name"}
    calls = message.get("tool_calls", [])
    return (
        "content" in message
        and message.keys() <= texts | {"tool_calls"}
        and all(isinstance(message[key], str) for key in texts & message.keys())
        and isinstance(calls, list)
        and all(map(_is_call, calls))
    )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), dict | str)
        and isinstance(call.get("id", ""), str)
    )


def _file(name: str, command: str) -> Path:
    if not name:
        raise RequestError(f"[{command}] must name a file, got none. Try {command} chat.json.")
    return Path(name).expanduser()
