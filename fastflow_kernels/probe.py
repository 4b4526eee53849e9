"""The maths that a foreign AllInOneBlock computes, found by running a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow_kernels import torch_private
from fastflow_kernels.call import BlockCall, starts_in_place
from fastflow_kernels.coupling import DIALECTS, CouplingSpec
from fastflow_kernels.foreign_activation import activation_of, known_activation
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.seen import ACTIVATION, Seen, is_number, may_read_state, record_reads
from fastflow_kernels.sides import evaluate
from fastflow_kernels.steps import STEPS
from fastflow_kernels.stock import Left, shallow_copy, stock_class

_STEPS = ("forward", *STEPS)


class Maths(NamedTuple):
    """The maths that a block computes.

    Attributes:
        dialect: "anomalib" or "freia".
        activation: "SIGMOID", "SOFTPLUS" or "EXP".
        is_sized: Whether it only takes inputs of the declared spatial size.
        seen: What it reads of itself and of its class for that.
    """

    dialect: str
    activation: str
    is_sized: bool
    seen: Seen


def identify(block: Any, cls: Any) -> Maths:
    """Find out what a block computes, without changing the block.

    Args:
        block: The block.
        cls: Its class, or the class that it had before it was accelerated.

    Raises:
        Left: The block computes something else than the fused block, may later do so unnoticed, or
            cannot be probed.
    """
    stock = stock_class(cls)
    for step in _STEPS:
        if step in vars(block) or getattr(cls, step, None) is not getattr(stock, step, None):
            raise Left(f"{cls.__name__} overrides {step}")
    with probing(block, ("subnet",), "global_scale"):
        return _identify_values(block, cls, stock)


@contextmanager
def probing(block: Any, subnets: Sequence[str], parameter: str | None) -> Iterator[None]:
    """Check what can be known of a block without running it, and make a context to run it in.

    Args:
        block: The block.
        subnets: The names of its subnets.
        parameter: The name of a parameter on its device. None if all are the subnets'.

    Raises:
        Left: The block cannot be accelerated, or the context ends with an error.
    """
    try:
        if torch_private.is_symbolic():
            raise Left(
                "tensors have no values here, under FakeTensorMode or while tracing; accelerate it "
                "outside"
            )
        modules = [getattr(block, name) for name in subnets]
        like = (
            next(block.parameters(), torch.empty(0))
            if parameter is None
            else getattr(block, parameter)
        )
        if like.is_meta:
            raise Left("its parameters are on the meta device; accelerate it once they hold values")
        if isinstance(block.clamp, Tensor):
            raise Left("its clamp is a tensor; the fused block takes a number")
        if not is_number(vars(block).get("clamp")):
            raise Left(f"its clamp is not a plain number that is an attribute, but {block.clamp!r}")
        if not block.conditional and any(map(starts_in_place, modules)):
            raise Left(
                "its subnet starts with an in-place operation, which changes the stock block's "
                "passive half"
            )
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(like.device.type, enabled=False),
            torch.device(like.device),
        ):
            yield
    except Left:
        raise
    except Exception as error:
        raise Left(f"could not be probed: {type(error).__name__}: {error}") from error


def _identify_values(block: Any, cls: Any, stock: Any) -> Maths:
    """Find out what a block computes, where tensors have values."""
    function, softplus_of = activation_of(block, cls)
    seen = record_reads(block, cls, softplus_of)
    if (name := seen.find_change(block)) is not None:
        raise Left(f"its {name} is not one of the known forms")
    probe = _Probe(block, cls, stock)
    activation = known_activation(function, probe.scale)
    dialects = probe.find_dialects(block.clamp, block.GIN, activation)
    if not dialects:
        raise Left("it computes something else than either known form of the block")
    # Both forms agree with a clamp of 1, and where GIN takes the mean of one value. Another clamp,
    # and a run without GIN, tell them apart.
    clamp = 1.7 if abs(abs(block.clamp) - 1.7) > 0.2 else 2.3
    with_other_clamp = probe.find_dialects(clamp, block.GIN, activation)
    dialects = [dialect for dialect in with_other_clamp if dialect in dialects]
    if not dialects:
        raise Left(
            "with another clamp it computes something else than either known form of the block"
        )
    if len(dialects) > 1 and block.GIN:
        dialects = probe.find_dialects(clamp, False, activation)
        if not dialects:
            raise Left("without GIN it computes something else than either known form of the block")
    for name, value in zip(seen.attributes, seen.values, strict=True):
        if name != ACTIVATION and may_read_state(value):
            raise Left(f"its {name} reads variables around it, and those may change")
    return Maths(dialects[0], activation, probe.is_sized, seen)


class FixedSubnet(nn.Module):
    """A subnet that returns the same coefficients for any input, and keeps that input."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a, self.received = a, a

    def forward(self, x: Tensor) -> Tensor:
        self.received = x.clone()
        return self.a.clone()  # because the stock block writes to it


class _Probe:
    """A shallow copy of a block, with a random global affine and a fixed subnet.

    The block itself is not touched.

    Attributes:
        is_sized: Whether the block only takes inputs of the declared spatial size.
    """

    def __init__(self, block: Any, cls: Any, stock: Any) -> None:
        self.stock, self.is_sized = stock, False
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.block = shallow_copy(block, cls)
        own = self.block.__dict__
        dtype = _widest(block.global_scale)
        parameters = {
            name: p.to(dtype) if p is not None and p.is_floating_point() else p
            for name, p in block._parameters.items()
        }
        like = parameters["global_scale"]
        self.scale, self.offset = self._random(like.shape, like), self._random(like.shape, like)
        own["_parameters"] = parameters | {"global_scale": self.scale, "global_offset": self.offset}
        own["_modules"] = dict(block._modules)
        self.spatial = self._find_spatial(tuple(block.dims_in[0][1:]))

    def find_dialects(self, clamp: float, gin: bool, activation: str) -> list[str]:
        """Return the dialects in which the fused block gives the same results as the stock block.

        Both get ``clamp`` and ``gin``, whatever the block has.
        """
        self.block.__dict__.update(clamp=clamp, GIN=gin)
        x, c, a, stock_results = self._run_stock(self.spatial)
        permutation = IndexCache().permutation(self.block)
        matching = []
        for dialect in DIALECTS:
            if clamp == 0 and dialect == "freia":
                continue
            subnet, fused_results = FixedSubnet(a), []
            call = BlockCall(
                x,
                c,
                subnet,
                self.scale,
                self.offset,
                permutation,
                CouplingSpec.of(clamp, dialect, activation, gin),
                reverse_permutation=self.block.reverse_pre_permute,
                backend="eager",
            )
            for rev in (False, True):
                fused_results.append((*evaluate(call._replace(rev=rev)), subnet.received))
            if all(
                are_alike(of_stock, of_fused)
                for pair in zip(stock_results, fused_results, strict=True)
                for of_stock, of_fused in zip(*pair, strict=True)
            ):
                matching.append(dialect)
        return matching

    def _find_spatial(self, declared: tuple[int, ...]) -> tuple[int, ...]:
        """Return a small spatial size that the block takes, and set ``is_sized``.

        FrEIA's main branch takes the declared size only.
        """
        small = (2,) * len(declared)
        if small == declared and small:
            small = (3,) * len(declared)
        try:
            self._run_stock(small)
            return small
        except (RuntimeError, ValueError):
            self.is_sized = True
        dims_in = self.block.dims_in
        self.block.__dict__["dims_in"] = [(dims_in[0][0], *small)]
        try:
            self._run_stock(small)
            return small
        except (RuntimeError, ValueError):
            self.block.__dict__["dims_in"] = dims_in
            return declared

    def _random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu").to(
            like
        )

    def _run_stock(
        self, spatial: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor, list[tuple[Tensor, ...]]]:
        """Run the stock block on a random input, forward and in reverse.

        Returns:
            Input, conditions and coefficients. Then for each direction: y, the log-determinant and
            the subnet's input.
        """
        channels, active = self.block.in_channels, sum(self.block.splits[1:])
        x = self._random((2, channels, *spatial), self.scale)
        # so that exp(clamp * tanh(0.1 * a)) does not overflow
        size = 10.0 / max(1.0, abs(self.block.clamp) / 5.0)
        a = size * self._random((2, 2 * active, *spatial), self.scale)
        self.block._modules["subnet"] = subnet = FixedSubnet(a)
        c = [self._random((2, shape[0], *spatial), self.scale) for shape in self.block.dims_c]
        results: list[tuple[Tensor, ...]] = []
        for rev in (False, True):
            (y,), logdet = self.stock.forward(self.block, [x], c, rev=rev)
            results.append((y, logdet, subnet.received))
        return x, c, a, results


def _widest(parameter: Tensor) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64.

    In float64 the two formulas differ visibly also with a clamp near 1.
    """
    try:
        parameter.to(torch.float64)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def are_alike(of_stock: Tensor, of_fused: Tensor) -> bool:
    """Return whether two results agree but for rounding."""
    # Far above rounding errors, and far below the difference between two formulas.
    tolerance = 1e-9 if of_stock.dtype is torch.float64 else 1e-3
    if of_stock.shape != of_fused.shape or not of_stock.numel():
        return of_stock.shape == of_fused.shape
    allowed = tolerance * of_fused.abs().max().clamp(min=1.0)
    return bool((of_stock - of_fused).abs().max() <= allowed)
