"""`l2r2 publish-kernels`."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import say


def publish_kernels(
    source: Annotated[Path, typer.Argument(help="Folder with build.toml, CARD.md and torch-ext/.")] = Path("kernels"),
    repo: Annotated[Optional[str], typer.Argument(help="Hub id: ORG/NAME.", show_default="the one in build.toml")] = None,
    push: Annotated[bool, typer.Option("--push", help="Upload; without it nothing leaves this machine.")] = False,
    to: Annotated[
        Optional[Path], typer.Option("--to", help="Write the repository into this new folder, from which it can be loaded.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Check the kernels and show what would be uploaded to the Kernel Hub; with --push upload them."""
    from l2r2_models.hub.publish_kernels import new_folder, prepare_kernels, push_kernels

    with nullcontext(new_folder(to)) if to else tempfile.TemporaryDirectory(prefix="l2r2-publish-") as folder:
        card, builds, branch = prepare_kernels(source, Path(folder), repo)
        for name in (*card.files, *builds.files):
            say(f"{(builds.folder / name).stat().st_size:>9,} bytes  {name}")
        for problem in builds.problems:
            say(f"problem: {problem}")
        if push:
            pushed = push_kernels(card, builds, branch, private=private)
            say(f"pushed to {pushed.url}, branch {branch} (commit {pushed.commit[:12]}), hashes verified")
        elif not builds.problems and to:
            say(f'written to {to}; kernels.get_local_kernel(Path("{to}")) loads it')
        elif not builds.problems:
            say(f"nothing was uploaded; pass --push to upload to {builds.repo}, branch {branch}")
    if builds.problems:
        raise typer.Exit(1)
