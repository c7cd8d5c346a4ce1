"""Run as each rank by tests of distributed experts: load, compute what is asked for, print one JSON document.

    python rank_child.py DIRECTORY JSON

The JSON: what to do ("do": "logits" or "tokens"), once for each set of load's arguments ("loads"), other directories of
some ranks ("directories"), and a fault ("fault"): its rank, its kind, and in which exchange it strikes, or "load".
"""

import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx import FlashMoEError, StoreError, load, load_model, stream_generate
from flash_moe_mlx.experts.distributed import Share
from flash_moe_mlx.experts.ranks import RankGroup

VOCABULARY = 320
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (1, 120)).astype(np.uint32)


def logits_of(model: Any) -> list[np.ndarray]:
    """A prompt of 100 tokens, six tokens one by one, two at once, and batches of four and of nine."""
    cache = model.make_cache()
    outputs = [model(mx.array(TOKENS[:, :100]), cache=cache, logits_to_keep=2)]
    outputs += [model(mx.array(TOKENS[:, i : i + 1]), cache=cache) for i in range(100, 106)]
    outputs.append(model(mx.array(TOKENS[:, 106:108]), cache=cache))
    outputs += [model(mx.array(TOKENS[:, :4].T)), model(mx.array(TOKENS[:, :9].T))]
    return [np.array(output) for output in outputs]


def digest_of(outputs: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(output.tobytes() for output in outputs)).hexdigest()


def strike(kind: str) -> None:
    print(f"struck {time.time()}", file=sys.stderr, flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hang":
        time.sleep(1000)
    elif kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "interrupt":
        raise KeyboardInterrupt
    elif kind == "read":
        raise StoreError("[test] the disk must be whole, got a fault. Buy another.")


def prepare(fault: dict[str, Any]) -> None:
    """Let a fault strike this rank in the exchange of that number."""
    own, count = Share.exchange, iter(range(1 << 30))

    def exchange(self: Share, *arguments: Any) -> None:
        if self.ranks.rank == fault["rank"] and next(count) == fault["at"]:
            strike(fault["kind"])
        own(self, *arguments)

    Share.exchange = exchange  # type: ignore[method-assign]


def compute_logits(directory: str, how: dict[str, Any]) -> dict[str, Any]:
    model = load_model(directory, **how)
    with model.streaming:
        digest = digest_of(logits_of(model))
        stats = model.streaming.stats()
    return {"digest": digest, "bytes_read": stats.bytes_read, "num_experts": stats.num_experts}


def generate_tokens(directory: str, how: dict[str, Any]) -> dict[str, Any]:
    """Sampled tokens: each rank draws from a stream of its own."""
    model, tokenizer = load(directory, **how)
    mx.random.seed(int(os.environ.get("MLX_RANK", "0")))
    sampler = mx.random.categorical
    with model.streaming:
        return {"tokens": [r.token for r in stream_generate(model, tokenizer, "Hello there", 12, sampler=sampler)]}


DOINGS = {"logits": compute_logits, "tokens": generate_tokens}


def main() -> None:
    directory, text = sys.argv[1:]
    what = json.loads(text)
    own_rank = int(os.environ.get("MLX_RANK", "0"))
    directory = what.get("directories", {}).get(str(own_rank), directory)
    fault = what.get("fault")
    if fault and fault["at"] != "load":
        prepare(fault)
    elif fault and own_rank == fault["rank"]:
        RankGroup.gather = lambda *_, **__: strike(fault["kind"])  # type: ignore[method-assign, assignment]
    results = []
    for how in what["loads"]:
        try:
            results.append(DOINGS[what["do"]](directory, how))
        except FlashMoEError as error:
            results.append({"error": type(error).__name__, "message": str(error), "at": time.time()})
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
