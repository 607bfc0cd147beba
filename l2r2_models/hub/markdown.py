"""Escape user text for Markdown, so that it is shown literally."""

from __future__ import annotations

import html
import re

from ..errors import printable


def plain(text: object) -> str:
    r"""Escape text for a sentence or a table cell.

    >>> plain("a|b <i>")
    'a\\|b &lt;i&gt;'
    """
    escaped = html.escape(" ".join(printable(str(text)).split()), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", escaped)
    return re.sub(r"(?i)(https?|ftp|mailto|www)([:.])", r"\1<!-- -->\2", escaped)  # a bare URL would become a link


def code(text: object) -> str:
    """Format text as inline code in a sentence or a table cell; backticks become quotes.

    >>> code("a`b")
    "`a'b`"
    """
    if not str(text).strip():
        return "(empty)"
    return "`" + " ".join(printable(str(text)).split()).replace("`", "'").replace("|", "\\|") + "`"


def literal(text: str) -> str:
    """Write a Python string literal in double quotes on one line.

    >>> literal("a bird")
    '"a bird"'
    """
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
