"""Reads only a safetensors file's header: which tensor is at which bytes.

Non-goals: tensor data is never read or mapped here, and nothing is written. The rules are the format's own
(https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length N, N bytes of JSON
that begins with ``{``, then the data, which the tensors' offsets cover without overlap or hole up to the
last byte of the file. A file that breaks one of them is refused with a `CheckpointError`; no content of a
header can end in another kind of exception.

`shards` does the same for all files of a directory, by index or by name.
"""

import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CorruptError, MissingTensorError
from .expert_layout import DTYPE_BYTES

MAX_HEADER_BYTES = 100_000_000
"""The format's cap on the header, which bounds what parsing a hostile one can cost."""

MAX_FILE_BYTES = 2**63 - 1
"""Offsets are file positions, so this is the most any of them (or any dimension) can be."""

DTYPE_BITS = {
    **{name: 8 * nbytes for name, nbytes in DTYPE_BYTES.items()},
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
"""Bits an element of every dtype of the format: those a record may hold, and those only skipped over."""

_LFS_PREFIX = b"version https://git-lfs"

_AGAIN = "Download the file again."
_LFS_ADVICE = 'Run "git lfs pull" in the checkpoint\'s folder, or download the file again.'
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of one tensor's bytes.

    Attributes:
        name: Tensor name in the file.
        path: The file.
        dtype: dtype name in the format, such as "U32" or "BF16".
        shape: Dimensions; () for a scalar.
        offset: First byte, from the start of the file.
        nbytes: Length in bytes: product of the shape times the dtype's size.
        modified_ns: Time of the file's last modification when the header was read; None if unknown.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    modified_ns: int | None = field(default=None, compare=False)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, in the order of their offsets.

    Raises:
        MissingTensorError: If there is no such file.
        CorruptError: If the file breaks a rule of the format, is truncated, or is a Git LFS pointer.
        CheckpointError: If the file can't be read at all.

    Cost: reads 8 bytes and the header.
    """
    return _read(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the file's ``__metadata__``: free text by key, empty if there is none. Raises as `read_header`."""
    return _read(path)[1]


def read_json(path: Path, advice: str, *, infinity: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file. ``advice`` says what to do if it is missing or broken.

    Args:
        path: The file.
        advice: Advice at the end of messages.
        infinity: Whether infinite numbers are allowed, as Python writes them.

    Raises:
        CorruptError: If it is not a JSON object.
        CheckpointError: For the reasons that `read_bytes` gives.
    """
    value = load_json(read_bytes(path, advice), path.name, advice, infinity=infinity)
    if not isinstance(value, dict):
        raise CorruptError(f"[{path.name}] must be a JSON object, got {brief(value)}. {advice}")
    return value


def read_bytes(path: Path, advice: str) -> bytes:
    """Read a file to be parsed as JSON; refuse oversized files and Git LFS pointers.

    Raises:
        MissingTensorError: If there is no such file.
        CorruptError: If it is too large, or a Git LFS pointer.
        CheckpointError: If it can't be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"[{path.name}] must be a file, got something else at {path}. {advice}")
        with path.open("rb") as file:
            data = file.read(MAX_HEADER_BYTES + 1)
    except FileNotFoundError as error:
        raise MissingTensorError(f"[{path.name}] must be in {path.parent}, got no such file. {advice}") from error
    except OSError as error:
        raise CheckpointError(f"[{path.name}] must be readable, got {error}. Check its permissions.") from error
    if data.startswith(_LFS_PREFIX):
        raise CorruptError(f"[{path.name}] must be JSON, got a Git LFS pointer. {_LFS_ADVICE}")
    if len(data) > MAX_HEADER_BYTES:
        raise CorruptError(f"[{path.name}] must have at most {MAX_HEADER_BYTES} bytes, got more. {advice}")
    return data


def load_json(data: bytes, where: str, advice: str = _AGAIN, *, unique: bool = True, infinity: bool = False) -> Any:
    """Parse untrusted JSON: UTF-8, no NaN, no depth or number that breaks the parser.

    Args:
        data: The text.
        where: Origin at the start of messages.
        advice: Advice at the end of messages.
        unique: Whether a key may appear only once in an object.
        infinity: Whether infinite numbers are allowed, as Python writes them.

    Raises:
        CorruptError: If the data breaks one of these rules.
    """

    def constant(text: str) -> float:
        if text == "NaN" or not infinity:
            raise CorruptError(f"[{where}] must be valid JSON, got the number {text}. {advice}")
        return float(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CorruptError(f"[{where}] every JSON key must appear once, got {brief(twice)} twice. {advice}")
        return result

    try:
        hook = once if unique else None
        return json.loads(data.decode("utf-8"), object_pairs_hook=hook, parse_constant=constant)
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}"
        raise CorruptError(f"[{where}] must be UTF-8, got {problem}. {advice}") from error
    except ValueError as error:  # JSONDecodeError, or an integer of more digits than Python converts
        raise CorruptError(f"[{where}] must be valid JSON, got ({brief(error, 200)}). {advice}") from error
    except RecursionError:
        raise CorruptError(f"[{where}] must be valid JSON, got one nested too deeply. {advice}") from None
    except MemoryError:
        problem = f"{len(data)} bytes that do not"
        raise CorruptError(f"[{where}] must be JSON that fits in memory, got {problem}. {advice}") from None


def check_depth(value: Any, where: str, advice: str = _AGAIN, *, most: int = 64) -> None:
    """Refuse JSON nested deeper than ``most`` levels, because copying and printing values is recursive.

    Raises:
        CorruptError: If it is too deep. ``where`` starts the message, ``advice`` ends it.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise CorruptError(f"[{where}] must nest at most {most} levels deep, got more. {advice}")


def brief(value: object, limit: int = 120) -> str:
    """Format a value from an untrusted file for a message: quoted if text, and at most ``limit`` characters."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (RecursionError, ValueError):  # deep nesting; an integer of too many digits to print
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def some(names: list[str]) -> str:
    """Format the first three names for a message, and the number of others."""
    return ", ".join(map(brief, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    where = path.name
    try:
        # Check before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"[{where}] must be a file, got something else at {path}. {_AGAIN}")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            start = file.read(max(8, len(_LFS_PREFIX)))
            length = _header_length(start, size, where)
            file.seek(8)
            data = file.read(length)
    except FileNotFoundError as error:
        raise MissingTensorError(f"[{where}] must exist, got no such file {path}. {_AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"[{where}] must be readable, got {error}. Check its permissions.") from error
    if len(data) < length:
        raise CorruptError(f"[{where}] header must have {length} bytes, got {len(data)}. {_AGAIN}")
    header = load_json(data, f"{where} header")
    if not isinstance(header, dict):  # unreachable while it must begin with "{"
        raise CorruptError(f"[{where}] header must be a JSON object, got {type(header).__name__}. {_AGAIN}")
    metadata = _metadata(header.pop("__metadata__", {}), where)
    return _tensors(header, path, 8 + length, status), metadata


def _header_length(start: bytes, size: int, where: str) -> int:
    if size == 0:
        raise CorruptError(f"[{where}] must be a safetensors file, got an empty file. {_AGAIN}")
    if start.startswith(_LFS_PREFIX):
        raise CorruptError(
            f"[{where}] must be a safetensors file, got a Git LFS pointer of {size} bytes. {_LFS_ADVICE}"
        )
    if len(start) < 10:
        raise CorruptError(f"[{where}] must have at least 10 bytes, got {size}: it is truncated. {_AGAIN}")
    (length,) = struct.unpack("<Q", start[:8])
    if length < 2 or length > MAX_HEADER_BYTES:
        raise CorruptError(
            f"[{where}] header must have 2 to {MAX_HEADER_BYTES} bytes, got {length}: "
            f"this is not a safetensors file. {_AGAIN}"
        )
    if start[8:9] != b"{":
        raise CorruptError(f"[{where}] header must begin with '{{', got {start[8:9]!r}. {_AGAIN}")
    if 8 + length > size:
        raise CorruptError(
            f"[{where}] header must end inside the file, got {8 + length - size} bytes too few: "
            f"the file is truncated. {_AGAIN}"
        )
    return int(length)


def _metadata(metadata: Any, where: str) -> dict[str, str]:
    if metadata is None:  # what mx.save_safetensors writes without metadata; the format's own reader takes it too
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptError(f"[{where}] __metadata__ must map text to text, got {brief(metadata)}. {_AGAIN}")
    return metadata


def _tensors(header: Mapping[str, Any], path: Path, data_start: int, status: os.stat_result) -> dict[str, TensorInfo]:
    size = status.st_size
    infos = [_tensor(name, entry, path, data_start, status.st_mtime_ns) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = data_start
    for info in infos:
        if info.offset != end:
            problem = "overlap" if info.offset < end else "hole"
            raise CorruptError(
                f"[{path.name}] tensor data must follow without overlap or hole, got {brief(info.name)} at "
                f"byte {info.offset - data_start} where {end - data_start} was due ({problem}). {_AGAIN}"
            )
        end += info.nbytes
    if size < end:
        raise CorruptError(
            f"[{path.name}] must have {end} bytes, got {size}: the file is truncated by {end - size} bytes. {_AGAIN}"
        )
    if size > end:
        more = size - end
        raise CorruptError(f"[{path.name}] must end with its last tensor, got {more} bytes more. {_AGAIN}")
    return {info.name: info for info in infos}


def _tensor(name: str, entry: Any, path: Path, data_start: int, modified_ns: int) -> TensorInfo:
    def refuse(must: str, got: object) -> CorruptError:
        return CorruptError(f"[{path.name}] tensor {brief(name)}: {must}, got {brief(got)}. {_AGAIN}")

    if not isinstance(entry, dict) or entry.keys() != _TENSOR_KEYS:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise refuse("must have dtype, shape and data_offsets and nothing else", got)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse("dtype must be one of the format's", dtype)
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise refuse("shape must be a list of sizes from 0", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise refuse("data_offsets must be two positions from 0", offsets)
    begin, end = offsets
    if begin > end:
        raise refuse("data_offsets must ascend", offsets)
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        bits *= dimension
        # Refused at the first step too far: the full product of many large dimensions would take minutes.
        # Only a later zero could bring it back, and the format's own reader refuses that overflow as well.
        if bits > 8 * MAX_FILE_BYTES:
            raise refuse("shape must describe data that a file can hold", shape)
    if bits % 8 or bits // 8 != end - begin:
        raise refuse(f"{dtype} of shape {brief(shape)} must have {bits / 8:.16g} bytes", end - begin)
    return TensorInfo(name, path, dtype, tuple(shape), data_start + begin, end - begin, modified_ns)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_FILE_BYTES  # type(), because bool is an int
