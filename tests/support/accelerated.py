"""Stock blocks under test, and comparisons of accelerated blocks with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fastflow_kernels import accelerate, modules, report, restore
from tests.support.blocks import Results, evaluate
from tests.support.cases import CASES as ALL_CASES
from tests.support.cases import (
    Case,
    Shape,
    make_block,
    make_input,
)
from tests.support.compare import assert_close

EPS = torch.finfo(torch.float64).eps
CASES = [case for case in ALL_CASES if case.dialect == "anomalib"]  # the peers know no dialect
SHAPE = Shape(2, 6, (3, 4))
HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER, GIN = (
    Case(SHAPE, name)
    for name in ("cond2-rev", "soft-rev-exp", "hh3-rev-cond", "hh2-soft-sigmoid", "gin-rev-cond")
)
kinds = pytest.mark.parametrize(
    "case",
    [HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER, GIN],
    ids=["hard", "soft", "hh", "hh-soft", "gin"],
)


def same_block(
    peer: Callable[[], Any], block: nn.Module, case: Case, dtype: torch.dtype
) -> nn.Module:
    """Build a stock block with the parameters that this block has now."""
    stock = make_block(peer(), case)
    stock.load_state_dict(block.state_dict())
    stock.clamp = block.clamp
    return stock.to(dtype)


def assert_results(
    actual: Results,
    truth: Results,
    baseline: Results,
    gin: float = 0.0,
    blocks: int = 1,
) -> None:
    """Compare results in float64 by the criterion of ``compare.py``.

    The floor is 4 + sqrt(terms) roundings of the largest value for each block, as in
    tests/test_peers.py, instead of 4 roundings. Truth and result sum in two orders here, and a
    float32 run with a small error by luck says too little about either.

    Args:
        actual: Results of the accelerated block.
        truth: Results of the stock block in float64.
        baseline: Results of the stock block in float32.
        gin: Magnitude of GIN's log-determinant; 0 without GIN.
        blocks: Number of blocks in the model.
    """
    assert actual.keys() == truth.keys()
    terms = truth["output"].numel()
    for name, value in truth.items():
        if value is None:
            assert actual[name] is None, name
            continue
        # GIN's log-determinant is a sum of log-factors, each up to the clamp, that cancel.
        largest = (
            gin if gin and name == "log-det" else value.abs().max().item() if value.numel() else 0.0
        )
        assert_close(
            actual[name],
            value,
            baseline[name],
            name,
            magnitude=blocks * largest * (1 + 0.25 * terms**0.5),
        )


def assert_same_as_stock(block: nn.Module, peer: Callable[[], Any], case: Case) -> None:
    """Compare outputs, log-determinants and gradients of both directions with a stock block's.

    The stock block takes the parameters that the block has now.
    """
    truth_block, baseline_block = (
        same_block(peer, block, case, dtype) for dtype in (torch.float64, torch.float32)
    )
    x, c = make_input(case)
    gin = abs(block.clamp) * max(1, x[0].numel()) ** 0.5 if block.GIN else 0.0
    for rev in (False, True):
        actual, truth = (evaluate(b, x, c, rev) for b in (block, truth_block))
        baseline = evaluate(baseline_block, x.float(), [t.float() for t in c], rev)
        assert_results(actual, truth, baseline, gin)
        with torch.no_grad():
            (y,), logdet = block([x], c, rev=rev)
        assert_results(
            {"output": y, "log-det": logdet},
            {k: truth[k] for k in ("output", "log-det")},
            baseline,
            gin,
        )


def assert_equal_results(actual: nn.Module, expected: nn.Module, case: Case) -> None:
    x, c = make_input(case)
    for rev in (False, True):
        a, e = (evaluate(block, x, c, rev) for block in (actual, expected))
        assert a.keys() == e.keys()
        for name, value in e.items():
            assert value is a[name] is None or torch.equal(a[name], value), name


def is_fused(block: Any) -> bool:
    """Return whether a call of a block runs the fused function."""
    with (
        mock.patch.object(modules, "evaluate", wraps=modules.evaluate) as fused,
        torch.no_grad(),
    ):
        c = (
            [torch.zeros(1, block.condition_channels, *block.dims_in[0][1:])]
            if block.conditional
            else []
        )
        x = torch.zeros(1, *block.dims_in[0]).to(block.global_scale)
        block([x], [t.to(x) for t in c])
    return fused.called


def assert_left(block: nn.Module, match: str) -> None:
    """Assert that ``accelerate`` leaves the block alone, and warns and reports why.

    ``restore`` must then find nothing to do.
    """
    cls, attributes = type(block), dict(vars(block))
    with pytest.warns(
        UserWarning,
        match=r"no block of the model runs fused; print\(.*report\(model\)\) says why",
    ) as caught:
        accelerate(block)
    assert len(caught) == 1
    outcome = report(block)
    assert not outcome.changed
    (entry,) = outcome.left
    assert match in entry.reason, entry.reason
    assert match in str(outcome)
    restore(block)
    assert type(block) is cls
    assert vars(block) == attributes


def subclass(peer: Callable[[], Any], **methods: Any) -> type:
    base = peer()
    base = base.func if isinstance(base, functools.partial) else base
    return type("Mine", (base,), methods)


def overriding(name: str) -> dict[str, Any]:
    """Return an override of a method that only calls the stock method."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return {name: method}
