"""Test the sides of coupling blocks, where x and y are the active half alone.

Each of x, y, dy and dx is a view of some channels of a larger tensor. Run the tests as
tests/test_kernels.py says.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastflow_kernels.coupling import OutputGrads
from fastflow_kernels.engines import Engine, eager
from fastflow_kernels.engines.pixels import ByPixels
from fastflow_kernels.engines.triton import engine, plan
from tests.support.coupling import check_side, check_side_gradients, make_side, part_of
from tests.support.kernels import (  # noqa: F401  (fixtures)
    TILED,
    both_kinds,
    busy,
    default_device,
    gin_is_slow_when_executed,
    kernels_run,
    on_this_machine,
    shapes,
    shapes_but_shortly,
)
from tests.support.modes import sanitize, slow_when_executed

# NumPy warns of overflows to inf, which are intended.
pytestmark = [*on_this_machine, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

# Clamp function, factor inside it, clamp: GLOW and RNVP, FrEIA's GIN, atan, and a large clamp.
FUNCTIONS = (("tanh", 1.0, 1.272), ("sigmoid", 0.5, 0.9), ("atan", 1.0, 1.272), ("atan", 1.0, 5.0))
PLANES = ((2, 3, 4, 5), (3, 1, 2, 3), (2, 2, 4, 4), (1, 5, 7))
ROWS = ((5, 7), (4, 1), (6, 8), (2, 9, 1, 1), (9, 130))
functions = pytest.mark.parametrize(
    ("function", "input_scale", "clamp"), FUNCTIONS, ids=lambda value: str(value)
)


@both_kinds
@shapes_but_shortly(PLANES + ROWS, keep=(*PLANES[:2], *ROWS[::2]))
def test_side_parity(shape: tuple[int, ...], gin: bool) -> None:
    check_side(*make_side(shape, gin=gin))


@both_kinds
@functions
@shapes((2, 3, 4, 5), (5, 7))
def test_side_parity_of_functions(
    shape: tuple[int, ...], function: str, input_scale: float, clamp: float, gin: bool
) -> None:
    check_side(*make_side(shape, gin, function, input_scale, clamp))


@both_kinds
@functions
@shapes((4, 6, 9, 7), (50, 7))
def test_side_parity_of_the_eager_engine(
    shape: tuple[int, ...], function: str, input_scale: float, clamp: float, gin: bool
) -> None:
    check_side(*make_side(shape, gin, function, input_scale, clamp), engine=eager)


@both_kinds
@shapes_but_shortly(TILED, keep=TILED[1:2])
def test_side_parity_of_many_tiles(shape: tuple[int, ...], gin: bool) -> None:
    check_side(*make_side(shape, gin=gin))


@gin_is_slow_when_executed
@shapes((7, 6, 5, 2), (131, 300), (70, 9))
@pytest.mark.usefixtures("busy")
def test_side_parity_in_loops(shape: tuple[int, ...], gin: bool) -> None:
    check_side(*make_side(shape, gin=gin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gin_of_the_widest_rows(dtype: torch.dtype) -> None:
    """The sums of a sample are more than one tile, and the forward pass reads one sum."""
    check_side(*make_side((2, plan.MAX_ROW_BYTES // dtype.itemsize), gin=True, x=dtype))


def test_side_parity_with_a_row_beyond_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_ROW_BYTES", 16)  # rows then count as planes of one pixel
    check_side(*make_side((5, 9)))
    check_side(*make_side((5, 9), gin=True))


@both_kinds
@shapes((2, 3, 4, 5), (5, 7))
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        pytest.param((torch.float64, torch.float32), marks=slow_when_executed),
        pytest.param((torch.bfloat16, torch.float16), marks=slow_when_executed),
        pytest.param((torch.bfloat16, torch.float32), marks=slow_when_executed),
    ],
    ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes),
)
def test_side_parity_of_dtypes(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], gin: bool
) -> None:
    x, a = dtypes
    check_side(*make_side(shape, gin=gin, function="atan", x=x, a=a))


@both_kinds
@pytest.mark.parametrize("engine", [engine, eager], ids=["kernels", "eager"])
@shapes((2, 3, 4, 5), (5, 7))
def test_coefficients_that_come_apart(shape: tuple[int, ...], engine: Engine, gin: bool) -> None:
    """Two subnets return a_s and a_t. The results are those of both in one tensor."""
    x, a, coupling = make_side(shape, gin=gin)
    a_s, a_t = (t.contiguous() for t in a.split(shape[1], 1))
    apart = coupling._replace(shift=a_t)
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    results = []
    for coefficients, each in ((a, coupling), (a_s, apart)):
        y, back = torch.empty_like(x), torch.empty_like(x)
        log_dets = (
            engine.forward(x, coefficients, each, y)[1],
            engine.invert_active(y, back, coefficients, each),
        )
        dx, da, *_ = engine.backward(x, coefficients, grads, each, False)
        results.append((y, back, *log_dets, dx, da[:, : shape[1]]))
        assert da.shape == coefficients.shape
    for of_both, of_apart in zip(*results, strict=True):
        assert torch.equal(of_both, of_apart)


@both_kinds
@functions
@shapes((4, 6, 9, 7), (50, 7))
def test_kept_exp_serves_the_eager_backward_pass(
    shape: tuple[int, ...], function: str, input_scale: float, clamp: float, gin: bool
) -> None:
    x, a, coupling = make_side(shape, gin, function, input_scale, clamp)
    exp = torch.full(shape, float("nan"))
    kept = coupling._replace(exp=exp)
    assert torch.equal(
        eager.forward(x, a, kept, torch.empty_like(x))[0],
        eager.forward(x, a, coupling, torch.empty_like(x))[0],
    )
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    actual = eager.backward(x, a, grads, kept, False)
    check_side_gradients(actual, x, a, coupling, grads, torch.float32)


@both_kinds
@pytest.mark.parametrize("engine", [engine, eager], ids=["kernels", "eager"])
@shapes((2, 3, 4, 5), (2, 4, 2, 2, 2))
def test_side_parity_of_channels_last(shape: tuple[int, ...], engine: Engine, gin: bool) -> None:
    """Each pixel is a row of its own, with gaps between the rows."""
    check_side(*make_side(shape, gin=gin), engine=ByPixels(engine), channels_last=True)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 1e20])
@functions
@shapes((1, 4, 3), (1, 32))
def test_coefficients_of_every_size(
    shape: tuple[int, ...], size: float, function: str, input_scale: float, clamp: float
) -> None:
    """All of them have about one size, and s adds up, so that each keeps its relative accuracy."""
    x, a, coupling = make_side(shape, False, function, input_scale, clamp)
    check_side(x, size * (a.abs() + 1.0), coupling)


@pytest.mark.parametrize("function", ["tanh", "atan"])
@shapes((3, 3, 4), (7, 3))
def test_sides_pass_nan_and_inf_through(shape: tuple[int, ...], function: str) -> None:
    x, a, coupling = make_side(shape, function=function)
    x.view(-1)[[0, 5]] = torch.tensor([torch.nan, torch.inf])
    x[-1, -1] = -torch.inf
    a[0, :3].view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    check_side(x, a, coupling)


@shapes((2, 3, 5), (4, 3))
def test_nan_spreads_over_its_pixel_and_log_determinant_alone(shape: tuple[int, ...]) -> None:
    x, a, coupling = make_side(shape, gin=True)
    a.view(*a.shape[:2], -1)[1, 0, 0] = torch.nan
    y, log_det = engine.forward(x, a, coupling)
    assert log_det.isnan().tolist() == [k == 1 for k in range(shape[0])]
    back = torch.empty_like(x)
    assert engine.invert_active(y, back, a, coupling).isnan().tolist() == log_det.isnan().tolist()
    for result in (y, back):
        is_nan = result.view(*x.shape[:2], -1).isnan()
        assert is_nan[1, :, 0].all()
        assert is_nan.sum() == shape[1]


# --- memory ---------------------------------------------------------------------------------------


@gin_is_slow_when_executed
@shapes((2, 3, 4, 5), (5, 7), (2, 8, 4, 4))
def test_parts_that_are_not_aligned(shape: tuple[int, ...], gin: bool) -> None:
    """Aligned tensors prepare the launches; then the parts begin elsewhere."""
    x, a, coupling = make_side(shape, gin=gin)
    check_side(x, a, coupling)
    check_side(x, a, coupling, first=3)


@both_kinds
@shapes((2, 3, 4, 5), (5, 8))
def test_tensors_without_gaps_and_in_other_layouts(shape: tuple[int, ...], gin: bool) -> None:
    """The results do not depend on where the tensors lie."""
    x, a, coupling = make_side(shape, gin=gin)
    dy, log_det = torch.randn(shape), torch.randn(shape[0])
    every_other = dy.repeat_interleave(2, 1)[:, ::2]
    results = []
    for values, dvalues in ((x, dy), (part_of(x).own, part_of(dy).own), (x, every_other)):
        with sanitize():
            forward = engine.forward(values, a, coupling)
            grads = OutputGrads(dvalues, log_det)
            backward = engine.backward(values, a, grads, coupling, False)
            back = torch.empty_like(x)
            minus = engine.invert_active(values, back, a, coupling)
        results.append((*forward, *backward[:2], back, minus))
    for actual in results[1:]:
        for t, expected in zip(actual, results[0], strict=True):
            assert torch.equal(t, expected)
            assert t.is_contiguous()


@both_kinds
@shapes((2, 4, 16), (2, 16))
def test_sides_of_samples_far_apart(shape: tuple[int, ...], gin: bool) -> None:
    """Samples are 2**31 elements apart, so that no product of the stride fits in 32 bits."""
    x, a, coupling = make_side(shape, gin=gin, x=torch.float16)
    stride = 2**31
    far_x, y, dy, dx = (
        torch.empty(stride + x[0].numel(), dtype=torch.float16).as_strided(
            shape, (stride, *x.stride()[1:])
        )
        for _ in range(4)
    )
    far_x.copy_(x)
    dy.copy_(torch.randn(shape))
    grads = OutputGrads(dy, torch.randn(shape[0]))
    with sanitize():
        engine.forward(far_x, a, coupling, y)
        engine.backward(far_x, a, grads, coupling, False, dx)
        near = OutputGrads(dy.contiguous(), grads.log_det)
        expected = engine.backward(x, a, near, coupling, False)
        assert torch.equal(y, engine.forward(x, a, coupling)[0])
    assert torch.equal(dx, expected.x)
    back = torch.empty_like(x)
    engine.invert_active(y, back, a, coupling)
    engine.invert_active(y.contiguous(), dx, a, coupling)
    assert torch.equal(dx, back)


@both_kinds
@shapes((2, 3, 4, 5), (6, 8))
def test_sides_repeat_bit_for_bit(shape: tuple[int, ...], gin: bool) -> None:
    x, a, coupling = make_side(shape, gin=gin)
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))

    def run() -> tuple[Tensor, ...]:
        return *engine.forward(x, a, coupling), *engine.backward(x, a, grads, coupling, False)[:2]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
