"""Building blocks of a self-contained HTML page without scripts or external links, for light and dark screens and for print.

Titles, texts, cells and captions are plain text and escaped here, because class and file names come from users. A block of HTML
is a `Markup`, made only by the helpers of this module and of `report.figures`.
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

THUMBNAIL = 256  # longer side in pixels; about 10 kB as JPEG
Cell = str | Markup | None


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: the heading.
        text: plain text, one paragraph per line.
        html: blocks made by the helpers.
        about: definitions, one paragraph per line, folded behind "What is this?" below the blocks.
    """

    title: str
    text: str = ""
    html: Sequence[Markup] = ()
    about: str = ""


@dataclass(frozen=True)
class Picture:
    """One card of a gallery.

    Attributes:
        image: an image, or a file read by `load_image`.
        title: one line.
        box: xyxy pixels of the image, drawn on it; None for no box.
        answers: output, prediction, and whether it is correct (None if that does not apply).
        note: a last line, e.g. the file name.
        link: address of the image's explanation; empty for none.
    """

    image: Path | Image.Image
    title: str
    box: Sequence[float] | None = None
    answers: Sequence[tuple[str, str, bool | None]] = ()
    note: str = ""
    link: str = ""


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> None:
    """Write one HTML page atomically.

    Args:
        path: the file; missing folders are created.
        title, lead: the heading, and the main result in a few sentences; plain text.
        sections: see `Section`; links to them are at the top if there are more than two.
        notes: warnings, shown before the sections.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    footer = f"Made by l2r2-models {version_of('l2r2-models')}."
    write_text(path, template.render(title=title, lead=lead, sections=sections, notes=notes, footer=footer))


def percent(value: float | None, interval: tuple[float, float] | None = None) -> Markup:
    """Format a fraction in percent, with its confidence interval in small print below; empty for None.

    >>> percent(0.5, (0.4, 0.6))
    Markup('50.0<small>40.0–60.0</small>')
    """
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
    """Make a table.

    Titles and names wrap, so that it fits the page; a table with very many columns scrolls.

    Args:
        head: one title per column.
        rows: cells; the first one of a row is its name, None is an empty cell.
        caption: plain text above the table.
        strong: indices of the rows in bold.
        words: indices of the columns of text, besides the first; the others are aligned as numbers.
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


def gallery(pictures: Iterable[Picture], limit: int = 24, *, row: bool = False) -> Markup:
    """Make cards with a thumbnail, the box drawn on it, and the predictions.

    Args:
        pictures: the cards; an iterator is only consumed up to the limit.
        limit: largest number of cards.
        row: whether the cards are small enough for six or seven of them side by side.
    """
    cards = [_card(picture) for picture in islice(pictures, limit)]
    form = Markup('<div class="gallery row">{}</div>') if row else Markup('<div class="gallery">{}</div>')
    return form.format(Markup("\n").join(cards))


def strip(title: str, pictures: Sequence[Picture], blocks: Sequence[Markup] = (), note: str = "", id: str = "") -> Markup:
    """One wide card about one image, to link to by `id`: pictures side by side with their titles, then blocks of HTML."""
    form = Markup("<figure>{}<figcaption>{}</figcaption></figure>")
    panels = Markup("\n").join(form.format(_thumbnail(picture), picture.title) for picture in pictures)
    below = Markup("<small>{}</small>").format(note) if note else ""
    body = Markup('<div class="blocks">{}</div>').format(Markup("").join(blocks)) if blocks else ""
    start = Markup('<div class="strip" id="{}">').format(id) if id else Markup('<div class="strip">')
    return start + Markup('<b>{}</b><div class="panels">{}</div>{}{}</div>').format(title, panels, body, below)


def _card(picture: Picture) -> Markup:
    answers = []
    for who, what, right in picture.answers:
        kind = "" if right is None else "right" if right else "wrong"
        sign = "" if right is None else "✓ " if right else "✗ "  # a sign too, not just a color
        answers.append(Markup('<tr><th scope=row>{}</th><td class="{}">{}{}</td></tr>').format(who, kind, sign, what))
    predictions = Markup("<table>{}</table>").format(Markup("").join(answers)) if answers else ""
    note = Markup("<small>{}</small>").format(picture.note) if picture.note else ""
    link = Markup(' <small><a href="{}">saliency maps</a></small>').format(picture.link) if picture.link else ""
    words = Markup('<div class="words"><b>{}</b>{}{}{}</div>').format(picture.title, predictions, note, link)
    return Markup("<div>{}{}</div>").format(_thumbnail(picture), words)


def _thumbnail(picture: Picture) -> Markup:
    try:
        image = picture.image if isinstance(picture.image, Image.Image) else load_image(picture.image)
    except L2R2Error as error:  # deleted or damaged in the meantime; the text is still shown
        return Markup('<div class="lost">{}</div>').format(str(error))
    scale = THUMBNAIL / max(image.size)  # smaller images are enlarged, so that the box is drawn thin
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if picture.box is not None:
        x0, y0, x1, y1 = (scale * v for v in picture.box)
        draw = ImageDraw.Draw(small)
        draw.rectangle((x0 - 1, y0 - 1, max(x1, x0), max(y1, y0)), outline=(0, 0, 0), width=4)  # a dark line under the light one
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=(255, 214, 10), width=2)
    return Markup('<img alt="{}" src="{}">').format(picture.title, jpeg_url(small))


def jpeg_url(image: Image.Image) -> str:
    """Return an RGB image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
