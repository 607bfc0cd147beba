"""Export of a run for other runtimes, with views or the image itself as input."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..errors import L2R2Error
from ..io import check_readable
from ..models.l2r2 import L2R2
from ..views import make_views
from ..views.traceable import cut_in_graph
from .checkpoint import Checkpoint, load_checkpoint
from .export_formats import FORMATS, Format
from .format import WEIGHTS

INPUTS = ("views", "image")
TOLERANCE = {False: 1e-4, True: 5e-2}  # by fp16: maximum difference of a logit, relative to the largest in the batch if above 1


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        file: the file; for Core ML a folder, for OpenVINO with the weights next to it, in a file that ends in .bin.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        difference: maximum difference between its logits and PyTorch's, on images and boxes of several sizes; None if the file
            cannot be run here (Core ML runs only on macOS).
    """

    file: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float | None

    @property
    def size(self) -> int:
        """Bytes of all files that were written."""
        files = [*self.file.rglob("*"), self.file, *([_weights_of(self.file)] if self.file.suffix == ".xml" else [])]
        return sum(file.stat().st_size for file in files if file.is_file())


class ViewsIn(nn.Module):
    """A model whose inputs are views that the caller has cut.

    Its inputs are the views `[B, 3, S, S]` of the model's branches in order and, with more than one branch, `has_fg` `[B]` bool.
    Its outputs are the logits `[B, classes]`, fused and of each branch.

    Attributes:
        inputs: names of the inputs.
        outputs: names of the outputs.
    """

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__()
        self.model = model
        self.half_precision = half
        self.inputs = (*(f"{b}_view" for b in model.branches), *(["has_fg"] if len(model.branches) > 1 else []))
        self.outputs = ("fused", *model.branches)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs from the inputs, both in the order of their names."""
        views = dict(zip(self.model.branches, given))
        has_fg = given[-1] if len(self.model.branches) > 1 else None
        return self.fuse({branch: self.branch(branch, view) for branch, view in views.items()}, has_fg)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Return the dimensions of each input that vary, as `torch.export` takes them."""
        return ({0: Dim("batch", min=1)},) * len(self.inputs)

    def branch(self, branch: str, view: Tensor) -> Tensor:
        """Compute the float32 logits of one branch, separately, because branches may have different numbers of views."""
        view = view.half() if self.half_precision else view
        logits: Tensor = self.model.forward_branches(**{branch: view})[branch].float()
        return logits

    def fuse(self, logits: dict[str, Tensor], has_fg: Tensor | None) -> tuple[Tensor, ...]:
        """Return the fused logits, followed by those of each branch."""
        return (self.model.fuse(logits, has_fg), *(logits[branch] for branch in self.model.branches))


class ImageIn(ViewsIn):
    """A model whose inputs are one image `[H, W, 3]` uint8 and its boxes `[V, 4]`; a NaN row has no box.

    Its outputs are logits `[V, classes]`, fused and of each branch, and `has_fg` `[V]` bool. The views are cut inside the graph
    as by `make_views` without masks, to float32 accuracy.
    """

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__(model, half)
        self.inputs = ("image", "boxes")
        self.outputs = ("fused", *model.branches, "has_fg")

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """See `ViewsIn.forward`."""
        image, boxes = given
        views, has_fg = cut_in_graph(image, boxes, self.model.view_spec, self.model.branches)
        logits = {branch: self.branch(branch, view) for branch, view in views.items()}
        if "full" in logits:  # computed once per image, however many boxes it has
            logits["full"] = logits["full"].expand(boxes.shape[0], -1)
        return (*self.fuse(logits, has_fg), has_fg)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """See `ViewsIn.dynamic_shapes`."""
        return ({0: Dim("height", min=1), 1: Dim("width", min=1)}, {0: Dim("boxes", min=1)})


class MaskIn(ViewsIn):
    """A model with an fg that is masked inside the network.

    Its inputs are full views `[B, 3, S, S]` and the object's mask in each, `[B, h, w]` in [0, 1]. Its outputs are logits, and
    `has_fg` `[B]` bool, False where the mask keeps nothing.
    """

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__(model, half)
        self.inputs = ("full_view", "mask")
        self.outputs = ("fused", *model.branches, "has_fg")

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """See `ViewsIn.forward`."""
        view, mask = given
        view = view.half() if self.half_precision else view
        whole = "full" if "full" in self.model.branches else "fg"
        out = self.model.forward_views(**{whole: view}, mask=mask)
        logits = {branch: z.float() for branch, z in out.branches().items()}
        return (*self.fuse(logits, out.has_fg), out.has_fg)


class PartsIn(MaskIn):
    """A model that finds the object itself; its only input is the full view `[B, 3, S, S]`."""

    def __init__(self, model: L2R2, half: bool = False) -> None:
        super().__init__(model, half)
        self.inputs = ("full_view",)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """See `ViewsIn.forward`."""
        out = self.model.forward_views(given[0].half() if self.half_precision else given[0])
        return (*self.fuse({branch: z.float() for branch, z in out.branches().items()}, out.has_fg), out.has_fg)


def export_run(run: str | Path, out: str | Path, *, takes: str = "views", fp16: bool = False) -> Exported:
    """Export a checkpoint, and compare the outputs of the written file with PyTorch's.

    The file includes the label names and the ViewSpec as JSON: `labels` and `view_spec` in the metadata of ONNX and Core ML
    (user-defined metadata) and in OpenVINO's `rt_info` under `framework`; torch.export has them in the extra file `l2r2.json`.

    Args:
        run: a run's folder or a Hub id.
        out: the file to write. Its ending is its format: .onnx, .xml (OpenVINO), .mlpackage (Core ML) or .pt2 (torch.export).
        takes: the input, `views` or `image` (one image and its boxes, cut inside the graph).
        fp16: whether the network runs in half precision; inputs and logits stay float32.

    Returns:
        The exported file and its maximum difference from PyTorch.

    Raises:
        L2R2Error: when the ending or input is unknown, the model or the format does not support it, packages are missing, or the
            outputs differ from PyTorch's by more than 1e-4 (fp16: 5e-2); then nothing is written.

    >>> export_run("runs/fungi", "fungi.onnx").inputs  # doctest: +SKIP
    ('full_view', 'fg_view', 'has_fg')
    """
    out = Path(out)
    if (form := FORMATS.get(out.suffix)) is None:
        *others, last = (f"*{suffix} ({f.name})" for suffix, f in FORMATS.items())
        raise L2R2Error(f"{out}: name the file {', '.join(others)} or {last}.")
    if takes not in INPUTS:
        raise L2R2Error(f'Unknown input "{takes}" of an export; choose from {", ".join(INPUTS)}.')
    form.check_packages(out)
    _check_place(out)
    checkpoint = load_checkpoint(run)
    if checkpoint.model.view_spec.patch:
        why = "its views keep their aspect ratio, so the number of patches varies from image to image"
        raise L2R2Error(f"{checkpoint.name}: cannot be exported, because {why}; train it with patch 0, or use `l2r2 serve`.")
    _check_kind(checkpoint, takes, form)
    kind = _kind_of(checkpoint.model, takes)
    # torch.export would specialize a size of 1
    trials = [_trial(checkpoint.model, takes, count) for count in ((2, 3) if form.dynamic else (1,))]
    with torch.inference_mode():
        exact = kind(checkpoint.model)
        wanted = [exact(*inputs) for inputs in trials]
    if fp16:
        for name, part in checkpoint.model.named_children():
            if name != "fusion":  # its parameters are fitted in float32
                part.half()
    module = kind(checkpoint.model, fp16).eval()
    with _files_of(out) as folder:
        try:
            run_file = form.write(module, trials[0], folder / out.name, _metadata(checkpoint, takes))
        except (RuntimeError, TypeError, ValueError) as error:  # a converter without one of the network's operations
            why = str(error).strip().partition("\n")[0]
            raise L2R2Error(f"{out}: not written, because {form.name} does not support this network ({why}).") from error
        difference = None
        if run_file is not None:
            with torch.inference_mode():
                difference = max(_difference(run_file(inputs), values) for inputs, values in zip(trials, wanted))
            if not difference <= TOLERANCE[fp16]:
                raise L2R2Error(f"{out}: not written, because the exported model differs from PyTorch by {difference:.2g}.")
    return Exported(out, module.inputs, module.outputs, difference)


def _weights_of(out: Path) -> Path:
    """The second file of OpenVINO, which finds it by its name."""
    return out.with_suffix(".bin")


def _check_place(out: Path) -> None:
    """Refuse to replace a device or another program's .bin file, or to write one into a run, which refuses pickles."""
    check_readable(out, most=None)
    weights = _weights_of(out)
    if out.suffix == ".xml" and weights.exists() and not out.exists():
        raise L2R2Error(f"{weights}: exists without {out.name}; move it, or choose another name for the exported model.")
    if out.suffix == ".xml" and (out.parent / WEIGHTS).exists():
        raise L2R2Error(f"{out}: OpenVINO's weights, {weights.name}, cannot be in the folder of a run; write to another folder.")


@contextlib.contextmanager
def _files_of(out: Path) -> Iterator[Path]:
    """Provide an empty folder next to `out`; if the block succeeds, move what is in it into place."""
    weights = _weights_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:40]}.") as folder:
            yield Path(folder)
            if out.is_dir() or (out.suffix == ".xml" and out.exists()):  # a folder, or two files, cannot be replaced in one step
                os.replace(out, Path(folder, "old"))
            if out.suffix == ".xml":
                os.replace(Path(folder, weights.name), weights)
            os.replace(Path(folder, out.name), out)
    except OSError as error:
        raise L2R2Error(f"{out}: cannot be written ({error.strerror or error}).") from error


def _check_kind(checkpoint: Checkpoint, takes: str, form: Format) -> None:
    if takes == "views":
        return
    spec = checkpoint.model.view_spec
    if not form.dynamic:
        why = f"{form.name} has no inputs of varying size"
    elif "fg" in checkpoint.model.branches and spec.fg.in_network:
        why = f"{'finds the object itself' if spec.fg.finds_object else 'masks the background'} inside the network"
    elif spec.mode == "pil":
        why = 'its view mode "pil" cannot be exported'
    elif checkpoint.model.in_chans != 3:
        why = f"takes {checkpoint.model.in_chans} channels"
    else:
        return
    raise L2R2Error(f"{checkpoint.name}: {why}; export it with --input views.")


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
    """Inputs for the comparison: a noise image whose size depends on `count`, and boxes inside and across its border, or NaN."""
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
