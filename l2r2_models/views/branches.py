"""The branches that a model can have, each of which sees a view of its own."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import L2R2Error

BRANCHES = ("full", "fg", "bg")


def check_branches(branches: str | Sequence[str]) -> tuple[str, ...]:
    """Check the branches and return them as a tuple.

    Raises:
        L2R2Error: when a branch is unknown or repeated, or there is none.

    >>> check_branches(["full", "fg"])
    ('full', 'fg')
    """
    branches = (branches,) if isinstance(branches, str) else tuple(branches)
    if unknown := [b for b in branches if b not in BRANCHES]:
        raise L2R2Error(f'Unknown branch "{unknown[0]}"; choose from {", ".join(BRANCHES)}.')
    if not branches or len(set(branches)) != len(branches):
        raise L2R2Error(f"Branches must be one or more of {', '.join(BRANCHES)}, without repetition, got {branches}.")
    return branches
