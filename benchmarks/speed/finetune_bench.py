"""Training steps of `l2r2 finetune` with fg on the patches of the object: with and without `cuda_graphs`.

``rows(device, copy_bytes_per_s, matmul_flops_per_s)`` is called by ``kernels.py``; ``timing.py`` documents the rows. A step is
what the Trainer does with views in memory: forward, loss, backward and optimizer, in bfloat16 under autocast on a GPU. The
gradients of both are compared before they are timed. `full alone` is a step of the backbone on the full view only, to compare
with. No goal is set.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timing import Call, Case, Goal
from torch import Tensor

from l2r2_models.models.packed_graphs import PackedGraphs
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.models import create_model
from l2r2_models.train.optimizers import create_optimizer
from l2r2_models.train.recipe import Recipe


class Sizes(NamedTuple):
    """Problem sizes."""

    batch: int = 64
    masked: str = "l2r2_masked_vit_base_patch16_224"
    ifam: str = "ifam_vit_base_patch14_reg4_dinov2"
    size: int = 224
    patch: int = 16
    repeats: int = 20
    backbone: tuple[tuple[str, Any], ...] = ()


TINY = Sizes(
    batch=3, masked="l2r2_masked_vit_small_patch16_224", ifam="ifam_vit_tiny_patch16_224", size=48, repeats=2,
    backbone=(("depth", 1), ("embed_dim", 48), ("num_heads", 3)),
)  # fmt: skip


def rows(device: str, copy_bytes_per_s: float, matmul_flops_per_s: float, sizes: Sizes | None = None) -> Iterator[dict]:
    """All cases on one device; ``sizes`` makes them smaller, for a dry run."""
    where, sizes = torch.device(device), sizes or Sizes()
    for share in (0.2, 0.3, 0.5):
        yield from _case(where, sizes, sizes.masked, share).rows(copy_bytes_per_s, matmul_flops_per_s)
    yield from _case(where, sizes, sizes.ifam, None).rows(copy_bytes_per_s, matmul_flops_per_s)


def _batches(device: torch.device, sizes: Sizes, share: float | None) -> list[dict[str, Tensor]]:
    """Two batches as `BranchLoss` takes them; the masks keep ``share`` of the patches."""
    batches, cells = [], -(-sizes.size // sizes.patch)
    for _ in range(2):
        batch = {"labels": torch.randint(0, 10, (sizes.batch,)), "has_fg": torch.ones(sizes.batch, dtype=torch.bool)}
        batch["full"] = torch.randn(sizes.batch, 3, sizes.size, sizes.size)
        if share is not None:
            kept = torch.rand(sizes.batch, cells * cells).argsort(1).argsort(1) < max(1, round(share * cells * cells))
            batch["mask"] = kept.float().unflatten(1, (cells, cells))
        batches.append({name: value.to(device) for name, value in batch.items()})
    return batches


def _case(device: torch.device, sizes: Sizes, name: str, share: float | None) -> Case:
    torch.manual_seed(0)
    recipe = Recipe.default(name, False, size=sizes.size, backbone=dict(sizes.backbone), batch_size=sizes.batch)
    loss = BranchLoss(create_model(recipe, 10).to(device)).train()
    twin = copy.deepcopy(loss)
    graphs = PackedGraphs(loss.model.backbone_of("fg"), sizes.batch, training=True)
    batches = _batches(device, sizes, share)
    optimizers = {id(net): create_optimizer(net.model, recipe) for net in (loss, twin)}
    kept = "" if share is None else f", {share:.0%} kept"
    weights = sum(p.numel() for p in loss.parameters())
    title = f"{name} training step, batch {sizes.batch}{kept}"
    case = Case("finetune", title, device, sizes.repeats, Goal(peers=("without_graphs",)), 20 * weights, 0)

    def half() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def backward(net: BranchLoss, batch: dict[str, Tensor], replayed: bool) -> None:
        optimizers[id(net)].zero_grad()
        with graphs.replayed() if replayed else nullcontext(), half():
            value = net(**batch)["loss"]
        value.backward()

    def check() -> bool:
        """Gradients of both batches, the second a replay with other inputs, as far apart as rounding allows."""
        for batch in batches:
            grads = []
            for net, replayed in ((loss, True), (twin, False)):
                torch.manual_seed(0)  # stage 1 of an iFAM model draws
                backward(net, batch, replayed)
                grads.append(torch.cat([p.grad.float().flatten() for p in net.parameters() if p.grad is not None]))
            if not torch.linalg.vector_norm(grads[0] - grads[1]) <= 0.02 * torch.linalg.vector_norm(grads[1]):
                return False
        return True

    def steps(net: BranchLoss, replayed: bool, full_alone: bool = False) -> list[Call]:
        def step(batch: dict[str, Tensor]) -> None:
            backward(net, batch, replayed)
            optimizers[id(net)].step()

        def plain(batch: dict[str, Tensor]) -> None:
            optimizers[id(net)].zero_grad()
            with half():
                features = net.model.backbone(batch["full"])
            features.float().square().mean().backward()
            optimizers[id(net)].step()

        return [lambda batch=batch: (plain if full_alone else step)(batch) for batch in batches]

    providers: dict[str, Callable[[], tuple[list[Call], Callable[[], bool]]]] = {
        "l2r2": lambda: (steps(loss, True), check),
        "without_graphs": lambda: (steps(twin, False), lambda: True),
        "full alone": lambda: (steps(twin, False, full_alone=True), lambda: True),
    }
    for provider, make in providers.items():
        case.add(provider, make)
    return case
