"""The guard around other libraries: their exceptions become typed, ours and interrupts pass."""

import json

import pytest

from flash_moe_mlx import CheckpointError, CorruptError
from flash_moe_mlx.formats import foreign
from flash_moe_mlx.formats.foreign import ForeignCode, say


def refuse(error: BaseException) -> CheckpointError:
    return CheckpointError(f"[x] must work, got {say(error)}. Do something.")


class PanicException(BaseException):
    """Named as pyo3's."""


@pytest.mark.parametrize(
    "error",
    [Exception("bare"), KeyError("a"), RecursionError(), ZeroDivisionError(), MemoryError(), PanicException("p")],
)
def test_whatever_a_library_raises_is_typed(error: BaseException):
    with pytest.raises(CheckpointError, match=type(error).__name__) as raised, ForeignCode(refuse):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), CorruptError("[y] typed. Already.")])
def test_interrupts_and_typed_errors_pass(error: BaseException):
    with pytest.raises(type(error)) as raised, ForeignCode(refuse):
        raise error
    assert raised.value is error


def test_a_bug_of_our_own_is_not_blamed_on_a_file():
    """A library that calls back into this package, and the fault is there."""
    hook = compile("def hook(pairs):\n    return pairs.nothing", foreign.__file__, "exec")
    ours: dict[str, object] = {"__name__": foreign.__name__}
    exec(hook, ours)
    with pytest.raises(AttributeError), ForeignCode(refuse):
        json.loads("{}", object_pairs_hook=ours["hook"])


def test_nothing_happens_where_nothing_is_raised():
    with ForeignCode(refuse):
        pass


def test_messages_stay_short():
    assert len(say(ValueError("x" * 5000))) < 400
    assert say(ValueError("first\nsecond")) == "ValueError: first"
    assert say(ValueError()) == "ValueError"
