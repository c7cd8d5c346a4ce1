"""Prints an answer as it is written, then what it cost: time to the first token, speed, and what was read from disk.

python examples/streaming.py [path/to/checkpoint]
"""

import sys
import time
from importlib.resources import files

from flash_moe_mlx import chat_prompt, load, stream_generate

path = sys.argv[1] if len(sys.argv) > 1 else str(files("flash_moe_mlx") / "demo")

model, tokenizer = load(path, memory_limit="14MB", max_context=128)
with model.streaming:
    prompt, _ = chat_prompt(tokenizer, [{"role": "user", "content": "Tell me a story about a small fox."}])
    started = time.perf_counter()
    first_token_seconds = None
    for response in stream_generate(model, tokenizer, prompt, max_tokens=60):
        first_token_seconds = first_token_seconds or time.perf_counter() - started
        print(response.text, end="", flush=True)
        if response.finish_reason:
            print(f"\n\n{first_token_seconds:.2f} s to the first token, then {response.generation_tps:.1f} tok/s")
            print(
                f"{response.streaming.hit_rate:.0%} of the experts were in memory, "
                f"{response.streaming.bytes_read:,} bytes read"
            )
