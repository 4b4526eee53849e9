"""The backward pass of the eager engine, with gradients derived by hand.

See :mod:`~fastflow_kernels.engines.eager`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines.chunks import (
    accumulate,
    chunk_sizes,
    chunks_of,
    flat,
    resized,
    scratch,
)
from fastflow_kernels.engines.constants import constant
from fastflow_kernels.engines.eager_affine import gather, rows_kept_together, scale_and_offset
from fastflow_kernels.engines.plain import log_slope, split_at
from fastflow_kernels.engines.soft_clamp import SoftClamp


def backward(
    x: Tensor,
    a: Tensor,
    grads: OutputGrads,
    coupling: Coupling,
    want_params: bool,
    is_inverting: bool,
) -> CouplingGrads:
    """Compute the gradients of the forward pass, or with ``is_inverting`` the inverse as well.

    With ``is_inverting`` the active channels of x hold u in the dtype of the computation, and x is
    written over them.
    """
    acc_dtype = accumulator(promoted(x, a, coupling.global_scale))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    clamp = SoftClamp.of(coupling, x)
    x, a, dy = flat(x), flat(a), flat(grads.y)
    samples, pairs = chunk_sizes(x, acc_dtype, rows_kept_together(coupling))
    step = _BackwardStep(coupling, clamp, acc_dtype, want_params, is_inverting, (samples, pairs))
    direct = [] if coupling.spec.gin else step.direct_gradient(grads.log_det)
    for chunk in chunks_of(0, samples, x, a, dy, flat(dx), flat(da), *direct):
        step.run(*chunk)
    pixels = coupling.rows_per_sample * x.shape[2]
    return CouplingGrads(dx, da, *step.parameter_gradients(grads.log_det, pixels))


@dataclass
class _BackwardStep:
    """The backward pass over one chunk of samples, and sums over the chunks for the parameters.

    Attributes:
        coupling, want_params: The arguments of :func:`backward`.
        clamp: The soft clamp.
        dtype: The dtype of the computation.
        is_inverting: See :func:`backward`.
        chunk: The size of a chunk: samples, and channel pairs of each.
        offset_sum: Sum of dv per channel over the chunks so far: the gradient of the offset.
        product_sum: Sum of du * u per channel over the chunks so far: the gradient of log(scale).
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
        self.scale, _ = scale_and_offset(self.coupling, self.dtype)
        self.want_scale = self.want_params and self.scale is not None

    def direct_gradient(self, dlog_det: Tensor | None) -> list[Tensor]:
        """Return the log-determinant's part of the gradient of s, times the slope factor.

        It is the same for every s of a row: (B, 1, 1).

        Args:
            dlog_det: The gradient of the log-determinant, (samples,), or None.

        Returns:
            A list of one tensor, or of none if ``dlog_det`` is None.
        """
        if dlog_det is None:
            return []
        if self.coupling.rows_per_sample > 1:
            dlog_det = dlog_det.repeat_interleave(self.coupling.rows_per_sample)
        return [cast(dlog_det, self.dtype).mul(self.clamp.slope_factor).view(-1, 1, 1)]

    def run(
        self, x: Tensor, a: Tensor, dy: Tensor, dx: Tensor, da: Tensor, *direct: Tensor
    ) -> None:
        """Write the gradients of a chunk to dx and da, and add its part to the sums.

        Args:
            x, a, dy: The chunk of the inputs; dy is the gradient of y.
            dx, da: The chunk of the results.
            direct: The chunk of what :meth:`direct_gradient` returned.
        """
        x, a = cast(x, self.dtype), cast(a, self.dtype)
        dv = gather(dy, self.coupling.inv, dx, self.dtype)
        da_acc = da if da.dtype is self.dtype else torch.empty_like(a)
        if self.want_params:
            self.offset_sum = accumulate(self.offset_sum, dv.sum((0, 2)))
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
        halves = (*split_at(a, active, active), *split_at(da_acc, active, active))
        for x2_j, du2_j, a_s, a_t, ds, dt in chunks_of(1, pairs, x2, du2, *halves):
            exp_j, slope_j = resized(exp, a_s), resized(slope, a_s)
            self.clamp.exp_and_slope(a_s, exp_j, slope_j, self.is_inverting)
            # dt serves as scratch until its own values are written.
            if self.want_scale:
                u_or_shift = x2_j if self.is_inverting else a_t
                product = torch.mul(du2_j, u_or_shift, out=dt).sum((0, 2))
            torch.mul(du2_j, constant(0.1, self.dtype), out=dt)
            if self.is_inverting:
                torch.mul(du2_j, x2_j.sub_(a_t, alpha=0.1), out=ds)  # u - 0.1 * a_t = x * exp(s)
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
            self.product_sum = accumulate(self.product_sum, torch.cat(products))
        if dx.dtype is not self.dtype:
            dx.copy_(du)
        if da_acc is not da:
            da.copy_(da_acc)

    def _finish_slope(self, ds: Tensor, slope: Tensor, *direct: Tensor) -> None:
        """Turn the gradient of s into the gradient of a_s, in place."""
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
        """Return the gradients of global_scale and global_offset; None if not wanted.

        Args:
            dlog_det: The gradient of the log-determinant, (samples,), or None.
            pixels: Pixels of a sample.
        """
        g, offset = self.coupling.parameters
        doffset = self.offset_sum
        if doffset is not None:
            doffset = cast(doffset, offset.dtype).view(offset.shape)
        dlog_scale = self.product_sum
        if dlog_scale is None or self.scale is None:
            return None, doffset
        if dlog_det is not None:
            # Plain PyTorch sums with the same operation in the same dtype. A float64 sum would not
            # work on every device.
            dlog_scale = dlog_scale.add_(cast(dlog_det, self.dtype).sum(), alpha=pixels)
        dg = dlog_scale.mul_(log_slope(self.scale.view(-1), self.coupling.spec.activation))
        return cast(dg, g.dtype).view(g.shape), doffset
