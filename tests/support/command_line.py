"""Runs ``flash-moe`` in this process: one import of mlx and transformers serves all commands."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from flash_moe_mlx.cli.main import app


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command line and return its output and exit status; exceptions that it should have handled are raised."""
    result = CliRunner().invoke(app, list(arguments), input=stdin, prog_name="flash-moe")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: str, stdin: str | None = None) -> str:
    """Standard output of a command that must succeed."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*arguments: str, stdin: str | None = None) -> Any:
    """The one JSON document of a command."""
    return json.loads(succeed(*arguments, stdin=stdin))


def refusal(*arguments: str, stdin: str | None = None) -> str:
    """The one line of an error that the user can mend: nothing on standard output, exit code 2."""
    result = invoke(*arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("flash-moe: ")
    return line
