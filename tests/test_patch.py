"""accelerate and restore: stock blocks made fast in place, and nothing else about them changed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastflow_kernels
from fastflow_kernels import accelerate, report, restore
from tests.support.accelerated import (
    CASES,
    EPS,
    HARD,
    SHAPE,
    assert_equal_results,
    assert_left,
    assert_same_as_stock,
    is_fused,
    kinds,
    overriding,
    same_block,
    subclass,
)
from tests.support.blocks import unwrapped
from tests.support.cases import (
    Case,
    Shape,
    ids,
    make_input,
)
from tests.support.peers import anomalib_block
from tests.support.stock_blocks import freia_main_block, peers, released, stock_block

pytestmark = pytest.mark.usefixtures("fused")


# --- one block ------------------------------------------------------------------------------------


@peers
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_accelerated_block_gives_the_same(case: Case, peer: Callable[[], Any]) -> None:
    """Every option on two shapes, every shape with the options that matter to it."""
    block = stock_block(peer, case)
    stock_class = type(block)
    after = report(accelerate(block))
    assert len(after.changed) == 1, str(after)
    expected = "freia" if peer is freia_main_block else "anomalib"
    # The clamp tells the dialect. With one channel there is no active half and so no clamp, and GIN
    # leaves nothing of a single log-factor, which is its own mean.
    if case.shape.channels > 1 and not (block.GIN and math.prod(case.shape.full[1:]) < 4):
        assert f"'{expected}'" in after.changed[0].reason
    activation = case.options.get("global_affine_type", "SOFTPLUS")
    assert activation in after.changed[0].reason or block.GIN
    assert isinstance(block, stock_class)
    assert_same_as_stock(block, peer, case)
    assert restore(block) is block
    assert type(block) is stock_class
    assert_equal_results(block, same_block(peer, block, case, torch.float64), case)


@peers
def test_accelerated_block_is_fused(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, Case(SHAPE, "hard"))
    assert not is_fused(block)
    accelerate(block)
    assert is_fused(block)
    restore(block)
    assert not is_fused(block)


@peers
@kinds
def test_everything_else_stays(case: Case, peer: Callable[[], Any]) -> None:
    block = stock_block(peer, case).eval()
    block.global_offset.requires_grad_(False)
    block.register_buffer("more", torch.ones(2))
    block.register_forward_hook(lambda *_: None)
    block.subnet.train()
    before = dict(vars(block))
    parameters = [
        (name, id(p), p._version, p.data_ptr(), p.requires_grad, p.grad)
        for name, p in block.named_parameters()
    ]
    state, metadata = (
        {key: value.clone() for key, value in block.state_dict().items()},
        vars(block.state_dict())["_metadata"],
    )
    modules = [(name, id(module), module.training) for name, module in block.named_modules()]
    generators = torch.random.get_rng_state(), random.getstate()
    for change in (accelerate, accelerate, restore):
        change(block)
        assert [
            (name, id(p), p._version, p.data_ptr(), p.requires_grad, p.grad)
            for name, p in block.named_parameters()
        ] == parameters
        assert [
            (name, id(module), module.training) for name, module in block.named_modules()
        ] == modules
        state_after = block.state_dict()
        assert list(state_after) == list(state)
        assert all(
            torch.equal(state_after[key], value) and state_after[key].dtype == value.dtype
            for key, value in state.items()
        )
        assert vars(state_after)["_metadata"] == metadata
        assert torch.equal(torch.random.get_rng_state(), generators[0])
        assert random.getstate() == generators[1]
        assert all(vars(block)[name] is value for name, value in before.items())
    assert vars(block) == before


@peers
@kinds
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_made_before_keeps_working(
    case: Case, optimizer: type, peer: Callable[[], Any]
) -> None:
    blocks = [stock_block(peer, case) for _ in range(2)]
    optimizers = [optimizer(block.parameters(), lr=1e-3) for block in blocks]
    accelerate(blocks[0])
    start = [p.detach().clone() for p in blocks[0].parameters()]
    smallest = [torch.full(p.shape, torch.inf, dtype=torch.float64) for p in start]
    for step in range(3):
        x, c = make_input(case, seed=step)
        for block, o in zip(blocks, optimizers, strict=True):
            o.zero_grad()
            (y,), logdet = block([x], c)
            ((0.5 * y.square().sum() - logdet.sum()) / y.numel()).backward()
            o.step()
        for seen, p in zip(smallest, blocks[1].parameters(), strict=True):
            seen.copy_(torch.minimum(seen, p.grad.abs()) if p.grad is not None else seen)
    for p, expected, old, seen in zip(
        *(block.parameters() for block in blocks), start, smallest, strict=True
    ):
        if not expected.requires_grad or seen.isinf().any():  # GIN does not use its scale
            assert torch.equal(p, old)
            continue
        # The gradients are of order 1 and agree to some 1e-15. Adam divides each by its own size,
        # which makes the error of one that is 1e-6 lr * 1e-15 / 1e-6.
        reliable = seen > 1e-6
        assert reliable.any() or seen.max() < 1e-14
        assert ((p - expected)[reliable].abs() <= 1e-11).all()
        assert (p - old).abs().max() > 1e-8 or seen.max() < 1e-14


@released
def test_hooks_still_fire(peer: Callable[[], Any]) -> None:
    calls = []
    block = stock_block(peer, Case(SHAPE, "hard"))
    block.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    block.register_forward_hook(lambda module, args, out: calls.append("forward"))
    block.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    block.subnet.register_forward_hook(lambda module, args, out: calls.append("subnet"))
    block.register_state_dict_post_hook(lambda *_: calls.append("state"))
    accelerate(block)
    assert calls == [], "accelerate must not run the block itself"
    block.register_forward_hook(lambda module, args, out: calls.append("later"))
    x, _ = make_input(HARD)

    def calls_of_a_pass() -> list[str]:
        calls.clear()
        (y,), logdet = block([x.clone().requires_grad_()])
        (y.sum() + logdet.sum()).backward()
        block.state_dict()
        return list(calls)

    fused = calls_of_a_pass()
    assert fused == ["pre", "subnet", "forward", "later", "backward", "state"]
    restore(block)
    assert [call for call in calls_of_a_pass() if call != "backward"] == [
        call for call in fused if call != "backward"
    ]


@released
def test_conditions_that_were_not_declared_are_ignored(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, Case(SHAPE, "hard"))
    x, _ = make_input(HARD)
    c = [torch.randn(2, 5, 3, 4)]
    expected = unwrapped(block([x], c))
    accelerate(block)
    for conditions in (c, (), None, []):
        for a, e in zip(unwrapped(block([x], conditions)), expected, strict=True):
            assert (a - e).abs().max() <= 200 * EPS * e.abs().max()


@released
def test_known_faults_of_the_stock_block_are_gone(peer: Callable[[], Any]) -> None:
    """They come with subnets that end in ReLU or return their input, and with empty batches."""
    block = peer()([(3, 4)], subnet_constructor=lambda *_: nn.Identity())
    accelerate(block)
    x = torch.randn(2, 3, 4)
    before = x.clone()
    block([x])
    assert torch.equal(x, before)
    assert block([x[:0]])[0][0].shape == (0, 3, 4)
    with pytest.raises(TypeError, match="list with one tensor"):
        block(x)
    with pytest.raises(ValueError, match=r"\(B, 3, S1\), got \(2, 4, 4\)"):
        block([torch.randn(2, 4, 4)])
    block = peer()(
        [(4,)], subnet_constructor=lambda i, o: nn.Sequential(nn.Linear(i, o), nn.ReLU())
    )
    accelerate(block)
    (y,), logdet = block([torch.randn(3, 4)])
    (y.sum() + logdet.sum()).backward()
    assert block.subnet[0].weight.grad.isfinite().all()


@released
def test_any_spatial_size_is_taken(peer: Callable[[], Any]) -> None:
    """The stock block takes any, too: msflow declares its blocks (C, 1, 1)."""
    case = Case(Shape(2, 6, (1, 1)), "cond")
    block = stock_block(peer, case)
    x, c = make_input(Case(Shape(2, 6, (5, 3)), "cond"))
    expected = unwrapped(block([x], c))
    assert report(accelerate(block)).changed
    for a, e in zip(unwrapped(block([x], c)), expected, strict=True):
        assert (a - e).abs().max() <= 500 * EPS * e.abs().max()


# --- reports, backends, contexts ------------------------------------------------------------------


@pytest.mark.peers
def test_report() -> None:
    stock = anomalib_block()
    own = fastflow_kernels.AllInOneBlock([(4,)], subnet_constructor=nn.Linear)
    odd = subclass(anomalib_block, **overriding("_affine"))([(4,)], subnet_constructor=nn.Linear)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(stock([(4,)], subnet_constructor=nn.Linear)), own, odd
    )
    before = report(model)
    assert [(entry.name, entry.state, entry.changed) for entry in before.entries] == [
        ("1.0", "left", False),
        ("2", "fused", False),
        ("3", "left", False),
    ]
    assert [entry.name for entry in before.left] == ["1.0", "3"]
    assert before.left[0].reason.startswith(
        "accelerate(model) would take it: computes dialect 'anomalib', SOFTPLUS, hard permutation"
    )
    assert str(before).splitlines()[0] == "1 of 3 blocks run fused"
    assert accelerate(model) is model
    after = report(model)
    assert [entry.state for entry in after.entries] == ["accelerated", "fused", "left"]
    assert [entry.name for entry in after.changed] == ["1.0"]
    assert [entry.name for entry in after.left] == ["3"]
    assert after.changed[0].kind == f"{stock.__module__}.AllInOneBlock"
    assert (
        after.changed[0].reason
        == "computes dialect 'anomalib', SOFTPLUS, hard permutation; backend 'auto'"
    )
    assert (
        after.entries[1].reason == "dialect 'anomalib', SOFTPLUS, hard permutation; backend 'auto'"
    )
    assert after.left[0].reason == "Mine overrides _affine"
    assert "Mine" in after.left[0].kind
    lines = str(after).splitlines()
    assert lines[0] == "2 of 3 blocks run fused"
    assert lines[-1].startswith("small inputs on a CPU run plain operations: up to 32768 elements")
    for line, entry in zip(lines[1:-1], after.entries, strict=True):
        assert line.split()[0] == entry.state
        assert entry.name in line
        assert entry.kind in line
        assert entry.reason in line
    assert report(accelerate(model)) == after
    assert report(accelerate(model, backend="eager")).changed[0].reason.endswith("backend 'eager'")
    assert "backend='eager'" in str(model)
    assert report(restore(model)) == before
    assert "the model itself" in str(report(model[1][0]))
    nothing = "no AllInOneBlock and no coupling block of FrEIA found in the model"
    assert str(report(nn.Linear(1, 1))) == nothing


def test_report_says_what_overrides_a_step_of_our_class() -> None:
    own = fastflow_kernels.AllInOneBlock([(4,)], subnet_constructor=nn.Linear)
    own._affine = own._affine
    (entry,) = report(own).entries
    assert (entry.state, entry.changed) == ("stock maths", False)
    assert "overridden" in entry.reason
    assert str(report(own)).startswith("0 of 1 blocks run fused")
    assert "small inputs" not in str(report(own))


def test_report_speaks_of_small_inputs_where_auto_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for backend, variable, is_noted in (
        ("auto", "", True),
        ("auto", "auto", True),
        ("auto", "eager", False),
        ("eager", "", False),
    ):
        monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", variable)
        block = fastflow_kernels.AllInOneBlock(
            [(4,)], subnet_constructor=nn.Linear, backend=backend
        )
        assert ("small inputs" in str(report(block))) == is_noted, (backend, variable)


def test_report_says_gin() -> None:
    own = fastflow_kernels.AllInOneBlock([(4,)], subnet_constructor=nn.Linear, gin_block=True)
    assert "dialect 'anomalib', GIN, hard permutation" in str(report(own))


@peers
def test_twice_and_back(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, HARD)
    cls = type(block)
    assert restore(block) is block
    assert accelerate(block) is block
    accelerated = type(block)
    assert accelerated is not cls
    after = report(block)
    accelerate(block)
    assert type(block) is accelerated
    assert report(block) == after
    assert_same_as_stock(block, peer, HARD)
    for _ in range(2):
        assert restore(block) is block
        assert type(block) is cls
    assert report(accelerate(block)).changed
    assert type(block) is accelerated
    assert_same_as_stock(block, peer, HARD)


@peers
def test_backend(peer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    block = stock_block(peer, Case(SHAPE, "hard"))
    cls = type(block)
    with pytest.raises(ValueError, match="backend.*got 'cuda'"):
        accelerate(block, backend="cuda")
    assert type(block) is cls
    x, _ = make_input(HARD)
    accelerate(block, backend="triton")
    with pytest.raises(RuntimeError, match="'triton' cannot be used here: the input is on cpu"):
        block([x])
    accelerate(block, backend="eager")
    block([x])
    accelerate(block)
    monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTFLOW_KERNELS_BACKEND"):
        block([x])


@pytest.mark.parametrize("model", [None, 3, "model", nn.Module, [nn.Linear(1, 1)], lambda x: x])
@pytest.mark.parametrize("change", [accelerate, restore])
def test_what_is_no_module(change: Callable[[Any], object], model: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got \w+"):
        change(model)


@peers
@pytest.mark.parametrize("name", ["hard", "soft", "hh1"])
def test_meta_device_is_left(name: str, peer: Callable[[], Any]) -> None:
    case = Case(SHAPE, name)
    block = stock_block(peer, case).to("meta")
    assert_left(block, "meta device")
    block.load_state_dict(stock_block(peer, case).state_dict(), assign=True)
    assert report(accelerate(block)).changed
    assert_same_as_stock(block, peer, case)


@released
@pytest.mark.parametrize(
    "context", ["no_grad", "inference_mode", "autocast", "float64 by default", "deterministic"]
)
def test_accelerate_in_any_context(context: str, peer: Callable[[], Any]) -> None:
    block = stock_block(peer, HARD)
    if context == "no_grad":
        with torch.no_grad():
            accelerate(block)
    elif context == "inference_mode":
        with torch.inference_mode():
            accelerate(block)
            unwrapped(block([make_input(HARD)[0]], make_input(HARD)[1]))
    elif context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            accelerate(block)
    elif context == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            accelerate(block)
        finally:
            torch.use_deterministic_algorithms(False)
    else:
        torch.set_default_dtype(torch.float64)
        try:
            accelerate(block)
        finally:
            torch.set_default_dtype(torch.float32)
    assert report(block).changed
    assert_same_as_stock(block, peer, HARD)
