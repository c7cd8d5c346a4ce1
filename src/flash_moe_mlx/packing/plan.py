"""Plans a packing from a checkpoint's headers and the settings: files, tasks and config.json."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..formats.checkpoint import Checkpoint
from ..formats.expert_layout import Quantization, RecordLayout
from ..formats.packed_format import PackedLayer, share_label
from ..formats.packed_share import LayerShare, ShareLabel
from ..formats.quantization import mlx_name
from ..formats.safetensors_header import TensorInfo
from ..formats.schemes import AFFINE
from ..models.registry import OWN_FAMILIES
from .dense import CHUNK_BYTES, DenseFile, copy_tasks, row_tasks
from .mlx_lm_dense import DenseParameter, MlxLmDense, cast_dtype, is_known
from .settings import Conversion, PackSettings, target_layout
from .shares import check_whole
from .tasks import ExpertTask, Item, Task, merge_runs


@dataclass(frozen=True)
class LatePart:
    """A parameter that mlx-lm computes once all source shards have been read, and its place in the output."""

    parameter: DenseParameter
    offsets: tuple[int, ...]  # in the file: offsets of its single tensor, or of weight, scales and biases
    sizes: tuple[int, ...]
    output: str


@dataclass(frozen=True)
class PackPlan:
    """The complete plan of a packing. The same headers and settings give the same plan.

    Attributes:
        layers: The result's layers, with checksums still 0.
        lossy: Settings that change weights, in words; empty if none do.
        dense_files: The result's files of dense tensors.
        tasks: All tasks, in the order of the source's shards where possible.
        late: Parameters computed after all tasks.
        dense: mlx-lm's view of the dense tensors; None if they are copied.
        config: The result's config.json.
    """

    checkpoint: Checkpoint
    settings: PackSettings
    layers: tuple[PackedLayer, ...]
    lossy: tuple[str, ...]
    dense_files: tuple[DenseFile, ...]
    tasks: tuple[Task, ...]
    late: tuple[LatePart, ...]
    dense: MlxLmDense | None
    config: Mapping[str, Any]

    @property
    def result_bytes(self) -> int:
        """Total size of the result's expert and dense files."""
        return sum(self.file_sizes.values())

    @property
    def share(self) -> ShareLabel | None:
        """The share that the result is; None if it has all experts."""
        return share_label(self.layers)

    def late_inputs(self) -> dict[Path, tuple[TensorInfo, ...]]:
        """Return the tensors that the late parameters are computed from, by file."""
        if not self.late or self.dense is None:
            return {}
        tensors = {info.name: info for info in self.dense.unmatched}
        tensors |= {part.parameter.source.name: part.parameter.source for part in self.late if part.parameter.source}
        inputs: dict[Path, tuple[TensorInfo, ...]] = {}
        for info in tensors.values():
            inputs[info.path] = (*inputs.get(info.path, ()), info)
        return inputs

    def reads(self) -> dict[Path, list[tuple[int, int]]]:
        """Return the byte ranges (begin, end) that the plan reads of each source file, ascending and merged."""
        found: dict[Path, list[tuple[int, int]]] = {}
        for path, offset, nbytes in (read for task in self.tasks for read in task.reads):
            found.setdefault(path, []).append((offset, offset + nbytes))
        for path, tensors in self.late_inputs().items():
            found.setdefault(path, []).extend((info.offset, info.offset + info.nbytes) for info in tensors)
        return {path: _merged(ranges) for path, ranges in found.items()}

    @property
    def file_sizes(self) -> dict[str, int]:
        sizes = {layer.file_name: layer.file_bytes for layer in self.layers}
        return sizes | {file.name: file.nbytes for file in self.dense_files}

    def record_task(self, layer: int, expert: int) -> ExpertTask:
        """Return a task that produces one whole record, for comparison. Its place in the file is left out."""
        packed = next(p for p in self.layers if p.layer == layer)
        layout, conversions = target_layout(
            layer, self.checkpoint.layout(layer), self.settings, cast_dtype(self.checkpoint.config)
        )
        items = _items(self.checkpoint, layer, layout, conversions)
        return _expert_task(packed, (expert,), 0, items)


def make_plan(
    checkpoint: Checkpoint, settings: PackSettings, *, by_shard: bool, share: Mapping[int, LayerShare] | None = None
) -> PackPlan:
    """Plan a packing. Reads no tensor data.

    Args:
        checkpoint: The source checkpoint.
        settings: Packing settings.
        by_shard: Whether shards arrive one at a time, so that records are written in parts.
        share: Which experts to write, by layer; None for all.

    Raises:
        RequestError: If the source has not all experts.
        UnsupportedModelError: If the dense tensors can't be converted.
    """
    check_whole(checkpoint)
    cast = cast_dtype(checkpoint.config)
    layers: list[PackedLayer] = []
    lossy: set[str] = set()
    tasks: list[Task] = []
    quantise = settings.dense == "quantize" or (settings.dense == "auto" and _wants_quantised(checkpoint, settings))
    dense = _mlx_lm_dense(checkpoint, settings, quantise=quantise)
    if unknown := sorted(set(settings.layer_bits) - set(checkpoint.moe_layers)):
        raise RequestError(
            f"[layer_bits] layer {unknown[0]} has no experts; layers {checkpoint.moe_layers[0]} to "
            f"{checkpoint.moe_layers[-1]} may have. Name layers with experts."
        )
    for layer in checkpoint.moe_layers:
        layout, conversions = target_layout(layer, checkpoint.layout(layer), settings, cast)
        count = checkpoint.num_experts(layer)
        path = dense.expert_paths[layer] if dense else module_path(checkpoint, layer)
        own = None if share is None else share[layer]
        checksums = (0,) * (count if own is None else len(own.experts))
        packed = PackedLayer(layer, path, count, layout, checksums, own)
        layers.append(packed)
        lossy |= {_in_words(projection, conversion) for projection, conversion in conversions.items()}
        tasks += _expert_tasks(checkpoint, packed, _items(checkpoint, layer, layout, conversions), by_shard)
    if dense is not None:
        files, dense_tasks, late = _converted_dense(checkpoint, dense)
        config: dict[str, Any] = copy.deepcopy(dense.config)
    else:
        late = ()
        files, dense_tasks = _copied_dense(checkpoint)
        config = copy.deepcopy(dict(checkpoint.config))
    _state_expert_bits(config, layers, settings)
    shards = {path: i for i, path in enumerate(sorted({info.path for info in checkpoint.tensors.values()}))}
    ordered = sorted([*tasks, *dense_tasks], key=lambda task: max(shards[path] for path in task.needs))
    return PackPlan(
        checkpoint, settings, tuple(layers), tuple(sorted(lossy)), files, tuple(ordered), late, dense, config
    )


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _mlx_lm_dense(checkpoint: Checkpoint, settings: PackSettings, *, quantise: bool) -> MlxLmDense | None:
    """Return mlx-lm's view of the dense tensors, or None if they are copied as they are stored."""
    if quantise and settings.bits is not None:
        return MlxLmDense(checkpoint, Quantization(settings.bits, settings.group_size))
    own = str(checkpoint.config.get("model_type")) in OWN_FAMILIES and checkpoint.packing is None
    if not checkpoint.format.startswith("hf") or own:
        return None
    return MlxLmDense(checkpoint, None)  # under mlx-lm's names, which a packed checkpoint has


def module_path(checkpoint: Checkpoint, layer: int) -> str:
    """Return the path of a layer's stacked experts in mlx-lm's naming."""
    if checkpoint.manifest:
        return checkpoint.manifest.layers[layer].module
    name = checkpoint.parts(layer)[0].infos[0].name
    if checkpoint.format == "mlx":
        return name.rsplit(".", 2)[0]
    path = name.rpartition(".experts.")[0] + ".switch_mlp"
    return mlx_name(path) if str(checkpoint.config.get("model_type")).startswith("qwen3_5_moe") else path


def _items(
    checkpoint: Checkpoint, layer: int, layout: RecordLayout, conversions: Mapping[str, Conversion]
) -> tuple[Item, ...]:
    stored = dict(zip((p.name for p in checkpoint.layout(layer).parts), checkpoint.parts(layer), strict=True))
    items: dict[str, Item] = {}
    for target in layout.parts:
        conversion = conversions.get(target.projection)
        if conversion is None or target.part == "bias":
            items[target.name] = Item({target.part: stored[target.name]}, (target,), None)
        elif target.part == "weight":
            sources = {p.part: stored[p.name] for p in checkpoint.layout(layer).quantized_parts(target.projection)}
            items[target.name] = Item(sources, layout.quantized_parts(target.projection), conversion)
    return tuple(items.values())


def _expert_tasks(
    checkpoint: Checkpoint, packed: PackedLayer, items: tuple[Item, ...], by_shard: bool
) -> Iterator[ExpertTask]:
    source_bytes = checkpoint.layout(packed.layer).payload_bytes
    step = max(1, CHUNK_BYTES // max(source_bytes, packed.stride))

    def split(expert: int) -> tuple[tuple[int, ...], ...]:
        """Group the items that can be processed together: all of them, or those that need the same shards."""
        if not by_shard:
            return (tuple(range(len(items))),)
        groups: dict[frozenset[Path], list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item.files(expert), []).append(index)
        return tuple(map(tuple, groups.values()))

    def files(expert: int) -> tuple[frozenset[Path], ...]:
        return tuple(item.files(expert) for item in items) if by_shard else ()

    place = 0
    for _, same in groupby(packed.experts, key=files):
        experts = tuple(same)
        for group in split(experts[0]):
            chosen = tuple(items[index] for index in group)
            for first in range(0, len(experts), step):
                yield _expert_task(packed, experts[first : first + step], place + first, chosen)
        place += len(experts)


def _expert_task(packed: PackedLayer, experts: tuple[int, ...], place: int, items: tuple[Item, ...]) -> ExpertTask:
    targets = [target for item in items for target in item.targets]
    runs = merge_runs(targets, packed.layout.parts)
    whole = len(targets) == len(packed.layout.parts)
    return ExpertTask(
        packed.layer, experts, place, items, runs, whole, packed.stride, packed.data_offset, packed.file_name
    )


def _copied_dense(checkpoint: Checkpoint) -> tuple[tuple[DenseFile, ...], list[Task]]:
    by_shard: dict[Path, list[TensorInfo]] = {}
    for info in checkpoint.dense.values():
        by_shard.setdefault(info.path, []).append(info)
    metadata = {"format": "pt" if checkpoint.format.startswith("hf") else "mlx"}
    names = _dense_names(len(by_shard))
    files: list[DenseFile] = []
    tasks: list[Task] = []
    for name, path in zip(names, sorted(by_shard), strict=True):
        infos = sorted(by_shard[path], key=lambda info: info.offset)
        files.append(DenseFile.plan(name, [(info.name, info.dtype, info.shape) for info in infos], metadata))
        tasks += copy_tasks(files[-1], {info.name: info for info in infos})
    return tuple(files), tasks


def _converted_dense(
    checkpoint: Checkpoint, dense: MlxLmDense
) -> tuple[tuple[DenseFile, ...], list[Task], tuple[LatePart, ...]]:
    def is_late(parameter: DenseParameter) -> bool:
        cast = parameter.source is not None and parameter.dtype != parameter.source.dtype
        return parameter.source is None or (cast and parameter.quantization is None)

    groups: dict[Path | None, list[DenseParameter]] = {}
    for parameter in dense.parameters:
        groups.setdefault(None if is_late(parameter) or not parameter.source else parameter.source.path, []).append(
            parameter
        )
    paths = [*sorted(path for path in groups if path), *([None] if None in groups else [])]
    files: list[DenseFile] = []
    tasks: list[Task] = []
    late: list[LatePart] = []
    for name, path in zip(_dense_names(len(paths)), paths, strict=True):
        specs = [spec for parameter in groups[path] for spec in _stored_as(parameter)]
        files.append(DenseFile.plan(name, specs, {"format": "mlx"}))
        by_name = {tensor.name: tensor for tensor in files[-1].tensors}
        copies: dict[str, TensorInfo] = {}
        for parameter in groups[path]:
            if path is None:
                placed = [by_name[name] for name, _, _ in _stored_as(parameter)]
                offsets, sizes = tuple(t.offset for t in placed), tuple(t.nbytes for t in placed)
                late.append(LatePart(parameter, offsets, sizes, files[-1].name))
            elif parameter.source and parameter.quantization:
                module = parameter.name.removesuffix(".weight")
                tasks += row_tasks(files[-1], parameter.source, module, parameter.quantization, parameter.dtype)
            elif parameter.source:
                copies[parameter.name] = parameter.source
        tasks += copy_tasks(files[-1], copies)
    return tuple(files), tasks, tuple(late)


def _stored_as(parameter: DenseParameter) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, dtype, shape) of the tensors that a parameter becomes."""
    quantization = parameter.quantization
    if quantization is None:
        return [(parameter.name, parameter.dtype, parameter.shape)]
    *rows, width = parameter.shape
    module = parameter.name.removesuffix(".weight")
    sizes = quantization.bits, quantization.group_size
    specs = quantization.scheme.specs(prod(rows), width, *sizes, parameter.dtype)
    return [(f"{module}.{part}", dtype, (*rows, *shape[1:])) for part, (dtype, shape) in specs.items()]


def _dense_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _wants_quantised(checkpoint: Checkpoint, settings: PackSettings) -> bool:
    quantised = any(name.endswith(".scales") for name in checkpoint.dense)
    return settings.bits is not None and not quantised and is_known(checkpoint.config)


def _state_expert_bits(config: dict[str, Any], layers: list[PackedLayer], settings: PackSettings) -> None:
    """Add deviations from the default quantisation to config.json, under mlx-lm's paths."""
    chosen = {
        f"{packed.module}.{projection}": quantization and quantization.stated
        for packed in layers
        for projection, quantization in packed.layout.quantizations
    }
    section = config.get("quantization")
    if not isinstance(section, dict):
        if not any(chosen.values()):
            return
        bits = settings.bits or next(q.bits for q in chosen.values() if q)
        section = {"group_size": settings.group_size, "bits": bits, "mode": "affine"}
    default = section.get("bits"), section.get("group_size"), section.get("mode", AFFINE.mode)
    section = {key: value for key, value in section.items() if key not in chosen}
    for path, quantization in chosen.items():
        if quantization is None:
            section[path] = False
        elif (quantization.bits, quantization.group_size, quantization.mode) != default:
            section[path] = {"group_size": quantization.group_size, "bits": quantization.bits}
            if quantization.mode != AFFINE.mode:
                section[path]["mode"] = quantization.mode
    config["quantization"] = config["quantization_config"] = section


def _in_words(projection: str, conversion: Conversion) -> str:
    before = "unquantised"
    if conversion.source:
        before = f"{conversion.source.bits}-bit"
        before = before if conversion.source.mode == AFFINE.mode else conversion.source.mode
    return f"{projection}: {before} to {conversion.target.bits} bits in groups of {conversion.target.group_size}"
