"""`l2r2 import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import say, track


def import_set(
    name: Annotated[
        str,
        typer.Argument(
            metavar="SET",
            help="waterbirds, in9, spawrious-o2o-hard (or m2m; easy, medium), counteranimal, metashift, urbancars, "
            "hard-imagenet, cub, iwildcam, fod-a or eth80.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder with the unpacked archive.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder; rerun to resume.")],
    extra: Annotated[
        Optional[Path],
        typer.Option(
            "--with", help="Second folder: CUB for waterbirds, a training archive for in9, ImageNet's images for hard-imagenet."
        ),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the images instead of hard-linking them.")] = False,
) -> None:
    """Convert a published benchmark that you downloaded to a data set with splits, backgrounds, and boxes or masks."""
    from l2r2_models.data.published import import_published

    result = import_published(
        name, folder, out, extra=extra, copy=copy, progress=lambda items, total: track(items, total, "importing")
    )
    say(f"wrote {out}: " + ", ".join(f"{split} {count}" for split, count in result.splits.items()))
    if result.linked:
        say(f"{result.linked} files are hard links; to edit images, import with --copy")
    if result.copied:
        say(f"{result.copied} files are copies")
