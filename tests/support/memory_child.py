"""Run in a process of its own by tests/test_memory.py: load, prefill, decode, and report what MLX and the engine held.

    python memory_child.py MODEL TOKENIZER LIMIT IO PROMPT_TOKENS NEW_TOKENS MAX_CONTEXT

Without a MODEL ("-") it is the control: it imports and loads the tokenizer, and no more. It prints "ready" and then
waits for a line on standard input, so that its parent can read the resident memory at rest.
"""

import json
import sys

import mlx.core as mx
from mlx_lm.tokenizer_utils import load as load_tokenizer

from flash_moe_mlx import load_model, stream_generate


def main() -> None:
    model_path, tokenizer_path, limit, io, prompt_tokens, new_tokens, max_context = sys.argv[1:]
    from pathlib import Path

    tokenizer = load_tokenizer(Path(tokenizer_path))
    report = {}
    if model_path != "-":
        model = load_model(model_path, memory_limit=limit, io=io, max_context=int(max_context))
        loaded = mx.get_peak_memory()
        prompt = [(7 * i) % 1000 for i in range(int(prompt_tokens))]
        tokenizer.eos_token_ids = set()
        for response in stream_generate(model, tokenizer, prompt, max_tokens=int(new_tokens)):  # noqa: B007 - the last counts
            pass
        stats = model.streaming.stats()
        report = {
            "limit_bytes": stats.memory_limit_bytes,
            "load_peak_bytes": loaded,
            "peak_bytes": stats.peak_memory_bytes,
            "slots": stats.num_slots,
            "experts": stats.num_experts,
            "tokens": response.generation_tokens,
            "bytes_read": stats.bytes_read,
        }
    print(json.dumps(report), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
