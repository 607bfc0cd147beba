"""Building blocks of one self-contained HTML page: no script, no link to the outside, readable in light and dark and on paper.

Titles, texts, cells and captions are plain text and are escaped here: class and file names come from users. A block of HTML is a
`Markup`, which only the helpers of this module and of `report_figures` make.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image, ImageDraw

from ..errors import L2R2Error
from ..images import load_image
from ..io import write_text
from ..versions import version_of

THUMBNAIL = 256  # longer side in pixels; some 10 kB as JPEG
Cell = str | Markup | None


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, paragraphs (plain text, one a line), and blocks made by the helpers."""

    title: str
    text: str = ""
    html: Sequence[Markup] = ()


@dataclass(frozen=True)
class Picture:
    """One card of a gallery.

    Attributes:
        image: a file (read by `load_image`) or an image.
        title: one line.
        box: xyxy pixels of the image, drawn on it; None where there is none.
        answers: who said what, and whether that was right (None where that is no question).
        note: a last line, e.g. the file's name.
    """

    image: Path | Image.Image
    title: str
    box: Sequence[float] | None = None
    answers: Sequence[tuple[str, str, bool | None]] = ()
    note: str = ""


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> None:
    """Write one HTML page atomically.

    Args:
        path: the file; folders are made.
        title, lead: the heading and the sentences that say what was found; plain text.
        sections: see `Section`; links to them stand at the top where there are more than two.
        notes: warnings, shown before everything else.

    Raises:
        L2R2Error: not writable.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    footer = f"Made by l2r2-models {version_of('l2r2-models')}."
    write_text(path, template.render(title=title, lead=lead, sections=sections, notes=notes, footer=footer))


def percent(value: float | None, interval: tuple[float, float] | None = None) -> Markup:
    """A share of 1 as a cell in per cent, its confidence interval in small print under it; empty for None."""
    if value is None:
        return Markup("")
    if interval is None:
        return Markup(_number(value))
    low, high = interval
    return Markup("{}<small>{}{}{}</small>").format(_number(value), _number(low), "–" if low >= 0 else " to ", _number(high))


def _number(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−")


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str = "",
    strong: Sequence[int] = (),
    words: Sequence[int] = (),
) -> Markup:
    """A table that scrolls where it is too wide.

    Args:
        head: a title a column.
        rows: cells, the first of a row is its name; None is an empty cell.
        caption: what it shows, plain text.
        strong: numbers of the rows to be read first.
        words: numbers of the columns that hold words (the first always does); the others are aligned as numbers.
    """
    kinds = [Markup(' class="words"') if i in words else "" for i in range(len(head))]
    top = Markup("").join(Markup("<th scope=col{}>{}</th>").format(*cell) for cell in zip(kinds, head))
    lines = []
    for i, (name, *cells) in enumerate(rows):
        pairs = zip(kinds[1:], cells)
        body = Markup("").join(Markup("<td{}>{}</td>").format(kind, "" if cell is None else cell) for kind, cell in pairs)
        weight = Markup(' class="strong"') if i in strong else ""
        lines.append(Markup("<tr{}><th scope=row>{}</th>{}</tr>").format(weight, "" if name is None else name, body))
    about = Markup("<caption>{}</caption>").format(caption) if caption else ""
    form = Markup('<div class="scroll"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
    return form.format(about, top, Markup("\n").join(lines))


def gallery(pictures: Iterable[Picture], limit: int = 24) -> Markup:
    """Cards with a small picture, the box drawn on it, and who said what; the first `limit` of them, taken one by one."""
    cards = [_card(picture) for picture in islice(pictures, limit)]
    return Markup('<div class="gallery">{}</div>').format(Markup("\n").join(cards))


def strip(title: str, pictures: Sequence[Picture], blocks: Sequence[Markup] = (), note: str = "") -> Markup:
    """One wide card about one image: pictures side by side with their titles under them, then blocks of HTML."""
    form = Markup("<figure>{}<figcaption>{}</figcaption></figure>")
    panels = Markup("\n").join(form.format(_thumbnail(picture), picture.title) for picture in pictures)
    below = Markup("<small>{}</small>").format(note) if note else ""
    body = Markup("").join(blocks)
    return Markup('<div class="strip"><b>{}</b><div class="panels">{}</div>{}{}</div>').format(title, panels, body, below)


def _card(picture: Picture) -> Markup:
    answers = []
    for who, what, right in picture.answers:
        kind = "" if right is None else "right" if right else "wrong"
        sign = "" if right is None else "✓ " if right else "✗ "  # not by colour alone
        answers.append(Markup('<tr><th scope=row>{}</th><td class="{}">{}{}</td></tr>').format(who, kind, sign, what))
    said = Markup("<table>{}</table>").format(Markup("").join(answers)) if answers else ""
    note = Markup("<small>{}</small>").format(picture.note) if picture.note else ""
    words = Markup('<div class="words"><b>{}</b>{}{}</div>').format(picture.title, said, note)
    return Markup("<div>{}{}</div>").format(_thumbnail(picture), words)


def _thumbnail(picture: Picture) -> Markup:
    try:
        image = picture.image if isinstance(picture.image, Image.Image) else load_image(picture.image)
    except L2R2Error as error:  # gone or damaged since it was judged: the words are still worth reading
        return Markup('<div class="lost">{}</div>').format(str(error))
    scale = THUMBNAIL / max(image.size)  # a smaller image grows, so that the line of the box stays thin
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if picture.box is not None:
        x0, y0, x1, y1 = (scale * v for v in picture.box)
        draw = ImageDraw.Draw(small)
        draw.rectangle((x0 - 1, y0 - 1, max(x1, x0), max(y1, y0)), outline=(0, 0, 0), width=4)  # dark under light
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=(255, 214, 10), width=2)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/jpeg;base64,{}">').format(picture.title, data)
