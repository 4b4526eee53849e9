"""What is timed: one provider's block or flow on stored inputs, ready to run in each mode."""

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
from tests.support.memory import bytes_kept_for_backward

MODES = ("forward", "inverse", "backward", "train")
# in inputs: what has to be read and written at least
MINIMAL_BYTES = {"forward": 3, "inverse": 3, "backward": 5, "train": 8}


class NotHere(Exception):
    """A provider cannot be measured in this mode; the message says why."""


@dataclass(frozen=True)
class Sample:
    """Inputs of one call: x (B, C, *S), the stored output of the subnet (None for a whole flow),
    conditions, and output gradients.
    """

    x: Tensor
    a: Tensor | None
    c: list[Tensor]
    dy: Tensor
    dlogdet: Tensor

    def to(self, dtype: torch.dtype) -> Sample:
        """The same values in another dtype."""

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
    """Inputs to rotate through: on a GPU as many as it takes for one not to find itself in the L2
    cache, on a CPU one.
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
        alone = kind not in WHOLE  # a whole flow's input is the features, which need no gradient
        x = random(batch, channels, *spatial).requires_grad_(alone)
        a = random(batch, channels // 2 * 2, *spatial).requires_grad_() if alone else None
        c = [random(batch, width, *spatial) for width in workload.conditions]
        return Sample(x, a, c, random(batch, channels, *spatial), random(batch))

    first = draw()
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(draw() for _ in range(math.ceil(2 * cache / first.x.nbytes)))]


class _Handed(nn.Module):
    """A subnet without cost: it hands over a stored tensor."""

    a: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # Compiled, a tensor from outside could not be overwritten within a CUDA graph, as stock
        # blocks do with their subnet's output. The copy is fused away by the compiler. Eager calls
        # are given copies that were made beforehand.
        return self.a.clone() if torch.compiler.is_compiling() else self.a


class Alone(nn.Module):
    """A block without its subnet's cost: ``(x, a, *conditions) -> (y, logdet)``."""

    def __init__(
        self, build: Callable[..., nn.Module], workload: Workload, declared: tuple[int, ...]
    ) -> None:
        super().__init__()
        dims, dims_c = _dims(workload, declared)
        self.handed = _Handed()
        self.block = build(dims, dims_c, lambda *_: self.handed, **workload.options)

    def forward(self, x: Tensor, a: Tensor, *c: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        self.handed.a = a
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
    """A block's dims_in and dims_c."""
    return [(workload.shape[1], *declared)], [(width, *declared) for width in workload.conditions]


def _subnet(workload: Workload, step: int) -> Callable[[int, int], nn.Module]:
    if workload.subnet == "fc":
        return linear_subnet(workload.hidden)
    return conv_subnet(1 if workload.subnet == "conv" and step % 2 else 3, workload.hidden)


def build_model(
    kind: str, workload: Workload, build: Callable[..., nn.Module], dialect: str
) -> nn.Module:
    """A block alone or a whole flow, in float32, its random numbers seeded."""
    # A declared shape that is not the real one is possible only where the input's shape is not
    # checked.
    declared = (
        workload.declared if workload.declared and dialect == "anomalib" else workload.shape[2:]
    )
    torch.manual_seed(0)
    with rotations_drawn_once():
        if kind in WHOLE:
            flow = ReversibleFlow if kind == "reversible" else SequenceFlow
            model: nn.Module = Chain(build, workload, tuple(declared), flow)
        else:
            model = Alone(build, workload, tuple(declared))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(offset := getattr(module, "global_offset", None), Tensor):
                offset.normal_()
    return model


class Subject:
    """One provider's model on samples, with the weights of ``like``."""

    def __init__(
        self,
        kind: str,
        workload: Workload,
        provider: Provider,
        samples: list[Sample],
        like: nn.Module | None = None,
    ) -> None:
        build, _ = block_class(provider)
        self.provider, self.samples, self.next = provider, samples, 0
        self.model = build_model(kind, workload, build, provider.dialect)
        if like is not None:
            copy_weights(like, self.model)
        self.model.to(samples[0].x.device, samples[0].x.dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.call: dict[bool, Callable[..., Any]] = {
            rev: partial(self.model, rev=rev) for rev in (False, True)
        }
        # eager, whatever follows: a block that cannot run is not worth compiling
        with torch.no_grad():
            self.logdet_dtype = self.model(*self._arguments(samples[0]))[1].dtype
        if provider.execution != "eager":
            self._speed_up(provider)

    def _speed_up(self, provider: Provider) -> None:
        if provider.ours and provider.execution == "graphs":
            self.graphed = _graphed(self.model, self._arguments(self.samples[0]))
            self.call = {
                rev: _captured(partial(self.model, rev=rev), self._arguments(self.samples[0]))
                for rev in (False, True)
            }
            return
        mode = "reduce-overhead" if provider.execution == "graphs" else None
        compiled = torch.compile(self.model, dynamic=False, fullgraph=provider.ours, mode=mode)
        self.call = {rev: partial(compiled, rev=rev) for rev in (False, True)}

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]:
        """Calls that can be timed in a row, each with the next inputs; all that does not belong to
        the mode is done before.
        """
        graphs = self.provider.execution == "graphs"
        if graphs and mode == "backward":
            raise NotHere(
                "a CUDA graph's forward holds one call's results: backward alone cannot be timed "
                "in a row"
            )
        return [self._ready(mode, self._rotate(), graphs) for _ in range(calls)]

    def _rotate(self) -> Sample:
        self.next = (self.next + 1) % len(self.samples)
        return self.samples[self.next]

    def _ready(self, mode: str, sample: Sample, graphs: bool) -> Callable[[], Any]:
        arguments, dlogdet = self._arguments(sample), sample.dlogdet.to(self.logdet_dtype)
        inputs = [
            t for t in (sample.x, sample.a) if t is not None and t.requires_grad
        ] + self.parameters
        forward = getattr(self, "graphed", self.call[False])

        def backward(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(outputs, inputs, [sample.dy, dlogdet], allow_unused=True)

        def train() -> tuple[Tensor | None, ...]:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            outputs = forward(*arguments)
            return (*outputs, *backward(outputs))

        def infer() -> tuple[Tensor, Tensor]:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return self.call[mode == "inverse"](*arguments)

        if mode == "backward":
            outputs = forward(*arguments)
            return lambda: (*outputs, *backward(outputs))
        return train if mode == "train" else infer

    def results(self, mode: str) -> dict[str, Tensor | None]:
        """What a call of a mode computes from the first inputs, by name."""
        self.next = -1
        (run,) = self.ready(mode, 1)
        return dict(zip(self._names(mode), run(), strict=True))

    def _arguments(self, sample: Sample) -> tuple[Tensor, ...]:
        """The model's inputs; of the stored output a copy, since stock blocks overwrite it."""
        return (sample.x, *(() if sample.a is None else (_Copy.apply(sample.a),)), *sample.c)

    def kept(self) -> int:
        """Bytes allocated between forward and backward: of a single block, or of a whole flow with
        its subnets.
        """
        arguments, leave_out = (
            self._arguments(self.samples[0]),
            [m for m in self.model.modules() if isinstance(m, _Handed)],
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
    """A copy whose gradient is handed through: backward costs nothing."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        return da


class _Positional(nn.Module):
    """A model by positional arguments alone, as make_graphed_callables asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(*arguments)


def _graphed(model: nn.Module, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    """A model whose forward and backward are recorded once each. Its inputs are overwritten, hence
    the copies.
    """
    static = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in arguments)
    return torch.cuda.make_graphed_callables(_Positional(model), static, allow_unused_input=True)


def _captured(call: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    """A call without gradients, recorded once; replaying it copies its inputs into place."""
    static = [t.detach().clone() for t in arguments]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        # what compiles or allocates on its first call must have done so before it is recorded
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
