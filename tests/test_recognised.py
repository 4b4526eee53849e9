"""Which forms of a block are recognised, in which contexts, and what is reported of others."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from fastflow_kernels import accelerate, report, restore
from tests.support.cases import DIALECTS, Case, both_dialects, make_block, make_input
from tests.support.pairs import (
    SHAPE,
    Exp,
    assert_same,
    pair,
    peers,
    setting,
    state_of,
)
from tests.support.peers import anomalib_block, freia
from tests.support.stock_blocks import stock_block

pytestmark = pytest.mark.usefixtures("fused")


# --- which activations are taken ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("EXP", torch.exp),
        ("EXP", lambda g: g.exp()),
        ("SIGMOID", lambda g: 10 * torch.sigmoid(g - 2.0)),
        ("SOFTPLUS", lambda g: 0.1 * F.softplus(g, beta=0.5)),
        ("SOFTPLUS", lambda g, beta=0.5: 0.1 * torch.nn.functional.softplus(g, beta)),
        ("SOFTPLUS", lambda g: 0.1 * nn.Softplus(beta=0.5)(g)),
    ],
)
def test_activation_of_a_known_form_is_taken(
    name: str, activation: Callable[[Tensor], Tensor]
) -> None:
    block = make_block(reference.AllInOneBlock, Case(SHAPE, "hard"))
    block.global_scale_activation = activation
    assert name in report(accelerate(block)).changed[0].reason


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, g: Tensor) -> Tensor:
        return torch.exp(g + self.shift)


class Scaled:
    factor = 1.0

    def __call__(self, g: Tensor) -> Tensor:
        return torch.exp(self.factor * g)


def around(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda g: torch.exp(value * g)


BETA = 0.5
LEFT_ACTIVATIONS: dict[str, Any] = {
    "bounded below": lambda g: (0.1 * F.softplus(g, beta=0.5)).clamp_min(1e-3),
    "bounded far below": lambda g: (0.1 * F.softplus(g, beta=0.5)).clamp_min(1e-30),
    "bounded above": lambda g: torch.clamp(torch.exp(g), max=1e20),
    "a little more": lambda g: torch.exp(g) + 1e-12,
    "another threshold": lambda g: 0.1 * F.softplus(g, beta=0.5, threshold=30),
    "another formula from 50 on": lambda g: torch.where(g > 50, g, torch.exp(g)),
    "without a gradient": lambda g: torch.exp(g.detach()),
    "in float32": lambda g: torch.exp(g.float()).double(),
    "by its shape": lambda g: torch.exp(g) if g.dim() == 1 else torch.exp(2 * g),
    "a module": Exp(),
    "a learned module": Learned(),
    "a callable object": Scaled(),
    "a bound method": Scaled().__call__,
    "a partial": functools.partial(torch.pow, torch.e),
    "a closure over a tensor": around(torch.ones(())),
    "a closure over a number": around(1.0),
    "a default that is a tensor": lambda g, factor=torch.ones(()): torch.exp(factor * g),  # noqa: B008
    "a global": lambda g: 0.1 * F.softplus(g, beta=BETA),
    "without gradients": torch.no_grad()(lambda g: torch.exp(g)),
}


@pytest.mark.parametrize("activation", LEFT_ACTIVATIONS)
def test_activation_that_only_resembles_a_known_one_is_left(activation: str) -> None:
    block = make_block(reference.AllInOneBlock, Case(SHAPE, "hard"))
    block.global_scale_activation = LEFT_ACTIVATIONS[activation]
    with pytest.warns(UserWarning, match="no block of the model runs fused"):
        accelerate(block)
    assert "its global_scale_activation" in report(block).left[0].reason


def test_activation_that_reads_an_attribute_of_its_block_is_left() -> None:
    block = make_block(reference.AllInOneBlock, Case(SHAPE, "hard"))
    block.factor = 1.0
    block.global_scale_activation = (lambda self: lambda g: torch.exp(self.factor * g))(block)
    assert "uses factor" in report(block).left[0].reason


# --- copies of the block that read something else -------------------------------------------------


def vendored(log_factor: Callable[[Any, Tensor], Tensor], **members: Any) -> type:
    """Make a copy of the block as in somebody's repository, with an additional method."""
    base = reference.AllInOneBlock

    def _affine(self: Any, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        s, t = self._log_factor(0.1 * a[:, : x.shape[1]]), 0.1 * a[:, x.shape[1] :]
        total = s.sum(self.sum_dims)
        return ((x - t) * torch.exp(-s), -total) if rev else (x * torch.exp(s) + t, total)

    methods = {
        "forward": base.forward,
        "_permute": base._permute,
        "_affine": _affine,
        "_log_factor": log_factor,
    }
    return type("AllInOneBlock", (base,), methods | members)


def with_own(name: str, value: Any) -> Callable[[nn.Module], object]:
    def change(block: nn.Module) -> None:
        if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
            setattr(block, name, copy.deepcopy(value))
        else:
            block.register_buffer(name, value.clone())

    return change


class Box:
    factor = 1.0


EXTRA: dict[
    str, tuple[Callable[[Any, Tensor], Tensor], Any, Callable[[nn.Module], object] | None]
] = {
    "attribute": (
        lambda self, a: self.factor * self.clamp * torch.tanh(a),
        1.0,
        setting("factor", 2.0),
    ),
    "dictionary": (
        lambda self, a: self.factor["of s"] * self.clamp * torch.tanh(a),
        {"of s": 1.0},
        lambda block: block.factor.update({"of s": 2.0}),
    ),
    "training": (
        lambda self, a: self.factor * self.clamp * torch.tanh(a) * (1.0 if self.training else 0.5),
        1.0,
        nn.Module.eval,
    ),
    "helper": (
        lambda self, a: self.factor * self.clamp * torch.tanh(a),
        1.0,
        setting("_log_factor", lambda a: a),
    ),
    "parameter": (
        lambda self, a: self.factor * self.clamp * torch.tanh(a),
        nn.Parameter(torch.ones(())),
        None,
    ),
    "buffer": (lambda self, a: self.factor * self.clamp * torch.tanh(a), torch.ones(()), None),
    "module": (lambda self, a: self.clamp * self.factor(a), nn.Tanh(), None),
    "object": (lambda self, a: self.factor.factor * self.clamp * torch.tanh(a), Box(), None),
    "list of tensors": (
        lambda self, a: self.factor[0] * self.clamp * torch.tanh(a),
        [torch.ones(())],
        None,
    ),
    "made from clamp": (lambda self, a: self.factor * torch.tanh(a), 2.0, None),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_what_a_vendored_copy_reads_beside_is_followed_or_it_is_left(kind: str) -> None:
    log_factor, value, change = EXTRA[kind]
    cls = vendored(log_factor)
    block, stock = (make_block(cls, Case(SHAPE, "hard"), torch.float64, 3) for _ in range(2))
    for b in (block, stock):
        with_own("factor", value)(b)
    if change is None:
        with pytest.warns(UserWarning, match="no block of the model runs fused"):
            accelerate(block)
        assert report(block).left
        return
    assert state_of(accelerate(block)) == "accelerated"
    assert_same(block, stock)
    for b in (block, stock):
        change(b)
    assert state_of(block) == "stock maths"
    assert_same(block, stock)


def test_a_constant_of_the_class_is_followed() -> None:
    cls = vendored(lambda self, a: self.factor * self.clamp * torch.tanh(a), factor=1.0)
    block, stock = pair(lambda: cls)
    with mock.patch.object(cls, "factor", 2.0):
        assert state_of(block) == "stock maths"
        assert_same(block, stock)
    block.factor = stock.factor = 3.0
    assert state_of(block) == "stock maths"
    assert_same(block, stock)


@pytest.mark.parametrize("name", ["factor", "clamp"])
def test_a_property_is_left(name: str) -> None:
    cls = vendored(
        lambda self, a: self.factor * self.clamp * torch.tanh(a),
        **{"factor": 1.0, name: property(lambda self: 1.0, lambda *_: None)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert name in report(accelerate(make_block(cls, Case(SHAPE, "hard")))).left[0].reason


@pytest.mark.peers
def test_a_permute_function_that_may_read_more_is_left() -> None:
    taken = lambda x, w: F.conv1d(x, w)  # noqa: E731
    around = (lambda function: lambda x, w: function(x, w))(F.conv1d)
    for function, state in (
        (taken, "accelerated"),
        (around, "left"),
        (setting.__get__(1), "left"),
        (lambda x, w: Box.factor * F.conv1d(x, w), "left"),
    ):
        block = make_block(anomalib_block(), Case(SHAPE, "hard"))
        block.permute_function = function
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert state_of(accelerate(block)) == state


# --- the dialect ----------------------------------------------------------------------------------


@both_dialects
@pytest.mark.parametrize("clamp", [1, 1.0, -1.0, 1.7, 1e-3, 300.0])
def test_dialect_and_clamp(clamp: float, dialect: str) -> None:
    """The clamps include 1, where both dialects agree, and one where exp(clamp) overflows."""
    block, stock = pair(lambda: reference.AllInOneBlock, affine_clamping=clamp, dialect=dialect)
    assert repr(dialect) in report(block).changed[0].reason
    block.clamp = stock.clamp = 3.0
    assert_same(block, stock)


@both_dialects
def test_dialect_of_gin_with_one_active_value(dialect: str) -> None:
    """GIN takes the mean of one value, which is that value: no clamp tells the dialects apart."""
    made = [
        reference.AllInOneBlock([(3,)], [], nn.Linear, gin_block=True, dialect=dialect).double()
        for _ in range(2)
    ]
    made[1].load_state_dict(made[0].state_dict())
    block, stock = accelerate(made[0]), made[1]
    assert repr(dialect) in report(block).changed[0].reason
    block.GIN = stock.GIN = False
    block.clamp = stock.clamp = 0.3
    x = 20 * torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(block([x]), stock([x]), rtol=1e-12, atol=1e-12)


def test_gin_that_hides_another_formula_is_left() -> None:
    cls = vendored(lambda self, a: (self.clamp * torch.atan(a)) * (0.0 if self.GIN else 1.0))
    block = cls([(3,)], [], nn.Linear, gin_block=True)
    assert "without GIN it computes something else" in report(block).left[0].reason


def test_a_block_that_takes_the_declared_size_only_still_does() -> None:
    """FrEIA's main branch takes that size only; anomalib's block takes any."""
    for dialect in DIALECTS:
        block, stock = pair(lambda: reference.AllInOneBlock, dialect=dialect)
        x = torch.randn(2, 6, 9, dtype=torch.float64)
        if dialect == "anomalib":
            torch.testing.assert_close(block([x]), stock([x]), rtol=1e-12, atol=1e-12)
            continue
        with pytest.raises(ValueError, match=r"got \(2, 6, 9\)"):
            block([x])
        block.dims_in = stock.dims_in = [(6, 9)]
        assert_same(block, stock)  # raises for the input that fitted before
        torch.testing.assert_close(block([x]), stock([x]), rtol=1e-12, atol=1e-12)


# --- where a block is probed ----------------------------------------------------------------------


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class RefusingToWiden(TorchDispatchMode):
    """A mode like a device without float64: nothing in float32 becomes float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            any(isinstance(t, Tensor) and t.dtype is torch.float32 for t in args)
            and isinstance(out, Tensor)
            and out.dtype is torch.float64
        ):
            raise TypeError("no float64 here")
        return out


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "watching": Watching,
    "without float64": RefusingToWiden,
    "inference": torch.inference_mode,
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "none": nullcontext,
}


@peers
@pytest.mark.parametrize("name", ["hard", "gin", "soft-rev-exp", "hh3-rev-cond"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_accelerate_anywhere_and_report_changes_nothing(
    context: str, name: str, peer: Callable[[], Any]
) -> None:
    block = stock_block(peer, Case(SHAPE, name), dtype=torch.float32)
    stock = copy.deepcopy(block)
    attributes, versions = dict(vars(block)), [p._version for p in block.parameters()]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with CONTEXTS[context]():
        assert "accelerate(model) would take it" in report(block).entries[0].reason
        assert vars(block) == attributes
        accelerate(block)
        assert state_of(block) == "accelerated"
    assert [p._version for p in block.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]
    restore(block)
    assert vars(block) == attributes
    x, c = make_input(Case(SHAPE, name), torch.float32)
    accelerate(block)
    # Another formula would differ in the first digit.
    torch.testing.assert_close(block([x], c), stock([x], c), rtol=1e-4, atol=1e-4)


@peers
@pytest.mark.parametrize("allow", [False, True])
def test_fake_tensors_cannot_be_asked(allow: bool, peer: Callable[[], Any]) -> None:
    block = make_block(peer(), Case(SHAPE, "hard"))
    attributes = dict(vars(block))
    with FakeTensorMode(allow_non_fake_inputs=allow):
        with pytest.warns(UserWarning, match="no block of the model runs fused"):
            accelerate(block)
        assert "FakeTensorMode" in report(block).left[0].reason
    assert vars(block) == attributes
    accelerate(block)
    with FakeTensorMode(allow_non_fake_inputs=allow):
        assert state_of(block) == "accelerated"
    assert state_of(block.to("meta")) == "accelerated"


# --- reports, warnings, restore -------------------------------------------------------------------


def test_old_forms_of_the_block_are_named() -> None:
    old = type(
        "AllInOneBlock", (nn.Module,), {"affine": lambda *_: None, "permute": lambda *_: None}
    )
    unknown = type("AllInOneBlock", (nn.Module,), {})
    model = nn.Sequential(nn.Linear(1, 1), old(), type("Mine", (old,), {})(), unknown())
    with pytest.warns(UserWarning, match="no block of the model runs fused") as caught:
        assert accelerate(model) is model
    assert len(caught) == 1
    after = report(model)
    assert [entry.name for entry in after.left] == ["1", "2", "3"]
    assert all(
        "old form of the block, with methods affine and permute" in entry.reason
        for entry in after.left[:2]
    )
    assert "does not define forward, _affine and _permute" in after.left[2].reason
    assert str(after).startswith("0 of 3 blocks run fused")


def test_one_fused_block_is_enough_not_to_warn() -> None:
    good = make_block(reference.AllInOneBlock, Case(SHAPE, "hard"))
    odd = make_block(reference.AllInOneBlock, Case(SHAPE, "hard"))
    odd.clamp = torch.tensor(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = accelerate(nn.Sequential(odd, good))
    assert [entry.state for entry in report(model).entries] == ["left", "accelerated"]


@pytest.mark.peers
def test_restore_restores_all_or_nothing() -> None:
    model = nn.Sequential(
        *(pair(anomalib_block)[0] for _ in range(2)),
        accelerate(freia().framework.SequenceINN(4), reversible=True),
    )
    before = [type(module) for module in model]
    parametrize.register_parametrization(model[1], "global_scale", nn.Identity())
    changed = [type(module) for module in model]
    with pytest.raises(
        RuntimeError,
        match="cannot restore 1: the class was changed again .* nothing was restored",
    ):
        restore(model)
    assert [type(module) for module in model] == changed
    parametrize.remove_parametrizations(model[1], "global_scale")
    assert [type(module) for module in model] == before
    assert restore(model) is model
    assert not report(model).changed
    assert not any(entry.changed for entry in report(model).chains)


@peers
def test_state_dict_and_attributes_are_the_stock_blocks(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, Case(SHAPE, "hard"))
    attributes, keys = dict(vars(block)), list(block.state_dict())
    names = [name for name, _ in block.named_modules()]
    accelerate(block)
    assert vars(block).keys() - attributes.keys() == {"_fastflow"}
    assert list(block.state_dict()) == keys
    assert [name for name, _ in block.named_modules()] == names
    restore(block)
    assert vars(block) == attributes
