"""Checks a Mac from the system to an answer, and writes one report to paste into an issue.

    python examples/mac_check.py                          # five minutes; from a clone, the GPU's tests too
    python examples/mac_check.py --quick                  # without the tests and the kernels' times
    python examples/mac_check.py --model PATH --limits 8GB 12GB

Every step says what it got and what was expected; a step that fails doesn't stop the others. It runs on Linux as well,
where the expectations of macOS are left out. What a person must do is listed at the end.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

import flash_moe_mlx
from flash_moe_mlx import load, stream_generate, system
from flash_moe_mlx.errors import FlashMoEError
from flash_moe_mlx.installation import install_command
from flash_moe_mlx.lab.kernel_check import check_kernels
from flash_moe_mlx.machine import default_memory_limit_bytes, explain_default_memory_limit, physical_memory_bytes
from flash_moe_mlx.ops.backend import backend
from flash_moe_mlx.stats import format_bytes
from flash_moe_mlx.storage.disk_probe import probe_disk

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
DEMO_LIMIT = "14MB"
QUESTIONS = {"What is 17 + 25?": "42", "What is 68 minus 10?": "58"}
PROMPT = "Explain unified memory."
BY_HAND = (
    "Ctrl-C in `flash-moe chat` during an answer, then ask again: it must answer.",
    "Close the lid for a minute during an answer, open it and ask again.",
    "`vm_stat 5` while a large model answers: compressions must stay flat.",
    "The same answer with MLX_MAX_MB_PER_BUFFER=40 in front: which is faster, and by how much?",
    "Wait a minute after an answer, then ask again: is the first token as quick as the second answer's was?",
)


@dataclass(frozen=True)
class Outcome:
    """Result of a step. ``ok`` is None if the step was skipped or expects nothing."""

    got: str
    expected: str = ""
    ok: bool | None = None


def check_system(_: argparse.Namespace) -> Outcome:
    name = " ".join(map(str, system.macos_version())) or f"{platform.system()} {platform.release()}"
    got = f"{name}, {platform.machine()}, Python {platform.python_version()}, preadv {hasattr(os, 'preadv')}, "
    got += f"{format_bytes(physical_memory_bytes())} of memory, mlx {version('mlx')}"
    if not system.is_macos():
        return Outcome(got)
    ok = platform.machine() == "arm64" and system.macos_version() >= (14,)
    return Outcome(got, "macOS 14 or newer (15 wires memory), arm64", ok)


def check_device(_: argparse.Namespace) -> Outcome:
    info = mx.device_info()
    working_set: Any = info.get("max_recommended_working_set_size")
    sizes = {key: format_bytes(value) for key, value in info.items() if isinstance(value, int) and value > 1 << 20}
    got = f"{backend()}, {info.get('device_name')}, {sizes}; default limit "
    got += f"{format_bytes(default_memory_limit_bytes(working_set))}: {explain_default_memory_limit(working_set)}"
    return Outcome(got, "metal" if system.is_macos() else "", backend() == "metal" if system.is_macos() else None)


def check_kernel_results(_: argparse.Namespace) -> Outcome:
    checks = list(check_kernels())
    bad = [f"{check.name}: {check}" for check in checks if not check.ok]
    seconds = sum(check.seconds for check in checks)
    got = f"{len(checks) - len(bad)} of {len(checks)} operations ok, {seconds:.1f} s with compilation"
    return Outcome("\n".join([got, *bad]), "all ok", not bad)


def check_demo(_: argparse.Namespace) -> Outcome:
    mx.clear_cache()
    model, tokenizer = load(DEMO, memory_limit=DEMO_LIMIT, max_context=128)
    with model.streaming as streaming:
        streaming.reset_stats()
        said = {question: answer(model, tokenizer, question)[0] for question in QUESTIONS}
        stats = streaming.stats()
    right = all(part in said[question] for question, part in QUESTIONS.items())
    got = f"{said}; {stats.num_slots} of {stats.num_experts} experts in slots, peak "
    got += f"{format_bytes(stats.peak_memory_bytes)} of {DEMO_LIMIT}, hit rate {stats.hit_rate:.0%}"
    expected = f"{list(QUESTIONS.values())}, peak within {DEMO_LIMIT}"
    return Outcome(got, expected, right and stats.peak_memory_bytes <= stats.memory_limit_bytes)


def check_disk(options: argparse.Namespace) -> Outcome:
    if options.model is None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            subprocess_doctor()
        return Outcome(printed.getvalue().strip(), "4 to 8 GB/s on a Mac's own SSD" if system.is_macos() else "")
    probe = probe_disk(sorted(Path(options.model).rglob("*.safetensors")), 7 << 20, seconds=2.0)
    got = f"{probe.bytes_per_second / 1e9:.2f} GB/s, direct {probe.direct}, plausible {probe.is_plausible}"
    return Outcome(got, "a disk's rate", probe.is_plausible)


def subprocess_doctor() -> None:
    command = [sys.executable, "-m", "flash_moe_mlx", "doctor", "--json", "--no-kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(json.dumps(json.loads(done.stdout)["disk"]) if done.returncode == 0 else done.stderr)


def run_pytest(*arguments: str) -> Outcome:
    if not (ROOT / "tests").is_dir() or importlib.util.find_spec("pytest") is None:
        return Outcome("left out: needs a clone with its development tools (pip install -e '.[dev]')")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Outcome("\n".join([*failed, lines[-1] if lines else done.stderr[-300:]]), "no failure", done.returncode == 0)


def check_gpu_tests(options: argparse.Namespace) -> Outcome:
    if options.quick or backend() == "cpu":
        return Outcome("left out")
    return run_pytest("-m", "gpu", "tests/ops", "tests/test_gpu_end_to_end.py")


def check_io_tests(options: argparse.Namespace) -> Outcome:
    if options.quick:
        return Outcome("left out")
    return run_pytest("tests/storage/test_file_io.py", "tests/storage/test_store_faults.py", "tests/test_system.py")


def check_kernel_times(options: argparse.Namespace) -> Outcome:
    if options.quick:
        return Outcome("left out")
    command = [sys.executable, "-m", "flash_moe_mlx", "bench", "kernels", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Outcome(done.stdout or done.stderr, "a line per operation", done.returncode == 0)


def check_server(_: argparse.Namespace) -> Outcome:
    try:
        version("uvicorn")
    except PackageNotFoundError:
        return Outcome(f"left out: {install_command('server')}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flash_moe_mlx", "serve", "--port", str(port), "--memory-limit", "40MB",
               "--max-context", "512"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            return ask_server(f"http://127.0.0.1:{port}/v1/chat/completions")
        finally:
            process.terminate()


def ask_server(url: str) -> Outcome:
    message = {"role": "user", "content": "What is 17 + 25?"}
    body = json.dumps({"model": "demo", "messages": [message], "max_tokens": 12, "logprobs": True}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                choice = json.load(reply)["choices"][0]
                number = len(choice["logprobs"]["content"])
                return Outcome(
                    f"{choice['message']['content']!r}, {number} logprobs", "an answer, logprobs", number > 0
                )
        except urllib.error.HTTPError as error:
            return Outcome(f"{error.code}: {error.read().decode()[:300]}", "an answer, logprobs", False)
        except OSError:  # not up yet
            time.sleep(0.5)
    return Outcome("no answer within a minute", "an answer, logprobs", False)


def check_model(options: argparse.Namespace) -> Outcome:
    if options.model is None:
        return Outcome("left out: --model PATH")
    lines = ["limit | io | slots | first token s | tok/s | hit rate | waited for reads s | peak"]
    ok = True
    for limit in options.limits:
        for mode in ("direct", "pread"):
            model, tokenizer = load(options.model, memory_limit=limit, io=mode, max_context=2048)
            with model.streaming as streaming:
                answer(model, tokenizer, PROMPT, 16)  # compiles, and fills slots
                streaming.reset_stats()
                _, first, rate = answer(model, tokenizer, PROMPT, options.max_tokens)
                stats = streaming.stats()
            ok = ok and stats.peak_memory_bytes <= stats.memory_limit_bytes
            lines.append(
                f"{limit} | {mode} | {stats.num_slots}/{stats.num_experts} | {first:.2f} | {rate:.2f} | "
                f"{stats.hit_rate:.1%} | {stats.read_seconds:.1f} | {format_bytes(stats.peak_memory_bytes)}"
            )
    return Outcome("\n".join(lines), "peak within each limit", ok)


def answer(model: Any, tokenizer: Any, question: str, max_tokens: int = 40) -> tuple[str, float, float]:
    """Returns (text, seconds to the first token, tokens per second after it)."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    text, first, rate, started = "", 0.0, 0.0, time.perf_counter()
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
        first = first or time.perf_counter() - started
        text += response.text
        rate = response.generation_tps
    return text, first, rate


STEPS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "system": check_system,
    "device": check_device,
    "kernels": check_kernel_results,
    "demo": check_demo,
    "disk": check_disk,
    "server": check_server,
    "GPU tests": check_gpu_tests,
    "I/O tests": check_io_tests,
    "kernel times": check_kernel_times,
    "model": check_model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a checkpoint's directory, larger than memory at best")
    parser.add_argument("--limits", nargs="+", default=["8GB"], help="memory limits to try with it")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="without the tests and the kernels' times")
    parser.add_argument("--report", type=Path, default=Path("mac_check.md"))
    options = parser.parse_args()
    report = [f"# flash_moe_mlx {flash_moe_mlx.__version__}: check of this machine", ""]
    failed = []
    for name, step in STEPS.items():
        started = time.perf_counter()
        try:
            outcome = step(options)
        except (FlashMoEError, RuntimeError, OSError, ValueError, KeyError) as error:
            outcome = Outcome(f"{type(error).__name__}: {error}", "no error", False)
        mark = {True: "ok", False: "FAILED", None: "-"}[outcome.ok]
        failed += [name] if outcome.ok is False else []
        expected = f"\n\nexpected: {outcome.expected}" if outcome.expected else ""
        took = time.perf_counter() - started
        report.append(f"## {name}: {mark} ({took:.1f} s)\n\n```\n{outcome.got}\n```{expected}\n")
        # After each step: a crash leaves what was found before.
        options.report.write_text("\n".join(report))
        print(f"{name:<14}{mark:<8}{outcome.got.splitlines()[0][:100] if outcome.got else ''}", flush=True)
    report += ["## by hand", "", *(f"- [ ] {line}" for line in BY_HAND), ""]
    options.report.write_text("\n".join(report))
    print(f"\n{f'failed: {failed}' if failed else 'nothing failed'}; the report is in {options.report}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
