"""`l2r2 evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .common import cell, check_explanations, errors, numbers, on_ray, say, show, show_shares, track
from .options import Address, Boxes, Data, Engine, Explanations, Group, Json, Metadata, Report, Run, SkipBad, Workers

if TYPE_CHECKING:
    from rich.table import Table

    from l2r2_models.evaluate.evaluator import Evaluation, Judged


def evaluate(
    run: Run,
    data: Data,
    splits: Annotated[
        Optional[list[str]],
        typer.Option(
            "--split", help="Split to evaluate on. Repeatable: the others are compared with the first.", show_default="test"
        ),
    ] = None,
    group: Group = None,
    fit_split: Annotated[
        Optional[str], typer.Option(help="Also fit every fusion and temperature on this held-out split, for comparison.")
    ] = None,
    prior: Annotated[
        Optional[str],
        typer.Option(
            help="Correct the predictions by metadata: a file of `l2r2 prior fit`, or a column, counted in the training split."
        ),
    ] = None,
    others: Annotated[
        Optional[list[str]], typer.Option("--with", help="Another run with the same classes: adds ensembles. Repeatable.")
    ] = None,
    metadata: Metadata = None,
    boxes: Boxes = None,
    skip_bad: SkipBad = False,
    drop_parts: Annotated[
        Optional[str], typer.Option(help="iFAM models: drop these parts, e.g. 0,3.", show_default="none")
    ] = None,
    token_quantile: Annotated[
        float, typer.Option(help="iFAM models: drop patches below this quantile of their part's training logits.")
    ] = 0.0,
    adapt: Annotated[
        str,
        typer.Option(help="Fuse images taken at the same place jointly: group:COLUMN, folder, sequence:SECONDS, batch:N or off."),
    ] = "off",
    workers: Workers = None,
    report: Report = None,
    explanations: Explanations = None,
    as_json: Json = False,
    engine: Engine = "local",
    address: Address = None,
) -> None:
    """Evaluate every branch and every fusion of a run: accuracy, macro accuracy, calibration, groups, confusion."""
    check_explanations(explanations, report)
    from l2r2_models.errors import L2R2Error
    from l2r2_models.evaluate.evaluator import evaluation_of, judge_run
    from l2r2_models.runs import store_evaluation

    how: dict[str, Any] = {"workers": workers}
    if on_ray(engine, address):
        from l2r2_models.scale import logits_on_ray

        how = {"compute": logits_on_ray(address, workers)}
    judged = [
        judge_run(
            run,
            data,
            split,
            group=group,
            fit_split=fit_split,
            prior=prior,
            others=others or (),
            metadata=metadata,
            boxes=boxes,
            skip_bad=skip_bad,
            drop_parts=numbers("--drop-parts", drop_parts),
            token_quantile=token_quantile,
            adapt=adapt,
            progress=lambda batches, total: track(batches, total, "branch logits"),
            **how,
        )
        for split in dict.fromkeys(splits or ["test"])
    ]
    results = [evaluation_of(one) for one in judged]
    for result in results:
        problems = [f"warning: {warning}" for warning in result.warnings]
        problems += [f"left out: {reason}" for reason in result.left_out.values()]
        for problem in problems:
            errors.print(problem)
    if report:
        from l2r2_models.report.evaluation import write_evaluation

        write_evaluation(report, judged, results, lambda batches, total: track(batches, total, "parts"), explanations)
    if Path(run).is_dir() and not judged[0].checkpoint.model.interventions():  # stored for the model card
        try:
            for one, result in zip(judged, results):
                store_evaluation(run, data, one.checkpoint.digest, result.to_dict())
        except L2R2Error as error:
            errors.print(f"warning: {error} These metrics will be missing from the model card of this run.")
    from l2r2_models.report.comparison import changes

    if as_json:
        found = [result.to_dict() for result in results]
        typer.echo(json.dumps(found if len(found) > 1 else found[0]))
    else:
        for one, result in zip(judged, results):
            _print(one, result, named=len(results) > 1)
        if len(results) > 1:
            say(changes(judged, results))
    if report:
        say(f"wrote {report}", err=as_json)


def _print(judged: Judged, result: Evaluation, named: bool) -> None:
    show(_table(result, f"{cell(result.split)}, in %" if named else "in %"))
    if result.group:
        show(_groups(judged, result))
    fitted = f"; fusions and temperatures fitted on {result.fitted_on}" if result.fitted_on else ""
    how = " (the true labels were the prompts)" if judged.data.table.boxes_from.get("oracle") else ""
    say(
        f"{result.images} images of {result.split}, {result.with_object} with an object found{how}; "
        f"at least one branch correct (oracle): {100 * result.oracle:.1f}{fitted}"
    )
    show_shares(judged.shares)
    if pairs := _confused(judged, result):
        say(f"most confused by {judged.answer} (truth -> prediction): {pairs}")
    for note in result.notes:
        say(f"note: {note}")


def _table(result: Evaluation, title: str) -> Table:
    from rich.table import Table

    columns = {"accuracy": "accuracy", "macro_accuracy": "macro", "ece": "ECE", "with_box": "with box", "without_box": "without"}
    if result.temperatures:
        columns = {
            "accuracy": "accuracy",
            "macro_accuracy": "macro",
            "ece": "ECE",
            "ece_scaled": "ECE scaled",
            "with_box": "with box",
            "without_box": "without",
        }
    if result.group:
        columns["worst_group"] = f"worst {cell(result.group)}"
    table = Table(title, box=None, header_style="bold", pad_edge=False)
    for title in columns.values():
        table.add_column(title, justify="right")
        if title == "accuracy":
            table.add_column("95 %", justify="right", style="dim")
    for name, metrics in result.rows.items():
        cells = ["" if metrics[k] is None else f"{100 * metrics[k]:.1f}" for k in columns]
        low, high = metrics["intervals"]["accuracy"]
        table.add_row(cell(name), cells[0], f"{100 * low:.1f}-{100 * high:.1f}", *cells[1:])
    return table


def _groups(judged: Judged, result: Evaluation) -> Table:
    from rich.table import Table

    titles = cell(f"accuracy by {result.group}"), "images", *map(cell, judged.own)
    table = Table(*titles, box=None, header_style="bold", pad_edge=False)
    for value, count in result.groups.items():
        reached = [result.rows[name]["by_group"][value] for name in judged.own]
        table.add_row(cell(value) or "(empty)", str(count), *(f"{100 * v:.1f}" for v in reached))
    return table


def _confused(judged: Judged, result: Evaluation) -> str:
    import torch

    from l2r2_models.evaluate.metrics import most_confused

    matrix = torch.tensor(result.confusion[judged.answer])
    of = matrix.sum(1).tolist()
    named = ((result.labels[i], result.labels[j], count, of[i]) for i, j, count in most_confused(matrix))
    return ", ".join(f"{truth} -> {answer} {count} of {total}" for truth, answer, count, total in named)
