"""The subject of a timing: one provider's block or flow on stored inputs, in each mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from bench.fastflow import ReversibleFlow, SequenceFlow, conv_subnet, linear_subnet
from bench.providers import Provider, block_class, copy_weights, rotations_drawn_once
from bench.workloads import WHOLE, Workload
from fastflow_kernels import AllInOneBlock
from tests.support.memory import bytes_kept_for_backward

MODES = ("forward", "inverse", "backward", "train")
# The bytes that each mode has to read and write at least, as multiples of the input's bytes.
MINIMAL_BYTES = {"forward": 3, "inverse": 3, "backward": 5, "train": 8}


class NotMeasurable(Exception):
    """A provider cannot be measured on this workload or in this mode. The message says why."""


@dataclass(frozen=True)
class Sample:
    """Inputs of one call.

    Attributes:
        x: The input (B, C, *S).
        a: The stored output of the subnet, or None for a whole flow.
        c: The conditions.
        dy: The gradient of the output, of the shape of x.
        dlogdet: The gradient of the log-determinant, (B,).
    """

    x: Tensor
    a: Tensor | None
    c: list[Tensor]
    dy: Tensor
    dlogdet: Tensor

    def to(self, dtype: torch.dtype) -> Sample:
        """Return the same values in another dtype."""

        def converted(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        a = None if self.a is None else converted(self.a)
        return Sample(
            converted(self.x),
            a,
            [converted(c) for c in self.c],
            converted(self.dy),
            converted(self.dlogdet),
        )


def draw_samples(
    kind: str, workload: Workload, dtype: torch.dtype, device: torch.device
) -> list[Sample]:
    """Draw inputs that the calls take in turn: several on a GPU, one on a CPU.

    On a GPU there are so many that none is still in the L2 cache when its turn comes again.
    """
    batch, channels, *spatial = workload.shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(
            dtype
        )
        return (
            values.contiguous(memory_format=torch.channels_last)
            if workload.channels_last and len(shape) == 4
            else values
        )

    def draw() -> Sample:
        # The input of a whole flow are features, which need no gradient.
        is_single_block = kind not in WHOLE
        x = random(batch, channels, *spatial).requires_grad_(is_single_block)
        a = random(batch, channels // 2 * 2, *spatial).requires_grad_() if is_single_block else None
        c = [random(batch, width, *spatial) for width in workload.conditions]
        return Sample(x, a, c, random(batch, channels, *spatial), random(batch))

    first = draw()
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(draw() for _ in range(math.ceil(2 * cache / first.x.nbytes)))]


class _StoredSubnet(nn.Module):
    """A subnet that costs nothing, because it returns a stored tensor.

    Stock blocks overwrite their subnet's output, which a CUDA graph forbids for an input. So they
    get a copy, which the compiler fuses away. Ours does not overwrite it. It gets no copy, because
    a compiler cannot fuse one with our operators. Eager calls get a copy from Subject._arguments.
    """

    a: Tensor
    is_overwritten = True

    def forward(self, x: Tensor) -> Tensor:
        return self.a.clone() if self.is_overwritten and torch.compiler.is_compiling() else self.a


class SingleBlock(nn.Module):
    """A block without the cost of its subnet: ``(x, a, *conditions) -> (y, logdet)``."""

    def __init__(
        self, build: Callable[..., nn.Module], workload: Workload, declared: tuple[int, ...]
    ) -> None:
        super().__init__()
        dims, dims_c = _dims(workload, declared)
        self.subnet = _StoredSubnet()
        self.block = build(dims, dims_c, lambda *_: self.subnet, **workload.options)
        self.subnet.is_overwritten = not isinstance(self.block, AllInOneBlock)

    def forward(self, x: Tensor, a: Tensor, *c: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        self.subnet.a = a
        (y,), logdet = self.block([x], list(c), rev=rev)
        return y, logdet


class Chain(nn.Module):
    """A whole flow with its real subnets: ``(x, *conditions) -> (z, logdet)``."""

    def __init__(
        self,
        build: Callable[..., nn.Module],
        workload: Workload,
        declared: tuple[int, ...],
        flow: type[SequenceFlow] = SequenceFlow,
    ) -> None:
        super().__init__()
        steps, conditional = workload.steps, workload.conditional_steps
        dims, dims_c = _dims(workload, declared)
        self.flow = flow(
            [
                build(
                    dims,
                    dims_c if conditional is None or i < conditional else [],
                    _subnet(workload, i),
                    **workload.options,
                )
                for i in range(steps)
            ]
        )

    def forward(self, x: Tensor, *c: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return self.flow(x, c, rev)


def _dims(workload: Workload, declared: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """Return a block's dims_in and dims_c."""
    return [(workload.shape[1], *declared)], [(width, *declared) for width in workload.conditions]


def _subnet(workload: Workload, step: int) -> Callable[[int, int], nn.Module]:
    if workload.subnet == "fc":
        return linear_subnet(workload.hidden)
    return conv_subnet(1 if workload.subnet == "conv" and step % 2 else 3, workload.hidden)


def build_model(
    kind: str, workload: Workload, build: Callable[..., nn.Module], dialect: str
) -> nn.Module:
    """Build a single block or a whole flow in float32, with seeded random numbers."""
    # Only anomalib's formula leaves the input's shape unchecked, so that another can be declared.
    declared = (
        workload.declared if workload.declared and dialect == "anomalib" else workload.shape[2:]
    )
    torch.manual_seed(0)
    with rotations_drawn_once():
        if kind in WHOLE:
            flow = ReversibleFlow if kind == "reversible" else SequenceFlow
            model: nn.Module = Chain(build, workload, tuple(declared), flow)
        else:
            model = SingleBlock(build, workload, tuple(declared))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(offset := getattr(module, "global_offset", None), Tensor):
                offset.normal_()
    return model


class Subject:
    """One provider's model on stored samples.

    Args:
        kind: One of :data:`bench.workloads.KINDS`.
        workload: The shape and options of the model.
        provider: The block and the way to call it.
        samples: Inputs that the calls take in turn.
        weights_from: A model whose weights are copied.
    """

    def __init__(
        self,
        kind: str,
        workload: Workload,
        provider: Provider,
        samples: list[Sample],
        weights_from: nn.Module | None = None,
    ) -> None:
        build, _ = block_class(provider)
        self.provider, self.samples, self.next = provider, samples, 0
        self.model = build_model(kind, workload, build, provider.dialect)
        if weights_from is not None:
            copy_weights(weights_from, self.model)
        self.model.to(samples[0].x.device, samples[0].x.dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.call: dict[bool, Callable[..., Any]] = {
            rev: partial(self.model, rev=rev) for rev in (False, True)
        }
        # Called eagerly first: a block that cannot run is not worth compiling.
        with torch.no_grad():
            self.logdet_dtype = self.model(*self._arguments(samples[0]))[1].dtype
        if provider.execution != "eager":
            self._speed_up(provider)

    def _speed_up(self, provider: Provider) -> None:
        """Compile the calls or capture them in CUDA graphs. On a GPU ours run our kernels."""
        if provider.is_ours and provider.execution == "graphs":
            self.graphed = _graphed(self.model, self._arguments(self.samples[0]))
            self.call = {
                rev: _captured(partial(self.model, rev=rev), self._arguments(self.samples[0]))
                for rev in (False, True)
            }
            return
        mode = "reduce-overhead" if provider.execution == "graphs" else None
        compiled = torch.compile(self.model, dynamic=False, fullgraph=provider.is_ours, mode=mode)
        self.call = {rev: partial(compiled, rev=rev) for rev in (False, True)}

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]:
        """Return calls that can be timed in a row, each with the next inputs.

        What does not belong to the mode is done before: for "backward" the forward passes.

        Raises:
            NotMeasurable: If the mode cannot be timed in a row.
        """
        in_graphs = self.provider.execution == "graphs"
        if in_graphs and mode == "backward":
            raise NotMeasurable(
                "a CUDA graph's forward holds the results of one call, so backward passes alone "
                "cannot be timed in a row"
            )
        return [self._prepare_call(mode, self._rotate(), in_graphs) for _ in range(calls)]

    def _rotate(self) -> Sample:
        self.next = (self.next + 1) % len(self.samples)
        return self.samples[self.next]

    def _prepare_call(self, mode: str, sample: Sample, in_graphs: bool) -> Callable[[], Any]:
        arguments, dlogdet = self._arguments(sample), sample.dlogdet.to(self.logdet_dtype)
        inputs = [
            t for t in (sample.x, sample.a) if t is not None and t.requires_grad
        ] + self.parameters
        forward = getattr(self, "graphed", self.call[False])

        def backward(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(outputs, inputs, [sample.dy, dlogdet], allow_unused=True)

        def train() -> tuple[Tensor | None, ...]:
            if in_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            outputs = forward(*arguments)
            return (*outputs, *backward(outputs))

        def infer() -> tuple[Tensor, Tensor]:
            if in_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return self.call[mode == "inverse"](*arguments)

        if mode == "backward":
            outputs = forward(*arguments)
            return lambda: (*outputs, *backward(outputs))
        return train if mode == "train" else infer

    def results(self, mode: str) -> dict[str, Tensor | None]:
        """Return what a call in a mode computes from the first inputs, by name."""
        self.next = -1
        (run,) = self.ready(mode, 1)
        return dict(zip(self._names(mode), run(), strict=True))

    def _arguments(self, sample: Sample) -> tuple[Tensor, ...]:
        """Return the model's inputs. The stored output is copied, as stock blocks overwrite it."""
        return (sample.x, *(() if sample.a is None else (_Copy.apply(sample.a),)), *sample.c)

    def kept(self) -> int:
        """Return the bytes kept between forward and backward, for a whole flow with its subnets."""
        arguments, leave_out = (
            self._arguments(self.samples[0]),
            [m for m in self.model.modules() if isinstance(m, _StoredSubnet)],
        )
        return bytes_kept_for_backward(self.model, lambda: self.call[False](*arguments), leave_out)

    def _names(self, mode: str) -> list[str]:
        if mode in ("forward", "inverse"):
            return ["output", "log-det"]
        inputs = ["dx", "da"] if self.samples[0].a is not None else []
        return [
            "output",
            "log-det",
            *inputs,
            *(f"d{name}" for name, p in self.model.named_parameters() if p.requires_grad),
        ]


class _Copy(Function):
    """A copy that passes its gradient on unchanged, so that its backward pass costs nothing."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        return da


class _Positional(nn.Module):
    """A model that takes only positional arguments, as make_graphed_callables requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(*arguments)


def _graphed(model: nn.Module, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Record the forward and the backward pass of a model once each.

    The graph overwrites its inputs, so they are copies.
    """
    static = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in arguments)
    return torch.cuda.make_graphed_callables(_Positional(model), static, allow_unused_input=True)


def _captured(call: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Record a call without gradients. A replay copies its inputs into place."""
    static = [t.detach().clone() for t in arguments]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        # Warm up: what compiles or allocates on a first call must not be recorded.
        for _ in range(3):
            call(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = call(*static)

    def replay(*inputs: Tensor) -> Any:
        for recorded, new in zip(static, inputs, strict=True):
            recorded.copy_(new)
        graph.replay()
        return outputs

    return replay
