"""Every fault at the first, a middle and the last operation of every place: the rows of docs/faults.md.

Each must end in the row's outcome, leave no slot, thread, file or memory behind, and the next request must have the
bits of a fresh process. ``--every-fault`` strikes at every operation instead.
"""

import errno
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import flash_moe_mlx
from flash_moe_mlx import PrefixCache, RequestError, pack
from flash_moe_mlx.errors import DiskFullError, PackError, StoreError
from flash_moe_mlx.experts.cache import ExpertCache
from flash_moe_mlx.ops import slot_memory
from flash_moe_mlx.runtime import prefix_files
from flash_moe_mlx.server import app

from ..support import rehearsal
from ..support.checkpoints import make_checkpoint
from ..support.faulty_models import OTHER, PROMPT, Loaded
from ..support.models import chat_config, load, with_fewest_slots
from ..support.packing import contents, small_tasks
from ..support.refusals import held, wait_until_gone
from ..support.rehearsal import SAME_BITS, Strike, answer, fresh, leaving_nothing, outcome, settle, striking
from ..support.serving import post, served
from ..support.stores import FaultyPreadv, request_for

ADDRESS = [""]
"""Where the module's model is served."""

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"

READS: dict[str, tuple[rehearsal.Fault, str]] = {
    "EINTR": (rehearsal.interrupted, SAME_BITS),
    "EIO": (rehearsal.broken, "StoreError"),
    "short read": (rehearsal.short, SAME_BITS),
    "read that hangs": (rehearsal.hangs, "StoreError"),
    "truncation while open": (rehearsal.truncated, "ShortReadError"),
    "file written to (mtime)": (rehearsal.rewritten, "StoreError"),
    "file replaced (inode)": (rehearsal.replaced, SAME_BITS),
    "failed allocation": (rehearsal.no_memory, "StoreError"),
}
"""Faults of reads of experts, and what a request that meets them ends in."""


def read_records(loaded: Loaded) -> object:
    store = loaded[0].streaming.debug_state().store
    requests = [request_for(store.checkpoint, 0, expert) for expert in range(12)]
    store.read_into(requests)
    return [bytes(request.buffer) for request in requests]


def ask_server(loaded: Loaded) -> object:
    body = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 2}
    response = post(ADDRESS[0], "/v1/completions", body)
    if response.status_code == 200:
        return response.json()["choices"]
    error = response.json()["error"]
    assert response.status_code == 500 and error["code"] == "generation_failed", error
    kinds = {"truncated": flash_moe_mlx.ShortReadError}
    raise next((kind for word, kind in kinds.items() if word in error["message"]), StoreError)(error["message"])


PLACES: dict[str, Callable[[Loaded], object]] = {
    "store": read_records,
    "prompt": lambda loaded: answer(loaded, PROMPT, 1),
    "decoding": lambda loaded: answer(loaded, OTHER, 8),
    "batch": lambda loaded: mlx_lm.batch_generate(*loaded, [PROMPT, OTHER], max_tokens=4).texts,
    "server": ask_server,
}
"""Requests whose reads meet the faults above."""


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Iterator[Loaded]:
    """One model for all rows: each must leave it as it was."""
    with pytest.MonkeyPatch.context() as patch, with_fewest_slots(directory) as pair:
        patch.setattr(app.logger, "error", lambda *_, **__: None)  # pytest would keep what the frames hold
        with served(*pair, prefix_cache=None) as ADDRESS[0]:
            yield pair


@pytest.fixture(scope="module")
def clean(loaded: Loaded) -> dict[str, tuple[object, int]]:
    """Each place's undisturbed result, and how many reads it takes."""
    found: dict[str, tuple[object, int]] = {}
    for place, request in PLACES.items():
        for _ in range(2):  # the first starts threads and compiles
            fresh(loaded[0].streaming)
            with pytest.MonkeyPatch.context() as patch:
                reads = FaultyPreadv(lambda *_: None)
                patch.setattr(os, "preadv", reads)
                result = request(loaded)
        found[place] = result, reads.calls
    return found


def operations(config: pytest.Config, count: int, *, few: bool = False) -> list[int]:
    """Return the operations to strike at: first, middle and last, or only the middle one where requests take long."""
    if config.getoption("--every-fault"):
        return list(range(count))
    return [count // 2] if few else sorted({0, count // 2, count - 1})


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leave what other modules imported out of garbage collections: each would take a tenth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", READS)
def test_reads(
    fault: str,
    place: str,
    loaded: Loaded,
    directory: Path,
    clean: dict[str, tuple[object, int]],
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
):
    happen, expected = READS[fault]
    engine, (right, count) = loaded[0].streaming, clean[place]
    for at in operations(pytestconfig, count, few=place in ("batch", "server")):
        fresh(engine)
        strike = Strike(directory / "model.safetensors", engine)
        results: list[object] = []
        with leaving_nothing():
            with striking(strike, happen, at, monkeypatch):
                got = outcome(lambda to=results: to.append(PLACES[place](loaded)))
                if fault == "read that hangs":
                    assert outcome(lambda: PLACES[place](loaded)) == expected, "refused at once while it hangs"
                for repair in strike.repair:
                    repair()
            settle(engine)
            assert strike.struck
            assert got == expected, f"operation {at} of {count}"
            assert results == ([right] if expected == SAME_BITS else [])
            assert PLACES[place](loaded) == right, f"the next request, after operation {at}"
            rehearsal.assert_slots_whole(engine)


CHILD = """
import json, sys
import mlx.core as mx
import numpy as np
from flash_moe_mlx import load, stream_generate
loaded = load(sys.argv[1], memory_limit="1GB")
said = list(stream_generate(*loaded, json.loads(sys.argv[2]), 8))
print(json.dumps([[r.token, np.array(r.logprobs.astype(mx.float32)).tobytes().hex()] for r in said]))
"""


def test_bits_are_those_of_a_fresh_process(loaded: Loaded, directory: Path, clean: dict[str, tuple[object, int]]):
    command = [sys.executable, "-c", CHILD, str(directory), json.dumps(OTHER)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT, timeout=120)
    right = [(token, bytes.fromhex(bits)) for token, bits in json.loads(done.stdout)]
    assert clean["decoding"][0] == right
    assert answer(loaded, OTHER, 8) == right


# --- allocations ---


def failing_at(at: int, original: Callable[..., Any], error: Callable[[], BaseException]) -> Callable[..., Any]:
    calls = iter(range(10**9))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise error()  # a new one, which nobody keeps with its frames
        return original(*arguments, **options)

    return call


class NoMemoryAt:
    """mlx.core, as slot memory sees it, with an allocation of slots that fails."""

    def __init__(self, at: int):
        self.zeros = failing_at(at, mx.zeros, partial(RuntimeError, NO_MEMORY))

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


NO_MEMORY = "[malloc] Unable to allocate 8 bytes."


@pytest.mark.parametrize("at", [0, 2, 3], ids="layer {}".format)
def test_no_memory_while_loading(directory: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    with leaving_nothing(), monkeypatch.context() as patch:
        patch.setattr(slot_memory, "mx", NoMemoryAt(at))
        assert outcome(lambda: load(directory, memory_limit="1GB")) == "MemoryLimitError"


@pytest.mark.parametrize("at", [0, 2, 3], ids="layer {}".format)
def test_no_memory_while_resizing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, at: int):
    engine = loaded[0].streaming
    fresh(engine)
    right, limit, slots = answer(loaded, OTHER, 8), engine.limit_bytes, engine.stats().num_slots
    with leaving_nothing():
        with monkeypatch.context() as patch:
            patch.setattr(slot_memory, "mx", NoMemoryAt(at))
            assert outcome(lambda: engine.resize(limit + 1_000_000)) == "MemoryLimitError"
        assert answer(loaded, OTHER, 8) == right
        assert (engine.limit_bytes, engine.stats().num_slots) == (limit, slots), "nothing has changed"
        rehearsal.assert_slots_whole(engine)


@pytest.mark.parametrize("place", ["prompt", "decoding", "batch"])
def test_no_memory_in_a_pass(
    place: str, loaded: Loaded, clean: dict[str, tuple[object, int]], monkeypatch: pytest.MonkeyPatch
):
    engine = loaded[0].streaming
    for at in (0, 3):
        fresh(engine)
        with leaving_nothing():
            with monkeypatch.context() as patch:
                patch.setattr(ExpertCache, "acquire", failing_at(at, ExpertCache.acquire, MemoryError))
                assert outcome(lambda: PLACES[place](loaded)) == "MemoryLimitError"
            assert PLACES[place](loaded) == clean[place][0]
            rehearsal.assert_slots_whole(engine)


def test_no_more_threads(directory: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with with_fewest_slots(directory) as pair, leaving_nothing():
        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.start", refuse)
            assert outcome(lambda: read_records(pair)) == "StoreError"
        assert outcome(lambda: read_records(pair)) == SAME_BITS
        pair[0].streaming.close()


# --- closing ---


def test_closing_while_a_read_hangs(directory: Path, monkeypatch: pytest.MonkeyPatch):
    before = held()
    with with_fewest_slots(directory) as pair:
        engine = pair[0].streaming
        strike = Strike(directory / "model.safetensors", engine)
        with striking(strike, rehearsal.hangs, 2, monkeypatch):
            assert outcome(lambda: answer(pair, PROMPT, 2)) == "StoreError"
            engine.close()
            assert outcome(lambda: answer(pair, PROMPT, 2)) == "StoreError"
            for repair in strike.repair:  # the disk answers at last, and nothing waits for it any more
                repair()
    wait_until_gone(before)


def test_a_trace_on_a_full_disk(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = held()
    monkeypatch.setattr(np, "savez_compressed", full)
    with with_fewest_slots(directory) as pair:
        engine = pair[0].streaming
        engine.trace(tmp_path / "routing.npz")
        answer(pair, OTHER, 2)
        with pytest.raises(RequestError, match="No space left"):
            engine.close()
        assert not (tmp_path / "routing.npz").exists()
    wait_until_gone(before)


# --- prefix files ---

PREFIX_FAULTS: dict[str, tuple[str, Callable[[], BaseException]]] = {
    "EIO": ("load_prompt_cache", partial(RuntimeError, "[load_safetensors] read failed: Input/output error")),
    "failed allocation": ("load_prompt_cache", partial(RuntimeError, NO_MEMORY)),
    "ENOSPC": ("save_prompt_cache", partial(OSError, errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("fault", PREFIX_FAULTS)
def test_prefix_files(
    fault: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    function, error = PREFIX_FAULTS[fault]
    monkeypatch.setattr(prefix_files, "MIN_FILE_TOKENS", 4)
    loaded = load(directory, memory_limit="1GB")

    def ask() -> tuple[list[int], int]:
        with PrefixCache(loaded[0], "1MB", tmp_path) as cache:
            how: dict[str, Any] = {"prefix_cache": cache, "snapshot_at": [16]}
            said = list(flash_moe_mlx.stream_generate(*loaded, PROMPT, 6, **how))
        return [response.token for response in said], said[-1].cached_tokens

    with loaded[0].streaming:
        if function == "load_prompt_cache":
            right, _ = ask()
        else:
            right = [token for token, _ in answer(loaded, PROMPT, 6)]
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(prefix_files, function, failing_at(0, getattr(prefix_files, function), error))
            assert ask() == (right, 0)
        assert str(error().args[-1]) in caplog.text
        assert not list(tmp_path.glob(".*")), "nothing half-written stays"
        assert ask()[0] == right
        assert ask() == (right, 16)


# --- pack ---

PACK_FAULTS: dict[str, tuple[str, int, type[PackError]]] = {
    "EIO on a read": ("preadv", errno.EIO, PackError),
    "EIO on a write": ("pwrite", errno.EIO, PackError),
    "ENOSPC": ("pwrite", errno.ENOSPC, DiskFullError),
    "EIO when the disk is asked to keep it": ("fsync", errno.EIO, PackError),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(dtype="bfloat16", num_hidden_layers=2, full_attention_interval=2, num_experts=4)
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", "hf-fused", config=config)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files of an undisturbed packing, and how often it makes each call."""
    with pytest.MonkeyPatch.context() as patch:
        small_tasks(patch)
        counts = dict.fromkeys(("preadv", "pwrite", "fsync"), 0)

        def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                counts[name] += 1
                return original(*arguments)

            return call

        for name in counts:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        return contents(pack(source, tmp_path_factory.mktemp("packed") / "packed", bits=4)), counts


@pytest.mark.parametrize("fault", PACK_FAULTS)
def test_packing(
    fault: str,
    source: Path,
    packed: tuple[dict[str, bytes], dict[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
):
    call, number, expected = PACK_FAULTS[fault]
    right, counts = packed
    small_tasks(monkeypatch)
    for at in operations(pytestconfig, counts[call], few=call == "fsync"):
        directory = tmp_path / str(at)
        with leaving_nothing():
            with monkeypatch.context() as patch:
                error = partial(OSError, number, os.strerror(number))
                patch.setattr(os, call, failing_at(at, getattr(os, call), error))
                assert outcome(lambda to=directory: pack(source, to, bits=4)) == expected.__name__, at
            assert contents(pack(source, directory, bits=4)) == right, "the same command continues"
        shutil.rmtree(directory)


# --- the page ---

OTHER_TESTS = {
    ("killed, at any moment", "pack", "same bytes when repeated"):
        "tests/packing/test_crashes.py::test_killed_at_twenty_moments",
    ("file replaced", "pack", "PackError"):
        "tests/packing/test_crashes.py::test_a_shard_replaced_while_it_is_packed",
    ("truncation", "pack", "CorruptError"):
        "tests/packing/test_crashes.py::test_a_shard_cut_short_while_it_is_packed",
    ("damaged or truncated file", "prefix files", SAME_BITS):
        "tests/runtime/test_prefix_files.py::test_a_damaged_file_is_ignored_with_a_warning",
    ("killed while writing", "prefix files", SAME_BITS):
        "tests/runtime/test_prefix_files.py::test_a_process_killed_while_writing_leaves_a_usable_directory",
    ("EIO, kill, freeze, hang of one rank", "ranks", "DistributedError"):
        "tests/experts/test_distributed.py::test_a_fault_of_one_rank_ends_all_with_a_typed_error",
    ("death of a rank", "server over ranks", "DistributedError"):
        "tests/server/test_ranks.py::test_the_server_ends_when_a_rank_dies",
    ("Ctrl-C, at any instruction", "decoding", SAME_BITS):
        "tests/faults/test_interrupts.py::test_an_interrupt_anywhere_in_a_step",
    ("Ctrl-C, at any instruction", "store", SAME_BITS):
        "tests/faults/test_interrupts.py::test_an_interrupt_anywhere_in_a_read",
    ("client leaves", "server", SAME_BITS):
        "tests/server/test_faults.py::test_a_client_that_leaves_frees_the_engine_in_the_middle_of_a_pass",
}  # fmt: skip
"""Rows that other tests run."""


def rows() -> list[tuple[str, str, str, str]]:
    """Fault, place, outcome and test of each row of the page."""
    here = "tests/faults/test_table.py"
    found = [(fault, place, READS[fault][1], f"{here}::test_reads") for place in PLACES for fault in READS]
    found += [
        ("failed allocation", "loading", "MemoryLimitError", f"{here}::test_no_memory_while_loading"),
        ("failed allocation", "cache (resize)", "MemoryLimitError", f"{here}::test_no_memory_while_resizing"),
        ("failed allocation", "prompt, decoding, batch", "MemoryLimitError", f"{here}::test_no_memory_in_a_pass"),
        ("no more threads", "store", "StoreError", f"{here}::test_no_more_threads"),
        ("read that hangs", "closing", "closes", f"{here}::test_closing_while_a_read_hangs"),
        ("ENOSPC", "trace", "RequestError", f"{here}::test_a_trace_on_a_full_disk"),
    ]
    found += [(fault, "prefix files", SAME_BITS, f"{here}::test_prefix_files") for fault in PREFIX_FAULTS]
    found += [(fault, "pack", kind.__name__, f"{here}::test_packing") for fault, (_, _, kind) in PACK_FAULTS.items()]
    return found + [(*row, test) for row, test in OTHER_TESTS.items()]


def test_the_page_has_these_rows():
    table = [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in
             PAGE.read_text().splitlines() if line.startswith("| ")][1:]  # fmt: skip
    lines = "\n".join(f"| {fault} | {place} | {end} | `{test}` |" for fault, place, end, test in rows())
    assert table == rows(), f"docs/faults.md must have the table:\n{lines}"


def test_every_named_test_is_there():
    for *_, test in rows():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test
