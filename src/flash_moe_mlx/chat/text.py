"""Text of tokens: which bytes each stands for, and what an answer says so far.

mlx_lm's detokenizers trim the space that a continuation begins with and give half a character as U+FFFD, which suits a
terminal. Here nothing is trimmed, and a character comes when it is whole.
"""

import codecs
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer

_WINDOW = 8  # tokens before an answer that decoders without bytes may need to see
_SPACE = "\u2581"

_tables: "WeakKeyDictionary[Any, TokenTable]" = WeakKeyDictionary()


def _byte_of_character() -> dict[str, int]:
    """Return the bytes that the characters of a byte-level vocabulary stand for (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_of_character()


class TokenTable:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any):
        """Look at the tokenizer's kind.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
        """
        self._tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
        detokenizer = getattr(tokenizer, "_detokenizer", None)
        self._bpe = isinstance(detokenizer, BPEStreamingDetokenizer)
        self._spm = isinstance(detokenizer, SPMStreamingDetokenizer)
        self._added = {
            # Words that were added after training, such as Gemma's runs of spaces, are written as others are.
            i: str(token.content) if token.special or not self._spm else str(token.content).replace(_SPACE, " ")
            for i, token in getattr(self._tokenizer, "added_tokens_decoder", {}).items()
        }
        self.strips_first_space = self._spm and bool(getattr(detokenizer, "trim_space", False))
        self.has_bytes = self._bpe or self._spm

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; none of one that is not in the vocabulary."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        if not self.has_bytes:
            return self.decode([token]).encode(errors="ignore")
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._bpe:
            return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def text_of(self, token: int) -> str:
        r"""Return a token's text by itself: of a part of a character ``bytes:\xe2``, as OpenAI's API has it."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode by the tokenizer's own rules, special tokens included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def token_table(tokenizer: Any) -> TokenTable:
    """Return a tokenizer's table, made at the first call."""
    if tokenizer not in _tables:
        _tables[tokenizer] = TokenTable(tokenizer)
    return _tables[tokenizer]


class AnswerText:
    """The text of an answer, token by token. What the pieces say together is what the model said."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), *, message: bool = False):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            prompt: The prompt's tokens.
            message: Whether it is a message of its own rather than a continuation of the prompt: vocabularies that
                mark the beginnings of words put a space before the first one, which their own decoders leave out.
        """
        self._table = token_table(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._strip = message and self._table.strips_first_space
        self._window = [] if message else list(prompt[-_WINDOW:])
        self._said = self._shown() if self._window and not self._table.has_bytes else ""

    def piece(self, token: int) -> str:
        """Return the text that a token adds: none while a character is not whole."""
        if not self._table.has_bytes:
            return self._difference(token)
        text = self._decoder.decode(self._table.bytes_of(token))
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def drop_half(self) -> None:
        """Forget the beginning of a character whose end never came."""
        self._decoder.reset()

    def _shown(self) -> str:
        return self._table.decode(self._window)

    def _difference(self, token: int) -> str:
        """Return what the text gains by a token, for decoders that look at more than one."""
        self._window.append(token)
        text = self._shown()
        if text.endswith("\ufffd") and len(self._window) < 4 * _WINDOW:
            return ""
        added = text[len(self._said) :].replace("\ufffd", "") if text.startswith(self._said) else ""
        if text.endswith("\n") or len(self._window) >= 4 * _WINDOW:
            self._window = self._window[-_WINDOW:]
            text = self._shown()
        self._said = text
        return added
