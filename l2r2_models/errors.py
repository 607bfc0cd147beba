"""The exception for invalid user input, and text that is safe to print on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape control characters, since a file name may contain terminal control codes.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


class L2R2Error(ValueError):
    """Invalid user input.

    The message is one sentence that says what to do. Commands print it without a traceback and exit with status 1.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
