"""ApiError: the answer to a request that can't be served, in the shape that OpenAI's clients read."""

from typing import Any

from ..errors import FlashMoEError, RequestError
from ..runtime.prompt_text import PromptTooLongError


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: HTTP status.
        message: Text that says what must hold, what was found and what to do.
        param: The request's offending field, if there is one.
        code: A short name for programs to compare.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the status."""
        return _HEADERS.get(self.status, {})


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}


_ANTHROPIC = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
              404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
              503: "overloaded_error"}  # fmt: skip


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return the JSON body of an error as Anthropic's clients read it."""
    kind = _ANTHROPIC.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def failed_generation(error: BaseException) -> ApiError:
    """Return the error to send to a client whose generation ended with ``error``.

    The library's own errors are written for people; of all others only the type is revealed.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    told = str(error) if isinstance(error, FlashMoEError) else f"the generation failed with {type(error).__name__}"
    return ApiError(500, told, code="generation_failed")
