"""The attention kernels: forward, dq, and dk/dv, for both packed segments and masked images.

The keys of a masked image are read through an index of the kept ones, those of a segment directly; the rest is shared.
No atomics: each program owns the rows that it writes, so the backward is bitwise repeatable.
Algorithm: FlashAttention-2 (arXiv 2307.08691). Under TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import on_device

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FULL_GRID = 2048  # programs: a few per multiprocessor of a large GPU


class Config(NamedTuple):
    """Tile and launch parameters of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _program(B, H, NUM, TAIL):
    """Segment, head, first block and step of this program.

    NUM programs share the blocks of a segment and head, whatever its length, and TAIL programs per head those of the padding,
    which is segment B.
    """
    pid = tl.program_id(0)
    past = pid - B * H * NUM
    padding = past >= 0
    b = tl.where(padding, B, pid // NUM // H)
    h = tl.where(padding, past % H, pid // NUM % H)
    return b, h, tl.where(padding, past // H, pid % NUM), tl.where(padding, TAIL, NUM)


@triton.jit
def _segment(LENGTHS, b, B, T, VARLEN: tl.constexpr):
    """First row, number of rows and number of keys of segment b. Segment B, the padding, has no keys."""
    if VARLEN:
        start = tl.minimum(tl.load(LENGTHS + b), T)
        rows = tl.minimum(tl.load(LENGTHS + b + 1, mask=b < B, other=T), T) - start
        keys = tl.where(b < B, rows, 0)
    else:
        start = b * 0
        rows = T
        keys = tl.load(LENGTHS + b)
    return start, rows, keys


@triton.jit
def _offset(b, start, h, stride_b, stride_t, stride_h):
    return b.to(tl.int64) * stride_b + start.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h


@triton.jit
def _stats_offset(b, start, h, H, T, VARLEN: tl.constexpr):
    """Where the lse and delta of a segment start: they are [H, T] for segments and [B, H, T] for images."""
    if VARLEN:
        return h.to(tl.int64) * T + start
    return (b.to(tl.int64) * H + h) * T


@triton.jit
def _load_rows(base, rows, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    x = tl.load(base + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)
    if UPCAST:  # the interpreter's bf16 arithmetic is incorrect
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_rows(base, rows, stride, valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    tl.store(base + rows[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(
    k_base, v_base, index_base, n0, keys, T, skt, svt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys and values n0.. of a segment, and which of them exist.

    An image that keeps all its tokens has them in order, so its loads do not need the index.
    """
    n = n0 + tl.arange(0, BLOCK_N)
    kept = n < keys
    if not VARLEN:
        n = tl.where(keys < T, tl.load(index_base + n, mask=kept & (keys < T), other=0), n)
    k = _load_rows(k_base, n, skt, kept, D, BLOCK_D, UPCAST)
    v = _load_rows(v_base, n, svt, kept, D, BLOCK_D, UPCAST)
    return k, v, kept


@triton.jit(do_not_specialize=["B", "T", "NUM", "TAIL"])
def forward_kernel(
    Q, K, V, OUT, LSE, LENGTHS, INDEX,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sob, scale_log2, B, H, T, NUM, TAIL,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse of the queries, BLOCK_M at a time, by the online softmax of FlashAttention."""
    b, h, turn, turns = _program(B, H, NUM, TAIL)
    start, rows, keys = _segment(LENGTHS, b, B, T, VARLEN)
    q_base = Q + _offset(b, start, h, sqb, sqt, sqh)
    k_base = K + _offset(b, start, h, skb, skt, skh)
    v_base = V + _offset(b, start, h, svb, svt, svh)
    out_base = OUT + _offset(b, start, h, sob, H * D, D)
    lse_base = LSE + _stats_offset(b, start, h, H, T, VARLEN)
    index_base = INDEX + b.to(tl.int64) * T
    tile = tl.arange(0, BLOCK_M)
    for m0 in range(turn * BLOCK_M, rows, turns * BLOCK_M):
        first = tl.full([], m0, tl.int64)  # m0 is a Python int in the interpreter
        in_rows = tile < rows - m0
        q = _load_rows(q_base + first * sqt, tile, sqt, in_rows, D, BLOCK_D, UPCAST)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n0 in range(0, keys, BLOCK_N):
            k, v, kept = _load_keys(k_base, v_base, index_base, n0, keys, T, skt, svt, D, BLOCK_D, BLOCK_N, VARLEN, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            s = tl.where(kept[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.math.exp2(s - new_top[:, None])
            shrink = tl.math.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        some = total != 0
        total = tl.where(some, total, 1.0)
        lse = tl.where(some, (top + tl.math.log2(total)) * _LN2, float("-inf"))
        _store_rows(out_base + first * H * D, tile, H * D, in_rows, acc / total[:, None], D, BLOCK_D)
        tl.store(lse_base + first + tile, lse, mask=in_rows)


@triton.jit(do_not_specialize=["B", "T", "NUM", "TAIL"])
def dq_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, LENGTHS, INDEX,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sob, scale, scale_log2, B, H, T, NUM, TAIL,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(grad * out) for the dk/dv kernel that runs after it."""
    b, h, turn, turns = _program(B, H, NUM, TAIL)
    start, rows, keys = _segment(LENGTHS, b, B, T, VARLEN)
    q_base = Q + _offset(b, start, h, sqb, sqt, sqh)
    k_base = K + _offset(b, start, h, skb, skt, skh)
    v_base = V + _offset(b, start, h, svb, svt, svh)
    row_offset = _offset(b, start, h, sob, H * D, D)
    stats_offset = _stats_offset(b, start, h, H, T, VARLEN)
    index_base = INDEX + b.to(tl.int64) * T
    tile = tl.arange(0, BLOCK_M)
    for m0 in range(turn * BLOCK_M, rows, turns * BLOCK_M):
        first = tl.full([], m0, tl.int64)
        in_rows = tile < rows - m0
        here = row_offset + first * H * D
        q = _load_rows(q_base + first * sqt, tile, sqt, in_rows, D, BLOCK_D, UPCAST)
        grad = _load_rows(GRAD + here, tile, H * D, in_rows, D, BLOCK_D, UPCAST)
        out = _load_rows(OUT + here, tile, H * D, in_rows, D, BLOCK_D, UPCAST)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        lse2 = tl.load(LSE + stats_offset + first + tile, mask=in_rows, other=float("inf")) * _LOG2E
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n0 in range(0, keys, BLOCK_N):
            k, v, kept = _load_keys(k_base, v_base, index_base, n0, keys, T, skt, svt, D, BLOCK_D, BLOCK_N, VARLEN, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            p = tl.where(kept[None, :], tl.math.exp2(s - lse2[:, None]), 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        _store_rows(DQ + here, tile, H * D, in_rows, dq * scale, D, BLOCK_D)
        tl.store(DELTA + stats_offset + first + tile, delta, mask=in_rows)


@triton.jit(do_not_specialize=["B", "T", "NUM", "TAIL"])
def dkv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, LENGTHS, INDEX,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sob, scale, scale_log2, B, H, T, NUM, TAIL,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VARLEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values.

    The index also lists the dropped keys, after the kept ones, so that they are zeroed here.
    """
    b, h, turn, turns = _program(B, H, NUM, TAIL)
    start, rows, keys = _segment(LENGTHS, b, B, T, VARLEN)
    q_base = Q + _offset(b, start, h, sqb, sqt, sqh)
    k_base = K + _offset(b, start, h, skb, skt, skh)
    v_base = V + _offset(b, start, h, svb, svt, svh)
    row_offset = _offset(b, start, h, sob, H * D, D)
    stats_offset = _stats_offset(b, start, h, H, T, VARLEN)
    index_base = INDEX + b.to(tl.int64) * T
    tile = tl.arange(0, BLOCK_M)
    for n0 in range(turn * BLOCK_N, rows, turns * BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        in_rows = n < rows
        kept = n < keys
        if not VARLEN:
            n = tl.load(index_base + n, mask=in_rows, other=0)
        k = _load_rows(k_base, n, skt, kept, D, BLOCK_D, UPCAST)
        v = _load_rows(v_base, n, svt, kept, D, BLOCK_D, UPCAST)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        queries = tl.where(n0 < keys, rows, 0)
        for m0 in range(0, queries, BLOCK_M):
            m = m0 + tile
            asks = m < rows
            q = _load_rows(q_base, m, sqt, asks, D, BLOCK_D, UPCAST)
            grad = _load_rows(GRAD + row_offset, m, H * D, asks, D, BLOCK_D, UPCAST)
            lse2 = tl.load(LSE + stats_offset + m, mask=asks, other=float("inf")) * _LOG2E
            delta = tl.load(DELTA + stats_offset + m, mask=asks, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # transposed: [BLOCK_N, BLOCK_M]
            p = tl.where(kept[:, None], tl.math.exp2(s - lse2[None, :]), 0.0)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        # An infinite gradient times a zero weight would be NaN in a dropped row.
        dk = tl.where(kept[:, None], dk * scale, 0.0)
        dv = tl.where(kept[:, None], dv, 0.0)
        wide = n.to(tl.int64)
        _store_rows(DK + row_offset, wide, H * D, in_rows, dk, D, BLOCK_D)
        _store_rows(DV + row_offset, wide, H * D, in_rows, dv, D, BLOCK_D)


def configs(block_d: int, itemsize: int, typical: int, varlen: bool) -> dict[str, Config]:
    """The tiles of each kernel, from a fixed table; autotuning would make the first steps slow and the results vary.

    block_d: head width padded to a power of two; itemsize: bytes per number; typical: tokens in a typical segment.
    The entries compile for sm_90 without register spills (tested); long segments get larger tiles. The 16-bit entries for heads
    up to 64 wide were the fastest on an H100; the largest, the forward of long images, keeps up to 16 bytes outside of registers,
    depending on the version of Triton.
    """
    if itemsize > 2:  # IEEE float32 dots use no tensor core: small tiles keep the registers
        forward = Config(32, 16 if varlen else 32, 4, 2)
        return {"forward": forward, "dq": Config(16, 32, 4, 2), "dkv": Config(16, 32, 8, 2)}
    if block_d <= 64 and typical <= 192:
        return {"forward": Config(64, 64, 4, 2), "dq": Config(64, 64, 4, 2), "dkv": Config(32, 64, 4, 2)}
    if block_d <= 64:
        forward = Config(128, 32 if varlen else 64, 4, 3)
        return {"forward": forward, "dq": Config(128, 32, 8, 2), "dkv": Config(32, 64, 4, 3)}
    forward = Config(64, 32, 4, 2) if typical <= 192 else Config(128, 64, 8, 2)
    return {"forward": forward, "dq": Config(64, 64, 8, 2), "dkv": Config(32, 64, 8, 2)}


class Problem(NamedTuple):
    """The sizes of one call. ``q`` is [T, H, D] when varlen, else [B, H, N, D]; ``rows`` is T or N."""

    varlen: bool
    batch: int
    heads: int
    rows: int
    dim: int
    max_len: int

    @staticmethod
    def of(q: Tensor, lengths: Tensor, max_len: int) -> "Problem":
        """The sizes of a call on these queries; arguments as in ``attention_forward``."""
        if q.dim() == 3:
            return Problem(True, lengths.shape[0] - 1, q.shape[1], q.shape[0], q.shape[2], max(1, min(max_len, q.shape[0])))
        return Problem(False, q.shape[0], q.shape[1], q.shape[2], q.shape[3], q.shape[2])

    @property
    def typical(self) -> int:
        """Tokens of an average segment or image."""
        return self.rows // max(self.batch, 1) if self.varlen else self.rows

    def programs(self, block: int) -> tuple[int, int]:
        """Return the number of programs that share the blocks of a segment and head, and of those for the padding of a head.

        If there are enough programs to fill a GPU, this is the number of blocks of a typical segment: programs for rare
        lengths would start and stop without work.
        """
        blocks = triton.cdiv(self.max_len, block)
        if not self.varlen:
            return blocks, 0
        if self.batch * self.heads * blocks > _FULL_GRID:
            blocks = max(1, min(blocks, self.typical // block))
        return blocks, triton.cdiv(self.rows, 8 * block)

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """(image, token, head) strides."""
        return (0, x.stride(0), x.stride(1)) if self.varlen else (x.stride(0), x.stride(2), x.stride(1))

    def empty(self, like: Tensor) -> Tensor:
        """Allocate an output with tokens before heads in memory, so that joining the heads afterwards needs no copy."""
        if self.varlen:
            return like.new_empty(self.rows, self.heads, self.dim)
        return like.new_empty(self.batch, self.rows, self.heads, self.dim).transpose(1, 2)

    def ordered(self, x: Tensor) -> Tensor:
        """The tensor in the memory order of ``empty``."""
        return x.contiguous() if self.varlen else x.transpose(1, 2).contiguous().transpose(1, 2)

    def stats(self, like: Tensor) -> Tensor:
        """Memory for one float32 number per row and head, as lse and delta are."""
        shape = (self.heads, self.rows) if self.varlen else (self.batch, self.heads, self.rows)
        return like.new_empty(shape, dtype=torch.float32)


def _launch(
    kernel: triton.KernelInterface, name: str, problem: Problem, tensors: tuple[Tensor, ...], qkv: tuple[Tensor, ...],
    *scales: float,
) -> None:  # fmt: skip
    q = qkv[0]
    block_d = max(16, triton.next_power_of_2(problem.dim))
    config = configs(block_d, q.element_size(), problem.typical, problem.varlen)[name]
    block = config.block_n if name == "dkv" else config.block_m
    blocks, tail = problem.programs(block)
    grid = (problem.batch * blocks + tail) * problem.heads
    strides = [stride for x in qkv for stride in problem.strides(x)]
    image_stride = 0 if problem.varlen else problem.rows * problem.heads * problem.dim
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    if grid == 0 or problem.rows == 0:
        return
    with on_device(q.device):
        kernel[(grid,)](
            *tensors, *strides, image_stride, *scales, problem.batch, problem.heads, problem.rows, blocks, tail,
            D=problem.dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            VARLEN=problem.varlen, UPCAST=not q.is_cuda, PRECISION=precision,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, index: Tensor, max_len: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse. lengths: cu_seqlens of segments, or the key counts of images whose kept keys ``index`` lists."""
    q, k, v = map(_dense_last, (q, k, v))
    problem = Problem.of(q, lengths, max_len)
    out, lse = problem.empty(q), problem.stats(q)
    _launch(forward_kernel, "forward", problem, (q, k, v, out, lse, lengths, index), (q, k, v), scale * _LOG2E.value)
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Tensor, index: Tensor, max_len: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv; arguments as in ``attention_forward``."""
    q, k, v = map(_dense_last, (q, k, v))
    problem = Problem.of(q, lengths, max_len)
    grad, out = problem.ordered(grad), problem.ordered(out)
    dq, dk, dv, delta = problem.empty(q), problem.empty(k), problem.empty(v), problem.stats(q)
    qkv, scales = (q, k, v), (scale, scale * _LOG2E.value)
    _launch(dq_kernel, "dq", problem, (q, k, v, out, grad, lse, delta, dq, lengths, index), qkv, *scales)
    _launch(dkv_kernel, "dkv", problem, (q, k, v, grad, lse, delta, dk, dv, lengths, index), qkv, *scales)
    return dq, dk, dv
