"""Compares records that were read with the checksums of a packed checkpoint: all, a sample, or none."""

import itertools
import logging
import zlib

from ..errors import ChecksumError, RequestError
from ..formats.checkpoint import Checkpoint
from .file_io import read_from_disk

logger = logging.getLogger(__name__)

SAMPLE_INTERVAL = 16
"""``verify="sample"`` checks one record in this many."""

_INTERVALS: dict[object, int] = {False: 0, "sample": SAMPLE_INTERVAL, "full": 1}


class RecordCheck:
    """Compares records with their checksums. Safe to use from several threads; stock checkpoints have nothing to check.

    Attributes:
        interval: One record in this many is checked; 0 checks none.
    """

    def __init__(self, checkpoint: Checkpoint, verify: str | bool):
        """Choose which records to check. Raises RequestError for an invalid ``verify``, or one that can't be done."""
        if verify not in _INTERVALS or verify is True:
            raise RequestError(
                f'[verify] must be "sample", "full" or False, got {verify!r}. Leave it out for "sample".'
            )
        if verify == "full" and not checkpoint.manifest:
            raise RequestError(
                '[verify] "full" needs the checksums of a packed checkpoint, got one without. '
                'Make one with "flash-moe pack", or leave verify out.'
            )
        self._checkpoint = checkpoint
        self.interval = _INTERVALS[verify] if checkpoint.manifest else 0
        self._records = itertools.count()

    def is_due(self) -> bool:
        """Return whether the record that was just read should be checked."""
        return self.interval > 0 and next(self._records) % self.interval == 0

    def find_error(self, layer: int, expert: int, buffer: memoryview) -> ChecksumError | None:
        """Compare a record with its checksum; if it differs, read it once more, bypassing the page cache.

        Args:
            layer: Number of the layer.
            expert: Number of the expert.
            buffer: The record's bytes; a second read overwrites them.
        """
        (where,) = self._checkpoint.ranges(layer, expert)
        record, expected = buffer[: where.nbytes], self._checkpoint.checksum(layer, expert)
        if zlib.crc32(record) == expected:
            return None
        logger.warning("layer %d expert %d: the checksum differs, the record is read again", layer, expert)
        problem = "another twice"
        try:
            if read_from_disk(where.path, record, where.file_offset) == where.nbytes and zlib.crc32(record) == expected:
                return None
        except OSError as error:
            problem = f"another, and {error}"
        return ChecksumError(
            f"[ExpertStore] layer {layer} expert {expert}: {where.nbytes} bytes at offset {where.file_offset} of "
            f"{where.path.name} must have the checksum they were packed with, got {problem}. The file is damaged: run "
            f'"flash-moe verify {self._checkpoint.directory}", then pack or download it again.'
        )
