"""Settings of a terminal chat that /set changes, and the toolbar's text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RequestError
from ..formats.config_files import SamplingDefaults
from .options import sampler

_BOUNDS = {"temperature": (0.0, 100.0), "top_p": (0.001, 1.0), "top_k": (0, 1 << 31), "min_p": (0.0, 1.0),
           "max_tokens": (1, 1 << 31)}  # fmt: skip


@dataclass
class Settings:
    """Settings of the next answers.

    Attributes:
        sampling: Sampling parameters.
        max_tokens: Maximum number of tokens of an answer; -1 for no limit.
        seed: Seed of the first answer, or None.
        toolbar: Text below the prompt.
    """

    sampling: SamplingDefaults
    max_tokens: int
    seed: int | None = None
    toolbar: str = ""

    def change(self, name: str, value: str) -> None:
        """Change one setting by its name, written as an option or with underscores.

        Raises:
            RequestError: If there is no such setting, or the value is outside its bounds.
        """
        key = name.removeprefix("--").replace("-", "_")
        if key not in _BOUNDS:
            known = ", ".join(name.replace("_", "-") for name in _BOUNDS)
            raise RequestError(f"[/set] {name} is no setting. There are {known}.")
        least, most = _BOUNDS[key]
        try:
            number: Any = type(least)(value)
        except ValueError:
            number = None
        unlimited = key == "max_tokens" and number == -1
        if number is None or not (unlimited or least <= number <= most):
            also = " or -1 for no limit" if key == "max_tokens" else ""
            raise RequestError(f"[/set] {name} takes a number from {least} to {most}{also}, got {value!r}.")
        if key == "max_tokens":
            self.max_tokens = number
        else:
            self.sampling = replace(self.sampling, **{key: number})

    def sampler(self) -> Callable[[Any], Any]:
        """Return mlx_lm's sampler of these settings."""
        seed, self.seed = self.seed, None
        return sampler(self.sampling, seed)

    def __str__(self) -> str:
        return f"{self.sampling}; max-tokens {self.max_tokens}"
