"""Texts of others in Markdown and in Python code, as what they are: texts."""

import html
from typing import Any

ENTITIES = str.maketrans({"|": "&#124;", "`": "&#96;", "[": "&#91;", "]": "&#93;"})


def escape(text: Any) -> str:
    """Write a text into a heading or a table's cell: on one line, without markup, links or a cell's end in it.

    Args:
        text (Any): such as the name of a run or a group.

    Returns:
        str: Markdown that shows the text.
    """
    return html.escape(" ".join(str(text).split()), quote=False).translate(ENTITIES)


def code(text: Any) -> str:
    """Write a text as code within a line. Backticks, which would end it, become apostrophes."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def literal(text: str) -> str:
    """Write a text as a Python string in double quotes, on one line and without backticks.

    Args:
        text (str): such as a prompt.

    Returns:
        str: code whose value is the text.
    """
    quoted = repr(text)
    if quoted.startswith("'"):
        quoted = '"' + quoted[1:-1].replace('"', '\\"') + '"'
    return quoted.replace("`", "\\x60")
