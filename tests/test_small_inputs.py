"""Test which inputs are small, so that "auto" runs plain operations on them."""

from __future__ import annotations

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
