"""The static pages, each served with a policy that lets nothing run, load or connect but what the page itself holds."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

PAGES = {"/": "status.html", "/chat": "chat.html"}
"""Files of the pages, by path. They hold no data, and so need no API key."""

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Return a page's endpoint.

    Args:
        name: The page's file, next to this one.
    """
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def endpoint(request: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    return endpoint


def content_policy(text: str) -> str:
    """Return a page's Content-Security-Policy: its own scripts and styles by their hashes, and requests to this server.

    Trusted Types are on without a policy, so that no script can turn text into markup.
    """
    sources: dict[str, list[str]] = {"script": [], "style": []}
    for kind, body in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        sources[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(sources['script'])}; style-src {' '.join(sources['style'])}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
