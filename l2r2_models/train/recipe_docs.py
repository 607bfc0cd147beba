"""What each recipe key means, from the docs of `Recipe`."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

from .recipe import Recipe


def describe_keys() -> dict[str, tuple[Any, str]]:
    """Return the default (None for `model`, which has none) and the description of each recipe key, from the docs of `Recipe`.

    >>> describe_keys()["epochs"]
    (20, 'passes over the training rows.')
    """
    entries = inspect.cleandoc(Recipe.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", entries, re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in found}
    return {f.name: (None if f.default is MISSING else f.default, meanings[f.name]) for f in fields(Recipe)}
