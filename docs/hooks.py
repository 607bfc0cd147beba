"""What `make docs` adds to mkdocs: formulas as MathML, so that no script is loaded from elsewhere, and doctests as code."""

from __future__ import annotations

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html_text: str, **_: Any) -> str:
    """Turn each formula of a page (as `pymdownx.arithmatex` marks it) into MathML, which browsers render themselves."""
    return FORMULA.sub(lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "div" else "inline"), html_text)


class Doctests(griffe.Extension):
    """Show the `>>>` examples of docstrings as code; Markdown would take them for nested quotes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fence_doctests(obj.docstring.value)


def fence_doctests(docstring: str) -> str:
    """Put a code fence around each paragraph that begins with `>>>`."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(f"```pycon\n{p}\n```" if p.startswith(">>>") else p for p in paragraphs)
