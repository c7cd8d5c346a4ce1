"""Train the demo model, transformers' own Qwen3_5MoeForCausalLM, from scratch or from a checkpoint: one GPU, one seed.

    python train.py --out checkpoint --seconds 420          # or --steps N, which repeats a finished run
    python train.py --shape wide --tokenizer checkpoint --out wide --seconds 300 --tools 0.8 --quantized-from 1

Writes the checkpoint as ``save_pretrained`` does, the tokenizer, and ``metrics.json``. Not here: any tuning framework.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from data import MIX, conversations
from fake_quant import quantized
from packed_loss import packed_loss
from shapes import SHAPES, model_config
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM
from vocabulary import load_tokenizer, template_only, train_tokenizer

from packing import PAD, batches

WARM_UP_CALLS = 3  # before a CUDA graph is captured


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    shape: str = "demo"
    seed: int = 0
    row_tokens: int = 512
    rows_a_step: int = 64
    tools: float = MIX["tools"]
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    quantized_from: float = 0.6


def learning_rate(recipe: Recipe, step: int, done: float) -> float:
    """Linear warm-up, then down to nothing as ``done`` goes from 0 to 1."""
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * max(0.0, 1 - done) ** 0.9


class Step:
    """One step of training: loss, gradients, update. On a GPU it is captured once as a CUDA graph and replayed."""

    def __init__(self, model: Qwen3_5MoeForCausalLM, recipe: Recipe, *, graph: bool, compiled: bool) -> None:
        self.model, self.recipe, self.compiled = model, recipe, compiled
        device = next(model.parameters()).device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rows = torch.zeros(3, recipe.rows_a_step, recipe.row_tokens, dtype=torch.long, device=device)
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True,
            capturable=device.type == "cuda",
        )  # fmt: skip
        self.graph = graph
        self.captured: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __call__(self, rows: np.ndarray, rate: float, *, rounded: bool) -> torch.Tensor:
        """The loss, on the device. ``rounded``: the weights are seen as the 4-bit form has them."""
        self.rows.copy_(torch.from_numpy(rows))
        if self.graph and rounded not in self.captured:
            self.captured[rounded] = self._capture(rounded)
        self.rate.fill_(rate)
        if not self.graph:
            self.optimizer.zero_grad(set_to_none=True)
            return self._run(rounded)
        graph, loss = self.captured[rounded]
        graph.replay()
        return loss

    def _run(self, rounded: bool) -> torch.Tensor:
        ids, learnt, positions = self.rows
        with quantized(self.model) if rounded else nullcontext():
            loss = packed_loss(self.model, ids, learnt.bool(), positions, self.dtype, pad=PAD, compiled=self.compiled)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, rounded: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self.rate.fill_(0)  # nothing is learnt by warming up
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.optimizer.zero_grad(set_to_none=True)
                self._run(rounded)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._run(rounded)
        return graph, loss


def train(
    step: Step, rows: Iterator[np.ndarray], recipe: Recipe, steps: int, seconds: float, save: Callable[[], None]
) -> list[dict]:
    """Train for ``steps``, or until ``seconds`` are over if steps is 0. Returns the log; ``save`` is called on the way too."""
    log: list[dict] = []
    begin, taken, done, saved = time.time(), 0, 0.0, False
    while done < 1:
        loss = step(next(rows), learning_rate(recipe, taken, done), rounded=done >= recipe.quantized_from)
        taken += 1
        if taken % 8 == 0:
            loss.item()  # waits, so that the clock below is the device's
        elapsed = time.time() - begin
        done = taken / steps if steps else elapsed / seconds
        if taken % 100 == 0 or done >= 1:
            log.append({"step": taken, "loss": round(loss.item(), 4), "seconds": round(elapsed, 1)})
            print(log[-1], flush=True)
        if done > 0.75 and not saved:
            save()
            saved = True
    return log


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the first conversations."""
    plain = template_only()
    return train_tokenizer(c.text(plain) for c in conversations("train", recipe.seed, 20_000))


def main() -> None:
    """Tokenizer, data, training, checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default=Recipe.shape)
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer to use, instead of training one")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--tools", type=float, default=Recipe.tools, help="weight of conversations with tools")
    parser.add_argument("--rows", type=int, default=Recipe.rows_a_step)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--row-tokens", type=int, default=Recipe.row_tokens)
    parser.add_argument(
        "--quantized-from", type=float, default=Recipe.quantized_from,
        help="part of the training after which weights are seen rounded to 4 bits; 1: never",
    )  # fmt: skip
    parser.add_argument("--start", type=Path, help="checkpoint to continue from, instead of starting from scratch")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--no-compile", action="store_true", help="no fused operations")
    options = parser.parse_args()
    recipe = Recipe(
        shape=options.shape, seed=options.seed, tools=options.tools, rows_a_step=options.rows,
        row_tokens=options.row_tokens, learning_rate=options.rate, quantized_from=options.quantized_from,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    given = options.start or options.tokenizer
    tokenizer = make_tokenizer(recipe) if given is None else load_tokenizer(given)
    tokenizer.save_pretrained(options.out)
    rows = batches(recipe.seed, recipe.rows_a_step, recipe.row_tokens, str(options.out), recipe.tools, options.workers)

    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3_5MoeForCausalLM(model_config(len(tokenizer), recipe.shape))
    if options.start is not None:
        model = Qwen3_5MoeForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    model = model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tokenizer)} tokens in the vocabulary, {parameters:,} parameters", flush=True)

    def save() -> None:
        exact = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        saved = Qwen3_5MoeForCausalLM(model.config).to(torch.bfloat16)
        saved.load_state_dict(exact)
        saved.save_pretrained(options.out)

    on_gpu = device == "cuda"
    step = Step(model, recipe, graph=on_gpu and not options.eager, compiled=on_gpu and not options.no_compile)
    begin = time.time()
    for rounded in (False, True)[: 1 + (recipe.quantized_from < 1)]:
        step(next(rows), 0.0, rounded=rounded)
    print(f"ready after {time.time() - begin:.0f} s", flush=True)
    log = train(step, rows, recipe, options.steps, options.seconds, save)
    save()
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    metrics = {"recipe": asdict(recipe), "parameters": parameters, "hardware": hardware, "torch": torch.__version__,
               "date": time.strftime("%Y-%m-%d"), "steps": log[-1]["step"], "train_seconds": log[-1]["seconds"],
               "started_from": "an earlier checkpoint" if options.start else "scratch", "tokens_seen": log[-1]["step"] * recipe.rows_a_step * recipe.row_tokens, "final_loss": log[-1]["loss"], "log": log}  # fmt: skip
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
