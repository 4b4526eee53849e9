"""One coupling in plain PyTorch, and checks of an engine's functions against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, CouplingSpec, OutputGrads
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import Engine, plain
from fastflow_kernels.engines.triton import engine as kernels
from tests.support.compare import assert_close
from tests.support.modes import INTERPRETED, sanitize, units_of_floor

# The interpreter truncates when it stores bfloat16, where a GPU rounds to nearest. That costs up to
# this share of a value.
TRUNCATED = {torch.bfloat16: 2.0**-7, torch.float16: 0.0} if INTERPRETED else {}

# --- the plain operations, which compute in float64 or float32 and round once --------------------


def plain_forward(x: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    g, offset, spec = coupling[:3]
    x = x[:, coupling.inv] if coupling.unpermutes_input else x
    v, log_det = plain.forward(*plain.split(x), a, g, offset, spec)
    return v[:, coupling.perm], log_det


def plain_inverse(y: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    (g, offset), spec = coupling.parameters, coupling.spec
    acc_dtype = accumulator(promoted(y, g))
    scale = plain.scale_of(g, spec, y.dim(), acc_dtype)
    u = plain.invert_affine(
        y[:, coupling.inv], scale, plain.per_channel(offset, y.dim(), acc_dtype)
    )
    x, sum_s = plain.invert_coupling(*plain.split(u), a, spec)
    log_det = plain.add_log_scale(sum_s, scale, -plain.count_pixels(x))
    x = x.to(promoted(y, g, a))
    return x[:, coupling.perm] if coupling.unpermutes_input else x, log_det


def plain_log_det(x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
    return plain_forward(x, a, coupling)[1]


def size_of_log_det_terms(x: Tensor, a: Tensor, coupling: Coupling) -> float:
    """Return the size of the terms whose sum, which may cancel, is the log-determinant."""
    g, _, spec = coupling[:3]
    # Make every s non-negative, so that the sum cannot cancel.
    a = a.nan_to_num().abs()
    spec = spec._replace(clamp=abs(spec.clamp), input_scale=abs(spec.input_scale))
    x2 = a[:, : a.shape[1] // 2]
    _, sum_s = plain.couple(x2, a, spec._replace(gin=False), False, False)
    terms = sum_s.max().item()
    if not spec.gin:
        log_scale = plain.activated(g, spec.activation).log().abs().sum()
        terms += x[0, 0].numel() * log_scale.item()
    return terms


def plain_gradients(
    x: Tensor,
    a: Tensor,
    coupling: Coupling,
    grads: OutputGrads,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return autograd's gradients of :func:`plain_forward`.

    Args:
        x: Input.
        a: Coefficients.
        coupling: The coupling.
        grads: Gradients of the output and of the log-determinant.
        dtype: Computation dtype, to which the inputs are cast; None leaves their own dtypes.

    Returns:
        The gradients of x, a, global_scale and global_offset.
    """
    x, a, coupling = cast(dtype, x, a, coupling)
    leaves = [x, a, coupling.global_scale, coupling.global_offset]
    leaves = [t.clone().requires_grad_() for t in leaves]
    coupling = coupling._replace(global_scale=leaves[2], global_offset=leaves[3])
    y, log_det = plain_forward(leaves[0], leaves[1], coupling)
    outputs, seeds = [y], [grads.y.to(y.dtype)]
    if grads.log_det is not None and log_det.requires_grad:
        outputs, seeds = [y, log_det], [*seeds, grads.log_det.to(log_det.dtype)]
    return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)


def cast(dtype: torch.dtype | None, *values: Any) -> list[Any]:
    """Detach tensors and couplings and cast them to a dtype; None leaves their own dtypes."""

    def cast_one(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Coupling):
            g, offset = cast_one(value.global_scale), cast_one(value.global_offset)
            return value._replace(global_scale=g, global_offset=offset)
        return value.detach().to(value.dtype if dtype is None else dtype)

    return [cast_one(value) for value in values]


# --- comparison -----------------------------------------------------------------------------------


def make(
    shape: Sequence[int],
    activation: str = "SOFTPLUS",
    dialect: str = "anomalib",
    gin: bool = False,
    clamp: float = 1.9,
    unpermutes_input: bool = False,
    x: torch.dtype = torch.float32,
    a: torch.dtype | None = None,
    g: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Coupling]:
    """Return x, a and a coupling with random values; the arguments x, a and g are their dtypes."""
    batch, channels, *spatial = shape
    perm = torch.randperm(channels)
    values = torch.randn(shape, dtype=x)
    coefficients = (5 * torch.randn(batch, channels // 2 * 2, *spatial)).to(a or x)
    coupling = Coupling(
        (1.5 * torch.randn(channels)).to(g or x),
        torch.randn(channels).to(g or x),
        CouplingSpec.of(clamp, dialect, activation, gin),
        perm,
        perm.argsort(),
        unpermutes_input,
    )
    return values, coefficients, coupling


def shape_id(shape: Sequence[int]) -> str:
    return "B{}-C{}".format(*shape[:2]) + ("-" + "x".join(map(str, shape[2:])) if shape[2:] else "")


def close(
    actual: Tensor | None,
    truth: Tensor,
    baseline: Tensor,
    name: str,
    magnitude: float | None = None,
) -> None:
    """Call ``compare.assert_close``, and allow the interpreter one more rounding for bfloat16.

    The interpreter truncates when it stores bfloat16, where a GPU rounds to nearest. That costs up
    to 2^-7 of a value, so the result is first moved towards the truth by up to that much.
    """
    if actual is not None and actual.dtype in TRUNCATED:
        allowed = TRUNCATED[actual.dtype] * actual.double().abs()
        moved = actual.double() + (truth - actual.double()).clamp(-allowed, allowed)
        actual = torch.where(moved.isfinite(), moved, actual.double()).to(actual.dtype)
    assert_close(actual, truth, baseline, name, magnitude=magnitude, units=units_of_floor())


def check_everything(
    x: Tensor,
    a: Tensor,
    coupling: Coupling,
    grads: OutputGrads | None = None,
    engine: Engine = kernels,
) -> None:
    """Check forward, backward and inverse against the truth, under the memory checker.

    Args:
        x: Input, as for the engine.
        a: Coefficients, as for the engine.
        coupling: The coupling, as for the engine.
        grads: Gradients of the forward pass's results; random if left out.
        engine: The engine to check. The eager engine does not support
            ``coupling.unpermutes_input``.
    """
    inputs = (x, a, coupling.global_scale, coupling.global_offset)
    before = [t.clone() for t in inputs]
    result = torch.promote_types(torch.promote_types(x.dtype, a.dtype), inputs[2].dtype)
    acc_dtype = torch.float64 if result is torch.float64 else torch.float32
    base = torch.float32 if result is torch.float64 else result  # see compare.py

    y = check_forward(x, a, coupling, base, engine)
    assert y.dtype == result
    if grads is None:
        grads = OutputGrads(torch.randn(x.shape).to(result), torch.randn(len(x), dtype=acc_dtype))
    check_backward(x, a, grads, coupling, base, engine)
    y = torch.randn(x.shape).to(result)
    back = check_inverse(y, a, coupling, base, engine)
    # A chain is reconstructed in its own dtype. Coefficients that are not finite have no y.
    if result == back.dtype and a.isfinite().all():
        check_inverse_and_backward(y, a, grads, coupling, base, engine)

    for copy, after in zip(before, inputs, strict=True):
        assert torch.equal(copy, after) or copy.isnan().any(), "an input was written to"


def check_forward(
    x: Tensor, a: Tensor, coupling: Coupling, base: torch.dtype, engine: Engine
) -> Tensor:
    """Check an engine's forward pass, and return y.

    ``base`` is the baseline's dtype, here and below.
    """
    with sanitize():
        y, log_det = engine.forward(x, a, coupling)
    wide, narrow = cast(torch.float64, x, a, coupling), cast(base, x, a, coupling)
    truth, baseline = plain_forward(*wide), plain_forward(*narrow)
    assert y.is_contiguous()
    close(y, truth[0], baseline[0], "y")
    check_log_det(log_det, truth[1], baseline[1], wide, y.dtype)
    return y


def check_log_det(
    log_det: Tensor, truth: Tensor, baseline: Tensor, wide: list[Any], dtype: torch.dtype
) -> None:
    assert log_det.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert log_det.shape == wide[0].shape[:1]
    close(log_det, truth, baseline, "log_det", size_of_log_det_terms(*wide))
    if wide[2].spec.gin and wide[1].isfinite().all():
        assert (log_det == 0).all()


def check_backward(
    x: Tensor,
    a: Tensor,
    grads: OutputGrads,
    coupling: Coupling,
    base: torch.dtype,
    engine: Engine,
) -> None:
    with sanitize():
        actual = engine.backward(x, a, grads, coupling, True)
    truth = plain_gradients(x, a, coupling, grads, torch.float64)
    baseline = plain_gradients(x, a, coupling, grads, base)
    check_gradients(actual, truth, baseline, (x, a, coupling))


def check_gradients(
    actual: CouplingGrads,
    truth: tuple[Tensor, ...],
    baseline: tuple[Tensor, ...],
    inputs: tuple[Tensor, Tensor, Coupling],
    of: str = "",
) -> None:
    x, a, coupling = inputs
    sources = (x, a, coupling.global_scale, coupling.global_offset)
    names = actual._fields
    for name, t, true, base, source in zip(names, actual, truth, baseline, sources, strict=True):
        if name == "global_scale" and coupling.spec.gin:
            assert t is None
        else:
            assert (t.dtype, t.shape, t.is_contiguous()) == (source.dtype, source.shape, True), name
            close(t, true, base, f"gradient of {name}{of}")


def check_inverse(
    y: Tensor, a: Tensor, coupling: Coupling, base: torch.dtype, engine: Engine
) -> Tensor:
    """Check an engine's inverse, and return x."""
    with sanitize():
        x, log_det = inverse(y, a, coupling, engine)
    assert x.dtype == torch.promote_types(y.dtype, coupling.global_scale.dtype)
    wide, narrow = cast(torch.float64, y, a, coupling), cast(base, y, a, coupling)
    truth, baseline = plain_inverse(*wide), plain_inverse(*narrow)
    close(x, truth[0], baseline[0], "x")
    check_log_det(log_det, truth[1], baseline[1], wide, torch.promote_types(x.dtype, a.dtype))
    return x


def inverse(
    y: Tensor, a: Tensor, coupling: Coupling, engine: Engine = kernels
) -> tuple[Tensor, Tensor]:
    """Return x and the log-determinant, computed in the two steps of an engine."""
    x = engine.invert_passive(y, coupling)
    assert x.is_contiguous()
    passive = x[:, coupling.inv] if coupling.unpermutes_input else x
    assert not passive[:, : x.shape[1] - x.shape[1] // 2].isnan().any() or y.isnan().any()
    return x, engine.invert_active(y, x, a, coupling)


def check_inverse_and_backward(
    y: Tensor,
    a: Tensor,
    grads: OutputGrads,
    coupling: Coupling,
    base: torch.dtype,
    engine: Engine,
) -> None:
    """Check the function that computes the inverse and the gradients at it together."""
    with sanitize():
        x = engine.invert_passive(y, coupling)
        actual = engine.invert_and_backward(y, x, a, grads, coupling, True)
    wide, narrow = cast(torch.float64, y, a, coupling), cast(base, y, a, coupling)
    truth, baseline = plain_inverse(*wide)[0], plain_inverse(*narrow)[0]
    close(x, truth, baseline, "x reconstructed")
    truth = plain_gradients(truth, wide[1], wide[2], grads, torch.float64)
    baseline = plain_gradients(baseline, narrow[1], narrow[2], grads, base)
    check_gradients(actual, truth, baseline, (x, a, coupling), " at x reconstructed")


# --- a side: x and y are the active half alone ----------------------------------------------------


def make_side(
    shape: Sequence[int],
    gin: bool = False,
    function: str = "tanh",
    input_scale: float = 1.0,
    clamp: float = 1.272,
    x: torch.dtype = torch.float32,
    a: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Coupling]:
    """Return x, a and a side with random values; the arguments x and a are their dtypes.

    GIN takes its mean per pixel.
    """
    batch, channels, *spatial = shape
    spec = CouplingSpec(clamp, input_scale, None, gin, function, 1.0, gin)
    coefficients = (2 * torch.randn(batch, 2 * channels, *spatial)).to(a or x)
    return torch.randn(shape, dtype=x), coefficients, Coupling(None, None, spec)


def plain_side(rev: bool, x: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    """Return y, or with ``rev`` the inverse, and the log-determinant."""
    acc_dtype = accumulator(promoted(x, a))
    y, sum_s = plain.couple(x.to(acc_dtype), a.to(acc_dtype), coupling.spec, rev, False)
    if coupling.spec.gin:
        sum_s = 0.0 * sum_s.flatten(1).sum(1)  # NaN where a mean is
    return y.to(promoted(x, a)), sum_s


def plain_side_gradients(
    grads: OutputGrads, x: Tensor, a: Tensor, coupling: Coupling
) -> tuple[Tensor, ...]:
    """Return autograd's gradients of :func:`plain_side` for x and a."""
    x, a = (t.detach().clone().requires_grad_() for t in (x, a))
    y, log_det = plain_side(False, x, a, coupling)
    outputs, seeds = [y], [grads.y.to(y.dtype)]
    if grads.log_det is not None and not coupling.spec.gin:
        outputs, seeds = [y, log_det], [*seeds, grads.log_det.to(log_det.dtype)]
    return torch.autograd.grad(outputs, (x, a), seeds)


class Part(NamedTuple):
    """Channels of a larger tensor.

    Attributes:
        whole: The larger tensor.
        own: Some of its channels, up to the last but one, as a view. The others are 7.
    """

    whole: Tensor
    own: Tensor

    def assert_the_others_are_untouched(self) -> None:
        last = self.whole.shape[1] - 1
        for others in (self.whole[:, : last - self.own.shape[1]], self.whole[:, last:]):
            assert (others == 7.0).all()


def part_of(t: Tensor, channels_last: bool = False, first: int = 8) -> Part:
    """Return a copy of a tensor as a part.

    Args:
        t: The values, (B, C, *S).
        channels_last: Whether the larger tensor is channels-last.
        first: Its first channel. The part is aligned to 16 bytes if it is 8.
    """
    batch, channels, *spatial = t.shape
    whole = torch.full((batch, first + channels + 1, *spatial), 7.0, dtype=t.dtype)
    whole = in_channels_last(whole) if channels_last else whole
    own = whole[:, first:-1]
    own.copy_(t)
    return Part(whole, own)


def in_channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def check_side(
    x: Tensor,
    a: Tensor,
    coupling: Coupling,
    engine: Engine = kernels,
    channels_last: bool = False,
    first: int = 8,
) -> None:
    """Check a side's forward, backward and inverse against the truth, under the memory checker.

    Args:
        x: The active half.
        a: Its coefficients.
        coupling: The coupling.
        engine: The engine to check.
        channels_last, first: Where x, y and their gradients lie: see :func:`part_of`.
    """
    result = promoted(x, a)
    acc_dtype = accumulator(result)
    base = torch.float32 if result is torch.float64 else result  # see compare.py
    a = in_channels_last(a) if channels_last else a

    def part(t: Tensor) -> Part:
        return part_of(t, channels_last, first)

    inputs, y = part(x), part(torch.zeros(x.shape, dtype=result))
    with sanitize():
        same, log_det = engine.forward(inputs.own, a, coupling, y.own)
    assert same is y.own
    wide, narrow = cast(torch.float64, x, a, coupling), cast(base, x, a, coupling)
    truth, baseline = plain_side(False, *wide), plain_side(False, *narrow)
    check_side_results(y, log_det, truth, baseline, wide)

    grads = OutputGrads(torch.randn(x.shape).to(result), torch.randn(len(x), dtype=acc_dtype))
    dy, dx = part(grads.y), part(torch.zeros_like(x))
    with sanitize():
        actual = engine.backward(inputs.own, a, grads._replace(y=dy.own), coupling, False, dx.own)
    assert actual.x is dx.own
    check_side_gradients(actual, x, a, coupling, grads, base)
    for read, values in ((inputs, x), (dy, grads.y)):
        assert torch.equal(read.own.nan_to_num(), values.nan_to_num()), "an input was written to"
        read.assert_the_others_are_untouched()
    dx.assert_the_others_are_untouched()

    values = torch.randn(x.shape).to(result)
    y, back = part(values), part(torch.zeros_like(values))
    with sanitize():
        log_det = engine.invert_active(y.own, back.own, a, coupling)
    wide, narrow = cast(torch.float64, values, a, coupling), cast(base, values, a, coupling)
    truth, baseline = plain_side(True, *wide), plain_side(True, *narrow)
    check_side_results(back, log_det, truth, baseline, wide)
    if a.isfinite().all():
        again = part(torch.zeros_like(values))
        with sanitize():
            actual = engine.invert_and_backward(
                y.own, again.own, a, grads._replace(y=dy.own), coupling, False
            )
        assert torch.equal(again.own, back.own)
        check_side_gradients(actual, back.own, a, coupling, grads, base)


def check_side_results(
    y: Part,
    log_det: Tensor,
    truth: tuple[Tensor, Tensor],
    baseline: tuple[Tensor, Tensor],
    wide: list[Any],
) -> None:
    """Check a side's y, or its inverse, and the log-determinant."""
    y.assert_the_others_are_untouched()
    close(y.own, truth[0], baseline[0], "y")
    assert log_det.dtype == accumulator(y.own.dtype)
    x, a, coupling = wide
    affine = coupling._replace(spec=coupling.spec._replace(gin=False))
    terms = plain_side(False, x, a.nan_to_num().abs(), affine)[1].max().item()
    close(log_det, truth[1], baseline[1], "log_det", terms)
    if coupling.spec.gin and a.isfinite().all():
        assert (log_det == 0).all()


def check_side_gradients(
    actual: CouplingGrads,
    x: Tensor,
    a: Tensor,
    coupling: Coupling,
    grads: OutputGrads,
    base: torch.dtype,
) -> None:
    """Check a side's gradients at x."""
    truth = plain_side_gradients(grads, *cast(torch.float64, x, a, coupling))
    baseline = plain_side_gradients(grads, *cast(base, x, a, coupling))
    assert actual.global_scale is actual.global_offset is None
    assert (actual.x.dtype, actual.a.dtype) == (x.dtype, a.dtype)
    close(actual.x, truth[0], baseline[0], "gradient of x")
    close(actual.a, truth[1], baseline[1], "gradient of a")
