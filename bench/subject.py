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

from bench import couplings
from bench.cuda_graphs import captured, graphed
from bench.fastflow import ReversibleFlow, SequenceFlow, conv_subnet, linear_subnet
from bench.providers import Provider, block_class, copy_weights, rotations_drawn_once
from bench.workloads import ALL_IN_ONE, WHOLE, Workload
from fastflow_kernels import AllInOneBlock, accelerate
from tests.support.memory import bytes_kept_for_backward

MODES = ("forward", "inverse", "backward", "train")
# How often each mode has to read or write tensors at least: of the input's size, and of the
# coefficients'.
ACCESSES = {"forward": (2, 1), "inverse": (2, 1), "backward": (3, 2), "train": (5, 3)}


class NotMeasurable(Exception):
    """A provider cannot be measured on this workload or in this mode. The message says why."""


@dataclass(frozen=True)
class Sample:
    """Inputs of one call.

    Attributes:
        x: The input (B, C, *S).
        a: The stored output of the (first) subnet, or None for a whole flow.
        c: The conditions.
        dy: The gradient of the output, of the shape of x.
        dlogdet: The gradient of the log-determinant, (B,).
        more_a: The stored outputs of the other subnets of a coupling block.
    """

    x: Tensor
    a: Tensor | None
    c: list[Tensor]
    dy: Tensor
    dlogdet: Tensor
    more_a: tuple[Tensor, ...] = ()

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The stored outputs of all subnets."""
        return () if self.a is None else (self.a, *self.more_a)

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
            tuple(map(converted, self.more_a)),
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
        outputs = subnet_outputs(workload) if is_single_block else []
        stored = tuple(random(batch, n, *spatial).requires_grad_() for n in outputs)
        c = [random(batch, width, *spatial) for width in workload.conditions]
        dy, dlogdet = random(batch, channels, *spatial), random(batch)
        return Sample(x, stored[0] if stored else None, c, dy, dlogdet, stored[1:])

    first = draw()
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(draw() for _ in range(math.ceil(2 * cache / first.x.nbytes)))]


def subnet_outputs(workload: Workload) -> list[int]:
    """Return how many channels each subnet of a block returns."""
    if workload.block == ALL_IN_ONE:
        return [workload.shape[1] // 2 * 2]
    return couplings.subnet_outputs(workload.block, *_dims(workload, workload.shape[2:]))


def minimal_bytes(mode: str, sample: Sample) -> int:
    """Return how many bytes a mode has to read and write at least."""
    of_input, of_coefficients = ACCESSES[mode]
    return of_input * sample.x.nbytes + of_coefficients * sum(a.nbytes for a in sample.stored)


class _StoredSubnet(nn.Module):
    """A subnet that costs nothing, because it returns a stored tensor.

    Stock AllInOneBlocks overwrite their subnet's output, which a CUDA graph forbids for an input.
    So they get a copy, which the compiler fuses away. Other blocks do not overwrite it. Ours gets
    no copy, because a compiler cannot fuse one with our operators. Eager calls get a copy from
    Subject._arguments.
    """

    a: Tensor
    is_overwritten = True

    def forward(self, x: Tensor) -> Tensor:
        return self.a.clone() if self.is_overwritten and torch.compiler.is_compiling() else self.a


class SingleBlock(nn.Module):
    """A block without the cost of its subnets: ``(x, *stored, *conditions) -> (y, logdet)``."""

    zeros: Tensor

    def __init__(
        self, build: Callable[..., nn.Module], workload: Workload, declared: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.subnets: list[_StoredSubnet] = []
        self.block = build(*_dims(workload, declared), self._store, **workload.options)
        is_ours = isinstance(self.block, AllInOneBlock)
        for subnet in self.subnets:
            subnet.is_overwritten = workload.block == ALL_IN_ONE and not is_ours
        # FrEIA's blocks that preserve volume return the number 0.0.
        self.register_buffer("zeros", torch.zeros(workload.shape[0]), persistent=False)

    def _store(self, *_: int) -> nn.Module:
        self.subnets.append(_StoredSubnet())
        return self.subnets[-1]

    def forward(self, x: Tensor, *tensors: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        for subnet, a in zip(self.subnets, tensors, strict=False):
            subnet.a = a
        (y,), logdet = self.block([x], list(tensors[len(self.subnets) :]), rev=rev)
        return y, logdet if isinstance(logdet, Tensor) else self.zeros


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
        z, logdet = self.flow(x, c, rev)
        # A flow of blocks that preserve volume returns the number 0.0, as in FrEIA.
        return z, logdet if isinstance(logdet, Tensor) else x.new_zeros(len(x))


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
        build, _ = block_class(provider, workload, kind)
        self.provider, self.samples, self.next = provider, samples, 0
        self.model = build_model(kind, workload, build, provider.dialect)
        if kind == "flow" and provider.is_ours:
            accelerate(self.model)  # the blocks of the chain run together
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
            self.graphed = graphed(self.model, self._arguments(self.samples[0]))
            self.call = {
                rev: captured(partial(self.model, rev=rev), self._arguments(self.samples[0]))
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
        inputs = [t for t in (sample.x, *sample.stored) if t.requires_grad] + self.parameters
        forward = getattr(self, "graphed", self.call[False])

        def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            grads = [sample.dy, dlogdet]
            if not outputs[1].requires_grad:  # a constant, because the blocks preserve volume
                outputs, grads = outputs[:1], grads[:1]
            return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

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
        """Return the model's inputs. Stored outputs are copied, as stock blocks overwrite them."""
        return (sample.x, *map(_Copy.apply, sample.stored), *sample.c)

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
        stored = len(self.samples[0].stored)
        inputs = ["dx", "da", *(f"da{i}" for i in range(2, stored + 1))] if stored else []
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
