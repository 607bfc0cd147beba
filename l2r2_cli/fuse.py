"""`l2r2 fuse`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import errors, names, say, track
from .options import DATA, Boxes, Cascade, Format, Json, Metadata, SkipBad


def fuse(
    run: Annotated[
        Optional[str],
        typer.Argument(
            help="Run folder, in which the fitted fusion is saved; or vlm:MODEL?names=FILE, with -o.",
            show_default="none, with --predictions",
        ),
    ] = None,
    data: Annotated[Optional[Path], DATA] = None,
    split: Annotated[str, typer.Option(help="Held-out split to fit on; never the one to evaluate on.")] = "val",
    method: Annotated[Optional[str], typer.Option(help="Fusion to fit.", show_default="best_on_val: by regret")] = None,
    class_wise: Annotated[bool, typer.Option("--class-wise", help="Fit one temperature per class.")] = False,
    val_backgrounds: Annotated[
        Optional[str],
        typer.Option(
            help="Rows to fit and choose on: plain (unchanged), swapped (each object on three other backgrounds), or both.",
            show_default="both, where objects have boxes or masks",
        ),
    ] = None,
    backgrounds: Annotated[
        Optional[Path],
        typer.Option(help="Folder of images (empty frames, scenes) to swap in.", show_default="the training images"),
    ] = None,
    group: Annotated[
        Optional[str], typer.Option(help="Metadata column, e.g. site: images with the same value stay in the same fold.")
    ] = None,
    inputs: Annotated[Optional[str], typer.Option(help="Branches to fuse, e.g. fg,bg.", show_default="as before, or all")] = None,
    metric: Annotated[str, typer.Option(help="Metric to optimize: accuracy or macro_accuracy.")] = "accuracy",
    abstain_risk: Annotated[
        Optional[float],
        typer.Option(help="Also fit the confidence below which to withhold predictions, for this error rate of the others."),
    ] = None,
    cascade: Cascade = None,
    metadata: Metadata = None,
    boxes: Boxes = None,
    skip_bad: SkipBad = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the result without changing the run.")] = False,
    as_json: Json = False,
    predictions: Annotated[
        Optional[Path],
        typer.Option(help="Fuse these predictions of `l2r2 predict --store-logits` again, with --method or the fusion of RUN."),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", "-o", help="File for the predictions that are fused again, or for the fusion of a vlm: model."),
    ] = None,
    format: Format = None,
) -> None:
    """Fit the fusion of a run on held-out rows, from branch logits that are computed once and stored.

    The fusion with the smallest regret is chosen: the largest gap in accuracy to the best of fg, full and their average, over
    unchanged held-out images and the same objects on other backgrounds. A fusion that is worse than fg on either is excluded.
    """
    if predictions is not None:
        _fuse_again(predictions, out, run, data, method, names(inputs), format)
        return
    if run is None or data is None:
        raise typer.BadParameter("fuse takes a run folder and a data set to fit on, or --predictions FILE")
    if out is not None and not run.startswith("vlm:"):
        raise typer.BadParameter("-o is for --predictions and vlm: models; a fitted fusion is saved in the run")
    if format is not None:
        raise typer.BadParameter("--format is for --predictions; a fitted fusion is saved in the run")
    from l2r2_models.evaluate.fit_run import fit_run

    report = fit_run(
        run,
        data,
        split,
        method=method,
        class_wise=class_wise,
        backgrounds=val_backgrounds,
        scenes=backgrounds,
        group=group,
        inputs=names(inputs),
        metric=metric,
        metadata=metadata,
        boxes=boxes,
        skip_bad=skip_bad,
        abstain_risk=abstain_risk,
        out=out,
        cascade=cascade,
        save=not dry_run,
        progress=lambda batches, total: track(batches, total, "branch logits"),
    )
    for warning in report.warnings:
        errors.print(f"warning: {warning}")
    for reason in report.left_out.values():
        errors.print(f"left out: {reason}")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    what = {"plain": "images", "swapped": "images on other backgrounds", "both": "images, unchanged and on other backgrounds,"}
    rows = f"{report.rows} {what[report.backgrounds]} of {split}, {report.with_object} with an object"
    say(f"fitted on {rows}; metrics by five-fold cross-validation, in %:")
    columns = list(next(iter(report.table.values())))
    say(f"  {'':26}" + "".join(f"  {name:^18}" for name in columns))
    say(f"  {'fusion':26}" + "  acc.    ECE    NLL" * len(columns))
    chosen = report.chosen.removesuffix(" alone")
    for name, by in report.table.items():
        found = "".join(f"  {100 * m['accuracy']:5.1f} {100 * m['ece']:5.1f}  {m['nll']:5.2f}" for m in by.values())
        numbers = f"{report.numbers[name]:>6} parameters" if name in report.numbers else ""
        say(f"  {name:26}{found}{numbers}{'  <- chosen' if name == chosen else ''}")
    if report.reason:
        say(report.reason)
    if report.chosen == "fg alone" and cascade is None:
        say("`l2r2 predict --cascade 0` then skips the whole image where there is a box, and gives the same labels and scores.")
    if (limit := report.abstain) is not None:
        kept = f"{limit.coverage:.0%} of the {limit.images} images keep their prediction, {limit.reached:.1%} of these are wrong"
        say(f"abstains below a confidence of {limit.threshold:.3f}: {kept}")
    if (decides := report.cascade) is not None:
        say(f"cascade: fg alone decides with a confidence of {decides.threshold:.3f} or more:")
        for kind, share in decides.skipped.items():
            lost = decides.lost[kind]
            say(f"  {share:.0%} of the {kind} rows, {abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}")
    say(f"{'would change' if dry_run else 'saved into'} {out or run}: {json.dumps(report.config)}")


def _fuse_again(
    predictions: Path,
    out: Path | None,
    run: str | None,
    data: Path | None,
    method: str | None,
    inputs: tuple[str, ...] | None,
    format: str | None,
) -> None:
    if out is None:
        raise typer.BadParameter("--predictions needs -o, the file to write")
    if data is not None:
        raise typer.BadParameter("--predictions is not fitted on data; leave the data set out")
    if (run is None) == (method is None):
        raise typer.BadParameter("--predictions needs a fusion: --method for one without fit, or the run that it is fitted in")
    from l2r2_models.predict.fuse_again import fuse_again

    config = fuse_again(predictions, out, method=method, inputs=inputs, run=run, format=format)
    say(f"fused with {json.dumps(config)}")
    say(f"wrote {out}")
