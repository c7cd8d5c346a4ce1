"""The cases of the table: what is run, and what is asked of it."""

from dataclasses import dataclass

from benchmarks.peers.control_group import GIB

OVERHEAD_BYTES = 600_000_000
"""Memory of a process besides its memory_limit: interpreter, libraries, tokenizer."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: Name of the row.
        limit_gib: Limit of the control group; None for none.
        routing: "uniform" or "local".
        prompt: Tokens that go in together.
        warmup: Tokens decoded before the measured ones.
        tokens: Tokens measured at most; 0 where the prompt is what counts.
        warm: Read the model's files through before: into the page cache as far as it goes.
        layers: Fewer than the model's, where an engine must hold all of it in memory.
        greedy: Each engine takes its own most probable tokens, and they are compared.
        targets: What our figure over an engine's must reach.
        prompt_is: Case that this one's prompt is a run of: it isn't run by itself.
    """

    name: str
    limit_gib: int | None
    routing: str
    prompt: int = 1
    warmup: int = 24
    tokens: int = 24
    warm: bool = False
    layers: int | None = None
    greedy: bool = False
    targets: tuple[tuple[str, str, float], ...] = ()
    prompt_is: str | None = None

    @property
    def limit_bytes(self) -> int | None:
        return None if self.limit_gib is None else self.limit_gib * GIB

    @property
    def measures_prompt(self) -> bool:
        return self.tokens == 0


def _against_llama(least: float, ours: str = "ours") -> tuple[tuple[str, str, float], ...]:
    return ((ours, "llama.cpp", least), (ours, "llama.cpp-ra128", least))


_EIGHT = _against_llama(8)
CASES = {
    case.name: case
    for case in (
        Case("decode-12gib-uniform", 12, "uniform", targets=_EIGHT),
        Case("decode-8gib-uniform", 8, "uniform", targets=_EIGHT),
        Case("decode-4gib-uniform", 4, "uniform", targets=_EIGHT),
        Case("decode-8gib-local", 8, "local", prompt=128, warmup=32, tokens=32,
             targets=_against_llama(0.7) + _against_llama(0.9, "ours-8bit")),
        Case("decode-4gib-local", 4, "local", targets=_EIGHT),
        Case("decode-unlimited", None, "uniform", prompt=512, warmup=8, tokens=32, warm=True,
             targets=_against_llama(0.7) + _against_llama(1.0, "ours-8bit"), prompt_is="prefill-unlimited"),
        Case("prefill-unlimited", None, "uniform", prompt=512, warmup=0, tokens=0, warm=True,
             targets=_against_llama(0.7)),
        Case("prefill-8gib", 8, "uniform", prompt=512, warmup=0, tokens=0, targets=_against_llama(1.0)),
        # float32 is the faster of mlx-lm's two on a CPU; with it 40 layers don't fit into 24 GiB.
        Case("decode-resident", None, "uniform", prompt=1, warmup=2, tokens=6, warm=True, layers=32, greedy=True,
             targets=(("ours", "mlx-lm-float32", 5), ("ours", "mlx-optiq-float32", 5))),
    )
}  # fmt: skip
