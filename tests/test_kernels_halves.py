"""Test the Triton kernels as consecutive blocks of a chain call them, whole or in halves.

Run them as tests/test_kernels.py says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastflow_kernels.coupling import (
    ACTIVATIONS,
    ChainGrads,
    Coupling,
    CouplingGrads,
    Halves,
    OutputGrads,
)
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import plain
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
from tests.support.modes import EXECUTED, sanitize, slow_when_executed

pytestmark = on_this_machine

Layout = Callable[[Tensor], Tensor | Halves]


# --- how halves may lie ---------------------------------------------------------------------------


def split(t: Tensor) -> Halves:
    """Return the halves of a tensor, as views of it."""
    active = t.shape[1] // 2
    return Halves(*t.split((t.shape[1] - active, active), 1))


def contiguous(t: Tensor) -> Halves:
    return Halves(*(half.clone(memory_format=torch.contiguous_format) for half in split(t)))


def whole(t: Tensor) -> Tensor:
    return t.clone()


def part_of_a_larger_one(t: Tensor) -> Tensor:
    return part_of(t).own


def passive_of(t: Any) -> Tensor:
    """Return the passive half of halves, as which a gradient from a subnet lies."""
    return t.passive if isinstance(t, Halves) else split(t).passive


def joined(t: Tensor | Halves) -> Tensor:
    return torch.cat(t, 1) if isinstance(t, Halves) else t


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
    "first": Call(whole, contiguous, contiguous, contiguous),
    "middle": Call(contiguous, contiguous, contiguous, contiguous),
    "last": Call(contiguous, whole, whole, None),
    "rows": Call(whole, whole, whole, contiguous),
    "strided": Call(of_two, of_two, of_two, of_two, has_log_det=False, want_params=False),
    "wider": Call(
        part_of_a_larger_one, part_of_a_larger_one, part_of_a_larger_one, of_two, want_params=False
    ),
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
    x_given = call.x(x)
    y = call.y(torch.full(x.shape, torch.nan, dtype=result))
    with sanitize():
        sums = engine.forward_in_chain(x_given, a, coupling, y)
        log_det = engine.log_det_of_chain([sums], [coupling], x[0, 0].numel())
    wide, narrow = cast(torch.float64, x, a, coupling), cast(base, x, a, coupling)
    truth, baseline = plain_forward(*wide), plain_forward(*narrow)
    close(joined(y), truth[0], baseline[0], "y")
    assert sums.shape[:-1] == (len(x),)
    check_log_det(log_det, truth[1], baseline[1], wide, result)
    assert_same(joined(y), engine.forward(x, a, coupling)[0])
    assert torch.equal(joined(x_given), x), "an input was written to"

    dy, dsub = (torch.randn(x.shape).to(result) for _ in range(2))
    dlogdet = torch.randn(len(x), dtype=accumulator(result)) if call.has_log_det else None
    from_subnet = None if call.subnet is None else passive_of(call.subnet(dsub))
    grads = ChainGrads(call.dy(dy), from_subnet, dlogdet)
    with sanitize():
        actual = engine.backward_in_chain(x_given, a, grads, coupling, call.want_params)
    check_layout(actual.x, x_given)
    computed = CouplingGrads(joined(actual.x), *actual[1:])
    added = torch.zeros_like(dy)
    if from_subnet is not None:
        split(added).passive.copy_(from_subnet)
    true_grads = OutputGrads(dy.double() + added.double(), dlogdet)
    base_grads = OutputGrads(dy.to(base) + added.to(base), dlogdet)
    truth = plain_gradients(x, a, coupling, true_grads, torch.float64)
    baseline = plain_gradients(x, a, coupling, base_grads, base)
    if not call.want_params:
        assert computed[2:] == (None, None)
        truth, baseline = (*truth[:2], None, None), (*baseline[:2], None, None)
        for name, t, true, narrow_t in zip(
            ("x", "a"), computed[:2], truth[:2], baseline[:2], strict=True
        ):
            close(t, true, narrow_t, f"gradient of {name}")
    else:
        check_gradients(computed, truth, baseline, (x, a, coupling))
    if from_subnet is None:
        ordinary = engine.backward(x, a, OutputGrads(dy, dlogdet), coupling, call.want_params)
        for t, expected in zip(computed, ordinary, strict=True):
            assert_same(t, expected)


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    if expected is None or not expected.is_cuda:  # ptxas may fuse operations differently
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)


def check_layout(dx: Tensor | Halves, x: Tensor | Halves) -> None:
    """Check that dx is in halves where x is, and contiguous."""
    assert isinstance(dx, Halves) == isinstance(x, Halves)
    pairs = zip(dx, x, strict=True) if isinstance(dx, Halves) else [(dx, x)]
    for gradient, t in pairs:
        assert (gradient.shape, gradient.dtype) == (t.shape, t.dtype)
        assert gradient.is_contiguous()


@every_call
@shapes_but_shortly(
    (
        (2, 7, 4, 5), (3, 2, 3, 3), (1, 9, 7), (2, 6, 2, 4, 2), (3, 33, 14, 14),
        (5, 7), (3, 2), (2, 9, 1, 1), (9, 130), (16, 64),
    ),
    keep=((2, 7, 4, 5), (3, 33, 14, 14), (5, 7), (16, 64)),
)  # fmt: skip
def test_parity_between_halves(shape: tuple[int, ...], call: Call) -> None:
    check_halves(*make(shape), call)


@not_interpreted
def test_parity_between_halves_of_a_row_that_no_tile_holds() -> None:
    """Its kernel is that of planes, with one pixel."""
    check_halves(*make((2, 2049)), CALLS["middle"])


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


# --- the log-determinant of a chain ---------------------------------------------------------------


def check_log_det_of_chain(
    shape: tuple[int, int], channels: int, pixels: int, *kinds: tuple[str, torch.dtype]
) -> None:
    """Check the log-determinant of blocks against the truth.

    Args:
        shape: Samples, and sums of a sample that a block leaves.
        channels: Channels of a block.
        pixels: Pixels of a sample.
        kinds: The activation and the dtype of the parameters, for each block.
    """
    couplings = [
        make((1, channels), activation, g=dtype)[2]._replace(perm=None, inv=None)
        for activation, dtype in kinds
    ]
    acc_dtype = accumulator(promoted(*(coupling.parameters[0] for coupling in couplings)))
    sums = [torch.randn(shape, dtype=acc_dtype) for _ in kinds]
    with sanitize():
        actual = engine.log_det_of_chain(sums, couplings, pixels)
    assert (actual.shape, actual.dtype) == (shape[:1], acc_dtype)

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the log-determinant, and the sum of the terms' sizes."""
        terms = [s.to(dtype) for s in sums]
        logs = [
            plain.activated(c.parameters[0].to(dtype), c.spec.activation).log() for c in couplings
        ]
        s, log_scale = torch.cat(terms, 1), torch.cat(logs)
        size = s.abs().sum(1).max() + pixels * log_scale.abs().sum()
        return s.sum(1) + pixels * log_scale.sum(), size

    truth, size = reference(torch.float64)
    close(actual, truth, reference(torch.float32)[0], "log_det", size.item())


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((3, 5), 7), ((3, 100), 300), ((1100, 1), 6), ((1, 1), 2)],
    ids=["few", "several turns", "many samples", "one"],
)
def test_log_det_of_a_chain(shape: tuple[int, int], channels: int) -> None:
    for activation, dtype in (("SOFTPLUS", torch.float32), ("EXP", torch.bfloat16)):
        check_log_det_of_chain(shape, channels, 35, *[(activation, dtype)] * 3)


@shapes((3, 5), (40, 1))
def test_log_det_of_a_chain_with_other_options(shape: tuple[int, int]) -> None:
    check_log_det_of_chain(shape, 6, 9, *[("SIGMOID", torch.float32)] * 2)
    check_log_det_of_chain(shape, 6, 9, ("SOFTPLUS", torch.float64))


@shapes((2, 6, 4, 4), (5, 8))
def test_a_chain_has_the_log_determinant_of_its_blocks(shape: tuple[int, ...]) -> None:
    """The sums of s alone are returned, whatever the scales are."""
    inputs = [make(shape) for _ in range(3)]
    pixels, sums, expected = inputs[0][0][0, 0].numel(), [], 0.0
    for x, a, coupling in inputs:
        sums.append(engine.forward_in_chain(contiguous(x), a, coupling, contiguous(x)))
        zero = coupling._replace(global_scale=torch.full_like(coupling.global_scale, 2.0))
        other = engine.forward_in_chain(contiguous(x), a, zero, contiguous(x))
        assert torch.equal(sums[-1], other)
        expected = expected + engine.forward(x, a, coupling)[1]
    actual = engine.log_det_of_chain(sums, [coupling for _, _, coupling in inputs], pixels)
    torch.testing.assert_close(actual, expected)


# --- launches that are prepared, and far offsets --------------------------------------------------


@pytest.mark.skipif(not EXECUTED, reason="only the executor compares a launch with its binary")
def test_the_binary_that_runs_is_the_one_that_triton_would_choose() -> None:
    """Each set of arguments differs from the one before in one part. Each is called twice."""
    from triton.runtime import driver

    from tests.support.executor import gpu

    rng = random.Random(0)
    layouts = (contiguous, contiguous, whole, part_of_a_larger_one, of_two, misaligned)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    choices: dict[str, Sequence[Any]] = {
        "shape": ((1, 2), (2, 5), (16, 64), (2, 7, 15), (2, 8, 4, 4), (16, 16, 16), (1, 4, 16)),
        **dict.fromkeys(("x", "y", "dy"), layouts),
        "dsub": (None, *layouts),
        "log_det stride": (None, 0, 1, 2),
        **{f"{name} dtype": dtypes for name in ("x", "a", "g", "dsub")},
        "activation": ACTIVATIONS,
        "want params": (False, True),
    }
    of_the_other_tests = driver.active
    with gpu(is_compiling=False), sanitize() as launches:
        drawn = {name: rng.choice(values) for name, values in choices.items()}
        for _ in range(20):
            for name in rng.sample(sorted(choices), len(choices)):
                drawn[name] = rng.choice(choices[name])
                call_all(drawn)
                call_all(drawn)
    driver.set_active(of_the_other_tests)
    assert len(launches) > 1000


def call_all(arguments: dict[str, Any]) -> None:
    """Call every function of a chain with these arguments."""
    shape = arguments["shape"]
    x, a, coupling = make(
        shape,
        arguments["activation"],
        x=arguments["x dtype"],
        a=arguments["a dtype"],
        g=arguments["g dtype"],
    )
    zeros = torch.zeros(shape, dtype=promoted(x, a, coupling.global_scale))
    x_given, y = arguments["x"](x), arguments["y"](zeros)
    sums = engine.forward_in_chain(x_given, a, coupling, y)
    engine.log_det_of_chain([sums] * 2, [coupling] * 2, x[0, 0].numel())
    dsub, log_det = None, None
    if arguments["dsub"] is not None:
        dsub = passive_of(arguments["dsub"](zeros.to(arguments["dsub dtype"])))
    if arguments["log_det stride"] is not None:
        log_det = torch.zeros(2 * len(x)).as_strided((len(x),), (arguments["log_det stride"],))
    grads = ChainGrads(arguments["dy"](zeros), dsub, log_det)
    engine.backward_in_chain(x_given, a, grads, coupling, arguments["want params"])


@pytest.mark.skipif(not EXECUTED, reason="a GPU or the interpreter would touch all of the memory")
@shapes((3, 5, 1 << 28), (66_000_000, 66))
def test_passes_between_halves_beyond_32_bit_offsets(shape: tuple[int, ...]) -> None:
    """Only the first and the last programs run. What they compute is compared with a small input.

    The active half of the planes alone has more than 2^31 bytes, and each half more than 2^31
    elements of the rows.
    """
    from tests.support.executor import EXECUTOR

    batch, channels, *spatial = shape
    ends = (2, channels, 8) if spatial else (8, channels)

    def edges(t: Tensor) -> tuple[Tensor, Tensor]:
        return (t[0, :, :4], t[-1, :, -4:]) if spatial else (t[:4], t[-4:])

    def gather(t: Tensor) -> Tensor:
        first, last = edges(t)
        return torch.stack((first, last)) if spatial else torch.cat((first, last))

    def spread(t: Tensor) -> Tensor:
        large = torch.empty((batch, t.shape[1], *spatial), dtype=t.dtype)  # no memory is touched
        for part, values in zip(edges(large), edges(t), strict=True):
            part.copy_(values)
        return large

    def far(halves: Halves) -> Halves:
        return Halves(*map(spread, halves))

    x, a, coupling = make(ends, x=torch.float16, g=torch.float32)
    dy, dsub = torch.randn(2, *ends, dtype=torch.float32).unbind()
    y = far(contiguous(x.float()))
    grads = ChainGrads(far(contiguous(dy)), spread(split(dsub).passive.contiguous()), None)
    with mock.patch.object(EXECUTOR, "ctas", lambda count: [*range(8), *range(count - 8, count)]):
        engine.forward_in_chain(far(contiguous(x)), spread(a), coupling, y)
        dx, da, *_ = engine.backward_in_chain(
            far(contiguous(x)), spread(a), grads, coupling, want_params=False
        )
    near_y = contiguous(x.float())
    engine.forward_in_chain(contiguous(x), a, coupling, near_y)
    near_grads = ChainGrads(contiguous(dy), split(dsub).passive, None)
    near_dx, near_da, *_ = engine.backward_in_chain(contiguous(x), a, near_grads, coupling, False)
    for actual, expected in zip((*y, *dx, da), (*near_y, *near_dx, near_da), strict=True):
        expected = gather(expected)
        assert torch.equal(gather(actual), expected)
