"""Test which inputs are small, so that "auto" runs plain operations on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastflow_kernels import AllInOneBlock, route
from fastflow_kernels import block as block_module
from fastflow_kernels.call import BlockCall
from fastflow_kernels.permutations import HouseholderPermutation
from tests.support.small_inputs import small_up_to


@pytest.mark.parametrize(("grad", "times"), [(True, 4), (False, 1)])
def test_small_is_larger_for_a_soft_permutation(
    grad: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to ``times`` times the limit, a product takes most of the time, fused or not."""
    plain: list[bool] = []

    def spy(call: BlockCall) -> route.Route:
        chosen = route.choose_route(call)
        plain.append(chosen.case is route.SMALL_INPUT)
        return chosen

    monkeypatch.setattr(block_module, "choose_route", spy)
    for soft in (False, True):
        block = AllInOneBlock([(6,)], subnet_constructor=nn.Linear, permute_soft=soft)
        limit = 8 * times if soft else 8
        for batch in (limit, limit + 1):
            for rev in (False, True):
                with torch.set_grad_enabled(grad), small_up_to(8 * 6):
                    block([torch.randn(batch, 6)], rev=rev)
                assert plain[-1] == (batch == limit), (soft, batch, rev)


@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("is_small", [True, False])
def test_reflections_used_twice_are_computed_once(
    is_small: bool, count: int, rev: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 reflections of 6 channels are a dense product, 1 and 2 are not."""
    computed: list[str] = []
    for name in ("factors", "matrix"):
        method = getattr(HouseholderPermutation, name)

        def counted(self: Any, *arguments: Any, method: Any = method, name: str = name) -> Any:
            if self.known_factors is None:
                computed.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(HouseholderPermutation, name, counted)
    block = AllInOneBlock(
        [(6,)],
        subnet_constructor=nn.Linear,
        learned_householder_permutation=count,
        reverse_permutation=True,
    )
    with torch.no_grad(), small_up_to(8 * 6 if is_small else 0):
        block([torch.randn(8, 6)], rev=rev)
    assert len(computed) == 1, computed


def reflecting_block(channels: int, count: int, **options: Any) -> AllInOneBlock:
    torch.manual_seed(0)
    return AllInOneBlock(
        [(channels,)],
        subnet_constructor=nn.Linear,
        permute_soft=True,
        learned_householder_permutation=count,
        **options,
    )


@pytest.mark.parametrize(
    ("channels", "batch", "as_matrix"),
    [(6, 6, True), (6, 5, False), (64, 64, True), (65, 65, False)],
)
def test_reflections_become_a_matrix_for_rows_enough_of_few_channels(
    channels: int, batch: int, as_matrix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    matrix = HouseholderPermutation.matrix

    def counted(self: HouseholderPermutation, dtype: torch.dtype) -> torch.Tensor:
        calls.append(1)
        return matrix(self, dtype)

    monkeypatch.setattr(HouseholderPermutation, "matrix", counted)
    with torch.no_grad():
        reflecting_block(channels, 2)([torch.randn(batch, channels)])
    assert bool(calls) == as_matrix


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("count", "scale"), [(1, 3e-3), (2, 3e-3), (4, 3e-3), (8, 3e-3)])
def test_short_vectors_in_half_precision(count: int, scale: float, reverse: bool) -> None:
    """The square of their norm, and its reciprocal, are beyond float16."""
    block = reflecting_block(8, count, reverse_permutation=reverse).half()
    with torch.no_grad():
        block.vk_householder.mul_(scale)
    x = torch.randn(16, 8).half()
    (y,), log_det = block([x])
    exact = copy.deepcopy(block).double()
    (y_exact,), _ = exact([x.double()])
    assert y.isfinite().all()
    # one rounding of every value and coefficient of some ten products, at most 8 terms each
    assert (y.double() - y_exact).abs().max() <= 40 * 2.0**-11 * y_exact.abs().max()
    y.float().sum().backward()
    assert block.vk_householder.grad.isfinite().all()


def test_reflections_keep_full_precision_under_autocast() -> None:
    """The matrix of the reflections would be rounded to bfloat16, and so would its gradient."""
    block, x, weights = reflecting_block(8, 2), torch.randn(64, 8), torch.randn(64, 8)
    gradients = []
    for enabled in (True, False):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (y,), _ = block([x])
        (y.float() * weights).sum().backward()
        gradients.append(block.vk_householder.grad.clone())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error <= 8 * 2.0**-9  # of the subnet and the last product, not of the reflections


def test_vectors_of_another_dtype_promote() -> None:
    block = reflecting_block(8, 2)
    block.vk_householder.data = block.vk_householder.data.double()
    assert block([torch.randn(16, 8)])[0][0].dtype is torch.float64
