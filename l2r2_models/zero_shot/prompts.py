"""Class names and templates: the prompts that a vision-language model encodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.table import read_table
from ..errors import L2R2Error
from ..io import read_json, read_text

TEMPLATE = "A photo of a {}"
ClassNames = Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Prompts:
    """The prompts of each class: every name in every template.

    Attributes:
        labels: class names in the order of the logits.
        names: the names of each class in prompts.
        templates: texts with `{}` in place of the name.
        source: where the class names come from, for messages.

    Raises:
        L2R2Error: when there are fewer than two classes, a name is empty or occurs twice, or a template has no `{}`.

    >>> Prompts.of({"n02124075": ["Egyptian cat", "cat"], "n02123045": "tabby"}, "A photo of a {}").of_class(1)
    ('A photo of a tabby',)
    """

    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...] = (TEMPLATE,)
    source: str = "class names"

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise L2R2Error(f"{self.source}: a classifier needs two or more classes, got {len(self.labels)}.")
        for i, (label, own) in enumerate(zip(self.labels, self.names), 1):
            if not label.strip() or not own or not all(name.strip() for name in own):
                what = f'class {i} ("{label}")' if label.strip() else f"class {i}"
                raise L2R2Error(f"{self.source}: {what} has an empty name; name every class.")
        for what, every in (("class", self.labels), ("name", [name for own in self.names for name in own])):
            if twice := [name for name, count in Counter(every).items() if count > 1]:
                raise L2R2Error(f'{self.source}: the {what} "{twice[0]}" is listed twice; list each {what} once.')
        if not self.templates:
            raise L2R2Error(f'The templates are empty; give one like "{TEMPLATE}".')
        for template in self.templates:
            if "{}" not in template:
                raise L2R2Error(f'The template "{template}" has no {{}} for the class name; write it like "{TEMPLATE}".')

    @classmethod
    def of(cls, class_names: ClassNames, template: str | Sequence[str] = TEMPLATE, source: str = "class names") -> Prompts:
        """Build the prompts from class names.

        Args:
            class_names: labels, or a mapping from labels to one name or several synonyms. The name of a label without one is the
                label itself, with spaces for underscores.
            template: one template or several.
            source: where the names come from, for messages.
        """
        if isinstance(class_names, Mapping):
            names = tuple((own,) if isinstance(own, str) else tuple(own) for own in class_names.values())
        else:
            names = tuple((label.replace("_", " "),) for label in class_names)
        labels = tuple(label.strip() for label in class_names)
        templates = (template,) if isinstance(template, str) else tuple(template)
        return cls(labels, tuple(tuple(name.strip() for name in own) for own in names), templates, source)

    def of_class(self, i: int) -> tuple[str, ...]:
        """Return the prompts of a class."""
        return tuple(template.replace("{}", name) for template in self.templates for name in self.names[i])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the class index and the text of every prompt."""
        for i in range(len(self.labels)):
            for text in self.of_class(i):
                yield i, text


def read_class_names(source: str | Path) -> ClassNames:
    """Read class names from a text file with one per line, a JSON list or mapping, or take the classes of a data set.

    Args:
        source: a file, or the folder of a data set.

    Raises:
        L2R2Error: when it cannot be read, or is a JSON file with other content.
    """
    path = Path(source)
    if path.is_dir():
        return read_table(path).classes()
    if path.suffix.lower() != ".json":
        lines = read_text(path).splitlines()
        while lines and not lines[-1].strip():
            lines.pop()
        return lines
    found: Any = read_json(path)
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    if isinstance(found, dict) and all(isinstance(own, str) or _is_list_of_names(own) for own in found.values()):
        return found
    raise L2R2Error(f"{path}: must be a JSON list of class names, or a mapping from classes to names.")


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def read_templates(file: str | Path) -> list[str]:
    """Read templates from a text file, one per line; empty lines are skipped.

    Raises:
        L2R2Error: when the file cannot be read or has no templates.
    """
    found = [line.strip() for line in read_text(Path(file)).splitlines() if line.strip()]
    if not found:
        raise L2R2Error(f'{file}: has no templates; write one per line, like "{TEMPLATE}".')
    return found
