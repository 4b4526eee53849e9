"""The drop-in against the reference: outputs, log-determinants, inverses and every gradient, by the
design's criterion.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import fastflow_kernels
import reference
from fastflow_kernels.engines import eager
from fastflow_kernels.spec import CouplingSpec
from tests.support.cases import (
    CASES,
    CLAMP_CASES,
    DEVICE,
    DTYPES,
    HARD_CASES,
    LARGE_CASES,
    LAYOUTS,
    SHAPES,
    Case,
    Shape,
    ids,
    make_block,
    make_input,
)
from tests.support.compare import assert_close

# the kernels without a GPU: tests/test_kernels.py
BACKENDS = (
    ["eager", pytest.param("triton", marks=pytest.mark.gpu)] if DEVICE.type == "cuda" else ["eager"]
)
HALF = {name: DTYPES[name] for name in ("bf16", "fp16")}

both_directions = pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def evaluate(
    block: nn.Module, x: Tensor, c: list[Tensor], rev: bool = False, grad: bool = True
) -> dict[str, Tensor]:
    """Output and log-determinant, and the gradients of a random linear function of both to
    everything that takes one.
    """
    x, c = x.detach().requires_grad_(grad), [t.detach().requires_grad_(grad) for t in c]
    with torch.set_grad_enabled(grad):
        (y,), logdet = block([x], c, rev=rev)
    results = {"output": y, "log-det": logdet}
    if not grad:
        return results
    generator = torch.Generator().manual_seed(2)
    dy, dlogdet = (
        torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in (y, logdet)
    )
    block.zero_grad()
    # both: also GIN's log-determinant, 0, is part of the graph
    torch.autograd.backward([y, logdet], [dy, dlogdet])
    results |= {"grad x": x.grad, **{f"grad c{i}": t.grad for i, t in enumerate(c)}}
    return results | {
        f"grad {name}": p.grad for name, p in block.named_parameters() if p.requires_grad
    }


def compare(
    case: Case,
    dtype: torch.dtype,
    rev: bool,
    grad: bool,
    backend: str = "eager",
    layout: str = "contiguous",
) -> None:
    """The criterion over a few draws of weights and inputs: of a handful of numbers one baseline
    may be exact by luck.
    """
    draws = 4 if x_size(case) < 1000 else 1
    found = [_draw(case, dtype, rev, grad, backend, layout, seed) for seed in range(draws)]
    for name in found[0][0]:
        actual, baseline, truth = (_stacked([f[i][name] for f in found]) for i in range(3))
        assert_close(
            actual,
            truth,
            baseline,
            f"{case} {name}",
            magnitude=max(f[3] for f in found) if name == "log-det" else None,
        )


def _stacked(values: list[Tensor | None]) -> Tensor | None:
    """Together, or None where there is no gradient (global_scale of GIN)."""
    return None if values[0] is None else torch.stack(values)


def x_size(case: Case) -> int:
    return math.prod(case.shape.full)


def _draw(
    case: Case, dtype: torch.dtype, rev: bool, grad: bool, backend: str, layout: str, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """Ours, the reference in that dtype (float32 for float64), the truth, and the magnitude of the
    log-determinant's terms.
    """
    theirs = make_block(reference.AllInOneBlock, case, dtype, seed, dialect=case.dialect).to(DEVICE)
    ours = make_block(
        fastflow_kernels.AllInOneBlock, case, dtype, seed, dialect=case.dialect, backend=backend
    ).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x, c = make_input(case, dtype, seed + 1)
    x, c = LAYOUTS[layout](x.to(DEVICE)), [LAYOUTS[layout](t.to(DEVICE)) for t in c]
    actual = evaluate(ours, x, c, rev, grad)
    truth_block = copy.deepcopy(theirs).double()
    lower = torch.float32 if dtype is torch.float64 else dtype
    baseline = evaluate(theirs.to(lower), x.to(lower), [t.to(lower) for t in c], rev, grad)
    truth = evaluate(truth_block, x.double(), [t.double() for t in c], rev, grad)
    assert actual.keys() == truth.keys()
    assert actual["output"].dtype == dtype
    assert actual["log-det"].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # float32 in half precision; judged by what the baseline's dtype allows
    actual["log-det"] = actual["log-det"].to(dtype)
    return actual, baseline, truth, _terms(truth, truth_block)


def _terms(truth: dict[str, Tensor], block: nn.Module) -> float:
    """The log-determinant is a sum that may cancel: the size of its terms, the log-factors' (adding
    up at random) and the log-scales'.
    """
    log_factors = abs(block.clamp) * truth["output"][0].numel() ** 0.5
    if block.GIN:
        return log_factors
    pixels = truth["output"][0, 0].numel()
    return (
        log_factors
        + pixels * block.global_scale_activation(block.global_scale).log().abs().sum().item()
    )


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
def test_block_parity(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=True)


@pytest.mark.plain
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
def test_block_parity_of_small_inputs(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=True, backend="auto")


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
def test_block_parity_without_gradients(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=False)


@pytest.mark.parametrize("case", CLAMP_CASES, ids=ids(CLAMP_CASES))
@pytest.mark.parametrize("dtype", DTYPES)
@both_directions
def test_block_parity_of_clamps(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=not rev)


@pytest.mark.parametrize("case", HARD_CASES, ids=ids(HARD_CASES))
@pytest.mark.parametrize("dtype", HALF)
@both_directions
def test_block_parity_in_half_precision(case: Case, dtype: str, rev: bool) -> None:
    compare(case, HALF[dtype], rev, grad=not rev)


@pytest.mark.parametrize("case", LARGE_CASES, ids=ids(LARGE_CASES))
@both_directions
@every_backend
def test_block_parity_on_large_shapes(case: Case, rev: bool, backend: str) -> None:
    compare(case, torch.float32, rev, grad=not rev, backend=backend)


LAYOUT_CASES = [
    Case(shape, name) for shape in (SHAPES[0], SHAPES[6]) for name in ("hard", "gin", "soft")
]


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=ids(LAYOUT_CASES))
@pytest.mark.parametrize("layout", LAYOUTS)
@both_directions
def test_block_parity_in_any_layout(case: Case, layout: str, rev: bool) -> None:
    compare(case, torch.float32, rev, grad=True, layout=layout)


@pytest.mark.parametrize(
    "shape", [Shape(70_000, 2), Shape(3, 4096), Shape(1, 4097, (1, 2))], ids=str
)
@pytest.mark.parametrize("name", ["hard", "gin", "rev"])
@every_backend
def test_block_parity_at_extreme_sizes(shape: Shape, name: str, backend: str) -> None:
    compare(Case(shape, name), torch.float32, False, grad=True, backend=backend)


@pytest.mark.parametrize("name", ["hard", "gin"])
@every_backend
def test_block_parity_on_a_large_channels_last_input(name: str, backend: str) -> None:
    """The log-determinant's gradient is handed to every pixel: summing it there must not cost the
    scale's gradient its digits.
    """
    compare(
        Case(Shape(5, 64, (32, 32)), name),
        torch.float32,
        False,
        grad=True,
        backend=backend,
        layout="channels_last",
    )


# Compiling takes half a second a kernel: every case in float32, some in every dtype.
KERNEL_CASES = [
    (case, dtype)
    for dtype in DTYPES
    for case in (HARD_CASES if dtype == "fp32" else HARD_CASES[::4])
]


@pytest.mark.gpu  # without one, tests/test_kernels.py runs them in the interpreter
@pytest.mark.parametrize(("case", "dtype"), KERNEL_CASES, ids=lambda value: str(value))
@both_directions
def test_kernels_parity(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=not rev, backend="triton")


def compare_fresh(activation: str, shape: tuple[int, ...], backend: str) -> None:
    """The log-determinant of a block as it is built: log(scale) is near 0 and the same in every
    channel, so that its error adds up.
    """
    results = []
    # where every block is built, for the initial scale to have the same bits in all
    with torch.device("cpu"):
        x, a = torch.randn(2, *shape), torch.randn(2, shape[0] // 2 * 2, *shape[1:])
        options = {"subnet_constructor": lambda *_: Stored(a), "global_affine_type": activation}
        for dtype in (torch.float32, torch.float64):
            block = reference.AllInOneBlock([shape], **options).to(dtype)
            results.append(
                [flat(block([x.to(dtype)], rev=rev))[1].detach() for rev in (False, True)]
            )
        block = fastflow_kernels.AllInOneBlock([shape], **options, backend=backend).to(DEVICE)
    with torch.no_grad():
        actual = [flat(block([x.to(DEVICE)], rev=rev))[1] for rev in (False, True)]
    for mine, baseline, truth in zip(actual, *results, strict=True):
        assert_close(mine, truth, baseline, f"{activation} {shape}")


@every_backend
@pytest.mark.parametrize("activation", ["SIGMOID", "SOFTPLUS", "EXP"])
@pytest.mark.parametrize("shape", [(64, 8, 8), (33, 5, 3), (64,)], ids=str)
def test_log_det_of_a_fresh_block(activation: str, shape: tuple[int, ...], backend: str) -> None:
    compare_fresh(activation, shape, backend)


SMALL_SCALES = [1e-3, 1.0, 30.0]


@pytest.mark.parametrize("gain", SMALL_SCALES)
@pytest.mark.parametrize("clamp", [0.5, 1.9, 5.0])
def test_log_det_of_small_and_large_coefficients(gain: float, clamp: float) -> None:
    """A cheap tanh with an absolute error would pass on large coefficients and fail on those of an
    untrained subnet.
    """
    torch.manual_seed(3)
    a = gain * torch.randn(4, 64, 24, 24)
    x = torch.randn(4, 64, 24, 24)
    results = []
    for cls, dtype in (
        (fastflow_kernels.AllInOneBlock, torch.float32),
        (reference.AllInOneBlock, torch.float32),
        (reference.AllInOneBlock, torch.float64),
    ):
        torch.manual_seed(4)
        block = cls(
            [(64, 24, 24)],
            subnet_constructor=lambda *_: Stored(a),
            affine_clamping=clamp,
            global_affine_type="EXP",
        ).to(dtype)
        with torch.no_grad():
            results.append(
                [t for rev in (False, True) for t in flat(block([x.to(dtype)], rev=rev))]
            )
    for actual, baseline, truth in zip(*results, strict=True):
        assert_close(actual, truth, baseline, f"gain {gain}, clamp {clamp}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_to_a_few_ulp_at_every_magnitude(dtype: torch.dtype) -> None:
    """Also across the bound of the cheap form; and a value's result does not depend on its
    neighbours.
    """
    magnitudes = torch.cat(
        [
            torch.logspace(-30, 3, 20001, dtype=torch.float64),
            torch.linspace(0.5, 2.5, 40001, dtype=torch.float64),
        ]
    )
    a = (
        torch.cat(
            [magnitudes, -magnitudes, torch.tensor([0.0, math.inf, -math.inf], dtype=torch.float64)]
        )
        .to(dtype)
        .view(1, -1, 1)
    )
    spec = CouplingSpec(clamp=2.0, tanh_scale=1.0, activation="EXP", gin=False)

    def tanh(a: Tensor) -> Tensor:
        return eager._log_factor(a, spec, 1.0, True, torch.empty_like(a), torch.empty_like(a))

    found, truth = tanh(a), 2.0 / math.log(2.0) * torch.tanh(a.double())
    error = (found - truth).abs() / torch.finfo(dtype).eps
    # 4 units in the last place, or the truth's own
    assert (error <= 2.0 * truth.abs()).all(), (error / truth.abs()).nan_to_num().max()
    small = a.abs() < 1.0
    assert torch.equal(tanh(a[small].view(1, -1, 1)), found[small].view(1, -1, 1))
    assert tanh(torch.tensor([[[math.nan], [0.5]]], dtype=dtype)).isnan().flatten().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_and_its_slope_from_a_sigmoid(dtype: torch.dtype) -> None:
    """What the backward takes: tanh within the error that the bound of the clamp is derived from,
    and the slope to a few ulp of itself.
    """
    a = torch.cat(
        [sign * torch.logspace(-30, 1, 20001, dtype=torch.float64) for sign in (1.0, -1.0)]
    ).to(dtype)
    sigma = eager._small_sigmoid(a, 0.3, torch.empty_like(a))
    found = eager._from_sigmoid(sigma, a, 1.0, torch.empty_like(a))
    unit = torch.finfo(dtype).eps / 2.0
    assert ((found - torch.tanh(0.3 * a.double())).abs() <= 2.0 * unit).all()
    z = 0.3 * a.double()
    slope = 1.0 / torch.cosh(z).square()
    # exp(-2 |z|) feels the two roundings of its argument, half a unit of 2 |z| each; the rest are a
    # few more, the truth's own included
    assert (
        (4.0 * sigma * (1.0 - sigma) - slope).abs() <= (6.0 + 2.0 * z.abs()) * unit * slope
    ).all()


class Stored(nn.Module):
    """Returns what it holds."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)

    def forward(self, x: Tensor) -> Tensor:
        return self.a


def flat(result: tuple[tuple[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    (y,), logdet = result
    return y, logdet
