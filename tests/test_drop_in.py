"""Test our own class in place of a stock block, under what users' code does to it.

Users exchange attributes, register hooks, apply transforms, and take few channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import reference
from fastflow_kernels import AllInOneBlock, ReversibleSequence
from tests.support.cases import (
    Case,
    Shape,
    both_dialects,
    both_directions,
    make_block,
    make_input,
)

pytestmark = pytest.mark.usefixtures("fused")

ROWS, PLANES = Shape(3, 6), Shape(2, 6, (4, 5))


def pair(case: Case, dialect: str = "anomalib") -> tuple[nn.Module, nn.Module]:
    """Return a block of ours and the reference with the same weights."""
    block, stock = (
        make_block(cls, case, dialect=dialect) for cls in (AllInOneBlock, reference.AllInOneBlock)
    )
    stock.load_state_dict(block.state_dict())  # each draws its rotation in its own way
    return block, stock


def assert_same(actual: nn.Module, expected: nn.Module, case: Case, rev: bool) -> None:
    """Assert that results and all gradients agree."""
    x, c = make_input(case)
    results = []
    for block in (actual, expected):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        (y,), log_det = block([leaf], c, rev=rev)
        (y.sin().sum() + log_det.sum()).backward()
        results.append(
            {
                "y": y,
                "log-det": log_det,
                "dx": leaf.grad,
                **{name: p.grad for name, p in block.named_parameters()},
            }
        )
    for name, value in results[1].items():
        if value is None:
            assert results[0][name] is None or not results[0][name].any(), name
        else:
            torch.testing.assert_close(
                results[0][name],
                value,
                rtol=1e-9,
                atol=1e-9 * max(1.0, value.abs().max().item()),
                msg=name,
            )


# --- attributes that the stock block reads in each call -------------------------------------------


def _other_softplus(block: Any) -> None:
    """Exchange the softplus: the stock blocks' activation calls the block's own one."""
    if hasattr(block, "softplus"):
        block.softplus.beta = 0.8
    else:
        block.global_scale_activation = lambda g: 0.1 * nn.functional.softplus(g, beta=0.8)


def _other_splits(block: Any) -> None:
    """Split the channels into two passive and four active ones."""
    block.splits = [2, 4]
    w1, w2 = (
        block.subnet.w1.detach()[:, :2],
        torch.linspace(-1, 1, 8 * block.subnet.w2[0].numel(), dtype=torch.float64),
    )
    block.subnet.w1, block.subnet.w2 = (
        nn.Parameter(w1.clone()),
        nn.Parameter(w2.view(8, *block.subnet.w2.shape[1:])),
    )
    block.subnet.b2 = nn.Parameter(torch.zeros(8, dtype=torch.float64))


EXCHANGES: dict[str, Callable[[Any], None]] = {
    "clamp": lambda block: setattr(block, "clamp", 3.5),
    "clamp that learns": lambda block: setattr(
        block, "clamp", nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    ),
    "GIN": lambda block: setattr(block, "GIN", True),
    "softplus": _other_softplus,
    "activation": lambda block: setattr(block, "global_scale_activation", lambda g: g.exp() + 0.5),
    "permute_function": lambda block: setattr(block, "permute_function", lambda x, w: x.flip(1)),
    "reverse": lambda block: setattr(block, "reverse_pre_permute", True),
    "splits": _other_splits,
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "case", [Case(PLANES, "hard"), Case(ROWS, "soft"), Case(ROWS, "hh1")], ids=str
)
@both_dialects
@both_directions
def test_what_is_exchanged_takes_effect(case: Case, exchange: str, dialect: str, rev: bool) -> None:
    blocks = pair(case, dialect)
    for block in blocks:
        block([make_input(case)[0]])
        EXCHANGES[exchange](block)
    assert_same(*blocks, case, rev)


@both_directions
def test_steps_that_are_patched_on_the_class_take_effect(rev: bool) -> None:
    case = Case(PLANES, "hard")
    block, _ = pair(case)
    x, _ = make_input(case)
    before = block([x], rev=rev)[0][0]
    affine = AllInOneBlock._affine

    def doubled(
        self: AllInOneBlock, x: Tensor, a: Tensor, rev: bool = False
    ) -> tuple[Tensor, Tensor]:
        return affine(self, x, 2.0 * a, rev)

    with mock.patch.object(AllInOneBlock, "_affine", doubled):
        patched = block([x], rev=rev)[0][0]
    assert not torch.equal(patched, before)
    assert torch.equal(block([x], rev=rev)[0][0], before)


@both_dialects
@pytest.mark.parametrize("name", ["hard", "soft", "hh1"])
def test_attributes_of_the_stock_blocks_exist(name: str, dialect: str) -> None:
    case = Case(PLANES, name)

    class Own(AllInOneBlock):
        def _permute(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Any]:
            return self.permute_function(x, self.w_perm_inv if rev else self.w_perm), 0.0

    block = make_block(Own, case, dialect=dialect)
    assert block.last_jac is None
    assert isinstance(block.softplus, nn.Softplus)
    x, _ = make_input(case)
    (y,), _ = block([x])
    torch.testing.assert_close(block([y], rev=True)[0][0], x)


@both_dialects
@pytest.mark.parametrize("soft", [False, True])
def test_a_matrix_and_its_inverse_share_no_memory(soft: bool, dialect: str) -> None:
    block = AllInOneBlock(
        [(1,)], subnet_constructor=lambda i, o: nn.Flatten(), permute_soft=soft, dialect=dialect
    )
    assert block.w_perm.data_ptr() != block.w_perm_inv.data_ptr()


# --- hooks ----------------------------------------------------------------------------------------

KEEPERS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda g: g,
    "a view": lambda g: g[:, :3],
    "detached": lambda g: g.detach(),
    "an array": lambda g: g.numpy(),
    "its storage": lambda g: torch.empty(0, dtype=g.dtype).set_(g.untyped_storage()),
}


@pytest.mark.parametrize("keep", KEEPERS)
@pytest.mark.parametrize("shape", [Shape(40, 6), Shape(3, 6, (5, 7))], ids=str)
def test_a_gradient_that_a_hook_keeps_does_not_change(keep: str, shape: Shape) -> None:
    block = make_block(AllInOneBlock, Case(shape, "hard"))
    block.backend = "eager"
    x, _ = make_input(Case(shape, "hard"))
    kept: list[tuple[Any, Tensor]] = []
    (y,), log_det = block([x.requires_grad_()])
    y.grad_fn.register_hook(
        lambda into, _: kept.extend(
            (KEEPERS[keep](g), torch.as_tensor(KEEPERS[keep](g)).clone()) for g in into[:1]
        )
    )
    (y.sum() + log_det.sum()).backward()
    assert kept
    for held, copy in kept:
        assert torch.equal(torch.as_tensor(held), copy)


def test_without_hooks_no_gradient_is_copied() -> None:
    block = make_block(AllInOneBlock, Case(Shape(40, 6), "hard"))
    block.backend = "eager"
    clones: list[Tensor] = []
    clone = Tensor.clone

    def noted(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        clones.append(t)
        return clone(t, *args, **kwargs)

    with mock.patch.object(Tensor, "clone", noted):
        for _ in range(2):  # the first pass counts the references of a gradient that nobody holds
            clones.clear()
            (y,), log_det = block([torch.randn(40, 6, dtype=torch.float64, requires_grad=True)])
            (y.sum() + log_det.sum()).backward()
    assert not clones


# --- transforms -----------------------------------------------------------------------------------

TRANSFORMED = [
    Case(shape, name) for shape in (ROWS, PLANES) for name in ("rev", "soft", "hh1", "gin")
]
# More reflections than half the channels make one dense matrix.
TRANSFORMED += [Case(Shape(3, 2), "hh1"), Case(Shape(3, 3), "hh3-rev-cond")]


def function_of(
    block: nn.Module, c: list[Tensor], rev: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        (y,), log_det = block([x], c, rev=rev)
        return y, log_det

    return call


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
@both_directions
def test_recorded_and_linearized(case: Case, rev: bool) -> None:
    block = make_block(AllInOneBlock, case)
    x, c = make_input(case)
    call, v = function_of(block, c, rev), torch.randn_like(x)
    expected, tangents, *_ = jvp(call, (x,), (v,))
    value, linear = linearize(call, x)
    for actual in (make_fx(call)(x)(x), value):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    for a, e in zip(linear(v), tangents, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["hard", "soft", "hh1"])
@both_directions
def test_vmap_takes_samples_in_any_layout(name: str, rev: bool) -> None:
    block = make_block(AllInOneBlock, Case(PLANES, name))
    call = function_of(block, [], rev)
    x = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    expected = torch.stack([call(sample)[0] for sample in x])
    for dim, samples in (
        (0, torch.stack([sample.to(memory_format=torch.channels_last) for sample in x])),
        (1, x.transpose(0, 1)),
        (-1, x.movedim(0, -1)),
    ):
        torch.testing.assert_close(vmap(call, in_dims=dim)(samples)[0], expected)
    each = x[0].to(memory_format=torch.channels_last)
    actual = vmap(grad(lambda sample: call(sample[None])[0].sin().sum()))(each)
    leaf = x[0].clone().requires_grad_()
    call(leaf)[0].sin().sum().backward()
    torch.testing.assert_close(actual, leaf.grad)


# Every pair of values, but not every combination: each takes Inductor some seconds.
@pytest.mark.parametrize(
    ("channels", "reflections", "soft", "spatial"),
    [(3, 5, False, ()), (3, 5, True, (8, 8)), (6, 2, True, ()), (6, 2, False, (8, 8))],
    ids=str,
)
def test_reflections_of_few_channels_compile_with_dynamic_sizes(
    channels: int, reflections: int, soft: bool, spatial: tuple[int, ...]
) -> None:
    """Inductor once failed on equal sizes and on their products."""
    torch._dynamo.reset()
    layer = (nn.Linear, nn.Conv1d, nn.Conv2d)[len(spatial)]
    block = AllInOneBlock(
        [(channels, *spatial)],
        subnet_constructor=lambda i, o: layer(i, o, *[1] * bool(spatial)),
        permute_soft=soft,
        learned_householder_permutation=reflections,
    )
    x = torch.randn(2, channels, *spatial)
    with torch.no_grad():
        for layout in (
            (torch.contiguous_format, torch.channels_last)
            if len(spatial) == 2
            else (torch.contiguous_format,)
        ):
            x = x.contiguous(memory_format=layout)
            compiled = torch.compile(lambda x: block([x])[0][0], fullgraph=True, dynamic=True)
            torch.testing.assert_close(compiled(x), block([x])[0][0], rtol=1e-4, atol=1e-4)


# --- inside a chain -------------------------------------------------------------------------------


class Field(nn.Module):
    """A subnet with the gradient of a potential, computed by torch.func."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.potential, self.out = nn.Linear(channels_in, 1), nn.Linear(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(grad(lambda y: self.potential(y).tanh().sum())(x) + x)


@pytest.mark.parametrize(
    "subnet", [Field, lambda i, o: nn.LazyLinear(o)], ids=["torch.func", "lazy"]
)
def test_subnets_in_a_reversible_chain(subnet: Callable[[int, int], nn.Module]) -> None:
    torch.manual_seed(0)
    chain = ReversibleSequence(8)
    for _ in range(3):
        chain.append(AllInOneBlock, subnet_constructor=subnet)
    x = torch.randn(5, 8)
    for _ in range(2):
        z, log_det = chain(x)
        (z.sin().sum() - log_det.sum()).backward()
    actual = [p.grad / 2 for p in chain.parameters() if p.grad is not None]
    chain.zero_grad()
    y: Any = (x,)
    total = torch.zeros(5)
    for block in chain:
        y, log_det = block(y)
        total = total + log_det
    (y[0].sin().sum() - total.sum()).backward()
    expected = [p.grad for p in chain.parameters() if p.grad is not None]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


class Drawn(nn.Module):
    """A linear subnet, with dropout from a generator of its own if ``odd``."""

    def __init__(self, channels_in: int, channels_out: int, odd: bool) -> None:
        super().__init__()
        self.layer, self.generator = (
            nn.Linear(channels_in, channels_out),
            torch.Generator().manual_seed(1) if odd else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.layer(x)
        return (
            a
            if self.generator is None
            else a * (torch.rand(a.shape, generator=self.generator, dtype=a.dtype) > 0.5)
        )


@pytest.mark.parametrize(
    ("blocks", "every", "odd"),
    [(3, 2, 2), (5, 2, 4), (3, 1, 0), (3, 1, 2), (1, None, 0), (4, 2, 1), (4, 2, 3)],
)
def test_a_second_run_that_differs_is_an_error_wherever_it_is(
    blocks: int, every: int | None, odd: int
) -> None:
    """The segments include one of a single block after longer ones."""
    torch.manual_seed(0)
    chain = ReversibleSequence(8, checkpoint_every=every)
    for k in range(blocks):
        chain.append(AllInOneBlock, subnet_constructor=lambda i, o, k=k: Drawn(i, o, k == odd))
    chain.double()
    z, log_det = chain(torch.randn(10, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="returned something else when it ran again|is off by"):
        (z.square().sum() - log_det.sum()).backward()


def test_a_reversible_chain_of_integers_is_a_plain_one() -> None:
    chain = ReversibleSequence(6)
    for _ in range(2):
        chain.append(
            AllInOneBlock, subnet_constructor=lambda i, o: nn.Linear(i, o, dtype=torch.float64)
        )
    for module in chain:
        module.subnet.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    x = torch.arange(18).view(3, 6)
    z, log_det = chain(x)
    expected, expected_log_det = chain(x.double())
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det.double(), expected_log_det.double(), rtol=1e-5, atol=1e-5)
    (z.sum() - log_det.sum()).backward()
