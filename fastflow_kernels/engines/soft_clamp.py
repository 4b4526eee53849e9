"""The soft clamp s = clamp * f(input_scale * a_s) of the eager engine: s, exp(s), the slope of s.

It has two forms:

- The plain form uses the operations of plain PyTorch, so that s and exp(s) have the same bits.
- The fast form counts s in units of ln 2, because exp2 is the cheaper exponential. Where s is
  summed, tanh is a rational function, which keeps small arguments accurate. In the backward pass
  tanh comes from a sigmoid, which keeps small slopes accurate. It is for CPUs without a fast
  torch.tanh (:func:`~fastflow_kernels.engines.processor.has_fast_tanh`).

Nanoseconds an element: torch.tanh and atan 2.1, exp 0.6, sigmoid 0.2, exp2 0.1, the rational
function 0.6, tanh from a sigmoid 0.6; tanh of any size 0.8 and atan by its cosine 0.9. Measured in
float32 on one thread of an AMD EPYC with AVX-512. On one of an Intel Xeon with AVX-512 the plain
form of exp(s) takes 0.4 to 0.65 of the fast one's time, and for SIGMOID as long. In the backward
pass it takes 0.5 to 0.75.

The fast form takes clamps from ``LEAST_FAST_CLAMP`` to ``MOST_FAST_CLAMP``.

- Above: the error of s is the clamp times the error of tanh. y and the gradients are off by as
  large a share of themselves. Tanh from a sigmoid is off by up to 2.0 * 2**-24 wherever tanh is
  small, where plain PyTorch may be exact. The accuracy criterion (tests/support/compare.py) then
  allows 8 * 2**-24 of the largest value; half of it is left for the other roundings. Larger clamps
  take the plain form: 1.7 to 1.8 times the time forward, 1.2 to 1.8 times backward (block alone,
  (4, 256, 64, 64) to (2048, 512)).
- Below: coefficients of the rational function for dialect "freia" would overflow.

For a side of a coupling block the fast form is exp2 with :func:`_atan`, :func:`_wide_tanh` or, for
the clamp function SIGMOID, torch.sigmoid.
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
from fastflow_kernels.engines.processor import has_fast_tanh

_LN2 = math.log(2.0)
# The rational function of _rational_tanh, for |z| up to the bound.
_TANH_BOUND = 1.75  # |a_s| = 17.5 for input_scale 0.1
_TANH_POLYNOMIAL = (
    0.20184652973087983,
    -0.005647746654773138,
    0.00020399073216209457,
    -4.582889990536395e-06,
)
_TANH_POLE, _TANH_SHIFT = 2.0011255121967095, 2.467730965303713
LEAST_FAST_CLAMP, MOST_FAST_CLAMP = 1e-6, 2.0  # derived in the docstring above
_MOST_ATAN_INPUT = 1e18  # atan rounds to pi / 2 beyond, and the square would overflow
_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class SoftClamp(NamedTuple):
    """The soft clamp of one coupling.

    Attributes:
        spec: The constants.
        rows_per_sample: See :class:`~fastflow_kernels.coupling.Coupling`.
        is_fast: Whether to use the fast form, in which s is in units of ln 2.
    """

    spec: CouplingSpec
    rows_per_sample: int
    is_fast: bool

    @classmethod
    def of(cls, coupling: Coupling, x: Tensor) -> SoftClamp:
        """Choose the form for inputs like x."""
        spec = coupling.spec
        is_fast = (
            x.device.type == "cpu"
            and LEAST_FAST_CLAMP <= spec.clamp <= MOST_FAST_CLAMP
            and not has_fast_tanh()
        )
        if spec.function == "atan":
            is_fast = is_fast and spec.input_scale == 1.0
        return cls(spec, coupling.rows_per_sample, is_fast)

    @property
    def unit(self) -> float:
        """Nats in one unit of s."""
        return _LN2 if self.is_fast else 1.0

    @property
    def slope_factor(self) -> float:
        """The constant factor of d s / d a_s, which :meth:`times_slope_` leaves out."""
        is_by_sigmoid = self.is_fast and self.spec.function != "atan"
        return (4.0 if is_by_sigmoid else 1.0) * self.spec.clamp * self.spec.input_scale

    @property
    def buffers(self) -> int:
        """How many scratch buffers :meth:`log_factors` takes."""
        return 2 if self.is_fast and self.spec.activation is None else 1

    def log_factors(self, a_s: Tensor, sign: float, out: Tensor, *scratch: Tensor) -> Tensor:
        """Write sign * s to ``out``, accurate to a few ulp at every magnitude.

        For GIN the mean of s is subtracted.

        Args:
            a_s: The first half of the coefficients, (B, channels, P).
            sign: 1.0, or -1.0 for the inverse.
            out: The result, of the shape of a_s.
            scratch: :attr:`buffers` tensors of that shape and of the dtype of ``out``.

        Returns:
            ``out``.
        """
        factor, is_tanh = sign * self.spec.clamp / self.unit, self.spec.function != "atan"
        if not self.is_fast or out.dtype is not torch.float32 or not out.numel():
            torch.mul(a_s, constant(self.spec.input_scale, out.dtype), out=out)
            (out.tanh_() if is_tanh else out.atan_()).mul_(constant(factor, out.dtype))
        elif not is_tanh:
            _atan(a_s, factor, out, *scratch)
        elif self.spec.function == "sigmoid":
            torch.sigmoid(a_s, out=out)
            torch.add(constant(-factor, out.dtype), out, alpha=2.0 * factor, out=out)
        elif self.spec.activation is None:
            _wide_tanh(a_s, self.spec.input_scale, factor, out, *scratch)
        else:
            _rational_tanh(a_s, self.spec.input_scale, factor, out, *scratch)
        return self.subtract_mean_(out) if self.spec.gin else out

    def exp_(self, s: Tensor) -> Tensor:
        """Replace s by exp(s), in place."""
        return s.exp2_() if self.is_fast else s.exp_()

    def exp_and_slope(
        self, a_s: Tensor, exp: Tensor, slope: Tensor, want_forward_bits: bool, *scratch: Tensor
    ) -> None:
        """Write exp(s) to ``exp``, and to ``slope`` the argument of :meth:`times_slope_`.

        Args:
            a_s: The first half of the coefficients, (B, channels, P).
            exp, slope: The results, of the shape of a_s.
            want_forward_bits: Whether s must have the bits that it had in the forward pass. If x is
                reconstructed with them, the input of 32 blocks is off by 0.46 times as much (median
                of 24 draws).
            scratch: For a side the second of :attr:`buffers`; ``slope`` serves as the first.
        """
        spec = self.spec
        if spec.function == "atan":
            self.log_factors(a_s, 1.0, exp, slope, *scratch)
            self.slope(a_s, slope)
        elif self.is_fast and want_forward_bits:
            self.log_factors(a_s, 1.0, exp, slope)
            _small_sigmoid(a_s, spec.input_scale, slope)
        else:
            if self.is_fast:
                _small_sigmoid(a_s, spec.input_scale, slope)
                _tanh_from_sigmoid(slope, a_s, spec.clamp / _LN2, exp)
            else:
                torch.mul(a_s, constant(spec.input_scale, slope.dtype), out=slope).tanh_()
                torch.mul(slope, constant(spec.clamp, exp.dtype), out=exp)
            if spec.gin:
                self.subtract_mean_(exp)
        self.exp_(exp)

    def slope(self, a_s: Tensor, out: Tensor) -> Tensor:
        """Write to ``out`` what :meth:`exp_and_slope` writes to ``slope``, and return it."""
        scale = self.spec.input_scale
        if self.spec.function == "atan":
            torch.mul(a_s, a_s, out=out)
            if scale != 1.0:
                out.mul_(constant(scale * scale, out.dtype))
            return out.add_(constant(1.0, out.dtype))
        if self.spec.function == "sigmoid" and self.is_fast:
            return torch.sigmoid(a_s, out=out)
        if self.is_fast:
            return _small_sigmoid(a_s, scale, out)
        return torch.mul(a_s, constant(scale, out.dtype), out=out).tanh_()

    def times_slope_(self, ds: Tensor, slope: Tensor) -> None:
        """Multiply ds by d s / d a_s in place, except for the factor :attr:`slope_factor`.

        Args:
            ds: The gradient of s, (B, channels, P).
            slope: What :meth:`exp_and_slope` wrote.
        """
        if self.spec.function == "atan":
            ds.div_(slope)  # 1 + (input_scale * a_s)**2
            return
        # 1 - tanh**2 = 4 * sigma * (1 - sigma)
        backward = _sigmoid_backward if self.is_fast else _tanh_backward
        # allow_mutation_on_saved_tensors() expects results under the name "out".
        if torch_private.is_watched():
            ds.copy_(backward(ds, slope))
        else:
            backward.grad_input(ds, slope, grad_input=ds)

    def subtract_mean_(self, t: Tensor) -> Tensor:
        """Subtract GIN's mean, of each sample or of each pixel, in place."""
        if self.spec.mean_per_pixel:
            return t.sub_(t.mean(1, keepdim=True))
        rows = self.rows_per_sample
        samples = t.view(t.shape[0] // rows, rows, *t.shape[1:])
        samples.sub_(samples.mean((1, 2, 3), keepdim=True))
        return t


def _rational_tanh(a_s: Tensor, scale: float, factor: float, out: Tensor, w: Tensor) -> Tensor:
    """Write factor * tanh(scale * a_s) to ``out``, with a relative error of at most 4 * 2**-24.

    With z = scale * a_s and w = z**2 + shift, up to |z| = ``_TANH_BOUND``::

        tanh(z) = z * (p0 + p1 * w + p2 * w**2 + p3 * w**3 + pole / w)

    This is a minimax rational function, found by Lawson's iteration. Its one pole, near tanh's own
    at z**2 = -(pi / 2)**2, is split off. Its relative error is 7.3e-9, measured in 40 digits. In
    float32 it is off by at most 3.4 * 2**-24. Beyond the bound tanh comes from a sigmoid.

    Args:
        a_s: The argument, (B, channels, P).
        scale: The factor inside tanh.
        factor: The factor of tanh.
        out: The result, of the shape of a_s.
        w: Scratch of the shape and dtype of ``out``.

    Returns:
        ``out``.
    """
    *polynomial, pole, shift, w_bound, a_s_bound = _tanh_coefficients(scale, factor)
    torch.addcmul(constant(shift, out.dtype), a_s, a_s, out=w)
    if w.amax().item() <= w_bound:  # False for NaN
        return _evaluate_rational(a_s, w, polynomial, pole, out)
    # Compute both forms. Each element selects one by its own value, so that its result does not
    # depend on its neighbours.
    sigma = _small_sigmoid(a_s, scale, torch.empty_like(out))
    beyond = _tanh_from_sigmoid(sigma, a_s, factor, torch.empty_like(out))
    is_near = torch.le(w, w_bound, out=torch.empty_like(out))
    a_s = torch.clamp(a_s, -a_s_bound, a_s_bound)
    torch.addcmul(constant(shift, out.dtype), a_s, a_s, out=w)
    near = _evaluate_rational(a_s, w, polynomial, pole, out)
    # lerp selects exactly, because is_near is 0 or 1 and both forms are finite. torch.where would
    # take 2.0 ns an element for a random condition.
    return torch.lerp(beyond, near, is_near, out=out)


def _evaluate_rational(
    a_s: Tensor, w: Tensor, polynomial: list[float], pole: float, out: Tensor
) -> Tensor:
    """Write a_s * (p0 + p1 * w + p2 * w**2 + p3 * w**3 + pole / w) to ``out``."""
    p0, p1, p2, p3 = polynomial
    torch.add(constant(p2, out.dtype), w, alpha=p3, out=out)
    torch.addcmul(constant(p1, out.dtype), out, w, out=out)
    torch.addcmul(constant(p0, out.dtype), out, w, out=out)
    return torch.addcdiv(out, constant(pole, out.dtype), w, out=out).mul_(a_s)


@lru_cache(maxsize=128)
def _tanh_coefficients(scale: float, factor: float) -> tuple[float, ...]:
    """Return what :func:`_rational_tanh` needs for w = a_s**2 + shift.

    Returns:
        The four coefficients of the polynomial, the pole's coefficient, the shift, and the bounds
        of w and of abs(a_s). The coefficients include ``scale`` and ``factor``.
    """
    square, slope = scale * scale, factor * scale
    polynomial = (slope * p * square**k for k, p in enumerate(_TANH_POLYNOMIAL))
    shift = _TANH_SHIFT / square
    bound = _TANH_BOUND**2 / square + shift
    return *polynomial, slope * _TANH_POLE / square, shift, bound, _TANH_BOUND / scale


def _small_sigmoid(a_s: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write sigma = sigmoid(-2 * |scale * a_s|) to ``out``.

    Because sigma is at most 1/2, 1 - tanh**2 = 4 * sigma * (1 - sigma) keeps its digits.
    """
    return torch.abs(a_s, out=out).mul_(constant(-2.0 * scale, out.dtype)).sigmoid_()


def _tanh_from_sigmoid(sigma: Tensor, a_s: Tensor, factor: float, out: Tensor) -> Tensor:
    """Write factor * tanh(scale * a_s) to ``out``, from the sigma of :func:`_small_sigmoid`.

    The error is at most 2 * 2**-24 of the factor.
    """
    torch.sub(constant(abs(factor), out.dtype), sigma, alpha=2.0 * abs(factor), out=out)
    torch.copysign(out, a_s, out=out)
    return out if factor > 0.0 else out.neg_()


class _Rational(NamedTuple):
    """A function p0 + p1 * w + ... + c1 / w + c2 / (w + d2 - d1) + ... of w = v + d1.

    Attributes:
        polynomial: p0, p1, ...
        poles: (c1, d1), (c2, d2), ...
    """

    polynomial: tuple[float, ...]
    poles: tuple[tuple[float, float], ...]

    def evaluate(self, factor: float, out: Tensor, w: Tensor) -> Tensor:
        """Write factor times the function to ``out``. It writes to ``w``, too."""
        dtype, shift = out.dtype, self.poles[0][1]
        *lower, second, last = (factor * p for p in self.polynomial)
        torch.add(constant(second, dtype), w, alpha=last, out=out)
        for p in reversed(lower):
            torch.addcmul(constant(p, dtype), out, w, out=out)
        for c, d in self.poles:
            if d != shift:
                w.add_(constant(d - shift, dtype))
                shift = d
            torch.addcdiv(out, constant(factor * c, dtype), w, out=out)
        return out


# Minimax functions, found by Lawson's iteration. All terms but the polynomials' later ones are
# positive, so that nothing cancels.
_TANH = _Rational(  # tanh(z) / z of v = z**2, for z in [-9, 9], with a relative error of 5.9e-8
    (0.047331620566711495, -6.476311422981573e-05, 8.003308733259177e-08),
    (
        (2.000065144515259, 2.467430682533335),
        (2.071012309224717, 22.40335232807674),
        (3.949468585966192, 79.30754235054874),
    ),
)
_ATAN = _Rational(  # arccos(q) / sqrt(1 - q**2) of v = q, for q in [0, 1]: 3.8e-8
    (0.18642168553786628, -0.008737959424380048),
    ((0.8973382687102189, 1.0959960833722135), (1.3547525583303897, 2.355234798206694)),
)


def _wide_tanh(
    a_s: Tensor, scale: float, factor: float, out: Tensor, w: Tensor, z: Tensor
) -> Tensor:
    """Write factor * tanh(scale * a_s) to ``out``, for arguments of any size alike.

    The relative error is at most 5 * 2**-24. :func:`_rational_tanh` is faster for small arguments,
    as they are with the factor 0.1 of AllInOneBlock, and slower beyond.
    """
    if scale != 1.0:
        a_s = torch.mul(a_s, constant(scale, out.dtype), out=z)
    torch.clamp(a_s, -9.0, 9.0, out=z)  # 1 - tanh(9) is 2**-25
    torch.addcmul(constant(_TANH.poles[0][1], out.dtype), z, z, out=w)
    return _TANH.evaluate(factor, out, w).mul_(z)


def _atan(a_s: Tensor, factor: float, out: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """Write factor * atan(a_s) to ``out``, with a relative error of at most 6 * 2**-24.

    With z = a_s and q = 1 / sqrt(1 + z**2), the cosine of the angle, it is z * q * h(q), where h(q)
    = arccos(q) / sqrt(1 - q**2) is an angle by its sine. No operation cancels, so that small
    arguments keep their digits. In units of 2**-24, q is off by up to 1.75, and h adds up to 3: 0.6
    of the fit and the roundings of its terms. The two products add 0.5 each. 5.2 was measured.

    Args:
        a_s: The argument, (B, channels, P).
        factor: The factor of atan.
        out: The result, of the shape of a_s.
        w, z: Scratch of the shape and dtype of ``out``.

    Returns:
        ``out``.
    """
    torch.clamp(a_s, -_MOST_ATAN_INPUT, _MOST_ATAN_INPUT, out=z)
    torch.addcmul(constant(1.0, out.dtype), z, z, out=w).rsqrt_()
    z.mul_(w)
    w.add_(constant(_ATAN.poles[0][1], out.dtype))
    return _ATAN.evaluate(factor, out, w).mul_(z)
