"""A fitted fusion in a file of its own, for models whose weights are not ours to change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import L2R2Error
from ..fusion import Fusion, create_fusion
from ..io import check_readable, write_atomic


def write_fusion(file: Path, fusion: Fusion, branches: Sequence[str], labels: Sequence[str]) -> None:
    """Write a fusion: its buffers, and as metadata its config, the branches of its model and the class names.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    about = {"fusion": json.dumps(fusion.config()), "branches": json.dumps([*branches]), "labels": json.dumps([*labels])}
    tensors = {name: value.detach().cpu().contiguous() for name, value in fusion.state_dict().items()}
    write_atomic(file, lambda path: save_file(tensors, path, about))


def read_fusion(file: Path, labels: Sequence[str]) -> Fusion:
    """Read a fusion that was fitted for these class names.

    Raises:
        L2R2Error: when the file is not a fusion, or was fitted for other classes.
    """
    check_readable(file)
    try:
        with safe_open(file, "pt") as stored:
            about = {name: json.loads(text) for name, text in (stored.metadata() or {}).items()}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a dict)
        fitted_for, config, branches = about["labels"], about["fusion"], about["branches"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise L2R2Error(f"{file}: is not a fusion written by `l2r2 fuse -o`; fit it again.") from error
    if list(labels) != fitted_for:
        raise L2R2Error(f"{file}: was fitted for other classes, or another order of them; fit it again for these.")
    fusion = create_fusion(config, branches, len(labels)).eval()
    try:
        fusion.load_state_dict(tensors)
    except RuntimeError as error:
        raise L2R2Error(f"{file}: is damaged; fit it again.") from error
    return fusion
