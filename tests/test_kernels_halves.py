"""Test the Triton kernels between halves, as consecutive blocks of a chain call them.

Run them as tests/test_kernels.py says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastflow_kernels.coupling import (
    ACTIVATIONS,
    Coupling,
    CouplingGrads,
    Halves,
    HalvesGrads,
    OutputGrads,
)
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines.triton import engine
from tests.support.coupling import (
    cast,
    check_gradients,
    check_log_det,
    close,
    make,
    part_of,
    plain_forward,
    plain_gradients,
)
from tests.support.kernels import (  # noqa: F401  (fixtures)
    busy,
    default_device,
    kernels_run,
    not_interpreted,
    on_this_machine,
    shapes,
    shapes_but_shortly,
)
from tests.support.modes import sanitize, slow_when_executed

pytestmark = on_this_machine

Layout = Callable[[Tensor], Halves]


# --- how halves may lie ---------------------------------------------------------------------------


def split(t: Tensor) -> Halves:
    """Return the halves of a tensor, as views of it."""
    active = t.shape[1] // 2
    return Halves(*t.split((t.shape[1] - active, active), 1))


def contiguous(t: Tensor) -> Halves:
    return Halves(*(half.clone(memory_format=torch.contiguous_format) for half in split(t)))


def of_one(t: Tensor) -> Halves:
    return split(t.clone())


def of_a_larger_one(t: Tensor) -> Halves:
    return split(part_of(t).own)


def of_two(t: Tensor) -> Halves:
    """Return halves whose samples have gaps between them, of different sizes."""
    passive, active = split(t)
    return Halves(part_of(passive).own, part_of(active, first=24).own)


def misaligned(t: Tensor) -> Halves:
    """Return halves of which the active one starts one element behind a multiple of 16 bytes."""
    passive, active = contiguous(t)
    memory = torch.empty(active.numel() + 1, dtype=t.dtype)
    return Halves(passive, memory[1:].view(active.shape).copy_(active))


class Call(NamedTuple):
    """How a block is called: the layouts of its operands, and what it gets and returns.

    Attributes:
        x, y, dy: The layouts of x, y and the gradient of y.
        subnet: The layout of the gradient from the next subnet, of which the passive half counts.
            None for no such gradient.
        has_log_det: Whether the log-determinant has a gradient.
        want_params: Whether the gradients of the parameters are wanted.
    """

    x: Layout
    y: Layout
    dy: Layout
    subnet: Layout | None
    has_log_det: bool = True
    want_params: bool = True


CALLS = {
    "first": Call(of_one, contiguous, contiguous, contiguous),
    "middle": Call(contiguous, contiguous, contiguous, contiguous),
    "last": Call(contiguous, of_one, of_one, None),
    "rows": Call(of_one, of_one, of_one, contiguous),
    "strided": Call(of_two, of_two, of_two, of_two, has_log_det=False, want_params=False),
    "wider": Call(of_a_larger_one, of_a_larger_one, of_a_larger_one, of_two, want_params=False),
    "misaligned": Call(misaligned, misaligned, misaligned, misaligned, has_log_det=False),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# --- parity ---------------------------------------------------------------------------------------


def check_halves(x: Tensor, a: Tensor, coupling: Coupling, call: Call) -> None:
    """Check the passes between halves against the truth, under the memory checker.

    They must also return what the passes over whole tensors return, bit by bit without a GPU.
    """
    result = promoted(x, a, coupling.global_scale)
    base = torch.float32 if result is torch.float64 else result  # see compare.py
    x_halves = call.x(x)
    y = call.y(torch.full(x.shape, torch.nan, dtype=result))
    with sanitize():
        sums = engine.forward_halves(x_halves, a, coupling, y)
        log_det = engine.log_det_of_chain([sums], [coupling], x[0, 0].numel())
    wide, narrow = cast(torch.float64, x, a, coupling), cast(base, x, a, coupling)
    truth, baseline = plain_forward(*wide), plain_forward(*narrow)
    close(torch.cat(y, 1), truth[0], baseline[0], "y")
    assert sums.shape[:-1] == (len(x),)
    check_log_det(log_det, truth[1], baseline[1], wide, result)
    assert_same(torch.cat(y, 1), engine.forward(x, a, coupling)[0])
    assert torch.equal(torch.cat(x_halves, 1), x), "an input was written to"

    dy, dsub = (torch.randn(x.shape).to(result) for _ in range(2))
    dlogdet = torch.randn(len(x), dtype=accumulator(result)) if call.has_log_det else None
    from_subnet = call.subnet and call.subnet(dsub).passive
    grads = HalvesGrads(*call.dy(dy), from_subnet, dlogdet)
    with sanitize():
        actual = engine.backward_halves(x_halves, a, grads, coupling, call.want_params)
    check_layout(actual.x, x_halves)
    whole = CouplingGrads(torch.cat(actual.x, 1), *actual[1:])
    added = torch.zeros_like(dy)
    if from_subnet is not None:
        split(added).passive.copy_(from_subnet)
    true_grads = OutputGrads(dy.double() + added.double(), dlogdet)
    base_grads = OutputGrads(dy.to(base) + added.to(base), dlogdet)
    truth = plain_gradients(x, a, coupling, true_grads, torch.float64)
    baseline = plain_gradients(x, a, coupling, base_grads, base)
    if not call.want_params:
        assert whole[2:] == (None, None)
        truth, baseline = (*truth[:2], None, None), (*baseline[:2], None, None)
        for name, t, true, narrow_t in zip(
            ("x", "a"), whole[:2], truth[:2], baseline[:2], strict=True
        ):
            close(t, true, narrow_t, f"gradient of {name}")
    else:
        check_gradients(whole, truth, baseline, (x, a, coupling))
    if from_subnet is None:
        ordinary = engine.backward(x, a, OutputGrads(dy, dlogdet), coupling, call.want_params)
        for t, expected in zip(whole, ordinary, strict=True):
            assert_same(t, expected)


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    if expected is None or not expected.is_cuda:  # ptxas may fuse operations differently
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)


def check_layout(dx: Halves, x: Halves) -> None:
    """Check that dx lies in one tensor where x does, and is contiguous otherwise."""
    for gradient, half in zip(dx, x, strict=True):
        assert (gradient.shape, gradient.dtype) == (half.shape, half.dtype)
    whole, passive = torch.cat(dx, 1), dx.passive
    if x.passive.untyped_storage().data_ptr() == x.active.untyped_storage().data_ptr():
        assert dx.active.data_ptr() - passive.data_ptr() == passive[0].numel() * x[0].itemsize
        assert dx.active.stride() == passive.stride() == whole.stride()
    else:
        assert passive.is_contiguous()
        assert dx.active.is_contiguous()


@every_call
@shapes_but_shortly(
    (
        (2, 7, 4, 5), (3, 2, 3, 3), (1, 9, 7), (2, 6, 2, 4, 2), (3, 33, 14, 14),
        (5, 7), (3, 2), (2, 9, 1, 1), (9, 130), (16, 64), (1, 4097, 1, 1),
    ),
    keep=((2, 7, 4, 5), (3, 33, 14, 14), (5, 7), (16, 64)),
)  # fmt: skip
def test_parity_between_halves(shape: tuple[int, ...], call: Call) -> None:
    check_halves(*make(shape), call)


@pytest.mark.parametrize("name", ["first", "middle", "last"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, pytest.param(torch.float16, marks=slow_when_executed)]
)
@shapes((2, 7, 4, 5), (5, 7))
def test_parity_between_halves_of_other_dtypes(
    shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> None:
    check_halves(*make(shape, x=dtype), CALLS[name])


@shapes((2, 7, 4, 5), (5, 7))
def test_parity_between_halves_of_mixed_dtypes(shape: tuple[int, ...]) -> None:
    """Autocast gives coefficients in half precision. y then has the dtype of x."""
    check_halves(*make(shape, a=torch.bfloat16), CALLS["middle"])
    check_halves(*make(shape, x=torch.float16, g=torch.float32), CALLS["middle"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
@shapes((2, 7, 4, 5), (5, 7))
@slow_when_executed
def test_parity_between_halves_with_options(
    shape: tuple[int, ...], dialect: str, activation: str
) -> None:
    check_halves(*make(shape, activation, dialect), CALLS["middle"])


@pytest.mark.parametrize("name", ["middle", "rows"])
@pytest.mark.parametrize("order", ["kept", "swapped", "reversed"])
@shapes((2, 6, 4, 4), (5, 8))
def test_channels_stay_in_their_half_or_cross_to_the_other(
    shape: tuple[int, ...], order: str, name: str
) -> None:
    x, a, coupling = make(shape)
    perm = torch.arange(shape[1])
    perm = {"kept": perm, "swapped": perm.roll(shape[1] // 2), "reversed": perm.flip(0)}[order]
    check_halves(x, a, coupling._replace(perm=perm, inv=perm.argsort()), CALLS[name])


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("name", ["middle", "last", "strided"])
@shapes((2, 20, 32, 32), (100, 33))
def test_parity_between_halves_of_programs_that_loop(shape: tuple[int, ...], name: str) -> None:
    check_halves(*make(shape), CALLS[name])
