"""Test that unusual input gives the right result in its layout, and that no input is written to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import AllInOneBlock
from fastflow_kernels.layouts import memory_format
from tests.support.blocks import Counting, Function, Stored, contents, permutation_of, unwrapped
from tests.support.cases import (
    KINDS,
    LAYOUTS,
    Case,
    Shape,
    both_dialects,
    both_directions,
    ids,
    kinds,
    make_block,
    make_input,
)
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.usefixtures("fused")


def gradients(block: nn.Module, x: Tensor, rev: bool = False) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (y,), logdet = block([x], rev=rev)
    (y.square().sum() + logdet.sin().sum()).backward()
    return [
        y.detach(),
        logdet.detach(),
        x.grad,
        *[p.grad for p in block.parameters() if p.grad is not None],
    ]


def assert_rounding(actual: Tensor, expected: Tensor, roundings: float = 64.0) -> None:
    """Assert that float64 tensors agree up to some roundings of the largest magnitude.

    The tensors here are sums of a few dozen terms at most.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    if expected.numel():
        error = (actual - expected).abs().max().item()
        assert error <= roundings * torch.finfo(torch.float64).eps * max(
            1.0, expected.abs().max().item()
        )


# --- the caller's tensors are not written to ------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("shape", [Shape(2, 7), Shape(2, 6, (3, 5))], ids=str)
def test_nothing_of_the_callers_is_written_to(name: str, dtype: torch.dtype, shape: Shape) -> None:
    case = Case(shape, name)
    block = make_block(AllInOneBlock, case, dtype)
    x, c = make_input(case, dtype)
    a = torch.randn(shape.batch, shape.channels // 2 * 2, *shape.spatial).to(dtype)
    dy, dlogdet = (
        torch.randn_like(x),
        torch.randn(shape.batch, dtype=torch.float64 if dtype is torch.float64 else torch.float32),
    )
    block.subnet = Stored(a.clone().requires_grad_())
    tensors = {"x": x, "dy": dy, "dlogdet": dlogdet, **{f"c{i}": t for i, t in enumerate(c)}}
    before = {key: t.clone() for key, t in tensors.items()} | contents(block)
    for grad in (True, False):
        for rev in (False, True):
            xs = x.detach().requires_grad_(grad)  # shares x's memory
            with torch.set_grad_enabled(grad):
                (y,), logdet = block([xs], c, rev=rev)
            versions = [t._version for t in (x, block.subnet.a)]
            if grad:
                torch.autograd.backward([y, logdet], [dy, dlogdet])
            y.detach().fill_(7.0)  # results do not share the caller's memory either
            logdet.detach().fill_(7.0)
            assert [t._version for t in (x, block.subnet.a)] == versions
            after = tensors | contents(block)
            for key, value in before.items():
                assert torch.equal(after[key], value), f"{key}, grad={grad}, rev={rev}"
            assert torch.equal(block.subnet.a, a), f"the subnet's output, grad={grad}, rev={rev}"


@kinds
def test_results_outlive_the_next_call(name: str) -> None:
    """Scratch memory is reused between calls, but results are not."""
    case = Case(Shape(2, 6, (3, 5)), name)
    block = make_block(AllInOneBlock, case, torch.float32)
    x, c = make_input(case, torch.float32)
    for rev in (False, True):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                (y,), logdet = block([x], c, rev=rev)
                before = y.detach().clone(), logdet.detach().clone()
                block([x.flip(0) * 3], c, rev=rev)
            assert torch.equal(y, before[0])
            assert torch.equal(logdet, before[1])


@both_dialects
@both_directions
@pytest.mark.parametrize("channels", [3])
def test_identity_subnet(channels: int, rev: bool, dialect: str) -> None:
    """The stock block overwrites x1, which an identity returns.

    With 3 channels, x1 has 2 channels, as many as the subnet must return.
    """
    blocks = []
    for cls in (AllInOneBlock, reference.AllInOneBlock):
        torch.manual_seed(1)
        blocks.append(
            cls([(channels, 4)], [], lambda i, o: nn.Identity(), dialect=dialect).double()
        )
    x = torch.randn(2, channels, 4, dtype=torch.float64)
    before = x.clone()
    for actual, expected in zip(*(gradients(block, x, rev) for block in blocks), strict=True):
        assert_rounding(actual, expected)
    assert torch.equal(x, before)
    with torch.no_grad():
        (y,), _ = blocks[0]([x])
        (back,), _ = blocks[0]([y], rev=True)
    assert_rounding(back, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("last", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("gin", [False, True], ids=["", "gin"])
def test_subnet_that_ends_in_an_activation_trains(last: type[nn.Module], gin: bool) -> None:
    """The activations' backward needs the subnet's output, which the stock block overwrites."""
    blocks = []
    for cls in (AllInOneBlock, reference.AllInOneBlock):
        torch.manual_seed(1)
        blocks.append(
            cls(
                [(6,)], [], lambda i, o: nn.Sequential(nn.Linear(i, o), last()), gin_block=gin
            ).double()
        )
    x = torch.randn(5, 6, dtype=torch.float64)
    for block in blocks:
        optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (y,), logdet = block([x])
            (0.5 * y.square().sum(1) - logdet).mean().backward()
            optimizer.step()
    trained = [dict(block.subnet.named_parameters()) for block in blocks]
    for name, value in trained[0].items():
        assert value.grad.abs().max() > 0
        assert_rounding(value.detach(), trained[1][name].detach())


@kinds
@both_directions
def test_outputs_may_be_changed_in_place(name: str, rev: bool) -> None:
    case = Case(Shape(2, 6, (3, 2)), name)
    block = make_block(AllInOneBlock, case)
    results = []
    for in_place in (True, False):
        x, c = make_input(case)
        leaves = [t.requires_grad_() for t in (x, *c)]
        (y,), logdet = block([x], c, rev=rev)
        if in_place:
            y.mul_(3).add_(1)
            logdet.mul_(2)
        else:
            y, logdet = y * 3 + 1, logdet * 2
        block.zero_grad()
        (y.square().sum() + logdet.square().sum()).backward()
        results.append(
            [t.grad for t in leaves] + [p.grad for p in block.parameters() if p.grad is not None]
        )
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


# --- empty batches --------------------------------------------------------------------------------

EMPTY = [Case(Shape(0, 7), name) for name in KINDS]
EMPTY += [
    Case(Shape(0, *shape), name)
    for name in ("hard", "gin-rev-cond", "soft-rev-exp", "hh3-rev-cond")
    for shape in [(6, (3,)), (5, (2, 3)), (4, (2, 1, 2))]
]
EMPTY += [Case(Shape(0, 1, (3,)), "hard"), Case(Shape(0, 2), "gin")]


@pytest.mark.parametrize("case", EMPTY, ids=ids(EMPTY))
@both_directions
@both_dialects
def test_empty_batch(case: Case, rev: bool, dialect: str) -> None:
    block = make_block(AllInOneBlock, case, torch.float32, dialect=dialect)
    x, c = make_input(case, torch.float32)
    leaves = [t.requires_grad_() for t in (x, *c)]
    (y,), logdet = block([x], c, rev=rev)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert logdet.shape == (0,)
    assert logdet.dtype == torch.float32
    (y.sum() + logdet.sum()).backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
    for name, p in block.named_parameters():
        # A GIN block does not use global_scale.
        if p.requires_grad and p.numel() and not (block.GIN and name == "global_scale"):
            if case.shape.channels == 1 and name.startswith("subnet"):
                continue  # no active half: the tests' subnet returns no coefficients
            assert p.grad is not None, name
            assert torch.equal(p.grad, torch.zeros_like(p)), name
    with torch.no_grad():
        (y,), logdet = block([x], c, rev=rev)
    assert y.shape == x.shape
    assert logdet.shape == (0,)


# --- NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hard", "sigmoid", "rev", "gin"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(3, 7), Shape(3, 6, (3, 5)), Shape(2, 64, (40, 40))], ids=str
)
@both_directions
def test_what_is_not_finite_stays_where_it_is(
    name: str, value: float, shape: Shape, rev: bool
) -> None:
    """One pixel of one active channel of one sample is not finite; all else keeps its bits.

    That holds for GIN too, because its mean is over coefficients.
    """
    case = Case(shape, name)
    block = make_block(AllInOneBlock, case, torch.float32)
    block.subnet = Stored(torch.randn(shape.batch, shape.channels // 2 * 2, *shape.spatial))
    x, _ = make_input(case, torch.float32)
    clean = unwrapped(block([x], rev=rev))
    bad = x.clone()
    pixel = (0,) * len(shape.spatial)
    # Take a channel of the active half: where the inverse reads it, or where the permutation that
    # is inverted first puts it.
    channel = shape.channels - 1
    if rev or block.reverse_pre_permute:
        index = permutation_of(block)
        channel = int((index if rev else index.argsort()).eq(channel).nonzero())
    place = (1, channel, *pixel)
    bad[place] = value
    (y, logdet), (clean_y, clean_logdet) = unwrapped(block([bad], rev=rev)), clean
    assert torch.equal(logdet, clean_logdet)
    differs = (y != clean_y).nonzero()
    assert len(differs) == 1
    assert differs[0, 0] == 1
    assert differs[0, 2:].tolist() == list(pixel)
    changed = y[tuple(differs[0])]
    assert changed.isnan() if math.isnan(value) else changed == value
    if name == "hard" and not rev:
        assert differs[0, 1] == int(permutation_of(block).argsort()[channel])


@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@both_directions
def test_samples_do_not_infect_each_other(name: str, value: float, rev: bool) -> None:
    """A sample of NaN or inf does not change a bit of the other samples' results and gradients."""
    case = Case(Shape(3, 6, (3, 5)), name)
    block = make_block(AllInOneBlock, case, torch.float32)
    # The subnet works by pixel, because a convolution may sum in another order.
    block.subnet = Counting(3 + sum(case.conditions), 6)
    x, c = make_input(case, torch.float32)
    results = []
    for fill in (None, value):
        xs = x.clone()
        if fill is not None:
            xs[1] = fill
        xs.requires_grad_()
        (y,), logdet = block([xs], c, rev=rev)
        (y.square().flatten(1).sum(1) + logdet).sum().backward()
        results.append([y.detach(), logdet.detach(), xs.grad])
    for clean, bad in zip(*results, strict=True):
        assert torch.equal(clean[[0, 2]], bad[[0, 2]])
        assert clean.isfinite().all()
    assert not results[1][0][1].isfinite().all(), "NaN and inf must not disappear"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [0, 3], ids=["log-factor", "shift"])
@pytest.mark.parametrize("gin", [False, True], ids=["", "gin"])
@both_directions
@both_dialects
def test_coefficients_that_are_not_finite(
    value: float, where: int, gin: bool, rev: bool, dialect: str
) -> None:
    """The results are those of the formula.

    An infinite coefficient of a log-factor makes it the clamp. A NaN there makes its element and
    the sample's log-determinant NaN.
    """
    torch.manual_seed(3)
    a = torch.randn(2, 6, 4, dtype=torch.float64)
    a[0, where, 1] = value
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    results = []
    for cls in (AllInOneBlock, reference.AllInOneBlock):
        torch.manual_seed(4)
        block = cls([(6, 4)], [], lambda i, o: Stored(a), gin_block=gin, dialect=dialect).double()
        (y,), logdet = block([x], rev=rev)
        results.append((y.detach(), logdet.detach()))
    (y, logdet), (expected_y, expected_logdet) = results
    torch.testing.assert_close(
        y, expected_y, rtol=64 * torch.finfo(torch.float64).eps, atol=1e-15, equal_nan=True
    )
    torch.testing.assert_close(
        logdet,
        expected_logdet,
        rtol=64 * torch.finfo(torch.float64).eps,
        atol=1e-14,
        equal_nan=True,
    )


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize(
    "shape", [Shape(4, 7), Shape(3, 7, (3, 5)), Shape(2, 6, (2, 3, 2))], ids=str
)
@pytest.mark.parametrize("name", ["hard", "gin", "rev", "cond", "soft", "hh1"])
@both_directions
def test_any_layout_gives_the_same_answer(layout: str, shape: Shape, name: str, rev: bool) -> None:
    """The results have the same bits, unless torch sums in the order of the layout.

    It does so in products (soft, Householder), in means (GIN's inverse), and in gradients of
    broadcast tensors (any inverse). Channels-last inputs run pixel by pixel.
    """
    case = Case(shape, name)
    block = make_block(AllInOneBlock, case)
    subnet = Counting(
        shape.channels - shape.channels // 2 + sum(case.conditions), shape.channels // 2 * 2
    ).double()
    block.subnet = nn.Sequential(Function(torch.Tensor.contiguous), subnet)
    x, c = make_input(case)
    # Some values change, because "expanded" repeats the first sample.
    x, c = LAYOUTS[layout](x), [LAYOUTS[layout](t) for t in c]
    dy = LAYOUTS[layout](
        torch.randn(shape.full, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )
    assert layout == "channels_last" or not x.is_contiguous()
    results = []
    for convert in (
        torch.Tensor.detach,
        lambda t: t.detach().contiguous().clone(memory_format=torch.contiguous_format),
    ):
        xs, cs = convert(x).requires_grad_(), [convert(t).requires_grad_() for t in c]
        (y,), logdet = block([xs], cs, rev=rev)
        block.zero_grad()
        torch.autograd.backward(
            [y, logdet], [convert(dy), torch.ones(shape.batch, dtype=torch.float64)]
        )
        with torch.no_grad():
            (z,), negated = block([xs], cs, rev=rev)
        grads = [t.grad for t in (xs, *cs)] + [
            p.grad for p in block.parameters() if p.grad is not None
        ]
        results.append([y.detach(), logdet.detach(), z, negated, *grads])
    for actual, expected in zip(*results, strict=True):
        if rev or layout == "channels_last" or name in ("soft", "hh1", "gin"):
            assert_rounding(actual, expected, 64 * shape.channels)
        else:
            assert torch.equal(actual, expected)


@plain_and_fused
@pytest.mark.parametrize("shape", [Shape(3, 7, (3, 5)), Shape(2, 6, (2, 3, 2))], ids=str)
@kinds
def test_channels_last_stays(name: str, shape: Shape, small: int) -> None:
    """Output, inverse and the input's gradient have the input's memory format.

    Convolutions around the block then need no copy.
    """
    case = Case(shape, name)
    block = make_block(AllInOneBlock, case, torch.float32)
    x, c = make_input(case, torch.float32)
    layout = torch.channels_last if len(shape.spatial) == 2 else torch.channels_last_3d
    x = x.contiguous(memory_format=layout).requires_grad_()
    (y,), logdet = block([x], c)
    (dx,) = torch.autograd.grad(y.sum() + logdet.sum(), x)
    with torch.no_grad():
        (back,), _ = block([y], c, rev=True)
    assert y.is_contiguous(memory_format=layout)
    assert back.is_contiguous(memory_format=layout)
    assert (back - x).abs().max() < 1e-4
    product_first = block.reverse_pre_permute and (block.permute_soft or block.householder)
    # torch's 3-D convolution returns another format.
    if not small and not (product_first and len(shape.spatial) == 3):
        assert dx.is_contiguous(memory_format=layout)


def test_a_slice_of_a_channels_last_batch_stays_channels_last() -> None:
    block = make_block(AllInOneBlock, Case(Shape(4, 7, (3, 5)), "rev"), torch.float64)
    x = make_input(Case(Shape(4, 7, (3, 5)), "rev"))[0].contiguous(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        (y,), _ = block([x[::2]])
        expected = block([x])[0][0][::2]
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    # A single pixel is contiguous in every format, so it has none to keep.
    flat = torch.randn(4, 7, 1, 1, dtype=torch.float64)[::2]
    assert memory_format(flat) is torch.contiguous_format


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("name", ["soft", "gin-soft", "hard", "rev", "gin", "hh1"])
def test_gradients_come_in_any_layout(name: str, of_x: str, of_dy: str) -> None:
    """The output's gradient and the input have independent layouts, set by the layers around."""
    case = Case(Shape(4, 6, (4, 4)), name)
    block = make_block(AllInOneBlock, case)
    x, c = make_input(case)
    dy = torch.randn_like(x)

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (y,), logdet = block([x], c)
        return torch.autograd.grad([y, logdet], x, [dy, torch.ones_like(logdet)])[0]

    x, dy = LAYOUTS[of_x](x), LAYOUTS[of_dy](dy)
    torch.testing.assert_close(gradient(x, dy), gradient(x.contiguous(), dy.contiguous()))


def test_gin_hands_no_gradient_to_hooks_of_the_scale() -> None:
    """GIN's scale is 1, and a hook that clips gradients must not be called with None."""
    block = AllInOneBlock([(8,)], subnet_constructor=nn.Linear, gin_block=True)
    block.global_scale.register_hook(lambda g: g.clamp(-1, 1))
    block([torch.randn(4, 8)])[0][0].sum().backward()
    assert block.global_scale.grad is None
