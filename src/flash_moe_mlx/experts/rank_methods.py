"""RankMethods: what an engine offers to ranks that share its model, besides computing."""

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .distributed import Share
from .leading import Leader


class RankMethods:
    """Methods of `StreamingEngine` about the group of processes that share its experts.

    Attributes:
        leader: This rank's announcements to the others, while it leads them.
        lock: The engine's lock.
    """

    leader: Leader | None
    lock: threading.RLock
    _share: Share | None

    @property
    def rank(self) -> int:
        """This process's number among those that share the experts; 0 if it is alone."""
        return 0 if self._share is None else self._share.ranks.rank

    @property
    def ranks(self) -> int:
        """Number of processes that share the experts; 1 if it is alone."""
        return 1 if self._share is None else self._share.ranks.size

    def lead(self) -> None:
        """Announce this rank's operations to the others from now on, if there are others."""
        if self._share is not None:
            self.leader = Leader(self._share.ranks, self.lock)

    def end_lead(self) -> None:
        """Let the ranks that follow leave."""
        leader, self.leader = self.leader, None
        if leader is not None:
            leader.end()

    def next_command(self) -> dict[str, Any]:
        """Return what the rank that leads announces next.

        Raises:
            DistributedError: If the group fails.
        """
        assert self._share is not None
        return self._share.ranks.next_command()

    def check_ranks(self) -> None:
        """Check that the ranks can still compute together.

        Raises:
            DistributedError: If they can't.
        """
        if self._share is not None:
            self._share.ranks.check()

    def when_ranks_fail(self, call: Callable[[], None]) -> None:
        """Call a function once on another thread if the ranks can't compute together any more."""
        if self._share is not None:
            self._share.ranks.on_failure = call

    def free_buffers(self) -> None:
        """Free MLX's cache of buffers.

        MLX may report here once more that a collective has failed, which must not hide the ranks' own reason.
        """
        try:
            mx.clear_cache()
        except RuntimeError:
            if self._share is None or not self._share.ranks.failed:
                raise
