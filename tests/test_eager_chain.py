"""Test the eager engine's couplings in a chain against its ordinary ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastflow_kernels.coupling import ChainGrads, Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import ChainEngine, chunks, eager, plain
from tests.support.compare import assert_close

ENGINE: ChainEngine = eager
# The last two are above the size of a chunk of samples or of channel pairs, where _CHUNK_BYTES is
# 1 << 13.
SHAPES = [(1, 2, 1, 1), (3, 2, 5), (1, 8, 4, 4), (2, 7, 3, 3), (5, 6), (9, 7, 8, 8), (2, 9, 50, 70)]
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
all_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: str(dtypes[0])[6:])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 13)


def make(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], clamp: float = 1.9
) -> tuple[Tensor, Tensor, Coupling]:
    x_dtype, a_dtype, g_dtype = dtypes
    torch.manual_seed(0)
    batch, channels, *spatial = shape
    perm, x = torch.randperm(channels), torch.randn(shape, dtype=x_dtype)
    coupling = Coupling(
        torch.randn(channels).to(g_dtype),
        torch.randn(channels).to(g_dtype),
        CouplingSpec.of(clamp, "anomalib", "SOFTPLUS", False),
        perm,
        perm.argsort(),
    )
    return x, (3 * torch.randn(batch, channels // 2 * 2, *spatial)).to(a_dtype), coupling


def with_scale(coupling: Coupling, dtype: torch.dtype) -> Coupling:
    g = coupling.parameters[0].to(accumulator(dtype))
    return coupling._replace(scale=plain.activated(g, coupling.spec.activation))


@all_dtypes
@all_shapes
@pytest.mark.parametrize("has_scale", [False, True], ids=["", "scale"])
def test_forward_is_the_ordinary_one(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], has_scale: bool
) -> None:
    x, a, coupling = make(shape, dtypes)
    expected, log_det = ENGINE.forward(x, a, coupling)
    given = with_scale(coupling, expected.dtype) if has_scale else coupling
    y = torch.full(shape, torch.nan, dtype=expected.dtype)
    sums = ENGINE.forward_in_chain(x, a, given, y)
    assert torch.equal(y, expected)
    assert sums.shape == (shape[0], 1)
    pixels = x[0, 0].numel()
    assert torch.equal(ENGINE.log_det_of_chain([sums], [given], pixels), log_det)


def test_y_may_have_another_dtype() -> None:
    x, a, coupling = make((2, 7, 3, 3), DTYPES[0])
    expected, _ = ENGINE.forward(x, a, coupling)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    ENGINE.forward_in_chain(x, a, coupling, y)
    assert torch.equal(y, expected.bfloat16())


@all_dtypes
@all_shapes
@pytest.mark.parametrize("has_log_det", [False, True], ids=["", "log_det"])
@pytest.mark.parametrize("has_subnet", [False, True], ids=["", "subnet"])
def test_backward_is_the_ordinary_one_of_the_sum(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], has_subnet: bool, has_log_det: bool
) -> None:
    x, a, coupling = make(shape, dtypes)
    dtype = promoted(x, a, coupling.global_scale)
    dy, from_subnet = torch.randn(2, *shape).to(dtype)
    from_subnet = plain.split(from_subnet)[0].contiguous()
    dlog_det = torch.randn(shape[0], dtype=accumulator(dtype)) if has_log_det else None
    total = dy.clone()
    if has_subnet:
        plain.split(total)[0].add_(from_subnet)
    for want_params in (False, True):
        expected = ENGINE.backward(x, a, OutputGrads(total, dlog_det), coupling, want_params)
        grads = ChainGrads(dy.clone(), from_subnet if has_subnet else None, dlog_det)
        actual = ENGINE.backward_in_chain(x, a, grads, with_scale(coupling, dtype), want_params)
        for t, e in zip(actual, expected, strict=True):
            assert (t is None) == (e is None)
            assert t is None or (isinstance(t, Tensor) and e is not None and torch.equal(t, e))


@pytest.mark.parametrize("clamp", [1.9, 3.0])
def test_log_det_of_a_chain_is_the_sum_of_its_blocks(clamp: float) -> None:
    shape = (3, 6, 4, 4)

    def blocks(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Coupling]]:
        return [make(shape, (dtype,) * 3, clamp) for _ in range(3)]

    def one_by_one(dtype: torch.dtype) -> Tensor:
        return torch.stack([ENGINE.forward(*block)[1] for block in blocks(dtype)]).sum(0)

    sums = [ENGINE.forward_in_chain(*b, torch.empty(shape)) for b in blocks(torch.float32)]
    couplings = [coupling for *_, coupling in blocks(torch.float32)]
    actual = ENGINE.log_det_of_chain(sums, couplings, 16)
    # Terms of both signs: those of s, and of the scales.
    scale = [plain.activated(c.parameters[0], "SOFTPLUS").log().abs().sum() for c in couplings]
    magnitude = 16 * float(sum(scale)) + 16 * 3 * 3 * clamp
    truth = one_by_one(torch.float64)
    assert_close(actual, truth, one_by_one(torch.float32), "log-det", magnitude=magnitude)
