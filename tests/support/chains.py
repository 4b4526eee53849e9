"""Builders of reversible and of accelerated chains, compared with plain and stock ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock, ReversibleSequence, accelerate
from fastflow_kernels import chain as chain_module
from tests.support.blocks import Results, evaluate
from tests.support.cases import Case, Shape, make_block, make_subnet
from tests.support.compare import assert_close
from tests.support.peers import freia, freia_block
from tests.support.plain_chain import plain_of
from tests.support.stock_blocks import stock_block

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


# --- FrEIA's chains, accelerated ------------------------------------------------------------------

CONDITIONS = (2, 3)  # channels of the conditions that the blocks of a stock chain may take


def stock_chain(
    *names: str,
    shape: Shape = SHAPE,
    dtype: torch.dtype = torch.float64,
    peer: Callable[[], Any] = freia_block,
    **options: Any,
) -> Any:
    """Return FrEIA's SequenceINN of stock blocks with random parameters.

    The subnets' last layers are smaller than those of single blocks. Otherwise a few blocks would
    multiply every rounding by thousands.

    Args:
        names: The blocks' options, by their names in ``tests/support/cases.py``.
        shape: The input's shape.
        dtype: That of the parameters.
        peer: Returns the blocks' class.
        options: Of the chain.
    """
    made = freia().framework.SequenceINN(*shape.full[1:], **options)
    for seed, name in enumerate(names):
        case = Case(shape, name)
        place = CONDITIONS.index(case.conditions[0]) if case.conditions else None
        block = stock_block(peer, case, seed, dtype)
        with torch.no_grad():
            block.subnet.w2 *= 0.25
        append(made, block, place)
    return made


def append(chain: Any, module: nn.Module, place: int | None = None) -> None:
    """Append a module that has been built, with the place of its condition."""
    chain.module_list.append(module)
    chain.conditions.append(place)
    chain.shapes.append(chain.shapes[-1])


def inputs_of_chain(
    shape: Shape = SHAPE, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """Return an input for :func:`stock_chain`, and all conditions."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = [
        torch.randn(
            shape.batch, channels, *shape.spatial, generator=generator, dtype=torch.float64
        ).to(dtype)
        for channels in (shape.channels, *CONDITIONS)
    ]
    return drawn[0], drawn[1:]


def accelerated(stock: nn.Module) -> Any:
    """Return an accelerated copy of a chain."""
    fused = accelerate(copy.deepcopy(stock))
    assert isinstance(fused, chain_module.FusedChain)
    return fused


def called_one_by_one(fused: nn.Module) -> Any:
    """Return a copy of an accelerated chain that calls its blocks as FrEIA's chain does."""
    copied: Any = copy.deepcopy(fused)
    copied.__class__ = freia().framework.SequenceINN
    return copied


@contextmanager
def runs_seen() -> Iterator[list[int]]:
    """Return a list to which every run of consecutive blocks adds their number."""
    lengths: list[int] = []
    evaluate_together = chain_module.evaluate_together

    def spy(calls: Any) -> Any:
        lengths.append(len(calls))
        return evaluate_together(calls)

    with mock.patch.object(chain_module, "evaluate_together", spy):
        yield lengths


def assert_like_stock(
    stock: Any,
    x: Tensor,
    c: list[Tensor],
    run: Callable[[Any, Tensor, list[Tensor]], Results] | None = None,
    rev: bool = False,
) -> None:
    """Assert that an accelerated copy of a chain gives a stock chain's results.

    Args:
        stock: FrEIA's chain, in the dtype under test. It is not evaluated.
        x: The input, in that dtype.
        c: The conditions, in that dtype.
        run: Returns the results of a chain. Without it these are output, log-determinant and all
            gradients.
        rev: The direction, for magnitudes, and without ``run``.
    """

    def all_results(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        return evaluate(model, x, c, rev, wrap=False)

    run = all_results if run is None else run
    lower = torch.float32 if x.dtype is torch.float64 else x.dtype
    truth = run(copy.deepcopy(stock).double(), x.double(), [t.double() for t in c])
    baseline = run(copy.deepcopy(stock).to(lower), x.to(lower), [t.to(lower) for t in c])
    assert_meets(run(accelerated(stock), x, c), truth, baseline, stock, x.dtype)


def assert_meets(
    actual: Results, truth: Results, baseline: Results, stock: Any, dtype: torch.dtype
) -> None:
    """Compare a chain's results by the criterion of ``compare.py``.

    The floor is 4 + sqrt(terms) roundings of the largest value for each block, as in
    ``assert_results`` of tests/support/accelerated.py. One baseline may be exact by luck. So each
    result may also be as wrong as the baseline's output or gradient of x, relative to its size.

    The log-factors add up to a log-determinant at random; GIN's cancel.
    """
    assert actual.keys() == truth.keys()
    lower = torch.float32 if dtype is torch.float64 else dtype
    count, output = len(stock.module_list), truth["output"]
    clamp = max((abs(getattr(m, "clamp", 0.0)) for m in stock.module_list), default=0.0)
    roundings = count * (1 + 0.25 * output.numel() ** 0.5)
    for name in {"output", "dx", "grad x"} & {n for n, t in truth.items() if t is not None}:
        error = (baseline[name].double() - truth[name]).abs().max() / truth[name].abs().max()
        roundings = max(roundings, error.item() / torch.finfo(lower).eps)
    for name, value in truth.items():
        if value is None:  # an engine may give zeros
            assert actual[name] is None or not actual[name].any(), name
            continue
        largest = value.abs().max().item()
        if name == "log-det":
            largest = max(largest, clamp * output[0].numel() ** 0.5)
        # the log-determinant is float32 for half precision, but has that dtype's criterion
        assert_close(
            actual[name].to(dtype),
            value,
            baseline[name].to(lower),
            name,
            magnitude=roundings * largest,
        )


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
