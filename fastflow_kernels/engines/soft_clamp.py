"""The soft clamp s = clamp * tanh(tanh_scale * a_s) on a CPU: s, exp(s), and the slope of s.

Two forms. The fast one has tanh as a rational function where s is summed up, which keeps small
arguments accurate, and from a sigmoid in the backward pass, which keeps small slopes accurate; it
counts s in units of ln 2, because exp2 is the cheaper exponential. The other one takes the
operations of plain PyTorch.

Nanoseconds an element (float32, one thread of an AMD EPYC with AVX-512): torch.tanh 2.0, exp 0.6,
sigmoid 0.2, exp2 0.1, the rational function 0.6, tanh from a sigmoid 0.6.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.coupling import Coupling, CouplingSpec
from fastflow_kernels.engines.constants import constant

_LN2 = math.log(2.0)
# tanh(z) = z * (p0 + p1 * w + p2 * w**2 + p3 * w**3 + pole / w) with w = z**2 + shift, to 7.3e-9 of
# itself up to the bound: a minimax rational (Lawson's iteration; the error was measured in 40
# digits) whose one pole, near tanh's own at z**2 = -(pi / 2)**2, is split off. Evaluated in float32
# it is off by at most 3.4 * 2**-24. The bound is |a_s| = 17.5 for tanh_scale 0.1.
_TANH_BOUND = 1.75
_TANH_POLYNOMIAL = (
    0.20184652973087983,
    -0.005647746654773138,
    0.00020399073216209457,
    -4.582889990536395e-06,
)
_TANH_POLE, _TANH_SHIFT = 2.0011255121967095, 2.467730965303713
# The clamps for which the fast form is used. s is off by clamp times its error, and y and the
# gradients by as large a share of themselves: the sigmoid's form is off by up to 2.0 * 2**-24
# wherever tanh is small, where plain PyTorch's error may be 0. The accuracy criterion
# (tests/support/compare.py) allows 8 * 2**-24 of the largest value then; half of it is left for the
# other roundings. Larger clamps take the operations of plain PyTorch, whose s and exp(s) have the
# same bits: 1.7 to 1.8 times the time forward, 1.2 to 1.8 times backward (block alone, (4, 256, 64,
# 64) to (2048, 512)). Below the least clamp, coefficients for dialect "freia" would overflow.
LEAST_FAST_CLAMP, MOST_FAST_CLAMP = 1e-6, 2.0
_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class SoftClamp(NamedTuple):
    """The soft clamp of one coupling.

    Attributes:
        spec: The constants.
        rows_per_sample: See :class:`~fastflow_kernels.coupling.Coupling`.
        is_fast: Whether s comes in the fast form, in units of ln 2.
    """

    spec: CouplingSpec
    rows_per_sample: int
    is_fast: bool

    @classmethod
    def of(cls, coupling: Coupling, x: Tensor) -> SoftClamp:
        """The form for inputs like x."""
        spec = coupling.spec
        is_fast = x.device.type == "cpu" and LEAST_FAST_CLAMP <= spec.clamp <= MOST_FAST_CLAMP
        return cls(spec, coupling.rows_per_sample, is_fast)

    @property
    def unit(self) -> float:
        """Nats in a unit of s."""
        return _LN2 if self.is_fast else 1.0

    @property
    def slope_factor(self) -> float:
        """What :meth:`times_slope_` leaves out of d s / d a_s."""
        return (4.0 if self.is_fast else 1.0) * self.spec.clamp * self.spec.tanh_scale

    def log_factors(self, a_s: Tensor, sign: float, out: Tensor, scratch: Tensor) -> Tensor:
        """sign * s into ``out``, less its mean for GIN; to a few ulp at every magnitude."""
        factor = sign * self.spec.clamp / self.unit
        if not self.is_fast or out.dtype is not torch.float32 or not out.numel():
            torch.mul(a_s, constant(self.spec.tanh_scale, out.dtype), out=out).tanh_()
            out.mul_(constant(factor, out.dtype))
        else:
            _rational_tanh(a_s, self.spec.tanh_scale, factor, out, scratch)
        return self.subtract_mean_(out) if self.spec.gin else out

    def exp_(self, s: Tensor) -> Tensor:
        """exp(s), in place."""
        return s.exp2_() if self.is_fast else s.exp_()

    def exp_and_slope(self, a_s: Tensor, exp: Tensor, slope: Tensor, as_forward: bool) -> None:
        """exp(s) into ``exp``, and into ``slope`` what :meth:`times_slope_` takes.

        Args:
            a_s: (B, channels, P).
            exp, slope: Scratch of that shape.
            as_forward: s gets the bits that it had in the forward pass: where x is reconstructed
                by it, the input of 32 blocks is off by 0.46 times as much (median of 24 draws).
        """
        spec = self.spec
        if self.is_fast and as_forward:
            self.log_factors(a_s, 1.0, exp, slope)
            _small_sigmoid(a_s, spec.tanh_scale, slope)
        else:
            if self.is_fast:
                _small_sigmoid(a_s, spec.tanh_scale, slope)
                _from_sigmoid(slope, a_s, spec.clamp / _LN2, exp)
            else:
                torch.mul(a_s, constant(spec.tanh_scale, slope.dtype), out=slope).tanh_()
                torch.mul(slope, constant(spec.clamp, exp.dtype), out=exp)
            if spec.gin:
                self.subtract_mean_(exp)
        self.exp_(exp)

    def times_slope_(self, ds: Tensor, slope: Tensor) -> None:
        """Multiply ds by d s / d a_s, but for :attr:`slope_factor`, in place."""
        # 1 - tanh**2, which is 4 * sigma * (1 - sigma)
        backward = _sigmoid_backward if self.is_fast else _tanh_backward
        # allow_mutation_on_saved_tensors() expects that results are called "out"
        if torch_private.is_watched():
            ds.copy_(backward(ds, slope))
        else:
            backward.grad_input(ds, slope, grad_input=ds)

    def subtract_mean_(self, t: Tensor) -> Tensor:
        """Subtract the mean of each sample, in place."""
        rows = self.rows_per_sample
        samples = t.view(t.shape[0] // rows, rows, *t.shape[1:])
        samples.sub_(samples.mean((1, 2, 3), keepdim=True))
        return t


def _rational_tanh(a_s: Tensor, scale: float, factor: float, out: Tensor, w: Tensor) -> Tensor:
    """factor * tanh(scale * a_s) to 4 * 2**-24 of itself, into out; w is scratch."""
    *polynomial, pole, shift, bound, most = _tanh_coefficients(scale, factor)
    torch.addcmul(constant(shift, out.dtype), a_s, a_s, out=w)
    if w.amax().item() <= bound:  # nan is not
        return _rational(a_s, w, polynomial, pole, out)
    # Both forms, and of each element the one that its own value asks for, so that neighbours change
    # nothing. Not by torch.where, which takes 2.0 ns an element where the condition is random: the
    # mask is 0 or 1 and both forms are finite, so lerp takes one exactly.
    sigma = _small_sigmoid(a_s, scale, torch.empty_like(out))
    beyond = _from_sigmoid(sigma, a_s, factor, torch.empty_like(out))
    is_near = torch.le(w, bound, out=torch.empty_like(out))
    a_s = torch.clamp(a_s, -most, most)
    torch.addcmul(constant(shift, out.dtype), a_s, a_s, out=w)
    near = _rational(a_s, w, polynomial, pole, out)
    return torch.lerp(beyond, near, is_near, out=out)


def _rational(a_s: Tensor, w: Tensor, polynomial: list[float], pole: float, out: Tensor) -> Tensor:
    """a_s * (p0 + p1 * w + p2 * w**2 + p3 * w**3 + pole / w), into out."""
    p0, p1, p2, p3 = polynomial
    torch.add(constant(p2, out.dtype), w, alpha=p3, out=out)
    torch.addcmul(constant(p1, out.dtype), out, w, out=out)
    torch.addcmul(constant(p0, out.dtype), out, w, out=out)
    return torch.addcdiv(out, constant(pole, out.dtype), w, out=out).mul_(a_s)


@lru_cache(maxsize=128)
def _tanh_coefficients(scale: float, factor: float) -> tuple[float, ...]:
    """The coefficients for w = a_s**2 + shift, the shift, and the bounds of w and abs(a_s)."""
    square, slope = scale * scale, factor * scale
    polynomial = (slope * p * square**k for k, p in enumerate(_TANH_POLYNOMIAL))
    shift = _TANH_SHIFT / square
    bound = _TANH_BOUND**2 / square + shift
    return *polynomial, slope * _TANH_POLE / square, shift, bound, _TANH_BOUND / scale


def _small_sigmoid(a_s: Tensor, scale: float, out: Tensor) -> Tensor:
    """sigma = sigmoid(-2 * |scale * a_s|), into out.

    It is at most 1/2, so that 4 * sigma * (1 - sigma) = 1 - tanh**2 keeps its digits.
    """
    return torch.abs(a_s, out=out).mul_(constant(-2.0 * scale, out.dtype)).sigmoid_()


def _from_sigmoid(sigma: Tensor, a_s: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * tanh(scale * a_s) from :func:`_small_sigmoid`, to 2 * 2**-24 of the factor."""
    torch.sub(constant(abs(factor), out.dtype), sigma, alpha=2.0 * abs(factor), out=out)
    torch.copysign(out, a_s, out=out)
    return out if factor > 0.0 else out.neg_()
