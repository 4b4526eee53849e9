"""One coupling in plain PyTorch, and the check of every kernel, or of the eager functions, against
it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastflow_kernels.engines.triton import coupling
from fastflow_kernels.coupling import CouplingSpec
from tests.support.compare import assert_close
from tests.support.modes import INTERPRETED, sanitize, units_of_floor

# The interpreter truncates where a GPU rounds to nearest when it stores bfloat16. That costs up to
# this share of a value.
TRUNCATED = {torch.bfloat16: 2.0**-7, torch.float16: 0.0} if INTERPRETED else {}

# --- plain PyTorch --------------------------------------------------------------------------------


def scale_of(g, spec):
    if spec.gin:
        return torch.ones_like(g)
    if spec.activation == "SIGMOID":
        return 10 * torch.sigmoid(g - 2)
    return 0.1 * F.softplus(g, beta=0.5) if spec.activation == "SOFTPLUS" else g.exp()


def plain_s(a, spec):
    s = spec.clamp * torch.tanh(spec.tanh_scale * a[:, : a.shape[1] // 2])
    return s - s.mean(tuple(range(1, s.dim())), keepdim=True) if spec.gin and s.numel() else s


def plain_logdet(s, x, g, spec):
    if spec.gin:
        return s.new_zeros(x.shape[0])
    return s.flatten(1).sum(1) + x[0, 0].numel() * scale_of(g, spec).log().sum()


def plain_fwd(x, a, g, offset, perm, spec):
    c2 = a.shape[1] // 2
    c1 = x.shape[1] - c2
    view = (1, -1) + (1,) * (x.dim() - 2)
    x = x[:, perm.argsort()] if spec.reverse else x
    s = plain_s(a, spec)
    u = torch.cat((x[:, :c1], x[:, c1:] * s.exp() + 0.1 * a[:, c2:]), 1)
    v = u * scale_of(g, spec).view(view) + offset.view(view)
    return v[:, perm], plain_logdet(s, x, g, spec)


def plain_inv(y, a, g, offset, inv, spec):
    c2 = a.shape[1] // 2
    c1 = y.shape[1] - c2
    view = (1, -1) + (1,) * (y.dim() - 2)
    s = plain_s(a, spec)
    u = (y[:, inv] - offset.view(view)) / scale_of(g, spec).view(view)
    x = torch.cat((u[:, :c1], (u[:, c1:] - 0.1 * a[:, c2:]) * (-s).exp()), 1)
    return x[:, inv.argsort()] if spec.reverse else x, -plain_logdet(s, y, g, spec)


def cast(values, dtype):
    return [
        v.detach().to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in values
    ]


def gradients(x, a, g, offset, perm, spec, dy, dlogdet, dtype):
    """Autograd's gradients of the plain forward for x, a, g, offset, all cast to dtype (None: as
    they are).
    """
    leaves = [
        t.detach().clone() if dtype is None else t.detach().to(dtype, copy=True)
        for t in (x, a, g, offset)
    ]
    for t in leaves:
        t.requires_grad_()
    y, logdet = plain_fwd(*leaves, perm, spec)
    outputs, seeds = [y], [dy.to(y.dtype)]
    if dlogdet is not None and logdet.requires_grad:
        outputs, seeds = [y, logdet], [dy.to(y.dtype), dlogdet.to(logdet.dtype)]
    return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)


# --- comparison -----------------------------------------------------------------------------------


def close(actual, truth, baseline, name, magnitude=None):
    """compare.assert_close; in the interpreter with one more rounding for bfloat16.

    The interpreter truncates where a GPU rounds to nearest when it stores bfloat16. That costs up
    to 2^-7 of a value; so far the result is moved towards the truth before it is judged.
    """
    if actual is not None and actual.dtype in TRUNCATED:
        room = TRUNCATED[actual.dtype] * actual.double().abs()
        moved = actual.double() + (truth - actual.double()).clamp(-room, room)
        actual = torch.where(moved.isfinite(), moved, actual.double()).to(actual.dtype)
    assert_close(actual, truth, baseline, name, magnitude=magnitude, units=units_of_floor())


def make(
    shape,
    spec_name="SOFTPLUS",
    dialect="anomalib",
    gin=False,
    clamp=1.9,
    reverse=False,
    x=torch.float32,
    a=None,
    g=None,
):
    """(x, a, g, offset, perm, inv, spec) with random values."""
    batch, channels, *spatial = shape
    spec = CouplingSpec.of(clamp, dialect, spec_name, gin)._replace(reverse=reverse)
    perm = torch.randperm(channels)
    return (
        torch.randn(shape, dtype=x),
        (5 * torch.randn(batch, channels // 2 * 2, *spatial)).to(a or x),
        (1.5 * torch.randn(channels)).to(g or x),
        torch.randn(channels).to(g or x),
        perm,
        perm.argsort(),
        spec,
    )


def poisoned_inverse(y, inputs, jac=True, operations=coupling):
    _, a, g, offset, perm, inv, spec = inputs
    x = operations.coupling_inv_passive(y, g, offset, perm, inv, spec)
    assert x.is_contiguous()
    passive = x[:, inv] if spec.reverse else x
    assert not passive[:, : x.shape[1] - x.shape[1] // 2].isnan().any() or y.isnan().any()
    return x, operations.coupling_inv_active(y, x, a, g, offset, perm, inv, spec, jac)


def check_everything(inputs, dy=None, dlogdet=None, operations=coupling):
    """Forward, backward and inverse of one set of inputs, under the memory checker, against the
    truth.

    ``operations`` is the module whose functions are checked: the kernels', or the eager functions,
    which know no ``spec.reverse``.
    """
    x, a, g, offset, perm, inv, spec = inputs
    kept = [t.clone() for t in (x, a, g, offset)]
    result = torch.promote_types(torch.promote_types(x.dtype, a.dtype), g.dtype)
    acc = torch.float64 if result is torch.float64 else torch.float32
    base = torch.float32 if result is torch.float64 else result  # see compare.py
    wide, narrow = cast((x, a, g, offset), torch.float64), cast((x, a, g, offset), base)
    terms = (
        plain_s(wide[1], spec).nan_to_num().flatten(1).abs().sum(1).max()
        + x[0, 0].numel() * scale_of(wide[2], spec).log().abs().sum()
    )
    # the log-determinant is a sum that cancels: its floor is that of the terms
    terms = terms.item()

    with sanitize():
        y, logdet = operations.coupling_fwd(*inputs, True)
    assert y.dtype == result
    assert y.is_contiguous()
    assert logdet.dtype == acc
    assert logdet.shape == (x.shape[0],)
    truth, baseline = plain_fwd(*wide, perm, spec), plain_fwd(*narrow, perm, spec)
    close(y, truth[0], baseline[0], "y")
    close(logdet, truth[1], baseline[1], "logdet", terms)
    if spec.gin:
        assert (logdet == 0).all()

    dy = torch.randn(y.shape).to(y.dtype) if dy is None else dy
    dlogdet = torch.randn(x.shape[0], dtype=acc) if dlogdet is None else dlogdet
    with sanitize():
        grads = operations.coupling_bwd(dy, dlogdet, *inputs, True)
    truth = gradients(x, a, g, offset, perm, spec, dy, dlogdet, torch.float64)
    baseline = gradients(x, a, g, offset, perm, spec, dy, dlogdet, base)
    for name, t, source, true, plain in zip(
        ("dx", "da", "dg", "doffset"), grads, (x, a, g, offset), truth, baseline, strict=True
    ):
        if t is not None:
            assert (t.dtype, t.shape, t.is_contiguous()) == (source.dtype, source.shape, True), name
        if name == "dg" and spec.gin:
            assert t is None
        else:
            close(t, true, plain, name)

    other = torch.randn(x.shape).to(y.dtype)
    with sanitize():
        x_back, logdet = poisoned_inverse(other, inputs, operations=operations)
    assert x_back.dtype == torch.promote_types(other.dtype, g.dtype)
    wide, narrow = cast((other, a, g, offset), torch.float64), cast((other, a, g, offset), base)
    truth, baseline = plain_inv(*wide, inv, spec), plain_inv(*narrow, inv, spec)
    close(x_back, truth[0], baseline[0], "x")
    close(logdet, truth[1], baseline[1], "inverse logdet", terms)

    # a chain is undone in its own dtype and permutes by itself; and no y comes of coefficients that
    # are not finite
    if result == x_back.dtype and not spec.reverse and a.isfinite().all():
        check_inverse_and_backward(other, dy, dlogdet, inputs, base, operations)

    for before, after in zip(kept, (x, a, g, offset), strict=True):
        assert torch.equal(before, after) or before.isnan().any(), "an input was written to"


def check_inverse_and_backward(y, dy, dlogdet, inputs, base, operations):
    """Both in one: the inverse that the two kernels give, and the gradients there."""
    _, a, g, offset, perm, inv, spec = inputs
    with sanitize():
        x = operations.coupling_inv_passive(y, g, offset, perm, inv, spec)
        grads = operations.coupling_inv_bwd(y, x, dy, dlogdet, a, g, offset, perm, inv, spec, True)
    wide, narrow = cast((y, a, g, offset), torch.float64), cast((y, a, g, offset), base)
    truth, baseline = plain_inv(*wide, inv, spec)[0], plain_inv(*narrow, inv, spec)[0]
    close(x, truth, baseline, "x undone")
    exact = gradients(truth, a, g, offset, perm, spec, dy, dlogdet, torch.float64)
    plain = gradients(baseline, a, g, offset, perm, spec, dy, dlogdet, base)
    for name, t, true, other in zip(
        ("dx", "da", "dg", "doffset"), grads, exact, plain, strict=True
    ):
        if name == "dg" and spec.gin:
            assert t is None
        else:
            close(t, true, other, f"{name} of x undone")


def shape_id(shape):
    return "B{}-C{}".format(*shape[:2]) + ("-" + "x".join(map(str, shape[2:])) if shape[2:] else "")
