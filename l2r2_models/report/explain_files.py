"""Explain files and write the page, image by image with a journal, so that the same call continues after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..explain.explainer import Explainer, Explanation
from ..journal import Journal, digest_of
from ..locks import only_writer
from ..predict.inputs import Inputs
from ..shards import state_of
from .explain import Page

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Explained:
    """Result of `explain_to_page`.

    Attributes:
        lead: summary in a few sentences.
        kept: number of images that were explained before an interruption.
        failures: why images could not be explained.
    """

    lead: str
    kept: int
    failures: tuple[str, ...]


def explain_to_page(
    explainer: Explainer,
    inputs: Inputs,
    out: Path,
    *,
    sort: str = "disagreement",
    shown: int = 24,
    seed: int = 0,
    progress: Progress = lambda items, _: items,
    each: Callable[[dict[str, Any] | L2R2Error], None] = lambda found: None,
) -> Explained:
    """Explain images and write the page.

    Explained images are stored in a journal next to the page until it is written, so that the same call continues after an
    interruption. If the model, the images, their boxes or the settings have changed, it starts over.

    Args:
        explainer: makes the explanations.
        inputs: images to explain.
        out: HTML file to write.
        sort, shown: see `Page`.
        seed: see `Explainer.explain_files`.
        progress: wraps the explanations; takes their iterable and their number.
        each: called with the values of each explanation, or with the error of an image that cannot be explained.

    Raises:
        L2R2Error: when the order is unknown, no image can be explained, or the file is being written by another process or cannot
            be written.
    """
    page, journal = Page(sort, shown), Journal(out)
    header = _header(explainer, inputs, [sort, shown, seed])
    failures: list[str] = []
    with only_writer(out):
        if any(part.header != header for part in journal.parts()):
            journal.remove()
        known = {record["file"]: record for part in journal.parts() for _, record in part.records()}
        for record in known.values():
            page.restore(record)
            each(json.loads(record["values"]))
        todo = [path for path in inputs.paths if str(path) not in known]
        journal.start(header)
        try:
            for found in progress(explainer.explain_files(inputs, seed=seed, paths=todo), len(todo)):
                if isinstance(found, Explanation):
                    journal.add({"file": found.file, **page.add(found), "values": json.dumps(found.to_dict())})
                    each(found.to_dict())
                else:
                    failures.append(str(found))
                    each(found)
        finally:
            journal.close()
        count = f"{len(failures)} image{'s' * (len(failures) != 1)} could not be explained"
        notes = [f"{count}. The first one: {failures[0]}"] if failures else []
        page.write(out, f"Explanations of {Path(explainer.predictor.checkpoint.name).name}", notes)
        journal.remove()
    return Explained(page.lead(), len(known), tuple(failures))


def _header(explainer: Explainer, inputs: Inputs, settings: list[Any]) -> dict[str, Any]:
    """Return everything that the page depends on."""
    predictor = explainer.predictor
    rules = predictor.rules
    images = [
        (name, state_of(name), inputs.entries.get(name), state_of(inputs.masks.get(name)), inputs.labels.get(name))
        + (() if rules.prior is None else (rules.prior.about(name),))
        for name in map(str, inputs.paths)
    ]
    question = [explainer.method, list(explainer.target), explainer.against, explainer.runner_up, explainer.numbers]
    localizer = None if predictor.localizer is None else predictor.localizer.info
    about = [predictor.model.view_spec.to_dict(), predictor.box_threshold, localizer, rules.settings()]
    return {"model_sha256": predictor.checkpoint.digest, "settings": digest_of("", images, question, about, settings)}
