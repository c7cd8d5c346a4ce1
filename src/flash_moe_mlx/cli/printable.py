"""Text of a model or a tool, made safe for a terminal."""


def printable(text: str) -> str:
    """The text without control characters: a model's words must not move the cursor or hide a tool call."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
