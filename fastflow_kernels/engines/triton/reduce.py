"""Sums: of a sample ahead of GIN's main pass, and of the partial results that the main passes
leave.

No atomics: every program writes its own partial result and one program adds them in order, so
results repeat bit for bit. Loops whose length is known at run time are ``while`` loops: ``range``
over a run-time value fails in the interpreter of Triton 3.6 with numpy 2.4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.engines.triton.launch import alignment, gin_parts, plan
from fastflow_kernels.engines.triton.math import (
    exp_of_factor,
    log_scale_of,
    scale_of,
    scale_slope,
    tanh_of_factor,
)
from fastflow_kernels.engines.triton.prepared import Launch
from fastflow_kernels.engines.triton.tiles import index, load

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
# The parameter sums wait for memory, not for arithmetic: few channels a program, that there be many
# of them, yet a 32-byte sector of float32; and so many groups at a time that all of them
# (launch.plan makes 512 at most, where it can) arrive in two turns.
_SUMS_BLOCK_C = 8
_SUMS_BLOCK_K = 256
_SUMS_WARPS = 8


@triton.jit
def _gin_sums_kernel(
    a_ptr, dy_ptr, x_ptr, inv_ptr, sums_ptr, B, P, stride_ab, stride_xb,
    C: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr, REVERSE: tl.constexpr,
    PARTS: tl.constexpr,
    MUL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per sample: sum of t = clamp * tanh(tanh_scale * a_s), and with dy the sum of dv2 * x2 *
    exp(t), where dv = dy[:, inv], and x2 is of x[:, inv] with REVERSE.

    Program (b, k) adds every PARTS-th tile of a sample, from tile k on. P and the strides come
    divided by MUL.

    a_ptr: (B, 2*C2, P), stride_ab between samples.
    dy_ptr: (B, C, P) contiguous, or None: then the second sum is left out.
    x_ptr: (B, C, P), stride_xb between samples, or None with dy.
    inv_ptr: int64 (C,), or None for the identity.
    sums_ptr: (1 or 2, B, PARTS), out.
    """
    P = P * MUL
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    b = (tl.program_id(0) // PARTS).to(tl.int64)
    k = tl.program_id(0) % PARTS
    a_ptr += b * stride_ab * MUL
    if dy_ptr is not None:
        dy_ptr += b * C * P
        x_ptr += b * stride_xb * MUL
    across = tl.cdiv(P, BLOCK_P)
    tiles = across * tl.cdiv(C2, BLOCK_C)
    sum_t = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    sum_h = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    tile = k
    while tile < tiles:
        c = (tile // across) * BLOCK_C + tl.arange(0, BLOCK_C)
        p = (tile % across) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        at = c[:, None] * P + p
        mask = (c < C2)[:, None] & (p < P)
        t = CLAMP * tanh_of_factor(TANH_SCALE * load(a_ptr + at, mask, ACC), CLAMP)
        sum_t += t
        if dy_ptr is not None:
            y_at = index(inv_ptr, C1 + c, c < C2)[:, None] * P + p
            x_at = y_at if REVERSE else C1 * P + at
            sum_h += (
                load(dy_ptr + y_at, mask, ACC)
                * load(x_ptr + x_at, mask, ACC)
                * exp_of_factor(t, CLAMP)
            )
        tile += PARTS
    tl.store(sums_ptr + (b * PARTS + k), tl.sum(sum_t))
    if dy_ptr is not None:
        tl.store(sums_ptr + ((b + B) * PARTS + k), tl.sum(sum_h))


@triton.jit
def _logdet_kernel(
    part_ptr, g_ptr, logdet_ptr, PART_COUNT, P,
    C: tl.constexpr, SIGN: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """logdet[b] = SIGN * (sum of part[b, :] + P * sum of log(activation(g))).

    part_ptr: (B, PART_COUNT) contiguous.
    g_ptr: (C,).
    logdet_ptr: (B,), out.
    """
    b = tl.program_id(0).to(tl.int64)
    part_ptr += b * PART_COUNT
    s = tl.zeros((BLOCK,), ACC)
    start = 0
    while start < PART_COUNT:
        i = start + tl.arange(0, BLOCK)
        s += load(part_ptr + i, i < PART_COUNT, ACC)
        start += BLOCK
    log_scale = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        log_scale += tl.where(c < C, log_scale_of(load(g_ptr + c, c < C, ACC), ACT), 0.0)
    tl.store(logdet_ptr + b, SIGN * (tl.sum(s) + P * tl.sum(log_scale)))


@triton.jit
def _params_bwd_kernel(
    part_ptr, dlogdet_ptr, g_ptr, dg_ptr, doffset_ptr, GROUPS, B, P, stride_l,
    C: tl.constexpr, ACT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """doffset = sum of part[0]; dg = (sum of part[1] + P * sum(dlogdet) / scale) * activation'(g).

    part_ptr: (2, GROUPS, C) contiguous; (1, GROUPS, C) for ACT = None (GIN).
    dlogdet_ptr: (B,) with stride_l, or None.
    g_ptr: (C,).
    dg_ptr, doffset_ptr: (C,), out; dg is None for ACT = None.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    doffset = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    dscale = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    start = 0
    while start < GROUPS:
        k = start + tl.arange(0, BLOCK_K)[:, None]
        mask = (k < GROUPS) & exists[None, :]
        doffset += load(part_ptr + (k.to(tl.int64) * C + c[None, :]), mask, ACC)
        if ACT is not None:
            dscale += load(part_ptr + ((GROUPS + k).to(tl.int64) * C + c[None, :]), mask, ACC)
        start += BLOCK_K
    tl.store(doffset_ptr + c, tl.sum(doffset, axis=0), mask=exists)
    if ACT is not None:
        g = load(g_ptr + c, exists, ACC)
        scale = scale_of(g, ACT)
        total = tl.sum(dscale, axis=0)
        if dlogdet_ptr is not None:
            # its rounding would be the same in every channel
            dlogdet = tl.zeros((BLOCK_K * BLOCK_C,), tl.float64)
            first = tl.full((), 0, tl.int64)  # for offsets beyond 2^31
            while first < B:
                b = first + tl.arange(0, BLOCK_K * BLOCK_C)
                dlogdet += load(dlogdet_ptr + b * stride_l, b < B, tl.float64)
                first += BLOCK_K * BLOCK_C
            total += (P * tl.sum(dlogdet)).to(ACC) / scale
        tl.store(dg_ptr + c, total * scale_slope(g, scale, ACT), mask=exists)


class GinSums:
    """Runs GIN's sums per sample ahead of the main pass: (1, B, parts), or with dy and x (2, B,
    parts); see the kernel.

    Args:
        channels, batch, pixels: Sizes of x.
        itemsize: Bytes of an element of a.
        stride_ab: Between samples of a.
        stride_xb: Between samples of x, or None without dy and x.
        spec: The coupling's constants.
        acc: Dtype of the sums.
    """

    def __init__(
        self,
        channels: int,
        batch: int,
        pixels: int,
        itemsize: int,
        stride_ab: int,
        stride_xb: int | None,
        spec: CouplingSpec,
        acc: torch.dtype,
    ) -> None:
        cut = plan(max(1, channels // 2), batch, pixels, max(itemsize, 4), None)
        self.parts = gin_parts(cut, batch)
        self.shape, self.acc = (1 if stride_xb is None else 2, batch, self.parts), acc
        mul = alignment(pixels, stride_ab, stride_xb or 0)
        self.launch = Launch(
            _gin_sums_kernel, batch * self.parts,
            (batch, pixels // mul, stride_ab // mul, (stride_xb or 0) // mul), cut.warps,
            C=channels, CLAMP=spec.clamp, TANH_SCALE=spec.tanh_scale, REVERSE=spec.reverse,
            PARTS=self.parts,
            MUL=mul, BLOCK_C=cut.block_c, BLOCK_P=cut.block_q, ACC=ACCUMULATORS[acc],
        )  # fmt: skip

    def __call__(
        self,
        is_aligned: bool,
        a: Tensor,
        inv: Tensor | None = None,
        dy: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        sums = torch.empty(self.shape, dtype=self.acc, device=a.device)
        self.launch(is_aligned, a, dy, x, inv, sums)
        return sums


def logdet_launch(
    batch: int,
    count: int,
    pixels: int,
    channels: int,
    spec: CouplingSpec,
    acc: torch.dtype,
    sign: float,
) -> Launch:
    """Adds the partial sums (B, count) of a main pass and the log of the scale to the
    log-determinant (B,).
    """
    return Launch(
        _logdet_kernel, batch, (count, pixels), 4,
        C=channels, SIGN=sign, ACT=spec.activation, BLOCK=256, BLOCK_C=256, ACC=ACCUMULATORS[acc],
    )  # fmt: skip


def params_launch(
    groups: int,
    batch: int,
    pixels: int,
    channels: int,
    stride_l: int,
    spec: CouplingSpec,
    acc: torch.dtype,
) -> Launch:
    """Adds the partial sums (1 or 2, groups, C) of the backward's main pass to the gradients of g
    (not for GIN) and offset.
    """
    return Launch(
        _params_bwd_kernel, -(-channels // _SUMS_BLOCK_C), (groups, batch, pixels, stride_l),
        _SUMS_WARPS,
        C=channels, ACT=None if spec.gin else spec.activation, BLOCK_K=_SUMS_BLOCK_K,
        BLOCK_C=_SUMS_BLOCK_C, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
