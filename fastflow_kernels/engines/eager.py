"""The coupling in plain PyTorch: hand-derived forward, backward and inverse.

The fast path of CPUs and the fallback everywhere else. The functions called ``coupling_*`` have
twins of the same signature in ``kernels``; those called ``composite_*`` are the same maths as
ordinary differentiable operations, for double backward, ``torch.func``, ``torch.compile`` and
export.

Notation, as in :class:`~fastflow_kernels.coupling.CouplingSpec`: x (B, C, *S), C1 = C - C//2, C2 =
C//2, a (B, 2*C2, *S) = (a_s, a_t), P = prod(S); g (``global_scale``) and offset have C elements.
``perm`` and ``inv = argsort(perm)`` are int64 (C,), or None for the identity: y[:, j] = v[:,
perm[j]].

Why it looks as it does (float32, one thread of an AMD EPYC with AVX-512, nanoseconds per element):
torch.tanh 2.0, exp 0.6, sigmoid 0.2, exp2 0.1, one arithmetic pass in cache 0.05 to 0.1, ``x[:,
p]`` 1.1 to 3.9 against 0.1 to 0.6 for index_select. So tanh is a rational function (0.6) where its
sum is asked for, which keeps small arguments accurate, and comes from a sigmoid (0.6) in the
backward pass, which keeps small slopes accurate; tensors are walked in chunks that stay in the
cache, and scratch is reused between them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import modes
from fastflow_kernels.coupling import CouplingSpec

_LN2 = math.log(2.0)
_CHUNK_BYTES = 1 << 20  # per thread: what stays in a core's second-level cache beside its operands
_SCRATCH_BYTES = 16 << 20  # per thread and dtype: the most that is kept between calls
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
# The clamps for which these forms are used. s is off by clamp times their error, and y and the
# gradients by as large a share of themselves: the sigmoid's form is off by up to 2.0 * 2**-24
# wherever tanh is small, where plain PyTorch's error may be 0. The accuracy criterion
# (tests/support/compare.py) allows 8 * 2**-24 of the largest value then; half of it is left for the other
# roundings. Larger clamps take the operations of plain PyTorch, whose s and exp(s) have the same
# bits: 1.7 to 1.8 times the time forward, 1.2 to 1.8 times backward (block alone, (4, 256, 64, 64)
# to (2048, 512)). Below the least, coefficients for dialect "freia" would overflow.
_LEAST_CLAMP, _MOST_CLAMP = 1e-6, 2.0
_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


# --- global affine --------------------------------------------------------------------------------


def scale_of(g: Tensor, activation: str) -> Tensor:
    """The global scale, activation(g): SIGMOID 10*sigmoid(g - 2), SOFTPLUS 0.1*softplus(g,
    beta=0.5), EXP exp(g).
    """
    if activation == "SIGMOID":
        return torch.sigmoid(g - _number(2.0, g)) * _number(10.0, g)
    if activation == "SOFTPLUS":
        return torch.nn.functional.softplus(g, beta=0.5) * _number(0.1, g)
    return torch.exp(g)


def scale_or_none(g: Tensor, spec: CouplingSpec) -> Tensor | None:
    """The global scale in the dtype of the computation, in the shape of g; None for GIN, where it
    is 1.
    """
    return None if spec.gin else scale_of(_as(g, _accumulator(g.dtype)), spec.activation)


def _log_scale_slope(scale: Tensor, activation: str) -> Tensor | float:
    """d log(scale) / d g, from the scale; finite also where that has underflowed to 0."""
    if activation == "SIGMOID":
        return 1.0 - 0.1 * scale
    if activation == "SOFTPLUS":
        scale = scale.clamp_min(1e-30)
        # 0.1 * sigmoid(g / 2) / scale, by way of the scale
        return torch.mul(scale, -5.0).expm1_().div_(scale).mul_(-0.1)
    return 1.0


# --- chunks, scratch and constants ----------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _flat(t: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C, P); copies only what is not contiguous."""
    return t.contiguous().view(t.shape[0], t.shape[1], math.prod(t.shape[2:]))


def _chunks(x: Tensor, acc: torch.dtype, together: int) -> tuple[int, int]:
    """How many samples, and how many channel pairs of each, one pass works on.

    ``together`` samples are never parted, nor any of them; 0 allows a part of one.
    """
    batch, channels, pixels = x.shape
    pairs = max(1, channels // 2)
    if x.device.type != "cpu":
        return batch, pairs  # elsewhere a pass is a launch: few and large
    budget = _CHUNK_BYTES // acc.itemsize * torch.get_num_threads()
    least = max(1, together)
    sample = channels * pixels * least
    if sample <= 4 * budget or together or pixels == 1:
        return least * max(1, min(batch // least, budget // sample)), pairs
    return 1, max(1, min(pairs, budget // pixels))


def _walk(dim: int, step: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in pieces of ``step`` along ``dim``; themselves if one piece holds all."""
    size = tensors[0].shape[dim]
    if step >= size:
        yield tensors
        return
    for start in range(0, size, step):
        yield tuple(t.narrow(dim, start, min(step, size - start)) for t in tensors)


class _Scratch(threading.local):
    """Buffers of a thread that are kept between calls: fresh pages cost more than the arithmetic
    done in them.
    """

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, tuple[tuple[int, ...], ...]], list[Tensor]] = {}

    def take(self, like: Tensor, acc: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Uninitialised tensors of these shapes, valid until this thread's next call."""
        kept = like.device.type == "cpu" and not modes.is_watched()
        if kept and (views := self.views.get((acc, shapes))):
            return views
        sizes = [math.prod(shape) for shape in shapes]
        total = sum(sizes)
        keep = kept and total * acc.itemsize <= _SCRATCH_BYTES
        buffer = self.buffers.get(acc) if keep else None
        # else the buffer could not be written to outside of inference mode
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < total:
                buffer = torch.empty(total, dtype=acc, device=like.device)
                self._forget(acc)
            views = [
                piece.view(shape)
                for piece, shape in zip(buffer[:total].split(sizes), shapes, strict=True)
            ]
        if keep:
            if len(self.views) >= 64:
                self._forget(acc)
            self.buffers[acc] = buffer
            self.views[acc, shapes] = views
        return views

    def _forget(self, acc: torch.dtype) -> None:
        """Drop the views of a buffer that is replaced."""
        self.views = {key: views for key, views in self.views.items() if key[0] is not acc}


_scratch = _Scratch()


def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-dimensional tensor: as an operand it is 1.5 us cheaper than a Python number, which is
    wrapped anew by every call.

    It lies on the CPU, whatever the default device is: operands of no dimensions may, beside
    tensors of any device.
    """
    return _new_constant(value, dtype) if modes.is_watched() else _kept_constant(value, dtype)


def _new_constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


# a coupling needs about ten; a clamp that changes every step must not add up
_kept_constant = lru_cache(maxsize=128)(_new_constant)


def _number(value: Any, like: Tensor) -> Any:
    """A factor for plain operations: a constant as above, but where operations are recorded; a
    tensor as it is.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(value) is not float:
        return value
    return _constant(value, like.dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def accumulated(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that sums of them are held in: float64, or float32 for everything
    less.
    """
    acc = _accumulator(promoted(*tensors))
    return tuple(_as(t, acc) for t in tensors)


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype that ordinary operations on these tensors would give."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _channelwise_constants(
    g: Tensor, offset: Tensor, spec: CouplingSpec, acc: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """scale and offset as (1, C, 1) in the accumulator's dtype; scale is None for GIN."""
    scale = None if spec.gin else scale_of(_as(g, acc).view(1, -1, 1), spec.activation)
    return scale, _as(offset, acc).view(1, -1, 1)


def _halves(t: Tensor, c1: int, c2: int) -> tuple[Tensor, Tensor]:
    """The first c1 and the last c2 channels."""
    # Tensor.split is a Python function five times slower
    first, last = torch.split_with_sizes(t, (c1, c2), 1)
    return first, last


# --- s = clamp * tanh(tanh_scale * a_s) -----------------------------------------------------------


def _is_fast(spec: CouplingSpec, x: Tensor) -> bool:
    """Whether s comes by the cheap forms, in units of ln 2; elsewhere by the operations of plain
    PyTorch: fewer, and as accurate.
    """
    return x.device.type == "cpu" and _LEAST_CLAMP <= spec.clamp <= _MOST_CLAMP


def _exp(s: Tensor, fast: bool) -> Tensor:
    """exp of s, in place; of s in units of ln 2 where it is fast."""
    return s.exp2_() if fast else s.exp_()


def _log_factor(
    a_s: Tensor, spec: CouplingSpec, sign: float, fast: bool, out: Tensor, scratch: Tensor
) -> Tensor:
    """sign * s into out (in units of ln 2 where it is fast), for GIN less its mean; to a few ulp at
    every magnitude, for its sum.
    """
    factor = sign * spec.clamp
    if not fast or out.dtype is not torch.float32 or not out.numel():
        torch.mul(a_s, _constant(spec.tanh_scale, out.dtype), out=out).tanh_()
        out.mul_(_constant(factor / _LN2 if fast else factor, out.dtype))
    else:
        _fast_tanh(a_s, spec.tanh_scale, factor / _LN2, out, scratch)
    return _less_mean(out, spec) if spec.gin else out


def _fast_tanh(a_s: Tensor, scale: float, factor: float, out: Tensor, w: Tensor) -> Tensor:
    """factor * tanh(scale * a_s) to 4 * 2**-24 of itself, into out; w is scratch."""
    *polynomial, pole, shift, bound, most = _tanh_coefficients(scale, factor)
    torch.addcmul(_constant(shift, out.dtype), a_s, a_s, out=w)
    if w.amax().item() <= bound:  # nan is not
        return _rational(a_s, w, polynomial, pole, out)
    # Both forms, and of each element the one that its own value asks for, so that neighbours change
    # nothing. Not by torch.where, which takes 2.0 ns an element where the condition is random: the
    # mask is 0 or 1 and both forms are finite, so lerp takes one exactly.
    beyond = _from_sigmoid(
        _small_sigmoid(a_s, scale, torch.empty_like(out)), a_s, factor, torch.empty_like(out)
    )
    is_near = torch.le(w, bound, out=torch.empty_like(out))
    a_s = torch.clamp(a_s, -most, most)
    near = _rational(
        a_s, torch.addcmul(_constant(shift, out.dtype), a_s, a_s, out=w), polynomial, pole, out
    )
    return torch.lerp(beyond, near, is_near, out=out)


def _rational(a_s: Tensor, w: Tensor, polynomial: list[float], pole: float, out: Tensor) -> Tensor:
    """a_s * (p0 + p1 * w + p2 * w**2 + p3 * w**3 + pole / w), into out."""
    p0, p1, p2, p3 = polynomial
    torch.add(_constant(p2, out.dtype), w, alpha=p3, out=out)
    torch.addcmul(_constant(p1, out.dtype), out, w, out=out)
    torch.addcmul(_constant(p0, out.dtype), out, w, out=out)
    return torch.addcdiv(out, _constant(pole, out.dtype), w, out=out).mul_(a_s)


@lru_cache(maxsize=128)
def _tanh_coefficients(scale: float, factor: float) -> tuple[float, ...]:
    """The polynomial's and the pole's for w = a_s**2 + shift, the shift, the bound of w, and that
    of abs(a_s).
    """
    square, slope = scale * scale, factor * scale
    polynomial = (slope * p * square**k for k, p in enumerate(_TANH_POLYNOMIAL))
    shift = _TANH_SHIFT / square
    return (
        *polynomial,
        slope * _TANH_POLE / square,
        shift,
        _TANH_BOUND**2 / square + shift,
        _TANH_BOUND / scale,
    )


def _small_sigmoid(a_s: Tensor, scale: float, out: Tensor) -> Tensor:
    """sigma = sigmoid(-2 * |scale * a_s|), into out: at most 1/2, so that 4 * sigma * (1 - sigma) =
    1 - tanh**2 keeps its digits.
    """
    return torch.abs(a_s, out=out).mul_(_constant(-2.0 * scale, out.dtype)).sigmoid_()


def _from_sigmoid(sigma: Tensor, a_s: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * tanh(scale * a_s) from :func:`_small_sigmoid`, to 2 * 2**-24 of the factor, into
    out.
    """
    torch.sub(_constant(abs(factor), out.dtype), sigma, alpha=2.0 * abs(factor), out=out)
    torch.copysign(out, a_s, out=out)
    return out if factor > 0.0 else out.neg_()


def _less_mean(t: Tensor, spec: CouplingSpec) -> Tensor:
    """Take off, in place, the mean of each sample, which is ``gin_rows`` rows of t."""
    samples = t.view(t.shape[0] // spec.gin_rows, spec.gin_rows, *t.shape[1:])
    samples.sub_(samples.mean((1, 2, 3), keepdim=True))
    return t


# --- forward --------------------------------------------------------------------------------------


def coupling_fwd(
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    jac: bool,
) -> tuple[Tensor, Tensor | None]:
    """Coupling, global affine and permutation in one walk over memory.

    Args:
        x: (B, C, *S), any floating dtype.
        a: (B, 2*C2, *S), the subnet's output.
        g: ``global_scale``, C elements.
        offset: ``global_offset``, C elements.
        perm: int64 (C,), or None for the identity.
        inv: argsort(perm); not used here.
        spec: The coupling's constants.
        jac: Whether the log-determinant is wanted.

    Returns:
        y (B, C, *S) in the promoted dtype of x, a and g, and the log-determinant (B,) in nats
        (float64 if y is, else float32; zeros for GIN), or None without ``jac``.
    """
    y = torch.empty(x.shape, dtype=promoted(x, a, g), device=x.device)
    acc = _accumulator(y.dtype)
    scale, offset = _channelwise_constants(g, offset, spec, acc)
    x, a, out = _flat(x), _flat(a), _flat(y)
    batch, channels, pixels = x.shape
    c2 = channels // 2
    c1 = channels - c2
    samples, pairs = _chunks(x, acc, spec.gin_rows if spec.gin else 0)
    in_place = perm is None and y.dtype is acc  # nothing moves: work where the result belongs
    s, t, *moved = _scratch.take(
        x, acc, *[(samples, pairs, pixels)] * 2, *[] if in_place else [(samples, channels, pixels)]
    )
    fast = _is_fast(spec, x)
    sums: list[Tensor] = []
    for xb, ab, yb in _walk(0, samples, x, a, out):
        xb, ab, v = _as(xb, acc), _as(ab, acc), yb if in_place else _fit(moved[0], xb)
        (x1, x2), (v1, v2), (a_s, a_t) = (
            _halves(xb, c1, c2),
            _halves(v, c1, c2),
            _halves(ab, c2, c2),
        )
        total = None
        for x2i, v2i, a_si, a_ti in _walk(1, pairs, x2, v2, a_s, a_t):
            si, ti = _fit(s, a_si), _fit(t, a_si)
            total = _summed(total, _log_factor(a_si, spec, 1.0, fast, si, ti), spec, jac)
            torch.mul(x2i, _exp(si, fast), out=v2i).add_(a_ti, alpha=0.1)
        if spec.folded:
            v1.copy_(x1)
        elif scale is None:
            v1.copy_(x1)
            v.add_(offset)
        elif pixels == 1:
            v1.copy_(x1)
            # with a constant per row of pixels this is three times slower than two passes
            torch.addcmul(offset, v, scale, out=v)
        else:
            scale1, scale2 = _halves(scale, c1, c2)
            torch.mul(x1, scale1, out=v1)
            v2.mul_(scale2)
            v.add_(offset)
        if not in_place:
            _store_permuted(v, perm, yb)
        if total is not None:
            sums.append(total)
    return y, _logdet(sums, scale, pixels, 1.0, fast) if jac else None


def _fit(scratch: Tensor, like: Tensor) -> Tensor:
    """The scratch in the shape of ``like``, which is smaller in the last chunk."""
    return (
        scratch
        if scratch.shape == like.shape
        else scratch.view(-1)[: like.numel()].view(like.shape)
    )


def _store_permuted(v: Tensor, perm: Tensor | None, out: Tensor) -> None:
    if perm is not None and v.dtype is out.dtype:
        torch.index_select(v, 1, perm, out=out)
    else:
        out.copy_(v if perm is None else v.index_select(1, perm))


def _summed(total: Tensor | None, s: Tensor, spec: CouplingSpec, jac: bool) -> Tensor | None:
    """Add the sum of s per sample to the total, if it is wanted; for GIN 0, or nan where a
    coefficient was, for then every s is.
    """
    if not jac:
        return None
    return s[:, :1, :1].sum((1, 2)).mul_(0.0) if spec.gin else _plus(total, s.sum((1, 2)))


def _logdet(
    sums: list[Tensor], scale: Tensor | None, pixels: int, sign: float, fast: bool
) -> Tensor:
    """The chunks' sums of s, in nats, + sign * P * sum log scale, where the former carry their sign
    already.
    """
    sum_s = sums[0] if len(sums) == 1 else torch.cat(sums)
    if scale is None:
        return sum_s
    return (sum_s.mul_(_LN2) if fast else sum_s).add_(scale.log().sum(), alpha=sign * pixels)


# --- backward -------------------------------------------------------------------------------------


def coupling_bwd(
    dy: Tensor,
    dlogdet: Tensor | None,
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`coupling_fwd`; tanh and exp are computed again rather than kept.

    Args:
        dy: Gradient of y, (B, C, *S); where scale and offset are folded, that of log(scale) * u,
            whose memory may become dx.
        dlogdet: Gradient of the log-determinant, (B,), or None; of fewer samples where several rows
            of x make one.
        x, a, g, offset, perm, inv, spec: As given to the forward.
        need_params: Whether the gradients of g and offset are wanted.

    Returns:
        (dx, da, dg, doffset), each in the shape and dtype of its tensor; the last two None unless
        wanted, dg None for GIN, doffset None where it is folded.
    """
    return _backward(dy, dlogdet, x, a, g, offset, inv, spec, need_params, False)


def _backward(
    dy: Tensor,
    dlogdet: Tensor | None,
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    inv: Tensor | None,
    spec: CouplingSpec,
    need_params: bool,
    invert: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`coupling_bwd`; with ``invert`` the active channels of x hold u, in the accumulator's
    dtype, and x is written there.
    """
    acc = _accumulator(promoted(x, a, g))
    # a pass over memory less
    in_place = spec.folded and dy.dtype is x.dtype is acc and dy.is_contiguous()
    dx = dy if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    scale, _ = _channelwise_constants(g, offset, spec, acc)
    x, a, dy = _flat(x), _flat(a), _flat(dy)
    batch, channels, pixels = x.shape
    c2 = channels // 2
    c1 = channels - c2
    samples, pairs = _chunks(x, acc, spec.gin_rows if spec.gin else 0)
    fast = _is_fast(spec, x)
    # d s / d a_s = clamp * tanh_scale * (1 - tanh**2), which is 4 * sigma * (1 - sigma)
    slope, slope_backward = (4.0, _sigmoid_backward) if fast else (1.0, _tanh_backward)
    slope *= spec.clamp * spec.tanh_scale
    rows = 1 if dlogdet is None else batch // dlogdet.shape[0]
    direct = None
    if dlogdet is not None and not spec.gin:
        direct = (
            _as(dlogdet if rows == 1 else dlogdet.repeat_interleave(rows), acc)
            .mul(slope)
            .view(-1, 1, 1)
        )
    t, e = _scratch.take(x, acc, *[(samples, pairs, pixels)] * 2)
    need_scale = need_params and scale is not None
    doffset: Tensor | None = None
    products: Tensor | None = None  # per channel, the sum of du * u: the gradient of log(scale)
    for xb, ab, dyb, dxb, dab, *direct_b in _walk(
        0, samples, x, a, dy, _flat(dx), _flat(da), *[] if direct is None else [direct]
    ):
        xb, ab = _as(xb, acc), _as(ab, acc)
        du = dxb if in_place else _gathered(dyb, inv, dxb, acc)
        dab_acc = dab if dab.dtype is acc else torch.empty_like(ab)
        if need_params and not spec.folded:
            doffset = _plus(doffset, du.sum((0, 2)))
        if scale is not None and not spec.folded:
            du.mul_(scale)
        (x1, x2), (du1, du2), (a_s, a_t), (ds, dt) = (
            _halves(xb, c1, c2),
            _halves(du, c1, c2),
            _halves(ab, c2, c2),
            _halves(dab_acc, c2, c2),
        )
        parts = (
            [
                torch.mul(*pair, out=_fit(e, pair[0])).sum((0, 2))
                for pair in _walk(1, pairs, du1, x1)
            ]
            if need_scale
            else []
        )
        for x2i, du2i, a_si, a_ti, dsi, dti in _walk(1, pairs, x2, du2, a_s, a_t, ds, dt):
            ti, e_i = _fit(t, a_si), _fit(e, a_si)
            if fast and invert:
                # s with the bits that the forward took: the input of 32 blocks comes back with 0.46
                # of the error (median of 24 draws)
                _log_factor(a_si, spec, 1.0, fast, e_i, ti)
                _small_sigmoid(a_si, spec.tanh_scale, ti)
            else:
                if fast:
                    _from_sigmoid(
                        _small_sigmoid(a_si, spec.tanh_scale, ti), a_si, spec.clamp / _LN2, e_i
                    )
                else:
                    torch.mul(
                        torch.mul(a_si, _constant(spec.tanh_scale, acc), out=ti).tanh_(),
                        _constant(spec.clamp, acc),
                        out=e_i,
                    )
                if spec.gin:
                    _less_mean(e_i, spec)
            _exp(e_i, fast)
            if need_scale:
                part = torch.mul(du2i, x2i if invert else a_ti, out=dti).sum((0, 2))
            torch.mul(du2i, _constant(0.1, acc), out=dti)
            if invert:
                torch.mul(du2i, x2i.sub_(a_ti, alpha=0.1), out=dsi)  # u - 0.1 a_t is x exp(s)
                x2i.div_(e_i)
                du2i.mul_(e_i)
            else:
                torch.mul(du2i.mul_(e_i), x2i, out=dsi)
            if need_scale:
                parts.append(part if invert else torch.add(dsi.sum((0, 2)), part, alpha=0.1))
            if spec.gin:
                _less_mean(dsi, spec).mul_(_constant(slope, acc))
            elif direct_b:
                torch.add(direct_b[0], dsi, alpha=slope, out=dsi)
            else:
                dsi.mul_(_constant(slope, acc))
            # allow_mutation_on_saved_tensors() expects that results are called "out"
            if modes.is_watched():
                dsi.copy_(slope_backward(dsi, ti))
            else:
                slope_backward.grad_input(dsi, ti, grad_input=dsi)
        if need_scale:
            products = _plus(products, torch.cat(parts))
        if dx.dtype is not acc:
            dxb.copy_(du)
        if da.dtype is not acc:
            dab.copy_(dab_acc)
    if doffset is not None:
        doffset = _as(doffset, offset.dtype).view(offset.shape)
    return dx, da, _scale_gradient(products, dlogdet, g, scale, rows * pixels, spec, acc), doffset


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _gathered(dy: Tensor, inv: Tensor | None, out: Tensor, acc: torch.dtype) -> Tensor:
    """dy[:, inv] in the accumulator's dtype: in out where that has it, else in a tensor of
    its own.
    """
    if out.dtype is not acc:
        return dy.to(acc, copy=True) if inv is None else _as(dy, acc).index_select(1, inv)
    if inv is not None and dy.dtype is acc:
        return torch.index_select(dy, 1, inv, out=out)
    return out.copy_(dy if inv is None else dy.index_select(1, inv))


def _scale_gradient(
    products: Tensor | None,
    dlogdet: Tensor | None,
    g: Tensor,
    scale: Tensor | None,
    pixels: int,
    spec: CouplingSpec,
    acc: torch.dtype,
) -> Tensor | None:
    """The gradient of g from that of log(scale): the sum of du * u, and P times the
    log-determinant's.
    """
    if products is None or scale is None:
        return None
    if dlogdet is not None:
        # summed as plain PyTorch sums it, by the same operation in the same dtype: no device needs
        # to have float64
        products = products.add_(_as(dlogdet, acc).sum(), alpha=pixels)
    return _as(products.mul_(_log_scale_slope(scale.view(-1), spec.activation)), g.dtype).view(
        g.shape
    )


# --- inverse --------------------------------------------------------------------------------------


def coupling_inv_passive(
    y: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
) -> Tensor:
    """First half of the inverse: the passive channels, which the subnet needs.

    Args:
        y: (B, C, *S); already unpermuted where ``inv`` is None.
        g, offset, perm, inv, spec: As given to the forward.

    Returns:
        A new x (B, C, *S) in the promoted dtype of y and g; x[:, :C1] is final, x[:, C1:] is for
        :func:`coupling_inv_active`.
    """
    # so that it counts its versions: a subnet that writes to its input is noticed
    with torch.inference_mode(False):
        x = torch.empty(y.shape, dtype=promoted(y, g), device=y.device)
    acc = _accumulator(x.dtype)
    scale, offset = _channelwise_constants(g, offset, spec, acc)
    y, out = _flat(y), _flat(x)
    c1 = y.shape[1] - y.shape[1] // 2
    samples, _ = _chunks(y, acc, 1)
    for yb, xb in _walk(0, samples, y, out):
        # all channels at once; in half precision only the passive ones are kept, for a second
        # rounding would hurt the others
        u = _gathered(yb, inv, xb, acc).sub_(offset)
        if scale is not None:
            u.div_(scale)
        if x.dtype is not acc:
            xb[:, :c1].copy_(u[:, :c1])
    return x


def coupling_inv_active(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    jac: bool,
) -> Tensor | None:
    """Second half of the inverse: writes x[:, C1:] in place.

    Args:
        y: As given to :func:`coupling_inv_passive`.
        x: What that returned; u where scale and offset are folded.
        a: (B, 2*C2, *S), the subnet's output for x[:, :C1].
        g, offset, perm, inv, spec: As given to the forward.
        jac: Whether the log-determinant is wanted.

    Returns:
        The log-determinant of the inverse (B,) in nats, or None.
    """
    acc = _accumulator(x.dtype)
    scale, offset = _channelwise_constants(g, offset, spec, acc)
    y, a, out = _flat(y), _flat(a), _flat(x)
    batch, channels, pixels = out.shape
    c2 = channels // 2
    samples, pairs = _chunks(out, acc, spec.gin_rows if spec.gin else 0)
    s, t = _scratch.take(x, acc, *[(samples, pairs, pixels)] * 2)
    fast = _is_fast(spec, x)
    sums: list[Tensor] = []
    for yb, ab, xb in _walk(0, samples, y, a, out):
        (a_s, a_t), x2 = _halves(_as(ab, acc), c2, c2), xb.narrow(1, channels - c2, c2)
        if x2.dtype is acc:
            u2 = x2
        else:
            u2 = _as(x2, acc) if spec.folded else _active_of(yb, scale, offset, inv, c2, acc)
        total = None
        for u2i, a_si, a_ti in _walk(1, pairs, u2, a_s, a_t):
            si, ti = _fit(s, a_si), _fit(t, a_si)
            total = _summed(total, _log_factor(a_si, spec, -1.0, fast, si, ti), spec, jac)
            u2i.sub_(a_ti, alpha=0.1).mul_(_exp(si, fast))
        if u2 is not x2:
            x2.copy_(u2)
        if total is not None:
            sums.append(total)
    return _logdet(sums, scale, pixels, -1.0, fast) if jac else None


def _active_of(
    y: Tensor, scale: Tensor | None, offset: Tensor, inv: Tensor | None, c2: int, acc: torch.dtype
) -> Tensor:
    """(y[:, inv] - offset) / scale of the active channels, in the accumulator's dtype."""
    c1 = y.shape[1] - c2
    u = y[:, c1:].to(acc, copy=True) if inv is None else _as(y.index_select(1, inv[c1:]), acc)
    u = u.sub_(offset[:, c1:])
    return u if scale is None else u.div_(scale[:, c1:])


# --- inverse and backward in one, for chains that keep no activations -----------------------------


def coupling_inv_bwd(
    y: Tensor,
    x: Tensor,
    dy: Tensor,
    dlogdet: Tensor | None,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`coupling_inv_active` and :func:`coupling_bwd`: writes x[:, C1:] in place and returns
    the gradients.

    Args:
        y: The output of :func:`coupling_fwd`.
        x: What :func:`coupling_inv_passive` returned.
        dy: Gradient of y, (B, C, *S).
        dlogdet: Gradient of the log-determinant, (B,), or None; of fewer samples where several rows
            of x make one.
        a: (B, 2*C2, *S), the subnet's output for x[:, :C1].
        g, offset, perm, inv, spec: As given to the forward.
        need_params: Whether the gradients of g and offset are wanted.

    Returns:
        (dx, da, dg, doffset), as :func:`coupling_bwd`.
    """
    # u would not fit in x
    if x.dtype is not _accumulator(promoted(x, a, g)) or not x.is_contiguous():
        coupling_inv_active(y, x, a, g, offset, perm, inv, spec, False)
        return coupling_bwd(dy, dlogdet, x, a, g, offset, perm, inv, spec, need_params)
    return _backward(dy, dlogdet, x, a, g, offset, inv, spec, need_params, True)


# --- the same maths as differentiable operations --------------------------------------------------


def composite_fwd(
    x1: Tensor, x2: Tensor, a: Tensor, g: Tensor, offset: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """:func:`coupling_fwd` of the halves of x and without permutation, as ordinary operations:
    differentiable any number of times, traceable, transformable."""
    dtype = promoted(x1, a, g)
    acc = _accumulator(dtype)
    u2, sum_s = composite_affine(_as(x2, acc), _as(a, acc), spec, False)
    u = torch.cat((_as(x1, acc), u2), 1)
    offset = _channelwise(offset, u.dim(), acc)
    scale = None if spec.gin else scale_of(_channelwise(g, u.dim(), acc), spec.activation)
    if scale is None:
        v = u + offset
    elif (
        torch.is_grad_enabled()
        or modes.is_recorded()
        or torch._C._are_functorch_transforms_active()
    ):
        v = u * scale + offset  # not addcmul, whose backward takes a pass over u more
    elif u.dim() == 2:
        v = torch.addcmul(offset, u, scale)
    else:
        v = u.mul_(scale).add_(offset)
    return _as(v, dtype), _composite_logdet(sum_s, scale, u, 1.0)


def composite_inv_affine(
    v: Tensor, g: Tensor, offset: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor | None]:
    """u = (v - offset) / scale as ordinary operations, in the dtype of the computation; and scale,
    None for GIN.
    """
    acc = _accumulator(promoted(v, g))
    u = _as(v, acc) - _channelwise(offset, v.dim(), acc)
    if spec.gin:
        return u, None
    scale = scale_of(_channelwise(g, v.dim(), acc), spec.activation)
    return u / scale, scale


def composite_inv_coupling(
    u1: Tensor, u2: Tensor, a: Tensor, scale: Tensor | None, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """x = cat(u1, (u2 - 0.1 a_t) * exp(-s)) and the inverse's log-determinant as ordinary
    operations.
    """
    acc = _accumulator(promoted(u1, a))
    x2, sum_s = composite_affine(_as(u2, acc), _as(a, acc), spec, True)
    x = torch.cat((_as(u1, acc), x2), 1)
    return x, _composite_logdet(sum_s, scale, x, -1.0)


def composite_affine(x2: Tensor, a: Tensor, spec: CouplingSpec, rev: bool) -> tuple[Tensor, Tensor]:
    """The coupling of the active half and the sum of its log-factors per sample, negative in
    reverse.
    """
    c2 = x2.shape[1]
    dims = tuple(range(1, x2.dim()))
    a_s, a_t = _halves(a, c2, c2)
    s = a_s * _number(spec.tanh_scale, a)
    clamp = _number(-spec.clamp if rev else spec.clamp, a)
    # 0.3 us less an operation; the clamp is a number in what is recorded
    in_place = type(clamp) is Tensor and not torch.is_grad_enabled()
    s = s.tanh_().mul_(clamp) if in_place else torch.tanh(s) * clamp
    if spec.gin and s.numel():
        mean = s.mean(dims, keepdim=True)
        s = s - mean
        sum_s = 0.0 * mean.flatten()  # exact, and part of the graph as the stock block's is
    else:
        sum_s = s.sum(dims)
    if in_place:
        e = s.exp_()
        return torch.sub(x2, a_t, alpha=0.1).mul_(e) if rev else (x2 * e).add_(
            a_t, alpha=0.1
        ), sum_s
    e = torch.exp(s)
    return _add(x2, a_t, -0.1) * e if rev else _add(x2 * e, a_t, 0.1), sum_s


def _channelwise(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return _as(t if t.dim() == dim else t.view(1, -1, *[1] * (dim - 2)), dtype)


def _composite_logdet(sum_s: Tensor, scale: Tensor | None, x: Tensor, sign: float) -> Tensor:
    if scale is None:
        return sum_s
    return _add(sum_s, scale.log().sum(), sign if x.dim() == 2 else sign * math.prod(x.shape[2:]))


def _add(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """x + factor * y; in one operation, but where torch.func.linearize may look on, which crashes
    on that in torch 2.13.
    """
    if torch.compiler.is_compiling() or not modes.is_watched():
        return torch.add(x, y, alpha=factor)
    return x + factor * y


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The passive and the active channels of x, as views."""
    c2 = x.shape[1] // 2
    return _halves(x, x.shape[1] - c2, c2)
