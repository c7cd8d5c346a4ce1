"""Maps the tensors of a layer's routed experts, in each layout that `expert_names` knows, to parts of a record."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from .expert_layout import DTYPE_BYTES, PROJECTIONS, Quantization, View
from .expert_names import name_in, parse_name
from .quantization import QuantizationSettings, Stored, mlx_name
from .repacking import REPACKED_PARTS, affine_parts
from .safetensors_header import TensorInfo, brief, some
from .schemes import FLOAT_DTYPES, factor_names

_AGAIN = "Download the checkpoint again."
_PACKED_AS = {"I32": "U32", "F8_E4M3": "U8", "F8_E8M0": "U8"}
"""Integer dtypes used for other tools' dtypes: only bytes are read, and the quantisation gives them a meaning."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The tensors that an affine part is computed from.

    Attributes:
        method: One of `repacking`'s methods.
        part: "weight", "scales" or "biases".
        tensors: Each expert's tensor, by the names that `repacking` has for them.
    """

    method: str
    part: str
    tensors: Mapping[str, tuple[TensorInfo, ...]]

    def of(self, expert: int) -> dict[str, TensorInfo]:
        """Return an expert's tensors."""
        return {name: infos[expert] for name, infos in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """One part of all experts of a layer: a slice of one stacked tensor, or one tensor per expert (stride 0).

    Attributes:
        infos: The stacked tensor, or each expert's tensor.
        dtype: Dtype of an expert's part in its record.
        shape: Shape of an expert's part.
        first: Byte of the tensor, or of an expert's slice, at which the part begins.
        stride: Bytes from expert to expert in the stacked tensor.
        view: Position of the part in an expert's slice if it isn't contiguous, else None.
        recipe: How it is computed from other tensors; None if it is stored as it is.
    """

    infos: tuple[TensorInfo, ...]
    dtype: str
    shape: tuple[int, ...]
    first: int = 0
    stride: int = 0
    view: View | None = None
    recipe: Recipe | None = None

    def locate(self, expert: int) -> tuple[Path, int]:
        info = self.infos[0] if self.stride else self.infos[expert]
        return info.path, info.offset + self.first + expert * self.stride

    def files(self, expert: int) -> frozenset[Path]:
        """Return the files that hold an expert's part."""
        if self.recipe:
            return frozenset(info.path for info in self.recipe.of(expert).values())
        return frozenset({self.locate(expert)[0]})


Found = Mapping[tuple[str, str], Mapping[int | None, TensorInfo]]
"""A layer's tensors by (projection, part), then by expert; None where experts are stacked."""

Parts = dict[tuple[str, str], Part]
"""A layer's record, by (projection, part)."""


def layer_parts(
    format: str, where: str, found: Found, expected: int | None, packing: str | None = None
) -> tuple[int, Parts]:
    """Return the number of experts of a layer, and the location of each part of their records.

    Args:
        format: Storage format of the experts.
        where: Beginning of messages.
        found: The layer's expert tensors, at least one.
        expected: config.json's number of experts, or None.
        packing: AWQ's or GPTQ's order by config.json, or None.

    Raises:
        MissingTensorError: If an expert's tensor is absent.
        CorruptError: If shapes contradict each other or ``expected``.
    """
    example = _example(found)
    if format == "mlx":
        num_experts, parts = _stacked_parts(where, example, found)
    elif format == "hf-fused":
        num_experts, parts = _fused_parts(where, example, found)
    else:
        num_experts, parts = _per_expert_parts(where, example, found, expected)
        parts = _repacked(where, parts, packing)
    if expected is not None and expected != num_experts:
        raise CorruptError(f"[{where}] must have the {expected} experts of config.json, got {num_experts}. {_AGAIN}")
    return num_experts, parts


def _projections(found: Found) -> tuple[str, ...]:
    """Return the projections that a layer must have.

    Experts without a gate have ``fc1`` and ``fc2`` in mlx-lm, and are a layer's mixer on the hub (Nemotron-H).
    """
    gated = any(projection in ("gate_proj", "gate_up_proj") for projection, _ in found)
    example = _example(found)
    without = name_in("up_proj", example) == "fc1" or ".mixer.experts." in example
    return PROJECTIONS[1:] if without and not gated else PROJECTIONS


def _stacked_parts(where: str, example: str, found: Found) -> tuple[int, Parts]:
    stem = example.rsplit(".", 2)[0]
    tensors = {key: only[None] for key, only in found.items()}
    _require(
        where,
        (f"{stem}.{name_in(p, example)}.weight" for p in _projections(found) if (p, "weight") not in tensors),
    )
    for (_, part), info in tensors.items():
        _check_rank(info, 1 if part in factor_names() else 2 if part == "bias" else 3)
    num_experts = tensors.get(("gate_proj", "weight"), tensors["up_proj", "weight"]).shape[0]
    parts = {}
    for key, info in tensors.items():
        if info.shape[0] != num_experts:
            raise CorruptError(
                f"[{where}] every tensor must hold {num_experts} experts, got {brief(info.name)} "
                f"of shape {info.shape}. {_AGAIN}"
            )
        dtype = _PACKED_AS.get(info.dtype, info.dtype)
        parts[key] = Part((info,), dtype, info.shape[1:], stride=info.nbytes // num_experts)
    return num_experts, parts


@dataclass(frozen=True)
class _Fused:
    """One expert's slice of a stacked tensor whose rows are outputs of gate and up, or of down.

    Attributes:
        info: The stacked tensor.
        rows: Outputs: 2I or H.
        columns: Elements per row; 1 for a bias.
        dtype: Dtype of the elements.
        transposed: Whether a row's elements lie ``rows`` apart.
    """

    info: TensorInfo
    rows: int
    columns: int
    dtype: str
    transposed: bool

    def part(self, count: int = 1, which: int = 0, *, interleaved: bool = False) -> Part:
        """Return the ``which``-th of ``count`` equal shares of the rows."""
        size, rows = DTYPE_BYTES[self.dtype], self.rows // count
        nbytes = self.rows * self.columns * size
        bias = len(self.info.shape) == 2
        shape = (rows,) if bias else (rows, self.columns)
        row, element = (1, self.rows) if self.transposed else (self.columns, 1)
        first = which * (1 if interleaved else rows) * row * size
        if not self.transposed and not (interleaved and count > 1):
            return Part((self.info,), self.dtype, shape, first, nbytes)
        strides = (row * (count if interleaved else 1), element)
        view = View(self.info.name, nbytes, first, strides[: len(shape)])
        return Part((self.info,), self.dtype, shape, first, nbytes, view)


def _fused_parts(where: str, example: str, found: Found) -> tuple[int, Parts]:
    stem = example.removesuffix(".weight").rsplit(".", 1)[0]
    _require(where, (f"{stem}.{p}" for p in ("gate_up_proj", "down_proj") if (p, "weight") not in found))
    tensors = {key: only[None] for key, only in found.items()}
    gate_up, down = tensors["gate_up_proj", "weight"], tensors["down_proj", "weight"]
    blocks = gate_up.name.endswith("_blocks")
    for (_, part), info in tensors.items():
        _check_rank(info, {"bias": 2, "weight": 4 if blocks else 3}.get(part, 3))
    shape, width = gate_up.shape, down.shape
    # [E, 2I, H] and [E, H, I], or each of them transposed. Blocks have a row's bytes in two axes.
    transposed = not blocks and width == (shape[0], shape[2] // 2, shape[1]) and shape[2] % 2 == 0
    fits = transposed or (width[0], 2 * (0 if blocks else width[2]), width[1]) == (shape[0], shape[1], shape[2])
    if blocks:
        fits = (gate_up.dtype, down.dtype, shape[3], width[3], width[0]) == ("U8", "U8", 16, 16, shape[0])
        fits = fits and shape[1] % 2 == 0
    if not fits:
        raise CorruptError(
            f"[{where}] must have gate_up_proj [E, 2I, H] and down_proj [E, H, I], or both transposed, got "
            f"{gate_up.shape} and {down.shape}. {_AGAIN}"
        )
    # Only gpt-oss has biases or blocks here, and it alone alternates gate's and up's rows.
    interleaved = blocks or ("gate_up_proj", "bias") in tensors
    parts: Parts = {}
    for (projection, part), info in tensors.items():
        if info.shape[0] != shape[0]:
            raise CorruptError(
                f"[{where}] every tensor must hold {shape[0]} experts, got {brief(info.name)} of shape {info.shape}. "
                f"{_AGAIN}"
            )
        fused = _fused(info, part, transposed=transposed)
        if projection == "gate_up_proj":
            if fused.rows % 2:
                raise CorruptError(
                    f"[{where}] gate_up_proj must have an even number of rows, got {info.shape}. {_AGAIN}"
                )
            for which, own in enumerate(PROJECTIONS[:2]):
                parts[own, part] = fused.part(2, which, interleaved=interleaved)
        else:
            parts[projection, part] = fused.part()
    return shape[0], parts


def _fused(info: TensorInfo, part: str, *, transposed: bool) -> _Fused:
    dtype = _PACKED_AS.get(info.dtype, info.dtype)
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(
            f"[{info.path.name}] {brief(info.name)} must have whole bytes per element, got {info.dtype}. "
            "Use an unquantised checkpoint, or an MLX conversion of it."
        )
    if part == "bias":
        return _Fused(info, info.shape[1], 1, dtype, False)
    if len(info.shape) == 4:  # blocks of 32 weights, as bytes: the same bytes are MLX's words
        return _Fused(info, info.shape[1], info.shape[2] * info.shape[3] // DTYPE_BYTES["U32"], "U32", False)
    rows, columns = info.shape[1:] if not (transposed and part == "weight") else info.shape[:0:-1]
    return _Fused(info, rows, columns, dtype, transposed and part == "weight")


def _per_expert_parts(where: str, example: str, found: Found, expected: int | None) -> tuple[int, Parts]:
    stem = example.rsplit(".", 3)[0]
    highest = max(number for same in found.values() for number in same if number is not None)
    # config.json's number counts only as far as there are names to list: it may be absurd.
    num_experts = max(highest + 1, min(expected or 0, highest + 1000))
    projections = _projections(found)
    _require(
        where,
        (
            f"{stem}.{number}.{name_in(projection, example)}.{part}"
            for number in range(num_experts)
            for projection, part in sorted({*found, *((p, _weight_name(p, found)) for p in projections)})
            if number not in found.get((projection, part), {})
        ),
    )
    parts = {}
    for key, by_number in found.items():
        infos = tuple(by_number[number] for number in range(num_experts))
        for info in infos:
            if key[1] in ("weight", "scales", "weight_scale_inv", "qweight", "qzeros"):
                _check_rank(info, 2)
            if (info.dtype, info.shape) != (infos[0].dtype, infos[0].shape):
                raise CorruptError(
                    f"[{where}] experts must be alike, got {brief(infos[0].name)} {infos[0].dtype} "
                    f"{infos[0].shape} and {brief(info.name)} {info.dtype} {info.shape}. {_AGAIN}"
                )
        shape = () if infos[0].shape == (1,) and key[1] in factor_names() else infos[0].shape
        parts[key] = _packed_words(Part(infos, _PACKED_AS.get(infos[0].dtype, infos[0].dtype), shape))
    return num_experts, parts


def _weight_name(projection: str, found: Found) -> str:
    return "qweight" if (projection, "qweight") in found else "weight"


def _repacked(where: str, parts: Parts, packing: str | None) -> Parts:
    """Replace the parts of projections that AWQ or GPTQ packed by MLX's, computed from them."""
    others = {projection for projection, part in parts if part in REPACKED_PARTS}
    result = {key: part for key, part in parts.items() if key[0] not in others or key[1] == "bias"}
    for projection in sorted(others):
        own = {part: parts[projection, part] for p, part in parts if p == projection and part != "bias"}
        tensors = {name: (part.dtype, part.shape) for name, part in own.items()}
        for name, (dtype, shape, needs) in affine_parts(f"{where} {projection}", tensors, packing).items():
            recipe = Recipe(str(packing), name, {need: own[need].infos for need in needs})
            result[projection, name] = Part(own[needs[0]].infos, dtype, shape, recipe=recipe)
    return result


def _packed_words(part: Part) -> Part:
    """Describe weights that another tool packed into bytes as MLX's words: the same bytes."""
    if part.infos[0].dtype != "U8" or len(part.shape) != 2 or part.shape[1] % 4:
        return part
    return Part(part.infos, "U32", (part.shape[0], part.shape[1] // 4), part.first, part.stride)


def resolve(where: str, found: Found, parts: Parts, settings: QuantizationSettings) -> dict[str, Quantization | None]:
    """Return the quantisation of each projection, after checking that their shapes belong together."""
    projections = _projections(found)
    rows = {projection: parts[projection, "weight"].shape[0] for projection in projections}
    if rows.get("gate_proj", rows["up_proj"]) != rows["up_proj"]:
        raise CorruptError(
            f"[{where}] gate_proj and up_proj must have the same outputs, got {rows['gate_proj']} and "
            f"{rows['up_proj']}. {_AGAIN}"
        )
    example = _example(found)
    if (key := parse_name(example)) and key.format == "mlx":
        stem = example.rsplit(".", 2)[0]
    else:  # what mlx-lm turns it into, and config.json would speak of
        stem = example.rpartition(".experts.")[0] + ".switch_mlp"
    result = {}
    for projection in projections:
        name = f"{where} {projection}"
        module = f"{stem}.{name_in(projection, example)}"
        tensors = {part: Stored(stored.dtype, stored.shape) for (p, part), stored in parts.items() if p == projection}
        width = rows["up_proj"] if projection == "down_proj" else rows["down_proj"]
        result[projection] = settings.resolve(name, (mlx_name(module), module), tensors, width, exact=True)
        weight, bias = tensors["weight"], tensors.get("bias")
        if result[projection] is None and weight.shape[1] != width:
            raise CorruptError(f"[{where}] {projection} must have {width} inputs, got {weight.shape}. {_AGAIN}")
        if result[projection] is None and weight.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"[{where}] {projection} must be F16, BF16, F32 or quantised, got {weight.dtype}. "
                "Use an unquantised checkpoint, or an MLX conversion of it."
            )
        if bias is not None and (bias.shape != (rows[projection],) or bias.dtype not in FLOAT_DTYPES):
            raise CorruptError(
                f"[{where}] {projection}.bias must be a float for each of {rows[projection]} outputs, got "
                f"{bias.dtype} {bias.shape}. {_AGAIN}"
            )
    return result


def _example(found: Found) -> str:
    return next(iter(next(iter(found.values())).values())).name


def _check_rank(info: TensorInfo, rank: int) -> None:
    if len(info.shape) != rank or not info.nbytes:
        raise CorruptError(
            f"[{info.path.name}] {brief(info.name)} must have {rank} dimensions of at least 1, "
            f"got {brief(info.shape)}. {_AGAIN}"
        )


def _require(where: str, absent: Iterable[str]) -> None:
    names = list(absent)
    if names:
        raise MissingTensorError(
            f"[{where}] every expert's tensors must be there, got none named {some(names)}. {_AGAIN}"
        )
