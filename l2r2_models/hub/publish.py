"""Publish a checkpoint: prepare and check the files, push them in one commit, and verify the upload."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from l2r2_hub_configs import HubConfig
from safetensors import safe_open

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..checkpoints.format import CONFIG, WEIGHTS
from ..checkpoints.provenance import Source, source_of_training
from ..errors import L2R2Error
from ..io import file_sha256, read_json, write_json, write_text
from ..runs import RUN, changed_weights, read_audits, read_evaluations, record_of
from .card import hub_config, model_card
from .card_pictures import pictures_of
from .card_usage import localizer_metadata
from .metadata import CardMetadata

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

CARD = "README.md"
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
HOMES = "home|Users|root|mnt|data|tmp|work|var|opt|scratch|srv|media|Volumes|private|workspace|content|kaggle"
PATHS = re.compile(rf"(?<![\w.~-])/(?:{HOMES})/[^\s\"'`|)]+|(?<!\w)[A-Za-z]:\\[^\s\"'`|)]+|(?<!\w)~/[^\s\"'`|)]+")


@dataclass(frozen=True)
class Package:
    """The files to publish, and the problems found in them.

    Attributes:
        repo: `org/name`.
        folder: folder with these files and no others.
        files: SHA-256 of each file by its path in the repository.
        problems: error messages; a package with problems is not pushed.
        hub_config: registers the checkpoint as a tag of its architecture, or None.
    """

    repo: str
    folder: Path
    files: dict[str, str]
    problems: tuple[str, ...]
    hub_config: HubConfig | None = None


@dataclass(frozen=True)
class Pushed:
    """The result of a push: URL of the repository, commit, and URL of the pull request if one was opened."""

    url: str
    commit: str
    pull_request: str | None = None


def prepare(
    run: str | Path,
    repo: str,
    folder: Path,
    metadata: CardMetadata,
    *,
    metrics: Iterable[str | Path] = (),
    without_metrics: bool = False,
    tag: str | None = None,
) -> Package:
    """Write the files to publish into `folder` and check them.

    The files are loaded again, their logits compared with the run's, and their texts searched for secrets and local paths. What
    the author can fix is listed in `problems`, not raised.

    Args:
        run: a run folder.
        repo: Hub id, `org/name`.
        folder: an empty folder; gets the weights (hard-linked if possible), config, card and its pictures.
        metadata: author-supplied metadata.
        metrics: evaluation files besides those in the run, see `read_evaluations`.
        without_metrics: allow a card without an evaluation.
        tag: also make the hub config of this tag of the architecture.

    Raises:
        L2R2Error: when the run cannot be loaded, or `repo` is not of the form org/name.
    """
    run = Path(run)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise L2R2Error(f'"{repo}" is not a Hub id of the form org/name.')
    if not run.is_dir():
        raise L2R2Error(f"{run}: no such run.")
    checkpoint = load_checkpoint(run)
    evaluations = _without_paths(read_evaluations(run, metrics, checkpoint.digest)) or _validation(run, checkpoint)
    _link(run / WEIGHTS, folder / WEIGHTS)
    write_json(folder / CONFIG, _clean_config(read_json(run / CONFIG), checkpoint, metadata))
    audits = _without_paths(read_audits(run, checkpoint.digest))
    pictures = pictures_of(evaluations)
    write_text(folder / CARD, model_card(checkpoint, repo, metadata, evaluations, audits))
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    problems = [
        *_license_problems(metadata, source_of_training(checkpoint.training)),
        *_record_problems(run, checkpoint),
        *_content_problems(folder),
        *_logit_problems(checkpoint, load_checkpoint(folder)),
    ]
    if not evaluations and not without_metrics:
        problems.append("There are no metrics: run `l2r2 evaluate`, or pass --metrics FILE or --without-metrics.")
    files = {name: file_sha256(folder / name) for name in (CONFIG, CARD, WEIGHTS, *pictures)}
    config = hub_config(checkpoint, repo, tag, metadata, evaluations, _command(run)) if tag else None
    return Package(repo, folder, files, tuple(problems), config)


def push(
    package: Package,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
    message: str = "Upload with l2r2-models",
    replaces: str | None = None,
) -> Pushed:
    """Push in one commit, then compare the hashes on the Hub with the local ones.

    After a failure, files that were already uploaded are not sent again.

    Args:
        package: a package without problems.
        private: create the repository as private; an existing public one is refused.
        revision: branch, created if it does not exist; defaults to main.
        create_pr: open a pull request against main instead of committing to it.
        repo_type: `model` or `kernel`.
        message: commit message.
        replaces: a folder of the repository, e.g. `build/`; its files that are not in the package are deleted in the same commit.

    Returns:
        The repository, commit and pull request.

    Raises:
        L2R2Error: when the package has problems, the login is missing or may not write, the connection fails, or the hashes
            differ after the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if package.problems:
        raise L2R2Error(f"{package.repo}: not pushed. {' '.join(package.problems)}")
    if create_pr and revision not in (None, "main"):
        raise L2R2Error("A pull request is opened against main; do not pass --revision.")
    if get_token() is None:
        raise L2R2Error("You are not logged in to the Hub; run `hf auth login`.")
    api = HfApi()
    try:
        api.create_repo(package.repo, repo_type=repo_type, private=private or None, exist_ok=True)
        if private and not api.repo_info(package.repo, repo_type=repo_type).private:
            raise L2R2Error(f"{package.repo}: the repository exists and is public; make it private on its Hub page first.")
        if revision not in (None, "main"):
            api.create_branch(package.repo, branch=str(revision), repo_type=repo_type, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(path, package.folder / path) for path in package.files]
        if replaces:
            stale = set(_files_there(api, package.repo, revision, repo_type)) - set(package.files)
            operations += [CommitOperationDelete(path) for path in sorted(stale) if path.startswith(replaces)]
        commit = api.create_commit(
            package.repo, operations, commit_message=message, revision=revision, create_pr=create_pr, repo_type=repo_type
        )
        there = _files_there(api, package.repo, commit.oid, repo_type)
    except L2R2Error:
        raise
    except Exception as error:  # huggingface_hub and its HTTP client share no base class
        raise L2R2Error(f"{package.repo}: not pushed ({_reason(error)}); the same command tries again.") from error
    for path, digest in package.files.items():
        if path not in there or not _is_same(package.folder / path, digest, there[path]):
            raise L2R2Error(f"{package.repo}: the Hub's {path} differs from the local file; push it again.")
    return Pushed(str(commit.repo_url), commit.oid, commit.pr_url)


def _files_there(api: Any, repo: str, revision: str | None, repo_type: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return "no permission to write; run `hf auth login` with a token that has it"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_same(file: Path, digest: str, entry: RepoFile) -> bool:
    """Compare by SHA-256 for an LFS file, and by git's SHA-1 for any other."""
    if entry.lfs is not None:
        return entry.lfs.sha256 == digest
    content = file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


# ---- what is written ----


def _clean_config(config: dict[str, Any], checkpoint: Checkpoint, metadata: CardMetadata) -> dict[str, Any]:
    """The config without local paths, with the localizer and the license of the card."""
    ours = {**config["l2r2"], "training": _without_paths(config["l2r2"].get("training", {}))}
    ours["localizer"] = localizer_metadata(replace(checkpoint, localizer=_without_paths(checkpoint.localizer)), metadata)
    source = {k: v for k, v in config.get("pretrained_cfg", {}).items() if k != "license"}
    return {**config, "pretrained_cfg": {**source, **({"license": metadata.license} if metadata.license else {})}, "l2r2": ours}


def _without_paths(value: Any) -> Any:
    """Reduce local paths in strings to their last part."""
    if isinstance(value, Mapping):
        return {k: _without_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    if PurePosixPath(value).is_absolute():
        return PurePosixPath(value).name
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return PATHS.sub(lambda match: re.split(r"[/\\]", match[0])[-1], value)


def _command(run: Path) -> str:
    """The command that made the run, with paths reduced to their last part."""
    record = record_of(run)
    words = str(record.get("command") or "").split()
    return " ".join(_without_paths(words)) or "not recorded"


def _validation(run: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], ...]:
    """The validation metrics of `finetune` as an evaluation; empty if there were none.

    The fused row is left out if `l2r2 fuse` has replaced the fusion since.
    """
    record = record_of(run)
    metrics, files = record.get("metrics") or {}, record.get("val_files") or []
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():  # fg_accuracy, fg_macro_accuracy
        output, _, metric = key.partition("_")
        found.setdefault(output, {})[metric] = value
    named = {output: row for output, row in found.items() if "accuracy" in row}
    if "fusion_fit" in checkpoint.training:
        named.pop("fused", None)
    rows = {f"fused: {_fusion_name(record)}" if k == "fused" else k: row for k, row in named.items()}
    return ({"split": "validation (of the training)", "images": len(files), "rows": rows},) if rows and files else ()


def _fusion_name(record: Mapping[str, Any]) -> str:
    return str(record.get("recipe", {}).get("fusion", "robust"))


# ---- the checks ----


def _license_problems(metadata: CardMetadata, source: Source) -> list[str]:
    if not metadata.license:
        suggestion = f" The weights it started from are under {source.license}." if source.license else ""
        return [f"There is no license: pass --license, e.g. apache-2.0.{suggestion}"]
    if not re.fullmatch(r"[a-z0-9.-]+", metadata.license):
        return [f'"{metadata.license}" is not a license as the Hub spells it, in lowercase without spaces, e.g. apache-2.0.']
    if source.license and "-nc" in source.license.lower() and "-nc" not in metadata.license.lower():
        return [f"The weights it started from are under {source.license}, so they cannot be published under {metadata.license}."]
    return []


def _record_problems(run: Path, checkpoint: Checkpoint) -> list[str]:
    problems = []
    if not read_json(run / CONFIG).get("label_names"):
        problems.append(f"{run / CONFIG} has no label_names; train the run again.")
    elif list(checkpoint.labels) == [str(i) for i in range(len(checkpoint.labels))] and len(checkpoint.labels) > 1:
        problems.append("The labels are 0, 1, ...; train with class names, which users of the model need.")
    if (run / RUN).exists() and not isinstance(record_of(run).get("metrics"), dict):
        problems.append(f"{run}: the training has not finished; run the same `l2r2 finetune` again to continue it.")
    if changed_weights(run, checkpoint.digest):
        problems.append(f"{run / WEIGHTS} has been changed: its SHA-256 differs from {RUN}. Train the run again.")
    if not all(value.isfinite().all() for value in checkpoint.model.state_dict().values()):
        problems.append(f"{run / WEIGHTS} contains values that are not finite. Train the run again with a lower learning rate.")
    return problems


def _content_problems(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        texts = {WEIGHTS: json.dumps(file.metadata() or {})}
    texts |= {name: (folder / name).read_text(encoding="utf-8") for name in (CONFIG, CARD)}
    return text_problems(texts)


def text_problems(texts: Mapping[str, str]) -> list[str]:
    """Search texts for secrets and local paths.

    Args:
        texts: contents by file name.

    Returns:
        One message per problem; secrets are not repeated in it.

    >>> text_problems({"README.md": "trained on ~/photos"})
    ['README.md contains a local path (~/photos); remove it.']
    """
    problems = []
    for name, text in texts.items():
        text = re.sub(r"\\([\W_])", r"\1", text)  # without Markdown escapes
        if SECRETS.search(text):
            problems.append(f"{name} contains what looks like an access token or a private key; remove it.")
        if found := PATHS.search(text):
            problems.append(f"{name} contains a local path ({found[0][:60]}); remove it.")
    return problems


@torch.inference_mode()
def _logit_problems(run: Checkpoint, sent: Checkpoint) -> list[str]:
    """Check that the prepared checkpoint has the same outputs as the run, on noise, with and without boxes."""
    size = run.model.view_spec.size_of(run.model.branches[0])
    images = torch.rand(2, run.model.in_chans, size, size, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.1 * size, 0.1 * size, 0.9 * size, 0.9 * size], [torch.nan] * 4])
    outputs = [torch.cat([model(images), model(images, boxes)]) for model in (run.model, sent.model)]
    same = run.labels == sent.labels and torch.equal(*outputs) and run.model.view_spec == sent.model.view_spec
    return [] if same else ["The prepared checkpoint does not give the same outputs as the run."]
