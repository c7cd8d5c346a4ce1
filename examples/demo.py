"""Streams the embedded model's experts from disk under a memory limit, printing as it writes.

    python examples/demo.py
    python examples/demo.py --memory-limit 8GB path/to/checkpoint

The embedded model is a small Qwen3.5-MoE, trained for this library (examples/train_demo). It would fit in any
memory: the limit leaves room for a part of its experts only, so that it runs as one larger than memory does.
"""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

from flash_moe_mlx import format_bytes, load, stream_generate
from flash_moe_mlx.system import peak_resident_bytes

MEMORY_LIMIT = "14MB"
MAX_CONTEXT = 128

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
REQUESTS: list[tuple[str, list[dict[str, Any]] | None]] = [
    ("Tell me a story about a small fox.", None),
    ("What is 17 + 25?", None),
    ("What is the weather in Lisbon?", [WEATHER_TOOL]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams the embedded model's experts from disk under a memory limit.")
    parser.add_argument("model", nargs="?", default=str(files("flash_moe_mlx") / "demo"), help="checkpoint directory")
    parser.add_argument("--memory-limit", default=MEMORY_LIMIT)
    parser.add_argument("--max-tokens", type=int, default=80)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model, memory_limit=arguments.memory_limit, max_context=MAX_CONTEXT)
    with model.streaming as streaming:
        start = streaming.stats()
        print(
            f"{format_bytes(start.memory_limit_bytes)} have room for {start.num_slots:,} of {start.num_experts:,} "
            "experts; what the router picks is read from disk.\n"
        )
        tokens, seconds = 0, 0.0
        for question, tools in REQUESTS:
            print(f"> {question}" + (f"  [tool: {tools[0]['function']['name']}]" if tools else ""))
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tools=tools, add_generation_prompt=True
            )
            for response in stream_generate(model, tokenizer, prompt, max_tokens=arguments.max_tokens):
                print(response.text, end="", flush=True)
                if response.finish_reason:
                    tokens += response.generation_tokens
                    seconds += response.generation_tokens / response.generation_tps
            print("\n")
        report(streaming.stats(), Path(arguments.model), tokens / seconds)


def report(stats: Any, model: Path, tokens_per_second: float) -> None:
    """Print what streaming did."""
    checkpoint_bytes = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    resident = peak_resident_bytes()
    rows = [
        ("speed", f"{tokens_per_second:.1f} tok/s"),
        ("hit rate", f"{stats.hit_rate:.1%} of the experts asked for were in memory"),
        ("read from disk", f"{format_bytes(stats.bytes_read)} of experts"),
        ("in memory", f"{format_bytes(stats.dense_bytes)} dense weights, {format_bytes(stats.slot_bytes)} experts"),
        ("peak memory", f"{format_bytes(stats.peak_memory_bytes)}, limit {format_bytes(stats.memory_limit_bytes)}"),
        ("checkpoint", f"{format_bytes(checkpoint_bytes)} on disk"),
        ("whole process", f"{format_bytes(resident)}, most of it Python, its libraries and the tokenizer"),
    ]
    for name, value in rows:
        print(f"{name:<16}{value}")


if __name__ == "__main__":
    main()
