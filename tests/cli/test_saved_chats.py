"""Files that /save writes and /load reads: whatever is in them, a conversation or a RequestError."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from flash_moe_mlx import RequestError
from flash_moe_mlx.cli.chat_session import read_conversation

from ..support.mutations import mutate

CALL = {"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}
SAVED: dict[str, Any] = {
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "2"},
        {"role": "assistant", "content": "Zwei é 🦊"},
    ],
}


def test_what_was_saved_is_read(tmp_path: Path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(SAVED, ensure_ascii=False), encoding="utf-8")
    assert read_conversation(path) == (SAVED["system"], SAVED["messages"])


def test_mutated_files(tmp_path: Path):
    rng, path, refused = random.Random(3), tmp_path / "chat.json", 0
    data = json.dumps(SAVED).encode()
    for _ in range(500):
        path.write_bytes(mutate(data, rng))
        try:
            system, messages = read_conversation(path)
        except RequestError:
            refused += 1
        else:
            json.dumps([system, messages], ensure_ascii=False).encode()
    assert 100 < refused < 500


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "null", '{"system": "", "messages": [{"role": "user", "content": "\\ud800"}]}', "[" * 5000]
)
def test_other_files(text: str, tmp_path: Path):
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(RequestError, match=r"\[/load"):
        read_conversation(tmp_path / "chat.json")


def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(RequestError, match=r"\[/load"):
            read_conversation(path)
