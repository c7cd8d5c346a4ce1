"""Forks ranks for tests: each loads, computes what is asked for, and writes one JSON document.

Reads runs from standard input, one JSON object per line: the checkpoint's "directory", each rank's "environments" and
"outputs", and "what": what to do ("do": see DOINGS), once for each set of load's arguments ("loads"), other
directories of some ranks ("directories"), whether to use numba ("numba"), and a fault ("fault"): its rank, its kind,
and in which exchange it strikes, or "load", or "connect": then MLX has a second to connect. Writes a line with the
process ids, then one as each rank ends.
"""

import atexit
import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import CancelledError
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from flash_moe_mlx import FlashMoEError, PrefixCache, RequestError, StoreError, load, load_model, stream_generate
from flash_moe_mlx.experts import ranks
from flash_moe_mlx.experts.distributed import Share
from flash_moe_mlx.experts.ranks import RankGroup
from flash_moe_mlx.runtime.following import led
from flash_moe_mlx.runtime.tokenizer_files import load_checked_tokenizer  # noqa: F401  imports transformers

from .models import logits_of
from .serving import STORY, SUM, client, served


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


PROMPT = "The quick brown fox jumps over the lazy dog again and again."


def led_work(model: Any, tokenizer: Any) -> list[Any]:
    """Conversations with a prefix cache, an answer that is cancelled in a pass, one that is left, and a resize."""
    done: list[Any] = []

    def tokens(prompt: str, **options: Any) -> list[int]:
        return [response.token for response in stream_generate(model, tokenizer, prompt, 5, **options)]

    with PrefixCache(model, "200KB") as cache:
        done.append(tokens(PROMPT, prefix_cache=cache))
        done.append(tokens(PROMPT + " And so on.", prefix_cache=cache))
        stop = threading.Event()
        with model.streaming.cancellable(stop):
            try:
                for _ in stream_generate(model, tokenizer, PROMPT, 5, prefix_cache=cache):
                    stop.set()
            except CancelledError:
                done.append("cancelled")
        left = stream_generate(model, tokenizer, PROMPT, 5)
        next(left)
        left.close()
        model.streaming.resize(int(model.streaming.limit_bytes * 0.9))
        done.append(tokens(PROMPT, prefix_cache=cache))
    done.append(tokens("Once", kv_bits=8, kv_group_size=32, quantized_kv_start=0))
    return done


def lead(directory: str, how: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = load(directory, **how)
    with model.streaming:
        with led(model) as is_mine:
            done = led_work(model, tokenizer) if is_mine else None
            with contextlib.suppress(RequestError):  # its states would be on one rank only
                PrefixCache(model, "200KB", directory)
                raise AssertionError
        return {"done": done, "limit": model.streaming.limit_bytes}


def serve(directory: str, how: dict[str, Any]) -> dict[str, Any]:
    """Answers of a server that rank 0 leads, between them one that its client leaves."""
    model, tokenizer = load(directory, **how)
    with model.streaming, led(model) as is_mine:
        return {"texts": ask(model, tokenizer) if is_mine else []}


def ask(model: Any, tokenizer: Any) -> list[str]:
    with served(model, tokenizer) as url:
        asking = client(url)

        def answer(messages: Any) -> str:
            answered = asking.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=12)
            return str(answered.choices[0].message.content)

        texts = [answer(SUM)]
        with asking.chat.completions.create(model="demo", messages=STORY, temperature=0, stream=True) as stream:
            next(iter(stream))  # the client leaves then
        return [*texts, answer(STORY), answer(SUM)]


def with_mlx_lm(directory: str, how: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = load(directory, **how)
    with model.streaming:
        return {"text": mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8)}


def run_command(directory: str, how: dict[str, Any]) -> dict[str, Any]:
    from flash_moe_mlx.cli.main import app

    app([*how["arguments"], "--model", directory])
    raise AssertionError


DOINGS = {
    "command": run_command,
    "lead": lead,
    "logits": compute_logits,
    "mlx_lm": with_mlx_lm,
    "serve": serve,
    "tokens": generate_tokens,
}


def child(directory: str, what: dict[str, Any], output: str) -> None:
    own_rank = int(os.environ.get("MLX_RANK", "0"))
    directory = what.get("directories", {}).get(str(own_rank), directory)
    if not what.get("numba", True):
        sys.modules["numba"] = None  # type: ignore[assignment]
    fault = what.get("fault")
    if fault and fault["at"] == "connect":
        ranks.CONNECT_SECONDS = 1.0
        if own_rank == fault["rank"]:
            mx.distributed.init = lambda **_: strike(fault["kind"])
    elif fault and fault["at"] != "load":
        prepare(fault)
    elif fault and own_rank == fault["rank"]:
        RankGroup.gather = lambda *_, **__: strike(fault["kind"])  # type: ignore[method-assign, assignment]
    results = []
    for how in what["loads"]:
        try:
            results.append(DOINGS[what["do"]](directory, how))
        except FlashMoEError as error:
            results.append({"error": type(error).__name__, "message": str(error), "at": time.time()})
    with open(output, "w") as file:
        json.dump(results, file)


def fork(run: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(run["environments"][rank])
    errors = os.open(f"{run['outputs'][rank]}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    sys.stdin = open(0)  # noqa: SIM115  the parent's has been read from
    status = 1
    faulthandler.dump_traceback_later(100, file=2)  # to be seen in the message of a test that waited too long
    try:
        child(run["directory"], run["what"], run["outputs"][rank])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        if isinstance(sys.exception(), Exception | KeyboardInterrupt):
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without Python's own end, which takes long in a forked process


def main() -> None:
    for line in sys.stdin:
        run = json.loads(line)
        pids = [fork(run, rank) for rank in range(len(run["outputs"]))]
        print(json.dumps({"pids": pids}), flush=True)
        for _ in pids:
            pid, status = os.wait()
            print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
