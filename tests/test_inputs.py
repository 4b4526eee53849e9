"""What bad input gets: a clear error before any work, and nothing half-changed. And what unusual
input gets: the right answer.
"""

from __future__ import annotations

import math
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
from fastflow_kernels.layouts import memory_format
from tests.support.blocks import Function, Stored, unwrapped
from tests.support.cases import (
    LAYOUTS,
    OPTIONS,
    Case,
    Shape,
    both_dialects,
    both_directions,
    ids,
    make_block,
    make_input,
    make_subnet,
)
from tests.support.compare import assert_close
from tests.support.parity import check_float16_range
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.usefixtures("fused")

with_and_without_grad = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])

# Every kind of permutation, with and without GIN, conditions and the pre-permutation.
KINDS = (
    "hard",
    "rev",
    "cond",
    "gin",
    "gin-rev-cond",
    "soft",
    "soft-rev-exp",
    "gin-soft",
    "hh3-rev-cond",
    "hh2-soft-sigmoid",
    "gin-hh2",
)
kinds = pytest.mark.parametrize("name", KINDS)


class Counting(nn.Module):
    """A linear map of the channels that counts how often it is asked."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.einsum("oi,bi...->bo...", self.weight, x)


def function_subnet(function: Callable[[Tensor], Any]) -> Callable[[int, int], nn.Module]:
    return lambda channels_in, channels_out: Function(function)


def snapshot(block: nn.Module) -> dict[str, Tensor]:
    return {
        name: t.detach().clone() for name, t in [*block.named_parameters(), *block.named_buffers()]
    }


@contextmanager
def nothing_happens(block: nn.Module) -> Iterator[None]:
    """The block's parameters, its attributes, the subnet's count and torch's generator are the same
    afterwards.
    """
    before, attributes, state = snapshot(block), dict(vars(block)), torch.random.get_rng_state()
    yield
    after = snapshot(block)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert vars(block) == attributes
    assert block.subnet.calls == 0, "the subnet was asked"
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were drawn"


# --- the constructor ------------------------------------------------------------------------------

# Name: (options, exception, what the message must say: what was expected, and what came).
BAD_OPTIONS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no subnet": (
        {"subnet_constructor": None},
        ValueError,
        "expected a subnet_constructor.*got None",
    ),
    "subnet not callable": (
        {"subnet_constructor": 3},
        TypeError,
        "subnet_constructor.*callable.*got int",
    ),
    "subnet, not its constructor": (
        {"subnet_constructor": nn.Linear(2, 4)},
        TypeError,
        "subnet_constructor.*callable.*got Linear",
    ),
    "dialect": ({"dialect": "FrEIA"}, ValueError, "dialect.*anomalib.*freia.*got 'FrEIA'"),
    "dialect none": ({"dialect": None}, ValueError, "dialect.*anomalib.*freia.*got None"),
    "backend": ({"backend": "cuda"}, ValueError, "backend.*auto.*eager.*triton.*got 'cuda'"),
    "backend type": ({"backend": None}, TypeError, "backend.*auto.*eager.*triton.*got NoneType"),
    "affine type": (
        {"global_affine_type": "softplus"},
        ValueError,
        "global_affine_type.*SIGMOID.*SOFTPLUS.*EXP.*got 'softplus'",
    ),
    "affine type none": (
        {"global_affine_type": None},
        ValueError,
        "global_affine_type.*SIGMOID.*SOFTPLUS.*EXP.*got None",
    ),
    "init type": (
        {"global_affine_init": "one"},
        TypeError,
        "global_affine_init.*number.*got 'one'",
    ),
    "clamp type": ({"affine_clamping": "two"}, TypeError, "affine_clamping.*number.*got 'two'"),
    "clamp none": ({"affine_clamping": None}, TypeError, "affine_clamping.*number.*got None"),
    "clamp 0 in freia": (
        {"affine_clamping": 0.0, "dialect": "freia"},
        ValueError,
        "affine_clamping=0.*zero.*freia",
    ),
    "householder -1": (
        {"learned_householder_permutation": -1},
        ValueError,
        "learned_householder_permutation.*got -1",
    ),
    "householder 1.5": (
        {"learned_householder_permutation": 1.5},
        (TypeError, ValueError),
        "learned_householder_permutation.*got 1.5",
    ),
    "householder True": (
        {"learned_householder_permutation": True},
        TypeError,
        "learned_householder_permutation.*integer.*got True",
    ),
    "5 dimensions": (
        {"dims_in": [(4, 2, 2, 2, 2)]},
        ValueError,
        r"rank 0 to 3.*got dims_in \[\(4, 2, 2, 2, 2\)\]",
    ),
    "no dimension": ({"dims_in": [()]}, ValueError, r"dims_in.*got \[\(\)\]"),
    "half a pixel": (
        {"dims_in": [(4, 2.5)]},
        TypeError,
        r"dims_in as a list of shapes.*got \[\(4, 2.5\)\]",
    ),
    "text": ({"dims_in": ["4"]}, TypeError, "dims_in as a list of shapes.*got"),
    "negative size": ({"dims_in": [(4, -1)]}, ValueError, r"no negative size.*\(4, -1\)"),
    "no channel": ({"dims_in": [(0, 2)]}, ValueError, r"at least one channel.*\(0, 2\)"),
    "negative channels": ({"dims_in": [(-4,)]}, ValueError, r"at least one channel.*\(-4,\)"),
    "two inputs": ({"dims_in": [(4,), (4,)]}, ValueError, "one shape.*got 2"),
    "no input": ({"dims_in": []}, ValueError, "one shape.*got 0"),
    "a shape, not a list": (
        {"dims_in": (4, 8, 8)},
        TypeError,
        r"dims_in as a list of shapes.*got \(4, 8, 8\)",
    ),
    "a number, not a list": ({"dims_in": 4}, TypeError, "dims_in as a list of shapes.*got 4"),
    "condition": (
        {"dims_c": [(4, 2)]},
        ValueError,
        r"conditions.*spatial shape \(\).*got dims_c \[\(4, 2\)\]",
    ),
    "second condition": (
        {"dims_c": [(4,), (4, 2)]},
        ValueError,
        r"conditions.*spatial shape.*\(4, 2\)",
    ),
    "condition, not a list": (
        {"dims_c": (4,)},
        TypeError,
        r"dims_c as a list of shapes.*got \(4,\)",
    ),
}
for activation in ("SIGMOID", "SOFTPLUS", "EXP"):
    for value in (
        0.0,
        -1.0,
        math.nan,
        math.inf,
        -math.inf,
        *([10.0, 10.5] if activation == "SIGMOID" else []),
    ):
        options = {"global_affine_init": value, "global_affine_type": activation}
        BAD_OPTIONS[f"{activation} {value}"] = (
            options,
            ValueError,
            rf"global_affine_init in \(0, .*{activation}.*got {value}",
        )
for value in (math.nan, math.inf, -math.inf):
    BAD_OPTIONS[f"clamp {value}"] = (
        {"affine_clamping": value},
        ValueError,
        f"finite affine_clamping, got {value}",
    )


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=[name.replace(" ", "_") for name in BAD_OPTIONS])
def test_constructor_refuses(bad: str) -> None:
    options, error, match = BAD_OPTIONS[bad]
    built = []
    good = {"dims_in": [(4,)], "subnet_constructor": lambda *sizes: built.append(sizes)}
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=match):
        AllInOneBlock(**{**good, **options})
    assert not built, "a subnet was built"
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were drawn"


def test_constructor_refuses_a_subnet_that_is_none() -> None:
    with pytest.raises(TypeError, match="subnet_constructor to return a module, got NoneType"):
        AllInOneBlock([(4,)], subnet_constructor=lambda i, o: None)


@pytest.mark.parametrize("value", ["2", None, [1]])
def test_constructor_refuses_reflections_that_are_no_number(value: Any) -> None:
    state = torch.random.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        AllInOneBlock([(4,)], subnet_constructor=Counting, learned_householder_permutation=value)
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were drawn"


@both_dialects
@pytest.mark.parametrize(
    ("activation", "init"),
    [("EXP", 1e39), ("EXP", 1e-50), ("SIGMOID", 1e-40), ("SIGMOID", 9.999999), ("SOFTPLUS", 1e-12)],
)
def test_extreme_initial_scale_is_finite(activation: str, init: float, dialect: str) -> None:
    """Inside the range, but where the stock block's formula in float32 overflows: never a silent
    infinity.
    """
    options = {"global_affine_init": init, "global_affine_type": activation, "dialect": dialect}
    ours, theirs = (
        cls([(3,)], [], make_subnet(0), **options)
        for cls in (AllInOneBlock, reference.AllInOneBlock)
    )
    assert ours.global_scale.isfinite().all()
    # a few float32 roundings
    assert (ours.global_scale / theirs.global_scale - 1).abs().max() < 1e-6


def test_zero_clamp_is_additive_coupling() -> None:
    block = AllInOneBlock(
        [(6, 3)], subnet_constructor=make_subnet(1), affine_clamping=0.0, gin_block=True
    ).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    (y,), logdet = block([x])
    a = block.subnet(x[:, :3])
    expected = torch.cat((x[:, :3], x[:, 3:] + 0.1 * a[:, 3:]), 1)[:, block._permutation().perm]
    assert torch.equal(logdet, torch.zeros(2, dtype=torch.float64))
    assert (y - expected).abs().max() <= 4 * torch.finfo(torch.float64).eps * expected.abs().max()
    expected_grad = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)[0]
    grad = torch.autograd.grad(y.square().sum(), x)[0]
    assert (grad - expected_grad).abs().max() <= 16 * torch.finfo(
        torch.float64
    ).eps * expected_grad.abs().max()
    (back,), _ = block([y], rev=True)
    assert (back - x).abs().max() <= 16 * torch.finfo(torch.float64).eps * y.abs().max()


# --- the call -------------------------------------------------------------------------------------

GOOD_X, GOOD_C = torch.randn(2, 6, 3, 4), [torch.randn(2, 3, 3, 4), torch.randn(2, 1, 3, 4)]

# Name: (input, conditions, exception, what the message must say). For a block of 6 channels, rank
# 2, conditions of 3 and 1 channels.
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
    assert isinstance(raised.value, RuntimeError)  # which callers of the stock blocks catch


LABELS = F.one_hot(torch.tensor([[[0, 1, 2], [1, 1, 0]], [[2, 2, 0], [0, 1, 2]]]), 3).movedim(-1, 1)


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS.bool(), LABELS.to(torch.uint8)], ids=["int64", "bool", "uint8"]
)
@pytest.mark.parametrize("name", ["cond", "hh3-rev-cond"])
@both_directions
@with_and_without_grad
def test_labels_and_masks_as_conditions(name: str, labels: Tensor, rev: bool, grad: bool) -> None:
    """torch.cat promotes them."""
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
    """Where the subnet takes it, as an embedding does."""
    case = Case(Shape(2, 6, (2, 3)), name)
    block, stock = (
        make_block(cls, case, torch.float64) for cls in (AllInOneBlock, reference.AllInOneBlock)
    )
    x = (3 * make_input(case)[0]).abs().to(dtype)
    for b in (block, stock):
        b.subnet.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    (y,), logdet = block([x], rev=rev)
    (expected,), expected_logdet = stock([x], rev=rev)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logdet, expected_logdet, rtol=1e-13, atol=1e-13)


@both_directions
def test_conditions_may_be_undeclared_or_split_otherwise(rev: bool) -> None:
    """As in the stock blocks, which ignore the former and join the latter."""
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
    with pytest.raises(ValueError, match="backend must be one of auto, eager, triton; got 'cuda'"):
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
        eager([GOOD_X], rev=rev)  # says what it wants
    for value in ("eager", "auto", ""):
        monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", value)
        auto([GOOD_X], rev=rev)


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
    before, x = snapshot(block), torch.randn(2, 6, 5)
    given = x.clone()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=match):
        block([x], rev=rev)
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[name]) for name, value in block.named_parameters())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[
            (name, dtype)
            for name in ("hard", "rev", "gin", "soft", "hh1")
            for dtype in (torch.bfloat16, torch.float16)
        ],
        # a product, the stock block's and ours, takes no two dtypes
        *[(name, torch.float64) for name in ("hard", "rev", "gin")],
    ],
    ids=str,
)
@both_directions
@with_and_without_grad
def test_subnet_of_another_dtype(name: str, rev: bool, grad: bool, dtype: torch.dtype) -> None:
    """A float64 subnet in a float32 block, autocast inside a subnet: what comes out is promoted, as
    in the stock blocks.
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
    for (actual, expected, baseline), what in zip(passes, ("output", "log-det"), strict=True):
        if dtype is torch.float64:  # everything ahead of the subnet is in float32, here and there
            torch.testing.assert_close(actual, baseline.double(), rtol=1e-5, atol=1e-5)
        else:
            assert_close(actual, expected, baseline, what)


modes = pytest.mark.parametrize("mode", ["input needs a gradient", "grad", "no_grad", "inference"])


def in_mode(mode: str) -> Any:
    return (
        torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(mode != "no_grad")
    )


@both_directions
@modes
def test_subnet_that_starts_in_place(rev: bool, mode: str) -> None:
    """The stock block takes what the subnet has made of x1 for x1, and nobody notices; ours gives
    such a subnet a copy.
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
        given = x.clone()
        (y,), logdet = block([x], rev=rev)
        (expected,), expected_logdet = proper([x], rev=rev)
        assert torch.equal(x, given)
        assert torch.equal(y, expected)
        assert torch.equal(logdet, expected_logdet)


@both_directions
@pytest.mark.parametrize("mode", ["input needs a gradient", "grad", "no_grad"])
def test_subnet_that_writes_to_its_input(rev: bool, mode: str) -> None:
    """Further in, it cannot be seen beforehand; it is an error, and not another result."""
    block = AllInOneBlock(
        [(6, 5)],
        subnet_constructor=function_subnet(lambda x: x.relu_().mul(2.0)[:, :1].expand(-1, 6, -1)),
    )
    x = torch.randn(2, 6, 5, requires_grad=mode.startswith("input"))
    with in_mode(mode), pytest.raises(RuntimeError, match=re.compile("in.?place", re.IGNORECASE)):
        block([x], rev=rev)


def test_subnet_that_writes_to_its_own_values() -> None:
    """Only the very input is out of bounds."""
    block = AllInOneBlock(
        [(6, 5)],
        subnet_constructor=lambda i, o: nn.Sequential(Counting(i, o), nn.ReLU(inplace=True)),
    )
    x = torch.randn(2, 6, 5, requires_grad=True)
    (y,), logdet = block([x])
    (y.sum() + logdet.sum()).backward()
    with torch.no_grad():
        assert (block([y], rev=True)[0][0] - x).abs().max() < 1e-4


# --- nothing of the caller's is written to --------------------------------------------------------


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
    before = {key: t.clone() for key, t in tensors.items()} | snapshot(block)
    for grad in (True, False):
        for rev in (False, True):
            xs = x.detach().requires_grad_(grad)  # shares x's memory
            with torch.set_grad_enabled(grad):
                (y,), logdet = block([xs], c, rev=rev)
            versions = [t._version for t in (x, block.subnet.a)]
            if grad:
                torch.autograd.backward([y, logdet], [dy, dlogdet])
            y.detach().fill_(7.0)  # what is returned is not the caller's memory either
            logdet.detach().fill_(7.0)
            assert [t._version for t in (x, block.subnet.a)] == versions
            after = tensors | snapshot(block)
            for key, value in before.items():
                assert torch.equal(after[key], value), f"{key}, grad={grad}, rev={rev}"
            assert torch.equal(block.subnet.a, a), f"the subnet's output, grad={grad}, rev={rev}"


@kinds
def test_results_outlive_the_next_call(name: str) -> None:
    """Scratch is reused between calls, results are not."""
    case = Case(Shape(2, 6, (3, 5)), name)
    block = make_block(AllInOneBlock, case, torch.float32)
    x, c = make_input(case, torch.float32)
    for rev in (False, True):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                (y,), logdet = block([x], c, rev=rev)
                kept = y.detach().clone(), logdet.detach().clone()
                block([x.flip(0) * 3], c, rev=rev)
            assert torch.equal(y, kept[0])
            assert torch.equal(logdet, kept[1])


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
    """float64: equal but for so many roundings of the largest magnitude. The tensors here are sums
    of a few dozen terms at most.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    if expected.numel():
        error = (actual - expected).abs().max().item()
        assert error <= roundings * torch.finfo(torch.float64).eps * max(
            1.0, expected.abs().max().item()
        )


@both_dialects
@both_directions
@pytest.mark.parametrize("channels", [3])
def test_identity_subnet(channels: int, rev: bool, dialect: str) -> None:
    """The stock block overwrites x1, which an identity returns. With 3 channels x1 has 2, as many
    as are asked for.
    """
    blocks = []
    for cls in (AllInOneBlock, reference.AllInOneBlock):
        torch.manual_seed(1)
        blocks.append(
            cls([(channels, 4)], [], lambda i, o: nn.Identity(), dialect=dialect).double()
        )
    x = torch.randn(2, channels, 4, dtype=torch.float64)
    given = x.clone()
    for actual, expected in zip(*(gradients(block, x, rev) for block in blocks), strict=True):
        assert_rounding(actual, expected)
    assert torch.equal(x, given)
    with torch.no_grad():
        (y,), _ = blocks[0]([x])
        (back,), _ = blocks[0]([y], rev=True)
    assert_rounding(back, x)
    assert torch.equal(x, given)


@pytest.mark.parametrize("last", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("gin", [False, True], ids=["", "gin"])
def test_subnet_that_ends_in_an_activation_trains(last: type[nn.Module], gin: bool) -> None:
    """Their backward needs the output, which the stock block overwrites."""
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
        # which a GIN block does not use
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
    """In one active channel of one sample, one pixel: all else is what it was, to the bit. (GIN's
    mean is over coefficients.)
    """
    case = Case(shape, name)
    block = make_block(AllInOneBlock, case, torch.float32)
    block.subnet = Stored(torch.randn(shape.batch, shape.channels // 2 * 2, *shape.spatial))
    x, _ = make_input(case, torch.float32)
    clean = unwrapped(block([x], rev=rev))
    bad = x.clone()
    pixel = (0,) * len(shape.spatial)
    # a channel of the active half: where the inverse looks for it, and where the permutation that
    # is undone first puts it
    channel = shape.channels - 1
    if rev or block.reverse_pre_permute:
        channel = int(
            (block._permutation().perm if rev else block._permutation().inv).eq(channel).nonzero()
        )
    bad[(1, channel, *pixel)] = value
    (y, logdet), (clean_y, clean_logdet) = unwrapped(block([bad], rev=rev)), clean
    assert torch.equal(logdet, clean_logdet)
    differs = (y != clean_y).nonzero()
    assert len(differs) == 1
    assert differs[0, 0] == 1
    assert differs[0, 2:].tolist() == list(pixel)
    found = y[tuple(differs[0])]
    assert found.isnan() if math.isnan(value) else found == value
    if name == "hard" and not rev:
        assert differs[0, 1] == int(block._permutation().inv[channel])


@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@both_directions
def test_samples_do_not_infect_each_other(name: str, value: float, rev: bool) -> None:
    """A sample full of NaN or inf: the others' results and gradients are what they were, to the
    bit.
    """
    case = Case(Shape(3, 6, (3, 5)), name)
    block = make_block(AllInOneBlock, case, torch.float32)
    # by pixel: a convolution may sum in another order
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
    """As by the formula: an infinite log-factor is the clamp, a NaN is a NaN of its element and of
    its sample's log-determinant.
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
    """The same bits; but channels-last runs pixel by pixel, and torch's products (soft,
    Householder), means (GIN's inverse) and gradients of what it has broadcast (any inverse) sum in
    the order of the layout."""
    case = Case(shape, name)
    block = make_block(AllInOneBlock, case)
    subnet = Counting(
        shape.channels - shape.channels // 2 + sum(case.conditions), shape.channels // 2 * 2
    ).double()
    block.subnet = nn.Sequential(Function(torch.Tensor.contiguous), subnet)
    x, c = make_input(case)
    # the values may differ: "expanded" repeats the first sample
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
    """Output, inverse and the input's gradient have the input's memory format, so that convolutions
    around them need no copy.
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
    # torch's convolution in 3-D gives another format
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
    # of a single pixel every format is contiguous: it has none to keep
    flat = torch.randn(4, 7, 1, 1, dtype=torch.float64)[::2]
    assert memory_format(flat) is torch.contiguous_format


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("name", ["soft", "gin-soft", "hard", "rev", "gin", "hh1"])
def test_gradients_come_in_any_layout(name: str, of_x: str, of_dy: str) -> None:
    """Of the output's gradient and of the input independently, as the layers on the two sides have
    it.
    """
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
    """Its scale is 1: a hook that clips gradients must not be called with None."""
    block = AllInOneBlock([(8,)], subnet_constructor=nn.Linear, gin_block=True)
    block.global_scale.register_hook(lambda g: g.clamp(-1, 1))
    block([torch.randn(4, 8)])[0][0].sum().backward()
    assert block.global_scale.grad is None


# --- lower precision ------------------------------------------------------------------------------


@kinds
@both_directions
@with_and_without_grad
def test_autocast_keeps_the_log_determinant(name: str, rev: bool, grad: bool) -> None:
    """To float32's accuracy: with the very coefficients that the subnet gave in bfloat16, it is
    that of the formula in float64.
    """
    case = Case(Shape(3, 8, (4, 4)), name)
    seen = []
    block = make_block(AllInOneBlock, case, torch.float32)
    subnet, block.subnet = block.subnet, None
    block.subnet = Function(lambda x: seen.append(subnet(x)) or seen[-1])
    x, c = make_input(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        (y,), logdet = block([x], c, rev=rev)
    assert logdet.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    s = block.clamp * torch.tanh(0.1 * seen[0][:, :4].detach().double())
    if block.GIN:
        expected = torch.zeros(3, dtype=torch.float64)
    else:
        expected = (
            s.flatten(1).sum(1)
            + 16 * block.global_scale_activation(block.global_scale.detach().double()).log().sum()
        )
    error = (logdet.detach() - (-expected if rev else expected)).abs().max().item()
    terms = s.abs().flatten(1).sum(1).max().item() + 16 * 8
    assert error <= 4 * torch.finfo(torch.float32).eps * terms
    if grad:
        (y.float().sum() + logdet.sum()).backward()
        assert block.global_offset.grad.dtype == torch.float32


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_block_has_a_float32_log_determinant(name: str, dtype: torch.dtype) -> None:
    case = Case(Shape(3, 8), name)
    block = make_block(AllInOneBlock, case, dtype)
    x, c = make_input(case, dtype)
    for rev in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                (y,), logdet = block([x], c, rev=rev)
            assert y.dtype == dtype
            assert logdet.dtype == torch.float32


@pytest.mark.parametrize("name", ["hard", "sigmoid", "gin", "rev"])
@pytest.mark.parametrize("shape", [Shape(3, 7), Shape(2, 6, (3, 5))], ids=str)
@pytest.mark.parametrize(
    "narrow", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@with_and_without_grad
def test_inverse_of_a_narrower_input(
    name: str, shape: Shape, narrow: torch.dtype, grad: bool
) -> None:
    """A latent variable in another dtype than the block's is widened, which is exact: the same bits
    as if it had come so.
    """
    case = Case(shape, name)
    wide = torch.float64 if narrow is torch.float32 else torch.float32
    block = make_block(AllInOneBlock, case, wide)
    y, _ = make_input(case, narrow)
    with torch.set_grad_enabled(grad):
        (x,), logdet = block([y], rev=True)
        (expected_x,), expected_logdet = block([y.to(wide)], rev=True)
    assert x.dtype == logdet.dtype == wide
    assert torch.equal(x, expected_x)
    assert torch.equal(logdet, expected_logdet)


# --- overrides ------------------------------------------------------------------------------------


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


def test_the_tables_names_exist() -> None:
    assert set(KINDS) <= set(OPTIONS)


@both_dialects
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("given", ["float32", "half"])
@kinds
def test_dtypes_under_autocast(name: str, given: str, half: torch.dtype, dialect: str) -> None:
    """As the README says: float32 comes out, unless a soft permutation is the last step, whose
    product is autocast's.
    """
    block = AllInOneBlock(
        [(8, 4, 4)],
        subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1),
        dialect=dialect,
        **Case(Shape(1, 8, (4, 4)), name).options,
    )
    dtype = half if given == "half" else torch.float32
    x = torch.randn(3, 8, 4, 4).to(dtype).requires_grad_()
    for rev in (False, True):
        x.grad = None
        block.zero_grad()
        with torch.autocast("cpu", half):
            (y,), logdet = block([x], rev=rev)
        ends_in_product = block.permute_soft and (block.reverse_pre_permute or not rev)
        assert y.dtype == (half if ends_in_product else torch.float32)
        assert logdet.dtype == torch.float32
        (y.float().sum() + logdet.sum()).backward()
        assert x.grad.dtype == dtype
        assert {p.grad.dtype for p in block.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("small", [1 << 20, 0], ids=["plain", "fused"], indirect=True)
@pytest.mark.usefixtures("small")
def test_float16_overflows_only_where_a_result_does() -> None:
    check_float16_range("auto")
