"""The picture of the demo: accuracy on usual against swapped backgrounds, and what each branch sees and predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..images import load_image
from ..views import ViewSpec, make_views

CORRECT, WRONG = "#1a7f37", "#b42318"
COLORS = {"plain": "#555555", "L2R2 full": "#2a6fb0", "L2R2 fg": "#d98a00", "L2R2 fused": "#7b3fa0"}


def draw_demo(
    accuracy: Mapping[str, Mapping[str, float]],
    images: Sequence[Mapping[str, Any]],
    truth: Mapping[str, str],
    spec: ViewSpec,
    path: Path,
    count: int = 6,
) -> None:
    """Draw the accuracies, and the first test image of each of `count` classes with its views and predictions.

    Args:
        accuracy: accuracy by row of the table, then by `test_usual` and `test_swapped`.
        images: records of a prediction file.
        truth: label by file.
        spec: how the views are cut.
        path: the PNG to write.
        count: number of images.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    objects = {image["file"]: image["objects"][0] for image in images}
    first = {truth[file]: file for file in reversed(objects)}
    files = [first[label] for label in sorted(first)][:count]
    figure = plt.figure(figsize=(4.2 + 1.75 * len(files), 4.6))
    parts: Any = figure.subfigures(1, 2, width_ratios=(4.2, 1.75 * len(files)))
    left, right = parts
    _draw_accuracy(left, accuracy)
    right.suptitle("Swapped backgrounds: the image, what fg sees of it, and the predictions", fontsize=11, y=0.97)
    axes = right.subplots(2, len(files), squeeze=False, height_ratios=(1.25, 1))
    for column, file in zip(axes.T, files):
        _draw_image(column, file, objects[file], truth[file], spec)
    right.subplots_adjust(left=0.01, right=0.99, top=0.83, bottom=0.21, wspace=0.12, hspace=0.08)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _draw_accuracy(figure: Any, accuracy: Mapping[str, Mapping[str, float]]) -> None:
    """Accuracy on swapped against usual backgrounds; on the diagonal, the background makes no difference."""
    axis = figure.subplots()
    axis.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, linestyle="--")
    axis.annotate("no loss", (62, 63), rotation=45, fontsize=8, color="#888888", ha="center", va="bottom")
    for name, row in accuracy.items():
        home, away = 100 * row["test_usual"], 100 * row["test_swapped"]
        axis.scatter([home], [away], s=60, color=COLORS[name], label=f"{name}: {home:.0f} / {away:.0f} %", zorder=3)
    axis.set(xlim=(0, 104), ylim=(-4, 104), xlabel="accuracy, usual backgrounds (%)", ylabel="accuracy, swapped backgrounds (%)")
    axis.set_aspect("equal")
    axis.legend(loc="upper left", fontsize=9, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(left=0.16, right=0.97, top=0.95, bottom=0.13)


def _draw_image(axes: Any, file: str, found: Mapping[str, Any], label: str, spec: ViewSpec) -> None:
    """Draw one image with its box, the fg view, and under them the predictions of full, fg and fused."""
    from matplotlib.patches import Rectangle

    image = load_image(file)
    x0, y0, x1, y1 = found["box"]
    views = make_views([image], torch.tensor([found["box"]]), spec, branches=("fg",))
    assert views.fg is not None
    axes[0].imshow(image, interpolation="nearest")
    axes[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="red", linewidth=1.5))
    axes[0].set_title(f"true digit: {label}", fontsize=9.5, fontweight="bold", pad=4)
    axes[1].imshow(spec.to_uint8(views.fg)[0].permute(1, 2, 0), interpolation="nearest")
    for axis in axes:
        axis.axis("off")
    for line, (name, prediction) in enumerate((("full", found["full"]), ("fg", found["fg"]), ("fused", found))):
        text = f"{name}: {prediction['label']}  ({100 * prediction['score']:.0f} %)"
        color = CORRECT if prediction["label"] == label else WRONG
        axes[1].text(
            0.5, -0.12 - 0.16 * line, text, transform=axes[1].transAxes, ha="center", va="center", fontsize=9.5, color=color
        )
