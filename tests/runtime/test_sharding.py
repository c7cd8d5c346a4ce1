"""Ranks that load together: the reason of one that fails is all ranks'."""

from types import SimpleNamespace

import pytest

from flash_moe_mlx.runtime import sharding


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyboardInterrupt(), "was interrupted while it loaded"), (OSError("no disk"), "could not load: no disk")],
)
def test_a_rank_that_fails_to_load_says_why(error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch):
    reasons: list[str] = []
    monkeypatch.setattr(sharding, "join_ranks", lambda timeout: SimpleNamespace(fail=reasons.append))
    with pytest.raises(type(error)), sharding.loading_together(None, 1.0):
        raise error
    assert reasons == [reason]
