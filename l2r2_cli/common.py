"""Code shared by several commands: printing, progress bars, and comma-separated options. Rich is imported when used."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from l2r2_models.fusion import GroupShare

T = TypeVar("T")


class Refusal(Exception):
    """Invalid input that a command finds before it imports `l2r2_models`; the message is one sentence."""


def printable(text: str) -> str:
    """Return the text with control characters escaped."""
    from l2r2_models.errors import printable  # commands that print have already imported the package

    return printable(text)


@functools.cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


class _Errors:
    """Print messages on stderr, above a progress bar, as plain text without markup, links or control characters."""

    def print(self, text: str) -> None:
        _stderr().print(printable(text), highlight=False, markup=False, soft_wrap=True)


errors = _Errors()


def say(text: str, *, err: bool = False) -> None:
    """Print one line of a result, with control characters escaped."""
    typer.echo(printable(text), err=err)


def count(number: int, what: str) -> str:
    """The number with its noun in the singular or plural.

    >>> count(1, "image"), count(2, "image")
    ('1 image', '2 images')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def show(table: Any) -> None:
    """Print a table; if the output is not a terminal, with a width of 160 characters."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def show_shares(shares: Mapping[str, GroupShare], most: int = 20) -> None:
    """Print the fraction of misleading backgrounds per group, the largest first."""
    order = sorted(shares, key=lambda group: -shares[group].misled)
    for group in order[:most]:
        say(f"{group}: {shares[group]}, {shares[group].objects} objects")
    if len(order) > most:
        say(f"and {len(order) - most} more groups, {shares[order[most]].misled:.0%} or less")


def cell(text: str) -> str:
    """Escape a user's text for a table cell."""
    from rich.markup import escape

    return escape(printable(text))


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    """Yield the rows as lines with aligned columns.

    Args:
        rows: rows of equal length.
        right: indices of the columns aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (text.rjust(width) if i in right else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths)))
        yield "  ".join(cells).rstrip()


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """Yield `items` with a progress bar on stderr (none if stderr is not a terminal)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=_stderr(), disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(items, total=total, description=text)


def on_ray(engine: str, address: str | None) -> bool:
    """Return whether to work on Ray.

    Raises:
        typer.BadParameter: when the engine is unknown, an address is given without the engine ray, or nothing listens there.
    """
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f'--engine is local or ray, got "{engine}"')
    if engine == "local" and address is not None:
        raise typer.BadParameter("--address needs --engine ray")
    if address is not None:
        from l2r2_models.errors import L2R2Error
        from l2r2_models.scale.engine import check_address

        try:
            check_address(address)  # before a model is loaded
        except L2R2Error as error:
            raise typer.BadParameter(str(error)) from None
    return engine == "ray"


def numbers(option: str, value: str | None) -> tuple[int, ...]:
    """Parse comma-separated integers, `"0,3"` to `(0, 3)`.

    Raises:
        typer.BadParameter: when the value is not of this form.
    """
    try:
        return tuple(int(part) for part in (value or "").split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{option} takes comma-separated numbers, got {value!r}.") from None


def names(value: str | None) -> tuple[str, ...] | None:
    """Parse comma-separated names, `"full,fg"` to `("full", "fg")`."""
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


def check_explanations(page: Path | None, report: Path | None) -> None:
    """Check, before anything is computed, that a report can link to a page of `l2r2 explain`.

    Raises:
        typer.BadParameter: when there is no report.
        L2R2Error: when the page has no explanations.
    """
    if page is None:
        return
    if report is None:
        raise typer.BadParameter("--explanations needs --report, the page that links to it")
    from l2r2_models.report.explanations import Explanations

    Explanations.read(page, report)
