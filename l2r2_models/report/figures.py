"""Figures of a report, as inline SVG in the text color of the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from torch import Tensor

from ..errors import L2R2Error
from ..evaluate.metrics import Interval, confusion_matrix, reliability_bins
from ..evaluate.risk import risk_coverage
from ..fusion.calibration import expected_calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#0a0b0d"  # placeholder for the text color of the page
COLORS = ("#e69f00", "#0086c9", "#00a37a", "#d55e00", "#cc79a7", "#8c8c8c")  # safe for color-blind readers, on white and black
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",  # text stays searchable, and the browser's fonts cover every script
    "text.parse_math": False,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MOST_GROUPS, MOST_CLASSES = 40, 40
DENSE = 20  # number of classes above which the confusion table has smaller text, to fit the page


def bars_by_group(
    values: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Interval]] | None = None,
    *,
    title: str = "accuracy in %",
) -> Markup:
    """Draw horizontal bars, one block per group and one bar per series, with confidence intervals if given.

    Of more than 40 groups, the 40 in which the last series is worst are shown.

    Args:
        values: fractions by series and group; every series has the same groups.
        intervals: `(low, high)` by series and group.
        title: label of the axis.

    Raises:
        L2R2Error: when matplotlib is missing.
    """
    last = list(values.values())[-1]
    groups = sorted(last, key=lambda g: last[g])[:MOST_GROUPS]
    groups = [g for g in last if g in groups]
    height = 0.8 / len(values)
    with _figure(7.5, 0.7 + len(groups) * (0.12 + 0.2 * len(values))) as figure:
        axes = figure.subplots()
        for i, (series, by_group) in enumerate(values.items()):
            places = [row - 0.4 + (i + 0.5) * height for row in range(len(groups))]
            lengths = [100 * by_group[g] for g in groups]
            bars = axes.barh(places, lengths, height * 0.9, color=COLORS[i % len(COLORS)], label=_clean(series))
            spans = [intervals[series][g] for g in groups] if intervals else []
            if spans:
                low, high = ([abs(100 * span[end] - v) for span, v in zip(spans, lengths)] for end in (0, 1))
                axes.errorbar(lengths, places, xerr=[low, high], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            ends = [max(100 * span[1], v) for span, v in zip(spans, lengths)] or lengths
            for bar, end, value in zip(bars, ends, lengths):
                axes.text(end + 1, bar.get_y() + bar.get_height() / 2, f"{value:.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(groups)), [_clean(g) for g in groups])
        axes.invert_yaxis()
        axes.set_xlim(0, 106)
        axes.set_xlabel(_clean(title))
        if len(values) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        hidden = "" if len(groups) == len(last) else f"; the {len(groups)} worst of {len(last)}"
        return _svg(figure, f"{title} by group{hidden}")


def home_and_away(
    values: Mapping[str, tuple[float, float]], intervals: Mapping[str, tuple[Interval, Interval]], splits: tuple[str, str]
) -> Markup:
    """Draw a point per series: accuracy on one split against accuracy on another, with confidence intervals.

    On the diagonal, the accuracy is the same on both.

    Args:
        values: the two fractions by series.
        intervals: `(low, high)` of both, by series; series without intervals are small and gray.
        splits: names of the splits, that of the horizontal axis first.

    Raises:
        L2R2Error: when matplotlib is missing.
    """
    with _figure(5.2, 4.6) as figure:
        axes = figure.subplots()
        _draw_home_and_away(axes, values, intervals, splits)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        return _svg(figure, f"accuracy on {splits[0]} and on {splits[1]}")


def _draw_home_and_away(
    axes: Axes,
    values: Mapping[str, tuple[float, float]],
    intervals: Mapping[str, tuple[Interval, Interval]],
    splits: tuple[str, str],
) -> None:
    low = max(0, min(min(pair) for pair in values.values()) * 100 - 8)
    axes.plot((low, 100), (low, 100), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for i, (name, spans) in enumerate(intervals.items()):
        x, y = (100 * value for value in values[name])
        color = COLORS[i % len(COLORS)]
        ends = [[[abs(100 * end - value)] for end in span] for span, value in zip(spans, (x, y))]
        axes.errorbar(x, y, xerr=ends[0], yerr=ends[1], fmt="none", ecolor=color, elinewidth=1.2, capsize=2)
        axes.plot(x, y, MARKERS[i % len(MARKERS)], color=color, markersize=8, label=_clean(name))
    others = [pair for name, pair in values.items() if name not in intervals]
    if others:
        x_of, y_of = ([100 * pair[k] for pair in others] for k in (0, 1))
        axes.plot(x_of, y_of, "o", color=COLORS[-1], markersize=4, label="other fusions")
    axes.set_xlim(low, 101)
    axes.set_ylim(low, 101)
    axes.set_aspect("equal")
    axes.set_xlabel(f"accuracy in % on {_clean(splits[0])}")
    axes.set_ylabel(f"accuracy in % on {_clean(splits[1])}")


def reliability_diagram(logits: Mapping[str, Tensor], labels: Tensor) -> Markup:
    """Draw a reliability diagram per output: accuracy by confidence, and the share of images per bin.

    Bars below the diagonal are overconfident. The bins are those of `expected_calibration_error`.

    Args:
        logits: `[N, classes]` by output.
        labels: `[N]` class indices.

    Raises:
        L2R2Error: when matplotlib is missing.
    """
    with _figure(2.7 * len(logits) + 0.3, 3.2) as figure:
        grid = figure.subplots(2, len(logits), squeeze=False, sharex=True, height_ratios=(4, 1))
        for panel, (name, z) in enumerate(logits.items()):
            rows, _, right = (values.tolist() for values in reliability_bins(z, labels))
            bins = len(rows)
            left, width = [100 * i / bins for i in range(bins)], 100 / bins
            top, below = grid[0][panel], grid[1][panel]
            top.bar(left, [100 * v for v in right], width * 0.92, align="edge", color=COLORS[1])
            top.plot((0, 100), (0, 100), color=INK, linewidth=1, linestyle=(0, (4, 3)))
            top.set_ylim(0, 100)
            top.set_title(f"{_clean(name)}\nECE {100 * expected_calibration_error(z, labels):.1f}", fontsize=10)
            below.bar(left, [100 * n / max(len(labels), 1) for n in rows], width * 0.92, align="edge", color=COLORS[-1])
            below.set_xlim(0, 100)
            below.set_xlabel("confidence in %")
        grid[0][0].set_ylabel("accuracy in %")
        grid[1][0].set_ylabel("images\nin %")
        figure.align_ylabels()
        figure.tight_layout()
        return _svg(figure, f"reliability of {', '.join(logits)}")


def risk_coverage_curves(logits: Mapping[str, Tensor], labels: Tensor) -> Markup:
    """Draw the error rate among the most confident predictions, by the fraction of images that keep their prediction.

    Args:
        logits: `[N, classes]` by output.
        labels: `[N]` class indices.

    Raises:
        L2R2Error: when matplotlib is missing.
    """
    with _figure(5.5, 3.2) as figure:
        axes, curves = figure.subplots(), {}
        for name, z in logits.items():
            sure, predicted = z.softmax(-1).max(-1)
            _, counts, errors = risk_coverage(sure, predicted == labels)
            curves[name] = (counts / len(labels)).tolist(), (errors / counts).tolist()
        _draw_risk(axes, curves)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        return _svg(figure, f"risk and coverage of {', '.join(logits)}")


def _draw_risk(axes: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draw the error rate by the share of predictions that are kept, one line per output."""
    for i, (name, (shares, risks)) in enumerate(curves.items()):
        axes.plot([100 * v for v in shares], [100 * v for v in risks], color=COLORS[i % len(COLORS)], label=_clean(name))
    axes.set_xlim(0, 100)
    axes.set_ylim(0)
    axes.set_xlabel("images that keep their prediction, the most confident first, in %")
    axes.set_ylabel("of these wrong, in %")


def home_and_away_png(
    values: Mapping[str, tuple[float, float]], intervals: Mapping[str, tuple[Interval, Interval]], splits: tuple[str, str]
) -> bytes:
    """Draw `home_and_away` as PNG on white, for a model card; it raises what `home_and_away` does."""
    with _figure(5.2, 4.6) as figure:
        axes = figure.subplots()
        _draw_home_and_away(axes, values, intervals, splits)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        return _png(figure)


def risk_coverage_png(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Draw the shares of kept predictions and their error rates, by output, as PNG on white.

    Raises:
        L2R2Error: when matplotlib is missing.
    """
    with _figure(5.5, 3.2) as figure:
        axes = figure.subplots()
        _draw_risk(axes, curves)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        return _png(figure)


def confusion(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> Markup:
    """Make a confusion matrix of true (rows) and predicted classes (columns): a table up to 40 classes, else a figure.

    Args:
        logits: `[N, classes]`.
        labels: `[N]` class indices.
        classes: class names; those that neither occur nor are predicted are left out.

    Raises:
        L2R2Error: when matplotlib is missing.
    """
    counts = confusion_matrix(logits.argmax(-1), labels, len(classes))
    shown = ((counts.sum(0) + counts.sum(1)) > 0).nonzero()[:, 0]
    counts, names = counts[shown][:, shown], [classes[i] for i in shown.tolist()]
    if len(names) > MOST_CLASSES:
        return _confusion_picture(counts)
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).tolist()
    lines = []
    for i, (name, row) in enumerate(zip(names, counts.tolist())):
        colors = ("230,126,34" if i != j else "0,150,110" for j in range(len(row)))
        cells = Markup("").join(
            Markup('<td style="background:rgba({},{:.2f})">{}</td>').format(color, 0.75 * part, n or "")
            for n, part, color in zip(row, share[i], colors)
        )
        lines.append(Markup("<tr><th scope=row>{}</th>{}</tr>").format(name, cells))
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in ("true ↓ predicted →", *names))
    form = Markup('<div class="scroll"><table class="{}"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    return form.format("matrix dense" if len(names) > DENSE else "matrix", head, Markup("\n").join(lines))


def _confusion_picture(counts: Tensor) -> Markup:
    with _figure(6.5, 5.5) as figure:
        axes = figure.subplots()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        picture = axes.imshow(100 * shares.numpy(), cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
        axes.set_xlabel("predicted class (index)")
        axes.set_ylabel("true class (index)")
        figure.colorbar(picture, label="% of the class's images")
        return _svg(figure, f"confusion of {len(counts)} classes")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Make a figure, sized in inches, without pyplot, so that the caller's plots are not affected."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise L2R2Error('A report needs more packages: pip install "l2r2-models[train]".') from error
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs missing in matplotlib's font are drawn by the browser's
        yield Figure(figsize=(width, height))


def _svg(figure: Figure, alt: str) -> Markup:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": alt}):  # ids are reproducible, and unique to the figure
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # unreferenced ids that repeat in every figure
    return Markup('<figure role="img" aria-label="{}">{}</figure>').format(alt, Markup(svg))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _clean(name: str, longest: int = 40) -> str:
    """Return a user's name as one line of text that is valid in SVG."""
    text = "".join(c if c.isprintable() else " " for c in name.encode("utf-8", "backslashreplace").decode()).strip()
    return (text if len(text) <= longest else f"{text[: longest - 1]}…") or "(empty)"
