"""The built-in recipes and recipe files, as plain keys."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import parse_yaml, read_text


def builtin_recipes() -> tuple[str, ...]:
    """List the recipes that come with the package.

    >>> builtin_recipes()
    ('few_images', 'finetune', 'head_only', 'scratch')
    """
    return tuple(sorted(f.name.removesuffix(".yaml") for f in _builtin_folder().iterdir() if f.name.endswith(".yaml")))


def read_keys(source: str | Path) -> dict[str, Any]:
    """Read the keys that a recipe sets.

    Args:
        source: see `Recipe.read`.

    Raises:
        L2R2Error: when there is no such recipe or file, or it does not contain a mapping.
    """
    name, file = str(source), Path(source)
    if name in builtin_recipes():
        text = (_builtin_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = read_text(file)
        except L2R2Error as error:
            why = str(error).removeprefix(f"{name}: ").rstrip(".")
            raise L2R2Error(f"{name}: {why}; pass a YAML file or one of {', '.join(builtin_recipes())}.") from None
    values = parse_yaml(text, name)
    if not isinstance(values, dict):
        raise L2R2Error(f"{name}: not a recipe; it must be a YAML mapping of keys to values.")
    return values


def _builtin_folder() -> Any:
    return resources.files(__package__) / "recipe_files"
