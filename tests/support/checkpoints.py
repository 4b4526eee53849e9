"""Blocks that tests save and load, and comparisons of their states and results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock
from tests.support.cases import (
    Case,
    Shape,
    ids,
    make_block,
    make_input,
)

EPS = torch.finfo(torch.float64).eps
NAMES = (
    "hard",
    "rev",
    "gin-rev-cond",
    "soft",
    "soft-rev-exp",
    "hh3-rev-cond",
    "hh2-soft-sigmoid",
    "gin-hh2",
)
CASES = [Case(shape, name) for shape in (Shape(2, 7), Shape(2, 6, (3, 4))) for name in NAMES]
CASES += [Case(shape, "hard") for shape in (Shape(3, 1), Shape(2, 2, (3,)), Shape(2, 5, (2, 3, 2)))]
each_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER = (
    Case(Shape(2, 6, (3, 4)), name)
    for name in ("gin-rev-cond", "soft", "hh3-rev-cond", "hh2-soft-sigmoid")
)
kinds = pytest.mark.parametrize(
    "case", [HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER], ids=["hard", "soft", "hh", "hh-soft"]
)


def make_our_block(
    case: Case, seed: int = 0, dtype: torch.dtype = torch.float64, dialect: str = "anomalib"
) -> AllInOneBlock:
    return make_block(AllInOneBlock, case, dtype, seed, dialect=dialect)


def results(block: nn.Module, case: Case) -> list[Tensor]:
    """Return the output, its log-determinant, the inverse and its log-determinant."""
    x, c = make_input(case, block.global_scale.dtype)
    with torch.no_grad():
        (y,), logdet = block([x], c)
        (z,), negated = block([x], c, rev=True)
    return [y, logdet, z, negated]


def assert_same_results(actual: nn.Module, expected: nn.Module, case: Case) -> None:
    """Assert that two blocks give the same results in float64, up to rounding.

    The tolerance covers a sum of C terms, and the exponential of a log-factor of a few units, which
    multiplies the log-factor's rounding.
    """
    for name, a, e in zip(
        ("output", "log-det", "inverse", "inverse's log-det"),
        results(actual, case),
        results(expected, case),
        strict=True,
    ):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        terms = case.shape.channels * max(1, e[0].numel())
        error = (a - e).abs().max().item()
        assert error <= 16 * terms * EPS * max(1.0, e.abs().max().item()), f"{name}: {error:.3g}"


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def one_hot(index: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    channels = len(index)
    w = torch.zeros(channels, channels, dtype=dtype)
    w[torch.arange(channels), index] = 1.0
    return w.view(channels, channels, *[1] * rank)


def is_hard(case: Case) -> bool:
    return not case.options.get("permute_soft")
