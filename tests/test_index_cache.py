"""Test that the cache of a permutation's index notices changed values, by both of its checks.

tests/test_current_weights.py tests blocks, whose small matrices take the first check.
"""

from __future__ import annotations

import pytest
import torch

from fastflow_kernels import index_cache
from fastflow_kernels.permutations import one_hot


def set_a_zero(w: torch.Tensor, perm: torch.Tensor) -> None:
    w.data[0, (int(perm[0]) + 1) % len(w)] = 1e-30


def swap_two_rows(w: torch.Tensor, perm: torch.Tensor) -> None:
    w.data[[0, 1]] = w.data[[1, 0]]


def clear_a_one(w: torch.Tensor, perm: torch.Tensor) -> None:
    w.data[0, int(perm[0])] = 0.0


def nudge_a_one(w: torch.Tensor, perm: torch.Tensor) -> None:
    w.data[0, int(perm[0])] = 1.0 + torch.finfo(w.dtype).eps


@pytest.mark.parametrize("change", [set_a_zero, swap_two_rows, clear_a_one, nudge_a_one])
@pytest.mark.parametrize("compared", [0, 1 << 16], ids=["ones and checksum", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_changes_through_data_are_noticed(
    dtype: torch.dtype, compared: int, change: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    monkeypatch.setattr(index_cache, "_COMPARED", compared)
    perm = torch.tensor([3, 0, 2, 4, 1])
    w = one_hot(perm, dtype)
    cached = index_cache._read_matrices((), w, None)
    assert cached.index is not None
    assert cached.ones is not None
    assert (cached.ones[0].copy is None) == (compared == 0)
    assert cached.holds(w, None)
    change(w, perm)
    assert not cached.holds(w, None)
