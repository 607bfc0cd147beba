"""The page's own pieces of HTML. All text is escaped, because file and class names come from users."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..audit.audit import AuditRun
from ..predict.rules import Rules
from ..report.audit import ABOUT_EXAMPLES, ABOUT_METRICS, bars, examples
from ..report.html import Picture, gallery, jpeg_url, strip
from .studio import Look, Photo, Studio

SHOWN = 960  # longer side of the photo on the page
THUMB = 160
HINT = "Drag on the photo to draw a box around the object."
TOOLS = [("draw a box", "box"), ("paint", "paint"), ("erase", "erase")]  # label, and value in draw.js
MASK_HINT = "fg sees the green pixels. Draw a box around the object, then erase the background in it, or paint what is missing."
TINT = (0, 200, 120, 110)  # RGBA of the mask
FINDS_OBJECT = (
    "The model finds the object itself. A box only says what moves to another background; drag on the photo to draw one."
)
MOVED = "The whole box is moved, with a soft edge around it."
MASK_MOVED = "The pixels of the mask are moved, with a soft edge."
ABOUT_AUDIT = (
    "Every image is changed some 40 times: the object on other backgrounds, the object or the background erased, and noise. If "
    "predictions change with the background, the model relies on it. Without a GPU this takes minutes."
)
EMPTY = "The predictions appear here: for the whole image, for the object in the box, and for both together."
NAMES = {"full": "Whole image", "fg": "Object", "bg": "Background", "fused": "Together"}


def _url(image: Image.Image, side: int) -> str:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return jpeg_url(small)


def _mask_url(mask: Tensor, side: int) -> str:
    """Return a mask as a data URL of a transparent image."""
    tint = Image.new("RGBA", (mask.shape[1], mask.shape[0]))
    tint.paste(TINT, mask=Image.fromarray(mask.numpy()))
    tint.thumbnail((side, side))
    buffer = io.BytesIO()
    tint.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _boxed(image: Image.Image, boxes: Sequence[Sequence[float]], chosen: int, title: str, mask: Tensor | None = None) -> Markup:
    """Return a picture with its boxes, placed in percent, so that they stay where they are at any width, and a mask."""
    form = Markup('<img class="mask" draggable="false" alt="" src="{}">')
    marks = [] if mask is None else [form.format(_mask_url(mask, SHOWN))]
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        place = [100 * v / side for v, side in zip((x0, y0, x1 - x0, y1 - y0), image.size * 2)]
        kind = "chosen" if i == chosen else "other"
        form = Markup('<div class="box {}" style="left:{:.3f}%;top:{:.3f}%;width:{:.3f}%;height:{:.3f}%"></div>')
        marks.append(form.format(kind, *place))
    picture = Markup('<img draggable="false" alt="{}" src="{}">').format(title, _url(image, SHOWN))
    return Markup('<div class="picture">{}{}</div>').format(picture, Markup("").join(marks))


def heading(name: str, rules: Rules) -> str:
    """Return the title of the page, with the possible classes."""
    labels = rules.labels if rules.classes is None else rules.classes
    some = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    count = f"{len(labels)} classes" if rules.classes is None else f"{len(labels)} of {len(rules.labels)} classes are possible"
    return Markup('<h1>L2R2: {}</h1><p class="soft">{}: {}. Photos stay on this machine.</p>').format(name, count, some)


def stage(photo: Photo | None, finds_object: bool = False, uses_mask: bool = False) -> str:
    """Return the photo on which a box is drawn, or what to do first."""
    if photo is None:
        return Markup('<p class="hint">{}</p>').format("Choose a photo, or drop one above.")
    boxes, mask = list(photo.boxes), None
    if photo.box is not None:
        boxes[photo.chosen : photo.chosen + 1] = [photo.box]  # it grows with what is painted
        mask = photo.kept if uses_mask else None
    drawn = _boxed(photo.image, boxes, photo.chosen, photo.name, mask)
    hint = FINDS_OBJECT if finds_object else MASK_HINT if uses_mask else HINT
    return Markup('<div class="stage">{}</div><p class="hint">{}</p>').format(drawn, hint)


def answers(look: Look | None, title: str = "Prediction") -> str:
    """Return the predictions of each branch and of their fusion as bars, and the reason; without any, what to expect."""
    if look is None:
        return Markup('<p class="hint">{}</p>').format(EMPTY)
    cards = []
    row = Markup(
        '<li><span>{}</span><span class="number">{:.0f} %</span><span class="bar"><i style="width:{:.1f}%"></i></span></li>'
    )
    for name, found in look.answers.items():
        bars = Markup("").join(row.format(one.label, 100 * one.score, 100 * one.score) for one in found)
        form = Markup('<div class="answer {}" data-label="{}"><b>{}</b><ul>{}</ul></div>')
        cards.append(form.format(name, found[0].label, f"{NAMES[name]} ({name})" if name != "fused" else NAMES[name], bars))
    form = Markup('<h3>{}</h3><div class="answers">{}</div><p class="reason">{}</p>')
    return form.format(f"{title}: {look.named}" if look.named else title, Markup("").join(cards), f"Why: {look.reason}.")


def maps(look: Look) -> str:
    """Return the parts and the saliency maps."""
    parts = [] if look.parts is None else [Picture(look.parts, "dark patches are not used")]
    found = [("Parts that the model finds", parts), ("Bright areas increase the score of the class", look.maps)]
    return Markup("").join(strip(title, shown) for title, shown in found if shown)


def elsewhere(look: Look | None, before: Look, photo: Photo) -> str:
    """Return the object on the other background, and how the predictions change."""
    if look is None or photo.box is None:
        return ""
    scale = look.image.width / before.image.width
    picture = _boxed(look.image, [[v * scale for v in photo.box]], 0, "the object on the other background")
    changes = []
    for name, found in look.answers.items():
        old, new = before.answers[name][0].label, found[0].label
        changes.append(f"{NAMES[name]}: {f'still {new}' if new == old else f'{new} instead of {old}'}")
    form = Markup('<div class="moved"><div>{}<p class="hint">{}</p></div><div><p class="changes">{}</p>{}</div></div>{}')
    return form.format(
        picture,
        MOVED if photo.mask is None else MASK_MOVED,
        ". ".join(changes) + ".",
        answers(look, "On the other background"),
        maps(look),
    )


def audit(run: AuditRun) -> str:
    """Return the verdict of an audit, its warnings, the accuracy on changed images, and a few of them."""
    result = run.result
    others = Markup("").join(Markup("<p>{}</p>").format(verdict) for verdict in list(result.verdicts.values())[:-1])
    note = Markup('<p class="note">{}</p>')
    notes = Markup("").join(note.format(f"{warning[:1].upper()}{warning[1:]}") for warning in result.warnings)
    about = Markup("").join(Markup("<p>{}</p>").format(line) for line in ABOUT_METRICS.split("\n"))
    of_image = [list(cards) for _, cards in groupby(examples(run), key=lambda card: card.note)]
    galleries = Markup("").join(gallery(cards, len(cards)) for cards in of_image)
    form = Markup(
        '<div class="audit"><p class="verdict">{}</p>{}{}<h3>The same photograph, changed</h3><p class="hint">{}</p>{}'
        "<h3>Accuracy when the image is changed</h3>{}<details><summary>What is this?</summary>{}</details></div>"
    )
    return form.format(result.verdict, others, notes, ABOUT_EXAMPLES, galleries, bars(result), about)


def picker(studio: Studio) -> str:
    """Return the backgrounds of the folder as buttons."""
    form = Markup('<button type="button" data-index="{}" title="{}"><img alt="{}" src="{}"></button>')
    buttons = (form.format(i, name, name, _url(image, THUMB)) for i, (name, image) in enumerate(studio.backgrounds))
    return Markup('<div class="picker">{}</div>').format(Markup("").join(buttons))


def notice(sentence: str) -> str:
    """Return a message about what went wrong; empty for none."""
    return Markup('<p class="notice" role="alert">{}</p>').format(sentence) if sentence else ""
