"""The HTML page of `l2r2 explain`: per image the views, the saliency maps, and the counterfactuals."""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..errors import L2R2Error
from ..explain.counterfactuals import WORDS
from ..explain.explainer import Explanation
from .explanations import anchor_of
from .html import Cell, Picture, Section, percent, strip, table, write_page

SHOWN = 24  # images on a page
MOST_SIDE = 512  # maximum side of a picture in pixels
SORTS = ("disagreement", "outside", "error")
MEASURES = {
    "share": "on the object",
    "iou": "IoU",
    "delta": "Δ",
    "ap": "pixel AP",
    "insertion": "insertion",
    "deletion": "deletion",
}
ABOUT_MAPS = (
    "Bright areas increase the score of the class. full and fg: each for its own prediction; fused: for the fused prediction, "
    "through the fusion back to both views, added up on the image."
)
ABOUT_MEASURES = (
    "On the object: the share of the saliency inside the object's mask, or its box if there is no mask. For a flat map it is the "
    "object's share of the image; for a view that shows only the object it is 100 %. As in RIVAL10: IoU of the map above half "
    "its maximum, Δ (mean inside minus mean outside), average precision of the pixels. Insertion and deletion: area under the "
    "probability of the class while pixels are inserted or deleted, the most salient first; a faithful map has a high insertion "
    "and a low deletion."
)
ABOUT_CHANGES = (
    "Changes: the probability of the predicted class after each change. The box stays the same, unless the change is to the box. "
    "To measure how much a model relies on the background over a data set, run l2r2 audit."
)


@dataclass(frozen=True)
class Numbers:
    """The values of one image that the summary needs."""

    right: bool | None
    agree: bool | None
    flat: float | None
    measures: dict[str, dict[str, float]]
    changes: dict[str, dict[str, float]]
    kept: dict[str, bool]


class Page:
    """Collect explanations one by one: the metrics of all images, and the pictures of the first `most` in the order.

    Args:
        sort: `disagreement` (between full and fg), `outside` (saliency outside the object) or `error` (most confident mistakes
            first; needs labels); None keeps the order of the images.
        most: maximum number of images shown.

    Raises:
        L2R2Error: when the order is unknown.
    """

    def __init__(self, sort: str | None = "disagreement", most: int = SHOWN) -> None:
        if sort not in (None, *SORTS):
            raise L2R2Error(f'Unknown order "{sort}"; choose from {", ".join(SORTS)}.')
        self.sort, self.most = sort, most
        self.numbers: list[Numbers] = []
        self.method = ""
        self._cards: list[tuple[float, int, Markup]] = []  # a heap whose top is the last shown image

    def add(self, found: Explanation) -> dict[str, Any]:
        """Add an image, and draw it if it is among the first.

        Returns:
            What `restore` needs to add it again.

        Raises:
            L2R2Error: when sorting by error and the image has no label.
        """
        value = 0.0 if self.sort is None else getattr(found, self.sort)
        if value is None and self.sort == "error":
            raise L2R2Error(f"{found.file}: has no label to sort by error; pass a data set with labels, or another --sort.")
        number, numbers = -1.0 if value is None else float(value), _numbers_of(found)
        drawn = card(found) if self._is_shown(number) else None
        self._add(number, numbers, found.method, drawn)
        return {"value": number, "numbers": json.dumps(asdict(numbers)), "method": found.method, "card": drawn}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Add an image from what `add` returned for it."""
        drawn = None if record["card"] is None else Markup(record["card"])  # our own markup, escaped when it was made
        self._add(record["value"], Numbers(**json.loads(record["numbers"])), record["method"], drawn)

    def _is_shown(self, value: float) -> bool:
        return len(self._cards) < self.most or (value, -len(self.numbers)) > self._cards[0][:2]

    def _add(self, value: float, numbers: Numbers, method: str, drawn: Markup | None) -> None:
        entry, is_shown = (value, -len(self.numbers)), self._is_shown(value)
        self.method = method
        self.numbers.append(numbers)
        if drawn is not None and is_shown:
            (heapq.heappush if len(self._cards) < self.most else heapq.heapreplace)(self._cards, (*entry, drawn))

    def lead(self) -> str:
        """Return a summary in a few sentences."""
        count = len(self.numbers)
        sentences = [f"{count:,} image{'s' * (count != 1)}."]
        if known := [n.agree for n in self.numbers if n.agree is not None]:
            sentences.append(f"The whole image and the object disagree in {known.count(False):,} of {len(known):,}.")
        shares = {a: percent(v) for a in self._answers() if (v := self._mean(a, "share")) is not None}
        if shares:
            flat = percent(_mean([n.flat for n in self.numbers if n.flat is not None]))
            first, *others = shares.items()
            parts = ", ".join([f"{first[1]} % of the saliency of {first[0]}", *(f"{share} % of {a}" for a, share in others)])
            sentences.append(f"The object covers {flat} % of the image and gets {parts}.")
        return " ".join(sentences)

    def write(self, path: str | Path, title: str, notes: Sequence[str] = ()) -> None:
        """Write the page.

        Raises:
            L2R2Error: when no image was explained, or the file cannot be written.
        """
        if not self.numbers:
            raise L2R2Error(f"{path}: not written, because no image could be explained.")
        cards = [markup for *_, markup in sorted(self._cards, key=lambda c: c[:2], reverse=True)]
        order = {
            "disagreement": "most disagreement of full and fg first",
            "outside": "most saliency outside the object first",
            "error": "most confident mistakes first",
        }.get(str(self.sort), "in the given order")
        count = f"{len(cards)} of {len(self.numbers):,}, {order}." if len(self.numbers) > 1 else ""
        sections = [Section("Images" if len(self.numbers) > 1 else "The image", count, cards)]
        if len(self.numbers) > 1:
            sections.append(Section("Summary", "Means over all images.", [self._measures(), *self._changes()]))
        about = (ABOUT_MAPS, f"Method: {self.method}.", ABOUT_MEASURES, ABOUT_CHANGES)
        sections.append(Section("What is this?", "\n".join(about)))
        write_page(path, title, self.lead(), sections, notes)

    def _answers(self) -> list[str]:
        return list(dict.fromkeys(a for n in self.numbers for a in n.measures))

    def _mean(self, answer: str, measure: str) -> float | None:
        return _mean([n.measures[answer][measure] for n in self.numbers if measure in n.measures.get(answer, {})])

    def _measures(self) -> Markup:
        names = [m for m in MEASURES if any(self._mean(a, m) is not None for a in self._answers())]
        rows: list[list[Cell]] = [[a, *(percent(self._mean(a, m)) for m in names)] for a in self._answers()]
        flat = _mean([n.flat for n in self.numbers if n.flat is not None])
        if flat is not None:
            rows.append(["a flat map", percent(flat)])
        known = [n.right for n in self.numbers if n.right is not None]
        caption = "means in %" + (f"; {known.count(True):,} of {len(known):,} are correct" if known else "")
        return table(["", *(MEASURES[m] for m in names)], rows, caption=caption)

    def _changes(self) -> list[Markup]:
        by_name: dict[str, list[Numbers]] = defaultdict(list)
        for n in self.numbers:
            for name in n.changes:
                by_name[name].append(n)
        if not by_name:
            return []
        answers = list(dict.fromkeys(a for n in self.numbers for by in n.changes.values() for a in by))
        names = [*(w for w in WORDS if w in by_name), *(w for w in by_name if w not in WORDS)]
        rows: list[list[Cell]] = []
        for name in names:
            of = by_name[name]
            means = [percent(_mean([n.changes[name][a] for n in of if a in n.changes[name]])) for a in answers]
            other = Counter(n.kept[name] for n in of)[False] / len(of)
            rows.append([WORDS.get(name, name.replace("_", " ")), *means, percent(other), str(len(of))])
        head = ["change", *answers, "prediction changes", "images"]
        return [table(head, rows, caption="mean probability of the class predicted before the change, in %")]


def card(found: Explanation) -> Markup:
    """Make the card of one image: the pictures, the predictions with the metrics of their maps, and the changes."""
    predicted = found.prediction
    truth = "" if found.truth is None else f" {'✓' if predicted.label == found.truth else '✗'} truth: {found.truth}"
    title = f"{predicted.label} {100 * predicted.score:.0f} %{truth} ({predicted.reason})"
    blocks = [_answers(found)]
    if found.changes:
        blocks.append(_changes(found))
    return strip(title, pictures(found), blocks, found.file or "", anchor_of(found.file) if found.file else "")


def pictures(found: Explanation) -> list[Picture]:
    """Return the image with its box, the views and maps of the branches, the fused map, and the swapped background."""
    image = _picture(found.pixels)
    box = None if found.box is None else found.box.tolist()
    shown = [Picture(image, "the image" + (" and its box" if box else ""), box)]
    for answer, values in found.maps.items():
        nothing = "" if bool(values.max() > 0) else "; no area increases its score"
        who = f"{answer}: {_predicted(found, answer)}{nothing}"
        view = found.views.get(answer)
        if answer in ("fg", "bg") and view is not None:
            cut = _picture(view)
            shown.append(Picture(cut, f"what {answer} sees"))
            shown.append(Picture(heat(cut, found.own[answer]), who))
            who = f"{answer}'s map on the image"
        shown.append(Picture(heat(image, values), who, box))
    for change in found.changes:
        if change.name == "swapped" and change.pixels is not None:
            shown.append(Picture(_picture(change.pixels), f"{change.words}: {change.label}", box))
    return shown


def heat(image: Image.Image, values: Tensor) -> Image.Image:
    """Overlay a map `[h, w]`, scaled to its maximum, on a gray picture."""
    from matplotlib import colormaps

    grid = torch.nn.functional.interpolate(values[None, None], (image.height, image.width), mode="bilinear")[0, 0].clamp(min=0)
    level = grid / grid.max().clamp(min=1e-12)
    colors = torch.from_numpy(colormaps["inferno"](level.numpy())[..., :3]).float() * 255
    gray = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(image.height, image.width)
    alpha = (0.85 * level.sqrt())[..., None]
    mixed = alpha * colors + (1 - alpha) * 0.7 * gray[..., None].float()
    return _picture(mixed.round().to(torch.uint8))


def _picture(pixels: Tensor) -> Image.Image:
    image = Image.fromarray(pixels.numpy())
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    return image


def _predicted(found: Explanation, answer: str) -> str:
    predicted = getattr(found.prediction, answer) if answer != "fused" else found.prediction
    predicted = predicted or found.prediction
    return f"{predicted.label} {100 * predicted.score:.0f} %"


def _answers(found: Explanation) -> Markup:
    names = [m for m in MEASURES if any(m in v for v in found.measures.values())]
    rows: list[list[Cell]] = [
        [answer, _predicted(found, answer), *(percent(measures.get(m)) for m in names)]
        for answer, measures in found.measures.items()
    ]
    asked = set(found.questions.values())
    caption = f"measures of the maps in %; they show {asked.pop()}" if len(asked) == 1 else "measures of the maps in %"
    return table(["", "predicts", *(MEASURES[m] for m in names)], rows, caption=caption, words=[1], strong=[len(rows) - 1])


def _changes(found: Explanation) -> Markup:
    answers = list(found.changes[0].probability)
    rows: list[list[Cell]] = [[c.words, *(percent(c.probability[a]) for a in answers), c.label] for c in found.changes]
    question = list(found.questions.values())[-1].removeprefix("why ").split(" and not ")[0]
    head = ["change", *answers, "prediction"]
    return table(head, rows, caption=f"probability of {question} in %", strong=[0], words=[len(head) - 1])


def _numbers_of(found: Explanation) -> Numbers:
    predicted = found.prediction
    flat = next((v["flat"] for v in found.measures.values() if "flat" in v), None)
    before = found.changes[0].label if found.changes else ""
    return Numbers(
        None if found.truth is None else predicted.label == found.truth,
        None if predicted.full is None or predicted.fg is None else predicted.full.label == predicted.fg.label,
        flat,
        found.measures,
        {c.name: c.probability for c in found.changes},
        {c.name: c.label == before for c in found.changes},
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
