"""Do both engines compute the same model? Experts picked, logits and greedy tokens of ours against llama.cpp's.

    python -m benchmarks.peers.parity CHECKPOINT OUT-00001-of-00002.gguf --memory-limit 6GB

llama.cpp quantises activations to 8 bits before each 4-bit product, so its hidden states differ by about a percent a
layer, and experts that are nearly tied change places. On a GGUF of dequantised weights (``gguf.py --float32``) nothing
is quantised: there the experts and the greedy tokens must be the same ones, and the logits agree to rounding.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from flash_moe_mlx import load_model
from flash_moe_mlx.experts.trace import RoutingTrace


def ours(path: Path, memory_limit: str, tokens: list[int], prompt: int, decode: int) -> tuple[np.ndarray, np.ndarray]:
    """Return experts (tokens, layers, K) and logits (1 + decode, vocabulary)."""
    model = load_model(path, memory_limit=memory_limit, max_context=1024)
    caches, logits = model.make_cache(), []
    with model.streaming as streaming, tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npz"
        with streaming.trace(trace):
            for part in [tokens[:prompt], *([token] for token in tokens[prompt : prompt + decode])]:
                out = model(mx.array([part]), cache=caches, logits_to_keep=1)
                mx.eval(out)
                logits.append(np.array(out[0, -1], dtype=np.float32))
        return RoutingTrace.read(trace).experts, np.stack(logits)


def llama(driver: Path, path: Path, tokens: list[int], prompt: int, decode: int) -> tuple[np.ndarray, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        ids, experts, logits = (Path(folder) / name for name in ("ids", "experts", "logits"))
        ids.write_text(" ".join(map(str, tokens)))
        options = {"--prompt": prompt, "--decode": decode, "--experts": experts, "--logits": logits}
        flat = [str(text) for option in options.items() for text in option]
        subprocess.run([driver, path, ids, *flat], check=True, stdout=subprocess.DEVNULL)
        rows = np.loadtxt(experts, dtype=np.int64)
        picked = np.full((rows[:, 1].max() + 1, rows[:, 0].max() + 1, rows.shape[1] - 2), -1)
        picked[rows[:, 1], rows[:, 0]] = rows[:, 2:]
        return picked, np.fromfile(logits, np.float32).reshape(1 + decode, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--driver", type=Path, default=Path("/tmp/w/llama/bin/llama-driver"))
    parser.add_argument("--memory-limit", default="6GB")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--same-experts", type=float, default=0.8, help="least share of experts that must agree")
    arguments = parser.parse_args()
    prompt, decode = arguments.prompt, arguments.decode
    tokens = np.random.default_rng(1).integers(0, 4096, prompt + decode).tolist()
    experts, logits = ours(arguments.checkpoint, arguments.memory_limit, tokens, prompt, decode)
    other_experts, other_logits = llama(arguments.driver, arguments.gguf, tokens, prompt, decode)

    # The last layer's prompt positions that need no logits are left out by llama.cpp.
    seen = (other_experts >= 0).all(axis=-1)
    same = np.array(
        [
            [len(set(a) & set(b)) / len(a) if of else np.nan for a, b, of in zip(*rows, strict=True)]
            for rows in zip(experts.tolist(), other_experts.tolist(), seen.tolist(), strict=True)
        ]
    )
    error = np.sqrt(np.mean((logits - other_logits) ** 2) / np.mean(logits**2))
    greedy = (logits.argmax(axis=1) == other_logits.argmax(axis=1)).mean()
    layers = np.nanmean(same, axis=0)
    distinct = np.mean([len(np.unique(experts[:, layer])) for layer in range(experts.shape[1])])
    print(f"same experts: {np.nanmean(same):.2%}, first layer {layers[0]:.2%}, worst layer {layers.min():.2%}")
    print(f"logits: relative RMS {error:.2e}; same most probable token: {greedy:.0%} of {len(logits)}")
    print(f"distinct experts per layer over {len(tokens)} tokens: {distinct:.1f}")
    if np.nanmean(same) < arguments.same_experts:
        raise SystemExit(
            f"fewer than {arguments.same_experts:.0%} of the experts agree: these are not the same weights"
        )


if __name__ == "__main__":
    main()
