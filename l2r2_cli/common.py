"""What several commands share: progress bars and comma-separated options."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def printable(text: str) -> str:
    """The text with nothing in it that a terminal obeys."""
    from l2r2_models.errors import printable  # a command that prints has imported the package by then

    return printable(text)


if TYPE_CHECKING:
    from l2r2_models.fusion import GroupShare

T = TypeVar("T")


class _Errors(Console):
    """The console of messages: nothing in them is markup, a link, or a code that the terminal obeys."""

    def print(self, *objects: Any, **options: Any) -> None:
        options = {"highlight": False, "markup": False, "soft_wrap": True, **options}
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


errors = _Errors(stderr=True)


def say(text: str, *, err: bool = False) -> None:
    """Print a line of a result, whatever names are in it."""
    typer.echo(printable(text), err=err)


def show(table: Any) -> None:
    """Print a table; a pipe has no width to wrap at."""
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
    return escape(printable(text))


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """Yield `items` with a progress bar on stderr (nothing where stderr is not a terminal)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not sys.stderr.isatty()) as progress:
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
