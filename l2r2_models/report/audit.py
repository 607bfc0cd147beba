"""The HTML report of an audit (`l2r2 audit --report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..audit.audit import Answers, Audit, AuditRun
from ..audit.metrics import Estimate
from ..audit.perturbations import L2_LEVELS, STD_LEVELS, Donors, plan
from .explanations import Explanations
from .figures import bars_by_group
from .html import Cell, Picture, Section, gallery, percent, table, write_page

# metric -> its title, in the order of the table
MEASURES = {
    "accuracy": "accuracy",
    "mixed_same": "Mixed-Same",
    "mixed_rand": "Mixed-Rand",
    "mixed_next": "Mixed-Next",
    "bg_gap": "BG-Gap",
    "challenge": "challenge",
    "challenge_upper_bound": "challenge, sampled",
    "fg_only": "fg only",
    "bg_only_mask": "bg only (mask)",
    "bg_only_box": "bg only (box)",
    "tiled": "tiled",
    "rfs": "RFS",
    "irfs": "iRFS",
}
BARS = ("accuracy", "mixed_same", "mixed_rand", "mixed_next", "fg_only", "bg_only_mask", "bg_only_box", "tiled")
SHOWN = {
    "original": "unchanged",
    "mixed_same": "on another background of its class",
    "mixed_rand_0": "on a background of a random class",
    "mixed_rand_1": "on another such background",
    "fg_only": "background erased",
    "bg_only_mask": "object's mask erased",
    "bg_only_box": "object's box erased",
}
EXAMPLES = 3  # number of images whose changed versions are shown
ABOUT_EXAMPLES = (
    "What each output predicts for the same photograph, and p, the probability of its true class. Images that become wrong on "
    "another background come first."
)
ABOUT_METRICS = (
    "Mixed-Same, Mixed-Rand and Mixed-Next: the object on the object-free background of another image of its own class, of a "
    "random class, or of the next class. BG-Gap: Mixed-Same minus Mixed-Rand, the part of the loss that is due to the class of "
    "the background. Challenge: correct on the background of every other image; sampled: correct on all random backgrounds "
    "that were drawn for the object, which is an upper bound.\n"
    "fg only: the background is replaced by the mean color. bg only: the object's mask, or its box, is replaced. Tiled: the "
    "object's box is filled from its surroundings. A high accuracy without the object means that the model recognizes the "
    "background.\n"
    "RFS and iRFS compare noise on the object with noise on the background, from -1 (only the background matters) to 1 (only the "
    "object matters); iRFS is computed from the probability of the true class of each image.\n"
    "In small print: 95 % confidence intervals over images. Every image keeps its box; this audit does not run a localizer on "
    "the changed images."
)
ABOUT_NOISE = (
    "Gaussian noise is added to the object or to the background. A model that relies on the object loses more with noise on the "
    "object.\n"
    "Equal standard deviation: every pixel gets the same noise. Equal L2 norm: object and background get the same amount of "
    "noise in total, however large they are; the level is its root mean square over the whole image. Levels are on a scale of 0 "
    "to 255."
)


def write_report(path: Path, run: AuditRun, explanations: Path | None = None) -> None:
    """Write the report of an audit.

    Args:
        path: the HTML file.
        run: an audit, with the images that it was computed from.
        explanations: page of `l2r2 explain` to link to.

    Raises:
        L2R2Error: when the file cannot be written, the page cannot be read, or matplotlib is missing.
    """
    audit = run.result
    linked = None if explanations is None else Explanations.read(explanations, path)
    counts = f"{audit.images} images of {audit.split}, {audit.classes} classes, seed {audit.settings['seed']}."
    others = list(audit.verdicts.values())[:-1]
    text = "\n".join((counts, *others))
    of_image = [list(cards) for _, cards in groupby(examples(run, linked), key=lambda card: card.note)]
    sections = [
        Section("The same photograph, changed", ABOUT_EXAMPLES, [gallery(cards, len(cards), row=True) for cards in of_image]),
        Section("Accuracy when the image is changed", text, [bars(audit), _measures(audit)], ABOUT_METRICS),
        Section("Noise", "Accuracy with noise on the object and on the background, by level.", _noise(audit), ABOUT_NOISE),
    ]
    if audit.groups:
        sections.append(Section(f"Accuracy by {audit.groups}", "", [_groups(audit)]))
    write_page(path, f"Background audit of {audit.model}", audit.verdict, sections, audit.warnings)


def cell(estimate: Estimate | None, name: str) -> Markup:
    """Format an estimate with its interval, in percent unless it is a sensitivity.

    Args:
        estimate: the estimate; None gives an empty cell.
        name: name of the metric.
    """
    if estimate is None:
        return Markup("")
    if name.startswith(("rfs", "irfs")):
        return Markup("{:.2f}<small>{:.2f} to {:.2f}</small>").format(estimate.value, estimate.low, estimate.high)
    return percent(estimate.value, (estimate.low, estimate.high))


def _measures(audit: Audit) -> Markup:
    """Make a table with one row per metric, so that it stays narrow."""
    names = [n for n in MEASURES if any(n in estimates for estimates in audit.answers.values())]
    rows = [[MEASURES[n], *(cell(estimates.get(n), n) for estimates in audit.answers.values())] for n in names]
    return table(["", *audit.answers], rows, caption="in %; RFS and iRFS from -1 to 1")


def bars(audit: Audit) -> Markup:
    """Draw the accuracy of every output on unchanged and on changed images."""
    names = [n for n in BARS if all(n in estimates for estimates in audit.answers.values())]
    values = {a: {MEASURES[n]: f[n].value for n in names} for a, f in audit.answers.items()}
    spans = {a: {MEASURES[n]: (f[n].low, f[n].high) for n in names} for a, f in audit.answers.items()}
    return bars_by_group(values, spans)


def _noise(audit: Audit) -> list[Markup]:
    blocks = []
    kinds = (("", STD_LEVELS, "equal standard deviation"), ("l2_", L2_LEVELS, "equal L2 norm"))
    for kind, levels, caption in kinds:
        rows: list[list[Cell]] = []
        for answer, estimates in audit.answers.items():
            for where, words in (("fg", "noise on object"), ("bg", "noise on background")):
                names = [f"noise_{kind}{where}_{level}" for level in levels]
                rows.append([f"{answer}: {words}", *(cell(estimates.get(n), n) for n in names)])
            names = [f"rfs_{kind}{level}" for level in levels]
            rows.append([f"{answer}: RFS", *(cell(estimates.get(n), n) for n in names)])
        blocks.append(table(["level", *map(str, levels)], rows, caption=f"{caption}; in %, RFS from -1 to 1"))
    return blocks


def _groups(audit: Audit) -> Markup:
    def by_group(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
        return {name.removeprefix("group: "): f for name, f in estimates.items() if name.startswith("group: ")}

    found = {answer: by_group(estimates) for answer, estimates in audit.answers.items()}
    values = {answer: {g: f.value for g, f in groups.items()} for answer, groups in found.items()}
    spans = {answer: {g: (f.low, f.high) for g, f in groups.items()} for answer, groups in found.items()}
    return bars_by_group(values, spans)


def examples(run: AuditRun, linked: Explanations | None = None) -> list[Picture]:
    """Return changed images of a few subjects, first those whose prediction becomes wrong on Mixed-Rand."""
    audit, subjects, answers, grain, classes = run
    right, _ = answers.of(answers.names[-1])
    fooled = right["original"] - right.get("mixed_rand_0", right["original"]).nan_to_num(nan=0.0)
    order = torch.argsort(fooled, descending=True, stable=True).tolist()
    of_class = {subjects.labels[i]: i for i in reversed(order)}  # the first of each class
    first = sorted(of_class.values(), key=order.index)[:EXAMPLES]
    seed, backgrounds = audit.settings["seed"], audit.settings["backgrounds"]
    donors = Donors(subjects.keys, subjects.labels, backgrounds, seed, subjects.images.tolist())
    names = plan(backgrounds)
    pictures = []
    for i in first:
        subject = subjects[i]
        changed = subjects.changed(i, subject, donors, grain, seed)
        made = {names[place]: pixels for place, pixels in islice(changed, len(names)) if names[place] in SHOWN}
        for name, words in SHOWN.items():
            if name in made:
                predictions = _predictions(answers, i, names.index(name), classes)
                box = subject.boxes[0].tolist() if name == "original" else None
                title = f"{subjects.labels[i]}: {words}"
                image, link = Image.fromarray(made[name].numpy()), ""
                if linked is not None and name == "original":
                    link = linked.link(subjects.table.rows[i].path)
                pictures.append(Picture(image, title, box, predictions, subjects.keys[i], link))
    return pictures


def _predictions(answers: Answers, row: int, place: int, classes: Sequence[str]) -> list[tuple[str, str, bool | None]]:
    values: Tensor = answers.values[row, :, place]
    of_each = zip(answers.names, values.tolist())
    return [(name, f"{classes[int(best)]}, p\u00a0=\u00a0{p:.2f}", bool(right)) for name, (right, p, best) in of_each]
