"""One suite that every store passes. What only files and threads have is in test_store_faults.py."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import RequestError, StoreError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.storage.store import ExpertStore, ReadRequest

from ..support.checkpoints import make_checkpoint, mlx_tensors, text_config
from ..support.stores import POISON, FaultyStore, InMemoryStore, expected_parts, make_store, parts_of, request_for

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mlx-bf16": {"format": "mlx"},
    "mlx-4bit-bias": {"format": "mlx", "bits": 4, "expert_bias": True, "shards": 3},
    "mlx-odd-rows": {"format": "mlx", "bits": 3, "config": text_config(moe_intermediate_size=32, num_experts=5)},
    "hf-fused": {"format": "hf-fused", "shards": 2},
    "hf-per-expert": {"format": "hf-per-expert", "dtype": mx.float32, "shards": 2},
    "one-expert": {"format": "mlx", "bits": 8, "config": text_config(num_experts=1, num_experts_per_tok=1)},
}


@pytest.fixture(scope="module", params=CHECKPOINTS.values(), ids=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **request.param))


class StoreTests:
    """Conformance tests for stores. Subclasses create one."""

    def make(self, checkpoint: Checkpoint) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def store(self, checkpoint: Checkpoint) -> Iterator[Any]:
        with self.make(checkpoint) as store:
            yield store

    def test_reads_what_safetensors_reads(self, checkpoint: Checkpoint, store: Any):
        expected = expected_parts(checkpoint)
        requests = [request_for(checkpoint, layer, expert) for layer, expert in expected]
        assert len(requests) == sum(checkpoint.num_experts(layer) for layer in checkpoint.moe_layers) > 0
        nbytes = store.read_into(requests)
        assert nbytes == sum(len(data) for parts in expected.values() for data in parts.values())
        for request in requests:
            assert parts_of(checkpoint, request) == expected[request.layer, request.expert]

    def test_leaves_padding_alone(self, checkpoint: Checkpoint, store: Any):
        request = request_for(checkpoint, 0, 0, fill=0x5C)
        store.read_into([request])
        layout = checkpoint.layout(0)
        covered = {i for part in layout.parts for i in range(part.offset, part.offset + part.nbytes)}
        padding = set(range(layout.record_bytes)) - covered
        assert all(request.buffer[i] == 0x5C for i in padding)

    def test_reads_into_any_writable_memory(self, checkpoint: Checkpoint, store: Any):
        size = checkpoint.layout(0).record_bytes
        bank = mx.zeros((3, size), dtype=mx.uint8)
        mx.eval(bank)
        words = np.zeros(size // 4, np.uint32)
        unaligned = memoryview(bytearray(size + 9))[5:]
        slot = memoryview(bank).cast("B")[size : 2 * size]
        store.read_into([ReadRequest(0, 0, memoryview(words)), ReadRequest(0, 0, unaligned), ReadRequest(0, 0, slot)])
        expected = expected_parts(checkpoint)[0, 0]
        for buffer in (memoryview(words.tobytes()), unaligned, memoryview(np.array(bank)[1].tobytes())):
            assert parts_of(checkpoint, ReadRequest(0, 0, buffer)) == expected
        assert not np.array(bank)[0].any()
        assert not np.array(bank)[2].any()
        assert not any(unaligned[size:])

    def test_batches(self, checkpoint: Checkpoint, store: Any):
        assert store.read_into([]) == 0
        pending = store.submit([])
        assert pending.wait() == 0
        assert pending.done()
        assert pending.completed == ()
        same = [request_for(checkpoint, 1, 0) for _ in range(3)]
        pending = store.submit(same)
        one = pending.wait() // 3
        assert pending.done()
        assert pending.completed == (True, True, True)
        assert pending.wait() == 3 * one  # asked again, the same answer
        assert len({bytes(request.buffer) for request in same}) == 1
        assert one == checkpoint.layout(1).payload_bytes

    def test_counts(self, checkpoint: Checkpoint, store: Any):
        assert store.bytes_read == 0
        for n in (1, 2):
            store.read_into([request_for(checkpoint, 0, 0)])
            assert store.bytes_read == n * checkpoint.layout(0).payload_bytes
        assert store.read_seconds >= 0
        assert store.buffer_bytes >= 0

    def test_refuses_what_is_not_there(self, checkpoint: Checkpoint, store: Any):
        good = request_for(checkpoint, 0, 0)
        for layer, expert in [(99, 0), (-1, 0), (0, -1), (0, checkpoint.num_experts(0))]:
            with pytest.raises(RequestError):
                store.submit([good, ReadRequest(layer, expert, good.buffer)])
        assert not any(good.buffer)  # nothing was read

    def test_refuses_buffers_it_cannot_fill(self, checkpoint: Checkpoint, store: Any):
        good = request_for(checkpoint, 0, 0)
        size = len(good.buffer)
        small, readonly = memoryview(bytearray(size - 1)), memoryview(bytes(size))
        strided = memoryview(bytearray(2 * size))[::2]
        for buffer in (small, readonly, strided):
            with pytest.raises(RequestError, match="writable, contiguous"):
                store.submit([good, ReadRequest(0, 0, buffer)])
        assert not any(good.buffer)

    def test_batches_from_several_threads(self, checkpoint: Checkpoint, store: Any):
        expected = expected_parts(checkpoint)
        keys = list(expected)

        def work(seed: int) -> bool:
            chosen = [keys[(seed * 7 + i) % len(keys)] for i in range(4)]
            requests = [request_for(checkpoint, *key) for key in chosen]
            store.read_into(requests)
            return all(parts_of(checkpoint, r) == expected[r.layer, r.expert] for r in requests)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(24)))
        assert store.bytes_read == 24 * 4 * checkpoint.layout(0).payload_bytes

    def test_drain(self, checkpoint: Checkpoint, store: Any):
        store.drain()  # nothing under way
        store.submit([request_for(checkpoint, 0, 0) for _ in range(3)])
        store.drain()
        request = request_for(checkpoint, 0, 0)
        store.read_into([request])
        assert parts_of(checkpoint, request) == expected_parts(checkpoint)[0, 0]

    def test_close(self, checkpoint: Checkpoint):
        store = self.make(checkpoint)
        store.read_into([request_for(checkpoint, 0, 0)])
        store.close()
        store.close()
        with pytest.raises(StoreError, match="must be open"):
            store.submit([request_for(checkpoint, 0, 0)])


class TestPread(StoreTests):
    def make(self, checkpoint: Checkpoint) -> ExpertStore:
        return make_store(checkpoint, "pread", num_threads=3)


class TestMmap(StoreTests):
    def make(self, checkpoint: Checkpoint) -> ExpertStore:
        return make_store(checkpoint, "mmap", num_threads=3)


class TestDirect(StoreTests):
    def make(self, checkpoint: Checkpoint) -> ExpertStore:
        return make_store(checkpoint, "direct", num_threads=3)


class TestOneThread(StoreTests):
    def make(self, checkpoint: Checkpoint) -> ExpertStore:
        return make_store(checkpoint, "pread", num_threads=1)


class TestInMemory(StoreTests):
    def make(self, checkpoint: Checkpoint) -> InMemoryStore:
        return InMemoryStore(checkpoint)


class TestDelayed(StoreTests):
    def make(self, checkpoint: Checkpoint) -> FaultyStore:
        return FaultyStore(ExpertStore(checkpoint, num_threads=2), delay=0.002)


def test_faulty_store_poisons_until_the_bytes_come(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    error = StoreError("[test] injected")
    with FaultyStore(
        InMemoryStore(checkpoint), delay=0.1, fault=lambda layer, expert: error if expert == 1 else None
    ) as store:
        requests = [request_for(checkpoint, 0, expert) for expert in range(3)]
        pending = store.submit(requests)
        assert not pending.done()
        assert {bytes(set(request.buffer)) for request in requests} == {bytes([POISON])}
        with pytest.raises(StoreError, match="injected"):
            pending.wait()
        assert pending.completed == (True, False, True)
        expected = expected_parts(checkpoint)
        assert parts_of(checkpoint, requests[0]) == expected[0, 0]
        assert parts_of(checkpoint, requests[2]) == expected[0, 2]
        assert set(requests[1].buffer) == {POISON}


def test_mlx_names_cover_the_experts():
    """The tests' own renaming agrees with the layouts compared here."""
    names = mlx_tensors({"model.layers.0.mlp.experts.gate_up_proj": mx.zeros((2, 4, 3))})
    assert set(names) == {
        f"language_model.model.layers.0.mlp.switch_mlp.{projection}.weight" for projection in ("gate_proj", "up_proj")
    }
