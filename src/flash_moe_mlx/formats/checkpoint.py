"""Locates every expert's bytes: reads and checks a checkpoint's headers and config.json, but no tensor data.

All checks run when the checkpoint is opened, so that no later request fails for a reason visible in the headers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, CorruptError, MissingTensorError, RequestError, UnsupportedModelError
from .config_fields import GENERAL_FIELDS, read_field
from .config_files import check_config, read_config
from .expert_layout import Quantization, RecordLayout
from .expert_names import UNREAD, parse_name
from .expert_tensors import Found, Part, Parts, layer_parts, resolve
from .packed_format import Manifest, PackedLayer, payload_bytes, read_layer, read_manifest
from .quantization import QuantizationSettings, Stored, mlx_name
from .repacking import REPACKED_PARTS, affine_parts
from .safetensors_header import TensorInfo, brief
from .schemes import part_names
from .shards import read_shards

_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_SIZES = (
    # Experts with a latent width have their own key for it, which takes precedence.
    (("routed_expert_hidden_size", "moe_hidden_size", "moe_latent_size", "hidden_size"), "down_proj"),
    (("moe_intermediate_size",), "up_proj"),
)
_GENERAL = {field.name: field for field in GENERAL_FIELDS}
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,6})\.")
_AGAIN = "Download the checkpoint again."

# Modules that read the hidden state, in every architecture served: their width settles bits and group size, of
# which the tensors' shapes alone give only the product.
_READS_HIDDEN = {
    "embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b",
    "gate", "gate_proj", "up_proj", "shared_expert_gate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of one expert's bytes that is contiguous both in a file and in the record.

    Attributes:
        path: Path of the file.
        file_offset: First byte in the file.
        record_offset: First byte in the record.
        nbytes: Length in bytes, at least 1.
    """

    path: Path
    file_offset: int
    record_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Layer:
    num_experts: int
    layout: RecordLayout
    parts: tuple[Part, ...]  # in the order of the layout's


class Checkpoint:
    """A checkpoint directory whose headers and config.json agree.

    Attributes:
        directory: Path of the directory.
        config: Contents of config.json.
        tensors: Every tensor of every shard, by stored name.
        dense: Tensors kept in memory: all except routed experts, vision and multi-token-prediction tensors.
        moe_layers: Layers with routed experts, ascending.
        format: "mlx", "hf-fused", "hf-per-expert" or "packed".
        expert_files: Files that contain routed experts.
        manifest: Manifest of a packed checkpoint; None for others.
        packing: Order in which AWQ or GPTQ packed weights, one of `repacking`'s methods; None for other checkpoints.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    dense: Mapping[str, TensorInfo]
    moe_layers: tuple[int, ...]
    format: str
    expert_files: tuple[Path, ...]
    manifest: Manifest | None
    packing: str | None

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        manifest: Manifest | None = None,
    ):
        """Check ``tensors`` against ``config``. `Checkpoint.open` reads them from a directory.

        With a ``manifest``, it is a packed checkpoint: ``tensors`` has one entry per layer under the manifest's name.
        """
        self.manifest = manifest
        packed = {layer.tensor_name: layer for layer in manifest.layers.values()} if manifest else {}
        self.directory = directory
        config = check_config(config)
        self.config = MappingProxyType(config)
        self.tensors = MappingProxyType(dict(tensors))
        settings = QuantizationSettings(config)  # first: it names what another tool quantised
        self.packing = settings.packing
        experts: dict[int, dict[tuple[str, str], dict[int | None, TensorInfo]]] = {}
        dense: dict[str, TensorInfo] = {}
        formats: dict[str, str] = {}
        extra_layers = bool(self.setting("num_nextn_predict_layers"))
        for name, info in self.tensors.items():
            if name in packed or _is_skipped(name) or (extra_layers and self._is_extra(name)):
                continue
            key = parse_name(name)
            if key is None:
                dense[name] = info
                continue
            formats.setdefault(key.format, name)
            if key.part == UNREAD:
                continue
            same = experts.setdefault(key.layer, {}).setdefault((key.projection, key.part), {})
            if other := same.get(key.expert):
                raise CorruptError(
                    f"[{directory.name}] layer {key.layer} must have one set of experts, got {brief(other.name)} "
                    f"and {brief(name)}. {_AGAIN}"
                )
            same[key.expert] = info
        if packed and experts:
            raise CorruptError(
                f"[{directory.name}] experts must be in the packed files only, got "
                f"{brief(next(iter(formats.values())))} too. {_AGAIN}"
            )
        if not experts and not packed:
            advice = "Models without them run best in mlx-lm."
            if self._num_experts():  # granitemoe's input_linear, say
                advice = "They are stored in another way: use mlx_lm.convert's form, or run it in mlx-lm."
            raise UnsupportedModelError(
                f"[{directory.name}] must be a mixture-of-experts model, got no routed experts "
                f"(model_type {brief(config.get('model_type'))}). {advice}"
            )
        if len(formats) > 1:
            raise UnsupportedModelError(
                f"[{directory.name}] must store all experts one way, got {' and '.join(map(brief, formats.values()))}. "
                "Convert the checkpoint again with one tool."
            )
        self.dense = MappingProxyType(dense)
        (self.format,) = formats or ("packed",)
        self.moe_layers = tuple(sorted(manifest.layers if manifest else experts))
        self._check_layer_count()
        layouts: dict[object, RecordLayout] = {}  # equal layouts are one object
        if manifest:
            self._layers = {
                layer.layer: self._packed_layer(layer, settings, layouts) for layer in manifest.layers.values()
            }
        else:
            self._layers = {layer: self._layer(layer, experts[layer], settings, layouts) for layer in self.moe_layers}
        self._quantizations = self._resolve_dense(settings)
        self._modules = {mlx_name(name.replace(".qweight", ".weight")): name for name in self.tensors}
        self.expert_files = tuple(
            sorted({info.path for layer in self._layers.values() for part in layer.parts for info in part.infos})
        )

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read a directory's config.json and the header of every shard, and check them against each other.

        Raises:
            MissingTensorError: If config.json, a shard or a tensor is missing.
            CorruptError: If a file breaks its format, or config.json and tensors contradict each other.
            UnsupportedModelError: If the kind or quantisation of experts is not supported.
            CheckpointError: If the directory can't be read.

        Cost: no tensor data is read.
        """
        directory = Path(directory)
        try:
            is_directory = directory.is_dir()
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise CheckpointError(f"[checkpoint] must be a directory, got {error}. Check the path.") from error
        if not is_directory:
            got = "a file" if directory.exists() else "no such path"
            raise CheckpointError(
                f"[checkpoint] {directory} must be a checkpoint's directory, got {got}. Check the path."
            )
        manifest = read_manifest(directory)
        config = read_config(directory)
        tensors = read_shards(directory)
        for layer in manifest.layers.values() if manifest else ():
            tensors[layer.tensor_name] = read_layer(directory, layer)
        return cls(directory, config, tensors, manifest)

    def num_experts(self, layer: int) -> int:
        """Return E, the number of routed experts of a layer."""
        return self._layer_of(layer).num_experts

    def held_experts(self, layer: int) -> Sequence[int]:
        """Return the experts of a layer whose records are here: all, but in one rank's share."""
        return self.manifest.layers[layer].experts if self.manifest else range(self.num_experts(layer))

    def layout(self, layer: int) -> RecordLayout:
        """Return the layout of a layer's expert records; layers with equal layouts share one object."""
        return self._layer_of(layer).layout

    def ranges(self, layer: int, expert: int) -> tuple[ByteRange, ...]:
        """Return the ranges of an expert's bytes in record order, merging ranges adjacent in both file and record.

        Raises:
            RequestError: If there is no such layer or expert, or its record is in another rank's share.
            UnsupportedModelError: If experts must be packed before they can be streamed.
        """
        where = self._layer_of(layer)
        self.require_streamable()
        if not 0 <= expert < where.num_experts:
            raise RequestError(
                f"[Checkpoint] layer {layer} has experts 0 to {where.num_experts - 1}, got {expert}. "
                "Ask for one of these."
            )
        if self.manifest:  # the record as in memory, including padding between its parts
            path, offset = where.parts[0].locate(self._place(layer, expert))
            return (ByteRange(path, offset, 0, payload_bytes(where.layout)),)
        ranges: list[ByteRange] = []
        # Sorted by offset, so that parts that share bytes are adjacent and merge into one range.
        for slot, part in sorted(zip(where.layout.parts, where.parts, strict=True), key=lambda pair: pair[0].offset):
            path, offset = part.locate(expert)
            end = slot.offset + slot.span_bytes
            last = ranges[-1] if ranges else None
            if (
                last is not None
                and last.path == path
                and last.file_offset - last.record_offset == offset - slot.offset
                and last.record_offset + last.nbytes >= slot.offset
            ):
                nbytes = max(last.nbytes, end - last.record_offset)
                ranges[-1] = ByteRange(path, last.file_offset, last.record_offset, nbytes)
            else:
                ranges.append(ByteRange(path, offset, slot.offset, slot.span_bytes))
        return tuple(ranges)

    @property
    def is_streamable(self) -> bool:
        """Whether experts' bytes are read as they are stored; AWQ's and GPTQ's are not until they are packed."""
        return not any(part.recipe for layer in self._layers.values() for part in layer.parts)

    def require_streamable(self) -> None:
        """Raise UnsupportedModelError if experts must be packed first."""
        if not self.is_streamable:
            raise UnsupportedModelError(
                f"[{self.directory.name}] experts must be packed in MLX's order, got AWQ's or GPTQ's. Rewrite them "
                f'once, without loss: "flash-moe pack SOURCE DESTINATION --bits unchanged".'
            )

    def parts(self, layer: int) -> tuple[Part, ...]:
        """Return the location of each part of a layer's records, in the layout's order.

        In one rank's share they are located by the record's position in the file.
        """
        return self._layer_of(layer).parts

    def checksum(self, layer: int, expert: int) -> int | None:
        """Return the CRC-32 of a record's payload; None if the checkpoint has no checksums."""
        return self.manifest.layers[layer].checksums[self._place(layer, expert)] if self.manifest else None

    def quantization(self, module: str) -> Quantization | None:
        """Return a module's quantisation by its path, as stored or as mlx-lm names it; None if unquantised.

        Raises:
            MissingTensorError: If the checkpoint has no such module.
        """
        stored = self._modules.get(f"{module}.weight", f"{module}.weight").rpartition(".")[0]
        if f"{stored}.weight" in self.dense or f"{stored}.qweight" in self.dense:
            return self._quantizations.get(stored)
        key = parse_name(f"{module}.weight") or parse_name(module)
        if key is None or key.layer not in self._layers:
            raise MissingTensorError(
                f"[{self.directory.name}] must have {brief(module + '.weight')}, got no such tensor. {_AGAIN}"
            )
        projection = "gate_proj" if key.projection == "gate_up_proj" else key.projection
        return self._layers[key.layer].layout.quantization(projection)

    def require_layers(self, key: str, count: int) -> None:
        """Refuse a number of layers larger than that of the stored tensors, before building such a model.

        Args:
            key: Key in config.json.
            count: Value of the key.

        Raises:
            MissingTensorError: If fewer layers are stored.
        """
        stored = max(max(map(layer_number, self.dense), default=-1), self.moe_layers[-1]) + 1
        if count > stored:
            raise MissingTensorError(
                f"[{self.directory.name}] all {count} layers of config.json's {key} must have tensors, got {stored} "
                f"layers. {_AGAIN}"
            )

    def setting(self, key: str) -> int | None:
        """Return an integer of config.json, from its text_config or its top level; None if it is missing or a list.

        Args:
            key: One of `GENERAL_FIELDS`.
        """
        value = read_field({key: self._raw(key)}, _GENERAL[key])
        return value if isinstance(value, int) else None

    def _raw(self, key: str) -> Any:
        text = self.config.get("text_config")
        return text[key] if isinstance(text, Mapping) and key in text else self.config.get(key)

    def _layer_of(self, layer: int) -> _Layer:
        try:
            return self._layers[layer]
        except KeyError:
            raise RequestError(
                f"[Checkpoint] layer must have routed experts, got {layer}. Ask for one of {self.moe_layers}."
            ) from None

    def _place(self, layer: int, expert: int) -> int:
        """Return the position of a packed record in its file."""
        assert self.manifest is not None
        place = self.manifest.layers[layer].place(expert)
        if place is None:
            raise RequestError(
                f"[Checkpoint] layer {layer} expert {expert} must be in this checkpoint, got {self.manifest.share}. "
                "Ask for one of its own experts."
            )
        return place

    def _check_layer_count(self) -> None:
        count = self.setting("num_hidden_layers")
        if count is None:
            return
        if self.moe_layers[-1] >= count:
            raise CorruptError(
                f"[config.json] num_hidden_layers must cover every layer that has experts, got {count} and "
                f"experts in layer {self.moe_layers[-1]}. {_AGAIN}"
            )
        if str(self.config.get("model_type")).startswith("qwen3_5_moe") and len(self.moe_layers) < count:
            present = set(self.moe_layers)
            first = next(layer for layer in range(count) if layer not in present)
            raise MissingTensorError(
                f"[{self.directory.name}] all {count} layers must have routed experts, got {len(present)} layers "
                f"that have them: layer {first} has none. {_AGAIN}"
            )

    def _layer(
        self,
        layer: int,
        found: Found,
        settings: QuantizationSettings,
        layouts: dict[object, RecordLayout],
    ) -> _Layer:
        where = f"{self.directory.name} layer {layer}"
        num_experts, parts = layer_parts(self.format, where, found, self._num_experts(), settings.packing)
        quantizations = resolve(where, found, parts, settings)
        self._check_sizes(where, parts)
        specs = {key: (part.dtype, part.shape) for key, part in parts.items()}
        views = {key: part.view for key, part in parts.items() if part.view}
        strides = tuple((key, view.strides) for key, view in sorted(views.items()))
        identity = (tuple(sorted(specs.items())), tuple(quantizations.items()), strides)
        if identity not in layouts:
            layouts[identity] = RecordLayout.contiguous(specs, quantizations, views=views)
        layout = layouts[identity]
        return _Layer(num_experts, layout, tuple(parts[slot.projection, slot.part] for slot in layout.parts))

    def _packed_layer(
        self, packed: PackedLayer, settings: QuantizationSettings, layouts: dict[object, RecordLayout]
    ) -> _Layer:
        where = f"{self.directory.name} layer {packed.layer}"
        expected = self._num_experts()
        if expected is not None and expected != packed.num_experts:
            raise CorruptError(
                f"[{where}] must have the {expected} experts of config.json, got {packed.num_experts}. {_AGAIN}"
            )
        for projection, quantization in packed.layout.quantizations:
            path = f"{packed.module}.{projection}"
            found, stated = settings.stated(path)
            if found == path and stated != (quantization and quantization.stated):
                raise CorruptError(
                    f"[{where}] {projection} must be {stated}, as config.json says, got {quantization}. {_AGAIN}"
                )
        info = self.tensors[packed.tensor_name]
        layout = layouts.setdefault(packed.layout, packed.layout)
        parts = {
            (slot.projection, slot.part): Part((info,), slot.dtype, slot.shape, first=slot.offset, stride=packed.stride)
            for slot in layout.parts
        }
        self._check_sizes(where, parts)
        return _Layer(packed.num_experts, layout, tuple(parts.values()))

    def _check_sizes(self, where: str, parts: Parts) -> None:
        for keys, projection in _EXPERT_SIZES:
            size = parts[projection, "weight"].shape[0]
            # Zero means that another key applies; a list, with one value per layer, is left to the model.
            key = next((key for key in keys if self.setting(key)), None)
            if key is not None and self.setting(key) != size:
                raise CorruptError(
                    f"[{where}] experts must have config.json's {key} {self.setting(key)}, got {size}. {_AGAIN}"
                )

    def _resolve_dense(self, settings: QuantizationSettings) -> dict[str, Quantization | None]:
        """Return the quantisation of every dense module that has scales or an entry in config.json."""
        result = {}
        for name in self.dense:
            module, _, part = name.rpartition(".")
            if (part not in part_names() and part != "qweight") or module in result or self._is_of_another_tool(module):
                continue
            names = (*part_names(), *REPACKED_PARTS)
            own = {p: info for p in names if (info := self.dense.get(f"{module}.{p}"))}
            tensors = {p: Stored(info.dtype, info.shape) for p, info in own.items()}
            if "qweight" in own:
                packed = {p: ("U32" if info.dtype == "I32" else info.dtype, info.shape) for p, info in own.items()}
                made = affine_parts(module, packed, self.packing)
                tensors = {p: Stored(dtype, shape) for p, (dtype, shape, _) in made.items()}
            hidden = self.setting("hidden_size") if module.rpartition(".")[2] in _READS_HIDDEN else None
            result[module] = settings.resolve(module, (mlx_name(module), module), tensors, hidden, exact=False)
        return result

    def _is_of_another_tool(self, module: str) -> bool:
        """Return whether a dense module has 8-bit floats or packed bytes, which are dequantised on loading."""
        weight = self.dense.get(f"{module}.weight")
        return f"{module}.weight_packed" in self.dense or (weight is not None and weight.dtype in ("U8", "F8_E4M3"))

    def _is_extra(self, name: str) -> bool:
        """Return whether a tensor belongs to a multi-token-prediction layer, stored after the model's own layers."""
        count = self.setting("num_hidden_layers")
        return count is not None and layer_number(name) >= count

    def _num_experts(self) -> int | None:
        return next((n for n in map(self.setting, _NUM_EXPERTS_KEYS) if n is not None), None)


def _is_skipped(name: str) -> bool:
    """Return whether a tensor is for vision or multi-token prediction, which text generation doesn't use."""
    return name.startswith(("vision_tower.", "model.visual.", "visual.", "mtp.")) or ".mtp." in name


def layer_number(name: str) -> int:
    """Return the layer number in a tensor's name, or -1 if there is none."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else -1
