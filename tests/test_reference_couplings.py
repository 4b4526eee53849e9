"""Test the reference of the coupling blocks against mathematics and FrEIA 0.2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from tests.support.cases import Shape, both_directions, ids
from tests.support.coupling_blocks import (
    CASES,
    KINDS,
    NAMES,
    Case,
    TensorLogDet,
    build,
    evaluate,
    make_input,
    make_subnet,
    softsign,
)
from tests.support.peers import freia

every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
every_kind = pytest.mark.parametrize("case", KINDS, ids=ids(KINDS))

EPS = torch.finfo(torch.float64).eps
# Relative tolerance in float64: eps, times exponentials of up to e^5 in each half, times the root
# of the number of operations.
TIGHT = 1e-11


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0,
        atol=tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0),
    )


def stock_modules() -> Any:
    return freia().modules


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """Return FrEIA's block, and a reference that has loaded its state dict strictly."""
    stock, block = build(stock_modules(), case, seed=0), build(reference, case, seed=9)
    block.load_state_dict(stock.state_dict(), strict=True)
    return stock, block


# --- FrEIA


@pytest.mark.peers
@every_case
@both_directions
def test_values_and_gradients_equal_freias(case: Case, rev: bool) -> None:
    x, c = make_input(case)
    expected, actual = (evaluate(block, x, c, rev) for block in pair(case))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:  # equal except for the order of sums
            assert_near(actual[name], value, (4 + x.numel() ** 0.5) * EPS)
    assert actual["grad x"].abs().sum() > 0


@pytest.mark.peers
@every_case
def test_log_det_is_a_number_where_freias_is(case: Case) -> None:
    x, c = make_input(case)
    for rev in (False, True):
        expected, actual = (block([x], c, rev=rev)[1] for block in pair(case))
        assert type(actual) is type(expected)
        if case.preserves_volume:
            assert actual == expected == 0.0


@pytest.mark.peers
@every_case
def test_same_seed_gives_freias_block(case: Case) -> None:
    blocks, states = [], []
    for module in (stock_modules(), reference):
        blocks.append(build(module, case, torch.float32, seed=17))
        states.append(torch.random.get_rng_state())
    stock, block = blocks
    expected, actual = stock.state_dict(), block.state_dict()
    assert list(actual) == list(expected)
    assert list(dict(block.named_parameters())) == list(dict(stock.named_parameters()))
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert torch.equal(*states)
    stock.load_state_dict(build(reference, case, seed=3).state_dict(), strict=True)


ATTRIBUTES = ["channels", "ndims", "split_len1", "split_len2", "clamp", "conditional"]
ATTRIBUTES += ["condition_length", "dims_in", "dims_c"]


@pytest.mark.peers
@every_case
def test_attributes_equal_freias(case: Case) -> None:
    stock, block = pair(case)
    for name in ATTRIBUTES:
        assert getattr(block, name) == getattr(stock, name), name
    a = torch.linspace(-5, 5, 11)
    assert torch.equal(block.f_clamp(a), stock.f_clamp(a))
    assert block.output_dims([(1, 2)]) == stock.output_dims([(1, 2)])
    with pytest.raises(ValueError, match="must be one shape"):
        block.output_dims([(1, 2), (1, 2)])


# --- mathematics


@every_case
def test_inverse_round_trip(case: Case) -> None:
    block = TensorLogDet(build(reference, case))
    x, c = make_input(case)
    (y,), log_det = block([x], c)
    (back,), minus_log_det = block([y], c, rev=True)
    assert_near(back, x)
    assert_near(minus_log_det, -log_det)
    (z,), _ = block([x], c, rev=True)
    assert_near(block([z], c)[0][0], x)


@every_case
@both_directions
def test_log_det_equals_brute_force_jacobian(case: Case, rev: bool) -> None:
    block = TensorLogDet(build(reference, case))
    x, c = make_input(case)
    _, log_det = block([x], c, rev=rev)
    size = x[0].numel()
    for b in range(min(case.shape.batch, 2)):
        cb = [t[b : b + 1] for t in c]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, cb=cb: block([v], cb, rev=rev)[0][0], x[b : b + 1], vectorize=True
        )
        _, brute_force = torch.linalg.slogdet(jacobian.reshape(size, size))
        assert_near(log_det[b], brute_force)


CLAMPS = {
    "ATAN": lambda a: 0.636 * math.atan(a),
    "TANH": math.tanh,
    "SIGMOID": lambda a: 2.0 / (1.0 + math.exp(-a)) - 1.0,
}


@pytest.mark.parametrize("activation", CLAMPS)
@pytest.mark.parametrize("is_gin", [False, True], ids=["glow", "gin"])
def test_formula_number_by_number(activation: str, is_gin: bool) -> None:
    """The subnets are constants, so that plain numbers suffice."""
    a1, a2 = 3 * torch.randn(8).double(), 3 * torch.randn(6).double()
    outputs = iter((a1, a2))

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = next(outputs)

        def forward(self, x: Tensor) -> Tensor:
            return self.a.expand(len(x), -1)

    cls = reference.GINCouplingBlock if is_gin else reference.GLOWCouplingBlock
    block = cls([(7,)], [], lambda *_: Constant(), 1.7, activation, 3)
    x = torch.randn(2, 7).double()
    (y,), log_det = block([x])
    factors = []
    for a, size in ((a2.tolist(), 3), (a1.tolist(), 4)):
        s = [1.7 * CLAMPS[activation](value) for value in a[:size]]
        factors += [value - math.fsum(s) / size for value in s] if is_gin else s
    shifts = [*a2.tolist()[3:], *a1.tolist()[4:]]
    for b in range(2):
        values = zip(x[b].tolist(), factors, shifts, strict=True)
        expected = [v * math.exp(s) + t for v, s, t in values]
        assert_near(y[b], torch.tensor(expected, dtype=torch.float64), 1e-14)
    assert log_det == 0.0 if is_gin else abs(log_det[0].item() - math.fsum(factors)) < 1e-13


@every_kind
@both_directions
def test_gradients_equal_numerical_ones(case: Case, rev: bool) -> None:
    block = TensorLogDet(build(reference, case.replace(shape=Shape(2, 5, (2, 2)))))
    x, c = make_input(case.replace(shape=Shape(2, 5, (2, 2))))
    tensors = [t.requires_grad_() for t in (x, *c)]

    def run(x: Tensor, *c: Tensor) -> Tensor:
        (y,), log_det = block([x], list(c), rev=rev)
        return y if case.preserves_volume else torch.cat((y.flatten(1), log_det[:, None]), 1)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@every_kind
@both_directions
def test_autocast_keeps_the_dtype_of_the_input(case: Case, rev: bool) -> None:
    block = build(reference, case, torch.float32)
    x, c = make_input(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (y,), log_det = block([x], c, rev=rev)
    assert y.dtype == torch.float32
    assert case.preserves_volume or log_det.dtype == torch.float32


@every_kind
@both_directions
def test_empty_batch(case: Case, rev: bool) -> None:
    block = TensorLogDet(build(reference, case))
    x, c = make_input(case.replace(shape=Shape(0, 7, (3, 5))))
    (y,), log_det = block([x.requires_grad_()], c, rev=rev)
    assert (y.shape, log_det.shape) == (x.shape, (0,))
    (grad,) = torch.autograd.grad(y.sum() + log_det.sum(), x)
    assert grad.shape == x.shape


# --- errors

BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no subnet": ({"subnet_constructor": None}, "subnet_constructor"),
    "subnet not callable": ({"subnet_constructor": 3}, "subnet_constructor"),
    "activation": ({"clamp_activation": "atan"}, "clamp_activation"),
    "float split negative": ({"split_len": -0.1}, r"a float must be in \[0, 1\], got -0.1"),
    "float split above 1": ({"split_len": 1.5}, r"a float must be in \[0, 1\]"),
    "split nan": ({"split_len": math.nan}, "split_len"),
    "int split negative": ({"split_len": -1}, r"an int must be in \[0, 4\], got -1"),
    "int split above C": ({"split_len": 5}, r"an int must be in \[0, 4\]"),
    "5 dimensions": ({"dims_in": [(4, 2, 2, 2, 2)]}, "dims_in"),
    "no dimension": ({"dims_in": [()]}, "dims_in"),
    "two inputs": ({"dims_in": [(4,), (4,)]}, "dims_in"),
    "condition": ({"dims_c": [(4, 2)]}, "dims_c"),
    "second condition": ({"dims_c": [(4,), (4, 2)]}, "dims_c"),
}


@pytest.mark.parametrize(
    ("options", "match"), BAD_OPTIONS.values(), ids=[name.replace(" ", "_") for name in BAD_OPTIONS]
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_option_is_a_value_error(name: str, options: dict, match: str) -> None:
    if name == "NICECouplingBlock" and "clamp_activation" in options:
        pytest.skip("NICE has no clamp")
    good = {"dims_in": [(4,)], "dims_c": [(2,)], "subnet_constructor": make_subnet(0)}
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=match):
        getattr(reference, name)(**{**good, **options})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_conditional_transform_needs_a_condition() -> None:
    with pytest.raises(ValueError, match="needs a condition"):
        reference.ConditionalAffineTransform([(4,)], [], make_subnet(0))


@every_kind
def test_bad_input_is_a_value_error(case: Case) -> None:
    block = build(reference, case)
    x, c = make_input(case)
    block([x], c)
    for bad_x, bad_c in [
        ([x, x], c),
        ([], c),
        ([x], []),
        ([x], None),
        ([x], [*c, *c]),
        ([x[:, :3]], c),
        ([x[..., 0]], c),
        ([x], [c[0][:, :1]]),
    ]:
        with pytest.raises(ValueError, match="must have shapes"):
            block(bad_x, bad_c)


def test_any_function_clamps() -> None:
    block = reference.GLOWCouplingBlock([(4,)], [], make_subnet(0), clamp_activation=softsign)
    assert block.f_clamp is softsign
