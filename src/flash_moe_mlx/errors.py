"""The exception tree. Every error says where it happened, what was expected, what was found and what to do.

    FlashMoEError
    +-- CheckpointError            the files can't be used as a checkpoint
    |   +-- MissingTensorError     a tensor, shard or file that must be there is not
    |   +-- CorruptError           bytes or header contradict themselves
    |   +-- UnsupportedModelError  a well-formed checkpoint of a kind this library doesn't serve
    +-- MemoryLimitError           the memory limit can't hold what was asked for
    +-- StoreError                 reading experts failed
    |   +-- ShortReadError         a file ended before the record did
    |   +-- ChecksumError          a record's bytes are not those that were packed (also a CorruptError)
    +-- PackError                  packing stopped; what was done is kept, and running it again resumes
    |   +-- DiskFullError          the disk has too little room for the result
    +-- ShapeError                 an array's shape breaks a kernel's contract
    +-- NonFiniteError             the model computed NaN or infinity
    +-- DistributedError           the ranks that share a model's experts can't compute together
    +-- BackendError               MLX can't run on this machine as it is installed (also an ImportError)
    +-- RequestError               an argument of a call is not usable (also a ValueError)

Messages follow ``[where] what must hold, got what. What to do.``
"""


class FlashMoEError(Exception):
    """Base class of every error this library raises on purpose."""


class CheckpointError(FlashMoEError):
    """The directory can't be used as a checkpoint."""


class MissingTensorError(CheckpointError):
    """A tensor, shard or file that the checkpoint must have is absent."""


class CorruptError(CheckpointError):
    """A file's bytes or header contradict themselves or each other."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is well-formed but of a kind that this library does not serve."""


class MemoryLimitError(FlashMoEError):
    """The memory limit is too small for the request.

    Attributes:
        smallest_limit_bytes: The smallest limit that works, or None if unknown.
    """

    def __init__(self, message: str, smallest_limit_bytes: int | None = None):
        super().__init__(message)
        self.smallest_limit_bytes = smallest_limit_bytes


class StoreError(FlashMoEError):
    """Reading expert records failed."""


class ShortReadError(StoreError):
    """A file ended before the record did."""


class ChecksumError(StoreError, CorruptError):
    """A record was read completely, twice, and doesn't match its checksum."""


class PackError(FlashMoEError):
    """Packing stopped. Finished work is kept: repeat the same call to resume."""


class DiskFullError(PackError):
    """The disk has too little free space.

    Attributes:
        missing_bytes: Additional bytes that must be free.
    """

    def __init__(self, message: str, missing_bytes: int):
        super().__init__(message)
        self.missing_bytes = missing_bytes


class ShapeError(FlashMoEError):
    """An array's shape breaks a kernel's contract."""


class NonFiniteError(FlashMoEError):
    """The model computed NaN or infinity.

    Attributes:
        layer: Index of the first layer concerned; None if outside the layers or unknown.
        token: Index of the first token concerned in the forward pass, if known.
    """

    def __init__(self, message: str, layer: int | None = None, token: int | None = None):
        super().__init__(message)
        self.layer = layer
        self.token = token


class DistributedError(FlashMoEError):
    """Ranks that share a model's experts can't compute together: one has ended, hangs, failed or differs."""


class BackendError(FlashMoEError, ImportError):
    """MLX, or its backend for this machine, is not installed or can't be loaded."""


class RequestError(FlashMoEError, ValueError):
    """An argument of a call is invalid."""
