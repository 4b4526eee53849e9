"""Test the kernels at offsets beyond 2^31, and with instructions as wrong as documented.

Only the executor of compiled kernels can show both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.modes import EXECUTED

if not EXECUTED:
    pytest.skip(
        "needs a process without TRITON_INTERPRET, on a machine without a GPU (ci/kernels.sh)",
        allow_module_level=True,
    )
pytest.importorskip("triton")

from fastflow_kernels.coupling import ACTIVATIONS, OutputGrads
from fastflow_kernels.engines.triton import engine
from fastflow_kernels.engines.triton.launch import Operands, key_of
from fastflow_kernels.engines.triton.sums import prepare_gin_sums
from tests.support.coupling import (
    cast,
    check_everything,
    check_side,
    close,
    make,
    make_side,
    plain_forward,
    plain_gradients,
    plain_inverse,
)
from tests.support.executor import EXECUTOR
from tests.support.kernels import kernels_run, shapes  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


# --- approximate instructions ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{"activation": name} for name in ACTIVATIONS] + [{"gin": True}],
    ids=[*ACTIVATIONS, "gin"],
)
@shapes((2, 7, 4, 5), (5, 7))
def test_coupling_parity_with_instructions_at_their_documented_worst(
    shape: tuple[int, ...], options: dict[str, Any], seed: int
) -> None:
    """Errors of ex2.approx, div.full and the like stay within the bound of units_of_floor()."""
    with mock.patch.object(EXECUTOR, "perturb", seed):
        for _ in range(2):  # different values, same kernels
            check_everything(*make(shape, **options))


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("function", ["tanh", "atan"])
@shapes((2, 3, 4, 5), (5, 7))
def test_side_parity_with_instructions_at_their_documented_worst(
    shape: tuple[int, ...], function: str, gin: bool
) -> None:
    with mock.patch.object(EXECUTOR, "perturb", 1):
        for _ in range(2):
            check_side(*make_side(shape, gin, function))


# --- large inputs: memory is reserved, but only the first and last programs touch it --------------

EDGE = 4  # columns to compare at either end


class Large:
    """Inputs of more than 2^31 elements, of which only both ends are written.

    The columns at both ends are also a small input of their own.
    """

    def __init__(
        self, shape: tuple[int, ...], unpermutes_input: bool = False, gin: bool = False
    ) -> None:
        batch, channels, *spatial = shape
        self.shape, self.is_rows = shape, not spatial
        ends = (2 * EDGE, channels) if self.is_rows else (2, channels, EDGE)
        self.x, self.a, self.coupling = make(
            ends, x=torch.float16, g=torch.float32, unpermutes_input=unpermutes_input, gin=gin
        )
        log_det = torch.randn(ends[0])
        self.grads = OutputGrads(torch.randn(ends, dtype=torch.float16), log_det)
        self.far_x, self.far_a = self.spread(self.x), self.spread(self.a)
        far = torch.zeros(batch)
        far[: ends[0] // 2], far[-(ends[0] // 2) :] = log_det.chunk(2)
        self.far_grads = OutputGrads(self.spread(self.grads.y), far)
        assert self.far_x.numel() > 2**31

    def spread(self, ends: Tensor) -> Tensor:
        # Use empty(), because zeros() would touch all of the memory.
        large = torch.empty((self.shape[0], ends.shape[1], *self.shape[2:]), dtype=ends.dtype)
        for part, values in zip(self.edges(large), ends.chunk(2), strict=True):
            part.copy_(values if self.is_rows else values[0])
        return large

    def edges(self, large: Tensor) -> tuple[Tensor, Tensor]:
        return (
            (large[:EDGE], large[-EDGE:])
            if self.is_rows
            else (large[0, :, :EDGE], large[-1, :, -EDGE:])
        )

    def gather(self, large: Tensor) -> Tensor:
        """Return the columns at both ends of a result."""
        return torch.cat(self.edges(large)) if self.is_rows else torch.stack(self.edges(large))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "reverse"])
def unpermutes_input(request: pytest.FixtureRequest) -> bool:
    return request.param


# A sample has fewer than 2^31 elements, and the last sample of the planes begins beyond that.
LARGE = pytest.mark.parametrize(
    "shape", [(3, 5, 1 << 28), (33_000_000, 66)], ids=["planes", "rows"]
)


@pytest.fixture
def _first_and_last_programs() -> Iterator[None]:
    """Run only enough programs for all channels of a column, and none that add up partial sums."""

    def ends(count: int) -> list[int]:
        return [*range(8), *range(count - 8, count)] if count > 16 else []

    with mock.patch.object(EXECUTOR, "ctas", ends):
        yield


@LARGE
@pytest.mark.usefixtures("_first_and_last_programs")
def test_forward_beyond_32_bit_offsets(shape: tuple[int, ...], unpermutes_input: bool) -> None:
    large = Large(shape, unpermutes_input)
    y, _ = engine.forward(large.far_x, large.far_a, large.coupling)
    inputs = (large.x, large.a, large.coupling)
    truth = plain_forward(*cast(torch.float64, *inputs))[0]
    close(large.gather(y), truth, plain_forward(*inputs)[0], "y")


@LARGE
@pytest.mark.usefixtures("_first_and_last_programs")
def test_backward_beyond_32_bit_offsets(shape: tuple[int, ...], unpermutes_input: bool) -> None:
    large = Large(shape, unpermutes_input)
    dx, da, *_ = engine.backward(large.far_x, large.far_a, large.far_grads, large.coupling, False)
    inputs = (large.x, large.a, large.coupling, large.grads)
    truth, baseline = plain_gradients(*inputs, torch.float64), plain_gradients(*inputs)
    close(large.gather(dx), truth[0], baseline[0], "dx")
    close(large.gather(da), truth[1], baseline[1], "da")


@LARGE
@pytest.mark.usefixtures("_first_and_last_programs")
def test_inverse_beyond_32_bit_offsets(shape: tuple[int, ...], unpermutes_input: bool) -> None:
    large = Large(shape, unpermutes_input)
    far_x, far_a, coupling = large.far_x, large.far_a, large.coupling
    x = engine.invert_passive(far_x, coupling)
    engine.invert_active(far_x, x, far_a, coupling)
    inputs = (large.x, large.a, coupling)
    truth = plain_inverse(*cast(torch.float64, *inputs))[0]
    close(large.gather(x), truth, plain_inverse(*inputs)[0], "x")
    x = engine.invert_passive(far_x, coupling)
    engine.invert_and_backward(far_x, x, far_a, large.far_grads, coupling, False)
    close(large.gather(x), truth, plain_inverse(*inputs)[0], "x reconstructed")


@pytest.mark.slow
def test_gin_sums_beyond_32_bit_offsets() -> None:
    """Only the last program of the sums runs, for the last sample."""
    large = Large((3, 5, 1 << 28), gin=True)
    a, coupling = large.far_a, large.coupling
    key = key_of(large.far_x, coupling, (torch.float16, a.dtype), (a.stride(0), a.stride(0)))
    gin_sums = prepare_gin_sums(Operands(*key), a.stride(0))
    assert gin_sums is not None
    with mock.patch.object(EXECUTOR, "ctas", lambda count: [count - 1]):
        sums = gin_sums(True, a, None, None, None)
    assert sums[0, -1, -1] != 0
