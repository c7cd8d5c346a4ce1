"""Held-out exact match of a demo checkpoint, by category, greedy.

    python evaluate.py checkpoint --seed 1000000 --per-category 200           # transformers checkpoint
    python evaluate.py checkpoint --rounded                                    # its weights rounded as MLX's 4-bit form
    python evaluate.py ../../src/flash_moe_mlx/demo --mlx --per-category 50    # MLX checkpoint, streamed

A tool call counts if its JSON has the same name and arguments; any other answer if the text is the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from data import END, Conversation, held_out_set
from vocabulary import load_tokenizer

# From prompts and the longest answer in tokens to the texts written before the end token.
Writer = Callable[[list[str], int], list[str]]


def torch_writer(folder: Path, *, rounded: bool) -> Writer:
    """Return a function for greedy answers by transformers, in bfloat16, with batches padded on the left."""
    import torch
    from fake_quant import quantized
    from transformers import Qwen3_5MoeForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()

    def write(prompts: list[str], longest: int) -> list[str]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with torch.no_grad(), quantized(model) if rounded else nullcontext():
            out = model.generate(
                batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=longest + 2, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return [
            tokenizer.decode(row, skip_special_tokens=False) for row in out[:, batch["input_ids"].shape[1] :].tolist()
        ]

    return write


def mlx_writer(folder: Path) -> Writer:
    """Return a function for greedy answers by this library, with streamed experts."""
    from flash_moe_mlx import generate, load

    model, tokenizer = load(folder, max_context=1024)

    def write(prompts: list[str], longest: int) -> list[str]:
        ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        return [generate(model, tokenizer, prompt, max_tokens=longest + 2) for prompt in ids]

    return write


def torch_forced(
    folder: Path, examples: list[Conversation], tokenizer, *, rounded: bool, batch: int
) -> tuple[dict, list[dict]]:
    """Test in one pass per example whether each token of the answer is the likeliest after those before it.

    If so, greedy decoding gives exactly this answer. Much faster; tool calls count by text, which is stricter.
    """
    import torch
    from fake_quant import quantized
    from transformers import Qwen3_5MoeForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    cases = []
    for example in examples:
        prompt = tokenizer.encode(example.prompt(tokenizer), add_special_tokens=False)
        cases.append(
            (prompt, [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id], example)
        )
    cases.sort(key=lambda case: len(case[0]) + len(case[1]))
    results = []
    with torch.no_grad(), quantized(model) if rounded else nullcontext():
        for at in range(0, len(cases), batch):
            part = cases[at : at + batch]
            width = max(len(prompt) + len(answer) for prompt, answer, _ in part)
            ids = torch.tensor([(prompt + answer + [0] * width)[:width] for prompt, answer, _ in part], device=device)
            best = model(input_ids=ids, use_cache=False).logits.argmax(-1).tolist()
            for (prompt, answer, example), row in zip(part, best, strict=True):
                got = row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
                results.append((example, got == answer, tokenizer.decode(prompt), tokenizer.decode(got)))
    return tally(results)


def tally(results: list[tuple[Conversation, bool, str, str]]) -> tuple[dict, list[dict]]:
    """Return scores by category and every wrong answer, from (example, right, prompt, answer)."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    wrong = []
    for example, right, prompt, answer in results:
        is_call = example.answer.startswith("<tool_call>")
        for category in ("raw" if example.raw else example.category, "ALL tool calls" if is_call else "ALL answers"):
            counts[category][0] += right
            counts[category][1] += 1
        if not right:
            wrong.append(
                {"category": example.category, "prompt": prompt[-400:], "expected": example.answer, "answer": answer}
            )
    return {c: {"right": r, "of": n, "share": round(r / n, 4)} for c, (r, n) in sorted(counts.items())}, wrong


def same(answer: str, expected: str) -> bool:
    """Return whether an answer counts as right."""
    mark = "<tool_call>"
    if not (answer.startswith(mark) and expected.startswith(mark)):
        return answer.strip() == expected
    try:
        return json.loads(answer[len(mark) : answer.index("</tool_call>")]) == json.loads(
            expected[len(mark) : -len("</tool_call>")]
        )
    except ValueError:
        return False


def evaluate(examples: list[Conversation], tokenizer, write: Writer, batch: int) -> tuple[dict, list[dict]]:
    """Return scores by category and every wrong answer."""
    cases = [(e, e.prompt(tokenizer), len(tokenizer.encode(e.answer, add_special_tokens=False))) for e in examples]
    cases.sort(key=lambda case: (case[2] // 16, len(case[1])))
    results = []
    for at in range(0, len(cases), batch):
        part = cases[at : at + batch]
        written = write([prompt for _, prompt, _ in part], max(length for _, _, length in part))
        for (example, prompt, _), text in zip(part, written, strict=True):
            answer = text.split(END)[0].split("<|endoftext|>")[0]
            results.append((example, same(answer, example.answer), prompt, answer))
    return tally(results)


def main() -> None:
    """Score a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("--rounded", action="store_true", help="round the weights as the 4-bit MLX form does")
    parser.add_argument("--forced", action="store_true", help="one pass an example instead of writing token by token")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--per-category", type=int, default=200)
    parser.add_argument("--only", default="", help="one category, tool_call say")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, help="where to write the scores and the wrong answers as JSON")
    options = parser.parse_args()
    begin = time.time()
    tokenizer = load_tokenizer(options.checkpoint)
    examples = held_out_set(options.seed, options.per_category, options.only)
    if options.forced:
        scores, wrong = torch_forced(
            options.checkpoint, examples, tokenizer, rounded=options.rounded, batch=options.batch
        )
    else:
        write = (
            mlx_writer(options.checkpoint) if options.mlx else torch_writer(options.checkpoint, rounded=options.rounded)
        )
        scores, wrong = evaluate(examples, tokenizer, write, options.batch)
    for category, score in scores.items():
        print(f"{category:16} {score['right']:5} of {score['of']:5}  {score['share']:.2%}")
    print(f"{time.time() - begin:.0f} s", flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"seed": options.seed, "scores": scores, "wrong": wrong}, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
