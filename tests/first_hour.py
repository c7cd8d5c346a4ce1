"""Plays a newcomer's first hour: a clean clone, an empty home, and what README and quickstart print, in order.

    python tests/first_hour.py                       # with the environment that runs this
    python tests/first_hour.py --environment .venv   # with another one, as `make demo` made it

Commands come from the pages, so a page that changes is played as it is then. Each must end with 0 and print what
`SAYS` has for it; what the first token waits for must be said on the terminal within `PATIENCE_SECONDS`.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pexpect

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/quickstart.md")
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE_SECONDS = 30.0  # a second where nothing else runs
SAYS = {
    "chat": "42",
    "generate": "42",
    "serve": "Serving demo at http://127.0.0.1:",
    "doctor": "backend",
    "models": "mlx-community/",
    "plan": "smallest limit",
}
CHAT = "What is 17 + 25?\nyes\n"  # it asks before it runs the calculator


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page that run flash-moe on the embedded model, or need none."""
    lines = [line for block in BLOCK.findall((ROOT / page).read_text()) for line in block.splitlines()]
    lines += re.findall(r"^    (flash-moe .*)$", (ROOT / page).read_text(), re.MULTILINE)
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "flash-moe"]


class Newcomer:
    """Somebody with a clone, a home without anything, and an environment."""

    def __init__(self, folder: Path, environment: Path):
        self.clone, home = folder / "clone", folder / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(self.clone)], check=True)
        self.variables = {
            "PATH": f"{environment / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "PYTHONPATH": str(self.clone / "src"),  # the environment may have another checkout's
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
        }

    def first_token(self) -> float:
        """Ask on a terminal, with nothing compiled yet; return the seconds until something is said."""
        started = time.monotonic()
        asked = ["-m", "flash_moe_mlx", "generate", "What is 17 + 25?"]
        terminal = pexpect.spawn("python", asked, cwd=str(self.clone), env=self.variables, timeout=600)
        terminal.expect("importing")
        seconds = time.monotonic() - started
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0, terminal.before
        return seconds

    def run(self, words: list[str]) -> str:
        """Run one command; a server is ended once it serves."""
        command = ["python", "-m", "flash_moe_mlx", *words[1:]]
        if words[1] != "serve":
            done = self._run(command, CHAT if words[1] == "chat" else None)
            assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
            return done.stdout
        server = pexpect.spawn(command[0], [*command[1:], "--port", "0"], cwd=str(self.clone), env=self.variables)
        server.expect(re.escape(SAYS["serve"]), timeout=300)
        server.sendintr()
        server.expect(pexpect.EOF, timeout=60)
        return SAYS["serve"]

    def python_of(self, page: str) -> str:
        """Run the first Python block of a page in the clone's root; return what it prints."""
        block = re.search(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        assert block is not None
        done = self._run(["python", "-c", block[1]])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _run(self, command: list[str], said: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, input=said or "", cwd=self.clone, env=self.variables, capture_output=True, text=True, check=False,
            timeout=600,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Plays a newcomer's first hour.")
    parser.add_argument("--environment", type=Path, default=Path(sys.prefix), help="a virtual environment")
    environment = parser.parse_args().environment.absolute()
    assert os.access(environment / "bin" / "python", os.X_OK), f"{environment} is no environment"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
    with tempfile.TemporaryDirectory() as folder:
        newcomer = Newcomer(Path(folder), environment)
        seconds = newcomer.first_token()
        print(f"the first token said after {seconds:.1f} s what it waits for")
        assert seconds < PATIENCE_SECONDS
        assert "mixture-of-experts model" in newcomer.python_of("README.md")
        played: set[tuple[str, ...]] = set()
        for page in PAGES:
            for words in commands(page):
                if tuple(words) in played:
                    continue
                played.add(tuple(words))
                said = newcomer.run(words)
                assert SAYS[words[1]] in said, f"{page}: {words}\n{said}"
                print(f"{page}: {shlex.join(words)}")
        assert {words[1] for words in played} == SAYS.keys(), "a page no longer prints a command, or prints a new one"


if __name__ == "__main__":
    main()
