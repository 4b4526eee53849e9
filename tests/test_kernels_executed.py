"""What only the executor of compiled kernels can show: offsets beyond 2^31, and instructions as
wrong as their documentation allows.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.support.modes import EXECUTED

if not EXECUTED:
    pytest.skip(
        "needs a process without TRITON_INTERPRET, on a machine without a GPU (ci/kernels.sh)",
        allow_module_level=True,
    )
pytest.importorskip("triton")

from fastflow_kernels.coupling import ACTIVATIONS
from fastflow_kernels.engines.triton import coupling
from tests.support import modes
from tests.support.coupling import (
    check_everything,
    close,
    gradients,
    make,
    plain_fwd,
    plain_inv,
    shape_id,
)
from tests.support.executor import EXECUTOR

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]


@pytest.fixture(autouse=True, scope="module")
def _executor():
    with modes.kernels_run():
        yield


# --- approximate instructions ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{"spec_name": name} for name in ACTIVATIONS] + [{"gin": True}],
    ids=[*ACTIVATIONS, "gin"],
)
@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
def test_coupling_parity_with_instructions_at_their_documented_worst(shape, options, seed):
    """ex2.approx, div.full and the like off by up to their documented error: the bound of
    units_of_floor().
    """
    with mock.patch.object(EXECUTOR, "perturb", seed):
        for _ in range(2):  # other values, the same kernels
            check_everything(make(shape, **options))


# --- large inputs: the memory is reserved, and touched only where the first and the last programs d

EDGE = 4  # columns looked at, at either end


class Large:
    """Inputs of more than 2^31 elements, written at both ends alone, and those columns as an input
    of their own.
    """

    def __init__(self, shape, reverse=False, gin=False):
        batch, channels, *spatial = shape
        self.shape, self.is_rows = shape, not spatial
        ends = (2 * EDGE, channels) if self.is_rows else (2, channels, EDGE)
        self.x, self.a, self.g, self.offset, self.perm, self.inv, self.spec = make(
            ends, x=torch.float16, g=torch.float32, reverse=reverse
        )
        self.dy, self.dlogdet = torch.randn(ends, dtype=torch.float16), torch.randn(ends[0])
        self.far_x, self.far_a = self.spread(self.x), self.spread(self.a)
        self.far_dlogdet = torch.zeros(batch)
        self.far_dlogdet[: ends[0] // 2], self.far_dlogdet[-(ends[0] // 2) :] = self.dlogdet.chunk(
            2
        )
        self.parameters = (self.g, self.offset, self.perm, self.inv, self.spec)
        assert self.far_x.numel() > 2**31

    def spread(self, ends):
        # zeros() would touch all of it
        large = torch.empty((self.shape[0], ends.shape[1], *self.shape[2:]), dtype=ends.dtype)
        for part, values in zip(self.edges(large), ends.chunk(2), strict=True):
            part.copy_(values if self.is_rows else values[0])
        return large

    def edges(self, large):
        return (
            (large[:EDGE], large[-EDGE:])
            if self.is_rows
            else (large[0, :, :EDGE], large[-1, :, -EDGE:])
        )

    def gathered(self, large):
        """The columns at both ends of a result."""
        return torch.cat(self.edges(large)) if self.is_rows else torch.stack(self.edges(large))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "reverse"])
def reverse(request):
    return request.param


# A sample has fewer than 2^31 elements, the planes' last one begins beyond.
LARGE = pytest.mark.parametrize(
    "shape", [(3, 5, 1 << 28), (33_000_000, 66)], ids=["planes", "rows"]
)


@pytest.fixture
def _first_and_last_programs():
    """Enough of them for all channels of a column."""
    with mock.patch.object(EXECUTOR, "ctas", lambda count: [*range(8), *range(count - 8, count)]):
        yield


@LARGE
@pytest.mark.usefixtures("_first_and_last_programs")
def test_forward_beyond_32_bit_offsets(shape, reverse):
    large = Large(shape, reverse)
    y, _ = coupling.coupling_fwd(large.far_x, large.far_a, *large.parameters, large.is_rows)
    inputs = (large.x, large.a, large.g, large.offset)
    truth = plain_fwd(*(t.double() for t in inputs), large.perm, large.spec)[0]
    close(large.gathered(y), truth, plain_fwd(*inputs, large.perm, large.spec)[0], "y")


@LARGE
@pytest.mark.usefixtures("_first_and_last_programs")
def test_backward_beyond_32_bit_offsets(shape, reverse):
    large = Large(shape, reverse)
    dx, da, *_ = coupling.coupling_bwd(
        large.spread(large.dy),
        large.far_dlogdet,
        large.far_x,
        large.far_a,
        *large.parameters,
        False,
    )
    inputs = (
        large.x,
        large.a,
        large.g,
        large.offset,
        large.perm,
        large.spec,
        large.dy,
        large.dlogdet,
    )
    truth, baseline = gradients(*inputs, torch.float64), gradients(*inputs, None)
    close(large.gathered(dx), truth[0], baseline[0], "dx")
    close(large.gathered(da), truth[1], baseline[1], "da")


@LARGE
@pytest.mark.usefixtures("_first_and_last_programs")
def test_inverse_beyond_32_bit_offsets(shape, reverse):
    large = Large(shape, reverse)
    x = coupling.coupling_inv_passive(large.far_x, *large.parameters)
    coupling.coupling_inv_active(large.far_x, x, large.far_a, *large.parameters, large.is_rows)
    inputs = (large.x, large.a, large.g, large.offset)
    truth = plain_inv(*(t.double() for t in inputs), large.inv, large.spec)[0]
    baseline = plain_inv(*inputs, large.inv, large.spec)[0]
    close(large.gathered(x), truth, baseline, "x")
    if not reverse:
        x = coupling.coupling_inv_passive(large.far_x, *large.parameters)
        coupling.coupling_inv_bwd(
            large.far_x,
            x,
            large.spread(large.dy),
            large.far_dlogdet,
            large.far_a,
            *large.parameters,
            False,
        )
        close(large.gathered(x), truth, baseline, "x undone")


@pytest.mark.slow
def test_gin_sums_beyond_32_bit_offsets():
    """The last program of the sums, for the last sample."""
    shape = (3, 5, 1 << 28)
    large = Large(shape)
    with mock.patch.object(EXECUTOR, "ctas", lambda count: [count - 1]):
        spec = large.spec._replace(gin=True)
        prepared = coupling._prepare_fwd(
            shape,
            large.far_x.stride(0),
            large.far_a.stride(0),
            *[torch.float16] * 4,
            spec,
            True,
            True,
            -1,
        )
        sums = prepared.gin(True, large.far_a)
    assert sums[0, -1, -1] != 0
