"""Predicts how mlx_lm.convert converts a checkpoint's dense tensors: names, dtypes and quantisation.

Uses mlx-lm's own model class with its ``sanitize`` and ``cast_predicate``, and its ``quantize_model``. Only `evaluate`
evaluates arrays.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes, infer_quant_config, quantize_model

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from ..formats.checkpoint import Checkpoint, layer_number
from ..formats.expert_layout import Quantization
from ..formats.foreign import ForeignCode, say
from ..formats.quantization import QuantizationSettings
from ..formats.safetensors_header import TensorInfo
from ..models.foreign_dense import check_group_order, dequantised
from ..models.model_arguments import check_arguments, refuse, refuse_weights
from ..ops.quantized import mlx_arguments
from ..ops.slot_memory import DTYPE_NAMES, MLX_DTYPES
from .quantiser import Bytes, to_bytes


@dataclass(frozen=True)
class DenseParameter:
    """One dense parameter of mlx-lm's model.

    Attributes:
        name: Name in the model.
        source: The stored tensor with the same bytes, except for a cast; None if sanitize computes the parameter.
        shape: Shape before quantisation.
        dtype: The result's dtype (before quantisation, if quantised), as safetensors names it.
        quantization: Quantisation of its module, or None.
    """

    name: str
    source: TensorInfo | None
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None


class MlxLmDense:
    """mlx-lm's view of a checkpoint's dense tensors.

    Attributes:
        parameters: Dense parameters, in the model's order.
        config: config.json as mlx_lm.convert writes it, without the experts' own bits.
        unmatched: Stored tensors that `evaluate` may read.
        expert_paths: Path of each layer's experts in mlx-lm's model.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization | None):
        """Build mlx-lm's model lazily. Raises UnsupportedModelError or CorruptError if mlx-lm doesn't know it.

        Args:
            checkpoint: The source.
            quantization: What dense modules are quantised to; None leaves them as mlx-lm has them.
        """
        self._checkpoint = checkpoint
        config = _known_config(checkpoint.config)
        self._model = _build(checkpoint, config)
        experts = [path for path, m in self._model.named_modules() if isinstance(m, SwitchGLU | SwitchMLP)]
        self.expert_paths = {layer_number(f"{path}."): path for path in experts}
        self._experts = tuple(f"{path}." for path in experts)
        if len(self._experts) != len(checkpoint.moe_layers):
            raise UnsupportedModelError(
                f"[config.json] mlx-lm's model must have a SwitchGLU in each of {len(checkpoint.moe_layers)} layers, "
                f'got {len(self._experts)}. Convert it with mlx_lm.convert first, or use dense="keep".'
            )
        if quantization and any(name.endswith(".qweight") for name in checkpoint.dense):
            raise UnsupportedModelError(
                f"[{checkpoint.directory.name}] dense tensors must not be quantised yet, got AWQ's or GPTQ's. Leave "
                "dense out, which keeps them."
            )
        stored = self._lazy()
        by_identity = {id(value): checkpoint.tensors[name] for name, value in stored.items() if name in self._as_stored}
        weights = self._sanitize(stored)
        if checkpoint.packing is not None:
            self._quantise_as_stored(weights)
        expected = {name: value.shape for name, value in tree_flatten(self._model.parameters())}
        expected = {name: shape for name, shape in expected.items() if not name.startswith(self._experts)}
        if missing := sorted(expected.keys() - weights.keys()):
            raise MissingTensorError(
                f"[{checkpoint.directory.name}] must have {missing[0]}, got {len(missing)} tensors absent. "
                "Download the checkpoint again."
            )
        chosen, section = self._quantised(config, quantization) if quantization else ({}, None)
        self.parameters: list[DenseParameter] = []
        for name, shape in expected.items():
            value = weights[name]
            if value.shape != shape:
                raise CorruptError(
                    f"[{checkpoint.directory.name}] {name} must have shape {shape} by config.json, got {value.shape}. "
                    "Download the checkpoint again."
                )
            if value.dtype not in DTYPE_NAMES:
                raise CorruptError(
                    f"[{checkpoint.directory.name}] {name} must have floats, got {value.dtype}. Download the "
                    "checkpoint again."
                )
            module = name.removesuffix(".weight") if name.endswith(".weight") else ""
            self.parameters.append(
                DenseParameter(name, by_identity.get(id(value)), shape, self._dtype(name, value), chosen.get(module))
            )
        matched = {parameter.source.name for parameter in self.parameters if parameter.source}
        self.unmatched = tuple(info for name, info in checkpoint.dense.items() if name not in matched)
        for key in ("_name_or_path", "vision_config"):  # as mlx_lm's save_config
            config.pop(key, None)
        config.pop("quantization_config", None)
        if section is None and checkpoint.packing is not None:
            section = self._stated()
        if section:
            config["quantization"] = config["quantization_config"] = section
        self.config: dict[str, Any] = dict(sorted(config.items()))

    def evaluate(self, parameters: Iterable[DenseParameter]) -> Iterator[tuple[Bytes, ...]]:
        """Yield the bytes of parameters that sanitize computes: of the tensor, or of weight, scales and biases.

        The checkpoint's files are read again: what they hold now counts.
        """
        check_group_order(self._checkpoint)
        weights = self._sanitize(self._lazy())
        for parameter in parameters:
            value = weights.pop(parameter.name).astype(MLX_DTYPES[parameter.dtype])
            made: tuple[mx.array, ...] = (mx.contiguous(value),)
            if parameter.quantization:
                made = mx.quantize(value, **mlx_arguments(parameter.quantization))
            mx.eval(*made)
            yield tuple(to_bytes(array) for array in made)

    def _lazy(self) -> dict[str, mx.array]:
        stored: dict[str, mx.array] = {}
        for path in sorted({info.path for info in self._checkpoint.tensors.values()}):
            stored |= mx.load(str(path))
        stored = {name: value for name, value in stored.items() if name in self._checkpoint.tensors}
        own = {name: value for name, value in stored.items() if name in self._checkpoint.dense}
        dense, _ = dequantised(own, self._checkpoint.packing)
        self._as_stored = {name for name, value in stored.items() if dense.get(name, value) is value}
        if not self._checkpoint.is_streamable:  # sanitize would take names of experts' tensors for others
            return dense
        return {name: value for name, value in stored.items() if name not in own} | dense

    def _sanitize(self, stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
        weights = dict(stored)
        with ForeignCode(lambda error: refuse_weights(self._checkpoint, error)):
            return dict(self._model.sanitize(weights)) if hasattr(self._model, "sanitize") else weights

    def _dtype(self, name: str, value: mx.array) -> str:
        """Return the dtype that mlx_lm.convert casts to: config.json's, with the model's exceptions."""
        cast = cast_dtype(self._checkpoint.config)
        if self._checkpoint.packing is not None and name.endswith((".scales", ".biases")):
            return DTYPE_NAMES[value.dtype]
        keeps = getattr(self._model, "cast_predicate", lambda _: True)
        if cast is None or not keeps(name) or not mx.issubdtype(value.dtype, mx.floating):
            return DTYPE_NAMES[value.dtype]
        return cast

    def _quantise_as_stored(self, weights: Mapping[str, mx.array]) -> None:
        """Quantise the modules that have scales, as mlx-lm does when it loads them. Nothing is evaluated."""

        def predicate(path: str, module: Any) -> bool | dict[str, Any]:
            quantised = hasattr(module, "to_quantized") and f"{path}.scales" in weights
            return infer_quant_config(path, module, weights) if quantised else False

        with ForeignCode(lambda error: refuse_weights(self._checkpoint, error)):
            nn.quantize(self._model, class_predicate=predicate)

    def _stated(self) -> dict[str, Any] | None:
        """Return config.json's section for the quantisation that dense modules keep."""
        default = QuantizationSettings(self._checkpoint.config).default
        return None if default is None else {"group_size": default.group_size, "bits": default.bits}

    def _quantised(
        self, config: dict[str, Any], default: Quantization
    ) -> tuple[dict[str, Quantization], dict[str, Any]]:
        """Let mlx_lm quantise a model of the same config, without weights and without its experts.

        Returns:
            The quantisation of each dense module that has one, by path; and config.json's section.
        """
        model = _build(self._checkpoint, config)
        own = getattr(model, "quant_predicate", None) or (lambda path, module: True)

        def predicate(path: str, module: Any) -> bool | dict[str, Any]:
            return not f"{path}.".startswith(self._experts) and own(path, module)

        with redirect_stdout(StringIO()):  # it prints bits per weight, of these weights
            model, stated = quantize_model(model, {}, default.group_size, default.bits, quant_predicate=predicate)
        modules = {path: module for path, module in model.named_modules() if hasattr(module, "bits")}
        quantizations = {path: Quantization(m.bits, m.group_size, m.mode) for path, m in modules.items()}
        return quantizations, stated["quantization"]


def cast_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that mlx_lm.convert casts floats to, as safetensors names it; None if it casts none."""
    dtype = config.get("torch_dtype")
    text = config.get("text_config")
    if dtype is None and isinstance(text, Mapping):
        dtype = text.get("dtype")
    return DTYPE_NAMES[getattr(mx, str(dtype))] if dtype in MODEL_CONVERSION_DTYPES else None


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm has the model type and the checkpoint has no model file of its own."""
    if config.get("model_file") is not None:
        return False
    try:
        _get_classes(_known_config(config))
    except (ValueError, KeyError, AttributeError):  # AttributeError: an mlx-lm module that is not a model
        return False
    return True


def _known_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of config.json with mlx-lm's model type; transformers saves text models under another type."""
    known = copy.deepcopy(dict(config))
    if known.get("model_type") == "qwen3_5_moe_text":
        known["model_type"] = "qwen3_5_moe"
    return known


def _build(checkpoint: Checkpoint, config: dict[str, Any]) -> Any:
    with ForeignCode(_unknown):
        model_class, args_class = _get_classes(config)
    check_arguments(checkpoint, config, args_class)
    with ForeignCode(lambda error: refuse(config, args_class, error)):
        return model_class(args_class.from_dict(copy.deepcopy(config)))


def _unknown(error: BaseException) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"[config.json] must describe a model that mlx-lm knows, got {say(error)}. "
        'Use dense="keep", or convert it with mlx_lm.convert first.'
    )
