"""Train the demo model from scratch with transformers' own Qwen3_5MoeForCausalLM, bf16 autocast, one GPU, one seed.

    python train.py --out checkpoint --seconds 420          # or --steps N, which repeats a finished run

Writes the checkpoint as ``save_pretrained`` does, the tokenizer, and ``metrics.json``. Not here: any tuning framework.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from data import conversations
from fake_quant import quantized
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from vocabulary import MAX_TOKENS, load_tokenizer, template_only, train_tokenizer

IGNORE = -100
PAD = 0  # <|endoftext|>
OPEN_ROWS = 16  # rows that a worker fills at the same time
CONV_TAPS = 3  # a document's first tokens see at most this many tokens before it


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    row_tokens: int = 512
    rows_a_step: int = 64
    conversations: int = 640_000
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    quantized_from: float = 0.6


def model_config(vocab_size: int) -> Qwen3_5MoeTextConfig:
    """8 layers, 3 GatedDeltaNet to 1 full attention; 16 routed experts of 64, 4 a token, and a gated shared expert."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts_per_tok=4,
        num_experts=16,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=PAD,
        eos_token_id=2,
    )


def label_mask(ids: np.ndarray, answer_start: list[int]) -> np.ndarray:
    """Which tokens the model learns to write: every assistant turn with its end token.

    Args:
        ids: Tokens of one conversation.
        answer_start: Tokens that open an assistant turn; the first is ``<|im_start|>``, an answer ends at id 2.
    """
    mask = np.zeros(len(ids), dtype=bool)
    width = len(answer_start)
    for start in np.flatnonzero(ids == answer_start[0]):
        if ids[start : start + width].tolist() == answer_start:
            end = start + width + int(np.argmax(ids[start + width :] == 2))
            mask[start + width : end + 1] = True
    return mask


def pack_rows(job: tuple[int, int, int, str]) -> np.ndarray:
    """Conversations of one seed as rows of whole documents.

    Args:
        job: Seed, number of conversations, tokens a row, tokenizer's folder.

    Returns:
        int16 array (3, rows, tokens): ids, 1 where the token is learnt, position within its document.
    """
    seed, count, width, folder = job
    tokenizer = load_tokenizer(Path(folder))
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    full: list[np.ndarray] = []
    filling: list[tuple[int, np.ndarray]] = []
    for example in conversations("train", seed, count):
        if example.raw:
            prompt = tokenizer.encode(example.prompt(tokenizer), add_special_tokens=False)
            answer = tokenizer.encode(example.answer, add_special_tokens=False)
            ids = np.array(prompt + answer + [2], dtype=np.int16)
            learnt = np.arange(len(ids)) >= len(prompt)
        else:
            ids = np.array(tokenizer.encode(example.text(tokenizer), add_special_tokens=False), dtype=np.int16)
            learnt = label_mask(ids, opening)
        length = len(ids) + CONV_TAPS
        if length > width:
            continue
        slot = next((i for i, (used, _) in enumerate(filling) if used + length <= width), None)
        if slot is None:
            if len(filling) == OPEN_ROWS:
                full.append(filling.pop(max(range(OPEN_ROWS), key=lambda i: filling[i][0]))[1])
            filling.append((0, np.stack([np.full(width, PAD), np.zeros(width), np.arange(width)]).astype(np.int16)))
            slot = -1
        used, row = filling[slot]
        row[0, used : used + len(ids)], row[1, used : used + len(ids)] = ids, learnt
        row[2, used:] = np.arange(width - used)
        filling[slot] = (used + length, row)
    return np.stack(full + [row for _, row in filling], axis=1)


def make_rows(recipe: Recipe, tokenizer_folder: str, workers: int) -> torch.Tensor:
    """All training rows, made in parallel; the result does not depend on the number of workers."""
    shards = 64
    jobs = [
        (recipe.seed * 1000 + i, recipe.conversations // shards, recipe.row_tokens, tokenizer_folder)
        for i in range(shards)
    ]
    with get_context("spawn").Pool(workers) as pool:
        return torch.from_numpy(np.concatenate(pool.map(pack_rows, jobs, chunksize=1), axis=1))


class Separator:
    """Keeps the documents of a packed row from seeing each other: each is computed as if it were alone.

    Full attention separates them by position ids. In the GatedDeltaNet layers, hooks add to the decay's input at a
    document's first token, so that the state is multiplied by exp(-30) there, and blank the convolution's input at the
    padding between documents.
    """

    def __init__(self, model: Qwen3_5MoeForCausalLM) -> None:
        self.starts: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.in_proj_a.register_forward_hook(self._forget(layer.linear_attn.A_log))
                layer.linear_attn.in_proj_qkv.register_forward_hook(self._blank)

    def row(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Set the rows of the next forward pass. Shapes (rows, tokens)."""
        self.starts, self.padding = positions == 0, ids == PAD

    def off(self) -> None:
        """Leave the model as it is."""
        self.starts = self.padding = None

    def _forget(self, a_log: torch.nn.Parameter):
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            if self.starts is None:
                return output
            return torch.where(self.starts[..., None], (30 / a_log.detach().exp()).to(output.dtype), output)

        return hook

    def _blank(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output if self.padding is None else output.masked_fill(self.padding[..., None], 0)


def learning_rate(recipe: Recipe, step: int, done: float) -> float:
    """Linear warm-up, then down to nothing as ``done`` goes from 0 to 1."""
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * max(0.0, 1 - done) ** 0.9


def train(
    model: Qwen3_5MoeForCausalLM, rows: torch.Tensor, recipe: Recipe, steps: int, seconds: float, save
) -> list[dict]:
    """Train for ``steps``, or until ``seconds`` are over if steps is 0. Returns the log; ``save`` is called half-way too."""
    device = next(model.parameters()).device
    separator = Separator(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=device.type == "cuda"
    )
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(recipe.seed))
    log: list[dict] = []
    begin, step, done, saved = time.time(), 0, 0.0, False
    while done < 1:
        rate = learning_rate(recipe, step, done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        picks = order[torch.arange(step * recipe.rows_a_step, (step + 1) * recipe.rows_a_step) % len(order)]
        ids, learnt, positions = rows[:, picks].to(device, dtype=torch.long, non_blocking=True)
        separator.row(ids, positions)
        with quantized(model) if done >= recipe.quantized_from else nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16):
                labels = torch.where(learnt.bool(), ids, IGNORE)
                loss = model(
                    input_ids=ids, labels=labels, position_ids=positions, output_router_logits=True, use_cache=False
                ).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed = time.time() - begin
        done = step / steps if steps else elapsed / seconds
        if step % 50 == 0 or done >= 1:
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(elapsed, 1)})
            print(log[-1], flush=True)
        if done > 0.75 and not saved:
            save()
            saved = True
    separator.off()
    return log


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the first conversations."""
    plain = template_only()
    return train_tokenizer(c.text(plain) for c in conversations("train", recipe.seed, 20_000))


def main() -> None:
    """Tokenizer, data, training, checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--conversations", type=int, default=Recipe.conversations)
    parser.add_argument("--rows", type=int, default=Recipe.rows_a_step)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--quantized-from", type=float, default=Recipe.quantized_from)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, instead of from scratch")
    options = parser.parse_args()
    recipe = Recipe(
        seed=options.seed, conversations=options.conversations, rows_a_step=options.rows, learning_rate=options.rate,
        quantized_from=options.quantized_from,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    tokenizer = make_tokenizer(recipe) if options.start is None else load_tokenizer(options.start)
    tokenizer.save_pretrained(options.out)
    rows = make_rows(recipe, str(options.out), options.workers)
    print(f"{len(tokenizer)} tokens in the vocabulary, {rows.shape[1]} rows, {time.time() - begin:.0f} s", flush=True)

    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3_5MoeForCausalLM(model_config(len(tokenizer)))
    if options.start is not None:
        model = Qwen3_5MoeForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    model = model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)

    def save() -> None:
        exact = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        saved = Qwen3_5MoeForCausalLM(model.config).to(torch.bfloat16)
        saved.load_state_dict(exact)
        saved.save_pretrained(options.out)

    log = train(model, rows, recipe, options.steps, options.seconds, save)
    save()
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    metrics = {"recipe": asdict(recipe), "parameters": parameters, "hardware": hardware, "torch": torch.__version__,
               "date": time.strftime("%Y-%m-%d"), "steps": log[-1]["step"], "train_seconds": log[-1]["seconds"],
               "training_rows": rows.shape[1], "answer_tokens_a_row": round(float(rows[1].float().sum() / rows.shape[1]), 1),
               "started_from": "an earlier checkpoint" if options.start else "scratch", "tokens_seen": log[-1]["step"] * recipe.rows_a_step * recipe.row_tokens, "final_loss": log[-1]["loss"], "log": log}  # fmt: skip
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
