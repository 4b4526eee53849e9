"""Test CUDA graphs, bitwise repeatability and sizes beyond 32-bit offsets on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.providers import Provider
from bench.subject import Sample, Subject
from bench.workloads import Workload
from fastflow_kernels import AllInOneBlock
from fastflow_kernels.engines.available import triton_engine

pytestmark = pytest.mark.gpu


class Flow(nn.Module):
    """A few blocks, as a module that maps a tensor to the output and the summed log-determinant."""

    def __init__(self, shape: tuple[int, ...], steps: int = 3, **options: Any) -> None:
        super().__init__()
        subnet = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if len(shape) == 3 else nn.Linear
        self.blocks = nn.ModuleList(
            AllInOneBlock([shape], subnet_constructor=subnet, backend="triton", **options)
            for _ in range(steps)
        )

    def forward(self, x: Tensor, *c: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for block in self.blocks:
            (x,), logdet = block([x], c)
            total = total + logdet
        return x, total


class InAutocast(Flow):
    """The same in bfloat16. The cache of autocast is off, because a graph forbids it."""

    def forward(self, x: Tensor, *c: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return super().forward(x, *c)


def step(flow: nn.Module, x: Tensor, *c: Tensor) -> list[Tensor]:
    """Return the results and gradients of one training step."""
    x = x.detach().requires_grad_()
    flow.zero_grad(set_to_none=True)
    z, logdet = flow(x, *c)
    (z.square().sum() - logdet.sum()).backward()
    return [
        z.detach().clone(),
        logdet.detach().clone(),
        x.grad.clone(),
        *(p.grad.clone() for p in flow.parameters() if p.grad is not None),
    ]


shapes = pytest.mark.parametrize("shape", [(64, 512), (4, 32, 16, 16)], ids=["rows", "planes"])

# --- CUDA graphs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A flow and its inputs.

    Attributes:
        shape: (B, C, *S) of x.
        conditions: Channels of each condition.
        options: Options of the blocks.
        flow: The class of the flow.
        layout: The memory format of x.
        tolerance: How far results may differ, as a share of their largest value.
    """

    shape: tuple[int, ...]
    conditions: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    flow: type[Flow] = Flow
    layout: torch.memory_format = torch.contiguous_format
    tolerance: float = 1e-4

    def build(self) -> Flow:
        dims_c = [(width, *self.shape[2:]) for width in self.conditions]
        return self.flow(self.shape[1:], dims_c=dims_c, **self.options).cuda()

    def inputs(self, batch: int | None = None) -> list[Tensor]:
        """Draw x and the conditions."""
        rows, channels, *spatial = self.shape
        return [
            torch.randn(batch or rows, width, *spatial, device="cuda").to(memory_format=self.layout)
            for width in (channels, *self.conditions)
        ]

    def check(self, flow: nn.Module, plain: nn.Module, inputs: list[Tensor]) -> None:
        """Compare a training step with that of a flow without a graph."""
        torch.compiler.cudagraph_mark_step_begin()
        for actual, expected in zip(step(flow, *inputs), step(plain, *inputs), strict=True):
            assert actual.dtype == expected.dtype
            assert actual.stride() == expected.stride()
            atol = self.tolerance * expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=self.tolerance, atol=atol)


CFLOW = Case((64, 512), (128,), {"affine_clamping": 1.9})
CASES = {
    "rows": Case((64, 512)),
    "planes": Case((4, 32, 16, 16)),
    "cflow": CFLOW,
    "gin-rev": Case((4, 32, 16, 16), options={"gin_block": True, "reverse_permutation": True}),
    "channels-last": Case((4, 32, 16, 16), layout=torch.channels_last),
    "autocast": Case((64, 512), flow=InAutocast, tolerance=0.05),
}


def graphed_callables(flow: Flow, inputs: list[Tensor]) -> Any:
    x, *c = inputs
    example = (x.requires_grad_(), *c)
    # GIN does not use its scale
    return torch.cuda.make_graphed_callables(flow, example, allow_unused_input=True)


def reduce_overhead(flow: Flow, inputs: list[Tensor]) -> Any:
    """Compile a flow, and call it until it is captured: compiled, warmed up and recorded."""
    torch._dynamo.reset()
    compiled = torch.compile(flow, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        step(compiled, *inputs)
    return compiled


both_ways = pytest.mark.parametrize("capture", [graphed_callables, reduce_overhead])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the passes of our kernels that Python launches. The replay of a graph adds none."""
    launched: list[str] = []
    engine = triton_engine()

    def listed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            launched.append(name)
            return run(*args)

        return launch

    for name in ("forward", "backward"):
        monkeypatch.setattr(engine, name, listed(name, getattr(engine, name)))
    return launched


def replays(flow: nn.Module, inputs: list[Tensor], passes: list[str]) -> bool:
    """Return whether a training step launches no pass of ours from Python."""
    passes.clear()
    torch.compiler.cudagraph_mark_step_begin()
    step(flow, *inputs)
    return not passes


@both_ways
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cuda_graph_of_a_whole_flow(case: Case, capture: Any, passes: list[str]) -> None:
    """Capture once and replay on other values, three times in a row.

    Python launches our kernels before and during the capture, and not afterwards. So the graph
    holds them.
    """
    flow = case.build()
    plain = copy.deepcopy(flow)
    captured = capture(flow, case.inputs())
    assert passes.count("forward") >= len(flow.blocks)
    assert passes.count("backward") >= len(flow.blocks)
    for _ in range(3):
        inputs = case.inputs()
        case.check(captured, plain, inputs)
        assert replays(captured, inputs, passes)


@both_ways
@pytest.mark.parametrize("name", ["planes", "cflow"])
def test_weights_that_are_loaded_after_the_capture_take_effect(
    name: str, capture: Any, passes: list[str]
) -> None:
    """The other weights have other permutations."""
    case = CASES[name]
    flow, plain = case.build(), case.build()
    assert not torch.equal(flow.blocks[0].w_perm, plain.blocks[0].w_perm)
    captured = capture(flow, case.inputs())
    flow.load_state_dict(plain.state_dict())
    for _ in range(3):
        inputs = case.inputs()
        case.check(captured, plain, inputs)
        assert replays(captured, inputs, passes)


def test_reduce_overhead_takes_another_fiber_batch() -> None:
    flow = CFLOW.build()
    plain = copy.deepcopy(flow)
    compiled = reduce_overhead(flow, CFLOW.inputs())
    for batch in (48, 64, 48, 16):
        for _ in range(3):
            CFLOW.check(compiled, plain, CFLOW.inputs(batch))


def test_a_warm_up_with_an_unaligned_input_suffices(passes: list[str]) -> None:
    """The graph reads aligned copies. Their kernels must be loaded before the capture.

    There is one block, as a second one would get aligned inputs. No other test has this shape.
    """
    case = Case((40, 328), options={"steps": 1})
    flow = case.build()
    plain = copy.deepcopy(flow)
    batch, channels = case.shape
    unaligned = torch.randn(batch * channels + 1, device="cuda")[1:].view(case.shape)
    assert unaligned.data_ptr() % 16
    compiled = reduce_overhead(flow, [unaligned])
    for inputs in ([unaligned], case.inputs()):
        case.check(compiled, plain, inputs)
        assert replays(compiled, inputs, passes)


def test_compiled_planes_stay_channels_last(passes: list[str]) -> None:
    case = CASES["channels-last"]
    flow = case.build()
    torch._dynamo.reset()
    compiled = torch.compile(flow, fullgraph=True)
    case.check(compiled, copy.deepcopy(flow), case.inputs())
    with torch.no_grad():
        passes.clear()
        z, _ = compiled(*case.inputs())
    assert passes == ["forward"] * len(flow.blocks)
    assert z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("execution", ["compiled", "graphs"])
def test_benchmarks_of_ours_run_our_kernels(execution: str, passes: list[str]) -> None:
    shape = (64, 512)
    x, a = torch.randn(2, *shape, device="cuda").unbind()
    dy, dlogdet = torch.randn(shape, device="cuda"), torch.randn(shape[0], device="cuda")
    sample = Sample(x.requires_grad_(), a.requires_grad_(), [], dy, dlogdet)
    subject = Subject("block", Workload("rows", shape), Provider("ours", execution), [sample])
    subject.results("train")
    assert "backward" in passes
    passes.clear()
    subject.results("train")
    assert passes == ([] if execution == "graphs" else ["forward", "backward"])


# --- results --------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("options", [{}, {"gin_block": True}], ids=["affine", "gin"])
def test_steps_repeat_bit_for_bit(shape: tuple[int, ...], options: dict) -> None:
    block = AllInOneBlock(
        [shape[1:]], subnet_constructor=lambda i, o: nn.Identity(), backend="triton", **options
    ).cuda()
    a = torch.randn(shape, device="cuda", requires_grad=True)
    block.subnet.forward = lambda x: a
    x = torch.randn(shape, device="cuda", requires_grad=True)
    results = []
    for _ in range(3):
        x.grad = a.grad = None
        block.zero_grad(set_to_none=True)
        (y,), logdet = block([x])
        torch.autograd.backward([y, logdet], [torch.ones_like(y), torch.ones_like(logdet)])
        results.append([y, logdet, x.grad, a.grad, block.global_offset.grad])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


class Twice(nn.Module):
    """A subnet that copies its input.

    A convolution may refuse this many elements, and may round one sample differently than many.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)


def test_more_elements_than_32_bits_count() -> None:
    """Batch offsets are 64-bit, so the last sample of 2.2e9 elements comes out as it does alone."""
    shape = (33, 1024, 256, 256)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    block = (
        AllInOneBlock([shape[1:]], subnet_constructor=lambda i, o: Twice(), backend="triton")
        .cuda()
        .bfloat16()
    )
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        (y,), logdet = block([x])
        (expected,), expected_logdet = block([x[-1:].clone()])
        assert torch.equal(y[-1:], expected)
        assert torch.equal(logdet[-1:], expected_logdet)
        (back,), _ = block([y[-1:]], rev=True)
        assert (back - x[-1:]).abs().max() < 0.1
