"""Builders of reversible chains, and their comparison with a plain chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock, ReversibleSequence
from tests.support.cases import Case, Shape, make_block, make_subnet
from tests.support.plain_chain import plain_of

DEPTH = 5
SHAPE = Shape(2, 6, (3, 5))


def chain_of(
    case: Case, depth: int = DEPTH, dtype: torch.dtype = torch.float64, **options: Any
) -> ReversibleSequence:
    chain = ReversibleSequence(*case.shape.full[1:], **options)
    for seed in range(depth):
        chain.append(
            make_block(AllInOneBlock, case, dtype, seed=seed), cond=0 if case.conditions else None
        )
    return chain


def simple(
    depth: int = DEPTH,
    dtype: torch.dtype = torch.float64,
    subnet: Callable[[int, int], nn.Module] | None = None,
    shape: tuple[int, ...] = SHAPE.full[1:],
    **options: Any,
) -> ReversibleSequence:
    torch.manual_seed(0)
    chain = ReversibleSequence(*shape, **options)
    for _ in range(depth):
        chain.append(AllInOneBlock, subnet_constructor=subnet or make_subnet(len(shape) - 1, 3.0))
    return chain.to(dtype)


def loss_of(z: Tensor, log_det: Tensor) -> Tensor:
    weights = torch.linspace(-1.0, 1.0, z.numel(), dtype=z.dtype).view(z.shape)
    return (
        (z * weights).sum()
        + 0.1 * z.square().sum()
        - (log_det * torch.linspace(0.5, 1.0, len(log_det), dtype=log_det.dtype)).sum()
    )


def random_input(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return an input for a chain that :func:`simple` makes."""
    return torch.randn(SHAPE.full, dtype=dtype)


def parameter_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def gradients(
    chain: nn.Module, x: Tensor, c: list[Tensor] | None = None, backward: bool = True
) -> dict[str, Tensor | None]:
    """Return the output, the log-determinant and all gradients.

    The parameters' gradients add up over calls.
    """
    x = x.detach().requires_grad_()
    c = None if c is None else [t.detach().clone().requires_grad_() for t in c]
    z, log_det = chain(x, c)
    if backward:
        loss_of(z, log_det).backward()
    results = {
        "z": z,
        "log_det": log_det,
        "dx": x.grad,
        **{f"dc{i}": t.grad for i, t in enumerate(c or ())},
    }
    return results | parameter_gradients(chain)


def assert_same(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-8
) -> None:
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        value = actual[name]
        assert (value is None) == (truth is None), name
        if truth is not None and truth.numel():
            error, magnitude = (value - truth).abs().max().item(), truth.abs().max().item()
            assert error <= tolerance * max(magnitude, 1e-3), f"{name}: {error} of {magnitude}"


def assert_like_plain(
    chain: ReversibleSequence, x: Tensor, c: list[Tensor] | None = None, tolerance: float = 1e-8
) -> None:
    plain = plain_of(chain)
    assert_same(gradients(chain, x, c), gradients(plain, x, c), tolerance)


# --- subnets --------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(i, 8, 3, padding=1), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, o, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Normed(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, 8, 3, padding=1))
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Narrow(nn.Module):
    """A subnet of two layers, and a base class of other subnets."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(i, 7), nn.Linear(7, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())
