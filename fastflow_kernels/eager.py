"""The coupling in plain PyTorch: hand-derived forward, backward and inverse.

The fast path of CPUs and the fallback everywhere else. The functions called ``coupling_*`` have twins of the same signature
in ``kernels``; those called ``composite_*`` are the same maths as ordinary differentiable operations, for double backward,
``torch.func``, ``torch.compile`` and export.

Notation, as in :class:`~fastflow_kernels.spec.CouplingSpec`: x (B, C, *S), C1 = C - C//2, C2 = C//2, a (B, 2*C2, *S) = (a_s, a_t),
P = prod(S); g (``global_scale``) and offset have C elements. ``perm`` and ``inv = argsort(perm)`` are int64 (C,), or None for the
identity: y[:, j] = v[:, perm[j]].

Why it looks as it does (float32, one thread of an AMD EPYC with AVX-512, nanoseconds per element): torch.tanh 3.4, exp 1.2, expm1 1.3,
sigmoid 0.5, exp2 0.3, one arithmetic pass in cache 0.1, ``x[:, p]`` 1.1 to 3.9 against 0.1 to 0.6 for index_select. So tanh is
expm1(2z) / (expm1(2z) + 2) where its sum is asked for, which keeps small arguments accurate, and 2*sigmoid(2z) - 1 (absolute error
1.8e-7) where it only feeds an exponential; tensors are walked in chunks that stay in the cache, and scratch is reused between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflow_kernels.spec import CouplingSpec

_LOG2E = math.log2(math.e)
_CHUNK_BYTES = 1 << 20  # per thread: what stays in a core's second-level cache beside its operands
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


# --- global affine -----------------------------------------------------------------------------------------------------------------


def scale_of(g: Tensor, activation: str) -> Tensor:
    """The global scale, activation(g): SIGMOID 10*sigmoid(g - 2), SOFTPLUS 0.1*softplus(g, beta=0.5), EXP exp(g)."""
    if activation == "SIGMOID":
        return 10.0 * torch.sigmoid(g - 2.0)
    if activation == "SOFTPLUS":
        return 0.1 * torch.nn.functional.softplus(g, beta=0.5)
    return torch.exp(g)


def _scale_slope(g: Tensor, scale: Tensor, activation: str) -> Tensor:
    """d scale / d g."""
    if activation == "SIGMOID":
        return scale * (1.0 - 0.1 * scale)
    if activation == "SOFTPLUS":
        return torch.where(g > 40.0, 0.1, 0.1 * torch.sigmoid(0.5 * g))  # 40: torch's softplus is the identity there
    return scale


# --- chunks ------------------------------------------------------------------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _flat(t: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C, P); copies only what is not contiguous."""
    return t.contiguous().view(t.shape[0], t.shape[1], -1) if t.dim() > 2 else t.contiguous().unsqueeze(-1)


def _chunks(x: Tensor, acc: torch.dtype, whole_samples: bool) -> tuple[int, int]:
    """How many samples, and how many channel pairs of each, one pass works on."""
    batch, channels, pixels = x.shape
    pairs = max(1, channels // 2)
    if x.device.type != "cpu":
        return batch, pairs  # elsewhere a pass is a launch: few and large
    budget = _CHUNK_BYTES // acc.itemsize * torch.get_num_threads()
    sample = channels * pixels
    if sample <= 4 * budget or whole_samples or pixels == 1:
        return max(1, min(batch, budget // sample)), pairs
    return 1, max(1, min(pairs, budget // pixels))


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


# --- s = clamp * tanh(tanh_scale * a_s), in units of log2 for exp2 -------------------------------------------------------------------


def _exact_tanh(a_s: Tensor, spec: CouplingSpec, out: Tensor, scratch: Tensor) -> Tensor:
    """tanh(tanh_scale * a_s) to 2 ulp at every magnitude, into out."""
    torch.mul(a_s, 2.0 * spec.tanh_scale, out=out)
    out.clamp_max_(40.0).expm1_()  # tanh(20) rounds to 1 in float64; expm1 would overflow to inf / inf further up
    return out.div_(torch.add(out, 2.0, out=scratch))


def _sigmoid(a_s: Tensor, spec: CouplingSpec, out: Tensor) -> Tensor:
    """sigmoid(2 * tanh_scale * a_s), that is (1 + tanh(tanh_scale * a_s)) / 2, into out."""
    return torch.mul(a_s, 2.0 * spec.tanh_scale, out=out).sigmoid_()


def _log2_factor(sigma: Tensor, spec: CouplingSpec, out: Tensor) -> Tensor:
    """s / ln 2 from sigma, into out; for GIN less its mean per sample."""
    k = spec.clamp * _LOG2E
    torch.mul(sigma, 2.0 * k, out=out)
    if spec.gin:
        return out.sub_(out.mean((1, 2), keepdim=True))  # the constant -k cancels
    return out.sub_(k)


# --- forward -----------------------------------------------------------------------------------------------------------------------


def coupling_fwd(
    x: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor | None, inv: Tensor | None, spec: CouplingSpec, jac: bool
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
        y (B, C, *S) in the promoted dtype of x, a and g, and the log-determinant (B,) in nats (float64 if y is, else float32;
        zeros for GIN), or None without ``jac``.
    """
    y = torch.empty(x.shape, dtype=promoted(x, a, g), device=x.device)
    acc = _accumulator(y.dtype)
    scale, offset = _columns(g, offset, spec, acc)
    x, a, out = _flat(x), _flat(a), _flat(y)
    batch, channels, pixels = x.shape
    c2 = channels // 2
    c1 = channels - c2
    samples, pairs = _chunks(x, acc, spec.gin)
    sum_tanh = x.new_zeros(batch, dtype=acc) if jac and not spec.gin else None
    in_place = perm is None and y.dtype is acc  # nothing moves: work where the result belongs
    factors = x.new_empty(samples * pairs * pixels, dtype=acc)
    moved = None if in_place else x.new_empty((samples, channels, pixels), dtype=acc)
    for b in range(0, batch, samples):
        rows = slice(b, min(batch, b + samples))
        xb, ab = _as(x[rows], acc), _as(a[rows], acc)
        n = xb.shape[0]
        v = out[rows] if moved is None else moved[:n]
        for j in range(0, c2, pairs):
            m = min(pairs, c2 - j)
            active = slice(c1 + j, c1 + j + m)
            s, v2 = factors[: n * m * pixels].view(n, m, pixels), v[:, active]
            if sum_tanh is not None:
                _exact_tanh(ab[:, j : j + m], spec, s, v2)
                sum_tanh[rows] += s.sum((1, 2))
                s.mul_(spec.clamp * _LOG2E)
            else:
                _log2_factor(_sigmoid(ab[:, j : j + m], spec, s), spec, s)
            s.exp2_()
            # 10 * (x2 * e + 0.1 * a_t): addcmul has no factor on its first term
            torch.addcmul(ab[:, c2 + j : c2 + j + m], xb[:, active], s, value=10.0, out=v2)
            v2.mul_(0.1 if scale is None else 0.1 * scale[active])
        if scale is None:
            v[:, :c1].copy_(xb[:, :c1])
        else:
            torch.mul(xb[:, :c1], scale[:c1], out=v[:, :c1])
        v.add_(offset)
        if moved is not None:
            _store_permuted(v, perm, out[rows])
    return y, _logdet(sum_tanh, scale, batch, pixels, spec, 1.0, x.device, acc) if jac else None


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype that ordinary operations on these tensors would give."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _columns(g: Tensor, offset: Tensor, spec: CouplingSpec, acc: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """scale and offset as (C, 1) in the accumulator's dtype; scale is None for GIN."""
    scale = None if spec.gin else scale_of(_as(g, acc), spec.activation).view(-1, 1)
    return scale, _as(offset, acc).view(-1, 1)


def _store_permuted(v: Tensor, perm: Tensor | None, out: Tensor) -> None:
    if perm is not None and v.dtype is out.dtype:
        torch.index_select(v, 1, perm, out=out)
    else:
        out.copy_(v if perm is None else v.index_select(1, perm))


def _logdet(
    sum_tanh: Tensor | None, scale: Tensor | None, batch: int, pixels: int, spec: CouplingSpec, sign: float, device: torch.device, acc: torch.dtype
) -> Tensor:
    """sign * (clamp * sum tanh + P * sum log scale); zeros for GIN."""
    if sum_tanh is None or scale is None:
        return torch.zeros(batch, dtype=acc, device=device)
    return sum_tanh.mul_(sign * spec.clamp).add_(scale.log().sum(), alpha=sign * pixels)


# --- backward ----------------------------------------------------------------------------------------------------------------------


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
        dy: Gradient of y, (B, C, *S).
        dlogdet: Gradient of the log-determinant, (B,), or None.
        x, a, g, offset, perm, inv, spec: As given to the forward.
        need_params: Whether the gradients of g and offset are wanted.

    Returns:
        (dx, da, dg, doffset), each in the shape and dtype of its tensor; the last two None unless wanted, dg None for GIN.
    """
    dx, da = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(a.shape, dtype=a.dtype, device=a.device)
    acc = _accumulator(promoted(x, a, g))
    scale, _ = _columns(g, offset, spec, acc)
    x, a, dy, dx_, da_ = _flat(x), _flat(a), _flat(dy), _flat(dx), _flat(da)
    batch, channels, pixels = x.shape
    c2 = channels // 2
    c1 = channels - c2
    samples, pairs = _chunks(x, acc, spec.gin)
    dscale = x.new_zeros(channels, dtype=acc) if need_params and scale is not None else None
    doffset = x.new_zeros(channels, dtype=acc) if need_params else None
    slope = 4.0 * spec.clamp * spec.tanh_scale  # d s / d a_s = slope * sigma * (1 - sigma)
    direct = None if dlogdet is None or spec.gin else (_as(dlogdet, acc) * slope).view(-1, 1, 1)
    scratch = x.new_empty((2, samples * pairs * pixels), dtype=acc)
    for b in range(0, batch, samples):
        rows = slice(b, min(batch, b + samples))
        xb, ab = _as(x[rows], acc), _as(a[rows], acc)
        n = xb.shape[0]
        dv = _gathered(dy[rows], inv, dx_[rows], acc)
        dab = da_[rows] if da.dtype is acc else torch.empty_like(ab)
        if doffset is not None:
            doffset += dv.sum((0, 2))
        for j in range(0, c2, pairs):
            m = min(pairs, c2 - j)
            active = slice(c1 + j, c1 + j + m)
            sigma, e = (scratch[i, : n * m * pixels].view(n, m, pixels) for i in (0, 1))
            d2, ds, dt = dv[:, active], dab[:, j : j + m], dab[:, c2 + j : c2 + j + m]
            _log2_factor(_sigmoid(ab[:, j : j + m], spec, sigma), spec, e).exp2_()
            if dscale is not None:
                torch.mul(d2, ab[:, c2 + j : c2 + j + m], out=dt)
                dscale[active] += dt.sum((0, 2)).mul_(0.1)
            torch.mul(d2, 0.1 if scale is None else 0.1 * scale[active], out=dt)
            d2.mul_(e)
            torch.mul(d2, xb[:, active], out=ds)
            if dscale is not None:
                dscale[active] += ds.sum((0, 2))
            if scale is not None:
                d2.mul_(scale[active])
            ds.mul_(slope if scale is None else slope * scale[active])
            if spec.gin:
                ds.sub_(ds.mean((1, 2), keepdim=True))
            elif direct is not None:
                ds.add_(direct[rows])
            _sigmoid_backward(ds, sigma, grad_input=ds)
        if dscale is not None:
            dscale[:c1] += (dv[:, :c1] * xb[:, :c1]).sum((0, 2))
        if scale is not None:
            dv[:, :c1].mul_(scale[:c1])
        if dx.dtype is not acc:
            dx_[rows].copy_(dv)
        if da.dtype is not acc:
            da_[rows].copy_(dab)
    if doffset is not None:
        doffset = _as(doffset, offset.dtype).view(offset.shape)
    return dx, da, _scale_gradient(dscale, dlogdet, g, scale, pixels, spec, acc), doffset


def _gathered(dy: Tensor, inv: Tensor | None, out: Tensor, acc: torch.dtype) -> Tensor:
    """The gradient of v = y[:, inv] in the accumulator's dtype: in out where that has it, else in a tensor of its own."""
    if dy.dtype is acc and out.dtype is acc:
        return out.copy_(dy) if inv is None else torch.index_select(dy, 1, inv, out=out)
    return dy.to(acc, copy=True) if inv is None else _as(dy, acc).index_select(1, inv)


def _scale_gradient(
    dscale: Tensor | None, dlogdet: Tensor | None, g: Tensor, scale: Tensor | None, pixels: int, spec: CouplingSpec, acc: torch.dtype
) -> Tensor | None:
    if dscale is None or scale is None:
        return None
    flat, scale = _as(g, acc).view(-1), scale.view(-1)
    if dlogdet is not None:
        dscale = dscale.add_(_as(dlogdet, acc).sum() * pixels / scale)
    return _as(dscale.mul_(_scale_slope(flat, scale, spec.activation)), g.dtype).view(g.shape)


# --- inverse -----------------------------------------------------------------------------------------------------------------------


def coupling_inv_passive(y: Tensor, g: Tensor, offset: Tensor, perm: Tensor | None, inv: Tensor | None, spec: CouplingSpec) -> Tensor:
    """First half of the inverse: the passive channels, which the subnet needs.

    Args:
        y: (B, C, *S); already unpermuted where ``inv`` is None.
        g, offset, perm, inv, spec: As given to the forward.

    Returns:
        A new x (B, C, *S) in the promoted dtype of y and g; x[:, :C1] is final, x[:, C1:] is for :func:`coupling_inv_active`.
    """
    x = torch.empty(y.shape, dtype=promoted(y, g), device=y.device)
    acc = _accumulator(x.dtype)
    scale, offset = _columns(g, offset, spec, acc)
    y, out = _flat(y), _flat(x)
    c1 = y.shape[1] - y.shape[1] // 2
    samples, _ = _chunks(y, acc, True)
    for b in range(0, y.shape[0], samples):
        rows = slice(b, b + samples)
        # the active rows are taken along in float32 and float64, where they need no second rounding; else each half on its own
        u = _gathered(y[rows], inv, out[rows], acc).sub_(offset)
        if scale is not None:
            u.div_(scale)
        if x.dtype is not acc:
            out[rows, :c1].copy_(u[:, :c1])
    return x


def coupling_inv_active(
    y: Tensor, x: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor | None, inv: Tensor | None, spec: CouplingSpec, jac: bool
) -> Tensor | None:
    """Second half of the inverse: writes x[:, C1:] in place.

    Args:
        y: As given to :func:`coupling_inv_passive`.
        x: What that returned.
        a: (B, 2*C2, *S), the subnet's output for x[:, :C1].
        g, offset, perm, inv, spec: As given to the forward.
        jac: Whether the log-determinant is wanted.

    Returns:
        The log-determinant of the inverse (B,) in nats, or None.
    """
    acc = _accumulator(x.dtype)
    scale, offset = _columns(g, offset, spec, acc)
    y, a, out = _flat(y), _flat(a), _flat(x)
    batch, channels, pixels = out.shape
    c2 = channels // 2
    c1 = channels - c2
    samples, pairs = _chunks(out, acc, spec.gin)
    sum_tanh = x.new_zeros(batch, dtype=acc) if jac and not spec.gin else None
    scratch = x.new_empty((2, samples * pairs * pixels), dtype=acc)
    for b in range(0, batch, samples):
        rows = slice(b, min(batch, b + samples))
        ab = _as(a[rows], acc)
        n = ab.shape[0]
        u = out[rows, c1:] if out.dtype is acc else _active_of(y[rows], scale, offset, inv, c1, acc)
        for j in range(0, c2, pairs):
            m = min(pairs, c2 - j)
            s, t = (scratch[i, : n * m * pixels].view(n, m, pixels) for i in (0, 1))
            if sum_tanh is not None:
                _exact_tanh(ab[:, j : j + m], spec, s, t)
                sum_tanh[rows] += s.sum((1, 2))
                s.mul_(-spec.clamp * _LOG2E)
            else:
                _log2_factor(_sigmoid(ab[:, j : j + m], spec, s), spec, s).neg_()
            u[:, j : j + m].sub_(ab[:, c2 + j : c2 + j + m], alpha=0.1).mul_(s.exp2_())
        if out.dtype is not acc:
            out[rows, c1:].copy_(u)
    return _logdet(sum_tanh, scale, batch, pixels, spec, -1.0, x.device, acc) if jac else None


def _active_of(y: Tensor, scale: Tensor | None, offset: Tensor, inv: Tensor | None, c1: int, acc: torch.dtype) -> Tensor:
    u = y[:, c1:].to(acc, copy=True) if inv is None else _as(y.index_select(1, inv[c1:]), acc)
    u = u.sub_(offset[c1:])
    return u if scale is None else u.div_(scale[c1:])


# --- the same maths as differentiable operations -----------------------------------------------------------------------------------


def composite_fwd(x: Tensor, a: Tensor, g: Tensor, offset: Tensor, spec: CouplingSpec, jac: bool) -> tuple[Tensor, Tensor | None]:
    """:func:`coupling_fwd` without permutation as ordinary operations: differentiable any number of times, traceable, transformable."""
    dtype = promoted(x, a, g)
    acc = _accumulator(dtype)
    c1 = x.shape[1] - x.shape[1] // 2
    x = _as(x, acc)
    x2, sum_s = composite_affine(x[:, c1:], _as(a, acc), spec, rev=False)
    v = torch.cat((x[:, :c1], x2), 1)
    scale = None if spec.gin else scale_of(_channelwise(g, x.dim(), acc), spec.activation)
    v = (v if scale is None else v * scale) + _channelwise(offset, x.dim(), acc)
    return _as(v, dtype), _composite_logdet(sum_s, scale, x) if jac else None


def composite_inv_affine(v: Tensor, g: Tensor, offset: Tensor, spec: CouplingSpec) -> Tensor:
    """u = (v - offset) / scale as ordinary operations, in the dtype of the computation."""
    acc = _accumulator(promoted(v, g))
    u = _as(v, acc) - _channelwise(offset, v.dim(), acc)
    return u if spec.gin else u / scale_of(_channelwise(g, v.dim(), acc), spec.activation)


def composite_inv_coupling(u: Tensor, a: Tensor, g: Tensor, spec: CouplingSpec, jac: bool) -> tuple[Tensor, Tensor | None]:
    """x = cat(u1, (u2 - 0.1 a_t) * exp(-s)) and the inverse's log-determinant as ordinary operations."""
    acc = _accumulator(promoted(u, a, g))
    c1 = u.shape[1] - u.shape[1] // 2
    x2, sum_s = composite_affine(_as(u[:, c1:], acc), _as(a, acc), spec, rev=True)
    x = torch.cat((_as(u[:, :c1], acc), x2), 1)
    if not jac:
        return x, None
    scale = None if spec.gin else scale_of(_as(g, acc), spec.activation)
    return x, -_composite_logdet(-sum_s, scale, x)


def composite_affine(x2: Tensor, a: Tensor, spec: CouplingSpec, rev: bool) -> tuple[Tensor, Tensor]:
    """The coupling of the active half and the sum of its log-factors per sample (negative in reverse)."""
    c2 = x2.shape[1]
    dims = tuple(range(1, x2.dim()))
    s = spec.clamp * torch.tanh(spec.tanh_scale * a[:, :c2])
    if spec.gin and s.numel():
        s = s - s.mean(dims, keepdim=True)
    if rev:
        return (x2 - 0.1 * a[:, c2:]) * torch.exp(-s), -s.sum(dims)
    return x2 * torch.exp(s) + 0.1 * a[:, c2:], s.sum(dims)


def _channelwise(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return _as(t, dtype).view(1, -1, *[1] * (dim - 2))


def _composite_logdet(sum_s: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    if scale is None:
        return torch.zeros_like(sum_s)  # exact: the mean was taken out
    return sum_s + math.prod(x.shape[2:]) * scale.log().sum()
