"""Test passes under users' dispatch modes, which must leave nothing behind for later passes."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import reference
from fastflow_kernels import AllInOneBlock, ReversibleSequence, route
from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines import chunks, constants, eager
from tests.support.blocks import Stored
from tests.support.cases import OPTIONS, Case, Shape, both_directions, make_block, make_input
from tests.support.compare import assert_close
from tests.support.dispatch_modes import NoFloat64, Spoiling, Wrapped, Wrapping
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.usefixtures("fused")

NAMES = ("hard", "rev", "cond", "gin", "soft", "gin-soft", "hh1")
SHAPES = (Shape(40, 6), Shape(3, 6, (5, 7)))
both_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _nothing_kept_yet() -> None:
    """Clear all caches, as in a fresh process, so that they hold only what the test caches."""
    constants._cached.cache_clear()
    chunks.scratch.buffers.clear()
    chunks.scratch.views.clear()


def passes(block: nn.Module, x: Tensor, c: list[Tensor]) -> list[Tensor]:
    """Return the output, log-determinant, gradients, and the inverse with its log-determinant."""
    x = x.detach().requires_grad_()
    (y,), logdet = block([x], c)
    parameters = [p for p in block.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        y.square().sum() + logdet.sum(), [x, *parameters], allow_unused=True
    )
    with torch.no_grad():
        (back,), minus = block([y.detach()], c, rev=True)
    return [y.detach(), logdet.detach(), *(g for g in grads if g is not None), back, minus]


def block_and_input(shape: Shape, name: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    # In dialect "freia" a hard permutation is an index, so no values must be read to find it.
    case = Case(shape, name, "freia")
    x, c = make_input(case, torch.float32)
    return make_block(AllInOneBlock, case, torch.float32, dialect="freia", backend="eager"), x, c


def cached_tensors() -> list[Tensor]:
    """Return the tensors that this thread caches between calls."""
    views = [view for views in chunks.scratch.views.values() for view in views]
    return [*chunks.scratch.buffers.values(), *views]


@both_shapes
@pytest.mark.parametrize("name", [name for name in NAMES if "hh" not in name])
def test_a_pass_on_fake_tensors_leaves_nothing_behind(shape: Shape, name: str) -> None:
    block, x, c = block_and_input(shape, name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block([x], c)
        block([x], c, rev=True)
    assert not cached_tensors()
    expected = passes(block, x, c)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block([x], c)
    for actual, value in zip(passes(block, x, c), expected, strict=True):
        assert type(actual) is Tensor
        assert torch.equal(actual, value)


@both_shapes
@pytest.mark.parametrize("name", NAMES)
def test_a_mode_that_wraps_results(shape: Shape, name: str) -> None:
    block, x, c = block_and_input(shape, name)
    block, x, c = block.double(), x.double(), [t.double() for t in c]
    with Wrapping():
        wrapped = [t.held if isinstance(t, Wrapped) else t for t in passes(block, x, c)]
    assert not cached_tensors()
    for actual, expected in zip(passes(block, x, c), wrapped, strict=True):
        assert type(actual) is Tensor
        # Wrapped tensors run plain operations, so the bits differ.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@both_shapes
@pytest.mark.parametrize("name", NAMES)
def test_a_mode_that_spoils_what_was_made(shape: Shape, name: str) -> None:
    block, x, c = block_and_input(shape, name)
    expected = [t.clone() for t in passes(block, x, c)]
    keep = {
        t.untyped_storage().data_ptr()
        for t in (x, *c, *block.parameters(), *block.buffers(), *expected)
    }
    with Spoiling() as mode:
        passes(block, x, c)
    mode.spoil(keep)
    for actual, value in zip(passes(block, x, c), expected, strict=True):
        assert torch.equal(actual, value)


ENGINE_SPECS = {
    "affine": CouplingSpec.of(1.9, "anomalib", "SOFTPLUS", False),
    "gin": CouplingSpec.of(1.9, "freia", "EXP", True),
    "clamp8": CouplingSpec.of(8.0, "freia", "SIGMOID", False),
}


def every_engine_function(shape: tuple[int, ...], spec: CouplingSpec, dtype: torch.dtype) -> None:
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    a = 5 * torch.randn(shape, dtype=dtype)
    g, offset, perm = torch.randn(shape[1]), torch.randn(shape[1]), torch.randperm(shape[1])
    coupling = Coupling(g, offset, spec, perm, perm.argsort())
    y, logdet = eager.forward(x, a, coupling)
    grads = OutputGrads(dy, torch.ones_like(logdet))
    eager.backward(x, a, grads, coupling, True)
    back = eager.invert_passive(y, coupling)
    eager.invert_active(y, back, a, coupling)
    back = eager.invert_passive(y, coupling)
    eager.invert_and_backward(y, back, a, grads, coupling, True)


@pytest.mark.parametrize("name", ENGINE_SPECS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("shape", [(40, 6), (3, 6, 5, 7)], ids=["rows", "planes"])
def test_engine_functions_need_no_float64(
    shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> None:
    with NoFloat64():
        every_engine_function(shape, ENGINE_SPECS[name], dtype)


@both_shapes
@pytest.mark.parametrize("name", [name for name in OPTIONS if "hh" not in name])
@plain_and_fused
def test_blocks_need_no_float64(shape: Shape, name: str, small: int) -> None:
    block, x, c = block_and_input(shape, name)
    block.backend = "auto"
    with NoFloat64():
        passes(block, x, c)


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_may_be_changed_where_that_is_allowed(name: str) -> None:
    block, x, c = block_and_input(SHAPES[1], name)
    expected = passes(block, x, c)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        results = passes(block, x, c)
        leaf = x.detach().clone().requires_grad_()
        saved = leaf * 1.0
        (y,), logdet = block([saved], c)
        loss = y.square().sum() + logdet.sum()
        with torch.no_grad():
            saved.zero_()  # backward must use the values from before
        loss.backward()
    for actual, value in zip(results, expected, strict=True):
        assert torch.equal(actual, value)
    assert torch.equal(leaf.grad, expected[2])


@pytest.mark.parametrize("policy", ["recompute all", "save convolutions"])
@pytest.mark.parametrize("name", NAMES)
def test_selective_checkpointing(name: str, policy: str) -> None:
    def decide(_: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saves = policy == "save convolutions" and "convolution" in str(function)
        return CheckpointPolicy.PREFER_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    block, x, c = block_and_input(SHAPES[1], name)
    x.requires_grad_()

    def run(x: Tensor) -> Tensor:
        (y,), logdet = block([x], c)
        return y.square().sum() + logdet.sum()

    (expected,) = torch.autograd.grad(run(x), x)
    loss = checkpoint(
        run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(decide)
    )
    (actual,) = torch.autograd.grad(loss, x)
    assert torch.equal(actual, expected)


def test_threads_and_inference_mode_after_a_mode() -> None:
    block, x, c = block_and_input(SHAPES[1], "hard")
    with Wrapping():
        passes(block, x, c)
    with torch.inference_mode():
        block([x], c)
    expected, of_threads = passes(block, x, c), []
    threads = [
        threading.Thread(target=lambda: of_threads.append(passes(block, x, c))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(a, b) for results in of_threads for a, b in zip(results, expected, strict=True)
    )
    assert len(of_threads) == 3


def test_a_clamp_that_changes_every_step_adds_nothing_up() -> None:
    """An annealed clamp takes 600 values with about ten constants each, of which 128 are cached."""
    block = AllInOneBlock([(8,)], subnet_constructor=nn.Linear, backend="eager")
    chain = ReversibleSequence(8)
    chain.append(AllInOneBlock, subnet_constructor=nn.Linear)
    x = torch.randn(64, 8)

    def steps(first: int, count: int) -> None:
        for k in range(first, first + count):
            block.clamp = chain.module_list[0].clamp = 0.5 + k / 1000
            (y,), logdet = block([x])
            (y.sum() + logdet.sum() + chain(x)[0].sum()).backward()
            with torch.no_grad():
                block([x], rev=True)

    tracemalloc.start()
    try:
        steps(0, 200)  # later steps replace the constants that these cache
        gc.collect()
        tensors = sum(issubclass(type(t), Tensor) for t in gc.get_objects())
        before = tracemalloc.take_snapshot()
        steps(200, 400)
        gc.collect()
        grown = sum(
            entry.size_diff for entry in tracemalloc.take_snapshot().compare_to(before, "filename")
        )
    finally:
        tracemalloc.stop()
    assert sum(issubclass(type(t), Tensor) for t in gc.get_objects()) <= tensors + 8
    assert grown < 40_000, grown  # 100 bytes a step; a constant alone is larger


@pytest.mark.parametrize("batch", [7, 100_003])
@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=["rows", "planes"])
def test_gradient_of_the_scale_from_many_log_determinants_that_cancel(
    shape: tuple[int, ...], batch: int
) -> None:
    """Their sum goes to every channel, and is as accurate in float32 as plain PyTorch's."""
    results = []
    x, a = torch.randn(batch, *shape), torch.randn(batch, *shape)
    dlogdet = torch.randn(batch) + 1e-3
    dlogdet -= dlogdet.mean()
    for cls, dtype in (
        (AllInOneBlock, torch.float32),
        (reference.AllInOneBlock, torch.float32),
        (reference.AllInOneBlock, torch.float64),
    ):
        torch.manual_seed(0)
        block = cls(
            [shape],
            subnet_constructor=lambda *_: Stored(a),
            global_affine_type="EXP",
        ).to(dtype)
        _, logdet = block([x.to(dtype)])
        results.append(torch.autograd.grad(logdet, block.global_scale, dlogdet.to(dtype))[0])
    magnitude = dlogdet.abs().sum().item() * x[0, 0].numel()
    actual, baseline, truth = results
    assert_close(actual, truth, baseline, "grad global_scale", magnitude=magnitude / batch**0.5)


class OnGpu(Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


def test_kernels_are_compiled_for_a_few_clamps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds and memory, so only the first clamps are compiled and run."""
    monkeypatch.setattr(route, "_clamps", set())
    x = torch.zeros(2, 4).as_subclass(OnGpu)
    specs = [
        CouplingSpec.of(2 + k / 100, dialect, "EXP", False)
        for k in range(100)
        for dialect in ("anomalib", "freia")
    ]
    for _ in range(2):
        wanted = [route.wants_triton(x, "auto", spec) for spec in specs]
        assert wanted == [place < route.MOST_CLAMPS for place in range(len(specs))]
    assert route.wants_triton(x, "triton", specs[-1])
    assert not route.wants_triton(torch.zeros(2, 4), "auto", specs[0])  # a CPU compiles nothing


@both_directions
def test_a_block_asks_how_many_clamps_were_compiled(
    rev: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def spy(x: Tensor, backend: str, spec: CouplingSpec) -> bool:
        asked.append(spec.clamp)
        return False

    monkeypatch.setattr(route, "wants_triton", spy)
    chain = ReversibleSequence(8)
    for clamp in (1.25, 1.75):
        chain.append(
            AllInOneBlock, subnet_constructor=nn.Linear, affine_clamping=clamp, backend="eager"
        )
    x = torch.randn(30, 8, requires_grad=not rev)
    with torch.set_grad_enabled(not rev):
        z, _ = chain(x, rev=rev)
    if not rev:
        z.sum().backward()
    assert sorted(set(asked)) == [1.25, 1.75]
    assert len(asked) >= (2 if rev else 4)
