"""The backward pass of the eager engine, with gradients derived by hand.

See :mod:`~fastflow_kernels.engines.eager`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow_kernels.coupling import (
    Coupling,
    CouplingGrads,
    Halves,
    HalvesCouplingGrads,
    HalvesGrads,
    OutputGrads,
)
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
from fastflow_kernels.engines.eager_affine import (
    gather,
    parts_of,
    rows_kept_together,
    scale_and_offset,
)
from fastflow_kernels.engines.plain import log_slope, split, split_at
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
    step = _BackwardStep(coupling, SoftClamp.of(coupling, x), acc_dtype, want_params, is_inverting)
    x = flat(x)
    tensors = _Tensors(Halves(*split(x)), flat(a), (flat(grads.y),), (flat(dx),), flat(da))
    return CouplingGrads(dx, da, *step.run(tensors, grads.log_det))


def backward_halves(
    x: Halves, a: Tensor, grads: HalvesGrads, coupling: Coupling, want_params: bool
) -> HalvesCouplingGrads:
    """Compute the gradients of the forward pass between halves."""
    acc_dtype = accumulator(promoted(x.passive, x.active, a, coupling.global_scale))
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    step = _BackwardStep(coupling, SoftClamp.of(coupling, a), acc_dtype, want_params, False)
    dy = [grads.passive, grads.active] + ([] if grads.from_subnet is None else [grads.from_subnet])
    dx, parts = _empty_halves(x)
    x_flat = Halves(flat(x.passive), flat(x.active))
    tensors = _Tensors(x_flat, flat(a), tuple(map(flat, dy)), parts, flat(da))
    return HalvesCouplingGrads(dx, da, *step.run(tensors, grads.log_det))


def _empty_halves(x: Halves) -> tuple[Halves, tuple[Tensor, ...]]:
    """Return new halves like x, and what :class:`_Tensors` takes as dx.

    They are views of one tensor if that leaves no gap between samples that x has not.
    """
    batch, passive, *spatial = x.passive.shape
    active = x.active.shape[1]
    if batch == 1 or not (x.passive.is_contiguous() and x.active.is_contiguous()):
        shape = batch, passive + active, *spatial
        dx = torch.empty(shape, dtype=x.passive.dtype, device=x.passive.device)
        return Halves(*split_at(dx, passive, active)), (flat(dx),)
    halves = Halves(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in x))
    return halves, (flat(halves.passive), flat(halves.active))


@dataclass
class _Tensors:
    """Operands and results of a backward pass, with P pixels.

    Attributes:
        x: The input.
        a: The coefficients, (B, 2*C2, P).
        dy: The gradient of y, (B, C, P). Or those of its halves, and perhaps another one of its
            passive half, to be added.
        dx: Where to write the gradient of x, (B, C, P), or of its two halves.
        da: Where to write the gradient of a.
    """

    x: Halves
    a: Tensor
    dy: tuple[Tensor, ...]
    dx: tuple[Tensor, ...]
    da: Tensor

    def chunks(self, samples: int, *direct: Tensor) -> Iterator[tuple[_Tensors, list[Tensor]]]:
        """Yield chunks of samples, of the tensors and of ``direct``."""
        first = 4 + len(self.dx)
        last = first + len(self.dy)
        for chunk in chunks_of(0, samples, *self.x, self.a, self.da, *self.dx, *self.dy, *direct):
            x1, x2, a, da = chunk[:4]
            part = _Tensors(Halves(x1, x2), a, chunk[first:last], chunk[4:first], da)
            yield part, list(chunk[last:])


@dataclass
class _BackwardStep:
    """A backward pass, chunk by chunk, and sums over the chunks for the parameters.

    Attributes:
        coupling, want_params, is_inverting: The arguments of :func:`backward`.
        clamp: The soft clamp.
        dtype: The dtype of the computation.
        offset_sum: Sum of dv per channel over the chunks so far: the gradient of the offset.
        product_sum: Sum of du * u per channel over the chunks so far: the gradient of log(scale).
    """

    coupling: Coupling
    clamp: SoftClamp
    dtype: torch.dtype
    want_params: bool
    is_inverting: bool
    offset_sum: Tensor | None = None
    product_sum: Tensor | None = None

    def __post_init__(self) -> None:
        self.scale, _ = scale_and_offset(self.coupling, self.dtype)
        self.want_scale = self.want_params and self.scale is not None

    def run(
        self, tensors: _Tensors, dlog_det: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of x and a, and return those of global_scale and global_offset.

        Args:
            tensors: Operands and results.
            dlog_det: The gradient of the log-determinant, (samples,), or None.
        """
        x = tensors.x
        passive, active, pixels = x.passive.shape[1], *x.active.shape[1:]
        keep_together = rows_kept_together(self.coupling)
        samples, pairs = chunk_sizes(x.active, self.dtype, keep_together, max(1, active))
        shapes = [(samples, pairs, pixels)] * 2
        if len(tensors.dy) > 1:
            shapes.append((samples, passive + active, pixels))
        work = scratch.take(tensors.a, self.dtype, *shapes)
        direct = [] if self.coupling.spec.gin else self._direct_gradient(dlog_det)
        for part, direct_i in tensors.chunks(samples, *direct):
            self._run_chunk(part, work, direct_i)
        return self._parameter_gradients(dlog_det, self.coupling.rows_per_sample * pixels)

    def _direct_gradient(self, dlog_det: Tensor | None) -> list[Tensor]:
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

    def _run_chunk(self, tensors: _Tensors, work: list[Tensor], direct: list[Tensor]) -> None:
        """Write the gradients of a chunk to dx and da, and add its part to the sums.

        Args:
            tensors: The chunk.
            work: Scratch: two buffers for a chunk of channel pairs. If dy is in halves, a third one
                for all channels.
            direct: The chunk of what :meth:`_direct_gradient` returned.
        """
        x1, x2 = cast(tensors.x.passive, self.dtype), cast(tensors.x.active, self.dtype)
        a, da, dx = cast(tensors.a, self.dtype), tensors.da, tensors.dx
        passive, active = x1.shape[1], x2.shape[1]
        da_acc = da if da.dtype is self.dtype else torch.empty_like(a)
        dv = self._gather(tensors, work)
        if self.want_params:
            sums = [t.sum((0, 2)) for t in dv]
            self.offset_sum = accumulate(self.offset_sum, _joined(sums))
        du = dv  # dv is not read again
        if self.scale is not None:
            sizes = [t.shape[1] for t in dv]
            scales = [self.scale] if len(dv) == 1 else self.scale.split_with_sizes(sizes, 1)
            for du_k, scale_k in zip(du, scales, strict=True):
                du_k.mul_(scale_k)
        du1, du2 = split_at(du[0], passive, active) if len(du) == 1 else du
        exp, slope = work[:2]
        pairs = exp.shape[1]
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
        for dx_k, du_k in zip(dx, du, strict=True):
            if dx_k is not du_k:
                dx_k.copy_(du_k)
        if da_acc is not da:
            da.copy_(da_acc)

    def _gather(self, tensors: _Tensors, work: list[Tensor]) -> list[Tensor]:
        """Return dv, or its two halves if dx has two, in dx if that has the dtype."""
        dy, dx = tensors.dy, tensors.dx
        if len(dy) > 1:
            passive, active, *from_subnet = dy
            source = work[2] if len(passive) == len(work[2]) else work[2][: len(passive)]
            source1, source2 = split_at(source, passive.shape[1], active.shape[1])
            if from_subnet:
                torch.add(cast(passive, self.dtype), from_subnet[0], out=source1)
            else:
                source1.copy_(passive)
            source2.copy_(active)
        else:
            source = dy[0]
        parts = parts_of(self.coupling.inv, dx)
        return [gather(source, inv, out, self.dtype) for inv, out in zip(parts, dx, strict=True)]

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

    def _parameter_gradients(
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


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
