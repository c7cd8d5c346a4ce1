"""The packed checkpoint's own files, byte by byte: the manifest experts.json and the header of each layer's file.

docs/format.md is the specification; this module reads and writes it. No MLX import; no expert bytes are read.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from .expert_layout import PROJECTIONS, Quantization, RecordLayout, record_parts
from .packed_share import MAX_RANKS, LayerShare, ShareLabel, placement_digest
from .safetensors_header import TensorInfo, brief, load_json, read_bytes, read_header, read_metadata
from .schemes import AFFINE, FLOAT_DTYPES, SCHEMES

MANIFEST_NAME = "experts.json"
EXPERTS_FOLDER = "experts"
WORK_FOLDER = ".flash-moe-pack"
"""Folder inside the destination for the unfinished files of `pack`."""

FORMAT = "flash-moe-packed"
VERSION = 1
"""Version of a checkpoint that holds all experts."""

SHARE_VERSION = 2
"""Version of a checkpoint that holds one rank's share of them."""

PAGE_BYTES = 16384
"""Records and the data they follow each other in start on multiples of this: a page of Apple silicon, and what any
system's direct reads ask for."""

_MAX_LAYER = 999_999
_MAX_EXPERTS = 1 << 20
_AGAIN = "Download the checkpoint again, or pack it again."
_CHECKSUM_KEY = "manifest_crc32"
_HEX = re.compile(r"[0-9a-f]*\Z")
_PLAIN_NAME = re.compile(r"[^/\\:\x00-\x1f\ud800-\udfff]{1,200}\Z")


@dataclass(frozen=True)
class PackedLayer:
    """One layer's experts, as described by the manifest.

    Attributes:
        layer: Number of the layer.
        module: Path of the layer's stacked experts in mlx-lm's naming, such as "model.layers.0.mlp.switch_mlp".
        num_experts: E.
        layout: Layout of a record in memory; its parts have the same offsets in the file.
        checksums: CRC-32 of each record's payload, in the file's order.
        share: Which of the experts the file holds; None for all.
    """

    layer: int
    module: str
    num_experts: int
    layout: RecordLayout
    checksums: tuple[int, ...] = field(repr=False)
    share: LayerShare | None = None

    @property
    def experts(self) -> Sequence[int]:
        """Numbers of the experts in the file, in its order."""
        return range(self.num_experts) if self.share is None else self.share.experts

    def place(self, expert: int) -> int | None:
        """Return the position of an expert's record in the file; None if another rank's file has it."""
        return expert if self.share is None else self.share.places.get(expert)

    @property
    def file_name(self) -> str:
        return layer_file_name(self.layer)

    @property
    def tensor_name(self) -> str:
        return f"layers.{self.layer}.records"

    @property
    def payload_bytes(self) -> int:
        """Bytes of a record up to the end of its last part; zeros follow up to the next record."""
        return payload_bytes(self.layout)

    @property
    def stride(self) -> int:
        """Bytes from one record to the next in the file; a multiple of `PAGE_BYTES`."""
        return round_up(self.payload_bytes, PAGE_BYTES)

    @property
    def file_bytes(self) -> int:
        return self.data_offset + len(self.experts) * self.stride

    @property
    def data_offset(self) -> int:
        """First byte of the first record in the file; a multiple of `PAGE_BYTES`."""
        return len(self.header())

    def header(self) -> bytes:
        """Return the file's bytes before the first record: a safetensors header, padded with spaces."""
        count = len(self.experts)
        entry = {"dtype": "U8", "shape": [count, self.stride], "data_offsets": [0, count * self.stride]}
        text = _compact({"__metadata__": self.metadata(), self.tensor_name: entry}).encode()
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
        return struct.pack("<Q", len(text)) + text

    def metadata(self) -> dict[str, str]:
        """Return the header's ``__metadata__``: a copy of the manifest's entry that makes the file self-describing."""
        fields = {
            "format": FORMAT,
            "version": str(VERSION if self.share is None else SHARE_VERSION),
            "layer": str(self.layer),
            "module": self.module,
            "layout": _compact(_layout_to_json(self.layout)),
            "crc32": "".join(f"{value:08x}" for value in self.checksums),
        }
        if self.share is not None:
            fields |= {"rank": str(self.share.rank), "owners": _compact(self.share.owners)}
        return fields

    def to_json(self) -> dict[str, Any]:
        fields = {
            "layer": self.layer,
            "file": self.file_name,
            "module": self.module,
            "num_experts": self.num_experts,
            "record_bytes": self.stride,
            "data_offset": self.data_offset,
            "layout": _layout_to_json(self.layout),
            "crc32": "".join(f"{value:08x}" for value in self.checksums),
        }
        return fields if self.share is None else {**fields, "owners": list(self.share.owners)}


@dataclass(frozen=True)
class StoredFile:
    """Length and CRC-32 of a file that contains no experts."""

    nbytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """Contents of experts.json.

    Attributes:
        layers: Layers by number, ascending.
        files: Every other file of the checkpoint by name: dense shards, config.json, tokenizer files.
        source: Provenance of the packed checkpoint: "name", "revision", "samples", "format", "files" (bytes by name).
        conversion: Settings of the packing.
        quantization_error: Errors by projection, if weights were quantised: "rmse", "max", "relative" and "experts".
    """

    layers: Mapping[int, PackedLayer]
    files: Mapping[str, StoredFile]
    source: Mapping[str, Any]
    conversion: Mapping[str, Any]
    quantization_error: Mapping[str, Any]

    @property
    def share(self) -> ShareLabel | None:
        """The share that the checkpoint is; None if it has all experts."""
        return share_label(self.layers.values())

    def to_bytes(self) -> bytes:
        """Return the file's bytes. Equal manifests give equal bytes."""
        label = self.share
        fields = {
            "format": FORMAT,
            "version": VERSION if label is None else SHARE_VERSION,
            "source": dict(self.source),
            "conversion": dict(self.conversion),
            "quantization_error": dict(self.quantization_error),
            "layers": [layer.to_json() for layer in self.layers.values()],
            "files": {
                name: {"bytes": file.nbytes, "crc32": f"{file.crc32:08x}"} for name, file in sorted(self.files.items())
            },
        }
        if label is not None:
            fields["share"] = {"rank": label.rank, "ranks": label.ranks, "placement": f"{label.placement:08x}"}
        text = json.dumps(fields, indent=1).removesuffix("\n}").encode()
        return text + _manifest_end(zlib.crc32(text))


def layer_file_name(layer: int) -> str:
    """Return the path of a layer's experts, relative to the checkpoint's directory."""
    return f"{EXPERTS_FOLDER}/layer_{layer:02d}.safetensors"


def share_label(layers: Iterable[PackedLayer]) -> ShareLabel | None:
    """Return the share that these layers, all of a checkpoint's, are; None if they have all experts."""
    shares = {layer.layer: layer.share for layer in layers if layer.share is not None}
    if not shares:
        return None
    first = next(iter(shares.values()))
    digest = placement_digest(first.ranks, {layer: share.owners for layer, share in shares.items()})
    return ShareLabel(first.rank, first.ranks, digest)


def payload_bytes(layout: RecordLayout) -> int:
    """Return the bytes of a record up to the end of its last part."""
    return layout.parts[-1].offset + layout.parts[-1].nbytes


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is at least ``value``."""
    return -(-value // multiple) * multiple


def read_manifest(directory: Path) -> Manifest | None:
    """Read and check a directory's manifest. Returns None if there is none, so that it isn't a packed checkpoint.

    Raises:
        CorruptError: If it breaks the format's rules or doesn't match its checksum.
        UnsupportedModelError: If it has a later version.
        MissingTensorError: If the checkpoint's packing is unfinished.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        if (directory / WORK_FOLDER).is_dir():
            raise MissingTensorError(
                f"[{directory.name}] must be packed completely, got an unfinished packing. "
                'Run the same "flash-moe pack" again: it continues where it stopped.'
            )
        return None
    return parse_manifest(read_bytes(path, _AGAIN))


def parse_manifest(data: bytes) -> Manifest:
    """Parse the bytes of an experts.json. Raises as `read_manifest`."""
    value = load_json(data, MANIFEST_NAME, _AGAIN)
    fields = _object(value, "the manifest", None)
    if fields.get("format") != FORMAT:
        raise _corrupt(f"format must be {FORMAT!r}", fields.get("format"))
    version = fields.get("version")
    if version not in (VERSION, SHARE_VERSION) or type(version) is not int:
        raise UnsupportedModelError(
            f"[{MANIFEST_NAME}] version must be {VERSION} or {SHARE_VERSION}, got {brief(version)}. "
            "Update flash_moe_mlx, or pack the checkpoint again."
        )
    keys = {"format", "version", "source", "conversion", "quantization_error", "layers", "files", _CHECKSUM_KEY}
    _object(fields, "the manifest", keys | ({"share"} if version == SHARE_VERSION else set()))
    text, end = data[: -len(_manifest_end(0))], data[-len(_manifest_end(0)) :]
    if end != _manifest_end(zlib.crc32(text)):
        raise _corrupt("its bytes must have the CRC-32 that it ends with", brief(end.decode("utf-8", "replace")))
    if not isinstance(fields["layers"], list) or not fields["layers"]:
        raise _corrupt("layers must list at least one", fields["layers"])
    label = _share_label(fields["share"]) if version == SHARE_VERSION else None
    layers = [_layer(entry, label) for entry in fields["layers"]]
    numbers = [layer.layer for layer in layers]
    if numbers != sorted(set(numbers)):
        raise _corrupt("layers must ascend", numbers)
    if share_label(layers) != label:
        raise _corrupt("share's placement must be that of the layers' owners", fields["share"])
    source = _object(fields["source"], "source", {"name", "revision", "samples", "format", "files"})
    return Manifest(
        layers={layer.layer: layer for layer in layers},
        files=dict(_files(fields["files"])),
        source=source,
        conversion=_object(fields["conversion"], "conversion", None),
        quantization_error=_object(fields["quantization_error"], "quantization_error", None),
    )


def read_layer(directory: Path, layer: PackedLayer) -> TensorInfo:
    """Return the single tensor of a layer's file, after comparing its header with the manifest.

    Raises:
        MissingTensorError: If the file is missing.
        CorruptError: If header and manifest contradict each other.
    """
    path = directory / layer.file_name
    tensors = read_header(path)
    expected = TensorInfo(
        layer.tensor_name, path, "U8", (len(layer.experts), layer.stride), layer.data_offset,
        len(layer.experts) * layer.stride,
    )  # fmt: skip
    if list(tensors.values()) != [expected] or read_metadata(path) != layer.metadata():
        raise CorruptError(
            f"[{layer.file_name}] header must say what {MANIFEST_NAME} says of layer {layer.layer}, got another. "
            "Download both files again, or pack the checkpoint again."
        )
    return tensors[layer.tensor_name]


def _share_label(value: Any) -> ShareLabel:
    entry = _object(value, "share", {"rank", "ranks", "placement"})
    ranks = _integer(entry["ranks"], "share's ranks", 2, MAX_RANKS)
    rank = _integer(entry["rank"], "share's rank", 0, ranks - 1)
    text = entry["placement"]
    if not isinstance(text, str) or len(text) != 8 or not _HEX.match(text):
        raise _corrupt("share's placement must be 8 hexadecimal digits", text)
    return ShareLabel(rank, ranks, int(text, 16))


def _layer_share(value: Any, label: ShareLabel, num_experts: int, where: str) -> LayerShare:
    if not isinstance(value, list) or len(value) != num_experts:
        raise _corrupt(where + f"owners must list a rank for each of {num_experts} experts", value)
    owners = tuple(_integer(owner, where + "owner", 0, label.ranks - 1) for owner in value)
    if len(set(owners)) != label.ranks:
        raise _corrupt(where + f"each of {label.ranks} ranks must own an expert", sorted(set(owners)))
    return LayerShare(label.rank, label.ranks, owners)


def _layer(value: Any, label: ShareLabel | None) -> PackedLayer:
    keys = {"layer", "file", "module", "num_experts", "record_bytes", "data_offset", "layout", "crc32"}
    entry = _object(value, "a layer", keys if label is None else keys | {"owners"})
    layer = _integer(entry["layer"], "layer", 0, _MAX_LAYER)
    where = f"layer {layer}: "
    num_experts = _integer(entry["num_experts"], where + "num_experts", 1, _MAX_EXPERTS)
    if not isinstance(entry["module"], str) or not re.fullmatch(r"[\w.]{1,300}", entry["module"], re.ASCII):
        raise _corrupt(where + "module must be a module's path", entry["module"])
    if f".layers.{layer}." not in f".{entry['module']}":
        raise _corrupt(where + "module must be of this layer", entry["module"])
    share = None if label is None else _layer_share(entry["owners"], label, num_experts, where)
    count = num_experts if share is None else len(share.experts)
    text = entry["crc32"]
    if not isinstance(text, str) or len(text) != 8 * count or not _HEX.match(text):
        raise _corrupt(where + f"crc32 must be {count} times 8 hexadecimal digits", text)
    checksums = tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))
    result = PackedLayer(layer, entry["module"], num_experts, _layout(entry["layout"], where), checksums, share)
    for key, expected in (
        ("file", result.file_name),
        ("record_bytes", result.stride),
        ("data_offset", result.data_offset),
    ):
        if entry[key] != expected or type(entry[key]) is not type(expected):
            raise _corrupt(where + f"{key} must be {expected!r}", entry[key])
    return result


def _layout_to_json(layout: RecordLayout) -> dict[str, Any]:
    return {
        "parts": [[part.name, part.dtype, list(part.shape), part.offset] for part in layout.parts],
        "quantization": {
            projection: quantization and _quantization_to_json(quantization)
            for projection, quantization in layout.quantizations
        },
    }


def _quantization_to_json(quantization: Quantization) -> dict[str, Any]:
    sizes = {"bits": quantization.bits, "group_size": quantization.group_size}
    return sizes if quantization.mode == AFFINE.mode else {**sizes, "mode": quantization.mode}


def _quantization(value: Any, where: str) -> Quantization | None:
    if value is None:
        return None
    mode = value["mode"] if isinstance(value, dict) and "mode" in value else AFFINE.mode
    scheme = SCHEMES.get(mode) if isinstance(mode, str) else None
    if scheme is None:
        raise _corrupt(where + "mode must be a known one", mode)
    stated = _object(value, where, {"bits", "group_size"} | (value.keys() & {"mode"} if mode != AFFINE.mode else set()))
    bits, group_size = stated["bits"], stated["group_size"]
    if type(bits) is not int or type(group_size) is not int or not scheme.allows(bits, group_size):
        raise _corrupt(where + f" must be of {scheme.sizes_in_words}", stated)
    return Quantization(bits, group_size, mode)


def _layout(value: Any, where: str) -> RecordLayout:
    entry = _object(value, where + "layout", {"parts", "quantization"})
    quantizations: dict[str, Quantization | None] = {}
    section = _object(entry["quantization"], where + "quantization", None)
    if section.keys() not in ({*PROJECTIONS}, {*PROJECTIONS[1:]}):
        raise _corrupt(where + f"quantization must name {', '.join(PROJECTIONS)}, or the last two", sorted(section))
    for projection in (p for p in PROJECTIONS if p in section):
        quantizations[projection] = _quantization(section[projection], where + projection)
    if not isinstance(entry["parts"], list) or len(entry["parts"]) > len(PROJECTIONS) * len(record_parts()):
        raise _corrupt(where + "parts must be a list", entry["parts"])
    specs: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    offsets = []
    for part in entry["parts"]:
        if not isinstance(part, list) or len(part) != 4:
            raise _corrupt(where + "a part must be [name, dtype, shape, offset]", part)
        name, dtype, shape, offset = part
        projection, _, kind = name.partition(".") if isinstance(name, str) else ("", "", "")
        if projection not in PROJECTIONS or kind not in record_parts() or (projection, kind) in specs:
            raise _corrupt(where + "a part's name must be that of one tensor of an expert", name)
        if dtype not in (*FLOAT_DTYPES, "U32", "U8"):
            raise _corrupt(where + f"{name} must be U32, U8, F16, BF16 or F32", dtype)
        if not isinstance(shape, list) or len(shape) > 2:
            raise _corrupt(where + f"{name} must have two dimensions at most", shape)
        for size in shape:
            _integer(size, where + name, 1, 2**31 - 1)
        specs[projection, kind] = (dtype, tuple(shape))
        offsets.append(offset)
    _check_shapes(specs, quantizations, where)
    layout = RecordLayout.contiguous(specs, quantizations)
    if [p.name for p in layout.parts] != [".".join(key) for key in specs] or [
        p.offset for p in layout.parts
    ] != offsets:
        raise _corrupt(where + f"parts must lie at {[p.offset for p in layout.parts]}, in the format's order", offsets)
    return layout


def _check_shapes(
    specs: Mapping[tuple[str, str], tuple[str, tuple[int, ...]]],
    quantizations: Mapping[str, Quantization | None],
    where: str,
) -> None:
    """Check that shapes, dtypes and quantisation of the three projections are consistent."""
    sizes: dict[str, tuple[int, int]] = {}
    for projection, quantization in quantizations.items():
        dtype, shape = specs.get((projection, "weight"), ("", ()))
        if len(shape) != 2:
            raise _corrupt(where + f"{projection}.weight must be there, with two dimensions", shape)
        rows, width = shape
        parts = {part: spec for (p, part), spec in specs.items() if p == projection and part != "bias"}
        if quantization is None:
            good = dtype in FLOAT_DTYPES and len(parts) == 1
        else:
            scheme, shapes = quantization.scheme, {part: s for part, (_, s) in parts.items()}
            width = scheme.width(width, quantization.bits)
            good = scheme.accepts({part: d for part, (d, _) in parts.items()})
            good = good and len({d for d, _ in parts.values() if d in FLOAT_DTYPES}) <= 1
            good = good and scheme.fits(shapes, quantization.bits, quantization.group_size)
        bias = specs.get((projection, "bias"))
        if not good or (bias is not None and (bias[0] not in FLOAT_DTYPES or bias[1] != (rows,))):
            raise _corrupt(where + f"{projection}'s parts must fit each other and its quantisation", specs)
        sizes[projection] = rows, width
    if not sizes.get("gate_proj", sizes["up_proj"]) == sizes["up_proj"] == sizes["down_proj"][::-1]:
        raise _corrupt(where + "the projections' shapes must belong together", sizes)


def _files(value: Any) -> Iterator[tuple[str, StoredFile]]:
    for name, entry in _object(value, "files", None).items():
        if not _PLAIN_NAME.match(name) or name in (".", "..", MANIFEST_NAME):
            raise _corrupt("files must be names in the directory", name)
        entry = _object(entry, "a file", {"bytes", "crc32"})
        text = entry["crc32"]
        if not isinstance(text, str) or len(text) != 8 or not _HEX.match(text):
            raise _corrupt(f"{name}: crc32 must be 8 hexadecimal digits", text)
        yield name, StoredFile(_integer(entry["bytes"], name, 0, 2**63 - 1), int(text, 16))


def _manifest_end(checksum: int) -> bytes:
    """Return the manifest's end: the CRC-32 of all bytes before it, and the closing bracket."""
    return f',\n "{_CHECKSUM_KEY}": "{checksum:08x}"\n}}\n'.encode()


def _object(value: Any, what: str, keys: set[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict) or (keys is not None and value.keys() != keys):
        got = sorted(value) if isinstance(value, dict) else value
        raise _corrupt(f"{what} must be an object" + (f" of {', '.join(sorted(keys))}" if keys else ""), got)
    return value


def _integer(value: Any, what: str, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise _corrupt(f"{what} must be an integer from {lowest} to {highest}", value)
    return value


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _corrupt(must: str, got: object) -> CorruptError:
    return CorruptError(f"[{MANIFEST_NAME}] {must}, got {brief(got)}. {_AGAIN}")
