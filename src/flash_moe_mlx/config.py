"""Settings of a run: sizes given as text, and load's arguments once validated."""

import re
from dataclasses import dataclass

from .errors import RequestError

READ_MODES = ("mmap", "pread", "direct")
IO_MODES = ("auto", *READ_MODES)
DEFAULT_PREFILL_STEP_SIZE = 2048
"""Default number of prompt tokens per forward pass, as in mlx_lm."""

TABLE_BYTES = 256_000_000
"""Size up to which lookup tables stay in memory."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(size: int | str, name: str = "memory_limit") -> int:
    """Return the number of bytes of a size given as a number or text: ``8_000_000_000``, "8GB" (10^9) or "8GiB" (2^30).

    Args:
        size: The size.
        name: The argument that it is given as, for errors.

    Raises:
        RequestError: If the size is not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        nbytes = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        number, unit, binary = match.groups()
        nbytes = int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])
    else:
        raise RequestError(f'[{name}] must be bytes or a text with a unit, got {size!r}. Try "8GB" or "7.5GiB".')
    if nbytes <= 0:
        raise RequestError(f'[{name}] must be positive, got {size!r}. Try "8GB", or None for a safe share.')
    return nbytes


@dataclass(frozen=True)
class StreamingConfig:
    """Validated arguments of load.

    Attributes:
        memory_limit_bytes: Maximum memory; None chooses a default for this machine.
        max_context: Context length to reserve memory for, in tokens.
        num_experts_per_tok: Override of the router's K; fewer than the model's own is lossy.
        io: How expert bytes are read: "auto", "mmap", "pread" or "direct".
        prefill_step_size: Tokens per forward pass to reserve scratch memory for.
        activation_bits: 8 quantises activations in CPU decode to 8 bits (lossy); None is exact.
        trust_remote_code: Whether the checkpoint's Python files may be run.
        gpu_memory_limit_bytes: The hard bound on a GPU's own memory; None leaves the choice to the GPU.
        table_bytes: Lookup tables of more bytes, and more rows than the vocabulary, stay in their files.
    """

    memory_limit_bytes: int | None = None
    max_context: int = 8192
    num_experts_per_tok: int | None = None
    io: str = "auto"
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE
    activation_bits: int | None = None
    trust_remote_code: bool = False
    gpu_memory_limit_bytes: int | None = None
    table_bytes: int = TABLE_BYTES

    @classmethod
    def from_arguments(
        cls,
        memory_limit: int | str | None,
        max_context: int,
        num_experts_per_tok: int | None,
        io: str,
        activation_bits: int | None = None,
        trust_remote_code: bool = False,
        gpu_memory_limit: int | str | None = None,
    ) -> "StreamingConfig":
        """Validate load's arguments.

        Raises:
            RequestError: If an argument is invalid; the message says which and why.
        """
        if not isinstance(max_context, int) or isinstance(max_context, bool) or max_context < 1:
            raise RequestError(f"[max_context] must be a positive number of tokens, got {max_context!r}. Try 8192.")
        if num_experts_per_tok is not None and (
            not isinstance(num_experts_per_tok, int) or isinstance(num_experts_per_tok, bool) or num_experts_per_tok < 1
        ):
            raise RequestError(
                f"[num_experts_per_tok] must be a number from 1, got {num_experts_per_tok!r}. Leave it out for the "
                "model's own."
            )
        if activation_bits not in (None, 8):
            raise RequestError(
                f"[activation_bits] must be 8, got {activation_bits!r}. Leave it out for exact products."
            )
        if not isinstance(trust_remote_code, bool):
            raise RequestError(
                f"[trust_remote_code] must be True or False, got {trust_remote_code!r}. Leave it out for False."
            )
        if io not in IO_MODES:
            raise RequestError(f"[io] must be one of {', '.join(IO_MODES)}, got {io!r}. Leave it out for auto.")
        return cls(
            memory_limit_bytes=None if memory_limit is None else parse_size(memory_limit),
            max_context=max_context,
            num_experts_per_tok=num_experts_per_tok,
            io=io,
            activation_bits=activation_bits,
            trust_remote_code=trust_remote_code,
            prefill_step_size=min(DEFAULT_PREFILL_STEP_SIZE, max_context),
            gpu_memory_limit_bytes=(
                None if gpu_memory_limit is None else parse_size(gpu_memory_limit, "gpu_memory_limit")
            ),
        )
