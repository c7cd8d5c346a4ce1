"""Checks a Mac from the system to an answer, and writes one report to paste into an issue.

    python examples/mac_check.py                          # ten minutes; from a clone, the GPU's tests too
    python examples/mac_check.py --quick                  # two minutes: without the tests and the kernels' times
    python examples/mac_check.py --full                   # with the kernels' times at a large model's sizes
    python examples/mac_check.py --model PATH --limits 8GB 12GB

Every step states what it got and what was expected; a step that fails doesn't stop the others. The script also runs on
Linux, where the expectations of macOS are left out. The last step lists what only a person can try.
"""

import argparse
import gc
import importlib.util
import json
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

import flash_moe_mlx
from flash_moe_mlx import load, stream_generate, system
from flash_moe_mlx.errors import FlashMoEError
from flash_moe_mlx.installation import install_command
from flash_moe_mlx.lab.kernel_check import check_kernels
from flash_moe_mlx.machine import physical_memory_bytes
from flash_moe_mlx.ops.backend import backend
from flash_moe_mlx.runtime.loading import limit_reason
from flash_moe_mlx.stats import format_bytes

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
DEMO_LIMIT = "14MB"
QUESTIONS = {"What is 17 + 25?": "42", "What is 68 minus 10?": "58"}
PROMPT = "Explain unified memory."
PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy", "numba")
TEST_PACKAGES = {
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
}
SECONDS = 1800
"""Time after which a step's process is ended."""

BY_HAND = (
    "Ctrl-C in `flash-moe chat` during an answer, then ask again: it must answer.",
    "Close the lid for a minute during an answer, open it and ask again.",
    "`vm_stat 5` while a large model answers: compressions must stay flat.",
    "The same answer with MLX_MAX_MB_PER_BUFFER=40 in front: which is faster, and by how much?",
    "Wait a minute after an answer, then ask again: is the first token as quick as the second answer's was?",
)
FAILURES = (FlashMoEError, RuntimeError, OSError, ValueError, LookupError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Outcome:
    """Result of a step. ``ok`` is None if the step was left out or expects nothing."""

    got: str
    expected: str = ""
    ok: bool | None = None


def flash_moe(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of flash-moe to its end."""
    command = [sys.executable, "-m", "flash_moe_mlx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)


def check_system(_: argparse.Namespace) -> Outcome:
    versions = ", ".join(f"{name} {installed(name) or 'missing'}" for name in PACKAGES)
    memory = format_bytes(physical_memory_bytes())
    got = f"{system.describe_system()}, {memory} of memory, Python {platform.python_version()}\n{versions}"
    if not system.is_macos():
        return Outcome(got)
    ok = not system.is_intel_python() and system.macos_version() >= (14,)
    return Outcome(got, "macOS 14 or newer (15 wires memory), arm64", ok)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_device(_: argparse.Namespace) -> Outcome:
    info = mx.device_info()
    sizes = [
        f"{key} {format_bytes(value)}" for key, value in info.items() if isinstance(value, int) and value > 1 << 20
    ]
    got = "\n".join([f"{backend()}, {info.get('device_name', 'a device without a name')}", *sizes])
    got += f"\ndefault memory limit: {limit_reason()}"
    if not system.is_macos():
        return Outcome(got)
    working_set = system.recommended_working_set_bytes() or 0
    ok = backend() == "metal" and working_set >= 0.6 * physical_memory_bytes()
    return Outcome(got, "metal, with a working set of two thirds of memory or more", ok)


def check_kernel_results(_: argparse.Namespace) -> Outcome:
    checks = list(check_kernels())
    lines = [f"{check.name}: {check}" for check in checks]
    return Outcome("\n".join(lines), "all ok (the times include compilation)", all(check.ok for check in checks))


def check_demo(_: argparse.Namespace) -> Outcome:
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()  # by whatever ran before in this process
    model, tokenizer = load(DEMO, memory_limit=DEMO_LIMIT, max_context=128)
    with model.streaming as streaming:
        streaming.reset_stats()
        said = {question: answer(model, tokenizer, question)[0] for question in QUESTIONS}
        stats = streaming.stats()
    right = all(part in said[question] for question, part in QUESTIONS.items())
    limit = stats.memory_limit_bytes if stats.gpu_memory_limit_bytes is None else stats.gpu_memory_limit_bytes
    lines = [f"{question} {text}" for question, text in said.items()]
    lines.append(f"{stats.num_slots} of {stats.num_experts} experts in slots, hit rate {stats.hit_rate:.0%}")
    peak = stats.peak_memory_bytes - held
    lines.append(f"peak {format_bytes(peak)} of {format_bytes(limit)}")
    expected = f"{' and '.join(QUESTIONS.values())} in the answers, peak within the limit"
    return Outcome("\n".join(lines), expected, right and peak <= limit)


def check_disk(options: argparse.Namespace) -> Outcome:
    model = [] if options.model is None else ["--model", options.model]
    done = flash_moe("doctor", "--json", "--no-kernels", *model)
    if done.returncode != 0:
        return Outcome(done.stderr or done.stdout, "a rate", False)
    found = json.loads(done.stdout)["disk"]
    how = "past the page cache" if found["direct"] else "through the page cache"
    got = f"{found['bytes_per_second'] / 1e9:.2f} GB/s: {found['num_reads']:,} reads of "
    got += f"{format_bytes(found['record_bytes'])} by {found['num_threads']} threads, {how}"
    if not system.is_macos():
        return Outcome(got)
    return Outcome(got, "3 to 8 GB/s from a Mac's own SSD; 20 and more are the page cache's", found["plausible"])


def check_server(_: argparse.Namespace) -> Outcome:
    if missing := [package for package in ("starlette", "uvicorn") if installed(package) is None]:
        return Outcome(f"left out: needs {' and '.join(missing)}: {install_command('server')}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flash_moe_mlx", "serve", "--port", str(port), "--memory-limit", "40MB",
               "--max-context", "512"]  # fmt: skip
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            return ask_server(f"http://127.0.0.1:{port}/v1/chat/completions", process, log)
        finally:
            process.terminate()


def ask_server(url: str, process: "subprocess.Popen[bytes]", log: IO[str]) -> Outcome:
    """Ask a question with logprobs once the server is up."""
    expected = "42 in the answer, with a logprob per token"
    message = {"role": "user", "content": "What is 17 + 25?"}
    body = json.dumps({"model": "demo", "messages": [message], "max_tokens": 12, "logprobs": True}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                answered = json.load(reply)
        except urllib.error.HTTPError as error:
            return Outcome(f"{error.code}: {error.read().decode()[:300]}", expected, False)
        except OSError:  # not up yet
            time.sleep(0.5)
            continue
        text, tokens = answered["choices"][0]["message"]["content"], answered["choices"][0]["logprobs"]["content"]
        ok = "42" in text and len(tokens) == answered["usage"]["completion_tokens"] > 0
        return Outcome(f"{text}\n{len(tokens)} logprobs", expected, ok)
    log.seek(0)
    return Outcome(f"no answer within two minutes; the server says:\n{log.read()[-1000:]}", expected, False)


def check_kernel_times(options: argparse.Namespace) -> Outcome:
    if options.quick:
        return Outcome("left out: --quick")
    done = flash_moe("bench", "kernels", *([] if options.full else ["--quick"]))
    return Outcome(done.stdout or done.stderr, "a line per case", done.returncode == 0)


def check_model(options: argparse.Namespace) -> Outcome:
    if options.model is None:
        return Outcome("left out: --model PATH")
    lines = ["limit | io | slots | first token s | tok/s | hit rate | waited for reads s | peak"]
    ok = True
    for limit in options.limits:
        for mode in ("direct", "pread"):
            try:
                line, within = model_row(options, limit, mode)
            except FAILURES as error:
                line, within = f"{limit} | {mode} | {type(error).__name__}: {error}", False
            lines.append(line)
            ok = ok and within
    return Outcome("\n".join(lines), "peak within each limit", ok)


def model_row(options: argparse.Namespace, limit: str, mode: str) -> tuple[str, bool]:
    """Return one way of running the user's model as a line, and whether the limit held."""
    model, tokenizer = load(options.model, memory_limit=limit, io=mode, max_context=2048)
    with model.streaming as streaming:
        answer(model, tokenizer, PROMPT, 16)  # compiles, and fills slots
        streaming.reset_stats()
        _, first, rate = answer(model, tokenizer, PROMPT, options.max_tokens)
        stats = streaming.stats()
    line = (
        f"{limit} | {mode} | {stats.num_slots}/{stats.num_experts} | {first:.2f} | {rate:.2f} | "
        f"{stats.hit_rate:.1%} | {stats.read_seconds:.1f} | {format_bytes(stats.peak_memory_bytes)}"
    )
    limit_bytes = stats.memory_limit_bytes if stats.gpu_memory_limit_bytes is None else stats.gpu_memory_limit_bytes
    return line, stats.peak_memory_bytes <= limit_bytes


def answer(model: Any, tokenizer: Any, question: str, max_tokens: int = 40) -> tuple[str, float, float]:
    """Return (text, seconds to the first token, tokens per second after it)."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    text, first, rate, started = "", 0.0, 0.0, time.perf_counter()
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
        first = first or time.perf_counter() - started
        text += response.text
        rate = response.generation_tps
    return text, first, rate


def check_io_tests(options: argparse.Namespace) -> Outcome:
    if options.quick:
        return Outcome("left out: --quick")
    return run_pytest("tests/storage", "tests/test_system.py")


def check_gpu_tests(options: argparse.Namespace) -> Outcome:
    if options.quick or backend() == "cpu":
        return Outcome(f"left out: {'--quick' if options.quick else 'no GPU'}")
    return run_pytest("-m", "gpu", "tests/ops", "tests/test_gpu_end_to_end.py")


def run_pytest(*arguments: str) -> Outcome:
    if not (ROOT / "tests").is_dir():
        return Outcome("left out: needs a clone of the repository")
    if missing := [name for module, name in TEST_PACKAGES.items() if importlib.util.find_spec(module) is None]:
        return Outcome(f"left out: needs {', '.join(missing)}: {install_command('dev')}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    total = lines[-1] if lines else done.stderr[-300:]
    ok = None if done.returncode == 0 and " passed" not in total else done.returncode == 0  # all skipped: no GPU
    return Outcome("\n".join([*failed, total]), "no failure", ok)


def check_by_hand(_: argparse.Namespace) -> Outcome:
    return Outcome("\n".join(f"[ ] {line}" for line in BY_HAND))


STEPS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "system": check_system,
    "device": check_device,
    "kernels": check_kernel_results,
    "demo": check_demo,
    "disk": check_disk,
    "server": check_server,
    "kernel-times": check_kernel_times,
    "model": check_model,
    "io-tests": check_io_tests,
    "gpu-tests": check_gpu_tests,
    "by-hand": check_by_hand,
}


def commit() -> str:
    """Return the checkout's commit in words; empty without one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", commit {done.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a checkpoint's directory, larger than memory at best")
    parser.add_argument("--limits", nargs="+", default=["8GB"], help="memory limits to try with it")
    parser.add_argument("--max-tokens", type=int, default=100)
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--quick", action="store_true", help="without the tests and the kernels' times")
    how_long.add_argument("--full", action="store_true", help="with the kernels' times at a large model's sizes")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--report", type=Path, default=Path("mac_check.md"))
    options = parser.parse_args()
    command = shlex.join(["python", "examples/mac_check.py", *sys.argv[1:]])
    head = f"# flash_moe_mlx {flash_moe_mlx.__version__}{commit()}: check of this machine\n\n"
    head += f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `{command}`\n\nstep | result | seconds\n---|---|---\n"
    table, sections, failed = [], [], []
    for number, name in enumerate(STEPS, 1):
        if name not in options.only:
            continue
        started = time.perf_counter()
        try:
            outcome = STEPS[name](options)
        except FAILURES as error:
            outcome = Outcome(f"{type(error).__name__}: {error}", "no error", False)
        seconds = time.perf_counter() - started
        result = {True: "ok", False: "FAILED", None: "left out" if outcome.got.startswith("left out") else "-"}[
            outcome.ok
        ]
        failed += [name] if outcome.ok is False else []
        table.append(f"{number} {name} | {result} | {seconds:.1f}")
        expected = f"\n\nexpected: {outcome.expected}" if outcome.expected else ""
        sections.append(f"## {number} {name}: {result}\n\n```\n{outcome.got.strip()}\n```{expected}")
        # After each step: a crash leaves what was found before.
        options.report.write_text("\n\n".join([head + "\n".join(table), *sections]) + "\n")
        print(f"{number:>2} {name:<14}{result:<10}{outcome.got.partition(chr(10))[0][:100]}", flush=True)
    print(f"\n{f'failed: {failed}' if failed else 'nothing failed'}; the report is in {options.report}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
