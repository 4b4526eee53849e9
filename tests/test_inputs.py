"""Test that bad input raises a clear error before any work, and leaves nothing half-changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference
from fastflow_kernels import AllInOneBlock
from tests.support.blocks import Counting, Function, contents
from tests.support.cases import (
    Case,
    Shape,
    both_directions,
    make_block,
    make_input,
    make_subnet,
    with_and_without_grad,
)
from tests.support.compare import assert_close
from tests.support.parity import notices_write
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.usefixtures("fused")


def function_subnet(function: Callable[[Tensor], Any]) -> Callable[[int, int], nn.Module]:
    return lambda channels_in, channels_out: Function(function)


@contextmanager
def nothing_happens(block: nn.Module) -> Iterator[None]:
    """Assert that the block's contents, the subnet's count and torch's generator do not change."""
    before, attributes, state = contents(block), dict(vars(block)), torch.random.get_rng_state()
    yield
    after = contents(block)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert vars(block) == attributes
    assert block.subnet.calls == 0, "the subnet was called"
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were drawn"


# --- the call -------------------------------------------------------------------------------------

GOOD_X, GOOD_C = torch.randn(2, 6, 3, 4), [torch.randn(2, 3, 3, 4), torch.randn(2, 1, 3, 4)]

# Input, conditions, exception, and a pattern of the message, by name. They are for a block of 6
# channels, rank 2, and conditions of 3 and 1 channels.
BAD_CALLS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "too few channels": (
        [GOOD_X[:, :5]],
        GOOD_C,
        ValueError,
        r"\(B, 6, S1, S2\), got \(2, 5, 3, 4\)",
    ),
    "too many channels": (
        [torch.randn(2, 7, 3, 4)],
        GOOD_C,
        ValueError,
        r"\(B, 6, S1, S2\), got \(2, 7, 3, 4\)",
    ),
    "rank 1": ([GOOD_X[..., 0]], GOOD_C, ValueError, r"\(B, 6, S1, S2\), got \(2, 6, 3\)"),
    "rank 3": ([GOOD_X[..., None]], GOOD_C, ValueError, r"\(B, 6, S1, S2\), got \(2, 6, 3, 4, 1\)"),
    "no batch": ([GOOD_X[0]], GOOD_C, ValueError, r"\(B, 6, S1, S2\), got \(6, 3, 4\)"),
    "a tensor": (
        GOOD_X,
        GOOD_C,
        TypeError,
        r"list with one tensor, got a tensor of shape \(2, 6, 3, 4\)",
    ),
    "a tensor of one sample": (
        GOOD_X[:1],
        GOOD_C,
        TypeError,
        r"list with one tensor, got a tensor of shape \(1, 6, 3, 4\)",
    ),
    "a dict": ({0: GOOD_X}, GOOD_C, TypeError, "list with one tensor, got dict"),
    "none": (None, GOOD_C, TypeError, "list with one tensor, got NoneType"),
    "a list of none": ([None], GOOD_C, TypeError, "to be a tensor, got NoneType"),
    "an array": ([GOOD_X.tolist()], GOOD_C, TypeError, "to be a tensor, got list"),
    "two inputs": ([GOOD_X, GOOD_X], GOOD_C, ValueError, "one input tensor, got 2"),
    "no input": ([], GOOD_C, ValueError, "one input tensor, got 0"),
    "complex": (
        [GOOD_X.to(torch.complex64)],
        GOOD_C,
        TypeError,
        "input in a floating-point dtype, got torch.complex64",
    ),
    "another device": (
        [GOOD_X.to("meta")],
        [t.to("meta") for t in GOOD_C],
        ValueError,
        "input on cpu.*got meta",
    ),
    "conditions missing": ([GOOD_X], [], ValueError, r"2 condition\(s\), got 0"),
    "conditions none": ([GOOD_X], None, ValueError, r"2 condition\(s\), got 0"),
    "one condition missing": ([GOOD_X], GOOD_C[:1], ValueError, r"2 condition\(s\), got 1"),
    "one condition more": ([GOOD_X], [*GOOD_C, GOOD_C[0]], ValueError, r"2 condition\(s\), got 3"),
    "conditions as a tensor": (
        [GOOD_X],
        torch.cat(GOOD_C, 1),
        TypeError,
        "conditions as a list of tensors, got Tensor",
    ),
    "a condition of another width": (
        [GOOD_X],
        [GOOD_C[0], GOOD_C[0]],
        ValueError,
        r"condition 1 of shape \(2, 1, 3, 4\), got \(2, 3, 3, 4\)",
    ),
    "condition of another batch": (
        [GOOD_X],
        [GOOD_C[0], GOOD_C[1][:1]],
        ValueError,
        r"condition 1 of shape \(2, 1, 3, 4\), got \(1, 1, 3, 4\)",
    ),
    "condition of another size": (
        [GOOD_X],
        [GOOD_C[0], GOOD_C[1][..., :1]],
        ValueError,
        r"condition 1 of shape .*, got \(2, 1, 3, 1\)",
    ),
    "condition of another rank": (
        [GOOD_X],
        [GOOD_C[0][..., 0, 0], GOOD_C[1]],
        ValueError,
        r"condition 0 of shape .*, got \(2, 3\)",
    ),
    "condition none": (
        [GOOD_X],
        [None, GOOD_C[1]],
        TypeError,
        "condition 0 to be a tensor, got NoneType",
    ),
}


@pytest.mark.parametrize("bad", BAD_CALLS, ids=[name.replace(" ", "_") for name in BAD_CALLS])
@pytest.mark.parametrize("reverse_permutation", [False, True], ids=["", "rev"])
@both_directions
def test_call_refuses(bad: str, rev: bool, reverse_permutation: bool) -> None:
    x, c, error, match = BAD_CALLS[bad]
    block = AllInOneBlock(
        [(6, 3, 4)], [(3, 3, 4), (1, 3, 4)], Counting, reverse_permutation=reverse_permutation
    )
    with nothing_happens(block), pytest.raises(error, match=match) as raised:
        block(x, c, rev=rev)
    assert isinstance(raised.value, RuntimeError)  # callers of the stock blocks catch it


LABELS = F.one_hot(torch.tensor([[[0, 1, 2], [1, 1, 0]], [[2, 2, 0], [0, 1, 2]]]), 3).movedim(-1, 1)


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS.bool(), LABELS.to(torch.uint8)], ids=["int64", "bool", "uint8"]
)
@pytest.mark.parametrize("name", ["cond", "hh3-rev-cond"])
@both_directions
@with_and_without_grad
def test_labels_and_masks_as_conditions(name: str, labels: Tensor, rev: bool, grad: bool) -> None:
    """Labels and masks are promoted by torch.cat."""
    case = Case(Shape(2, 6, (2, 3)), name)
    block = make_block(AllInOneBlock, case, torch.float64)
    x, _ = make_input(case)
    labels = labels[:, : block.condition_channels]
    with torch.set_grad_enabled(grad):
        (y,), logdet = block([x], [labels], rev=rev)
        (expected,), expected_logdet = block([x], [labels.double()], rev=rev)
    assert torch.equal(y, expected)
    assert torch.equal(logdet, expected_logdet)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=["int64", "uint8"])
@pytest.mark.parametrize("name", ["hard", "rev", "gin"])
@both_directions
def test_integer_input_promotes(name: str, dtype: torch.dtype, rev: bool) -> None:
    """The subnet must take integers, as an embedding does."""
    case = Case(Shape(2, 6, (2, 3)), name)
    block, stock = (
        make_block(cls, case, torch.float64) for cls in (AllInOneBlock, reference.AllInOneBlock)
    )
    x = (3 * make_input(case)[0]).abs().to(dtype)
    for b in (block, stock):
        b.subnet.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    (y,), logdet = block([x], rev=rev)
    (expected,), expected_logdet = stock([x], rev=rev)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logdet, expected_logdet, rtol=1e-13, atol=1e-13)


@both_directions
def test_conditions_may_be_undeclared_or_split_otherwise(rev: bool) -> None:
    """The stock blocks ignore undeclared conditions and join all others."""
    block = AllInOneBlock([(6, 3, 4)], subnet_constructor=Counting)
    assert torch.equal(block([GOOD_X], GOOD_C, rev=rev)[0][0], block([GOOD_X], rev=rev)[0][0])
    block = AllInOneBlock([(6, 3, 4)], [(3, 3, 4), (1, 3, 4)], make_subnet(2))
    joined = torch.cat(GOOD_C, 1)
    expected = block([GOOD_X], GOOD_C, rev=rev)[0][0]
    assert torch.equal(block([GOOD_X], [joined], rev=rev)[0][0], expected)
    assert torch.equal(block([GOOD_X], [joined[:, :1], joined[:, 1:]], rev=rev)[0][0], expected)


def test_a_backend_set_later_is_checked_too() -> None:
    block = AllInOneBlock([(4,)], subnet_constructor=Counting)
    block.backend = "cuda"
    with pytest.raises(
        ValueError, match="expected backend to be one of auto, eager, triton; got 'cuda'"
    ):
        block([torch.randn(2, 4)])


@pytest.mark.parametrize("elsewhere", ["condition", "subnet"])
def test_everything_on_one_device(elsewhere: str) -> None:
    block = AllInOneBlock([(4,)], [(2,)], Counting)
    if elsewhere == "subnet":
        block.subnet.register_forward_hook(lambda _, __, a: a.to("meta"))
    with pytest.raises(ValueError, match="on cpu, where the input is; got meta"):
        block(
            [torch.randn(2, 4)],
            [torch.randn(2, 2, device="meta" if elsewhere == "condition" else "cpu")],
        )


@pytest.mark.parametrize(
    "bad",
    [torch.randn(2, 4).to(torch.float8_e4m3fn), torch.randn(2, 4).to_sparse()],
    ids=["float8", "sparse"],
)
def test_exotic_tensors_are_refused(bad: Tensor) -> None:
    with pytest.raises(TypeError, match="expected the input"):
        AllInOneBlock([(4,)], subnet_constructor=Counting)([bad])


@both_directions
def test_only_freia_asks_for_the_declared_size(rev: bool) -> None:
    x = torch.randn(2, 4, 6, 5)
    assert (
        AllInOneBlock([(4, 1, 1)], subnet_constructor=Counting)([x], rev=rev)[0][0].shape == x.shape
    )
    block = AllInOneBlock([(4, 1, 1)], subnet_constructor=Counting, dialect="freia")
    with (
        nothing_happens(block),
        pytest.raises(ValueError, match=r"\(B, 4, 1, 1\), got \(2, 4, 6, 5\)"),
    ):
        block([x], rev=rev)
    assert block([x[..., :1, :1]], rev=rev)[0][0].shape == (2, 4, 1, 1)


@both_directions
@with_and_without_grad
def test_triton_on_a_cpu_says_why_not(
    rev: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    block = AllInOneBlock([(6, 3, 4)], subnet_constructor=Counting, backend="triton")
    with (
        nothing_happens(block),
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match="'triton'"),
    ):
        block([GOOD_X], rev=rev)
    if not (rev and grad):
        with (
            nothing_happens(block),
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match="the input is on cpu"),
        ):
            block([GOOD_X], rev=rev)


@both_directions
def test_environment_sets_the_default_backend(rev: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    auto = AllInOneBlock([(6, 3, 4)], subnet_constructor=Counting, reverse_permutation=True)
    eager = AllInOneBlock([(6, 3, 4)], subnet_constructor=Counting, backend="eager")
    for value, error, match in [
        (
            "nonsense",
            ValueError,
            "FASTFLOW_KERNELS_BACKEND.*auto.*eager.*triton.*got 'nonsense'",
        ),
        ("triton", RuntimeError, "'triton' cannot be used here: the input is on cpu"),
    ]:
        monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", value)
        with nothing_happens(auto), torch.no_grad(), pytest.raises(error, match=match):
            auto([GOOD_X], rev=rev)
        eager([GOOD_X], rev=rev)  # its own backend takes precedence
    for value in ("eager", "auto", ""):
        monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", value)
        auto([GOOD_X], rev=rev)


@pytest.mark.parametrize("bad", ["too few channels", "a tensor", "conditions missing", "complex"])
def test_subclass_that_overrides_a_step_checks_the_same(bad: str) -> None:
    class Swapped(AllInOneBlock):
        def _pre_permute(self, x: Tensor, rev: bool = False) -> Tensor:
            return super()._pre_permute(x, not rev)

    x, c, error, match = BAD_CALLS[bad]
    block = Swapped([(6, 3, 4)], [(3, 3, 4), (1, 3, 4)], Counting)
    with nothing_happens(block), pytest.raises(error, match=match):
        block(x, c)
    assert block([GOOD_X[:0]], [t[:0] for t in GOOD_C])[0][0].shape == (0, 6, 3, 4)


# --- the subnet -----------------------------------------------------------------------------------

BAD_SUBNETS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "half the width": (
        lambda x: x[:, :3],
        ValueError,
        r"subnet to return shape \(2, 6, 5\), got \(2, 3, 5\)",
    ),
    "a channel more": (
        lambda x: torch.cat((x, x, x[:, :1]), 1),
        ValueError,
        r"subnet to return shape \(2, 6, 5\), got \(2, 7, 5\)",
    ),
    "a channel, to be broadcast": (
        lambda x: x[:, :1],
        ValueError,
        r"subnet to return shape \(2, 6, 5\), got \(2, 1, 5\)",
    ),
    "a pixel, to be broadcast": (
        lambda x: torch.cat((x, x), 1)[..., :1],
        ValueError,
        r"subnet to return shape .* got \(2, 6, 1\)",
    ),
    "a sample, to be broadcast": (
        lambda x: torch.cat((x, x), 1)[:1],
        ValueError,
        r"subnet to return shape .* got \(1, 6, 5\)",
    ),
    "another rank": (
        lambda x: torch.cat((x, x), 1).flatten(1),
        ValueError,
        r"subnet to return shape .* got \(2, 30\)",
    ),
    "a tuple": (lambda x: (x, x), TypeError, "subnet's output to be a tensor, got tuple"),
    "nothing": (lambda x: None, TypeError, "subnet's output to be a tensor, got NoneType"),
    "integers": (
        lambda x: torch.cat((x, x), 1).long(),
        TypeError,
        "subnet.*torch.float32|floating.*got torch.int64",
    ),
    "complex": (
        lambda x: torch.cat((x, x), 1) * 1j,
        TypeError,
        "subnet.*torch.float32|floating.*got torch.complex64",
    ),
}


@pytest.mark.parametrize("bad", BAD_SUBNETS, ids=[name.replace(" ", "_") for name in BAD_SUBNETS])
@both_directions
@with_and_without_grad
def test_subnet_that_returns_something_else(bad: str, rev: bool, grad: bool) -> None:
    function, error, match = BAD_SUBNETS[bad]
    block = AllInOneBlock([(6, 5)], subnet_constructor=function_subnet(function))
    parameters, x = contents(block), torch.randn(2, 6, 5)
    before = x.clone()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=match):
        block([x], rev=rev)
    assert torch.equal(x, before)
    assert all(torch.equal(value, parameters[name]) for name, value in block.named_parameters())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[
            (name, dtype)
            for name in ("hard", "rev", "gin", "soft", "hh1")
            for dtype in (torch.bfloat16, torch.float16)
        ],
        # A matrix product, in the stock block and in ours, does not take two dtypes.
        *[(name, torch.float64) for name in ("hard", "rev", "gin")],
    ],
    ids=str,
)
@both_directions
@with_and_without_grad
def test_subnet_of_another_dtype(name: str, rev: bool, grad: bool, dtype: torch.dtype) -> None:
    """The results are promoted, as in the stock blocks.

    Examples are a float64 subnet in a float32 block, and autocast inside a subnet.
    """
    case = Case(Shape(3, 6, (2, 3)), name)
    block, stock = (
        make_block(cls, case, torch.float32) for cls in (AllInOneBlock, reference.AllInOneBlock)
    )
    stock.load_state_dict(block.state_dict())
    truth = make_block(reference.AllInOneBlock, case, torch.float64)
    truth.load_state_dict(block.state_dict())
    for b in (block, stock, truth):  # the same values for all three
        b.subnet.register_forward_hook(
            lambda _, __, a: (
                a.to(torch.bfloat16).to(dtype)
                if a.dtype is torch.float32
                else a.bfloat16().double()
            )
        )
    x, _ = make_input(case, torch.float32)
    with torch.set_grad_enabled(grad):
        (y,), logdet = block([x], rev=rev)
    (plain,), plain_logdet = stock([x], rev=rev)
    (exact,), exact_logdet = truth([x.double()], rev=rev)
    assert y.dtype is torch.promote_types(torch.float32, dtype)
    passes = (y, exact, plain), (logdet, exact_logdet, plain_logdet)
    for (actual, expected, baseline), name in zip(passes, ("output", "log-det"), strict=True):
        if dtype is torch.float64:  # in both blocks, everything before the subnet is in float32
            torch.testing.assert_close(actual, baseline.double(), rtol=1e-5, atol=1e-5)
        else:
            assert_close(actual, expected, baseline, name)


modes = pytest.mark.parametrize("mode", ["input needs a gradient", "grad", "no_grad", "inference"])


def in_mode(mode: str) -> Any:
    return (
        torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(mode != "no_grad")
    )


@both_directions
@modes
def test_subnet_that_starts_in_place(rev: bool, mode: str) -> None:
    """Our block gives such a subnet a copy.

    The stock block silently continues with what the subnet has written to x1.
    """
    torch.manual_seed(0)
    block = AllInOneBlock(
        [(6, 5)],
        subnet_constructor=lambda i, o: nn.Sequential(nn.ReLU(inplace=True), Counting(i, o)),
    )
    torch.manual_seed(0)
    proper = AllInOneBlock(
        [(6, 5)], subnet_constructor=lambda i, o: nn.Sequential(nn.ReLU(), Counting(i, o))
    )
    proper.load_state_dict(block.state_dict())
    with in_mode(mode):
        x = torch.randn(2, 6, 5, requires_grad=mode.startswith("input"))
        before = x.clone()
        (y,), logdet = block([x], rev=rev)
        (expected,), expected_logdet = proper([x], rev=rev)
        assert torch.equal(x, before)
        assert torch.equal(y, expected)
        assert torch.equal(logdet, expected_logdet)


@plain_and_fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@both_directions
@pytest.mark.parametrize("name", ["hard", "gin", "rev", "soft", "hh1"])
def test_in_inference_mode_a_write_is_noticed_or_has_the_stock_effect(
    small: int, dtype: torch.dtype, layout: str, rev: bool, name: str
) -> None:
    """Inference mode does not count the versions of views, but counts those of a copy."""
    with torch.inference_mode():
        noticed = notices_write(name, rev, layout, dtype=dtype)
    if dtype is torch.bfloat16 or not small:  # otherwise the subnet is given a view of u
        assert noticed is rev


@both_directions
@pytest.mark.parametrize("mode", ["input needs a gradient", "grad", "no_grad"])
def test_subnet_that_writes_to_its_input(rev: bool, mode: str) -> None:
    """A write deep inside a subnet cannot be foreseen, so it raises instead of giving a result."""
    block = AllInOneBlock(
        [(6, 5)],
        subnet_constructor=function_subnet(lambda x: x.relu_().mul(2.0)[:, :1].expand(-1, 6, -1)),
    )
    x = torch.randn(2, 6, 5, requires_grad=mode.startswith("input"))
    with in_mode(mode), pytest.raises(RuntimeError, match=re.compile("in.?place", re.IGNORECASE)):
        block([x], rev=rev)


def test_subnet_that_writes_to_its_own_values() -> None:
    """The subnet may write to all tensors except its input."""
    block = AllInOneBlock(
        [(6, 5)],
        subnet_constructor=lambda i, o: nn.Sequential(Counting(i, o), nn.ReLU(inplace=True)),
    )
    x = torch.randn(2, 6, 5, requires_grad=True)
    (y,), logdet = block([x])
    (y.sum() + logdet.sum()).backward()
    with torch.no_grad():
        assert (block([y], rev=True)[0][0] - x).abs().max() < 1e-4
