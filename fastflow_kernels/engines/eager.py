"""The engine in PyTorch, hand-derived: the fast path of CPUs, and the fallback elsewhere.

The functions satisfy :class:`~fastflow_kernels.engines.Engine`, whose docstrings say what they
take. The formula stands in :mod:`~fastflow_kernels.engines.plain`.

Tensors are walked in chunks that stay in the cache. An arithmetic pass there takes 0.05 to 0.1 ns
an element (float32, one thread of an AMD EPYC with AVX-512), ``x[:, p]`` 1.1 to 3.9, index_select
0.1 to 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines.chunks import chunk_sizes, chunks_of, flat, resized, scratch
from fastflow_kernels.engines.constants import constant
from fastflow_kernels.engines.plain import activated, split_at
from fastflow_kernels.engines.soft_clamp import SoftClamp
from fastflow_kernels.torch_private import versions_counted

# --- forward --------------------------------------------------------------------------------------


def forward(x: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    """Coupling, global affine and permutation in one walk over memory."""
    perm = coupling.perm
    y = torch.empty(x.shape, dtype=promoted(x, a, coupling.global_scale), device=x.device)
    wide = accumulator(y.dtype)
    scale, offset = _global_affine(coupling, wide)
    clamp = SoftClamp.of(coupling, x)
    x, a, out = flat(x), flat(a), flat(y)
    batch, channels, pixels = x.shape
    active = channels // 2
    samples, pairs = chunk_sizes(x, wide, _together(coupling))
    is_in_place = perm is None and y.dtype is wide  # nothing moves: work where the result belongs
    shapes = [(samples, pairs, pixels)] * 2
    if not is_in_place:
        shapes.append((samples, channels, pixels))
    s, t, *moved = scratch.take(x, wide, *shapes)
    sums: list[Tensor] = []
    for x_i, a_i, y_i in chunks_of(0, samples, x, a, out):
        x_i, a_i, v = cast(x_i, wide), cast(a_i, wide), y_i
        if not is_in_place:
            v = resized(moved[0], x_i)
        x1, x2 = split_at(x_i, channels - active, active)
        v1, v2 = split_at(v, channels - active, active)
        total: Tensor | None = None
        for x2_j, v2_j, a_s, a_t in chunks_of(1, pairs, x2, v2, *split_at(a_i, active, active)):
            s_j = clamp.log_factors(a_s, 1.0, resized(s, a_s), resized(t, a_s))
            total = _summed(total, s_j, clamp)
            torch.mul(x2_j, clamp.exp_(s_j), out=v2_j).add_(a_t, alpha=0.1)
        if scale is None:
            v1.copy_(x1)
            v.add_(offset)
        elif pixels == 1:
            v1.copy_(x1)
            torch.addcmul(offset, v, scale, out=v)
        else:  # where addcmul is three times slower than two passes
            scale1, scale2 = split_at(scale, channels - active, active)
            torch.mul(x1, scale1, out=v1)
            v2.mul_(scale2)
            v.add_(offset)
        if not is_in_place:
            _store_permuted(v, perm, y_i)
        sums += [] if total is None else [total]
    return y, _log_det(sums, scale, pixels, clamp, 1.0)


def _global_affine(coupling: Coupling, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """scale and offset as (1, C, 1); scale is None for GIN."""
    offset = cast(coupling.global_offset, dtype).view(1, -1, 1)
    if coupling.spec.gin:
        return None, offset
    g = cast(coupling.global_scale, dtype).view(1, -1, 1)
    return activated(g, coupling.spec.activation), offset


def _together(coupling: Coupling) -> int:
    """Rows that must not be parted: those that share a mean."""
    return coupling.rows_per_sample if coupling.spec.gin else 0


def _store_permuted(v: Tensor, perm: Tensor | None, out: Tensor) -> None:
    if perm is not None and v.dtype is out.dtype:
        torch.index_select(v, 1, perm, out=out)
    else:
        out.copy_(v if perm is None else v.index_select(1, perm))


def _summed(total: Tensor | None, s: Tensor, clamp: SoftClamp) -> Tensor:
    """The sums of s per sample until now.

    For GIN zero, or NaN where a coefficient was, because then every s of the sample is; there a
    sample is one chunk.
    """
    if clamp.spec.gin:
        return s[:, :1, :1].sum((1, 2)).mul_(0.0)
    return _accumulated(total, s.sum((1, 2)))


def _log_det(
    sums: list[Tensor], scale: Tensor | None, pixels: int, clamp: SoftClamp, sign: float
) -> Tensor:
    """The chunks' sums of sign * s, in nats, and sign * P * sum(log(scale))."""
    sum_s = sums[0] if len(sums) == 1 else torch.cat(sums)
    if scale is None:
        return sum_s
    sum_s = sum_s.mul_(clamp.unit) if clamp.is_fast else sum_s
    return sum_s.add_(scale.log().sum(), alpha=sign * pixels)


# --- backward -------------------------------------------------------------------------------------


def backward(
    x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling, want_params: bool
) -> CouplingGrads:
    """Gradients of :func:`forward`; tanh and exp are computed again."""
    return _backward(x, a, grads, coupling, want_params, False)


def _backward(
    x: Tensor,
    a: Tensor,
    grads: OutputGrads,
    coupling: Coupling,
    want_params: bool,
    is_inverting: bool,
) -> CouplingGrads:
    """:func:`backward`; or :func:`invert_and_backward`.

    Where it is inverting, the active channels of x hold u, in the accumulator's dtype, and x is
    written there.
    """
    wide = accumulator(promoted(x, a, coupling.global_scale))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    clamp = SoftClamp.of(coupling, x)
    x, a, dy = flat(x), flat(a), flat(grads.y)
    samples, pairs = chunk_sizes(x, wide, _together(coupling))
    step = _BackwardStep(coupling, clamp, wide, want_params, is_inverting, (samples, pairs))
    direct = [] if coupling.spec.gin else step.direct_gradient(grads.log_det)
    for chunk in chunks_of(0, samples, x, a, dy, flat(dx), flat(da), *direct):
        step.run(*chunk)
    pixels = coupling.rows_per_sample * x.shape[2]
    return CouplingGrads(dx, da, *step.parameter_gradients(grads.log_det, pixels))


@dataclass
class _BackwardStep:
    """The backward pass over one chunk of samples, and the parameters' gradients of all chunks.

    Attributes:
        chunk: Samples, and channel pairs of each, that a pass works on.
        offset_sum: Sum of dv per channel, over the chunks until now.
        product_sum: Sum of du * u per channel, likewise: the gradient of log(scale).
    """

    coupling: Coupling
    clamp: SoftClamp
    dtype: torch.dtype
    want_params: bool
    is_inverting: bool
    chunk: tuple[int, int]
    offset_sum: Tensor | None = None
    product_sum: Tensor | None = None

    def __post_init__(self) -> None:
        self.scale, _ = _global_affine(self.coupling, self.dtype)
        self.want_scale = self.want_params and self.scale is not None

    def direct_gradient(self, dlog_det: Tensor | None) -> list[Tensor]:
        """What every s of a row gets from the log-determinant, times the slope factor."""
        if dlog_det is None:
            return []
        if self.coupling.rows_per_sample > 1:
            dlog_det = dlog_det.repeat_interleave(self.coupling.rows_per_sample)
        return [cast(dlog_det, self.dtype).mul(self.clamp.slope_factor).view(-1, 1, 1)]

    def run(
        self, x: Tensor, a: Tensor, dy: Tensor, dx: Tensor, da: Tensor, *direct: Tensor
    ) -> None:
        x, a = cast(x, self.dtype), cast(a, self.dtype)
        dv = _gathered(dy, self.coupling.inv, dx, self.dtype)
        da_wide = da if da.dtype is self.dtype else torch.empty_like(a)
        if self.want_params:
            self.offset_sum = _accumulated(self.offset_sum, dv.sum((0, 2)))
        du = dv if self.scale is None else dv.mul_(self.scale)  # dv is not read again
        active = x.shape[1] // 2
        passive = x.shape[1] - active
        x1, x2 = split_at(x, passive, active)
        du1, du2 = split_at(du, passive, active)
        samples, pairs = self.chunk
        exp, slope = scratch.take(x, self.dtype, *[(samples, pairs, x.shape[2])] * 2)
        products: list[Tensor] = []
        if self.want_scale:
            for du1_j, x1_j in chunks_of(1, pairs, du1, x1):
                products.append(torch.mul(du1_j, x1_j, out=resized(exp, x1_j)).sum((0, 2)))
        halves = (*split_at(a, active, active), *split_at(da_wide, active, active))
        for x2_j, du2_j, a_s, a_t, ds, dt in chunks_of(1, pairs, x2, du2, *halves):
            exp_j, slope_j = resized(exp, a_s), resized(slope, a_s)
            self.clamp.exp_and_slope(a_s, exp_j, slope_j, self.is_inverting)
            # dt is free until its own values are written
            if self.want_scale:
                u_or_shift = x2_j if self.is_inverting else a_t
                product = torch.mul(du2_j, u_or_shift, out=dt).sum((0, 2))
            torch.mul(du2_j, constant(0.1, self.dtype), out=dt)
            if self.is_inverting:
                torch.mul(du2_j, x2_j.sub_(a_t, alpha=0.1), out=ds)  # u - 0.1 a_t is x exp(s)
                x2_j.div_(exp_j)
                du2_j.mul_(exp_j)
            else:
                torch.mul(du2_j.mul_(exp_j), x2_j, out=ds)
            if self.want_scale:
                if not self.is_inverting:
                    product = torch.add(ds.sum((0, 2)), product, alpha=0.1)
                products.append(product)
            self._finish_slope(ds, slope_j, *direct)
        if self.want_scale:
            self.product_sum = _accumulated(self.product_sum, torch.cat(products))
        if dx.dtype is not self.dtype:
            dx.copy_(du)
        if da_wide is not da:
            da.copy_(da_wide)

    def _finish_slope(self, ds: Tensor, slope: Tensor, *direct: Tensor) -> None:
        """From the gradient of s to that of a_s, in place."""
        factor = self.clamp.slope_factor
        if self.coupling.spec.gin:
            self.clamp.subtract_mean_(ds).mul_(constant(factor, self.dtype))
        elif direct:
            torch.add(direct[0], ds, alpha=factor, out=ds)
        else:
            ds.mul_(constant(factor, self.dtype))
        self.clamp.times_slope_(ds, slope)

    def parameter_gradients(
        self, dlog_det: Tensor | None, pixels: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of global_scale and global_offset; None where they are not wanted."""
        g, offset = self.coupling.global_scale, self.coupling.global_offset
        doffset = self.offset_sum
        if doffset is not None:
            doffset = cast(doffset, offset.dtype).view(offset.shape)
        dlog_scale = self.product_sum
        if dlog_scale is None or self.scale is None:
            return None, doffset
        if dlog_det is not None:
            # summed as plain PyTorch sums it, by the same operation in the same dtype: no device
            # needs to have float64
            dlog_scale = dlog_scale.add_(cast(dlog_det, self.dtype).sum(), alpha=pixels)
        dg = dlog_scale.mul_(_log_slope(self.scale.view(-1), self.coupling.spec.activation))
        return cast(dg, g.dtype).view(g.shape), doffset


def _log_slope(scale: Tensor, activation: str) -> Tensor | float:
    """d log(scale) / d g, from the scale; finite also where that has underflowed to 0."""
    if activation == "SIGMOID":
        return 1.0 - 0.1 * scale
    if activation == "SOFTPLUS":  # 0.1 * sigmoid(g / 2) / scale, by way of the scale
        scale = scale.clamp_min(1e-30)
        return torch.mul(scale, -5.0).expm1_().div_(scale).mul_(-0.1)
    assert activation == "EXP"
    return 1.0


def _accumulated(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _gathered(dy: Tensor, inv: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:
    """dy[:, inv] in the given dtype: in ``out`` where that has it, otherwise in a new tensor."""
    if out.dtype is not dtype:
        return dy.to(dtype, copy=True) if inv is None else cast(dy, dtype).index_select(1, inv)
    if inv is not None and dy.dtype is dtype:
        return torch.index_select(dy, 1, inv, out=out)
    return out.copy_(dy if inv is None else dy.index_select(1, inv))


# --- inverse --------------------------------------------------------------------------------------


def invert_passive(y: Tensor, coupling: Coupling) -> Tensor:
    """First half of the inverse; in float32 and float64 the active channels of x hold u."""
    with versions_counted():
        x = torch.empty(y.shape, dtype=promoted(y, coupling.global_scale), device=y.device)
    wide = accumulator(x.dtype)
    scale, offset = _global_affine(coupling, wide)
    y, out = flat(y), flat(x)
    passive = y.shape[1] - y.shape[1] // 2
    samples, _ = chunk_sizes(y, wide, 1)
    for y_i, x_i in chunks_of(0, samples, y, out):
        # all channels at once; in half precision only the passive ones are kept, because a second
        # rounding would hurt the others
        u = _gathered(y_i, coupling.inv, x_i, wide).sub_(offset)
        if scale is not None:
            u.div_(scale)
        if x.dtype is not wide:
            x_i[:, :passive].copy_(u[:, :passive])
    return x


def invert_active(y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
    """Second half of the inverse: writes the active channels of x in place."""
    wide = accumulator(x.dtype)
    scale, offset = _global_affine(coupling, wide)
    clamp = SoftClamp.of(coupling, x)
    y, a, out = flat(y), flat(a), flat(x)
    batch, channels, pixels = out.shape
    active = channels // 2
    samples, pairs = chunk_sizes(out, wide, _together(coupling))
    s, t = scratch.take(x, wide, *[(samples, pairs, pixels)] * 2)
    sums: list[Tensor] = []
    for y_i, a_i, x_i in chunks_of(0, samples, y, a, out):
        x2 = x_i.narrow(1, channels - active, active)
        u2 = x2 if x2.dtype is wide else _active_u(y_i, coupling.inv, scale, offset)
        total = None
        halves = split_at(cast(a_i, wide), active, active)
        for u2_j, a_s, a_t in chunks_of(1, pairs, u2, *halves):
            s_j = clamp.log_factors(a_s, -1.0, resized(s, a_s), resized(t, a_s))
            total = _summed(total, s_j, clamp)
            u2_j.sub_(a_t, alpha=0.1).mul_(clamp.exp_(s_j))
        if u2 is not x2:
            x2.copy_(u2)
        sums += [] if total is None else [total]
    return _log_det(sums, scale, pixels, clamp, -1.0)


def _active_u(y: Tensor, inv: Tensor | None, scale: Tensor | None, offset: Tensor) -> Tensor:
    """(y[:, inv] - offset) / scale of the active channels, in the dtype of the offset."""
    passive, dtype = y.shape[1] - y.shape[1] // 2, offset.dtype
    if inv is None:
        u = y[:, passive:].to(dtype, copy=True)
    else:
        u = cast(y.index_select(1, inv[passive:]), dtype)
    u = u.sub_(offset[:, passive:])
    return u if scale is None else u.div_(scale[:, passive:])


def invert_and_backward(
    y: Tensor, x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling, want_params: bool
) -> CouplingGrads:
    """:func:`invert_active` and :func:`backward`, in one pass where x can hold u."""
    if x.dtype is accumulator(promoted(x, a, coupling.global_scale)) and x.is_contiguous():
        return _backward(x, a, grads, coupling, want_params, True)
    invert_active(y, x, a, coupling)
    return backward(x, a, grads, coupling, want_params)
