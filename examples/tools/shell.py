"""A tool that runs shell commands: flash-moe chat --tools examples/tools/shell.py.

The model may do whatever you may. Read each command before you say yes, and never say always.
"""

import subprocess


def run_command(command: str) -> dict:
    """Run a shell command and return its output.

    Args:
        command: What to run, for example ls -l.
    """
    done = subprocess.run(
        command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    return {"exit_code": done.returncode, "output": done.stdout, "errors": done.stderr}
