"""A run as one file for other runtimes: ONNX or torch.export, its views or the image itself going in."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import L2R2Error
from ..io import write_atomic
from ..models.l2r2 import L2R2
from ..views import make_views
from ..views.traceable import cut_in_graph
from .checkpoint import Checkpoint, load_checkpoint

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
INPUTS = ("views", "image")
TOLERANCE = {False: 1e-4, True: 5e-2}  # largest difference of a logit, relative to the largest of the batch where that is above 1


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the exported model.
        inputs, outputs: names in order.
        difference: largest difference of a logit from PyTorch's, on images and boxes of several sizes.
    """

    file: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float


class ViewsIn(nn.Module):
    """Views in, logits out: what is left of a model when somebody else cuts.

    Takes the views `[B, 3, S, S]` of the model's branches in their order and, where there is more than one branch, `has_fg`
    `[B]` bool; gives the logits `[B, classes]` fused and of every branch.
    """

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__()
        self.model = model
        self.half_precision = half
        self.inputs = (*(f"{b}_view" for b in model.branches), *(["has_fg"] if len(model.branches) > 1 else []))
        self.outputs = ("fused", *model.branches)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        views = dict(zip(self.model.branches, given))
        has_fg = given[-1] if len(self.model.branches) > 1 else None
        return self.answers({branch: self.branch(branch, view) for branch, view in views.items()}, has_fg)

    def branch(self, branch: str, view: Tensor) -> Tensor:
        """Float32 logits of one branch; an own pass each, because views may be of different numbers."""
        view = view.half() if self.half_precision else view
        return self.model.forward_branches(**{branch: view})[branch].float()

    def answers(self, logits: dict[str, Tensor], has_fg: Tensor | None) -> tuple[Tensor, ...]:
        return (self.model.fuse(logits, has_fg), *(logits[branch] for branch in self.model.branches))


class ImageIn(ViewsIn):
    """One image `[H, W, 3]` uint8 and its boxes `[V, 4]` in (a NaN row has none), cut inside; logits `[V, classes]` out.

    Gives `has_fg` `[V]` bool too. It cuts as `make_views` does without masks, to float32 accuracy.
    """

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__(model, half)
        self.inputs = ("image", "boxes")
        self.outputs = ("fused", *model.branches, "has_fg")

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        image, boxes = given
        views, has_fg = cut_in_graph(image, boxes, self.model.view_spec, self.model.branches)
        logits = {branch: self.branch(branch, view) for branch, view in views.items()}
        if "full" in logits:  # once an image, however many boxes it has
            logits["full"] = logits["full"].expand(boxes.shape[0], -1)
        return (*self.answers(logits, has_fg), has_fg)


class MaskIn(ViewsIn):
    """The whole image's view `[B, 3, S, S]` and the object's mask in it `[B, h, w]` in 0..1, for an fg that is masked inside the
    network. Gives `has_fg` `[B]` bool too: False where the mask keeps nothing."""

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__(model, half)
        self.inputs = ("full_view", "mask")
        self.outputs = ("fused", *model.branches, "has_fg")

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        view, mask = given
        view = view.half() if self.half_precision else view
        whole = "full" if "full" in self.model.branches else "fg"
        out = self.model.forward_views(**{whole: view}, mask=mask)
        logits = {branch: z.float() for branch, z in out.branches().items()}
        return (*self.answers(logits, out.has_fg), out.has_fg)


class PartsIn(MaskIn):
    """The whole image's view `[B, 3, S, S]`, for a model that finds the object itself."""

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__(model, half)
        self.inputs = ("full_view",)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        out = self.model.forward_views(given[0].half() if self.half_precision else given[0])
        return (*self.answers({branch: z.float() for branch, z in out.branches().items()}, out.has_fg), out.has_fg)


def export_run(run: str | Path, out: str | Path, *, format: str = "onnx", takes: str = "views", fp16: bool = False) -> Exported:
    """Export a checkpoint and compare what the written file answers with PyTorch.

    Label names and the ViewSpec travel in the file: ONNX as metadata `labels` and `view_spec` (JSON), torch.export as the extra
    file `l2r2.json`.

    Args:
        run: a run's folder or a Hub id.
        out: file to write.
        format: `onnx` or `torch-export`.
        takes: `views`, or `image` (one image and its boxes, cut inside the graph).
        fp16: weights and network in half precision; inputs and logits stay float32.

    Raises:
        L2R2Error: unknown format or input, a model that cannot be exported so, missing packages, or a file that does not answer
            as PyTorch within 1e-4 (fp16: 5e-2); then nothing is written.
    """
    for what, value, choices in (("format", format, tuple(FORMATS)), ("input", takes, INPUTS)):
        if value not in choices:
            raise L2R2Error(f'Unknown {what} "{value}" of an export; choose from {", ".join(choices)}.')
    checkpoint = load_checkpoint(run)
    _check_kind(checkpoint, takes)
    kind = _kind_of(checkpoint.model, takes)
    trials = [_trial(checkpoint.model, takes, count) for count in (2, 3)]  # 1 would be taken for a constant
    with torch.inference_mode():
        exact = kind(checkpoint.model)
        wanted = [exact(*inputs) for inputs in trials]
    if fp16:
        for name, part in checkpoint.model.named_children():
            if name != "fusion":  # its numbers are fitted to float32
                part.half()
    module = kind(checkpoint.model, fp16).eval()
    differences: list[float] = []

    def write(temporary: Path) -> None:
        answer = _write_onnx if format == "onnx" else _write_torch
        run_file = answer(module, trials[0], temporary, _metadata(checkpoint, takes))
        with torch.inference_mode():
            differences.extend(_difference(run_file(inputs), values) for inputs, values in zip(trials, wanted))
        if not max(differences) <= TOLERANCE[fp16]:
            raise L2R2Error(f"{out}: the exported model differs from PyTorch by {max(differences):.2g}; not written.")

    write_atomic(out, write)
    return Exported(Path(out), module.inputs, module.outputs, max(differences))


def _check_kind(checkpoint: Checkpoint, takes: str) -> None:
    spec = checkpoint.model.view_spec
    if takes == "image" and "fg" in checkpoint.model.branches and spec.fg.in_network:
        what = "finds its object itself" if spec.fg.finds_object else "takes the object's mask"
        raise L2R2Error(f"{checkpoint.name}: {what} inside the network; export it with --input views.")
    if takes == "image" and spec.mode == "pil":
        raise L2R2Error(f"{checkpoint.name}: cuts in the mode pil, which has no graph; export it with --input views.")
    if takes == "image" and checkpoint.model.in_chans != 3:
        raise L2R2Error(f"{checkpoint.name}: takes {checkpoint.model.in_chans} channels; export it with --input views.")


def _kind_of(model: L2R2, takes: str) -> type[ViewsIn]:
    if takes == "image":
        return ImageIn
    if model.finds_object:
        return PartsIn
    return MaskIn if model.takes_mask else ViewsIn


def _metadata(checkpoint: Checkpoint, takes: str) -> dict[str, str]:
    return {
        "labels": json.dumps(list(checkpoint.labels)),
        "view_spec": json.dumps(checkpoint.model.view_spec.to_dict()),
        "box_threshold": json.dumps(checkpoint.box_threshold),
        "input": takes,
        "weights_sha256": checkpoint.digest,
    }


def _trial(model: L2R2, takes: str, count: int) -> tuple[Tensor, ...]:
    """Inputs to compare by: noise images of another size each, boxes inside, across and beyond the border, the last one NaN."""
    generator = torch.Generator().manual_seed(count)
    height, width = 40 + 31 * count, 150 - 20 * count
    image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    corner, size = torch.rand(count, 2, generator=generator) * 20 - 5, 10 + torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + size], 1)
    boxes[-1] = torch.nan
    if takes == "image":
        return image, boxes
    of_one = torch.zeros(count, dtype=torch.int64)
    views = make_views([image], boxes, model.view_spec, branches=model.branches, image_index=of_one)
    given = [v for b, v in views._asdict().items() if b in model.branches and v is not None]
    if model.in_chans != 3:
        given = [v[:, :1].expand(-1, model.in_chans, -1, -1).contiguous() for v in given]
    if (kind := _kind_of(model, takes)) is MaskIn:
        assert views.mask is not None
        return given[0], views.mask
    if kind is PartsIn:
        return (given[0],)
    return (*given, views.has_fg) if len(given) > 1 else tuple(given)


def _difference(got: Sequence[Any], wanted: Sequence[Tensor]) -> float:
    def of(a: Any, b: Tensor) -> float:
        a, b = torch.as_tensor(a).double(), b.double()
        return float((a - b).abs().max() / max(1.0, float(b.abs().max()))) if a.shape == b.shape else float("inf")

    return max(of(a, b) for a, b in zip(got, wanted))


def _dynamic_shapes(module: ViewsIn) -> tuple[Any, ...]:
    from torch.export import Dim

    if isinstance(module, ImageIn):
        return ({0: Dim("height", min=1), 1: Dim("width", min=1)}, {0: Dim("boxes", min=1)})
    batch = Dim("batch", min=1)
    return ({0: batch},) * len(module.inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print their progress and warn about each other's deprecations."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _export_program(module: ViewsIn, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=(_dynamic_shapes(module),))


def _write_torch(
    module: ViewsIn, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]
) -> Callable[[tuple[Tensor, ...]], Any]:
    with _quiet():
        # the archive's format is told by the file's name
        content = io.BytesIO()
        torch.export.save(_export_program(module, inputs), content, extra_files={"l2r2.json": json.dumps(metadata)})
        file.write_bytes(content.getvalue())
        loaded = torch.export.load(io.BytesIO(content.getvalue())).module()
    return lambda values: loaded(*values)


def _write_onnx(
    module: ViewsIn, inputs: tuple[Tensor, ...], file: Path, metadata: dict[str, str]
) -> Callable[[tuple[Tensor, ...]], Any]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter needs it)
    except ImportError as error:
        raise L2R2Error('Exporting to ONNX needs more packages: pip install "l2r2-models[export]".') from error
    with _quiet():
        program = torch.onnx.export(
            _export_program(module, inputs), dynamo=True, input_names=list(module.inputs), output_names=list(module.outputs)
        )
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda values: session.run(None, {name: value.numpy() for name, value in zip(module.inputs, values)})
