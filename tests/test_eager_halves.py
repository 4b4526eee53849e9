"""Test the eager engine's couplings between halves against its ordinary ones."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingSpec, Halves, HalvesGrads, OutputGrads
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import ChainEngine, chunks, eager, plain
from fastflow_kernels.engines.eager_affine import scale_and_offset
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
both_layouts = pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "apart"])
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
all_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: str(dtypes[0])[6:])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 13)


def halves_of(x: Tensor, is_whole: bool) -> Halves:
    """Return the halves of x, as views or each in its own memory."""
    passive, active = plain.split(x)
    return Halves(passive, active) if is_whole else Halves(passive.clone(), active.clone())


def whole(halves: Halves) -> Tensor:
    return torch.cat(halves, 1)


class Case(NamedTuple):
    x: Tensor
    a: Tensor
    coupling: Coupling
    dy: Tensor  # without the subnet's part
    from_subnet: Tensor
    dlog_det: Tensor

    @property
    def y_dtype(self) -> torch.dtype:
        return promoted(self.x, self.a, self.coupling.global_scale)


def make(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], clamp: float = 1.9) -> Case:
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
    a = (3 * torch.randn(batch, channels // 2 * 2, *spatial)).to(a_dtype)
    y_dtype = promoted(x, a, coupling.global_scale)
    dy, from_subnet = torch.randn(2, *shape).to(y_dtype)
    log_det_dtype = accumulator(y_dtype)
    from_subnet = plain.split(from_subnet)[0].contiguous()
    return Case(x, a, coupling, dy, from_subnet, torch.randn(batch, dtype=log_det_dtype))


@both_layouts
@all_dtypes
@all_shapes
def test_forward(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], is_whole: bool) -> None:
    case = make(shape, dtypes)
    expected, log_det = eager.forward(case.x, case.a, case.coupling)
    for y_is_whole in (True, False):
        y = halves_of(torch.empty_like(expected), y_is_whole)
        sums = ENGINE.forward_halves(halves_of(case.x, is_whole), case.a, case.coupling, y)
        assert torch.equal(whole(y), expected)
        assert sums.shape[0] == shape[0]
        assert sums.dim() == 2
        actual = ENGINE.log_det_of_chain([sums], [case.coupling], case.x[0, 0].numel())
        assert torch.equal(actual, log_det)


@pytest.mark.parametrize("want_params", [True, False], ids=["params", "no params"])
@both_layouts
@all_dtypes
@all_shapes
def test_backward(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], is_whole: bool, want_params: bool
) -> None:
    """The gradients of the parameters are sums, whose order depends on the layout."""
    case = make(shape, dtypes)
    passive, active = plain.split(case.dy.to(accumulator(case.y_dtype)))
    summed = torch.cat((passive + case.from_subnet, active), 1)
    x = halves_of(case.x, is_whole)
    for dy, from_subnet, dlog_det in (
        (case.dy, None, None),
        (case.dy, None, case.dlog_det),
        (summed, case.from_subnet, case.dlog_det),
    ):
        grads = HalvesGrads(*halves_of(case.dy, is_whole), from_subnet, dlog_det)
        actual = ENGINE.backward_halves(x, case.a, grads, case.coupling, want_params)
        # The ordinary function takes the sum of the gradients, unrounded.
        inputs = case.x, case.a, OutputGrads(dy, dlog_det), case.coupling
        expected = eager.backward(*inputs, want_params)
        assert torch.equal(whole(actual.x), expected.x)
        assert torch.equal(actual.a, expected.a)
        if not is_whole:
            assert all(t.is_contiguous() for t in actual.x)
        if not want_params:
            assert actual[2:] == (None, None)
            continue
        truth = eager.backward(*cast_all(torch.float64, *inputs), True)
        if case.y_dtype is torch.float64:  # see tests/support/compare.py
            expected = eager.backward(*cast_all(torch.float32, *inputs), True)
        for value, true, base in zip(actual[2:], truth[2:], expected[2:], strict=True):
            # A channel's terms may cancel.
            assert_close(value, true, base, magnitude=terms_per_channel(case, summed))


def cast_all(
    dtype: torch.dtype, x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling
) -> tuple[Tensor, Tensor, OutputGrads, Coupling]:
    g, offset = (t.to(dtype) for t in coupling.parameters)
    dlog_det = None if grads.log_det is None else grads.log_det.to(dtype)
    coupling = coupling._replace(global_scale=g, global_offset=offset)
    return x.to(dtype), a.to(dtype), OutputGrads(grads.y.to(dtype), dlog_det), coupling


def terms_per_channel(case: Case, dy: Tensor) -> float:
    """Return a bound of the sum of absolute terms in the gradient of a channel's parameter."""
    size = sum(t.abs().double().max().item() for t in (case.x, case.a))
    return dy.abs().double().transpose(0, 1).flatten(1).sum(1).max().item() * max(1.0, size)


@all_shapes
def test_a_scale_that_a_chain_has_computed(shape: tuple[int, ...]) -> None:
    """With another scale than that of the parameter, to see that it is used."""
    case = make(shape, DTYPES[0])
    g = torch.randn(shape[1])
    other = case.coupling._replace(global_scale=g)
    scale, _ = scale_and_offset(other, torch.float32)
    assert scale is not None
    for coupling in (other, case.coupling._replace(scale=scale.flatten())):
        y = halves_of(torch.empty_like(case.x), True)
        sums = eager.forward_halves(halves_of(case.x, True), case.a, coupling, y)
        log_det = eager.log_det_of_chain([sums], [coupling], case.x[0, 0].numel())
        grads = HalvesGrads(*plain.split(case.dy), case.from_subnet, case.dlog_det)
        dx, *others = eager.backward_halves(halves_of(case.x, True), case.a, grads, coupling, True)
        results = [whole(y), log_det, whole(dx), *others]
        if coupling is other:
            expected = results
    for value, truth in zip(results, expected, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clamps", [(1.9, 1.9, 0.5), (1.9, 5.0, -1.0)], ids=["fast", "mixed"])
@all_shapes
def test_log_det_of_several_blocks(
    shape: tuple[int, ...], clamps: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Against the plain formula. Clamps that mix the two forms of s have sums in two units."""
    log_dets, sums, couplings = {torch.float64: 0.0, torch.float32: 0.0}, [], []
    magnitude = 0.0
    for clamp in clamps:
        case = make(shape, (dtype,) * 3, clamp)
        y = halves_of(torch.empty_like(case.x), False)
        sums.append(eager.forward_halves(halves_of(case.x, False), case.a, case.coupling, y))
        couplings.append(case.coupling)
        for wide in log_dets:
            x1, x2 = plain.split(case.x.to(wide))
            a_s, g = case.a.chunk(2, 1)[0].to(wide), case.coupling.global_scale.to(wide)
            s = clamp * torch.tanh(0.1 * a_s)
            log_scale = plain.activated(g, "SOFTPLUS").log()
            pixels = x1[0, 0].numel()
            log_dets[wide] = log_dets[wide] + s.flatten(1).sum(1) + pixels * log_scale.sum()
            terms = s.abs().flatten(1).sum(1).max() + pixels * log_scale.abs().sum()
        magnitude += terms.item()
    actual = eager.log_det_of_chain(sums, couplings, case.x[0, 0].numel())
    assert actual.dtype is dtype
    assert_close(actual, *log_dets.values(), magnitude=magnitude)
