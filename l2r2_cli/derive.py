"""`l2r2 derive` and `l2r2 convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import names, say


def derive(
    source: Annotated[str, typer.Argument(help="Any timm classifier as timm:NAME, with or without a tag.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")],
    labels: Annotated[Optional[Path], typer.Option(help="Class names, one per line.", show_default="ImageNet's")] = None,
    branches: Annotated[Optional[str], typer.Option(help="Any of full,fg,bg.", show_default="full,fg")] = None,
    fusion: Annotated[str, typer.Option(help="Fusion: average, max_confidence or robust.")] = "robust",
) -> None:
    """Make an L2R2 run from a timm classifier, without training."""
    from l2r2_models.checkpoints.convert import derive as run
    from l2r2_models.errors import L2R2Error
    from l2r2_models.io import read_text

    if not source.startswith("timm:"):
        raise L2R2Error(f'"{source}" is not a timm model; write timm:NAME, e.g. timm:convnextv2_tiny.')
    listed = None
    if labels:
        listed = [line.strip() for line in read_text(labels).splitlines() if line.strip()]
    _, named = run(source.removeprefix("timm:"), out, labels=listed, branches=names(branches) or ("full", "fg"), fusion=fusion)
    say(f"wrote {out}: {len(named)} classes; not trained, so the fg head has never seen a crop")


def convert(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; for a split, the folder of one run per branch.")],
    run: Annotated[Optional[str], typer.Argument(help="Run of independent networks (finetune --no-shared) to split.")] = None,
    full: Annotated[Optional[str], typer.Option(help="Network for the whole image: a run or a timm checkpoint.")] = None,
    fg: Annotated[Optional[str], typer.Option(help="Network for the object.")] = None,
    bg: Annotated[Optional[str], typer.Option(help="Network for the background.")] = None,
    fusion: Annotated[str, typer.Option(help="Fusion: average, max_confidence or robust.")] = "robust",
) -> None:
    """Join independently trained networks into one run (--full A --fg B), or split such a run (RUN)."""
    from l2r2_models.checkpoints.convert import join, split

    parts: dict[str, str | Path] = {b: s for b, s in (("full", full), ("fg", fg), ("bg", bg)) if s}
    if bool(run) == bool(parts) or len(parts) == 1:
        raise typer.BadParameter("pass a RUN to split, or two or three of --full, --fg and --bg to join")
    if run:
        for branch, folder in split(run, out).items():
            say(f"wrote {folder}: the branch {branch}")
        return
    join(parts, out, fusion=fusion)
    say(f"wrote {out}: {' and '.join(parts)}, independent networks, fusion {fusion}; fit it with `l2r2 fuse`")
