"""Downloads a hub repository's headers without its weights: whole JSON files, and the headers of safetensors files.

Files have their real size with a hole in place of the data, so that code that reads a local checkpoint's headers works
with them. A hole takes no disk space and reads as zeros.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from ..errors import CheckpointError, CorruptError
from .safetensors_header import MAX_FILE_BYTES, MAX_HEADER_BYTES, brief

FIRST_BYTES = 1 << 17
"""Size of the first request: most headers are shorter; longer ones take a second request."""

_SAFETENSORS = re.compile(r"(?:experts/)?[^/\\\x00-\x1f]{1,200}\.safetensors")
_JSON = ("config.json", "model.safetensors.index.json", "experts.json")
_TOTAL = re.compile(r"bytes \d+-\d+/(\d{1,19})")
HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]
"""Network errors: httpx's or, since huggingface-hub 2, httpx2's."""


def download_headers(repository: str, directory: Path, revision: str | None = None) -> None:
    """Download a repository's headers into a directory.

    Args:
        repository: "owner/name" on the hub that huggingface_hub is set to.
        directory: Empty directory for the files.
        revision: Branch, tag or commit.

    Raises:
        CheckpointError: If the repository or a file can't be downloaded, or a header is invalid.

    Cost: FIRST_BYTES of each safetensors file, once more the header where it is longer, and the JSON files.
    """
    try:
        info = HfApi().model_info(repository, revision=revision)
        for name in (sibling.rfilename for sibling in info.siblings or ()):
            url = hf_hub_url(repository, name, revision=info.sha)
            if name in _JSON:
                (directory / name).write_bytes(_first_bytes(url, MAX_HEADER_BYTES)[0])
            elif _SAFETENSORS.fullmatch(name):
                _write_header(url, directory / name)
    # OSError covers "no such repository" and files.
    except (HTTPError, HFValidationError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"[plan] {repository} must be a local directory or a repository that the hub serves, got {reason}. "
            "Check name and network, or pass a local path."
        ) from error


def _write_header(url: str, path: Path) -> None:
    header, size = read_header(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        os.truncate(file.fileno(), size)


def read_header(url: str) -> tuple[bytes, int]:
    """Return a safetensors file's header, including the eight bytes of its length, and the file's size.

    What comes back is as long as the file says, at most MAX_HEADER_BYTES; whether it is a header is not checked.

    Raises:
        CorruptError: If the server gives no size.
        HTTPError: If the download fails.
    """
    start, size = _first_bytes(url, FIRST_BYTES)
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < end <= 8 + MAX_HEADER_BYTES:
        start, size = _first_bytes(url, end)
    return start[:end], size


def read_range(url: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a file from ``begin`` to ``end`` in pieces.

    Raises:
        CorruptError: If the server sends other bytes.
        HTTPError: If the download fails, perhaps after some pieces.
    """
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        response.raise_for_status()
        got = response.headers.get("Content-Range", "")
        if response.status_code != 206 or not got.startswith(f"bytes {begin}-{end - 1}/"):
            raise CorruptError(
                f"[hub] {brief(url)} must be served in ranges, got {response.status_code} {brief(got)} for bytes "
                f"{begin} to {end - 1}. Download the checkpoint whole."
            )
        yield from response.iter_bytes()


def _first_bytes(url: str, count: int) -> tuple[bytes, int]:
    """Return the first ``count`` bytes of a file, and its size. Stops after them if the server ignores Range."""
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    data = b""
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= count:
                break
        total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        length = total[1] if total else response.headers.get("Content-Length", "")
    if not length.isdigit() or int(length) > MAX_FILE_BYTES:
        raise CorruptError(f"[hub] {brief(url)} must have a size, got {brief(length)}. Download the checkpoint.")
    return data[:count], int(length)
