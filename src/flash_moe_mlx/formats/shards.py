"""Finds which of a directory's safetensors files belong to the checkpoint, and all their tensors.

mlx-lm reads every ``model*.safetensors`` and never the index. So an index may be left over from another build, or list
tensors that a conversion dropped. It is used only to tell an unfinished download from a finished one.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError, CorruptError, MissingTensorError
from .safetensors_header import TensorInfo, brief, read_header, read_json, some

INDEX_NAME = "model.safetensors.index.json"

_SHARD_OF = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.safetensors\Z")
_DROPPED = re.compile(
    r"(?:^|[._])(?:vision\w*|visual|vit|image\w*|audio\w*|video\w*|mtp\w*|multi_?modal\w*|mm_projector|\w*projector)\."
)
_AGAIN = "Download the file again."

logger = logging.getLogger(__name__)


def read_shards(directory: Path) -> dict[str, TensorInfo]:
    """Return the tensors of all of a directory's safetensors files by name, each in exactly one file.

    The files are those that model.safetensors.index.json names, where it is of this build; else all of
    ``model*.safetensors``, and without such files all of ``*.safetensors``. They may be links, as in a hub's cache.

    Raises:
        MissingTensorError: If there is no file, or a file or tensor that the index or file names promise is missing.
        CorruptError: If a file or the index breaks its format, or two files contain the same tensor.
    """
    index = _read_index(directory)
    if index is None:
        return _read_files(directory, _find_shards(directory))
    named = sorted(set(index.values()))
    present = [name for name in named if (directory / name).exists()]
    absent = sorted({shard for name, shard in index.items() if shard not in present and not _is_dropped(name)})
    complete = complete_by_name(_list_files(directory))
    if absent:
        if {_numbering(name) for name in absent} & {_numbering(name) for name in complete} or not complete:
            raise MissingTensorError(
                f"[{directory.name}] every file of {INDEX_NAME} must be there, got none named {some(absent)}. "
                "Download the missing files."
            )
        return _read_left_over(directory, complete)
    tensors = _read_files(directory, [directory / name for name in present])
    for name, shard in index.items():
        if (name in tensors and tensors[name].path.name == shard) or _is_dropped(name):
            continue
        if complete and _is_of_another_build(index, tensors):
            return tensors if set(complete) == set(present) else _read_left_over(directory, complete)
        raise MissingTensorError(
            f"[{INDEX_NAME}] {brief(name)} must be in {shard}, got no such tensor there. "
            "Download the index and that file again."
        )
    return tensors


def complete_by_name(names: Iterable[str]) -> list[str]:
    """Return the files known to be complete without an index: all of one ``-of-N``, or model.safetensors; else none."""
    names = sorted(name for name in names if name.startswith("model"))
    if names == ["model.safetensors"]:
        return names
    numberings = {_numbering(name) for name in names}
    if len(numberings) != 1 or None in numberings or _promised(names) != set(names):
        return []
    return names


def _numbering(name: str) -> tuple[str, str] | None:
    """Return stem and N of ``stem-00001-of-N.safetensors``; None for other names."""
    match = _SHARD_OF.match(name)
    return (match[1], match[3]) if match else None


def _promised(names: Iterable[str]) -> set[str]:
    """Return every file that numbered names imply."""
    numberings = {numbering for name in names if (numbering := _numbering(name))}
    return {f"{stem}-{i:05}-of-{count}.safetensors" for stem, count in numberings for i in range(1, int(count) + 1)}


def _is_of_another_build(index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether an index contradicts the actual location of a tensor."""
    return any(index.get(name) != info.path.name for name, info in tensors.items())


def _is_dropped(name: str) -> bool:
    """Return whether text generation doesn't use a tensor, judging by its name, so that it may be missing."""
    return _DROPPED.search(name) is not None


def _read_left_over(directory: Path, complete: Iterable[str]) -> dict[str, TensorInfo]:
    logger.info("%s of %s is of another build, and left out: the files are complete", INDEX_NAME, directory)
    return _read_files(directory, [directory / name for name in complete])


def _read_files(directory: Path, paths: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in read_header(path).items():
            if other := tensors.get(name):
                raise CorruptError(
                    f"[{directory.name}] each tensor must be in one file, got {brief(name)} in {other.path.name} "
                    f"and {path.name}. Remove the files that are not of this checkpoint."
                )
            tensors[name] = info
    return tensors


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json(path, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"[{INDEX_NAME}] weight_map must map tensors to files, got {brief(weight_map)}. {_AGAIN}")
    for name in weight_map.values():
        # Only a plain name is sure to stay inside the directory; its link target is the owner's choice.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\x00-\x1f\ud800-\udfff]{1,200}\.safetensors", name):
            raise CorruptError(
                f"[{INDEX_NAME}] weight_map must hold names of .safetensors files in the directory, "
                f"got {brief(name)}. {_AGAIN}"
            )
    return weight_map


def _list_files(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if name.endswith(".safetensors") and name[0] != ".")
    except OSError as error:
        raise CheckpointError(f"[{directory.name}] must be readable, got {error}. Check its permissions.") from error


def _find_shards(directory: Path) -> list[Path]:
    names = _list_files(directory)
    names = [name for name in names if name.startswith("model")] or names
    if not names:
        raise MissingTensorError(
            f"[{directory.name}] must hold .safetensors files, got none in {directory}. Download them."
        )
    if absent := sorted(_promised(names) - {name for name in names if (directory / name).exists()}):
        raise MissingTensorError(
            f"[{directory.name}] every file that the names promise must be there, got none named {some(absent)}. "
            "Download the missing files."
        )
    return [directory / name for name in names]
