"""Markdown as models write it."""

from io import StringIO

import pytest
from rich.console import Console

from flash_moe_mlx.cli.markdown import Markdown


def shown(text: str) -> str:
    console = Console(file=StringIO(), width=60, color_system=None)
    console.print(Markdown(text))
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The area is \(\pi r^2\), so \[A = 4\]", r"The area is \(\pi r^2\), so \[A = 4\]"),
        ("Write <b>bold</b> in a <div>.", "Write <b>bold</b> in a <div>."),
        ("<details>\nhidden\n</details>", "<details> hidden </details>"),
        (r"Five \* six is \_30\_, **surely**.", "Five * six is _30_, surely."),
        ("[a link](https://example.org) and `a \\( b`", "a link and `a \\( b`"),
    ],
)
def test_what_is_no_markdown_stays_as_it_is(text: str, expected: str):
    assert shown(text).replace(" (https://example.org)", "").replace("`", "") == expected.replace("`", "")
