"""Compare masked and packed attention with their peers: one row per case and provider.

``rows(device, copy_bytes_per_s, matmul_flops_per_s)`` is called by ``kernels.py``, which measures the two rates in the same
run; ``timing.py`` documents the rows. On a CPU only the whole ViT is timed, unless sizes are given.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from l2r2_kernels.masked_attention import (
    PackedRunner,
    masked_attention,
    pack,
    reference,
    round_capacity,
    run_packed,
    unpack,
    varlen_attention,
)
from timing import Call, Case, Goal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {"sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_math": SDPBackend.MATH}
L2_BYTES = 64 << 20  # inputs rotate through more than twice this, so that none is cached
CHECKED = 4  # images compared with float64


class Sizes(NamedTuple):
    """Problem sizes; lengths include the class token."""

    batch: int = 256
    heads: int = 12
    dim: int = 64
    short: int = 197
    long: int = 785
    model: str = "vit_base_patch16_224"
    rotary: str = "eva02_base_patch16_clip_224"  # of as many tokens, with rotary embeddings
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 50
    model_args: tuple[tuple[str, Any], ...] = ()


TINY = Sizes(
    batch=5, heads=1, dim=16, short=12, long=24, model="vit_tiny_patch16_224", rotary="eva02_tiny_patch14_224",
    dtype=torch.float32, repeats=2, model_args=(("img_size", 56), ("patch_size", 14), ("depth", 1)),
)  # fmt: skip
CPU_VIT = Sizes(batch=8, model="vit_small_patch16_224", dtype=torch.float32, repeats=5)


def rows(device: str, copy_bytes_per_s: float, matmul_flops_per_s: float, sizes: Sizes | None = None) -> Iterator[dict]:
    """All cases of the goal table on one device; ``sizes`` makes them smaller, for a dry run."""
    for case in _cases(torch.device(device), sizes):
        yield from case.rows(copy_bytes_per_s, matmul_flops_per_s)


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return torch.allclose(ours.double(), truth.double(), atol=tolerance, rtol=tolerance)


def agrees(function, tensors: Sequence[Tensor], truth, exact: Sequence[Tensor], backward: bool) -> bool:
    """Whether outputs, and gradients if they are timed, are those of float64 (for the first rows, if ``exact`` has fewer)."""
    inputs = [[x.detach().requires_grad_() for x in some] for some in (tensors, exact)]
    out, expected = function(*inputs[0]), truth(*inputs[1])
    dtype = tensors[0].dtype
    if not backward:
        return close(out, expected, dtype)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs[0], grad)
    theirs = torch.autograd.grad(expected, inputs[1], grad.double())
    pairs = [(out, expected), *((a[: len(b)], b) for a, b in zip(ours, theirs))]
    return all(close(a, b, dtype) for a, b in pairs)


def kept_masks(batch: int, tokens: int, share: float, copies: int, device: torch.device) -> list[Tensor]:
    """Masks that keep ``share`` of the patches on average, between half and one and a half times that in an image."""
    masks = []
    for _ in range(copies):
        spread = torch.linspace(0.5, 1.5, batch)[torch.randperm(batch)] if share < 0.6 else torch.ones(batch)
        counts = (spread * share * (tokens - 1)).round()
        mask = torch.rand(batch, tokens - 1).argsort(1).argsort(1) < counts[:, None]
        masks.append(F.pad(mask, (1, 0), value=True).to(device))
    return masks


def _copies(bytes_: float, device: torch.device) -> int:
    return min(int(2 * L2_BYTES // bytes_) + 1, 64) if device.type == "cuda" else 2


def _with_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], backward: bool) -> Call:
    """Make the call, optionally with its backward; both are timed together, as in training."""
    if not backward:

        def forward():
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


# --- attention on packed tokens -----------------------------------------------------------------------------------------


def _varlen_case(device: torch.device, sizes: Sizes, tokens: int, share: float, backward: bool, goal: Goal) -> Case:
    heads, dim = sizes.heads, sizes.dim
    probe = kept_masks(sizes.batch, tokens, share, 1, device)[0]
    total, squares = int(probe.sum()), int((probe.sum(1) ** 2).sum())
    size = total * heads * dim * probe.new_empty(0, dtype=sizes.dtype).element_size()
    flops = 4 * squares * heads * dim * (3.5 if backward else 1)
    name = f"varlen {'forward+backward' if backward else 'forward'}, N {tokens}, {share:.0%} kept"
    case = Case("varlen_attention", name, device, sizes.repeats, goal, size * (11 if backward else 4), flops)
    inputs = []
    for mask in kept_masks(sizes.batch, tokens, share, _copies(4 * size, device), device):
        lengths = mask.sum(1)
        cu = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        qkv = torch.randn(int(lengths.sum()), 3, heads, dim, device=device, dtype=sizes.dtype).unbind(1)
        inputs.append((qkv, cu, lengths.tolist()))

    def make(function: Callable[..., Tensor]) -> tuple[list[Call], Callable[[], bool]]:
        def bind(cu, lengths):
            return lambda q, k, v: function(q, k, v, cu, tokens, lengths)

        def check() -> bool:
            (q, k, v), cu, lengths = inputs[0]
            some = cu[: CHECKED + 1]
            rows_ = int(some[-1])
            exact = [x[:rows_].double() for x in (q, k, v)]
            def ours(q, k, v):
                return function(q, k, v, cu, tokens, lengths)[:rows_]

            def truth(q, k, v):
                return reference.varlen_attention_reference(q, k, v, some, dim**-0.5)[0]

            return agrees(ours, (q, k, v), truth, exact, backward)

        return [_with_gradients(bind(cu, lengths), qkv, backward) for qkv, cu, lengths in inputs], check

    for name, function in {"l2r2": _ours_varlen, "torch_varlen": _torch_varlen, "xformers": _xformers_varlen}.items():
        case.add(name, partial(make, function))
    return case


def _ours_varlen(q, k, v, cu, longest, lengths):
    return varlen_attention(q, k, v, cu, longest)


def _torch_varlen(q, k, v, cu, longest, lengths):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu, cu, longest, longest)


def _xformers_varlen(q, k, v, cu, longest, lengths):
    from xformers.ops import fmha

    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)
    return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


# --- all queries over the kept keys -------------------------------------------------------------------------------------


def _masked_case(device: torch.device, sizes: Sizes, tokens: int, share: float, backward: bool, goal: Goal) -> Case:
    shape = (sizes.batch, tokens, 3, sizes.heads, sizes.dim)
    size = sizes.batch * tokens * sizes.heads * sizes.dim * torch.empty(0, dtype=sizes.dtype).element_size()
    copies = _copies(4 * size, device)
    masks = kept_masks(sizes.batch, tokens, share, copies, device)
    tensors = [torch.randn(shape, device=device, dtype=sizes.dtype).permute(2, 0, 3, 1, 4).unbind(0) for _ in range(copies)]
    flops = 4 * tokens * int(masks[0].sum()) * sizes.heads * sizes.dim * (3.5 if backward else 1)
    name = f"keys only {'forward+backward' if backward else 'forward'}, N {tokens}, {share:.0%} kept"
    case = Case("masked_attention", name, device, sizes.repeats, goal, size * (11 if backward else 4), flops)

    def make(function: Callable[..., Tensor]) -> tuple[list[Call], Callable[[], bool]]:
        def check() -> bool:
            q, k, v = (x[:CHECKED] for x in tensors[0])
            mask = masks[0][:CHECKED]
            exact = [x.double() for x in (q, k, v)]

            def truth(q, k, v):
                return reference.masked_attention_reference(q, k, v, mask, sizes.dim**-0.5)[0]

            return agrees(lambda q, k, v: function(q, k, v, mask), (q, k, v), truth, exact, backward)

        def bind(mask):
            return lambda q, k, v: function(q, k, v, mask)

        return [_with_gradients(bind(mask), qkv, backward) for qkv, mask in zip(tensors, masks)], check

    providers: dict[str, Callable[..., Tensor]] = {"l2r2": masked_attention}
    if share == 1:
        providers["sdpa_unmasked"] = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)
    providers |= {name: _masked_sdpa(backend) for name, backend in SDPA.items()} | {"flex": _flex(device)}
    for name, function in providers.items():
        case.add(name, partial(make, function))
    return case


def _masked_sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q, k, v, mask):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])

    return attend


def _flex(device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention with the creation of its block mask, which a new mask needs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def run(q, k, v, mask):
        block_mask = create_block_mask(lambda b, h, i, j: mask[b, j], q.shape[0], None, q.shape[2], q.shape[2], device=q.device)
        return attend(q, k, v, block_mask=block_mask)

    return run


# --- the whole ViT ------------------------------------------------------------------------------------------------------


def _rope(model) -> Tensor | None:
    """The rotary embeddings of an Eva model, which its blocks take; None for a plain ViT."""
    return model.rope.get_embed() if getattr(model, "rope", None) is not None else None


def _dense(model, x: Tensor, mask: Tensor) -> Tensor:
    """The class tokens after timm's own blocks, with masked keys."""
    rope = _rope(model)
    rotary = {} if rope is None else {"rope": rope}
    for block in model.blocks:
        x = block(x, attn_mask=mask[:, None, None, :], **rotary)
    return x[:, 0]


class VitGoals(NamedTuple):
    """Goals of one model's blocks at one share of kept tokens."""

    eager: Goal  # run_packed
    graph: Goal | None = None  # PackedRunner


def _vit_cases(
    device: torch.device, sizes: Sizes, share: float, goals: VitGoals, training: bool = False, name: str = ""
) -> Iterator[Case]:
    torch.manual_seed(0)
    name = name or sizes.model
    model = timm.create_model(name, **dict(sizes.model_args)).to(device, sizes.dtype).train(training)
    tokens, width = model.pos_embed.shape[1], model.embed_dim
    batches = [torch.randn(sizes.batch, tokens, width, device=device, dtype=sizes.dtype) for _ in range(2)]
    masks = kept_masks(sizes.batch, tokens, share, 2, device)
    capacity = round_capacity(max(int(mask.sum()) for mask in masks))  # known from the boxes
    weights = sum(p.numel() for p in model.blocks.parameters())
    title = f"{name} blocks {'training step' if training else 'forward'}, N {tokens}, {share:.0%} kept"
    flops = 2 * weights * int(masks[0].sum()) * (3 if training else 1)
    size = weights * batches[0].element_size() * (5 if training else 1)
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=1e-6)
    rope = _rope(model)
    runner = PackedRunner(model.blocks, sizes.batch, tokens, capacity, num_prefix=1, training=training)

    def dense(x: Tensor, mask: Tensor) -> Tensor:
        return _dense(model, x, mask)

    def packed(x: Tensor, mask: Tensor) -> Tensor:
        return run_packed(model.blocks, x, mask, num_prefix=1, capacity=capacity, rope=rope)[0].prefix()[:, 0]

    def graph(x: Tensor, mask: Tensor) -> Tensor:
        return runner(x, mask, rope)[0].prefix()[:, 0]

    def step(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, mask: Tensor) -> Call:
        def forward():
            with torch.no_grad():
                return function(x, mask)

        def train():
            optimizer.zero_grad(set_to_none=True)
            function(x, mask).float().square().mean().backward()
            optimizer.step()

        return train if training else forward

    def check(function: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """In the dtype that is timed: a finite error, no more than 1.5 times that of the dense model."""
        exact = copy.deepcopy(model).double()  # of the current weights, which training steps change
        with torch.no_grad():
            truth = [_dense(exact, x[:CHECKED].double(), mask[:CHECKED]) for x, mask in zip(batches, masks)]

        def error(of: Callable[[Tensor, Tensor], Tensor]) -> float:
            # both batches, so that a graph is replayed with another mask than at its capture; and the calls that are timed,
            # for a graph with a backward pass is another one
            with torch.set_grad_enabled(training):
                outs = [of(x, mask)[:CHECKED].detach().double() for x, mask in zip(batches, masks)]
            return float(torch.stack([(out - right).abs().max() for out, right in zip(outs, truth)]).max())

        return error(function) <= 1.5 * error(dense) + 1e-5 * float(torch.stack(truth).abs().max())

    def case_of(op: str, goal: Goal, providers: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Case:
        case = Case(op, title, device, sizes.repeats, goal._replace(peers=("dense_masked",)), size, flops)
        for provider, function in providers.items():
            calls = [step(function, x, mask) for x, mask in zip(batches, masks)]
            case.add(provider, lambda calls=calls, function=function: (calls, lambda: check(function)))
        return case

    case = case_of("run_packed", goals.eager, {"l2r2": packed, "dense_masked": dense})
    yield case
    if goals.graph is not None:
        yield case_of("PackedRunner", goals.graph, {"l2r2": graph, "dense_masked": dense, "run_packed": packed})
    if training or share != 0.3 or rope is not None:
        return
    # The peer is 2 % of the forward pass, so the goal is a ratio of at least 1.
    moved = Case("pack+unpack", f"of {title}", device, sizes.repeats, Goal(1.0), 4 * sizes.batch * tokens * width, 0)

    def round_trip(x: Tensor, mask: Tensor) -> Tensor:
        return unpack(pack(x, mask, num_prefix=1, capacity=capacity))

    calls = [lambda x=x, mask=mask: round_trip(x, mask) for x, mask in zip(batches, masks)]
    moved.add("l2r2", lambda: (calls, lambda: torch.equal(calls[0](), batches[0] * masks[0][..., None])))
    moved.stand_in("2% of the packed forward", [0.02 * ms for ms in case.times["l2r2"]])
    yield moved


# --- the goal table (KERNELS, section 2) --------------------------------------------------------------------------------


def _cases(device: torch.device, sizes: Sizes | None) -> Iterator[Case]:
    if device.type != "cuda" and sizes is None:
        yield from _vit_cases(device, CPU_VIT, 0.3, VitGoals(Goal(2.0, 2.8)))
        return
    sizes = sizes or Sizes()
    against_torch = ("torch_varlen",)
    for share in (0.3, 0.5):
        yield _varlen_case(device, sizes, sizes.short, share, False, Goal(1.0, 1 / 0.8, against_torch))
        yield _varlen_case(device, sizes, sizes.short, share, True, Goal(1.0, 1 / 0.8, against_torch))
    yield _varlen_case(device, sizes, sizes.long, 1.0, False, Goal(1 / 1.15, 1.0, against_torch))
    yield _varlen_case(device, sizes, sizes.long, 1.0, True, Goal(1 / 1.3, 1.0, against_torch))
    masked_sdpa = tuple(SDPA)
    short, long = Goal(1.3, 1.6, masked_sdpa), Goal(2.5, 3.0, masked_sdpa)
    for tokens, forward, both in ((sizes.short, short, short), (sizes.long, long, Goal(3.0, None, ("sdpa_cudnn",)))):
        yield _masked_case(device, sizes, tokens, 0.3, False, forward)
        yield _masked_case(device, sizes, tokens, 0.3, True, both)
        yield _masked_case(device, sizes, tokens, 1.0, False, Goal(1 / 1.05, None, ("sdpa_unmasked",)))
    # what the host limits with many short kernels is a goal of the graph
    graphs = {0.5: Goal(2.1), 0.3: Goal(3.4), 0.2: Goal(4.8)}
    for share, must, stretch in ((0.5, 1.7, 1.9), (0.3, 2.6, 3.1), (0.2, 3.5, 4.3)):
        forward = VitGoals(Goal(must, stretch), graphs[share])
        yield from _vit_cases(device, sizes, share, forward)
        step = VitGoals(Goal(0.85 * must, 0.85 * stretch), Goal(4.0) if share == 0.2 else None)
        yield from _vit_cases(device, sizes, share, step, training=True)
        yield from _vit_cases(device, sizes, share, forward, name=sizes.rotary)
