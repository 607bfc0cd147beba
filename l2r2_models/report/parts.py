"""The parts of an iFAM model in the report of an evaluation: their size and position."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator

from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from ..evaluate.evaluator import Judged
from ..evaluate.logits import Progress
from ..evaluate.parts import FoundParts, find_parts
from .html import Cell, Picture, Section, gallery, percent, table

MOST, SHOWN = 128, 12  # number of images used for the metrics, and of those that are drawn
SIDE = 256  # side of a drawn image in pixels
TINT, DARK = 0.5, 0.6  # opacity of a part's color on its patches, and of black on dropped patches


def parts_section(judged: Judged, progress: Progress) -> list[Section]:
    """Make the section on the parts of an iFAM model.

    Args:
        judged: an evaluated run, with its predictions.
        progress: wraps the batches while the parts are computed.

    Returns:
        One section, or none for other models.
    """
    model = judged.checkpoint.model
    if not model.finds_object:
        return []
    found = find_parts(judged.checkpoint, judged.data.table, MOST, progress)
    kept = 100 * found.keep.float().mean().item()
    text = (
        f"Stage 1 finds {found.num_parts} parts without boxes or masks; stage 2 only sees their patches, here {kept:.0f} % of "
        f"all (on {len(found.rows):,} images, evenly sampled). --drop-parts takes these part indices."
    )
    if empty := int((~found.keep.any((1, 2))).sum()):
        text += f"\nIn {empty:,} of them no patch is kept, so the prediction is that of stage 1."
    shares, occurrence = found.shares(), found.occurrence()
    names: list[Cell] = [_swatch(k, found.num_parts) for k in range(found.num_parts)]
    rows = [[name, percent(s), percent(o)] for name, s, o in zip([*names, "background"], shares, occurrence)]
    blocks = [table(["part", "share of patches", "share of images"], rows, caption="in %")]
    if agreement := found.agreement():
        titles = {"iou": "IoU", "iou_of_everything": "IoU of keeping all", "object_kept": "object kept"}
        titles["background_kept"] = "background kept"
        values: list[Cell] = ["stage 2", *(percent(agreement[name]) for name in titles)]
        caption = f"kept patches against the true masks of {int(found.has_mask.sum()):,} images, means in %"
        blocks.append(table(["", *titles.values()], [values], caption=caption))
    text += "\nIn the pictures, patches that stage 2 does not see are dark."
    return [Section("Parts", text, [*blocks, gallery(_pictures(judged, found), SHOWN)])]


def _color(part: int, parts: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(part / parts, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _swatch(part: int, parts: int) -> Markup:
    form = Markup('<span style="background:rgb{};padding:0 .6em;margin-right:.4em"></span>{}')
    return form.format(str(_color(part, parts)), part)


def _pictures(judged: Judged, found: FoundParts) -> Iterator[Picture]:
    names, count = judged.data.table.names(), min(SHOWN, len(found.rows))
    for n in (k * len(found.rows) // count for k in range(count)):
        i = found.rows[n]
        truth = int(judged.data.labels[i])
        predictions = []
        for output in judged.own if judged.data.has_fg[i] else judged.own[-1:]:
            predicted = int(judged.outputs[output][i].argmax())
            predictions.append((output.split(":")[0], judged.labels[predicted], predicted == truth))
        yield Picture(draw_parts(found, n), judged.labels[truth], None, predictions, names[i])


def draw_parts(found: FoundParts, n: int) -> Image.Image:
    """Draw the n-th image with its parts tinted and numbered, and dropped patches dark."""
    image = Image.fromarray(found.views[n].permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    part, keep = found.part[n], found.keep[n]
    rows, columns = part.shape
    over = Image.new("RGBA", (columns, rows))
    for y in range(rows):
        for x in range(columns):
            tint = (*_color(int(part[y, x]), found.num_parts), round(255 * TINT))
            over.putpixel((x, y), tint if keep[y, x] else (0, 0, 0, round(255 * DARK)))
    over = over.resize(image.size, Image.Resampling.NEAREST)
    image.paste(over, mask=over)
    draw = ImageDraw.Draw(image)
    for k in range(found.num_parts):
        at = (keep & (part == k)).nonzero().float()
        if len(at):
            middle = at[(at - at.mean(0)).square().sum(1).argmin()]  # a patch of the part, even if the part is a ring
            place = (float(middle[1] + 0.5) * SIDE / columns, float(middle[0] + 0.5) * SIDE / rows)
            draw.text(place, str(k), "white", ImageFont.load_default(18), "mm", stroke_width=2, stroke_fill="black")
    return image
