"""Runs a plan's tasks on threads, records in the journal what has reached the disk, and assembles the result."""

import json
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from ..experts.buffer_cache import BufferCacheShare
from ..formats.packed_format import Manifest, PackedLayer, StoredFile
from ..formats.safetensors_header import TensorInfo
from ..formats.shards import INDEX_NAME
from ..progress import Progress, Report
from ..system import usable_cores
from .checksums import combine_segments
from .journal import Journal
from .plan import PackPlan
from .quantiser import ErrorSums
from .sources import Source
from .tasks import SourceFiles, Task, TaskResult
from .workspace import RESERVE_BYTES, Workspace

_COMMIT_BYTES = 256 << 20
"""Bytes written between journal entries: fewer means waiting for the disk more often, more means losing more work."""

_COMMIT_SECONDS = 10.0

_UNCOMMITTED_BYTES = 4 * _COMMIT_BYTES
"""Maximum bytes written ahead of the disk before all tasks wait for it."""
_BUFFER_CACHE_BYTES = 128 << 20
_THREADS = min(2 * usable_cores(), 8)
"""Number of worker threads. Each waits for the disk about half of the time and uses up to about 100 MB."""


class Runner:
    """One run of a plan, from the start or resumed."""

    def __init__(self, plan: PackPlan, source: Source, workspace: Workspace, journal: Journal, report: Report):
        self._plan, self._source, self._workspace, self._journal = plan, source, workspace, journal
        self._report = report
        self._files = SourceFiles()
        self._sizes = [sum(segment.nbytes for segment in task.segments) for task in plan.tasks]
        self._late_sizes = [sum(part.sizes) for part in plan.late]
        self._total = sum(self._sizes) + sum(self._late_sizes)
        self._done_bytes = sum(map(self._size, journal.results))
        self._unsynced: dict[int, TaskResult] = {}
        self._unsynced_bytes = 0
        self._disk_failed = False
        self._committing: tuple[Future[None], dict[int, TaskResult]] | None = None
        self._committer = ThreadPoolExecutor(1, "flash-moe-commit")
        self._step = ""
        self._last_commit = time.monotonic()

    @property
    def remaining_bytes(self) -> int:
        """Number of bytes still to write."""
        return self._total - self._done_bytes

    def run(self) -> None:
        """Run all unfinished tasks.

        Raises:
            PackError: If a read or write fails; finished tasks are recorded.
            CorruptError: If a source file is truncated.
        """
        made = self._workspace.create(self._plan.file_sizes)
        for number in [n for n in self._journal.results if self._output(n) in made]:  # the file was removed
            del self._journal.results[number]
            self._done_bytes -= self._size(number)
        with (
            BufferCacheShare(_BUFFER_CACHE_BYTES),
            self._committer,
            ThreadPoolExecutor(_THREADS, "flash-moe-pack") as pool,
        ):
            try:
                self._run_tasks(pool)
                self._run_late()
                self._step = "waiting for the disk"  # which may take seconds, with the bar at its end
                self._tell()
                self._commit()
            except OSError as error:
                self._commit_rest()
                raise self._workspace.failure(error, self.remaining_bytes) from error
            except FlashMoEError:
                self._commit_rest()
                raise
            except KeyboardInterrupt:
                self._commit_rest()
                raise
            finally:
                self._files.close()

    def _run_tasks(self, pool: ThreadPoolExecutor) -> None:
        """Fetch each shard, run every task whose shards are all present, and release shards no longer needed."""
        open_tasks = [n for n in range(len(self._plan.tasks)) if n not in self._journal.results]
        needs = {number: self._plan.tasks[number].needs for number in open_tasks}
        users: dict[Path, int] = {}
        for paths in needs.values():
            for path in paths:
                users[path] = users.get(path, 0) + 1
        late = self._late_inputs()
        for path in late.keys() - users.keys():
            users[path] = 0
        if not self._source.by_shard:
            self._run_batch(pool, open_tasks)
            return
        here: set[Path] = set()
        for shard in sorted(users):
            if users[shard] == 0 and self._source.is_kept(shard):
                continue
            self._step = f"download {shard.name}"
            self._tell()
            self._source.fetch(shard)
            here.add(shard)
            self._step = ""
            ready = [number for number in needs if needs[number] <= here]
            self._run_batch(pool, ready)
            for number in ready:
                for path in needs.pop(number):
                    users[path] -= 1
            # Write the journal first: deleted data can't be read again.
            self._commit()
            for path in [path for path in here if users[path] == 0]:
                self._files.close(path)
                self._source.release(path, late.get(path, ()))
                here.remove(path)

    def _run_batch(self, pool: ThreadPoolExecutor, numbers: list[int]) -> None:
        waiting = iter(numbers)
        running: dict[Future[TaskResult], int] = {}

        def submit() -> None:
            if (number := next(waiting, None)) is not None:
                running[pool.submit(self._run_task, self._plan.tasks[number])] = number

        for _ in range(2 * _THREADS):
            submit()
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()  # re-raises the task's exception
                    self._note(running.pop(future), result)
                    submit()
                self._tell()
                if self._is_commit_due():
                    self._begin_commit()
                    # Another program may be filling the disk: stop before it is full.
                    self._workspace.need(self.remaining_bytes)
        finally:
            # No thread may write after this has returned, for whatever reason.
            for future in running:
                future.cancel()
            wait(running)
            for future, number in running.items():
                if not future.cancelled() and future.exception() is None:
                    self._note(number, future.result())

    def _run_task(self, task: Task) -> TaskResult:
        name = task.output
        return task.run(self._files, lambda data, offset: self._workspace.write(name, data, offset))

    def _late_inputs(self) -> dict[Path, tuple[TensorInfo, ...]]:
        return {} if self._is_late_done() else self._plan.late_inputs()

    def _is_late_done(self) -> bool:
        first = len(self._plan.tasks)
        return all(first + i in self._journal.results for i in range(len(self._plan.late)))

    def _run_late(self) -> None:
        """Write the parameters that sanitize computes, on this thread, to which their lazy arrays belong."""
        if self._plan.dense is None or self._is_late_done():
            return
        first = len(self._plan.tasks)
        parts = {n: part for n, part in enumerate(self._plan.late, first) if n not in self._journal.results}
        made_parts = self._plan.dense.evaluate(part.parameter for part in parts.values())
        for (number, part), made in zip(parts.items(), made_parts, strict=True):
            for data, offset in zip(made, part.offsets, strict=True):
                self._workspace.write(part.output, data.data, offset)
            self._note(number, TaskResult(tuple(zlib.crc32(data.data) for data in made), {}))
            self._tell()

    # --- recording finished tasks ---

    def _note(self, number: int, result: TaskResult) -> None:
        self._unsynced[number] = result
        self._unsynced_bytes += self._size(number)
        self._done_bytes += self._size(number)

    def _is_commit_due(self) -> bool:
        if self._committing and not self._committing[0].done():
            return self._unsynced_bytes >= _UNCOMMITTED_BYTES
        return self._unsynced_bytes >= _COMMIT_BYTES or time.monotonic() - self._last_commit > _COMMIT_SECONDS

    def _begin_commit(self) -> None:
        """Record finished tasks once their bytes have reached the disk, while other tasks continue."""
        self._end_commit()
        batch = dict(sorted(self._unsynced.items()))
        self._unsynced.clear()
        self._unsynced_bytes = 0
        self._committing = self._committer.submit(self._sync_and_note, batch), batch
        self._last_commit = time.monotonic()

    def _end_commit(self) -> None:
        if self._committing is None:
            return
        future, batch = self._committing
        self._committing = None
        future.result()
        self._journal.results |= batch

    def _sync_and_note(self, batch: Mapping[int, TaskResult]) -> None:
        try:
            self._workspace.sync({self._output(number) for number in batch})
            self._journal.append(batch)
        except OSError:
            self._disk_failed = True
            raise

    def _commit(self) -> None:
        """Wait until all finished tasks are recorded."""
        self._end_commit()
        if self._unsynced:
            self._begin_commit()
            self._end_commit()

    def _commit_rest(self) -> None:
        """Record what can be recorded; nothing after a failed fsync, as the system reports lost bytes only once."""
        with suppress(OSError):
            if not self._disk_failed:
                self._commit()

    def _output(self, number: int) -> str:
        count = len(self._plan.tasks)
        return self._plan.tasks[number].output if number < count else self._plan.late[number - count].output

    def _size(self, number: int) -> int:
        count = len(self._sizes)
        return self._sizes[number] if number < count else self._late_sizes[number - count]

    def _tell(self) -> None:
        self._report(Progress(self._step, self._done_bytes, self._total))

    # --- the result ---

    def finish(self, small_files: Mapping[str, bytes]) -> None:
        """Write headers, small files and the manifest, and move everything into place.

        Args:
            small_files: Contents of the tokenizer and other copied files, by name.
        """
        segments = self._segments()
        layers = [self._sealed(layer, segments[layer.file_name]) for layer in self._plan.layers]
        headers = {layer.file_name: layer.header() for layer in layers}
        headers |= {file.name: file.header for file in self._plan.dense_files}
        files: dict[str, StoredFile] = {}
        for file in self._plan.dense_files:
            known = [(0, len(file.header), zlib.crc32(file.header)), *segments[file.name]]
            files[file.name] = StoredFile(file.nbytes, combine_segments(known, file.nbytes))
        texts = {**small_files, "config.json": json.dumps(self._plan.config, indent=4).encode()}
        if index := self._index():
            texts[INDEX_NAME] = index
        files |= {name: StoredFile(len(data), zlib.crc32(data)) for name, data in texts.items()}
        manifest = Manifest(
            layers={layer.layer: layer for layer in layers},
            files=files,
            source=self._source_facts(),
            conversion=self._plan.settings.to_json(),
            quantization_error=self._errors(),
        )
        try:
            for name, header in headers.items():
                self._workspace.write(name, memoryview(header), 0)
            self._workspace.sync(set(headers))
            for name, data in texts.items():
                self._workspace.put(name, data)
            self._source.check_unchanged()
            self._workspace.publish([*headers, *texts], manifest.to_bytes())
        except OSError as error:
            raise self._workspace.failure(error, RESERVE_BYTES) from error

    def _segments(self) -> dict[str, list[tuple[int, int, int]]]:
        """Return (offset, length, CRC-32) of all written data by output file, ascending."""
        found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in self._plan.file_sizes}
        for number, task in enumerate(self._plan.tasks):
            for segment, checksum in zip(task.segments, self._journal.results[number].checksums, strict=True):
                found[task.output].append((segment.offset, segment.nbytes, checksum))
        for number, part in enumerate(self._plan.late, len(self._plan.tasks)):
            checksums = self._journal.results[number].checksums
            found[part.output] += zip(part.offsets, part.sizes, checksums, strict=True)
        return {name: sorted(some) for name, some in found.items()}

    def _sealed(self, layer: PackedLayer, segments: list[tuple[int, int, int]]) -> PackedLayer:
        records: list[list[tuple[int, int, int]]] = [[] for _ in layer.experts]
        for offset, nbytes, checksum in segments:
            place, begin = divmod(offset - layer.data_offset, layer.stride)
            records[place].append((begin, nbytes, checksum))
        whole = layer.payload_bytes
        return replace(layer, checksums=tuple(
            some[0][2] if some[0][:2] == (0, whole) else combine_segments(some, whole) for some in records
        ))  # fmt: skip

    def _index(self) -> bytes | None:
        if len(self._plan.dense_files) < 2:
            return None
        weight_map = {tensor.name: file.name for file in self._plan.dense_files for tensor in file.tensors}
        total = sum(tensor.nbytes for file in self._plan.dense_files for tensor in file.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=4).encode()

    def _source_facts(self) -> dict[str, Any]:
        checkpoint = self._source.checkpoint
        ends: dict[Path, int] = {}
        for info in checkpoint.tensors.values():
            ends[info.path] = max(ends.get(info.path, 0), info.offset + info.nbytes)
        return {
            "name": self._source.name,
            "revision": self._source.revision,
            "format": checkpoint.format,
            "samples": self._source.samples,
            "files": {path.relative_to(checkpoint.directory).as_posix(): end for path, end in sorted(ends.items())},
        }

    def _errors(self) -> dict[str, Any]:
        sums: dict[str, ErrorSums] = {}
        for number in range(len(self._plan.tasks)):  # in a fixed order, so that the sums are bit-identical in every run
            for projection, error in self._journal.results[number].errors.items():
                sums.setdefault(projection, ErrorSums()).add(error)
        return {projection: sums[projection].to_json() for projection in sorted(sums)}
