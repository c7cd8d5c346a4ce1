"""``flash-moe bench``: the speed of a model, and of kernels alone (``flash-moe bench kernels``)."""

import typer

from .options import Model

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context, model: Model = None) -> None:
    """Measure decode speed.

    Examples:
        flash-moe bench --json
    """
    if context.invoked_subcommand is not None:
        return
