"""Class prototypes, the text embeddings that classify images, computed once and stored in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import L2R2Error
from ..io import check_readable, write_atomic
from .prompts import Prompts
from .towers import VisionLanguageModel

logger = logging.getLogger(__name__)
BATCH = 256  # texts per forward pass
TELL = 4096  # prompts after which to log the progress


def cache_folder() -> Path:
    """The folder of stored prototypes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2r2" / "prototypes"


def prototypes_of(model: VisionLanguageModel, prompts: Prompts) -> Tensor:
    """Return the prototypes `[classes, D]` of length 1, from the cache if they are stored there.

    A prototype is the mean of the normalized embeddings of the prompts of a class, normalized again
    (`docs/method.md`, section 10). At most `BATCH` texts are encoded at once, so that memory does not grow with their number.

    Args:
        model: the model; its text tower is only used if the prototypes are not stored.
        prompts: names and templates of the classes.

    Raises:
        L2R2Error: when an embedding is not finite.
    """
    key = json.dumps([model.digest, prompts.names, prompts.templates])
    file = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if (stored := _read(file, key, len(prompts.labels))) is not None:
        return stored
    found = _compute(model, prompts)
    try:
        write_atomic(file, lambda path: save_file({"prototypes": found}, path, {"key": key}))
    except L2R2Error as error:  # it is only a cache
        logger.warning("%s", error)
    return found


def _compute(model: VisionLanguageModel, prompts: Prompts) -> Tensor:
    count = len(prompts.templates) * sum(map(len, prompts.names))
    sums: Tensor | None = None
    remaining = iter(prompts)
    for start in range(0, count, BATCH):
        classes, texts = zip(*islice(remaining, BATCH))
        embeddings = normalize(model.encode(texts), dim=-1)  # [n, D]
        if sums is None:
            sums = torch.zeros(len(prompts.labels), embeddings.shape[1])
        sums.index_add_(0, torch.tensor(classes), embeddings)
        if start and start % TELL == 0:
            logger.info("encoded %d of %d prompts", start, count)
    assert sums is not None  # there are at least two classes
    if not sums.isfinite().all():
        raise L2R2Error(f"{prompts.source}: an embedding of the text tower is not finite; the weights are damaged.")
    return normalize(sums, dim=-1)


def _read(file: Path, key: str, classes: int) -> Tensor | None:
    """Read the stored prototypes; None if they are missing or damaged, so that they are computed again."""
    try:
        check_readable(file, most=None)
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            found: Tensor = stored.get_tensor("prototypes")
    except (SafetensorError, OSError, L2R2Error):
        return None
    return found if found.ndim == 2 and len(found) == classes and bool(found.isfinite().all()) else None
