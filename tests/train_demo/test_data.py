"""The demo's data and embedded checkpoint: same seed same data, nothing held out is trained on, sizes as promised."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "train_demo"
CHECKPOINT = SCRIPTS / "checkpoint"
DEMO = ROOT / "src" / "flash_moe_mlx" / "demo"
README_PROMPT = "Explain mixture-of-experts in one line."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(DEMO))


def header(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries


def test_same_seed_same_conversations():
    import data

    first, again = (list(data.conversations("train", 3, 200)) for _ in range(2))
    assert first == again
    assert first != list(data.conversations("train", 4, 200))


def test_no_held_out_prompt_is_trained_on(tokenizer):
    import data

    trained = set()
    for example in data.conversations("train", 0, 4000):
        for end in [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]:
            trained.add(json.dumps([example.tools, [m for m in example.messages[:end] if m["role"] != "system"]]))
    held_out = list(data.conversations("held-out", 0, 300))
    for example in held_out:
        prompt = json.dumps([example.tools, [m for m in example.messages[:-1] if m["role"] != "system"]])
        assert prompt not in trained
        assert example.messages[0]["content"] not in data.world.PINNED or len(example.messages) > 2


def test_sums_are_held_out_in_both_orders():
    import arithmetic
    import data
    from sample import Random

    r = Random(0)
    for _ in range(500):
        part = arithmetic.sums(r)
        if "plus" in part.messages[-1]["content"]:
            a, b = (int(n) for n in part.key.split("+"))
            assert a <= b
            assert data.is_held_out(part.key) == data.is_held_out(f"{a}+{b}")


def test_one_prompt_has_one_answer(tokenizer):
    import data

    answers: dict[str, set[str]] = {}
    for example in data.conversations("train", 11, 4000):
        answers.setdefault(example.prompt(tokenizer), set()).add(example.answer)
    assert {prompt: found for prompt, found in answers.items() if len(found) > 1} == {}


def test_training_text_is_prompt_answer_and_end_token(tokenizer):
    import data

    for example in data.conversations("train", 5, 500):
        text = example.text(tokenizer)
        assert text == f"{example.prompt(tokenizer)}{example.answer}<|im_end|>\n"
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_is_the_file_whatever_class_transformers_picks(tokenizer):
    """transformers replaces the pre-tokenizer of every qwen3_5_moe checkpoint: it must be the one in the file."""
    import data
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for example in data.conversations("train", 6, 200):
        text = example.text(tokenizer)
        assert tokenizer.encode(text, add_special_tokens=False) == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token == "<|im_end|>"
    for mark in ("<tool_call>", "</tool_call>", "<tool_response>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1


def test_a_word_has_the_same_tokens_after_a_space_and_in_quotes(tokenizer):
    alone = tokenizer.encode("Kalomira", add_special_tokens=False)
    for text in (" Kalomira", ' "Kalomira"', "\nKalomira", "_Kalomira"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert any(ids[i : i + len(alone)] == alone for i in range(len(ids)))


def test_template_round_trip_of_a_tool(tokenizer):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    as_text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    rendered = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": "What is the weather in Oslo?"},
                {"role": "assistant", "content": "", "tool_calls": [tool_call]},
                {"role": "tool", "content": '{"temperature": 3}'},
            ],
            tools=[TOOL],
            add_generation_prompt=True,
            tokenize=False,
        )
        for tool_call in (call, as_text)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0] == (
        '<|im_start|>system\nTools:\n<tools>\n{"name": "get_weather", "description": "Get the weather in a city.", '
        '"parameters": {"city": "string"}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nWhat is the weather in Oslo?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        "<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"temperature": 3}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )


def test_the_readme_prompt_is_pinned():
    import data

    assert README_PROMPT in data.world.PINNED


def test_sizes():
    assert sum(f.stat().st_size for f in DEMO.iterdir() if f.is_file()) <= 7_000_000
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir() if f.is_file()) <= 20_000_000


def test_architecture_and_number_of_parameters():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert config["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert (config["num_experts"], config["num_experts_per_tok"]) == (16, 4)
    parameters = sum(prod(entry["shape"]) for entry in header(CHECKPOINT / "model.safetensors").values())
    assert parameters <= 9_500_000
    assert {entry["dtype"] for entry in header(CHECKPOINT / "model.safetensors").values()} == {"BF16"}


def test_embedded_experts_are_four_bit():
    config = json.loads((DEMO / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 64)
    entries = header(DEMO / "model.safetensors")
    experts = {name: entry for name, entry in entries.items() if ".switch_mlp." in name and name.endswith(".weight")}
    assert len(experts) == 8 * 3
    for name, entry in experts.items():
        assert (entry["dtype"], entry["shape"][0]) == ("U32", 16), name
        scales = entries[name.removesuffix("weight") + "scales"]["shape"]
        assert entry["shape"][-1] * 8 == scales[-1] * 64, name


def test_no_path_of_the_training_machine_is_left_in_the_files():
    for folder in (CHECKPOINT, DEMO):
        for file in folder.iterdir():
            if file.suffix in (".json", ".jinja", ".md"):
                text = file.read_text(encoding="utf-8")
                assert not [root for root in ("/work/", "/tmp/", "/root/", "/home/") if root in text], file
