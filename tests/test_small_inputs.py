"""Test which inputs are small, so that "auto" runs plain operations on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastflow_kernels import AllInOneBlock, route
from fastflow_kernels import block as block_module
from fastflow_kernels.call import BlockCall
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
