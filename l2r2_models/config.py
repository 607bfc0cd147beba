"""Strict conversion between a dataclass and plain values (JSON, YAML, the command line)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import L2R2Error

T = TypeVar("T")
KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def from_dict(cls: type[T], data: Mapping[str, Any], what: str, *, parse_numbers: bool = False) -> T:
    """Build a dataclass from plain values, rejecting unknown keys and values of the wrong type.

    Args:
        cls: a dataclass whose fields are strings, numbers, booleans, tuples, mappings or literals.
        data: values by field name.
        what: name of a field in messages, e.g. `recipe key`.
        parse_numbers: accept numbers given as strings, because YAML reads `1e-3` as a string.

    Raises:
        L2R2Error: when a key is unknown or missing, or a value has the wrong type.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Point:
    ...     x: float
    ...     y: float = 0.0
    >>> from_dict(Point, {"x": "1e-3"}, "coordinate", parse_numbers=True)
    Point(x=0.001, y=0.0)
    """
    kinds = get_type_hints(cls)
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in data:
        if name not in names:
            close = get_close_matches(str(name), names, 3, 0.5)
            hint = f"close matches: {', '.join(close)}" if close else f"choose from {', '.join(names)}"
            raise L2R2Error(f'Unknown {what} "{name}"; {hint}.')
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in required if name not in data]:
        raise L2R2Error(f"Missing {what} {', '.join(missing)}.")
    return cls(**{name: as_type(name, value, kinds[name], parse_numbers) for name, value in data.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain values for JSON or YAML; tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def as_type(name: str, value: Any, kind: Any, parse_numbers: bool = False) -> Any:
    """Convert a value from YAML or JSON to the type of its field.

    Args:
        name: the field's name, for messages.
        value: the plain value.
        kind: the field's type annotation.
        parse_numbers: accept numbers given as strings.

    Raises:
        L2R2Error: when the value does not have that type.

    >>> as_type("lr", 1, float)
    1.0
    """
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal:  # the dataclass validates its own choices
        return value
    if origin in (Union, UnionType):
        given = [option for option in options if option is not type(None)]
        return None if value is None and len(given) < len(options) else as_type(name, value, given[0], parse_numbers)
    if origin is tuple:
        return _as_tuple(name, value, options)
    if origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
        raise L2R2Error(f"{name} must be a mapping of names to values, got {value!r}.")
    if kind in (str, bool) and isinstance(value, kind):
        return value
    allowed = (int, float, str) if parse_numbers else (int, float) if kind is float else (int,)
    if kind in (int, float) and isinstance(value, allowed) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        except (ValueError, OverflowError):
            pass
    raise L2R2Error(f"{name} must be {KINDS[kind]}, got {value!r}.")


def _as_tuple(name: str, value: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    item, words = options[0], {str: "names", int: "whole numbers", float: "numbers"}[options[0]]
    items = [value] if item is str and isinstance(value, str) else value
    fits = (int, float) if item is float else item
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, fits) and not isinstance(i, bool) for i in items):
        raise L2R2Error(f"{name} must be a list of {words}, got {value!r}.")
    if options[-1] is not Ellipsis and len(items) != len(options):
        raise L2R2Error(f"{name} must be {len(options)} {words}, got {value!r}.")
    return tuple(items)
