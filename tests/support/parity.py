"""Checks of a block on any engine against the reference, by the criterion of ``compare.py``."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastflow_kernels
import reference
from tests.support.blocks import Results, Stored, evaluate, unwrapped
from tests.support.cases import DEVICE, LAYOUTS, Case, Shape, build_block, make_block, make_input
from tests.support.compare import assert_close


def compare(
    case: Case,
    dtype: torch.dtype,
    rev: bool,
    grad: bool,
    backend: str = "eager",
    layout: str = "contiguous",
    wrap: Callable[[nn.Module], Any] = lambda block: block,
) -> None:
    """Check the criterion over several draws of weights and inputs.

    A small case takes four draws, because one baseline of few numbers may be exact by luck. The
    function ``wrap`` is applied to the block; it may compile it.
    """
    draws = 4 if math.prod(case.shape.full) < 1000 else 1
    expected = [_expect(case, dtype, rev, layout, seed) for seed in range(draws)]
    actual = [_results(e, wrap(_block(e, case, backend)), rev, grad) for e in expected]
    for name in actual[0]:
        assert_close(
            _stack([a[name] for a in actual]),
            _stack([e.truth[name] for e in expected]),
            _stack([e.baseline[name] for e in expected]),
            f"{case} {name}",
            magnitude=max(e.terms for e in expected) if name == "log-det" else None,
        )


def _stack(values: list[Tensor | None]) -> Tensor | None:
    """Stack the values, or return None if there is no gradient (global_scale of GIN)."""
    return None if values[0] is None else torch.stack(values)


@dataclass
class _Expected:
    """An input and the results that are expected for it.

    Attributes:
        state: The weights.
        x: The input, in the dtype under test.
        c: The conditions, in the dtype under test.
        baseline: Results of the reference in that dtype, or in float32 if it is float64.
        truth: Results of the reference in float64.
        terms: Magnitude of the log-determinant's terms.
    """

    state: Results
    x: Tensor
    c: list[Tensor]
    baseline: Results
    truth: Results
    terms: float


@functools.lru_cache(maxsize=4)  # tests that differ only in the engine run one after another
def _expect(case: Case, dtype: torch.dtype, rev: bool, layout: str, seed: int) -> _Expected:
    stock = make_block(reference.AllInOneBlock, case, dtype, seed, dialect=case.dialect).to(DEVICE)
    state = {key: value.clone() for key, value in stock.state_dict().items()}
    x, c = make_input(case, dtype, seed + 1)
    x, c = LAYOUTS[layout](x.to(DEVICE)), [LAYOUTS[layout](t.to(DEVICE)) for t in c]
    lower = torch.float32 if dtype is torch.float64 else dtype
    baseline = evaluate(copy.deepcopy(stock).to(lower), x.to(lower), [t.to(lower) for t in c], rev)
    truth = evaluate(stock.double(), x.double(), [t.double() for t in c], rev)
    return _Expected(state, x, c, baseline, truth, _terms(truth, stock))


def _block(expected: _Expected, case: Case, backend: str) -> nn.Module:
    block = build_block(fastflow_kernels.AllInOneBlock, case, dialect=case.dialect, backend=backend)
    block = block.to(DEVICE, expected.x.dtype)
    block.load_state_dict(expected.state)
    return block


def _results(expected: _Expected, block: nn.Module, rev: bool, grad: bool) -> Results:
    """Return our block's results for an input."""
    actual = evaluate(block, expected.x, expected.c, rev, grad)
    dtype = expected.x.dtype
    assert not grad or actual.keys() == expected.truth.keys()
    assert actual["output"].dtype == dtype
    assert actual["log-det"].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # It is float32 for half precision, but the criterion is that of the baseline's dtype.
    actual["log-det"] = actual["log-det"].to(dtype)
    return actual


def _terms(truth: Results, block: nn.Module) -> float:
    """Return the size of the terms whose sum, which may cancel, is the log-determinant.

    The terms are the log-factors, which add up at random, and the log-scales.
    """
    log_factors = abs(block.clamp) * truth["output"][0].numel() ** 0.5
    if block.GIN:
        return log_factors
    pixels = truth["output"][0, 0].numel()
    return (
        log_factors
        + pixels * block.global_scale_activation(block.global_scale).log().abs().sum().item()
    )


def compare_fresh(activation: str, shape: tuple[int, ...], backend: str) -> None:
    """Compare the log-determinants of a block with its initial parameters.

    Its log(scale) is near 0 and the same in every channel, so that the error adds up.
    """
    results = []
    # Build all blocks on the CPU, so that the initial scale has the same bits in each.
    with torch.device("cpu"):
        x, a = torch.randn(2, *shape), torch.randn(2, shape[0] // 2 * 2, *shape[1:])
        options = {"subnet_constructor": lambda *_: Stored(a), "global_affine_type": activation}
        for dtype in (torch.float32, torch.float64):
            block = reference.AllInOneBlock([shape], **options).to(dtype)
            results.append(
                [unwrapped(block([x.to(dtype)], rev=rev))[1].detach() for rev in (False, True)]
            )
        block = fastflow_kernels.AllInOneBlock([shape], **options, backend=backend).to(DEVICE)
    with torch.no_grad():
        actual = [unwrapped(block([x.to(DEVICE)], rev=rev))[1] for rev in (False, True)]
    for log_det, baseline, truth in zip(actual, *results, strict=True):
        assert_close(log_det, truth, baseline, f"{activation} {shape}")


def check_float16_range(backend: str) -> None:
    """Check a block whose intermediate values exceed float16's 65504 and whose results do not.

    x2 * exp(s) reaches 3000 * e^5, and the sum of s exceeds the range too.
    """
    shape = (2, 128, 12, 12)
    a = torch.full(shape, 100.0, dtype=torch.float16, requires_grad=True)
    block = fastflow_kernels.AllInOneBlock(
        [shape[1:]],
        subnet_constructor=lambda *_: Stored(a),
        affine_clamping=5.0,
        global_affine_type="EXP",
        global_affine_init=0.01,
        backend=backend,
    ).half()
    x = (3000.0 * torch.rand(shape)).half().requires_grad_()
    (y,), logdet = block([x])
    assert 4000 < y.max() < 5000
    expected = 64 * 144 * 5.0 + 128 * 144 * block.global_scale.detach().double()[0, 0, 0, 0].item()
    assert abs(logdet[0].item() - expected) < 1e-5 * 128 * 144 * 5
    torch.autograd.backward([y, logdet], [torch.ones_like(y), torch.zeros_like(logdet)])
    assert x.grad.isfinite().all()
    assert a.grad.isfinite().all()
    with torch.no_grad():
        (back,), _ = block([y.detach()], rev=True)
    # The roundings of y and of the values before it, in units of the largest x.
    assert (back - x).abs().max() <= 4 * 3000 * torch.finfo(torch.float16).eps


class _Doubling(nn.Module):
    """A subnet that writes to its input deep inside, where callers cannot see it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.mul_(2), x), 1)


def notices_write(
    name: str, rev: bool, layout: str, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> bool:
    """Return whether a block raises an error if its subnet writes to its input.

    If not, its result must be that of the stock block, which continues with the overwritten x1.
    """
    case = Case(Shape(2, 8, (3, 5)), name)
    block = make_block(fastflow_kernels.AllInOneBlock, case, dtype, backend=backend)
    stock = make_block(reference.AllInOneBlock, case, torch.float64)
    stock.load_state_dict(block.state_dict())
    block.subnet = stock.subnet = _Doubling()
    x = LAYOUTS[layout](make_input(case, dtype)[0])
    try:
        results = unwrapped(block([x.clone()], rev=rev))
    except RuntimeError as error:
        if "the subnet changed its input in place" not in str(error):
            raise
        return True
    tolerance = 0.02 if dtype.itemsize == 2 else 1e-5  # for a factor of 2
    for result, expected in zip(results, unwrapped(stock([x.double()], rev=rev)), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    return False
