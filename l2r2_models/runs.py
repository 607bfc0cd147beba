"""The layout of a run folder: its record, checkpoints to resume from, and evaluations. Only this module knows the layout."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import distributed as processes
from .errors import L2R2Error
from .io import check_readable, file_sha256, is_temporary, read_json, write_json
from .versions import version_of

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # a run is a checkpoint in timm's layout
RUN, RECIPE, CHECKPOINTS, LOGS = "run.json", "recipe.yaml", "checkpoints", "logs"
LOGITS, EVALUATIONS, AUDITS = "logits", "evaluations", "audit"
FREE = ("workers",)  # recipe keys that do not affect the result, so a run may be resumed with other values
KINDS = {  # fields of the record that other modules read
    **dict.fromkeys(("train_files", "init_files", "val_files", "fit_files", "notes"), "names"),
    "metrics": "numbers",
    "recipe": "mapping",
    "resolved": "mapping",
}


def check_place(out: Path, data: Path, settings: dict[str, Any], overwrite: bool, defaults: Mapping[str, Any]) -> None:
    """Check that `out` is new, empty, or the same run; with `overwrite`, any run.

    Args:
        out: the run's folder.
        data: the data set's folder, which must not lie inside `out`.
        settings: what the run is made from: `recipe`, `data`, `init` and `jtt`.
        overwrite: accept a run that was made with other settings.
        defaults: values of recipe keys that a run does not name because it is older than they are.

    Raises:
        L2R2Error: when `out` is something else, or a run with other settings.
    """
    if not out.exists() or (out.is_dir() and all(is_temporary(path, RUN) for path in out.iterdir())):
        return  # new, empty, or left by a process that was killed while it wrote the run's first file
    if not (out / RUN).is_file() or data.resolve().is_relative_to(out.resolve()):
        raise L2R2Error(f"{out}: already exists and is not a run of `l2r2 finetune`; choose another -o.")
    if overwrite:
        return
    old = read_json(out / RUN)
    recipe, old_data = (old.get(k) if isinstance(old, dict) else None for k in ("recipe", "data"))
    if not isinstance(recipe, dict) or not isinstance(old_data, dict):
        raise L2R2Error(f"{out / RUN}: is damaged; start the run again with --overwrite.")
    given = {**defaults, **recipe}
    changed = [k for k, v in settings["recipe"].items() if given.get(k) != v and k not in FREE]
    changed += ["data set"] if any(old_data.get(k) != v for k, v in settings["data"].items()) else []
    changed += [k for k in ("init", "jtt") if old.get(k) != settings.get(k) and k not in changed]
    if changed:
        raise L2R2Error(f"{out}: contains a run with a different {', '.join(changed)}; choose another -o, or use --overwrite.")


def record_of(run: Path | str) -> dict[str, Any]:
    """Read the record that `finetune` wrote for a run; empty for a Hub id, or a folder without one.

    Raises:
        L2R2Error: when the record is damaged.
    """
    file = Path(run) / RUN
    record = read_json(file) if file.exists() else {}
    if not isinstance(record, dict) or not all(_fits(record[key], kind) for key, kind in KINDS.items() if key in record):
        raise L2R2Error(f"{file}: is damaged; train the run again.")
    return record


def _fits(value: Any, kind: str) -> bool:
    """Whether a field of the record is a list of names, a mapping to numbers, or any mapping."""
    if kind == "names":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    numbers = kind != "numbers" or (isinstance(value, dict) and all(type(number) in (int, float) for number in value.values()))
    return isinstance(value, dict) and numbers


def finished(out: Path) -> dict[str, Any] | None:
    """Return the record of a finished run, which is written last; None if the run is not finished.

    Raises:
        L2R2Error: when the record is damaged.
    """
    if not all((out / name).is_file() for name in (RUN, CONFIG, WEIGHTS)):
        return None
    record = record_of(out)
    data = record.get("data")
    complete = isinstance(record.get("metrics"), dict) and isinstance(data, dict) and isinstance(data.get("with_box"), int)
    return record if complete else None


def last_checkpoint(folder: Path) -> str | None:
    """Path of the newest complete checkpoint, or None; incomplete ones that a killed process left are removed."""
    numbered = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        try:
            read_json(checkpoint / "trainer_state.json")  # written last
            check_readable(checkpoint / WEIGHTS, most=None)
            with safe_open(checkpoint / WEIGHTS, "pt"):
                return str(checkpoint)
        except (OSError, ValueError, SafetensorError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def surroundings() -> dict[str, Any]:
    """Return the environment of a run: command line, package versions, device, threads and processes."""
    names = ("l2r2-models", "torch", "torchvision", "timm", "transformers")
    found = {"python": platform.python_version(), **{name: version_of(name) for name in names}}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "command": shlex.join(sys.argv),
        "versions": found,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": processes.world(),
    }


def changed_weights(folder: Path, digest: str) -> bool:
    """Whether the SHA-256 `digest` of a run's weights differs from what the run recorded.

    Raises:
        L2R2Error: when the record cannot be read.
    """
    record = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    known = record.get("weights_sha256", digest) if isinstance(record, dict) else digest
    return digest not in (known if isinstance(known, list) else [known])


def store_evaluation(run: str | Path, data: str | Path, digest: str, evaluation: dict[str, Any]) -> Path:
    """Store an evaluation in the run's folder, replacing an earlier one of the same data set and split.

    Args:
        run: the run's folder.
        data: the data set's folder; its name is stored, not its path.
        digest: SHA-256 of the evaluated weights.
        evaluation: `Evaluation.to_dict()`.

    Returns:
        The path of the stored file.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    return _store(Path(run) / EVALUATIONS, data, digest, evaluation)


def store_audit(run: str | Path, data: str | Path, audit: dict[str, Any]) -> Path:
    """Store an audit, `Audit.to_dict()`, in the run's folder; arguments and errors as for `store_evaluation`.

    A stored audit of the same weights and more images is kept instead.
    """
    digest, file = file_sha256(Path(run) / WEIGHTS), _file_of(Path(run) / AUDITS, data, audit)
    if file.exists():
        with suppress(L2R2Error):  # a damaged file is replaced
            before = read_json(file)
            if _is_audit(before) and before.get("weights") == digest and before["images"] > audit["images"]:
                return file
    return _store(Path(run) / AUDITS, data, digest, audit)


def _store(folder: Path, data: str | Path, digest: str, result: dict[str, Any]) -> Path:
    file = _file_of(folder, data, result)
    write_json(file, {"data": Path(data).resolve().name, "weights": digest, **result})
    return file


def _file_of(folder: Path, data: str | Path, result: Mapping[str, Any]) -> Path:
    name = f"{Path(data).resolve().name}.{result['split']}"
    return folder / f"{''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)}.json"


def _is_audit(audit: Any) -> bool:
    of_outputs = audit.get("answers") if isinstance(audit, dict) and {"data", "split", "images"} <= audit.keys() else None
    return isinstance(of_outputs, dict) and all(isinstance(o, dict) and "accuracy" in o for o in of_outputs.values())


def read_audits(run: str | Path, digest: str) -> tuple[dict[str, Any], ...]:
    """Read the audits stored in a run; those of other weights are skipped.

    Raises:
        L2R2Error: when a file is not an audit.
    """
    found = []
    for file in sorted((Path(run) / AUDITS).glob("*.json")):
        audit = read_json(file)
        if not _is_audit(audit):
            raise L2R2Error(f"{file}: is not an audit; remove it.")
        found += [audit] if audit.get("weights") == digest else []
    return tuple(found)


def read_evaluations(run: str | Path, more: Iterable[str | Path] = (), digest: str | None = None) -> tuple[dict[str, Any], ...]:
    """Read the evaluations stored in a run, and those in other files.

    Args:
        run: the run's folder.
        more: files with the output of `l2r2 evaluate --json`.
        digest: SHA-256 of the weights; stored evaluations of other weights (from before `l2r2 fuse`, or of an overwritten run)
            are skipped.

    Raises:
        L2R2Error: when a file is not an evaluation.
    """
    stored = [_check_evaluation(read_json(file), file) for file in sorted((Path(run) / EVALUATIONS).glob("*.json"))]
    own = [e for e in stored if digest is None or e.get("weights", digest) == digest]
    found = list(own)
    for file in more:
        given = read_json(file)
        found += [_check_evaluation(one, Path(file)) for one in (given if isinstance(given, list) and given else [given])]
    return tuple(found)


def _check_evaluation(data: Any, file: Path) -> dict[str, Any]:
    rows: Any = data.get("rows") if isinstance(data, dict) else None
    fits = isinstance(rows, dict) and rows and isinstance(data.get("split"), str) and isinstance(data.get("images"), int)
    if not fits:
        raise L2R2Error(f"{file}: is not the output of `l2r2 evaluate --json`; pass such a file.")
    for name, row in rows.items():
        accuracy = row.get("accuracy") if isinstance(row, dict) else None
        if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
            raise L2R2Error(f"{file}: the row {name} has no accuracy between 0 and 1.")
    evaluation: dict[str, Any] = data
    return evaluation
