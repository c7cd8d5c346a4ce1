"""verify(): checks a checkpoint against its headers, config.json and, if packed, its manifest.

A stock checkpoint has no checksums, so only its structure is checked. For a packed one, every byte can be checked.
"""

import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import system
from ..errors import CheckpointError, CorruptError, FlashMoEError, MissingTensorError, RequestError
from ..formats.checkpoint import Checkpoint
from ..formats.packed_format import MANIFEST_NAME, Manifest, PackedLayer
from ..stats import NamedRows, format_bytes

SAMPLED_RECORDS = 4
"""Records per layer in a sample: the first, the last, and evenly spaced ones in between."""

_COMPARED_RECORDS = 2
_CHUNK_BYTES = 8 << 20
_THREADS = 4


@dataclass(frozen=True)
class Problem:
    """A problem found by a check.

    Attributes:
        file: File name in the checkpoint.
        message: Description, and what to do.
        layer, expert, offset: Location, where applicable.
    """

    file: str
    message: str
    layer: int | None = None
    expert: int | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Report(NamedRows):
    """Result of a check. Prints as a short table, and as HTML in a notebook; true if there are no problems.

    Attributes:
        path: The checkpoint's directory.
        format: "packed", "mlx", "hf-fused", "hf-per-expert", or "" if it could not be opened.
        full: Whether all bytes were compared with checksums.
        records: Number of records compared with their checksums.
        all_records: Number of records in the checkpoint.
        files: Number of other files compared with their checksums.
        compared: Number of records compared with the source's.
        bytes_read: Bytes read by the check.
        problems: Problems found.
        share: The rank's share that the checkpoint holds, in words; empty if it holds all experts.
    """

    path: Path
    format: str
    full: bool
    records: int = 0
    all_records: int = 0
    files: int = 0
    compared: int = 0
    bytes_read: int = 0
    problems: tuple[Problem, ...] = field(default=())
    share: str = ""

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in display order."""
        checked = f"{self.records:,} of {self.all_records:,} match their checksums"
        if self.format != "packed":
            checked = f"{self.all_records:,}, structure only: this format has no checksums"
        rows = [
            ("checkpoint", str(self.path)),
            ("format", (self.format or "not readable") + (f", {self.share}" if self.share else "")),
            ("records", checked + ("" if self.full or self.format != "packed" else " (a sample: full=True reads all)")),
        ]
        if self.format == "packed":
            rows.append(("other files", f"{self.files} match their checksums"))
        rows.append(("bytes read", format_bytes(self.bytes_read)))
        if self.compared:
            rows.append(("source", f"{self.compared} records are what its source makes"))
        count = len(self.problems)
        rows.append(("result", "good" if self.ok else f"FAILED: {count} problem{'s' if count > 1 else ''}"))
        return rows + [("problem", problem.message) for problem in self.problems[:20]]

    def to_json(self) -> dict[str, Any]:
        """Return the value that ``flash-moe verify --json`` prints."""
        return {
            "path": str(self.path), "format": self.format, "share": self.share, "ok": self.ok, "full": self.full,
            "records": self.records, "all_records": self.all_records, "files": self.files,
            "compared": self.compared, "bytes_read": self.bytes_read,
            "problems": [vars(problem) for problem in self.problems],
        }  # fmt: skip


def verify(
    path: str | Path,
    *,
    full: bool = False,
    against: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a checkpoint's structure and, if it is packed, its bytes.

    Checks headers, ranges and shapes against each other and config.json. For a packed checkpoint, also compares
    small files and a sample of the records with their checksums; ``full`` compares everything.

    Args:
        path: A checkpoint's directory.
        full: Read every byte.
        against: The source checkpoint: some records are packed again from it and must have the same bytes.
        progress: Function called with the bytes checked so far and the total.

    Returns:
        The report. Problems of the files are reported, not raised.

    Raises:
        RequestError: If ``against`` is unusable.
    """
    directory = Path(path).expanduser()
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        return Report(directory, "", full, problems=(Problem(_file_of(error), str(error)),))
    manifest = checkpoint.manifest
    if manifest is None:
        records = sum(checkpoint.num_experts(layer) for layer in checkpoint.moe_layers)
        if against is not None:
            raise RequestError(
                f"[against] only a packed checkpoint is compared with a source, got {checkpoint.format}. Leave it out."
            )
        return Report(directory, checkpoint.format, full, all_records=records)
    records = sum(len(layer.experts) for layer in manifest.layers.values())
    jobs = [*_file_jobs(directory, manifest, full), *_record_jobs(directory, manifest, full)]
    total, done = sum(job.nbytes for job in jobs), 0
    problems: list[Problem] = []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="flash-moe-verify") as pool:
        for job, problem in zip(jobs, pool.map(_Job.run, jobs), strict=True):
            problems += [problem] if problem else []
            done += job.nbytes
            if progress is not None:
                progress(done, total)
    compared = 0
    if against is not None:
        compared, different = _compare(checkpoint, Path(against).expanduser())
        problems += different
    return Report(
        directory, "packed", full,
        records=sum(job.expert is not None for job in jobs), all_records=records,
        files=sum(job.expert is None for job in jobs), compared=compared, bytes_read=total,
        problems=tuple(problems), share=str(manifest.share or ""),
    )  # fmt: skip


def check_other_files(directory: Path, manifest: Manifest) -> None:
    """Compare all files except the experts' with their checksums.

    Raises:
        CorruptError: If a file doesn't match its checksum.
        MissingTensorError: If a file is missing.
    """
    jobs = list(_file_jobs(directory, manifest, full=True))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="flash-moe-verify") as pool:
        for problem in pool.map(_Job.run, jobs):
            if problem:
                absent = not (directory / problem.file).exists()
                raise (MissingTensorError if absent else CorruptError)(problem.message)


@dataclass(frozen=True)
class _Job:
    """A byte range to compare with a checksum; for a record, ``zeros`` zero bytes must follow it."""

    path: Path
    name: str
    offset: int
    nbytes: int
    crc32: int
    whole_file: bool = False
    zeros: int = 0
    layer: int | None = None
    expert: int | None = None

    def run(self) -> Problem | None:
        try:
            problem = self._check()
        except FileNotFoundError:
            problem = "must be there, got no such file"
        except OSError as error:
            problem = f"must be readable, got {error}"
        if problem is None:
            return None
        where = self.name if self.expert is None else f"{self.name} layer {self.layer} expert {self.expert}"
        message = f"[{where}] {problem}. Download the file again, or pack the checkpoint again."
        return Problem(self.name, message, self.layer, self.expert, self.offset)

    def _check(self) -> str | None:
        checksum = done = 0
        with self.path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            if self.whole_file and size != self.nbytes:
                return f"must have {self.nbytes} bytes, got {size}"
            file.seek(self.offset)
            # The page cache may hide damage on the disk.
            system.avoid_page_cache(file.fileno())
            system.drop_pages(file.fileno(), self.offset, self.nbytes)
            while done < self.nbytes:
                data = file.read(min(_CHUNK_BYTES, self.nbytes - done))
                if not data:
                    return f"must have {self.nbytes} bytes at offset {self.offset}, got {done}"
                checksum = zlib.crc32(data, checksum)
                done += len(data)
            rest = file.read(self.zeros)
        if checksum != self.crc32:
            return f"{self.nbytes} bytes at offset {self.offset} must have CRC-32 {self.crc32:08x}, got {checksum:08x}"
        if len(rest) < self.zeros or any(rest):
            return f"{self.zeros} bytes at offset {self.offset + self.nbytes} must be zero, got others"
        return None


def _file_jobs(directory: Path, manifest: Manifest, full: bool) -> Iterable[_Job]:
    for name, file in manifest.files.items():
        if full or not name.endswith(".safetensors"):
            yield _Job(directory / name, name, 0, file.nbytes, file.crc32, whole_file=True)


def _record_jobs(directory: Path, manifest: Manifest, full: bool) -> Iterable[_Job]:
    for layer in manifest.layers.values():
        path = directory / layer.file_name
        for place in range(len(layer.experts)) if full else _sample(layer, SAMPLED_RECORDS):
            expert = layer.experts[place]
            yield _Job(
                path, layer.file_name, layer.data_offset + place * layer.stride, layer.payload_bytes,
                layer.checksums[place], zeros=layer.stride - layer.payload_bytes, layer=layer.layer, expert=expert,
            )  # fmt: skip


def _sample(layer: PackedLayer, count: int) -> list[int]:
    """Return the positions of some records in a layer's file."""
    last = len(layer.experts) - 1
    return sorted({last * number // max(1, count - 1) for number in range(count)})


def _compare(checkpoint: Checkpoint, source: Path) -> tuple[int, list[Problem]]:
    """Pack some records again from the source. Returns the number of equal ones and problems of the others."""
    from .plan import make_plan
    from .settings import PackSettings
    from .tasks import SourceFiles

    assert checkpoint.manifest is not None
    try:
        settings = PackSettings.from_json(checkpoint.manifest.conversion)
        plan = make_plan(Checkpoint.open(source), settings, by_shard=False)
    except FlashMoEError as error:
        raise RequestError(f"[against] {source} must be the source of this checkpoint, got: {error}") from error
    if {p.layer: p.layout for p in plan.layers} != {n: p.layout for n, p in checkpoint.manifest.layers.items()}:
        raise RequestError(f"[against] {source} must be the source of this checkpoint, got one of other shapes.")
    same, problems = 0, []
    files = SourceFiles()
    try:
        for layer in checkpoint.manifest.layers.values():
            for place in _sample(layer, _COMPARED_RECORDS):
                expert = layer.experts[place]
                made, _ = plan.record_task(layer.layer, expert).make(files)
                if zlib.crc32(made[0, : layer.payload_bytes].data) == layer.checksums[place]:
                    same += 1
                else:
                    message = (
                        f"[{layer.file_name}] layer {layer.layer} expert {expert} must be what {source.name} makes, "
                        "got other bytes. It was packed from another source, or with another version of MLX."
                    )
                    problems.append(Problem(layer.file_name, message, layer.layer, expert))
    finally:
        files.close()
    return same, problems


def _file_of(error: CheckpointError) -> str:
    """Return the file name at the start of an error message."""
    text = str(error)
    return text[1:].split("]")[0].split(" ")[0] if text.startswith("[") else MANIFEST_NAME
