"""Text of users inside Markdown: shown as it is, and never taken for Markdown, HTML or code."""

from __future__ import annotations

import html
import re

from .errors import printable


def plain(text: object) -> str:
    """Text in a sentence or a table cell.

    >>> plain("a|b <i>")
    'a\\\\|b &lt;i&gt;'
    """
    escaped = html.escape(" ".join(printable(str(text)).split()), quote=False)
    return re.sub(r"([\\`*\[\]|#!~])", r"\\\1", escaped)


def code(text: object) -> str:
    """Text as code in a sentence or a table cell; it has no backtick, which would end it."""
    return "`" + " ".join(printable(str(text)).split()).replace("`", "'").replace("|", "\\|") + "`"


def literal(text: str) -> str:
    """A Python string in double quotes, on one line, for a snippet."""
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
