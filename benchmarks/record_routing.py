"""Record which experts a trained model's routers pick on held-out conversations: for benchmarks.policies and simulate.

    python -m benchmarks.record_routing routing.npz                          # the embedded demo
    python -m benchmarks.record_routing routing.npz --model CHECKPOINT       # another model of examples/train_demo

Each conversation is one prompt, read as a prompt, and its expected answer, fed token by token as decoding would.
"""

import argparse
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_moe_mlx import load

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
TRAIN_DEMO = Path(__file__).parents[1] / "examples" / "train_demo"
SEED = 7_000_000


def conversations(tokenizer: Any, count: int, seed: int = SEED) -> list[tuple[list[int], list[int]]]:
    """Return prompts and answers of conversations that no model of examples/train_demo was trained on, in tokens."""
    sys.path.insert(0, str(TRAIN_DEMO))
    try:
        import data
    finally:
        sys.path.remove(str(TRAIN_DEMO))
    pairs = []
    for each in data.conversations("held-out", seed, count):
        answer = tokenizer.encode(each.answer, add_special_tokens=False)
        pairs.append((tokenizer.encode(each.prompt(tokenizer), add_special_tokens=False), answer))
    return pairs


def record(model: Any, pairs: list[tuple[list[int], list[int]]], output: Path) -> None:
    with model.streaming.trace(output):
        for prompt, answer in pairs:
            cache = model.make_cache()
            model(mx.array([prompt]), cache=cache, logits_to_keep=1)
            for token in answer:
                model(mx.array([[token]]), cache=cache, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--memory-limit", default="400MB")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, memory_limit=arguments.memory_limit, max_context=1024)
    with model.streaming:
        pairs = conversations(tokenizer, arguments.conversations)
        record(model, pairs, arguments.output)
    counts = (sum(len(part[i]) for part in pairs) for i in (0, 1))
    print("{}: {} prompt tokens, {} decoded".format(arguments.output, *counts))


if __name__ == "__main__":
    main()
