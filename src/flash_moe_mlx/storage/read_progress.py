"""ReadProgress: the last moment at which reads moved on, so that a disk that hangs ends in an error."""

import time

READ_TIMEOUT_SECONDS = 60.0
"""Time without a single finished piece (1 MiB at most) after which reads count as hanging.

Disks that spin up or are reset answer within 30 seconds, and a piece takes as long only below 20 kB/s.
"""


class ReadProgress:
    """The last moment at which the reads of one store moved on. Time counts only while reads are in progress.

    Attributes:
        seconds: Time without progress after which they count as hanging.
    """

    def __init__(self, seconds: float = READ_TIMEOUT_SECONDS):
        self.seconds = seconds
        self._since: float | None = None

    def note(self) -> None:
        """Note that reads have begun or moved on."""
        self._since = time.monotonic()

    def end(self) -> None:
        """Note that no read is in progress any more."""
        self._since = None

    def is_stalled(self) -> bool:
        """Return whether reads are in progress and have not moved on for too long."""
        since = self._since
        return since is not None and time.monotonic() - since > self.seconds
