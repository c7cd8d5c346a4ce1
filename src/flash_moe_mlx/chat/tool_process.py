"""Calls one function of a file, in a process of its own: a script that imports nothing of the package.

Reads a request from standard input and writes a reply to what was standard output, both JSON. Whatever the function
prints itself goes nowhere. What it raises is reported by the exception hook.
"""

import importlib.util
import json
import os
import sys
from types import TracebackType


def main() -> None:
    """Read the request, call, reply."""
    request = json.load(sys.stdin)
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for stream in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)

    def answer(ok: bool, text: str) -> None:
        limit = request["max_characters"]
        if len(text) > limit:
            text = f"{text[:limit]}\n[cut here: {len(text)} characters]"
        json.dump({"ok": ok, "text": text}, reply)
        reply.close()

    def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        answer(False, f"{kind.__name__}: {error}")

    sys.excepthook = report
    spec = importlib.util.spec_from_file_location("tools", request["path"])
    if spec is None or spec.loader is None:
        raise ImportError(f"{request['path']} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    value = getattr(module, request["name"])(**request["arguments"])
    answer(True, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
