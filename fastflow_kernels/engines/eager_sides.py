"""The eager engine for one side of a coupling block: x is the active half alone.

See :mod:`~fastflow_kernels.engines.eager`. The shift's factor is 1 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines.chunks import chunk_sizes, chunks_of, flat, resized, scratch
from fastflow_kernels.engines.constants import constant
from fastflow_kernels.engines.plain import split_at
from fastflow_kernels.engines.soft_clamp import SoftClamp


def transform(x: Tensor, a: Tensor, coupling: Coupling, out: Tensor, sign: float) -> Tensor:
    """Write the transformed x to ``out``, and return the log-determinant (B,) in nats.

    Args:
        x: (B, C, *S), for the inverse y.
        a: The coefficients, (B, 2*C, *S), or a_s alone.
        coupling: What to compute.
        out: (B, C, *S), for the inverse x.
        sign: 1.0, or -1.0 for the inverse.
    """
    acc_dtype = accumulator(promoted(x, a, coupling.shift))
    clamp, kept = SoftClamp.of(coupling, x), coupling.exp
    x, a, out = _flat(x), _flat(a), _flat(out)
    if coupling.shift is None:
        halves = split_at(a, x.shape[1], x.shape[1])
    else:
        halves = a, _flat(coupling.shift)
    samples, channels = _chunk_sizes(x, acc_dtype, coupling)
    shape = samples, channels, *x.shape[2:]
    s, *work = scratch.take(x, acc_dtype, *[shape] * (1 + clamp.buffers))
    tensors = [x, out, *halves]
    sums: list[Tensor] = []
    for chunk in chunks_of(0, samples, *tensors, *([] if kept is None else [_flat(kept)])):
        total: Tensor | None = None
        for x_j, out_j, a_s, a_t, *kept_j in chunks_of(1, channels, *chunk):
            x_j, a_s, a_t = cast(x_j, acc_dtype), cast(a_s, acc_dtype), cast(a_t, acc_dtype)
            s_j = kept_j[0] if kept_j else resized(s, a_s)
            clamp.log_factors(a_s, sign, s_j, *[resized(t, a_s) for t in work])
            if not clamp.spec.gin:
                sum_s = s_j.sum(1 if s_j.dim() == 2 else (1, 2))
                total = sum_s if total is None else total.add_(sum_s)
            exp_s, u = clamp.exp_(s_j), out_j if out_j.dtype is acc_dtype else resized(s, a_s)
            if sign > 0.0:
                torch.addcmul(a_t, x_j, exp_s, out=u)
            else:
                torch.mul(torch.sub(x_j, a_t, out=resized(work[0], a_s)), exp_s, out=u)
            if u is not out_j:
                out_j.copy_(u)
        sums += [] if total is None else [total]
    if clamp.spec.gin:
        return torch.zeros(x.shape[0], dtype=acc_dtype, device=x.device)
    log_det = sums[0] if len(sums) == 1 else torch.cat(sums)
    return log_det.mul_(clamp.unit) if clamp.is_fast else log_det


def backward(
    x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling, dx: Tensor | None
) -> CouplingGrads:
    """Compute the gradients, which are those of x and a alone."""
    acc_dtype = accumulator(promoted(x, a))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    clamp, active = SoftClamp.of(coupling, x), x.shape[1]
    x, a_s, halves = _flat(x), _flat(a).narrow(1, 0, active), _flat(da).split(active, 1)
    samples, channels = _chunk_sizes(x, acc_dtype, coupling)
    shape = samples, channels, *x.shape[2:]
    exp, slope, *work = scratch.take(x, acc_dtype, *[shape] * (1 + clamp.buffers))
    tensors = [x, _flat(grads.y), _flat(dx), a_s, *halves]
    kept = [] if coupling.exp is None else [_flat(coupling.exp)]
    direct = [t.view(-1, *[1] * (x.dim() - 1)) for t in _direct(grads.log_det, clamp, acc_dtype)]
    for chunk in chunks_of(0, samples, *tensors, *kept, *direct):
        whole = chunk[: len(tensors) + len(kept)]
        direct_i = chunk[len(whole) :]
        for x_j, dy_j, dx_j, a_j, ds, *more in chunks_of(1, channels, *whole):
            x_j, dy_j, a_j = cast(x_j, acc_dtype), cast(dy_j, acc_dtype), cast(a_j, acc_dtype)
            exp_j, slope_j = resized(exp, a_j), resized(slope, a_j)
            if kept:
                exp_j = more[-1]
                clamp.slope(a_j, slope_j)
            else:
                clamp.exp_and_slope(a_j, exp_j, slope_j, False, *[resized(t, a_j) for t in work])
            if len(halves) > 1:
                more[0].copy_(dy_j)
            if dx_j.dtype is acc_dtype:
                dx_acc = torch.mul(dy_j, exp_j, out=dx_j)
            else:
                dx_acc = dy_j * exp_j
                dx_j.copy_(dx_acc)
            # In scratch: where the samples of ds have gaps, an operation takes twice as long.
            ds_acc = torch.mul(dx_acc, x_j, out=resized(exp, a_j))
            if clamp.spec.gin:
                clamp.subtract_mean_(ds_acc)
            elif direct_i:
                ds_acc.add_(direct_i[0])
            clamp.times_slope_(ds_acc, slope_j)
            if ds.dtype is acc_dtype:
                torch.mul(ds_acc, constant(clamp.slope_factor, acc_dtype), out=ds)
            else:
                ds.copy_(ds_acc.mul_(constant(clamp.slope_factor, acc_dtype)))
    return CouplingGrads(dx, da, None, None)


def _chunk_sizes(x: Tensor, dtype: torch.dtype, coupling: Coupling) -> tuple[int, int]:
    """Return how many samples, and how many channels of each, form a chunk.

    GIN's mean over the channels of a pixel keeps them together.
    """
    return chunk_sizes(x, dtype, 1 if coupling.spec.gin else 0, x.shape[1])


def _direct(dlog_det: Tensor | None, clamp: SoftClamp, dtype: torch.dtype) -> list[Tensor]:
    """Return the gradient of the log-determinant for each row, or nothing for GIN and None."""
    if dlog_det is None or clamp.spec.gin:
        return []
    if clamp.rows_per_sample > 1:
        dlog_det = dlog_det.repeat_interleave(clamp.rows_per_sample)
    return [cast(dlog_det, dtype)]


def _flat(t: Tensor) -> Tensor:
    """Return t, (B, C, *S), as (B, C) or (B, C, P)."""
    return t if t.dim() == 2 else flat(t)
