"""LoRA adapters in mlx_lm's form, on the dense modules of a model whose routed experts are streamed."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from ..errors import CheckpointError, RequestError, UnsupportedModelError
from ..experts.budget import ModelMemory
from ..formats.expert_names import STACKED
from ..formats.foreign import ForeignCode, say
from ..formats.safetensors_header import read_json
from ..models.spec import ModelSpec
from ..packing.sources import fingerprint

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"
_PARTS = ("lora_a", "lora_b", "m")
_FLOAT32_BYTES = 4
_AGAIN = "Pass the directory that mlx_lm.lora wrote."


@dataclass(frozen=True)
class Adapter:
    """An adapter whose names have been read.

    Attributes:
        directory: Its directory.
        nbytes: Size of its weights.
        width: Number of outputs of its widest module.
        fingerprint: Hash of its files.
    """

    directory: Path
    nbytes: int
    width: int
    fingerprint: str

    @classmethod
    def open(cls, path: str | Path) -> "Adapter":
        """Read an adapter's configuration and the names of its weights.

        Args:
            path: Directory with adapter_config.json and adapters.safetensors.

        Raises:
            CheckpointError: If it is not such a directory, or its files can't be read.
            UnsupportedModelError: If the adapter is not of a kind that works here: it changes routed experts, which are
                not in memory, or is a full fine-tune.
        """
        directory = Path(path).expanduser()
        if not (directory / _CONFIG).is_file() or not (directory / _WEIGHTS).is_file():
            raise CheckpointError(f"[adapter_path] must hold {_CONFIG} and {_WEIGHTS}, got {directory}. {_AGAIN}")
        kind = read_json(directory / _CONFIG, _AGAIN).get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise UnsupportedModelError(
                f"[adapter_path] must be a LoRA or DoRA adapter, got fine_tune_type {kind!r}. Load the tuned model."
            )
        with ForeignCode(partial(_unusable, directory)):
            weights = mx.load(str(directory / _WEIGHTS))
        assert isinstance(weights, dict)
        for name in weights:
            if any(part in STACKED for part in name.split(".")):
                raise UnsupportedModelError(
                    f"[adapter_path] must change dense modules alone, got {name}: routed experts are read from disk. "
                    "Train with keys that leave the experts out, or fuse the adapter with mlx_lm.fuse."
                )
        return cls(
            directory,
            nbytes=sum(value.nbytes for value in weights.values()),
            width=max((value.shape[-1] for name, value in weights.items() if name.endswith("lora_b")), default=0),
            fingerprint=" ".join(fingerprint(directory / name) for name in (_CONFIG, _WEIGHTS)),
        )

    def counted(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the adapter's memory added."""
        return replace(spec, footprint=_AdaptedMemory(spec.footprint, self))

    def apply(self, model: Any) -> None:
        """Replace the modules that the adapter changes, and load its weights.

        Args:
            model: The model, with its dense weights loaded.

        Raises:
            UnsupportedModelError: If the adapter is another model's, or of a kind of module that takes none.
        """
        with ForeignCode(partial(_unusable, self.directory)):
            load_adapters(model, str(self.directory))
        parts = {name: value for name, value in tree_flatten(model.parameters()) if name.split(".")[-1] in _PARTS}
        if sum(value.nbytes for value in parts.values()) != self.nbytes:
            raise UnsupportedModelError(
                f"[adapter_path] must hold weights of every module that its {_CONFIG} names, got {self.nbytes} bytes "
                f"for {len(parts)} tensors in {self.directory}. Train it again for this model."
            )
        mx.eval(parts)
        model.adapter = self.fingerprint


@dataclass(frozen=True)
class _AdaptedMemory:
    """Memory of a model with an adapter: a module's own product and the adapter's are alive together."""

    base: ModelMemory
    adapter: Adapter

    @property
    def dense_bytes(self) -> int:
        return self.base.dense_bytes + self.adapter.nbytes

    @property
    def load_bytes(self) -> int:
        return self.base.load_bytes

    @property
    def kept_bytes(self) -> int:
        return self.base.kept_bytes

    def state_bytes(self, batch: int, length: int) -> int:
        return self.base.state_bytes(batch, length)

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        return self.base.scratch_bytes(batch, tokens, length) + 3 * batch * tokens * self.adapter.width * _FLOAT32_BYTES


def check_alone(adapter: Path | str | None, activation_bits: int | None, ranks: Any) -> None:
    """Refuse an adapter together with what it would silently change.

    Raises:
        RequestError: If ranks share the experts, or activations are rounded in a decode step that knows no adapters.
    """
    if adapter is None:
        return
    if ranks is not None:
        raise RequestError("[adapter_path] must be left out where ranks share the experts, got one. Fuse the adapter.")
    if activation_bits is not None:
        raise RequestError("[activation_bits] must be left out with an adapter, got both. Leave one out.")


def _unusable(directory: Path, error: BaseException) -> UnsupportedModelError:
    return UnsupportedModelError(f"[adapter_path] {directory} must fit the model, got {say(error)}. {_AGAIN}")
