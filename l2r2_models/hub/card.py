"""The model card of a published checkpoint: description, usage, evaluation and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from l2r2_hub_configs import HubConfig

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.provenance import Source, source_of_training
from ..errors import L2R2Error
from ..evaluate.fuse import BEST
from ..models.hub_configs import LOCALIZER
from .card_pictures import audit_part, is_own, pictures_part
from .card_usage import localizer_metadata, localizer_part, takes_boxes, usage
from .markdown import code, plain
from .metadata import CardMetadata

BRANCH_WORDS = {"full": "the whole image", "fg": "the object, cut out of it", "bg": "the image without the object"}
FIT_WORDS = {
    "plain": "",
    "swapped": ", each object on the backgrounds of three other images",
    "both": ", half of them unchanged images, half objects on the backgrounds of three other images each",
}
COLUMNS = {
    "accuracy": "accuracy",
    "macro_accuracy": "macro accuracy",
    "worst_group": "worst group",
    "ece": "ECE",
    "with_box": "with an object found",
    "without_box": "without",
}


def model_card(
    checkpoint: Checkpoint,
    repo: str,
    metadata: CardMetadata,
    evaluations: Sequence[Mapping[str, Any]],
    audits: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the README of a Hub repository: metadata with the model index, and the text, which shows `pictures_of`.

    Args:
        checkpoint: the published checkpoint.
        repo: `org/name`.
        metadata: author-supplied metadata.
        evaluations: see `read_evaluations`.
        audits: see `read_audits`.

    Returns:
        Markdown with YAML front matter.
    """
    from huggingface_hub import ModelCardData

    source = source_of_training(checkpoint.training)
    data = ModelCardData(
        library_name="l2r2_models",
        pipeline_tag="image-classification",
        license=metadata.license,
        base_model=source.hub_id,
        tags=["image-classification", "timm", "l2r2", "robustness"],
        model_name=repo.split("/")[-1],
        eval_results=[result for e in evaluations for result in _eval_results(e, metadata)] or None,
    )
    parts = [
        _head(checkpoint, repo),
        _details(checkpoint, source, metadata),
        usage(checkpoint, repo, metadata),
        localizer_part(checkpoint, metadata),
        _training(checkpoint, metadata),
        _metrics(evaluations, metadata),
        audit_part(audits),
        _limits(checkpoint, metadata),
        CITATION,
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(filter(None, parts))


def hub_config(
    checkpoint: Checkpoint, repo: str, tag: str, metadata: CardMetadata, evaluations: Sequence[Mapping[str, Any]], made_by: str
) -> HubConfig:
    """Make the hub config that registers a published checkpoint as a pretrained tag of its architecture.

    Args:
        checkpoint, repo, metadata, evaluations: see `model_card`.
        tag: name of the tag, for `timm.create_model("ARCHITECTURE.TAG", pretrained=True)`.
        made_by: the command that made the checkpoint.

    Raises:
        L2R2Error: when the architecture is the generic `l2r2`, which has no tags.
    """
    model = checkpoint.model
    architecture = model.pretrained_cfg["architecture"]
    if architecture == "l2r2":
        raise L2R2Error(
            f"{checkpoint.name}: the generic model l2r2 has no tags; leave the tag out, or train a model that `l2r2 list` shows."
        )
    localizer = localizer_metadata(checkpoint, metadata)
    results = [
        {
            "dataset": r.dataset_name,
            "split": r.dataset_split,
            "output": r.metric_name.partition("(")[2].rstrip(")"),
            "metric": r.metric_type,
            "value": r.metric_value,
        }
        for evaluation in evaluations
        for r in _eval_results(evaluation, metadata)
    ]
    return HubConfig(
        architecture=architecture,
        tag=tag,
        default=False,
        hub_id=repo,
        license=metadata.license,
        source=source_of_training(checkpoint.training).name or "random weights",
        labels=metadata.data,
        parameters=sum(p.numel() for p in model.parameters()),
        input_size=model.view_spec.size_of(model.branches[0]),
        top1=None,
        made_by=made_by,
        label_names=list(checkpoint.labels),
        model_args=model.arguments(),
        localizer={k: str(v) for k, v in localizer.items() if k in LOCALIZER} or None,
        metrics=results or None,
    )


def _eval_results(evaluation: Mapping[str, Any], metadata: CardMetadata) -> list[Any]:
    from huggingface_hub import EvalResult

    name = metadata.data or evaluation.get("data") or "unnamed"
    rows = {row: values for row, values in evaluation["rows"].items() if is_own(row)}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name.lower().replace(" ", "-"),
            dataset_name=name,
            dataset_split=evaluation["split"],
            metric_type=metric,
            metric_name=f"{COLUMNS[metric]} ({row.partition(':')[0]})",
            metric_value=round(values[metric], 4),
        )
        for row, values in rows.items()
        for metric in ("accuracy", "macro_accuracy")
        if values.get(metric) is not None
    ]


def _head(checkpoint: Checkpoint, repo: str) -> str:
    model = checkpoint.model
    words = {**BRANCH_WORDS, "fg": model.view_spec.fg.words}
    inputs = " and ".join(f"**{b}** ({words[b]})" for b in model.branches)
    if len(model.branches) > 1 and "fg" in model.branches:
        inputs += (
            " and combines both, so that a misleading background matters less; if no object is found, it uses the whole image"
        )
    return f"""# {repo.split("/")[-1]}

An image classifier for {len(checkpoint.labels)} classes. It looks at {inputs}. Made with
[timm](https://github.com/huggingface/pytorch-image-models) and l2r2-models after *Bringing the Context Back into Object
Recognition, Robustly* ([arXiv 2411.15933](https://arxiv.org/abs/2411.15933)).
"""


def _details(checkpoint: Checkpoint, source: Source, metadata: CardMetadata) -> str:
    model, spec = checkpoint.model, checkpoint.model.view_spec
    fusion = model.fusion.config()
    settings = ", ".join(f"{k} {v}" for k, v in fusion.items() if k not in ("name", "batch"))
    start = "random weights"
    if source.name:
        address = f"https://huggingface.co/{quote(source.hub_id or '')}"
        where = f" ([{plain(source.hub_id)}]({address}))" if source.hub_id else ""
        whose = "timm's " if source.hub_id and source.hub_id != source.name else ""
        start = f"{whose}{code(source.name)}{where}, license: {plain(source.license or 'not stated, see its page')}"
    rows = {
        "architecture": f"{code(model.pretrained_cfg['architecture'])}, backbone {code(model.backbone_name)}, "
        + ("shared by the branches" if model.shared else "one per branch"),
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "views": f"{spec.size_words(model.branches)}{_fg_views(checkpoint)}",
        "branches": ", ".join(model.branches),
        "fusion": f"`{fusion['name']}`" + (f" ({settings})" if settings else ""),
        "started from": start,
        "license of these weights": plain(metadata.license or "not stated"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""## Details

| | |
|---|---|
{table}

Classes: {_label_list(checkpoint.labels)}
"""


def _label_list(labels: Sequence[str]) -> str:
    shown = ", ".join(code(label) for label in labels[:30])
    return shown if len(labels) <= 30 else f"{shown}, ... ({len(labels)} in total, see `label_names` in config.json)"


def _fg_views(checkpoint: Checkpoint) -> str:
    spec = checkpoint.model.view_spec
    margin = f", margin {spec.margin:g}" if spec.fg.crops else ""
    return f"; fg: {spec.fg_mode}{margin}" if "fg" in checkpoint.model.branches else ""


def _training(checkpoint: Checkpoint, metadata: CardMetadata) -> str:
    training = checkpoint.training
    recipe, data = training.get("recipe", {}), training.get("data", {})
    lines = []
    if metadata.data:
        license = f", license: {plain(metadata.data_license)}" if metadata.data_license else ""
        lines.append(f"Data: {plain(metadata.data)}{license}.")
    if "images" in data:
        with_box = f", {plain(data['with_box'])} of them with a usable box or mask" if "with_box" in data else ""
        lines.append(f"{plain(data['images'])} training images{with_box}.")
    if training.get("derived_from"):
        lines.append("Not trained: backbone and heads are those of the source; fg was not trained on crops.")
    if fit := training.get("fusion_fit"):
        lines.append(_fit_sentence(fit, checkpoint.model.fusion.count()))
    keys = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "box_jitter", "seed", "box_threshold")
    settings = "\n".join(f"| {k} | {plain(recipe[k])} |" for k in keys if k in recipe)
    table = f"\n\n| setting | value |\n|---|---|\n{settings}" if settings else ""
    return "## Training\n\n" + ("\n".join(lines) or "Not recorded.") + table + "\n"


def _fit_sentence(fit: Mapping[str, Any], parameters: int) -> str:
    """Describe what the fusion was chosen and fitted on, in number of views, not images."""
    chosen = fit.get("method") == BEST
    if not chosen and not parameters:
        return "The fusion was set by hand and has no fitted parameters."
    done = " and ".join(word for word, holds in (("chosen", chosen), ("fitted", parameters > 0)) if holds)
    together = f", those of the same {plain(fit['group'])} kept together" if chosen and fit.get("group") else ""
    backgrounds = FIT_WORDS.get(str(fit.get("backgrounds", "plain")), "")
    rows = f"{plain(fit.get('rows'))} views of the split {plain(fit.get('split'))}"
    return f"The fusion was {done} on {rows}{backgrounds}{together}."


def _metrics(evaluations: Sequence[Mapping[str, Any]], metadata: CardMetadata) -> str:
    if not evaluations:
        return "## Evaluation\n\nNot evaluated.\n"
    pictures = pictures_part(evaluations)
    return "## Evaluation\n\n" + "\n".join([*filter(None, [pictures]), *(_metrics_of(e, metadata) for e in evaluations)])


def _metrics_of(evaluation: Mapping[str, Any], metadata: CardMetadata) -> str:
    rows = evaluation["rows"]
    shown = [c for c in COLUMNS if any(row.get(c) is not None for row in rows.values())]
    data = plain(evaluation.get("data") or metadata.data or "data")
    title = f"{data}, split {plain(evaluation['split'])}: {evaluation['images']} images"
    if evaluation.get("with_object") is not None:
        title += f", {evaluation['with_object']} with an object found"
    title += "; in %, with 95 % confidence intervals if available"
    lines = [f"**{title}**", "", "| | " + " | ".join(COLUMNS[c] for c in shown) + " |", "|---|" + "---:|" * len(shown)]
    for name, row in rows.items():
        cells = ["" if row.get(c) is None else f"{100 * row[c]:.1f}{_interval(row, c)}" for c in shown]
        lines.append(f"| {plain(name)} | " + " | ".join(cells) + " |")
    lines += _by_group({name: row for name, row in rows.items() if is_own(name)})
    lines += [f"\nNote: {plain(warning)}" for warning in evaluation.get("warnings", ())]
    return "\n".join(lines) + "\n"


def _interval(row: Mapping[str, Any], column: str) -> str:
    """Format the 95 % confidence interval of a metric, if the evaluation has one."""
    ends = (row.get("intervals") or {}).get(column)
    return f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if isinstance(ends, (list, tuple)) and len(ends) == 2 else ""


def _by_group(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy per group, e.g. per background."""
    with_groups = {name: row["by_group"] for name, row in rows.items() if row.get("by_group")}
    if not with_groups:
        return []
    lines = ["", "| accuracy by group | " + " | ".join(map(plain, with_groups)) + " |", "|---|" + "---:|" * len(with_groups)]
    for value in next(iter(with_groups.values())):
        reached = " | ".join(f"{100 * groups[value]:.1f}" for groups in with_groups.values())
        lines.append(f"| {plain(value) or '(empty)'} | {reached} |")
    return lines


def _limits(checkpoint: Checkpoint, metadata: CardMetadata) -> str:
    lines = [
        "It predicts one of the classes above for any image, even one that shows none of them.",
        "The metrics hold for the data above; with other cameras, places and seasons they differ. Evaluate on your images.",
    ]
    if checkpoint.model.finds_object:
        lines.append("The network finds the object itself, and may miss it; if it finds none, it uses the whole image.")
    elif takes_boxes(checkpoint.model):
        without = "it uses the whole image" if "full" in checkpoint.model.branches else "the whole image counts as the object"
        lines.append(f"The view of the object depends on its box; without a box, {without}, including the background.")
    if metadata.limits:
        lines.append(plain(metadata.limits))
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


CITATION = """## Citation

```bibtex
@article{janouskova2024bringing,
  title = {Bringing the Context Back into Object Recognition, Robustly},
  author = {Janouskova, Klara and Gavrus, Cristian and Matas, Jiri},
  journal = {arXiv:2411.15933},
  year = {2024}
}
@misc{rw2019timm,
  title = {PyTorch Image Models},
  author = {Wightman, Ross},
  year = {2019},
  howpublished = {https://github.com/huggingface/pytorch-image-models}
}
```
"""
