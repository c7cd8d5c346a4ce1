"""One cell: every case decoded token by token, one JSON line each, continued where an earlier run stopped."""

import copy
import json
import os
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx import Grammar, generate, load

from .cases import CLOSING, OPENING, Case, call_grammar, load_cases
from .cells import Cell, train_demo

EXTRA_TOKENS = 32  # an answer may be this much longer than the expected one
MAX_CONTEXT = 1024


def decode(model: Any, prompt: list[int], expected: list[int], limit: int) -> tuple[float, list[int]]:
    """Return the expected tokens' negative log-likelihood, fed one by one, and the tokens of the greedy answer.

    While the likeliest token is the expected one, both are the same passes; where they part, the greedy answer
    continues on a copy of the caches.

    Args:
        model: The model.
        prompt: Tokens of the prompt.
        expected: Tokens of the expected answer, end token included.
        limit: Maximum number of tokens of the greedy answer.
    """
    caches = model.make_cache()
    if len(prompt) > 1:
        model(mx.array([prompt[:-1]]), cache=caches, logits_to_keep=0)
    fed, loss, written = prompt[-1], 0.0, None
    for i, token in enumerate(expected):
        logits = _step(model, caches, fed)
        loss += float(np.logaddexp.reduce(logits) - logits[token])
        best = int(logits.argmax())
        if written is None and best != token:
            last = i == len(expected) - 1
            branch = caches if last else copy.deepcopy(caches)
            written = expected[:i] + _continue(model, branch, best, expected[-1], limit - i)
        fed = token
    return loss, expected if written is None else written


def _step(model: Any, caches: list[Any], token: int) -> np.ndarray:
    logits = model(mx.array([[token]]), cache=caches, logits_to_keep=1)[0, -1]
    return np.array(logits.astype(mx.float32), dtype=np.float64)


def _continue(model: Any, caches: list[Any], token: int, end: int, most: int) -> list[int]:
    """Return ``token`` and those that greedy decoding writes after it, up to the end token."""
    tokens = [token]
    while tokens[-1] != end and len(tokens) < most:
        tokens.append(int(_step(model, caches, tokens[-1]).argmax()))
    return tokens


def outcome(text: str) -> str:
    """Return whether an answer that should be a call is one: "json", "broken" or "no call"."""
    if not text.startswith(OPENING):
        return "no call"
    body, closed, _ = text[len(OPENING) :].partition(CLOSING)
    try:
        call = json.loads(body)
    except ValueError:
        return "broken"
    whole = closed and isinstance(call, dict) and call.keys() == {"name", "arguments"}
    return "json" if whole and isinstance(call["arguments"], dict) else "broken"


def run_case(model: Any, tokenizer: Any, case: Case, *, schema: bool) -> dict[str, Any]:
    """Decode one case and return its line."""
    scripts = train_demo("evaluate")
    prompt = tokenizer.encode(case.prompt, add_special_tokens=False)
    expected = [*tokenizer.encode(case.answer, add_special_tokens=False), tokenizer.eos_token_id]
    limit = len(expected) + EXTRA_TOKENS
    line: dict[str, Any] = {"case": case.number, "kind": "call" if case.is_call else "answer"}
    if schema:
        grammar = Grammar.lark(call_grammar(case))
        text = generate(model, tokenizer, prompt, max_tokens=limit, schema=grammar)
    else:
        loss, written = decode(model, prompt, expected, limit)
        line |= {"nll": round(loss, 6), "tokens": len(expected)}
        text = tokenizer.decode(written, skip_special_tokens=False)
    text = text.split(scripts.END)[0].split("<|endoftext|>")[0]
    line["right"] = scripts.same(text, case.answer)
    if case.is_call:
        line["outcome"] = outcome(text.strip())
    if not line["right"]:
        line["text"] = text
    return line


def run_cell(cell: Cell, checkpoint: Path, cases: list[Case], file: Path) -> None:
    """Append the lines of the cases that ``file`` doesn't have yet."""
    cases = [case for case in cases if case.is_call or not cell.schema]
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {line["case"] for line in read_lines(file)}
    if left := [case for case in cases if case.number not in done]:
        begin = time.perf_counter()
        model, tokenizer = load(
            checkpoint, max_context=MAX_CONTEXT, num_experts_per_tok=cell.experts_per_token,
            activation_bits=cell.activation_bits, progress=False,
        )  # fmt: skip
        with file.open("a") as lines:
            for case in left:
                line = run_case(model, tokenizer, case, schema=cell.schema)
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines.flush()
        model.streaming.close()
        print(f"{file.stem}: {len(left)} cases in {time.perf_counter() - begin:.0f} s", flush=True)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the finished lines of a cell; a last line that was cut off is removed from the file."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def run_one(cell: Cell, checkpoint: Path, work: Path, name: str, calls_only: bool) -> None:
    """Run a cell of the model ``name``, in a process of its own or not."""
    cases = [case for case in load_cases(work / "cases.jsonl", None) if case.is_call or not calls_only]
    run_cell(cell, checkpoint, cases, work / name / "cells" / f"{cell.name}.jsonl")


def pin(cores: "Queue[int]") -> None:
    """Give this worker a core of its own, so that its kernels start no more threads than that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
