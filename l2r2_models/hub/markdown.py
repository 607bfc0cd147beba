"""Text of users inside Markdown: shown as it is, and never taken for Markdown, HTML or code."""

from __future__ import annotations

import html
import re

from ..errors import printable


def plain(text: object) -> str:
    """Text in a sentence or a table cell.

    >>> plain("a|b <i>")
    'a\\\\|b &lt;i&gt;'
    """
    escaped = html.escape(" ".join(printable(str(text)).split()), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", escaped)
    return re.sub(r"(?i)(https?|ftp|mailto|www)([:.])", r"\1<!-- -->\2", escaped)  # a bare address would become a link


def code(text: object) -> str:
    """Text as code in a sentence or a table cell; it has no backtick, which would end it."""
    if not str(text).strip():
        return "(empty)"
    return "`" + " ".join(printable(str(text)).split()).replace("`", "'").replace("|", "\\|") + "`"


def literal(text: str) -> str:
    """A Python string in double quotes, on one line, for a snippet."""
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
