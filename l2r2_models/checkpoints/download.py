"""Resolving the name of a checkpoint to its files: a local folder, or a Hub repository that is downloaded once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import read_json
from ..offline import cache_if_offline
from .format import CONFIG, PICKLES, WEIGHTS

logger = logging.getLogger(__name__)


def local_folder(name: str) -> Path | None:
    """Return the local folder that a checkpoint's name refers to; None if there is no such folder."""
    folder = Path(name.removeprefix("local-dir:"))
    return folder if folder.is_dir() else None


def hub_id_of(name: str) -> str:
    """Return the Hub repository that a name refers to; logged, because the name could be a mistyped path.

    Raises:
        L2R2Error: when the name is a path that does not exist.

    >>> hub_id_of("hf-hub:org/name")
    'hf-hub:org/name'
    """
    if name.startswith("hf-hub:"):
        return name
    path = Path(name.removeprefix("local-dir:"))
    is_path = name.startswith(("local-dir:", "/", ".", "~")) or len(path.parts) != 2 or path.parent.exists()
    if is_path:
        raise L2R2Error(f"{name}: no such folder; for a repository on the Hub, use hf-hub:org/name.")
    logger.info("%s: no such folder, looking for %s on the Hub", name, name.partition("@")[0])
    return name


def open_checkpoint(name: str) -> tuple[Path, dict[str, Any]]:
    """Find a checkpoint in timm's layout, downloading it if it is not a local folder.

    Returns:
        The folder, and the content of its config.json.

    Raises:
        L2R2Error: when it is not a checkpoint, has pickled weights, or cannot be reached.
    """
    folder = local_folder(name) or download(hub_id_of(name))
    if pickled := pickles_in(folder):
        raise L2R2Error(f"{folder}: contains {pickled[0]}; pickled weights are never loaded, so remove it and keep {WEIGHTS}.")
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise L2R2Error(f"{folder}: is neither a run nor a checkpoint; it has no {file}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise L2R2Error(f"{name}: is not a checkpoint in timm's layout; its {CONFIG} has no architecture.")
    return folder, config


def pickles_in(folder: Path) -> list[str]:
    """Names of the files directly in a folder that would be unpickled when loaded."""
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES and p.is_file())


def check_hash(weights: Path, digest: str, name: str) -> None:
    """Verify the SHA-256 of a cached file, which the Hub's cache uses as the name of a large file.

    Args:
        weights: the cached file.
        digest: its actual SHA-256.
        name: the checkpoint's name, for messages.

    Raises:
        L2R2Error: when it differs, because the file is damaged or was changed.
    """
    stored = weights.resolve().name
    if len(stored) == 64 and stored != digest:
        repo = name.removeprefix("hf-hub:").partition("@")[0]
        raise L2R2Error(
            f"{name}: {WEIGHTS} is damaged or was changed (its SHA-256 differs from the Hub's); "
            f"download it again with `hf download {repo} --force-download`."
        )


def download(name: str) -> Path:
    """Download config and weights of one commit, unless cached; an interrupted download is resumed.

    Returns:
        The folder in the Hub's cache.

    Raises:
        L2R2Error: when the download fails.
    """
    from huggingface_hub import hf_hub_download

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    with _reasons(name, repo, revision), cache_if_offline():
        config = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
        # pin the commit, in case somebody pushes between the two downloads
        return Path(hf_hub_download(repo, WEIGHTS, revision=config.parent.name)).parent


def download_files(name: str, patterns: Sequence[str]) -> Path:
    """Download the files of a Hub repository that match one of the patterns, unless cached.

    Returns:
        The folder in the Hub's cache.

    Raises:
        L2R2Error: when the download fails.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    with _reasons(name, repo, revision), cache_if_offline():
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(patterns)))


@contextmanager
def _reasons(name: str, repo: str, revision: str) -> Iterator[None]:
    """Turn the exceptions of a download into one sentence."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise L2R2Error(f"{name}: no such folder, and not a Hub id of the form org/name.") from None
    except Exception as error:  # exceptions of huggingface_hub and its HTTP client have no common base
        raise L2R2Error(f"{name}: {_why_not(error, name, repo, revision)}.") from error


def _why_not(error: Exception, name: str, repo: str, revision: str) -> str:
    """Explain a download error and what to do about it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if "/" not in repo:
            return "no such folder (a Hub id has the form org/name)"
        return f"no such folder, and the Hub cannot be reached; download it once with `hf download {repo}`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; request access on its Hub page, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder, and {repo} is not on the Hub, or is private; if it is yours, run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on the Hub has no revision {revision}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} on the Hub is not a checkpoint; it needs {CONFIG} and {WEIGHTS}"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub refused the request ({str(error).splitlines()[0]})"
    return f"the download stopped ({' '.join(str(error).split())[:200]}); run the same command again to resume it"
