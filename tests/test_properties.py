"""Test properties of random blocks and inputs, drawn by Hypothesis."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow_kernels import AllInOneBlock
from fastflow_kernels.permutations import HouseholderPermutation, IndexPermutation, random_rotation
from tests.support.cases import (
    DIALECTS,
    DTYPES,
    LAYOUTS,
    OPTIONS,
    Case,
    Shape,
    make_block,
    make_input,
)
from tests.support.parity import compare

pytestmark = pytest.mark.usefixtures("fused")

# Examples are the same in every run, so that failures can be repeated. Raise max_examples to
# search.
search = settings(max_examples=120, deadline=None, derandomize=True)
shapes = st.builds(
    Shape, st.integers(1, 5), st.integers(1, 20), st.lists(st.integers(1, 6), max_size=3).map(tuple)
)
cases = st.builds(Case, shapes, st.sampled_from(sorted(OPTIONS)), st.sampled_from(DIALECTS))


@search
@given(
    cases,
    st.sampled_from(["fp64", "fp32"]),
    st.sampled_from(sorted(LAYOUTS)),
    st.booleans(),
    st.booleans(),
)
def test_any_block_equals_the_reference(
    case: Case, dtype: str, layout: str, rev: bool, grad: bool
) -> None:
    compare(case, DTYPES[dtype], rev, grad, layout=layout)


@search
@given(cases, st.booleans())
def test_inverse_gives_back_any_input(case: Case, rev: bool) -> None:
    block = make_block(AllInOneBlock, case, dialect=case.dialect)
    x, c = make_input(case)
    with torch.no_grad():
        (y,), logdet = block([x], c, rev=rev)
        (back,), minus = block([y], c, rev=not rev)
    # A block amplifies float64 rounding errors by at most its scales and exp(clamp) each way, which
    # is below e^10 here.
    assert (back - x).abs().max() <= 1e-10 * max(1.0, y.abs().max().item())
    assert (logdet + minus).abs().max() <= 1e-10 * max(1.0, logdet.abs().max().item())


@search
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_reflections_are_orthogonal_and_equal_their_matrix(
    count: int, channels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    perm = torch.randperm(channels, generator=generator)
    vectors = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    permutation = HouseholderPermutation(IndexPermutation(perm, torch.argsort(perm)), vectors)
    v = torch.randn(3, channels, 4, generator=generator, dtype=torch.float64)
    y = permutation.permute(v)
    torch.testing.assert_close(permutation.unpermute(y), v, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, permutation.matrix(v.dtype) @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().sum(1), v.square().sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reflections", "channels"), [(64, 512), (3, 7), (8, 16)])
def test_reflections_are_orthogonal_in_float32(reflections: int, channels: int) -> None:
    """Applied to the unit vectors in float32, both the compact and the dense form are orthogonal.

    Q Q^T = I holds to 1e-6.
    """
    vectors = torch.randn(reflections, channels)
    q = (
        HouseholderPermutation(IndexPermutation(*[torch.arange(channels)] * 2), vectors)
        .permute(torch.eye(channels))
        .double()
    )
    assert (q @ q.T - torch.eye(channels)).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 2, 33, 256])
def test_rotations_are_drawn_from_so(channels: int) -> None:
    torch.manual_seed(1)
    w = random_rotation(channels)
    torch.manual_seed(1)
    assert torch.equal(w, random_rotation(channels)), "reproducible from torch's seed"
    assert (w.double() @ w.double().T - torch.eye(channels)).abs().max() < 1e-6
    assert abs(torch.linalg.det(w.double()).item() - 1.0) < 1e-5
