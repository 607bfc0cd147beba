"""The HTML report of an evaluation (`l2r2 evaluate --report`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..data.dataset import sample_of
from ..errors import L2R2Error
from ..evaluate.evaluator import OWN, Evaluation, Judged
from ..evaluate.logits import Progress
from ..evaluate.metrics import bootstrap_interval
from .comparison import changes, compared
from .explanations import Explanations
from .figures import bars_by_group, confusion, reliability_diagram, risk_coverage_curves
from .html import Cell, Picture, Section, gallery, percent, table, write_page
from .parts import parts_section

SHOWN = 24  # maximum number of disagreements
ALIKE = 2  # maximum with the same true and predicted class, because neighboring frames fail alike
WITHOUT_BOX, LEFT_OUT, MOST_CLASSES = 12, 20, 60
WORDS = {
    "full": "the whole image alone",
    "fg": "the object alone",
    "bg": "the background alone",
    "fused": "the fused prediction",
}


def write_evaluation(
    path: str | Path,
    judged: Sequence[Judged],
    results: Sequence[Evaluation],
    progress: Progress = lambda batches, _: batches,
    explanations: Path | None = None,
) -> None:
    """Write the report of an evaluation: metrics with 95 % intervals, groups, calibration, classes, parts, disagreements.

    With several splits, it begins with the comparison of the first with each of the others, see `compared`.

    Args:
        path: the HTML file.
        judged: an evaluated run, with its predictions, per split.
        results: the metrics computed from each.
        progress: wraps the batches while the parts of an iFAM model are computed.
        explanations: page of `l2r2 explain` to link to.

    Raises:
        L2R2Error: when the file cannot be written, the page cannot be read, or matplotlib is missing.
    """
    linked = None if explanations is None else Explanations.read(explanations, path)
    several = len(results) > 1
    sections = compared(judged, results) if several else []
    for one, result in zip(judged, results):
        own = _sections(one, result, progress, linked)
        sections += [replace(section, title=f"{result.split}: {section.title}") for section in own] if several else own
    title = f"{Path(judged[0].checkpoint.name).name} on {' and '.join(result.split for result in results)}"
    lead = changes(judged, results) if several else _lead(judged[0], results[0])
    notes = [note for result in results for note in (*result.warnings, *result.notes)]
    write_page(path, title, lead, sections, list(dict.fromkeys(notes)))


def _sections(judged: Judged, result: Evaluation, progress: Progress, linked: Explanations | None) -> list[Section]:
    sections = [_accuracy(judged, result), *_groups(judged, result), _calibration(judged, result), _risk(judged)]
    sections += [
        _classes(judged, result),
        *parts_section(judged, progress),
        *_disagreements(judged, linked),
        *_without_box(judged, result, linked),
        *_left_out(result),
    ]
    return [*sections, _origin(judged, result)]


def _lead(judged: Judged, result: Evaluation) -> str:
    answer, row = judged.answer, result.rows[judged.answer]
    low, high = row["intervals"]["accuracy"]
    rest = [f"{WORDS[b]} in {_percent(result.rows[b]['accuracy'])}" for b in judged.own[:-1]]
    text = (
        f"{_who(answer).capitalize()} is correct in {_percent(row['accuracy'])} of {result.images:,} images "
        f"({100 * low:.1f} to {100 * high:.1f}){', ' if rest else ''}{', '.join(rest)}."
    )
    if "gain" in row and "full" in result.rows:
        low, high = row["intervals"]["gain"]
        text += f" That is {_points(row['gain'])} points ({_points(low)} to {_points(high)}) against the whole image alone"
        certain = low > 0 or high < 0
        text += "." if certain else ": too close to tell from these images."
    text += _better_branch(judged, result)
    if result.group:
        worst = min(row["by_group"], key=lambda g: row["by_group"][g])
        reached, count = _percent(row["by_group"][worst]), result.groups[worst]
        text += f" Worst {result.group}: {worst or '(empty)'}, {reached} of {count:,} images."
    return text


def _better_branch(judged: Judged, result: Evaluation) -> str:
    """Return a sentence if a branch alone is significantly better than the fusion, which should then be fitted again."""
    best = max(judged.own, key=lambda name: result.rows[name]["accuracy"])
    correct = [judged.outputs[name].argmax(-1) == judged.data.labels for name in (best, judged.answer)]
    low, high = bootstrap_interval(correct[0].double() - correct[1].double(), clusters=judged.clusters)
    if best == judged.answer or low <= 0:
        return ""
    return f" {WORDS[best].capitalize()} would be more accurate, by {_points(low)} to {_points(high)} points."


def _accuracy(judged: Judged, result: Evaluation) -> Section:
    others = [name for name in result.rows if name not in judged.own]
    fitted = f"fitted on {result.fitted_on}" if result.fitted_on else "which need no fitting"
    blocks = [_figures(result, judged.own, caption="in %, with 95 % confidence intervals", strong=[len(judged.own) - 1])]
    if others:
        blocks.append(_figures(result, others, caption=f"for comparison: other fusions, {fitted}"))
    branches = [name for name in judged.own if not name.startswith(OWN)]
    text = "; ".join(f"{b}: {WORDS[b]}" for b in branches)
    if len(branches) > 1:
        text += f".\nAt least one branch is correct in {_percent(result.oracle)}, the accuracy of a perfect choice between them."
    if result.with_object < result.images and "fg" in branches:
        text += f"\nAn object was found in {result.with_object:,} of {result.images:,} images; for the others, full is used."
    return Section("Accuracy", text, blocks)


def _figures(result: Evaluation, names: Sequence[str], caption: str, strong: Sequence[int] = ()) -> Markup:
    columns = {"accuracy": "accuracy", "macro_accuracy": "macro", "gain": "gain over full", "with_box": "with object"}
    columns |= {"without_box": "without", "worst_group": f"worst {result.group}", "ece": "ECE", "ece_scaled": "ECE scaled"}
    columns = {k: title for k, title in columns.items() if any(result.rows[name].get(k) is not None for name in names)}
    rows = []
    for name in names:
        row = result.rows[name]
        cells = [percent(row.get(k), row["intervals"].get(k)) for k in columns]
        rows.append([name, *cells])
    return table(["", *columns.values()], rows, caption=caption, strong=strong)


def _groups(judged: Judged, result: Evaluation) -> list[Section]:
    if not result.group:
        return []
    values = {name: result.rows[name]["by_group"] for name in judged.own}
    spans = {name: result.rows[name]["intervals"]["by_group"] for name in judged.own}
    rows = [
        [group or "(empty)", f"{count:,}", *(percent(values[name][group], spans[name][group]) for name in judged.own)]
        for group, count in result.groups.items()
    ]
    blocks = [bars_by_group(values, spans), table([result.group, "images", *judged.own], rows)]
    text = "Lines are 95 % confidence intervals; they have no length if all or none of a group's images are correct."
    return [Section(f"By {result.group}", text, blocks)]


def _calibration(judged: Judged, result: Evaluation) -> Section:
    labels = judged.data.labels
    text = (
        "Of the predictions with 80 % confidence, 80 % should be correct (dashed line). Bars below the line are overconfident. "
        "ECE is the mean distance from the line in points."
    )
    before = {name: judged.outputs[name] for name in judged.own}
    blocks = [reliability_diagram(before, labels)]
    if result.temperatures:
        after = {f"{name} / {result.temperatures[name]:.2f}": z / result.temperatures[name] for name, z in before.items()}
        text += f"\nBelow: logits divided by a temperature each, fitted on {result.fitted_on}, which changes no prediction."
        if result.rows[judged.answer]["ece_scaled"] > result.rows[judged.answer]["ece"]:
            text += f" Here it makes {_who(judged.answer)} less calibrated: {result.split} differs from {result.fitted_on}."
        blocks.append(reliability_diagram(after, labels))
    else:
        text += "\nWith --fit-split SPLIT, the calibration with temperatures fitted there is shown too."
    return Section("Calibration", text, blocks)


def _risk(judged: Judged) -> Section:
    labels, logits = judged.data.labels, judged.outputs[judged.answer]
    sure, predicted = logits.softmax(-1).max(-1)
    best = sure.argsort(descending=True, stable=True)[: max(1, round(0.8 * len(labels)))]
    wrong = float((predicted[best] != labels[best]).double().mean())
    text = f"{_who(judged.answer).capitalize()} is wrong in {_percent(wrong)} of the 80 % of images with the highest confidence."
    about = (
        "The most confident predictions should be wrong less often.\n`l2r2 fuse --abstain-risk 0.05` fits the confidence below "
        "which predictions are withheld, so that 5 % of the others are wrong. `l2r2 predict --abstain 0.05` uses it."
    )
    curves = risk_coverage_curves({name: judged.outputs[name] for name in judged.own}, labels)
    return Section("Risk and coverage", text, [curves], about)


def _classes(judged: Judged, result: Evaluation) -> Section:
    matrix = torch.tensor(result.confusion[judged.answer])
    counts, found = matrix.sum(1).tolist(), result.rows[judged.answer]["recall"]
    without = torch.bincount(judged.data.labels[~judged.data.has_fg], minlength=len(result.labels)).tolist()
    occurring = sorted((k for k, n in enumerate(counts) if n), key=lambda k: (found[result.labels[k]], result.labels[k]))
    rows: list[list[Cell]] = []
    for k in occurring[:MOST_CLASSES]:
        mistakes = matrix[k].clone()
        mistakes[k] = 0
        taken = mistakes.argsort(descending=True, stable=True)[:2].tolist()
        wrong = ", ".join(f"{result.labels[j]} ({mistakes[j]})" for j in taken if mistakes[j])
        recall = [percent(result.rows[name]["recall"][result.labels[k]]) for name in judged.own]
        rows.append([result.labels[k], str(counts[k]), *recall, *([str(without[k] or "")] if any(without) else []), wrong])
    head = ["class", "images", *judged.own, *(["no object found"] if any(without) else []), f"mistaken for, by {judged.answer}"]
    text = "Accuracy per class in %, the worst classes first."
    if len(occurring) > MOST_CLASSES:
        text += f" The {MOST_CLASSES} worst of {len(occurring)} are shown; --json has all."
    matrix_table = confusion(judged.outputs[judged.answer], judged.data.labels, result.labels)
    return Section("Classes", text, [table(head, rows, words=[len(head) - 1]), matrix_table])


def _disagreements(judged: Judged, linked: Explanations | None) -> list[Section]:
    if len(judged.own) < 2:
        return []
    labels = judged.data.labels
    predicted = torch.stack([judged.outputs[name].argmax(-1) for name in judged.own])  # [outputs, N], the run's own last
    right = predicted == labels
    lost = ~right[-1] & right[:-1].any(0)
    won = right[-1] & ~right[:-1].all(0)
    confidence = torch.stack([judged.outputs[name].softmax(-1).amax(-1) for name in judged.own])
    lost_rows = _worst(lost, confidence[-1], predicted[-1], labels)
    wrong_confidence, wrong_branch = confidence[:-1].masked_fill(right[:-1], -1).max(0)
    won_rows = _worst(won, wrong_confidence, predicted[:-1].gather(0, wrong_branch[None])[0], labels)
    first = min(len(lost_rows), max(SHOWN - len(won_rows), SHOWN // 2))
    who = _who(judged.answer)
    sections = []
    for title, rows, count, limit, text in (
        ("Wrong although a branch was right", lost_rows, lost, first, f"The most confident mistakes of {who}."),
        ("Right although a branch was wrong", won_rows, won, SHOWN - first, "The most confident mistakes of a branch."),
    ):
        number = int(count.sum())
        if number:
            shown = min(len(rows), limit)
            text += f" {number:,} images, {shown} of them shown, at most {ALIKE} with the same true and predicted class."
            sections.append(Section(title, text, [gallery(_pictures(judged, rows[:shown], linked))]))
    return sections or [Section("Disagreements", f"Whenever one of the branches or {who} is correct, all of them are.")]


def _worst(rows: Tensor, confidence: Tensor, mistakes: Tensor, labels: Tensor) -> list[int]:
    """Return the selected rows, the most confident mistake first, with at most a few of the same true and predicted class."""
    seen: dict[tuple[int, int], int] = {}
    found = []
    for i in confidence.masked_fill(~rows, -1).argsort(descending=True, stable=True)[: int(rows.sum())].tolist():
        pair = int(labels[i]), int(mistakes[i])
        seen[pair] = seen.get(pair, 0) + 1
        if seen[pair] <= ALIKE:
            found.append(i)
    return found


def _without_box(judged: Judged, result: Evaluation, linked: Explanations | None) -> list[Section]:
    rows = (~judged.data.has_fg).nonzero()[:, 0].tolist()
    if not rows or "fg" not in judged.data.logits:
        return []
    row = result.rows[judged.answer]
    text = f"In {len(rows):,} of {result.images:,} images; the accuracy is {_percent(row['without_box'])} on these"
    text += f", and {_percent(row['with_box'])} on the others." if row["with_box"] is not None else "."
    order = sorted(rows, key=lambda i: -float(judged.outputs[judged.answer][i].softmax(-1).amax()))
    wrong_first = sorted(order, key=lambda i: bool(judged.outputs[judged.answer][i].argmax() == judged.data.labels[i]))
    text += f" {WITHOUT_BOX} of them are shown, the most confident mistakes first." if len(rows) > WITHOUT_BOX else ""
    return [Section("No object found", text, [gallery(_pictures(judged, wrong_first, linked), WITHOUT_BOX)])]


def _pictures(judged: Judged, rows: Sequence[int], linked: Explanations | None) -> Iterator[Picture]:
    """Yield the cards of some rows; those without an object have a single prediction."""
    names = judged.data.table.names()
    for i in rows:
        row, truth = judged.data.table.rows[i], int(judged.data.labels[i])
        predictions = []
        for name in judged.own if judged.data.has_fg[i] else judged.own[-1:]:
            confidence, k = judged.outputs[name][i].softmax(-1).max(-1)
            what = f"{judged.labels[int(k)]} {100 * confidence:.0f}\u00a0%"
            predictions.append((name.split(":")[0], what, int(k) == truth))
        note = names[i] + (f" · {judged.groups[i]}" if judged.groups else "")
        image: Path | Image.Image = row.path
        box = None
        try:
            sample = sample_of(row, judged.checkpoint.model.view_spec.fill, judged.checkpoint.box_threshold)
            image, box = Image.fromarray(sample.pixels.numpy()), sample.box.tolist() if sample.has_box else None
        except L2R2Error:
            pass  # the file was changed in the meantime; its card shows the error
        link = "" if linked is None else linked.link(row.path)
        yield Picture(image, judged.labels[truth], box, predictions, note, link)


def _left_out(result: Evaluation) -> list[Section]:
    if not result.left_out:
        return []
    rows = [[Path(path).name, reason.removeprefix(f"{path}: ")] for path, reason in list(result.left_out.items())[:LEFT_OUT]]
    return [
        Section("Left out", f"{len(result.left_out):,} images could not be used.", [table(["image", "reason"], rows, words=[1])])
    ]


def _origin(judged: Judged, result: Evaluation) -> Section:
    checkpoint, table_ = judged.checkpoint, judged.data.table
    model = checkpoint.model
    sizes = model.view_spec.size_words(model.branches)
    name = f"{model.pretrained_cfg.get('architecture', 'l2r2')} on {model.backbone_name}, views of {sizes}"
    rows: list[list[Cell]] = [
        ["run", checkpoint.name],
        ["weights (SHA-256)", checkpoint.digest[:16]],
        ["model", name],
        ["fusion", json.dumps(model.fusion.config()) if len(model.branches) > 1 else "none"],
        ["data", str(table_.root)],
        ["evaluated on", f"{result.split}, {result.images:,} images, {len(result.labels)} classes"],
        ["fitted on", result.fitted_on or "nothing"],
        ["boxes", f"with a score of at least {checkpoint.box_threshold:g}"],
    ]
    text = "Intervals: bootstrap over images, 1,000 resamples, seed 0. Macro: mean of the accuracies per class."
    return Section("How it was made", text, [table(["", ""], rows, words=[1])])


def _who(name: str) -> str:
    return WORDS["fused"] + f" ({name.removeprefix(OWN)})" if name.startswith(OWN) else WORDS[name]


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
