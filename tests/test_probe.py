"""accelerate runs a foreign block to find out its maths, and leaves overridden steps alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import accelerate, report, restore
from fastflow_kernels.steps import STEPS
from tests.support.accelerated import (
    EPS,
    HARD,
    SHAPE,
    assert_left,
    assert_same_as_stock,
    kinds,
    overriding,
    subclass,
)
from tests.support.blocks import unwrapped
from tests.support.cases import (
    DIALECTS,
    Case,
    both_dialects,
    make_block,
    make_input,
    make_subnet,
)
from tests.support.stock_blocks import peers, released, stock_block

pytestmark = pytest.mark.usefixtures("fused")


# --- which maths a block computes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("clamp", [0.5, 0.9, 0.98, 1.02, 1.05, 1.2, 1.9, 5.0])
@both_dialects
def test_dialect_is_recognised(dialect: str, clamp: float, dtype: torch.dtype) -> None:
    block = reference.AllInOneBlock(
        [(6, 4)], [], make_subnet(1), affine_clamping=clamp, dialect=dialect
    ).to(dtype)
    (entry,) = report(accelerate(block)).entries
    assert entry.changed, entry.reason
    assert repr(dialect) in entry.reason


@both_dialects
def test_clamp_of_one_is_both_dialects(dialect: str) -> None:
    make = functools.partial(reference.AllInOneBlock, affine_clamping=1.0, dialect=dialect)
    block = stock_block(lambda: make, Case(SHAPE, "rev"))
    assert report(accelerate(block)).changed
    assert_same_as_stock(block, lambda: make, Case(SHAPE, "rev"))


@released
def test_clamp_of_zero(peer: Callable[[], Any]) -> None:
    make = functools.partial(peer(), affine_clamping=0.0)
    block = stock_block(lambda: make, Case(SHAPE, "rev"))
    assert report(accelerate(block)).changed
    assert_same_as_stock(block, lambda: make, Case(SHAPE, "rev"))


class Interface(reference.InvertibleModule):
    """What every copy of the block has, written from its documentation, without the maths."""

    def __init__(
        self,
        dims_in: Any,
        dims_c: Any = (),
        subnet_constructor: Any = None,
        affine_clamping: float = 2.0,
    ) -> None:
        super().__init__(dims_in, dims_c)
        channels, *spatial = self.dims_in[0]
        ones = [1] * len(spatial)
        self.in_channels, self.input_rank, self.sum_dims = (
            channels,
            len(spatial),
            tuple(range(1, 2 + len(spatial))),
        )
        self.splits = [channels - channels // 2, channels // 2]
        self.conditional, self.condition_channels = False, 0
        self.clamp, self.GIN, self.householder, self.reverse_pre_permute = (
            affine_clamping,
            False,
            0,
            False,
        )
        self.global_scale = nn.Parameter(torch.ones(1, channels, *ones))
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))
        w = torch.eye(channels)[torch.randperm(channels)]
        self.w_perm = nn.Parameter(w.view(channels, channels, *ones), requires_grad=False)
        self.w_perm_inv = nn.Parameter(w.T.reshape(channels, channels, *ones), requires_grad=False)
        self.subnet = subnet_constructor(self.splits[0], 2 * self.splits[1])

    def global_scale_activation(self, g: Tensor) -> Tensor:
        return torch.exp(g)

    def output_dims(self, input_dims: list) -> list:
        return input_dims


def vendored(
    soft: Callable[[Tensor, float], Tensor] = lambda z, clamp: clamp * torch.tanh(z),
    small: float = 0.1,
    order: str = "affine first",
    shift: float = 1.0,
    volume: float = 1.0,
    unscale: float = 1.0,
    subnet_input: Callable[[Tensor], Tensor] = lambda x1: x1,
) -> type:
    """Make a copy of the block as in somebody's repository, with or without a change of its maths.

    It does not derive from another AllInOneBlock.
    """

    class AllInOneBlock(Interface):
        def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
            a = a * small
            s, t = soft(a[:, : x.shape[1]], self.clamp), shift * a[:, x.shape[1] :]
            log_det = volume * s.sum(self.sum_dims)
            if rev:
                return (x - t) * torch.exp(-unscale * s), -log_det
            return x * torch.exp(s) + t, log_det

        def _permute(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
            scale = self.global_scale_activation(self.global_scale)
            w = (self.w_perm_inv if rev else self.w_perm).flatten(1)
            if order == "affine first":
                y = (
                    (mix(w, x) - self.global_offset) / scale
                    if rev
                    else mix(w, x * scale + self.global_offset)
                )
            else:
                y = (
                    mix(w, (x - self.global_offset) / scale)
                    if rev
                    else mix(w, x) * scale + self.global_offset
                )
            return y, scale.log().sum()

        def forward(
            self, x: Any, c: Any = (), rev: bool = False, jac: bool = True
        ) -> tuple[tuple[Tensor], Tensor]:
            (v,) = x
            if rev:
                v, log_scale = self._permute(v, rev=True)
            x1, x2 = v.split(self.splits, 1)
            x2, log_det = self._affine(x2, self.subnet(subnet_input(x1)), rev)
            v = torch.cat((x1, x2), 1)
            if not rev:
                v, log_scale = self._permute(v)
            return (v,), log_det + (-1) ** rev * v[0, 0].numel() * log_scale

    return AllInOneBlock


def mix(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oc,bc...->bo...", w, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("freia_form", [False, True], ids=DIALECTS)
def test_vendored_copy_is_accelerated(freia_form: bool, dtype: torch.dtype) -> None:
    cls = vendored(lambda z, clamp: clamp * torch.tanh(z / clamp)) if freia_form else vendored()
    block = cls([(6, 4)], subnet_constructor=make_subnet(1)).to(dtype)
    x = torch.randn(3, 6, 4, dtype=dtype)
    expected = [unwrapped(block([x], rev=rev)) for rev in (False, True)]
    (entry,) = report(accelerate(block)).entries
    assert entry.changed, entry.reason
    assert repr(DIALECTS[freia_form]) in entry.reason
    assert "EXP" in entry.reason
    for rev in (False, True):
        for a, e in zip(unwrapped(block([x], rev=rev)), expected[rev], strict=True):
            assert (a - e).abs().max() <= 200 * torch.finfo(dtype).eps * max(
                1.0, e.abs().max().item()
            )


CHANGED_MATHS: dict[str, dict[str, Any]] = {
    "arctangent": {"soft": lambda z, clamp: clamp * 0.636 * torch.atan(z)},
    "softsign": {"soft": lambda z, clamp: clamp * torch.nn.functional.softsign(z)},
    "both": {"soft": lambda z, clamp: 0.5 * clamp * (torch.tanh(z) + torch.tanh(z / clamp))},
    "no clamp": {"soft": lambda z, clamp: z},
    "half the clamp": {"soft": lambda z, clamp: 0.5 * clamp * torch.tanh(z)},
    "factor": {"small": 0.11},
    "permutation first": {"order": "permutation first"},
    "shift": {"shift": -1.0},
    "log-determinant": {"volume": 0.9},
    "inverse": {"unscale": 0.9},
    "the subnet's input": {"subnet_input": lambda x1: 2.0 * x1},
    "order of the subnet's input": {"subnet_input": lambda x1: x1.flip(1)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("change", CHANGED_MATHS)
def test_vendored_copy_with_other_maths_is_left(change: str, dtype: torch.dtype) -> None:
    block = vendored(**CHANGED_MATHS[change])([(6, 4)], subnet_constructor=make_subnet(1)).to(dtype)
    assert_left(block, "computes something else")


@peers
def test_steps_exchanged_on_the_block_later_are_honoured(peer: Callable[[], Any]) -> None:
    case = Case(SHAPE, "hard")
    x, _ = make_input(case)
    for name, change in (
        ("global_scale_activation", torch.exp),
        ("_affine", lambda x, a, rev=False: (2.0 * x, x.new_zeros(x.shape[0]))),
    ):
        block, stock = stock_block(peer, case), stock_block(peer, case)
        stock.load_state_dict(block.state_dict())
        assert report(accelerate(block)).changed
        for b in (block, copy.deepcopy(block), stock):
            setattr(b, name, change)
        assert torch.equal(block([x])[0][0], stock([x])[0][0])


@peers
def test_a_subnet_that_starts_in_place(peer: Callable[[], Any]) -> None:
    """The stock block lets the subnet change the passive half.

    With a condition the subnet gets a copy, and the fused block computes the same.
    """

    def subnet(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(i, o, 1))

    assert_left(peer()([(6, 4)], subnet_constructor=subnet), "in-place")
    assert report(accelerate(peer()([(6, 4)], [(2, 4)], subnet_constructor=subnet))).changed


# --- subclasses and overrides ---------------------------------------------------------------------


@released
@pytest.mark.parametrize("step", ["forward", *STEPS])
@pytest.mark.parametrize("name", ["hard", "hh3-rev-cond"])
def test_subclass_that_overrides_a_step_is_left(
    step: str, name: str, peer: Callable[[], Any]
) -> None:
    case = Case(SHAPE, name)
    block = make_block(subclass(peer, **overriding(step)), case)
    assert_left(block, f"overrides {step}")
    # Here it is a base of the class that overrides the step.
    block = make_block(type("MineToo", (subclass(peer, **overriding(step)),), {}), case)
    assert_left(block, f"overrides {step}")


@released
@pytest.mark.parametrize("step", ["forward", *STEPS])
def test_override_of_one_object_is_left(step: str, peer: Callable[[], Any]) -> None:
    block = stock_block(peer, HARD)
    setattr(block, step, lambda *args, **kwargs: None)
    assert_left(block, f"overrides {step}")


@released
@kinds
def test_benign_subclass_is_accelerated(case: Case, peer: Callable[[], Any]) -> None:
    stock: Any = peer()

    class Named(stock):
        """A subclass that only adds to the constructor, the shapes and the description."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.name = "one"

        def output_dims(self, input_dims: list) -> list:
            return list(input_dims)

        def extra_repr(self) -> str:
            return f"name={self.name}"

    block = make_block(Named, case, seed=3)
    assert report(accelerate(block)).changed
    assert isinstance(block, Named)
    assert block.name == "one"
    assert "name=one" in repr(block)
    assert block.output_dims(case.dims_in) == case.dims_in
    assert_same_as_stock(block, peer, case)
    restore(block)
    assert type(block) is Named


@released
def test_subclass_with_other_halves_is_left(peer: Callable[[], Any]) -> None:
    stock: Any = peer()

    class Uneven(stock):
        def __init__(self, dims_in: Any, **kwargs: Any) -> None:
            super().__init__(dims_in, **kwargs)
            self.splits = [4, 2]
            self.subnet = make_subnet(2)(4, 4)

    block = Uneven([(6, 3, 4)], subnet_constructor=make_subnet(2))
    block([torch.randn(2, 6, 3, 4)])
    assert_left(block, "")


@released
def test_learned_clamp_is_left_or_learns(peer: Callable[[], Any]) -> None:
    """The stock block takes a parameter for its clamp, and gives it a gradient."""
    blocks = [stock_block(peer, Case(SHAPE, "hard")) for _ in range(2)]
    for block in blocks:
        del block.clamp
        block.clamp = nn.Parameter(torch.tensor(1.9, dtype=torch.float64))
    accelerate(blocks[0])
    x, _ = make_input(HARD)
    for block in blocks:
        (y,), logdet = block([x])
        (y.square().sum() + logdet.sum()).backward()
    assert blocks[0].clamp.grad is not None
    assert (blocks[0].clamp.grad - blocks[1].clamp.grad).abs() <= 1e-12 * blocks[1].clamp.grad.abs()


@released
def test_other_activation_of_one_object(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, Case(SHAPE, "hard"))
    block.global_scale_activation = lambda g: 0.1 + torch.nn.functional.softplus(g)
    assert_left(block, "global_scale_activation")
    block.global_scale_activation = torch.exp
    x, _ = make_input(HARD)
    expected = unwrapped(block([x]))
    (entry,) = report(accelerate(block)).entries
    assert entry.changed
    assert "EXP" in entry.reason
    for a, e in zip(unwrapped(block([x])), expected, strict=True):
        assert (a - e).abs().max() <= 500 * EPS * e.abs().max()


@released
def test_other_permute_function_of_one_object_is_left(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, Case(SHAPE, "hard"))
    function = block.permute_function
    block.permute_function = lambda x, w: function(x, w).flip(1)
    assert_left(block, "computes something else")
