"""What several commands share: what they print with, progress bars, and comma-separated options. Rich is imported when used."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from l2r2_models.fusion import GroupShare

T = TypeVar("T")


class Refusal(Exception):
    """Invalid input that a command finds before it imports `l2r2_models`; the message is one sentence."""


def printable(text: str) -> str:
    """The text with nothing in it that a terminal obeys."""
    from l2r2_models.errors import printable  # a command that prints has imported the package by then

    return printable(text)


@functools.cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


class _Errors:
    """Messages on stderr, above a progress bar: nothing in them is markup, a link, or a code that the terminal obeys."""

    def print(self, text: str) -> None:
        _stderr().print(printable(text), highlight=False, markup=False, soft_wrap=True)


errors = _Errors()


def say(text: str, *, err: bool = False) -> None:
    """Print a line of a result, whatever names are in it."""
    typer.echo(printable(text), err=err)


def show(table: Any) -> None:
    """Print a table; a pipe has no width to wrap at."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def show_shares(shares: Mapping[str, GroupShare], most: int = 20) -> None:
    """Print how many backgrounds of each group mislead, those with the most first."""
    order = sorted(shares, key=lambda group: -shares[group].misled)
    for group in order[:most]:
        say(f"{group}: {shares[group]}, {shares[group].objects} objects")
    if len(order) > most:
        say(f"and {len(order) - most} more groups, {shares[order[most]].misled:.0%} or less")


def cell(text: str) -> str:
    """Text of users in a table."""
    from rich.markup import escape

    return escape(printable(text))


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    """Lines with the cells of each row below those of the row before.

    Args:
        rows: all of one length.
        right: numbers of the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (text.rjust(width) if i in right else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths)))
        yield "  ".join(cells).rstrip()


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """Yield `items` with a progress bar on stderr (nothing where stderr is not a terminal)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=_stderr(), disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(items, total=total, description=text)


def numbers(option: str, value: str | None) -> tuple[int, ...]:
    """`"0,3"` -> `(0, 3)`.

    Raises:
        typer.BadParameter: something else.
    """
    try:
        return tuple(int(part) for part in (value or "").split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers with commas between them, got {value!r}.") from None


def names(value: str | None) -> tuple[str, ...] | None:
    """`"full,fg"` -> `("full", "fg")`."""
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())
