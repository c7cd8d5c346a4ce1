"""``flash-moe``: registers the commands and handles errors, Ctrl-C and closed pipes.

To add a command:
1. Write its module here, ``cli/NAME.py``, with one function NAME. Its parameters are the options, with the types of
   options.py where they fit (``Model``, ``MemoryLimit``, ``Json`` ...). Keep the imports at the top light: import
   mlx, mlx_lm, transformers, rich and the library's own modules inside the function, so that ``flash-moe --help``
   stays quick. The docstring is the help: a summary that fits in a line of the list of commands, details, and a section
   "Examples:".
2. Register it below: import its module and add one line ``add_command(app, NAME.NAME, PANEL)``.
3. Print text with `printable.echo`; with ``--json`` print exactly one JSON document with `options.print_json`.
   Raise FlashMoEErrors: each becomes one line on stderr and exit code 2.
4. Run ``make docs``, which writes docs/cli.md from the help. tests/cli/test_main.py checks the rest.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import FlashMoEError
from ..installation import explain_import
from ..progress import showing
from . import bench, chat, doctor, generate, launch, models, pack, plan, pull, quality, serve, simulate, trace, verify
from .help import PanelGroup
from .logs import log_to_stderr
from .options import CHOOSE, PREPARE, USE, add_command, add_group
from .printable import echo, make_streams_total
from .wording import as_options, usage

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, the shell convention
PIPE_CLOSED = 141  # 128 + SIGPIPE, the shell convention


class _Commands(PanelGroup):
    """A command group that handles errors the same way for every command."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *arguments: Any, **extra: Any
    ) -> Any:
        make_streams_total()
        args = verbose_first(sys.argv[1:] if args is None else args)
        try:
            extra["standalone_mode"] = False
            with showing(True), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                code = super().main(args, prog_name, *arguments, **extra)
        except typer.TyperException as error:  # wrong usage
            context = getattr(error, "ctx", None)
            named = next((argument for argument in args if argument in self.commands), "")
            path = context.command_path if context is not None else f"flash-moe {named}".rstrip()
            code = _fail(error, f"{usage(error)} See {path} --help.")
        except FlashMoEError as error:
            code = _fail(error, as_options(str(error)))
        except ImportError as error:
            if not (fault := explain_import(error)):
                raise
            code = _fail(error, fault)
        except OSError as error:
            code = _fail(error, f"[{_where(error)}] {error.strerror or error}. {_advice(error)}")
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Otherwise Python would flush the buffer at exit, and fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        return result


def verbose_first(args: Sequence[str]) -> list[str]:
    """Return arguments with ``-v`` and ``--verbose`` moved before the command, where the group takes them."""
    end = args.index("--") if "--" in args else len(args)
    is_verbose = [place < end and argument in ("-v", "-vv", "--verbose") for place, argument in enumerate(args)]
    moved = [argument for argument, moves in zip(args, is_verbose, strict=True) if moves]
    return moved + [argument for argument, moves in zip(args, is_verbose, strict=True) if not moves]


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """Print a warning as one line, without the source line that raised it."""
    echo(f"flash-moe: warning: {' '.join(str(message).split())}", err=True)


def _where(error: OSError) -> str:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes) else "system"


def _advice(error: OSError) -> str:
    if error.errno in _ADVICE:
        return _ADVICE[error.errno]
    return "See -vv for where it was raised." if error.filename is None else "Check the path."


_ADVICE: dict[int | None, str] = {
    errno.ENOSPC: "Free some space on the disk.",
    errno.EDQUOT: "Free some space on the disk.",
    errno.EMFILE: "Raise the limit on open files: ulimit -n.",
    errno.ENOMEM: "Free some memory, or lower --memory-limit.",
    errno.EROFS: "Choose a path that can be written.",
}


def _fail(error: Exception, message: str) -> int:
    logger.debug("where the error was raised", exc_info=error)
    echo("flash-moe: " + " ".join(message.split()), err=True)
    return 2


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,  # help.py lays the help out
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def flash_moe(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, help="Log to stderr; twice for details and tracebacks."
        ),
    ] = 0,
) -> None:
    """Run Mixture-of-Experts models larger than memory by streaming experts from the SSD.

    Without --model, commands run the small demo model that comes with the package.
    """
    if verbose:
        log_to_stderr()
        logging.getLogger("flash_moe_mlx").setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    if version:
        echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


add_command(app, generate.generate, USE)
add_command(app, chat.chat, USE)
add_command(app, serve.serve, USE)
add_command(app, launch.launch, USE)
add_command(app, models.models, CHOOSE)
add_command(app, pull.pull, CHOOSE)
add_command(app, plan.plan, CHOOSE)
add_command(app, doctor.doctor, CHOOSE)
add_command(app, pack.pack, PREPARE)
add_command(app, verify.verify, PREPARE)
add_command(app, quality.quality, PREPARE)
add_command(app, trace.trace, PREPARE)
add_command(app, simulate.simulate, PREPARE)
add_group(app, bench.app, bench.bench, PREPARE)
