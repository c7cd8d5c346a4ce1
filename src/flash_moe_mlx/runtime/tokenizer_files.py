"""A checkpoint's tokenizer: checks its files, lets mlx-lm read them, and turns mlx-lm's exceptions into typed errors.

Loading builds tables as long as the highest token id, so ids are bounded before the files are read.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ..errors import CheckpointError, CorruptError
from ..formats.foreign import ForeignCode, say
from ..formats.safetensors_header import brief, check_depth, load_json, read_bytes

MAX_TOKEN_ID = 1 << 22
"""Upper bound on token ids: sixteen times the largest known vocabulary."""

_JSON_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json",
)  # fmt: skip
_DIGITS = re.compile(r"[0-9]{1,10}")
_AGAIN = "Download the tokenizer files, or use load_model."


def load_checked_tokenizer(
    directory: Path,
    eos: int | list[int] | None,
    extra: Mapping[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
) -> TokenizerWrapper:
    """Load the tokenizer of a directory.

    Args:
        directory: The checkpoint's directory.
        eos: Ids that end an answer, in addition to the tokenizer's own.
        extra: Options passed to the tokenizer.
        trust_remote_code: Whether Python files of the directory may be run.

    Raises:
        CheckpointError: If the files are not a tokenizer that transformers can load.
    """
    # Passed explicitly: if it is missing, transformers asks on the terminal.
    settings = {"trust_remote_code": trust_remote_code, **(extra or {})}
    code = _code_of(check_tokenizer_files(directory))
    with ForeignCode(lambda error: _refusal(directory, error, code if not settings["trust_remote_code"] else None)):
        tokenizer = load_tokenizer(directory, settings, eos_token_ids=[eos] if isinstance(eos, int) else eos)
        # A prompt's length is checked against max_context; transformers would warn in the middle of an answer.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        vocabulary, special = tokenizer.vocab_size, len(tokenizer.all_special_tokens)
        # Broken normalisation, splitting and decoding rules only fail when they are used.
        tokenizer.decode(tokenizer.encode("a b"))
    # Without files, transformers makes up a tokenizer that knows only its special tokens.
    if vocabulary <= special:
        raise CheckpointError(
            f"[{directory.name}] must hold a tokenizer with a vocabulary, got {vocabulary} tokens. "
            "Download tokenizer.json or the files it stands for, or use load_model."
        )
    return tokenizer


def check_tokenizer_files(directory: Path) -> dict[str, Mapping[str, Any]]:
    """Check the tokenizer files of a directory for everything that decides their memory use; return values by name.

    Raises:
        CheckpointError: If one is not a JSON object within bounds, or assigns a token id that is out of range.
    """
    values: dict[str, Mapping[str, Any]] = {}
    for name in _JSON_FILES:
        path = directory / name
        if not path.exists():
            continue
        value = load_json(read_bytes(path, _AGAIN), name, _AGAIN, unique=False)
        if not isinstance(value, dict):
            raise CorruptError(f"[{name}] must be a tokenizer's JSON object, got {brief(value)}. {_AGAIN}")
        check_depth(value, name, _AGAIN)
        values[name] = value
        for token_id in _ids(name, value):
            number = int(token_id) if isinstance(token_id, str) and _DIGITS.fullmatch(token_id) else token_id
            if type(number) is not int or not 0 <= number <= MAX_TOKEN_ID:
                raise CorruptError(
                    f"[{name}] a tokenizer's ids must be integers from 0 to {MAX_TOKEN_ID}, got {brief(token_id)}. "
                    f"{_AGAIN}"
                )

    return values


def _code_of(values: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the Python class that a tokenizer's files name as their own, or None."""
    named = values.get("tokenizer_config.json", {}).get("auto_map")
    return brief(named.get("AutoTokenizer")) if isinstance(named, dict) and "AutoTokenizer" in named else None


def _ids(name: str, value: Mapping[str, Any]) -> Iterator[Any]:
    """Yield every token id that a file states."""
    if name == "tokenizer.json":
        model = value.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from vocabulary.values()
        added = value.get("added_tokens")
        if isinstance(added, list):
            yield from (token["id"] for token in added if isinstance(token, dict) and "id" in token)
    elif name == "tokenizer_config.json":
        decoder = value.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            yield from decoder
    elif name in ("added_tokens.json", "vocab.json"):
        yield from value.values()


def _refusal(directory: Path, error: BaseException, code: str | None) -> CheckpointError:
    if code is not None:
        return CheckpointError(
            f"[{directory.name}] must hold a tokenizer that needs no code of its own, got {code}. If you trust the "
            "checkpoint's Python files, pass trust_remote_code=True (--trust-remote-code)."
        )
    return CheckpointError(
        f"[{directory.name}] must hold a tokenizer that transformers can load, got {say(error)}. {_AGAIN}"
    )
