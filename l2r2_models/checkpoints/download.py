"""From the name of a checkpoint to its files: a folder on this machine, or a repository on the Hub, downloaded once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import read_json
from .format import CONFIG, PICKLES, WEIGHTS

logger = logging.getLogger(__name__)


def local_folder(name: str) -> Path | None:
    """The folder that a name of a checkpoint stands for; None where it is to be looked for on the Hub."""
    folder = Path(name.removeprefix("local-dir:"))
    return folder if folder.is_dir() else None


def hub_id_of(name: str) -> str:
    """The Hub repository that a name stands for which is no folder here; it is logged where it might be a mistyped path.

    Raises:
        L2R2Error: it is a path that does not exist.
    """
    if name.startswith("hf-hub:"):
        return name
    path = Path(name.removeprefix("local-dir:"))
    is_path = name.startswith(("local-dir:", "/", ".", "~")) or len(path.parts) != 2 or path.parent.exists()
    if is_path:
        raise L2R2Error(f"{name}: no such folder; a repository on the Hub is hf-hub:org/name.")
    logger.info("%s: no such folder here, asking the Hub for %s", name, name.partition("@")[0])
    return name


def open_checkpoint(name: str) -> tuple[Path, dict[str, Any]]:
    """Folder and config.json of a checkpoint in timm's layout, downloaded where it is not a folder.

    Raises:
        L2R2Error: no checkpoint, with pickled weights, or not reachable.
    """
    folder = local_folder(name) or download(hub_id_of(name))
    if pickled := pickles_in(folder):
        raise L2R2Error(f"{folder}: holds {pickled[0]}; pickled weights are never loaded, only {WEIGHTS}. Remove it.")
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise L2R2Error(f"{folder}: is neither a run nor a checkpoint, it has no {file}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise L2R2Error(f"{name}: is not a checkpoint in timm's layout, its {CONFIG} names no architecture.")
    return folder, config


def pickles_in(folder: Path) -> list[str]:
    """Names of the files of a folder (not of folders in it) that would be unpickled by whoever loads them."""
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES and p.is_file())


def check_hash(weights: Path, digest: str, name: str) -> None:
    """A file of the Hub's large storage is kept under its SHA-256 in the cache; one that differs came broken or was changed.

    Raises:
        L2R2Error: it differs.
    """
    stored = weights.resolve().name
    if len(stored) == 64 and stored != digest:
        repo = name.removeprefix("hf-hub:").partition("@")[0]
        raise L2R2Error(
            f"{name}: {WEIGHTS} is not what the Hub announced (its SHA-256 differs); "
            f"get it again with `hf download {repo} --force-download`."
        )


def download(name: str) -> Path:
    """The cached folder with config and weights of one commit: what is cached is not downloaded, what broke off continues."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    try:
        config = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
        # of the same commit, even if somebody pushes between the two downloads
        return Path(hf_hub_download(repo, WEIGHTS, revision=config.parent.name)).parent
    except HFValidationError:
        raise L2R2Error(f"{name}: no such folder, and not a Hub id of the form org/name.") from None
    except Exception as error:  # those of huggingface_hub and of the HTTP client under it have no common base
        raise L2R2Error(f"{name}: {_why_not(error, name, repo, revision)}.") from error


def _why_not(error: Exception, name: str, repo: str, revision: str) -> str:
    """What to do about an error of a download, in words."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if "/" not in repo:
            return "no such folder (a Hub id has the form org/name)"
        return f"no such folder, and the Hub cannot be reached; download it once with `hf download {repo}`"
    if isinstance(error, errors.GatedRepoError):
        return f"access to {repo} must be asked for on its Hub page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder, and the Hub has no {repo}, or it is private: log in with `hf auth login` if it is yours"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub's {repo} has no revision {revision}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the Hub's {repo} has no {CONFIG} with a {WEIGHTS}, so it holds no checkpoint"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub does not serve it ({str(error).splitlines()[0]})"
    return f"the download stopped ({' '.join(str(error).split())[:200]}); the same call continues it"
