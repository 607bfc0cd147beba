"""`l2r2 publish`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import say
from .options import Json


def publish(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    repo: Annotated[str, typer.Argument(help="Hub id: ORG/NAME.")],
    push: Annotated[bool, typer.Option("--push", help="Upload; without it nothing leaves this machine.")] = False,
    license: Annotated[Optional[str], typer.Option(help="License of the weights, as the Hub writes it: apache-2.0, ...")] = None,
    data: Annotated[Optional[str], typer.Option(help="Name of the data set.")] = None,
    data_license: Annotated[Optional[str], typer.Option(help="License of the data set.")] = None,
    localizer: Annotated[Optional[str], typer.Option(help="Localizer for the boxes.", show_default="the checkpoint's")] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Prompt of the localizer.", show_default="the checkpoint's")] = None,
    localizer_license: Annotated[Optional[str], typer.Option(help="License of the localizer.")] = None,
    limits: Annotated[Optional[str], typer.Option(help="A sentence on what the model must not be used for.")] = None,
    metrics: Annotated[
        Optional[list[Path]],
        typer.Option(help="Output of `l2r2 evaluate --json`, besides the metrics stored in the run. Repeatable."),
    ] = None,
    without_metrics: Annotated[bool, typer.Option("--without-metrics", help="Publish without metrics.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.", show_default="main")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload with l2r2-models",
    card: Annotated[Optional[Path], typer.Option(help="Also write the model card to this file, to read it first.")] = None,
    hub_config: Annotated[
        Optional[Path], typer.Option(help="Write ARCHITECTURE.TAG.yaml, which adds a tag to `l2r2 list --pretrained`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a run and show what would be uploaded to the Hugging Face Hub; with --push upload it, in one commit."""
    from l2r2_models.errors import L2R2Error
    from l2r2_models.hub.metadata import CardMetadata
    from l2r2_models.hub.publish import CARD, prepare
    from l2r2_models.hub.publish import push as send
    from l2r2_models.io import write_text

    tag = None
    if hub_config:
        architecture, _, tag = hub_config.name.removesuffix(".yaml").partition(".")
        if not tag or hub_config.suffix != ".yaml":
            raise L2R2Error(f"{hub_config}: must be named ARCHITECTURE.TAG.yaml; choose such a name.")
    author = CardMetadata(license, data, data_license, localizer, prompt, localizer_license, limits)
    with tempfile.TemporaryDirectory(prefix="l2r2-publish-") as folder:
        package = prepare(run, repo, Path(folder), author, metrics=metrics or (), without_metrics=without_metrics, tag=tag)
        sizes = {name: (package.folder / name).stat().st_size for name in package.files}
        if card:
            write_text(card, (package.folder / CARD).read_text(encoding="utf-8"))
        if hub_config and package.hub_config:
            if package.hub_config.architecture != architecture:
                raise L2R2Error(f"{hub_config}: the name must start with {package.hub_config.architecture}; rename it.")
            write_text(hub_config, package.hub_config.to_yaml())
        pushed = None
        if push:
            pushed = send(package, private=private, revision=revision, create_pr=create_pr, message=message)
    if as_json:
        files = {name: {"sha256": digest, "bytes": sizes[name]} for name, digest in package.files.items()}
        result = {"repo": repo, "files": files, "problems": list(package.problems), "pushed": pushed and vars(pushed)}
        typer.echo(json.dumps(result))
    else:
        for name, size in sizes.items():
            say(f"{size:>13,} bytes  {name}  sha256 {package.files[name][:12]}")
        for problem in package.problems:
            say(f"problem: {problem}")
        if pushed:
            say(f"pushed to {pushed.pull_request or pushed.url} (commit {pushed.commit[:12]}), hashes verified")
        elif not package.problems:
            say(f"nothing was uploaded; pass --push to upload to {repo}")
    if package.problems:
        raise typer.Exit(1)
