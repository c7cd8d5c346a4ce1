"""Records a session of flash-moe as docs/images/demo.cast (asciinema's format) and renders it to demo.svg.

python docs/record_demo.py            # records and renders; needs pexpect and pyte
python docs/record_demo.py --render   # renders the cast that is there
"""

import argparse
import json
import re
import sys
import time
from contextlib import suppress
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
COLUMNS, ROWS = 104, 20
CHARACTER, LINE, MARGIN = 8.4, 19, 14
HOLD_SECONDS = 4.0  # of the last frame
FRAME_SECONDS = 0.1
LETTER_SECONDS = 0.03
COLOURS = {"default": "#d0d7de", "cyan": "#56d4dd", "green": "#7ee787", "brown": "#d29922", "yellow": "#d29922",
           "magenta": "#d2a8ff", "blue": "#79c0ff", "red": "#ff7b72", "black": "#6e7681", "brightblack": "#8b949e",
           "white": "#f0f6fc"}  # fmt: skip
SPINNER = re.compile("[\u2800-\u28ff]")
PROMPT, READY, CONFIRM = "$\x1b[0m ", "\x1b[?2004h", "always: "  # of the shell, the chat, and before a tool's call
STEPS = (
    (PROMPT, 'flash-moe generate "Explain mixture-of-experts in one line." --memory-limit 14MB --max-context 128'),
    (PROMPT, "flash-moe chat"),
    (READY, "What is 17 + 25?"),
    (CONFIRM, "yes"),
    (READY, "Tell me a story about a small fox."),
    (READY, "/exit"),
)


def record() -> None:
    """Type the steps into a shell, and keep what it prints with its times."""
    import pexpect
    import pyte

    shell = pexpect.spawn("bash", ["--norc", "-i"], dimensions=(ROWS, COLUMNS), encoding="utf-8", timeout=300,
                          env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "TERM": "xterm-256color",
                               "HOME": "/tmp", "PS1": r"\[\e[32m\]$\[\e[0m\] "})  # fmt: skip
    shell.delaybeforesend = None
    screen = pyte.Screen(COLUMNS, ROWS)
    screen.write_process_input = shell.send  # the chat's toolbar appears once it has been told where the cursor is
    stream = pyte.Stream(screen)
    events: list[tuple[float, str]] = []
    started = time.monotonic()

    def hear(timeout: float) -> str:
        piece: str = shell.read_nonblocking(4096, timeout=timeout)
        events.append((time.monotonic() - started, piece))
        stream.feed(piece)
        return piece

    def watch(until: str) -> None:
        seen = ""
        while until not in seen[-2000:]:
            seen += hear(300)

    def listen(seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with suppress(pexpect.TIMEOUT):
                hear(left)

    for until, text in STEPS:
        watch(until)
        listen(0.5)  # what is drawn with it, such as the toolbar
        for letter in text:
            shell.send(letter)
            listen(LETTER_SECONDS)
        shell.send("\r")
    watch(PROMPT)
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "flash-moe"}
    lines = [json.dumps(header), *(json.dumps([round(at, 3), "o", text]) for at, text in _shortened(events))]
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "demo.cast").write_text("\n".join(lines) + "\n")


def _shortened(events: list[tuple[float, str]], longest: float = 1.0) -> list[tuple[float, str]]:
    """Cut pauses and the time of spinners, so that nobody waits for imports."""
    shortened, before, now = [], 0.0, 0.0
    for at, text in events:
        now += min(at - before, longest) * (0.1 if SPINNER.search(text) else 1.0)
        before = at
        shortened.append((now, text))
    return shortened


def frames() -> list[tuple[float, list[str]]]:
    """Return the screens of the cast: when each begins, and its lines as SVG."""
    import pyte

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    found: list[tuple[float, list[str]]] = []
    for line in (IMAGES / "demo.cast").read_text().splitlines()[1:]:
        at, _, text = json.loads(line)
        stream.feed(text.replace("\x1b[2m", "\x1b[90m"))  # pyte knows no dim text
        lines = [_line(screen.buffer[row]) for row in range(ROWS)]
        if found and at - found[-1][0] < FRAME_SECONDS:
            found[-1] = (found[-1][0], lines)
        elif not found or found[-1][1] != lines:
            found.append((at, lines))
    return found


def _line(cells: dict) -> str:
    """Return one line of the screen as tspans of equal style."""
    runs: list[tuple[str, str]] = []
    for column in range(COLUMNS):
        cell = cells[column]
        colour = COLOURS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else COLOURS["default"])
        style = f'fill="{colour}"' + (' font-weight="bold"' if cell.bold else "")
        style += ' font-style="italic"' if cell.italics else ""
        if runs and runs[-1][0] == style:
            runs[-1] = (style, runs[-1][1] + (cell.data or ""))
        else:
            runs.append((style, cell.data or ""))
    runs[-1] = (runs[-1][0], runs[-1][1].rstrip())
    return "".join(f"<tspan {style}>{escape(text)}</tspan>" for style, text in runs if text)


def render() -> None:
    """Write demo.svg: every frame a group, shown in its turn by a CSS animation."""
    shown = frames()
    total = shown[-1][0] + HOLD_SECONDS
    width, height = round(2 * MARGIN + COLUMNS * CHARACTER), 2 * MARGIN + ROWS * LINE + 22
    style, groups = [], []
    for number, (at, lines) in enumerate(shown):
        end = shown[number + 1][0] if number + 1 < len(shown) else total
        style.append(
            f"@keyframes k{number}{{0%{{visibility:hidden}}{100 * at / total:.3f}%{{visibility:visible}}"
            f"{100 * end / total:.3f}%{{visibility:{'visible' if end == total else 'hidden'}}}}}"
            f"#f{number}{{animation:k{number} {total:.2f}s step-end infinite}}"
        )
        rows = "".join(
            f'<text x="{MARGIN}" y="{MARGIN + 34 + row * LINE}">{line}</text>' for row, line in enumerate(lines) if line
        )
        # Where animations don't run, such as in a still picture, the last frame is what one sees.
        hidden = "" if number + 1 == len(shown) else ' visibility="hidden"'
        groups.append(f'<g id="f{number}"{hidden}>{rows}</g>')
    dots = "".join(
        f'<circle cx="{18 + 18 * i}" cy="16" r="5" fill="{c}"/>'
        for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    (IMAGES / "demo.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" aria-label="flash-moe answers in a terminal">'
        "<style>text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}"
        f"{''.join(style)}@media (prefers-reduced-motion:reduce){{g{{animation:none!important}}}}"
        f'</style><rect width="100%" height="100%" rx="8" fill="#161b22"/>{dots}{"".join(groups)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Records and renders the picture on the README's first screen.")
    parser.add_argument("--render", action="store_true", help="only render the cast that is there")
    if not parser.parse_args().render:
        record()
    render()


if __name__ == "__main__":
    main()
