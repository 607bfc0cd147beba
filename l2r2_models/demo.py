"""A demonstration from scratch on a laptop: make data, train two models, predict, compare, and draw a picture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .data.demo import make_demo_data
from .data.table import read_table
from .errors import L2R2Error
from .images import load_image
from .io import read_json, write_atomic, write_json
from .predict.predict_files import accuracy_by_branch, gather, predict_to_file
from .predict.predictor import Predictor
from .train.finetune import finetune
from .train.recipe import Recipe
from .versions import version_of

SPLITS = ("test_usual", "test_swapped")
BACKBONE = "timm:resnet10t"


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


def run_demo(folder: Path, *, epochs: int = 8, seed: int = 0, say: Callable[[str], None] = print) -> DemoResult:
    """Train a plain classifier and an L2R2 model on generated data, and compare them on both test splits.

    The same call continues an interrupted demo; finished trainings and predictions are kept.

    Args:
        folder: the folder for all files.
        epochs, seed: settings of both trainings.
        say: called with each line of progress.

    Raises:
        L2R2Error: when a package is missing, or the folder cannot be written.

    >>> run_demo(Path("demo")).accuracy["L2R2 fused"]["test_swapped"]  # doctest: +SKIP
    """
    _require("matplotlib", "transformers", "sklearn", "skimage")
    _start_over_if_changed(folder, {"epochs": epochs, "seed": seed, "version": version_of("l2r2-models")})
    say("1/4  making the data: digits on photographs; in training, the photograph nearly always reveals the digit")
    data = folder / "data"
    if not (data / "metadata.csv").exists():
        make_demo_data(data, seed=seed)
    common = dict(size=64, epochs=epochs, seed=seed, flip=0.0, fusion="robust", lr=2e-3, label_smoothing=0.0)
    runs = {}
    for number, (name, branches) in enumerate({"plain": ("full",), "l2r2": ("full", "fg")}.items(), 2):
        what = "a plain classifier on whole images" if name == "plain" else "L2R2: whole image and object, with a shared backbone"
        say(f"{number}/4  training {what}")
        recipe = Recipe.default(BACKBONE, False, branches=branches, **common)
        runs[name] = finetune(data, recipe, folder / name).folder

    say("4/4  predicting the test images")
    truth = {str(row.path): str(row.label) for row in read_table(data).rows}
    predictions = {name: _predictions(run, data, folder, name) for name, run in runs.items()}
    picture = folder / "predictions.png"
    write_atomic(picture, lambda path: _draw(predictions["l2r2"]["test_swapped"], truth, path))
    return DemoResult(_table(predictions, truth), folder / "predictions.json", picture)


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


def _draw(images: list[dict[str, Any]], truth: dict[str, str], path: Path, count: int = 6) -> None:
    """Draw the first test image of each of `count` classes, with its box and the predictions of full, fg and fused."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    objects = {image["file"]: image["objects"][0] for image in images}
    first = {truth[file]: file for file in reversed(objects)}
    files = [first[label] for label in sorted(first)][:count]
    figure, axes = plt.subplots(1, len(files), figsize=(2.2 * len(files), 3.1), squeeze=False)
    for axis, file in zip(axes[0], files):
        found = objects[file]
        axis.imshow(load_image(file), interpolation="nearest")
        x0, y0, x1, y1 = found["box"]
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="red", linewidth=1.5))
        axis.set_title(f"true digit: {truth[file]}", fontsize=11, fontweight="bold")
        axis.axis("off")
        for line, (name, prediction) in enumerate((("full", found["full"]), ("fg", found["fg"]), ("fused", found))):
            right = prediction["label"] == truth[file]
            text = f"{name}: {prediction['label']}  ({100 * prediction['score']:.0f} %)"
            axis.text(
                0.5,
                -0.10 - 0.13 * line,
                text,
                transform=axis.transAxes,
                ha="center",
                va="center",
                fontsize=10,
                color="#1a7f37" if right else "#b42318",
            )
    figure.suptitle("Digits on the background of another digit: predictions of each branch (green: correct)", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.27, wspace=0.12)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
