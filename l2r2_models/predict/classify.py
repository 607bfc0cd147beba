"""Network: the logits of every branch for the boxes of many images, in as few forward passes as possible."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import L2R2Error
from ..hardware import has_bf16, rows_per_pass
from ..models.backbones import is_convolutional
from ..models.cascade import Cascade, can_decide, check_cascade, has_own_views
from ..models.l2r2 import L2R2, L2R2Output
from ..models.packed_graphs import PackedGraphs
from ..views import Views, cat_views, make_views, stack_views
from .items import Item, Job, Pending, Row, images_of

logger = logging.getLogger(__name__)
Precision = Literal["fp32", "bf16"]
DIGITS = 5  # decimals of a stored logit
WINDOW = 4  # batches of fg that a cascade runs before the remaining images of full, so that their batches are full too


class Answered(NamedTuple):
    """The logits of V boxes.

    Attributes:
        output: logits of the V rows.
        skipped: `[V]` bool, rows that fg decided and the other branches did not compute; their logits are those of fg.
    """

    output: L2R2Output
    skipped: Tensor


class Network:
    """Run the branches of a model on a device, each on as few views as possible.

    The full branch runs once per image, however many boxes the image has, and not at all if its logits are known; the fg branch
    skips rows without an object.

    Args:
        model: a model in eval mode, on `device`.
        device: device to compute on.
        batch_size: objects per forward pass.
        precision: precision of the network, `fp32` or `bf16`; views and fusion are always fp32.
        cascade: run fg first, and the other branches only on the rows that it does not decide; None to run all branches.
        cuda_graphs: replay the ViT of an fg branch that drops tokens as CUDA graphs, see `PackedGraphs`.

    Attributes:
        round_logits: round the logits before they are fused, so that stored ones give the same predictions; False by default.

    Raises:
        L2R2Error: when the device does not support the precision, the branches of the model cannot run separately, or it drops
            no tokens and `cuda_graphs` is set.
    """

    def __init__(
        self,
        model: L2R2,
        device: torch.device,
        batch_size: int,
        precision: Precision = "fp32",
        cascade: Cascade | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        check_precision(precision, device)
        self.model, self.device, self.precision, self.cascade = model, device, precision, cascade
        self.batch_size, self.round_logits = batch_size, False
        self.separate = has_own_views(model)  # otherwise fg shares its pass with full
        if precision != "fp32" and not self.separate:
            raise L2R2Error("A model that masks inside the network or finds its object itself needs the precision fp32.")
        if cascade is not None:
            check_cascade(model)
            if cascade.threshold is None and not can_decide(model, device):
                always = f'the fusion "{model.fusion.name}" always needs all branches'
                logger.warning("%s, so an exact cascade saves nothing; fit one with `l2r2 fuse --cascade`", always)
        if cuda_graphs and not ("fg" in model.branches and model.view_spec.fg.drops_tokens):
            raise L2R2Error('cuda_graphs is for models that drop tokens: with an fg branch of fg_mode "tokens", or iFAM.')
        self.graphs = PackedGraphs(model.backbone_of("fg"), batch_size) if cuda_graphs else None
        self.memory_format = torch.channels_last if is_convolutional(model.backbone) else torch.contiguous_format

    @property
    def most(self) -> int:
        """The number of boxes to collect for a call."""
        return self.batch_size * (1 if self.cascade is None else WINDOW)

    def cut(self, item: Item, rows: Sequence[Row]) -> Item:
        """Return the item with the views of `rows` instead of its pixels.

        A cascade keeps the pixels, because most whole images will not be needed.
        """
        if not self.separate or item.image is None or item.views is not None:
            return item
        index, boxes = torch.zeros(len(rows), dtype=torch.long), torch.stack([row.box for row in rows])
        masks = [row.mask for row in rows] if any(row.mask is not None for row in rows) else None
        spec, needs_full = self.model.view_spec, "full" in self.model.branches and item.full is None
        together = needs_full and self.cascade is None and len(rows) == 1  # `make_views` would repeat full for each box
        branches = self.model.branches if together else self._others
        views = make_views([item.image], boxes, spec, branches=branches, image_index=index, masks=masks)
        if self.cascade is not None:
            return replace(item, views=views)
        if needs_full and not together:
            views = views._replace(full=make_views([item.image], None, spec, branches=("full",)).full)
        return replace(item, image=None, views=views)

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> Answered:
        """Classify boxes."""
        answered = self._apart(jobs) if self.separate else self._together(jobs)
        if not self.round_logits:
            return answered
        output, has_fg = answered.output, answered.output.has_fg
        rounded = {b: torch.round(z.double(), decimals=DIGITS).float() for b, z in output.branches().items()}
        logits = {b: torch.where(has_fg[:, None], rounded[b], z) for b, z in output.branches().items()}
        fused = self.model.fuse(logits, has_fg, self._scores(jobs))
        given = L2R2Output(logits.get("full"), logits.get("fg"), fused, logits.get("bg"), has_fg)
        return answered._replace(output=given)

    def _scores(self, jobs: Sequence[Job]) -> Tensor:
        """Return the box scores `[V]`, 1 where there is none."""
        return torch.tensor([1.0 if job.row.score is None else job.row.score for job in jobs], device=self.device)

    def _apart(self, jobs: Sequence[Job]) -> Answered:
        """Run each branch on its own views."""
        scores = self._scores(jobs)
        views = self._object_views(jobs)
        has_fg = views.has_fg
        # without a full branch to fall back on, the others run on the whole image
        seen = has_fg if "full" in self.model.branches else torch.ones_like(has_fg)
        skipped = torch.zeros_like(has_fg)
        if self.cascade is not None:
            logits = self._run(jobs, views, ("fg",), seen)
            skipped = seen & self.cascade.decided(self.model, logits["fg"], scores)
            rest = tuple(b for b in self.model.branches if b != "fg")
            logits.update(self._run(jobs, views, rest, seen & ~skipped, skipped))
        else:
            logits = self._run(jobs, views, self.model.branches, seen)
        if self.cascade is not None:  # logits that were not computed do not affect the fusion, whatever their values
            logits |= {b: torch.where(skipped[:, None], logits["fg"], z) for b, z in logits.items()}
        if "full" in logits:
            logits |= {b: torch.where(seen[:, None], logits[b], logits["full"]) for b in self._others}
        fused = self.model.fuse(logits, has_fg, scores)
        if self.cascade is not None:
            fused = self.cascade.fused(fused, logits["fg"], skipped)
        return Answered(L2R2Output(logits.get("full"), logits.get("fg"), fused, logits.get("bg"), has_fg), skipped)

    @property
    def _others(self) -> tuple[str, ...]:
        return tuple(b for b in self.model.branches if b != "full")

    def _object_views(self, jobs: Sequence[Job]) -> Views:
        """Return the views of fg and bg, one row per job."""
        images = images_of(jobs)
        if self.device.type == "cpu":
            for pending in images:
                pending.item = self.cut(pending.item, pending.rows)
            rows = [(job.pending.item.views, job.number) for job in jobs]
            parts = {b: stack_views([getattr(views, b)[number] for views, number in rows]) for b in self._others}
            has_fg = torch.stack([views.has_fg[number] for views, number in rows if views is not None])
            return Views(None, parts.get("fg"), parts.get("bg"), has_fg)
        return make_views(
            [pending.item.image for pending in images],  # type: ignore[misc]
            torch.stack([job.row.box for job in jobs]),
            self.model.view_spec,
            branches=self._others,
            image_index=torch.tensor([images.index(job.pending) for job in jobs]),
            masks=[job.row.mask for job in jobs],
            device=self.device,
        )

    def _run(
        self, jobs: Sequence[Job], views: Views, branches: Sequence[str], rows: Tensor, skipped: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the logits `[V, classes]` by branch: full for images with a row that is not `skipped`, others for `rows`."""
        given = {b: getattr(views, b)[rows] for b in branches if b != "full"}
        given = {b: view for b, view in given.items() if len(view)}
        wanted: list[Pending] = []
        if "full" in branches:
            left = [job for job, skip in zip(jobs, [False] * len(jobs) if skipped is None else skipped.tolist()) if not skip]
            wanted = [pending for pending in images_of(left) if pending.item.full is None]
            given |= {"full": self._full_views(wanted)} if wanted else {}
        computed = self.logits(given)
        for pending, z in zip(wanted, computed.get("full", ())):
            pending.set_full(z)
        found: dict[str, Tensor] = {}
        for branch in branches:
            z = torch.zeros(len(jobs), self.model.num_classes, device=self.device)
            if branch == "full":
                for i, job in enumerate(jobs):
                    z[i] = 0 if job.pending.item.full is None else job.pending.item.full
            elif branch in computed:
                z[rows] = computed[branch]
            found[branch] = z
        return found

    def _full_views(self, images: Sequence[Pending]) -> Tensor:
        cut = [pending.item.views.full for pending in images if pending.item.views is not None]
        if cut and all(view is not None for view in cut):
            return cat_views(cut)  # type: ignore[arg-type]
        pixels = [pending.item.image for pending in images]
        full = make_views(pixels, None, self.model.view_spec, branches=("full",), device=self.device).full  # type: ignore[arg-type]
        assert full is not None
        return full

    def logits(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits by branch of the views `[B, 3, S, S]` by branch; a pass has at most twice `batch_size` views."""
        logits: dict[str, list[Tensor]] = {branch: [] for branch in views}
        done = dict.fromkeys(views, 0)
        while left := [branch for branch in views if done[branch] < len(views[branch])]:
            size = rows_per_pass(self.device, self.batch_size * (2 if len(left) == 1 else 1), len(left))
            for branch, z in self._pass({b: views[b][done[b] : done[b] + size] for b in left}).items():
                logits[branch].append(z)
                done[branch] += len(z)
        return {branch: torch.cat(parts) for branch, parts in logits.items()}

    def _pass(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {b: v.to(self.device, memory_format=self.memory_format) for b, v in views.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return {b: z.float() for b, z in self.model.forward_branches(**given).items()}

    def _together(self, jobs: Sequence[Job]) -> Answered:
        """Run all branches in one pass, for models that mask inside the network."""
        images = images_of(jobs)
        known = [job.pending.item.full for job in jobs]
        full = None if any(z is None for z in known) else torch.stack(known)  # type: ignore[arg-type]
        views = make_views(
            [pending.item.image for pending in images],  # type: ignore[misc]
            torch.stack([job.row.box for job in jobs]),
            self.model.view_spec,
            branches=[b for b in self.model.branches if b != "full" or full is None],
            image_index=torch.tensor([images.index(job.pending) for job in jobs]),
            masks=[job.row.mask for job in jobs],
            device=self.device,
        )
        scores = self._scores(jobs)
        known_full = {} if full is None else {"full_logits": full}
        with nullcontext() if self.graphs is None else self.graphs.replayed():
            output = self.model.forward_views(**views.inputs(), objectness=scores, **known_full)
        return Answered(output, torch.zeros_like(output.has_fg))


def check_precision(precision: str, device: torch.device) -> None:
    """Check that the precision is known and that the device supports it.

    Raises:
        L2R2Error: when the precision is unknown, or the hardware has no bfloat16 instructions.
    """
    if precision not in ("fp32", "bf16"):
        raise L2R2Error(f'Unknown precision "{precision}"; choose from fp32, bf16.')
    if precision == "bf16" and not has_bf16(device):
        raise L2R2Error(f"This {device.type.upper()} has no bfloat16 instructions; use the precision fp32.")
