"""One engine in a process of its own, on given token ids, through its public API. Started by ``measure.py``.

Lines: "load SECONDS", "prompt TOKENS SECONDS FIGURES", "token INDEX SECONDS ID FIGURES", with FIGURES of this library
alone: "HITS MISSES BYTES_READ WAIT_SECONDS" since the generation began; and "stats JSON" when all is done.

Every engine gets the same ids: a sampler hands out the next one, whatever the logits say. So depth, routing and the
number of passes are the same, and random weights can't fall into a loop. ``--greedy`` lets them choose.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

DEMO = Path(str(files("flash_moe_mlx") / "demo"))  # of its tokenizer: a detokenizer is all that is asked of it


def load_ours(path: Path, arguments: argparse.Namespace) -> Any:
    from flash_moe_mlx import load_model

    options = json.loads(arguments.options)
    if arguments.engine == "ours-8bit":
        options["activation_bits"] = 8
    context = arguments.prompt + arguments.decode + 8
    return load_model(path, memory_limit=arguments.memory_limit, max_context=context, **options)


def load_mlx_lm(path: Path, arguments: argparse.Namespace) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    return model


def load_optiq(path: Path, arguments: argparse.Namespace) -> Any:
    from optiq.runtime.moe_stream import load_streaming

    with tempfile.TemporaryDirectory() as folder:
        for file in [*path.iterdir(), *DEMO.glob("*token*"), *DEMO.glob("*.jinja")]:
            os.symlink(file.resolve(), Path(folder) / file.name)
        model, _ = load_streaming(folder, cache_experts=arguments.cache_experts)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--prompt", type=int, default=1)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--cache-experts", type=int, default=0, help="mlx-optiq's rows a projection")
    parser.add_argument("--options", default="{}", help="more of load_model's arguments, as JSON")
    parser.add_argument("--greedy", action="store_true")
    arguments = parser.parse_args()

    loaders: dict[str, Callable[[Path, argparse.Namespace], Any]] = {"mlx-lm": load_mlx_lm, "mlx-optiq": load_optiq}
    started = time.perf_counter()
    name, float32, _ = arguments.engine.partition("-float32")
    model = loaders.get(name, load_ours)(arguments.model, arguments)
    if float32:
        import mlx.core as mx

        # MLX's CPU products in bfloat16 are several times slower, and accumulate in it.
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    print(f"load {time.perf_counter() - started:.3f}", flush=True)
    for line in decode(model, arguments):
        print(line, flush=True)
    if hasattr(model, "streaming"):
        stats = model.streaming.stats()
        print("stats " + json.dumps({"io": stats.io, "slots": stats.num_slots, "peak": stats.peak_memory_bytes}))


def decode(model: Any, arguments: argparse.Namespace) -> Iterator[str]:
    import mlx.core as mx
    from mlx_lm import stream_generate as mlx_lm_stream_generate
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    from flash_moe_mlx import stream_generate

    tokenizer = load_tokenizer(DEMO)
    tokenizer.eos_token_ids = set()
    ids = [int(text) for text in arguments.tokens.read_text().split()]
    following = iter(ids[arguments.prompt :])

    def forced(log_probabilities: mx.array) -> mx.array:
        best = mx.argmax(log_probabilities, axis=-1)
        return best if arguments.greedy else mx.array([next(following)])

    ours = hasattr(model, "streaming")
    generate: Any = stream_generate if ours else mlx_lm_stream_generate
    started = time.perf_counter()
    # One more: the first token comes from the prompt.
    responses = generate(model, tokenizer, ids[: arguments.prompt], max_tokens=arguments.decode + 1, sampler=forced)
    for index, response in enumerate(responses):
        seconds, started = time.perf_counter() - started, time.perf_counter()
        figures = ""
        if ours:
            s = response.streaming
            figures = f" {s.hits} {s.misses} {s.bytes_read} {s.read_seconds:.5f}"
        if index == 0:
            yield f"prompt {arguments.prompt} {seconds:.4f}{figures}"
        else:
            yield f"token {index - 1} {seconds:.5f} {response.token}{figures}"


if __name__ == "__main__":
    main()
