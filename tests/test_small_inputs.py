"""Which inputs are small, so that "auto" runs plain operations on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastflow_kernels import AllInOneBlock, dispatch
from tests.support.small_inputs import small_up_to


@pytest.mark.parametrize(("grad", "times"), [(True, 4), (False, 2)])
def test_small_is_larger_for_a_soft_permutation(
    grad: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to so many times the limit a product takes most of the time, fused or not."""
    plain: list[bool] = []
    is_plain = dispatch.is_plain

    def spy(*arguments: Any) -> bool:
        plain.append(is_plain(*arguments))
        return plain[-1]

    monkeypatch.setattr(dispatch, "is_plain", spy)
    for soft in (False, True):
        block = AllInOneBlock([(6,)], subnet_constructor=nn.Linear, permute_soft=soft)
        limit = 8 * times if soft else 8
        for batch in (limit, limit + 1):
            for rev in (False, True):
                with torch.set_grad_enabled(grad), small_up_to(8 * 6):
                    block([torch.randn(batch, 6)], rev=rev)
                assert plain[-1] == (batch == limit), (soft, batch, rev)
