"""Fuse stored branch logits again, with another fusion and without running a network, as `l2r2 fuse --predictions` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import load_fusion
from ..errors import L2R2Error
from ..fusion import INPUTS, Fusion, ObjectnessMaxConfidence, create_fusion, fuse_branches
from ..locks import only_writer
from .adapt import changed, logits_of, object_of
from .answers import with_fused
from .formats import format_of, write_predictions
from .groups import with_groups
from .outputs import read_header, read_images
from .prediction import ObjectPrediction, product
from .rendering import About
from .rules import Rules


def fuse_again(
    predictions: Path,
    out: Path,
    *,
    method: str | None = None,
    inputs: Sequence[str] | None = None,
    run: str | None = None,
    format: str | None = None,
) -> dict[str, Any]:
    """Write the predictions that another fusion gives, from a file written with `--store-logits`.

    Args:
        predictions: JSON file with branch logits.
        out: file to write.
        method: name of a fusion that needs no fit; not needed with `run`.
        inputs: the branches to fuse; None for all.
        run: run folder or Hub id whose fitted fusion is used.
        format: format of `out`, see `format_of`.

    Returns:
        The config of the fusion.

    Raises:
        L2R2Error: when the file has no branch logits, the fusion is unknown, needs a fit, or does not fit the classes and
            branches of the file, or `out` is the same file or cannot be written.
    """
    try:
        return _fuse_again(predictions, out, format_of(out, format), method, inputs, run)
    except L2R2Error:  # a ValueError too
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:120]
        raise L2R2Error(f"{predictions}: is not as `l2r2 predict` writes it ({type(error).__name__}: {why}).") from error


def _fuse_again(
    predictions: Path, out: Path, format: str, method: str | None, inputs: Sequence[str] | None, run: str | None
) -> dict[str, Any]:
    header = read_header(predictions)
    settings, inputs_of = header["settings"], header.pop("inputs", {})
    if not settings.get("store_logits") or "adapt" in settings:
        hint = "without --adapt" if "adapt" in settings else "with --store-logits"
        raise L2R2Error(f"{predictions}: cannot be fused again; predict {hint} first.")
    if "abstain" in settings:
        raise L2R2Error(f"{predictions}: was made with --abstain, whose threshold belongs to one fusion; predict without it.")
    if out.resolve() == predictions.resolve():
        raise L2R2Error(f"{out}: is the file with the logits; choose another -o.")
    branches = _branches(predictions)
    fusion = _fusion(header["labels"], branches, method, inputs, run)
    config: dict[str, Any] = fusion.config()
    kept = {key: value for key, value in settings.items() if key != "store_logits"}

    def fused() -> Iterator[dict[str, Any]]:
        return (_again(record, fusion, header) for _, record in read_images(predictions))

    with torch.inference_mode(), only_writer(out):
        records = with_groups(fused, _groups(predictions)) if "group" in settings else fused()
        write_predictions(out, records, About.of_inputs(format, {**header, "fusion": config, "settings": kept}, inputs_of))
    return config


def _groups(predictions: Path) -> dict[str, str]:
    """Return the group of each image; one that was stored before an interruption, and not asked for since, is alone."""
    return {record["file"]: record.get("group", {}).get("name", record["file"]) for _, record in read_images(predictions)}


def _branches(predictions: Path) -> tuple[str, ...]:
    """Return the branches whose logits the first object has."""
    objects = (o for _, record in read_images(predictions) for o in record.get("objects", ()))
    first = next((o["logits"] for o in objects if "logits" in o), None)
    if first is None:
        raise L2R2Error(f"{predictions}: no object was found in any image, so there is nothing to fuse.")
    return tuple(b for b in INPUTS if b in first)


def _fusion(
    labels: Sequence[str], branches: tuple[str, ...], method: str | None, inputs: Sequence[str] | None, run: str | None
) -> Fusion:
    if run is None:
        fusion = create_fusion({"name": method, "inputs": inputs}, branches, len(labels))
        if fusion.needs_fit:
            raise L2R2Error(
                f'The fusion "{method}" must be fitted: run `l2r2 fuse RUN DATA --method {method}`, then pass RUN here.'
            )
        return fusion.eval()
    fusion, of_run = load_fusion(run)
    if list(of_run) != list(labels):
        raise L2R2Error(f"{run}: has other classes than the predictions; pass the run that made them.")
    if method not in (None, fusion.name):
        raise L2R2Error(f'{run}: its fusion is "{fusion.name}"; fit "{method}" with `l2r2 fuse` first, or leave out --method.')
    if lacking := {*(fusion.over or ())} - {*branches}:
        raise L2R2Error(f"{run}: its fusion needs the branch {', '.join(sorted(lacking))}, which the predictions do not have.")
    return fusion


def _again(record: dict[str, Any], fusion: Fusion, header: Mapping[str, Any]) -> dict[str, Any]:
    if "objects" not in record:
        return record
    objects = [_fused(object_of(o), fusion, header) for o in record["objects"]]
    by_product = isinstance(fusion, ObjectnessMaxConfidence)  # as in `Predictor`
    objects.sort(key=product if by_product else lambda o: o.box_score or 0.0, reverse=True)
    return changed(record, objects, header["settings"].get("image_rule", "best"))


def _fused(answer: ObjectPrediction, fusion: Fusion, header: Mapping[str, Any]) -> ObjectPrediction:
    if (given := logits_of(answer)) is None:  # no object: full decides with every fusion
        return answer
    score = torch.tensor([1.0 if answer.box_score is None else answer.box_score])
    fused = fuse_branches(fusion, given, None, score)[0]
    settings = header["settings"]
    again = with_fused(answer, fused, Rules.of_settings(header["labels"], settings), settings["top"], fusion.over)
    return replace(again, logits=None)
