"""Structured output: do sampled answers validate, and what a constraint costs per token.

    python -m benchmarks.structured schemas --count 240
    python -m benchmarks.structured cost
    python -m benchmarks.structured cost --model CHECKPOINT --rounds 3 --tokens 24

`schemas` asks the demo model at temperature 1 for an answer to each of a number of seeded schemas, and validates it
with jsonschema. `cost` lets a model write one constrained answer, then feeds the same tokens again with and without the
constraint, by turns and position by position, sampling included. A checkpoint without a tokenizer, as
`benchmarks.synthetic` writes, gets one of as many random words as its vocabulary has entries.
"""

import argparse
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flash_moe_mlx
from flash_moe_mlx import RequestError, load, load_model, stream_generate

from .schemas import check_formats, schemas

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
STORY = "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"
ANSWER = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 12},
            "size": {"type": "integer", "minimum": 0, "maximum": 9999},
            "kind": {"enum": ["red", "green", "blue"]},
        },
        "required": ["name", "size", "kind"],
        "additionalProperties": False,
    },
    "minItems": 500,
}


def check_schemas(count: int, seed: int) -> None:
    model, tokenizer = load(DEMO, max_context=2048)
    outcomes: Counter[str] = Counter()
    tokens = 0
    for i, (name, schema) in enumerate(schemas(count, seed)):
        mx.random.seed(i)
        try:
            answer = list(stream_generate(model, tokenizer, STORY, -1, schema=schema, sampler=make_sampler(1.0)))
        except RequestError as error:
            print(f"{name}: refused, {error}")
            outcomes["refused"] += 1
            continue
        tokens += len(answer)
        text = "".join(response.text for response in answer)
        try:
            check_formats(json.loads(text), schema)
            outcome = "valid"
        except (ValueError, jsonschema.ValidationError) as error:
            outcome = "invalid" if answer[-1].finish_reason == "stop" else "cut"
            print(f"{name}: {outcome}, {str(error)[:200]}: {text[:200]}")
        outcomes[outcome] += 1
    print(f"{count} schemas, {tokens} tokens: {dict(outcomes)}")


def random_words(vocabulary: int) -> TokenizerWrapper:
    """A byte-level tokenizer with as many tokens as a real one, nearly all of them words of random letters."""
    draw = random.Random(0)
    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known = set(words)
    while len(words) < vocabulary:
        word = draw.choice(["", "Ġ"]) + "".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(2, 10)))
        if word not in known:
            known.add(word)
            words.append(word)
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    hub = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    return TokenizerWrapper(hub, eos_token_ids={0})


class Replay:
    """A sampler that draws as always, and then says what was said before."""

    def __init__(self, tokens: list[int]):
        self.tokens = iter(tokens)
        self.sample = make_sampler(1.0)

    def __call__(self, logprobs: mx.array) -> mx.array:
        mx.eval(self.sample(logprobs))
        return mx.array([next(self.tokens)])


def times(model: Any, tokenizer: Any, prompt: list[int], tokens: list[int], schema: Any) -> list[float]:
    result, last = [], None
    for _ in stream_generate(model, tokenizer, prompt, len(tokens), schema=schema, sampler=Replay(tokens)):
        now = time.perf_counter()
        if last is not None:
            result.append(now - last)
        last = now
    return result


def cost(path: Path | None, rounds: int, count: int, memory_limit: str | None) -> None:
    if path is None:
        model, tokenizer = load(DEMO, max_context=2048)
    else:
        model = load_model(path, max_context=2048, memory_limit=memory_limit)
        tokenizer = random_words(model.vocabulary_size)
    prompt = tokenizer.encode(STORY, add_special_tokens=False)
    mx.random.seed(0)
    answer = stream_generate(model, tokenizer, prompt, count, schema=ANSWER, sampler=make_sampler(1.0))
    tokens = [response.token for response in answer]
    free: list[list[float]] = []
    bound: list[list[float]] = []
    for turn in range(rounds):
        for schema, into in ((None, free), (ANSWER, bound))[:: 1 if turn % 2 else -1]:
            into.append(times(model, tokenizer, prompt, tokens, schema))
    # The fastest of each position's runs: what else the machine does only adds time.
    least_free, least_bound = ([min(runs) for runs in zip(*side, strict=True)] for side in (free, bound))
    differences = [b - a for a, b in zip(least_free, least_bound, strict=True)]
    per_token = statistics.median(least_free)
    print(
        f"{len(tokens)} tokens, {rounds} rounds, {model.config.num_hidden_layers} layers: "
        f"free {per_token * 1e3:.3f} ms, bound {statistics.median(least_bound) * 1e3:.3f} ms (medians of positions); "
        f"sums {sum(least_free) * 1e3:.1f} and {sum(least_bound) * 1e3:.1f} ms; "
        f"median difference {statistics.median(differences) * 1e6:.0f} us, "
        f"{statistics.median(differences) / per_token:.1%} of a token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_schemas = commands.add_parser("schemas")
    of_schemas.add_argument("--count", type=int, default=240)
    of_schemas.add_argument("--seed", type=int, default=0)
    of_cost = commands.add_parser("cost")
    of_cost.add_argument("--model", type=Path)
    of_cost.add_argument("--rounds", type=int, default=10)
    of_cost.add_argument("--tokens", type=int, default=150)
    of_cost.add_argument("--memory-limit")
    a = parser.parse_args()
    if a.command == "schemas":
        check_schemas(a.count, a.seed)
    else:
        cost(a.model, a.rounds, a.tokens, a.memory_limit)


if __name__ == "__main__":
    main()
