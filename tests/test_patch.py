"""accelerate and restore: stock blocks made fast in place, in whatever holds them, and nothing else
about them changed.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastflow_kernels
import reference
from bench.peers import anomalib_block, freia
from fastflow_kernels import accelerate, modules, report, restore
from tests.support.blocks import through_a_file, unwrapped
from tests.support.cases import CASES as ALL_CASES
from tests.support.cases import (
    DIALECTS,
    Case,
    Shape,
    both_dialects,
    ids,
    make_block,
    make_input,
    make_subnet,
)
from tests.support.compare import assert_close
from tests.support.peers import freia_main_block, peers, released, stock_block

pytestmark = pytest.mark.usefixtures("fused")

EPS = torch.finfo(torch.float64).eps


CASES = [case for case in ALL_CASES if case.dialect == "anomalib"]  # the peers know no dialect
SHAPE = Shape(2, 6, (3, 4))
HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER, GIN = (
    Case(SHAPE, name)
    for name in ("cond2-rev", "soft-rev-exp", "hh3-rev-cond", "hh2-soft-sigmoid", "gin-rev-cond")
)
kinds = pytest.mark.parametrize(
    "case",
    [HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER, GIN],
    ids=["hard", "soft", "hh", "hh-soft", "gin"],
)


def same_block(
    peer: Callable[[], Any], block: nn.Module, case: Case, dtype: torch.dtype
) -> nn.Module:
    """A stock block with this one's parameters, whatever it has become since."""
    other = make_block(peer(), case)
    other.load_state_dict(block.state_dict())
    other.clamp = block.clamp
    return other.to(dtype)


def evaluate(
    model: nn.Module, x: Tensor, c: list[Tensor], rev: bool, wrap: bool = True
) -> dict[str, Tensor | None]:
    """Output, log-determinant, and the gradients of a random linear function of both to everything
    that takes one.

    ``wrap``: the model is a block, which wants a list and returns a tuple. Else it is one of
    FrEIA's containers.
    """
    x, c = x.detach().clone().requires_grad_(), [t.detach().clone().requires_grad_() for t in c]
    y, logdet = model([x] if wrap else x, c, rev=rev)
    y = y[0] if wrap else y
    generator = torch.Generator().manual_seed(2)
    dy, dlogdet = (
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, logdet)
    )
    model.zero_grad()
    torch.autograd.backward([y, logdet], [dy, dlogdet])
    grads = {"grad x": x.grad, **{f"grad c{i}": t.grad for i, t in enumerate(c)}}
    grads |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    grads = {name: None if t is None else t.clone() for name, t in grads.items()}
    model.zero_grad()
    return {"output": y.detach(), "log-det": logdet.detach(), **grads}


def assert_results(
    actual: dict[str, Tensor | None],
    truth: dict[str, Tensor | None],
    baseline: dict[str, Tensor | None],
    gin: float = 0.0,
    blocks: int = 1,
) -> None:
    """The design's criterion in float64: ``truth`` is the stock block, ``baseline`` the stock block
    in float32.

    Its floor, which is 4 roundings of the largest value, is made that of tests/test_peers.py, 4 +
    sqrt(terms) roundings, for each block: truth and result sum in two orders here, and the error of
    one float32 run says too little about either where that has been lucky.
    """
    assert actual.keys() == truth.keys()
    terms = truth["output"].numel()
    for name, value in truth.items():
        if value is None:
            assert actual[name] is None, name
            continue
        # the log-determinant of GIN is a sum of log-factors, each up to the clamp, that cancel
        largest = (
            gin if gin and name == "log-det" else value.abs().max().item() if value.numel() else 0.0
        )
        assert_close(
            actual[name],
            value,
            baseline[name],
            name,
            magnitude=blocks * largest * (1 + 0.25 * terms**0.5),
        )


def assert_same_as_stock(block: nn.Module, peer: Callable[[], Any], case: Case) -> None:
    """Output, log-determinant and gradients of both directions, with the parameters that the block
    has now.
    """
    truth_block, baseline_block = (
        same_block(peer, block, case, dtype) for dtype in (torch.float64, torch.float32)
    )
    x, c = make_input(case)
    gin = abs(block.clamp) * max(1, x[0].numel()) ** 0.5 if block.GIN else 0.0
    for rev in (False, True):
        actual, truth = (evaluate(b, x, c, rev) for b in (block, truth_block))
        baseline = evaluate(baseline_block, x.float(), [t.float() for t in c], rev)
        assert_results(actual, truth, baseline, gin)
        with torch.no_grad():
            (y,), logdet = block([x], c, rev=rev)
        assert_results(
            {"output": y, "log-det": logdet},
            {k: truth[k] for k in ("output", "log-det")},
            baseline,
            gin,
        )


def assert_equal_results(actual: nn.Module, expected: nn.Module, case: Case) -> None:
    x, c = make_input(case)
    for rev in (False, True):
        a, e = (evaluate(block, x, c, rev) for block in (actual, expected))
        assert a.keys() == e.keys()
        for name, value in e.items():
            assert value is a[name] is None or torch.equal(a[name], value), name


def is_fused(block: nn.Module) -> bool:
    """Whether a call of a block runs the fused function."""
    with (
        mock.patch.object(modules, "evaluate", wraps=modules.evaluate) as fused,
        torch.no_grad(),
    ):
        c = (
            [torch.zeros(1, block.condition_channels, *block.dims_in[0][1:])]
            if block.conditional
            else []
        )
        x = torch.zeros(1, *block.dims_in[0]).to(block.global_scale)
        block([x], [t.to(x) for t in c])
    return fused.called


# --- one block ------------------------------------------------------------------------------------


@peers
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_accelerated_block_gives_the_same(case: Case, peer: Callable[[], Any]) -> None:
    """Every option on two shapes, every shape with the options that matter to it."""
    block = stock_block(peer, case)
    stock_class = type(block)
    said = report(accelerate(block))
    assert len(said.changed) == 1, str(said)
    expected = "freia" if peer is freia_main_block else "anomalib"
    # with one channel there is no active half, and so no clamp; and a single log-factor is its own
    # mean, which GIN takes out
    if case.shape.channels > 1 and not (block.GIN and math.prod(case.shape.full[1:]) < 4):
        assert f"'{expected}'" in said.changed[0].reason
    assert case.options.get("global_affine_type", "SOFTPLUS") in said.changed[0].reason or block.GIN
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
        block.state_dict()._metadata,
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
        now = block.state_dict()
        assert list(now) == list(state)
        assert all(
            torch.equal(now[key], value) and now[key].dtype == value.dtype
            for key, value in state.items()
        )
        assert now._metadata == metadata
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
        if not expected.requires_grad or seen.isinf().any():  # GIN has no use for its scale
            assert torch.equal(p, old)
            continue
        # the gradients are of order 1 and agree to some 1e-15. Adam divides each by its own size:
        # lr * 1e-15 / 1e-6 of one that is 1e-6
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
    assert calls == [], "the block itself is not to be asked"
    block.register_forward_hook(lambda module, args, out: calls.append("later"))
    x, _ = make_input(HARD)

    def passed() -> list[str]:
        calls.clear()
        (y,), logdet = block([x.clone().requires_grad_()])
        (y.sum() + logdet.sum()).backward()
        block.state_dict()
        return list(calls)

    fused = passed()
    assert fused == ["pre", "subnet", "forward", "later", "backward", "state"]
    restore(block)
    assert [call for call in passed() if call != "backward"] == [
        call for call in fused if call != "backward"
    ]


@released
def test_conditions_that_were_not_declared_are_ignored(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, Case(SHAPE, "hard"))
    x, _ = make_input(HARD)
    c = [torch.randn(2, 5, 3, 4)]
    expected = unwrapped(block([x], c))
    accelerate(block)
    for given in (c, (), None, []):
        for a, e in zip(unwrapped(block([x], given)), expected, strict=True):
            assert (a - e).abs().max() <= 200 * EPS * e.abs().max()


@released
def test_known_faults_of_the_stock_block_are_gone(peer: Callable[[], Any]) -> None:
    """Subnets that end in ReLU, an identity that returns its input, empty batches."""
    block = peer()([(3, 4)], subnet_constructor=lambda *_: nn.Identity())
    accelerate(block)
    x = torch.randn(2, 3, 4)
    given = x.clone()
    block([x])
    assert torch.equal(x, given)
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
    """As the stock block does (msflow declares its blocks (C, 1, 1))."""
    case = Case(Shape(2, 6, (1, 1)), "cond")
    block = stock_block(peer, case)
    x, c = make_input(Case(Shape(2, 6, (5, 3)), "cond"))
    expected = unwrapped(block([x], c))
    assert report(accelerate(block)).changed
    for a, e in zip(unwrapped(block([x], c)), expected, strict=True):
        assert (a - e).abs().max() <= 500 * EPS * e.abs().max()


# --- containers -----------------------------------------------------------------------------------


class Flow(nn.Module):
    """Blocks one after the other, as anomalib's models hold them; with one block of another
    kind.
    """

    def __init__(self, peer: Callable[[], Any], case: Case) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"a": stock_block(peer, case, 1)})
        self.rest = nn.ModuleList(
            [
                stock_block(peer, case.replace(name=name), seed)
                for seed, name in enumerate(("rev", "soft", "hh1"), 2)
            ]
        )
        self.head = nn.Conv2d(6, 6, 1).double()

    def forward(self, x: Tensor, c: list[Tensor], rev: bool = False) -> tuple[Tensor, Tensor]:
        blocks = [self.first["a"], *self.rest]
        total = 0.0
        for block in reversed(blocks) if rev else blocks:
            (x,), logdet = block([x], rev=rev)
            total = total + logdet
        return self.head(x), total


def sequence(peer: Callable[[], Any]) -> nn.Module:
    model = freia().framework.SequenceINN(*SHAPE.full[1:])
    torch.manual_seed(4)
    np.random.seed(4)  # rotations
    for name, cond in [("hard", None), ("gin", 0), ("soft", None), ("hh1", 0), ("rev", None)]:
        case = Case(SHAPE, name)
        model.append(
            peer(),
            cond=cond,
            cond_shape=(2, *SHAPE.spatial),
            subnet_constructor=make_subnet(2),
            **case.options,
        )
    return model.double()


def mixed(peer: Callable[[], Any]) -> nn.Module:
    """With FrEIA's other modules in between, which stay what they are, and a part that is run
    backwards.
    """
    framework, modules = freia().framework, freia().modules

    class Inverse(modules.InvertibleModule):
        def __init__(self, dims_in: list[tuple[int, ...]], module: type, **arguments: Any) -> None:
            super().__init__(dims_in)
            self.module = module(dims_in, **arguments)

        def forward(self, x: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Any:
            return self.module(x, c, rev=not rev, jac=jac)

        def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
            return input_dims

    torch.manual_seed(4)
    np.random.seed(4)  # rotations
    model = framework.SequenceINN(*SHAPE.full[1:])
    model.append(peer(), cond=0, cond_shape=(2, *SHAPE.spatial), subnet_constructor=make_subnet(2))
    model.append(modules.PermuteRandom, seed=1)
    model.append(modules.GLOWCouplingBlock, subnet_constructor=make_subnet(2))
    model.append(Inverse, module=peer(), subnet_constructor=make_subnet(2))
    model.append(lambda dims_in: framework.SequenceINN(*dims_in[0], force_tuple_output=True))
    model[4].append(peer(), subnet_constructor=make_subnet(2), permute_soft=True)
    model.append(modules.Flatten)
    model.append(peer(), subnet_constructor=make_subnet(0))
    model.append(modules.Reshape, output_dims=SHAPE.full[1:])
    return model.double()


def reversible_graph_net(peer: Callable[[], Any]) -> nn.Module:
    """Deprecated in FrEIA 0.2, and still there."""
    return graph(peer, freia().framework.ReversibleGraphNet)


def graph(peer: Callable[[], Any], net: type | None = None) -> nn.Module:
    """As UFlow builds it: a split in between, and nodes that hold references of their own."""
    framework, modules = freia().framework, freia().modules
    torch.manual_seed(4)
    np.random.seed(4)  # rotations
    start = framework.InputNode(*SHAPE.full[1:], name="in")
    condition = framework.ConditionNode(2, *SHAPE.spatial)
    arguments = {"subnet_constructor": make_subnet(2)}
    one = framework.Node(start, peer(), arguments, conditions=condition)
    split = framework.Node(one, modules.Split, {"section_sizes": [2, 4], "dim": 0})
    two = framework.Node(split.out1, peer(), {**arguments, "reverse_permutation": True})
    joined = framework.Node([split.out0, two.out0], modules.Concat, {"dim": 0})
    three = framework.Node(joined, peer(), {**arguments, "learned_householder_permutation": 2})
    model = (net or framework.GraphINN)(
        [start, condition, one, split, two, joined, three, framework.OutputNode(three)],
        verbose=False,
    )
    return model.double()


MODELS: dict[str, tuple[Callable[[Any], nn.Module], list[str]]] = {
    "flow": (
        lambda peer: Flow(peer, Case(SHAPE, "hard")),
        ["first.a", "rest.0", "rest.1", "rest.2"],
    ),
    "sequence": (sequence, [f"module_list.{i}" for i in range(5)]),
    "mixed": (
        mixed,
        ["module_list.0", "module_list.3.module", "module_list.4.module_list.0", "module_list.6"],
    ),
    "graph": (graph, ["module_list.0", "module_list.2", "module_list.4"]),
    "reversible graph net": (
        reversible_graph_net,
        ["module_list.0", "module_list.2", "module_list.4"],
    ),
}


@released
@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str, peer: Callable[[], Any]) -> None:
    build, names = MODELS[kind]
    model, same, lower = build(peer), build(peer), build(peer)
    for other in (same, lower):
        other.load_state_dict(model.state_dict())
    lower.float()
    classes = [type(module) for module in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    said = report(accelerate(model))
    assert [entry.name for entry in said.changed] == names
    assert not said.left
    assert [id(p) for p in model.parameters()] == parameters
    x, _ = make_input(HARD)
    c = [torch.randn(2, 2, 3, 4, dtype=torch.float64)] if kind != "flow" else []
    for rev in (False, True):
        for _ in range(2):  # the second time from what was kept
            actual, truth = (evaluate(m, x, c, rev, wrap=False) for m in (model, same))
            baseline = evaluate(lower, x.float(), [t.float() for t in c], rev, wrap=False)
            # FrEIA's GLOWCouplingBlock is two couplings more
            assert_results(actual, truth, baseline, blocks=len(names) + 2 * (kind == "mixed"))
    if hasattr(model, "node_list"):
        assert all(
            node.module is None or node.module in set(model.module_list) for node in model.node_list
        )
    made = copy.deepcopy(model)
    assert not {id(p) for p in made.parameters()} & set(parameters)
    assert_equal_dicts(
        evaluate(made, x, c, False, wrap=False), evaluate(model, x, c, False, wrap=False)
    )
    if hasattr(model, "node_list"):
        assert all(
            node.module is None or node.module in set(made.module_list) for node in made.node_list
        )
    for m in (model, made):
        assert [entry.name for entry in report(restore(m)).left] == names
        assert [type(module) for module in m.modules()] == classes
        for rev in (False, True):
            assert_equal_dicts(
                evaluate(m, x, c, rev, wrap=False), evaluate(same, x, c, rev, wrap=False)
            )


def assert_equal_dicts(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is actual[name] is None or torch.equal(actual[name], value), name


@pytest.mark.peers
def test_part_of_a_model() -> None:
    model = Flow(anomalib_block, Case(SHAPE, "hard"))
    assert [entry.name for entry in report(accelerate(model.rest)).changed] == ["0", "1", "2"]
    assert [entry.name for entry in report(model).left] == ["first.a"]
    assert not report(accelerate(model)).left
    restore(model.first)
    assert [entry.name for entry in report(model).changed] == ["rest.0", "rest.1", "rest.2"]
    assert not report(restore(model)).changed


@pytest.mark.peers
def test_block_that_stands_in_two_places_is_changed_once() -> None:
    block = stock_block(anomalib_block, Case(SHAPE, "hard"))
    model = nn.ModuleList([block, block])
    assert [entry.name for entry in report(accelerate(model)).changed] == ["0"]
    assert model[0] is model[1] is block
    assert not report(restore(model)).changed


# --- what changes later takes effect --------------------------------------------------------------


@torch.no_grad()
def _write(
    block: nn.Module, state: dict[str, Tensor], write: Callable[[Tensor, Tensor], object]
) -> None:
    for name in ("w_0", "w_perm", "w_perm_inv"):
        if name in state:
            write(getattr(block, name), state[name])


def _replace(block: nn.Module, state: dict[str, Tensor]) -> None:
    for name in ("w_0", "w_perm", "w_perm_inv"):
        if name in state:
            setattr(block, name, nn.Parameter(state[name].clone(), requires_grad=False))


CHANGES: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "load_state_dict": lambda block, state: block.load_state_dict(state),
    "assign": lambda block, state: block.load_state_dict(
        {key: value.clone() for key, value in state.items()}, assign=True
    ),
    "copy_": lambda block, state: _write(block, state, lambda p, value: p.copy_(value)),
    "data.copy_": lambda block, state: _write(block, state, lambda p, value: p.data.copy_(value)),
    "data": lambda block, state: _write(
        block, state, lambda p, value: setattr(p, "data", value.clone())
    ),
    "another parameter": _replace,
}


@peers
@pytest.mark.parametrize("case", [HARD, SOFT, HOUSEHOLDER], ids=["hard", "soft", "hh"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_permutation_takes_effect(change: str, case: Case, peer: Callable[[], Any]) -> None:
    block = stock_block(peer, case)
    accelerate(block)
    assert_same_as_stock(block, peer, case)
    for seed in (11, 12):  # more than once: memory that was given up may come back
        CHANGES[change](block, stock_block(peer, case, seed).state_dict())
        assert_same_as_stock(block, peer, case)
    restore(block)
    assert_equal_results(block, same_block(peer, block, case, torch.float64), case)


@released
@pytest.mark.parametrize("when", ["before", "after", "after a pass"])
@pytest.mark.parametrize("what", ["rotation", "rotation and back", "not the inverse", "shear"])
@pytest.mark.parametrize("through", ["copy_", "data.copy_"])
def test_hard_block_with_a_matrix_that_is_no_permutation(
    when: str, what: str, through: str, peer: Callable[[], Any]
) -> None:
    """The stock block multiplies by whatever it holds, and so does the accelerated one."""
    case = Case(SHAPE, "rev")
    if what == "shear" and through == "data.copy_" and when == "after a pass":
        # writes past autograd's back are noticed where a 1 has gone, which they are for every
        # orthogonal matrix
        return
    block = stock_block(peer, case)
    old = {name: getattr(block, name).clone() for name in ("w_perm", "w_perm_inv")}
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    w, w_inv = q, q.T
    if what == "not the inverse":
        w, w_inv = old["w_perm"], old["w_perm_inv"].flip(0)
    if what == "shear":
        # has a 1 wherever the permutation has
        w = old["w_perm"].view(6, 6) + 0.5 * old["w_perm"].view(6, 6).roll(1, 0)
        w_inv = torch.linalg.inv(w)
    if when.startswith("after"):
        assert report(accelerate(block)).changed
    if when == "after a pass":
        assert_same_as_stock(block, peer, case)
    CHANGES[through](
        block, {"w_perm": w.reshape(6, 6, 1, 1), "w_perm_inv": w_inv.reshape(6, 6, 1, 1)}
    )
    if when == "before":
        assert report(accelerate(block)).changed
    assert_same_as_stock(block, peer, case)
    if what == "rotation and back":
        CHANGES[through](block, old)
        assert_same_as_stock(block, peer, case)


@released
@kinds
def test_conversion_and_moves(case: Case, peer: Callable[[], Any]) -> None:
    block = stock_block(peer, case, dtype=torch.float32)
    assert report(accelerate(block)).changed
    x, c = make_input(case, torch.float32)
    for convert, dtype in [
        (nn.Module.double, torch.float64),
        (nn.Module.float, torch.float32),
        (lambda b: b.to("cpu", torch.float64), torch.float64),
    ]:
        convert(block)
        (y,), logdet = block([x.to(dtype)], [t.to(dtype) for t in c])
        assert y.dtype == logdet.dtype == block.global_scale.dtype == dtype
    assert_same_as_stock(block, peer, case)


@released
def test_options_that_are_changed_later_take_effect(peer: Callable[[], Any]) -> None:
    """The stock block reads them at each call."""
    block, same = (stock_block(peer, Case(SHAPE, "hard")) for _ in range(2))
    accelerate(block)
    x, _ = make_input(HARD)
    for name, value in [("clamp", 0.7), ("reverse_pre_permute", True), ("GIN", True)]:
        before = unwrapped(block([x]))
        for b in (block, same):
            setattr(b, name, value)
        actual, expected = unwrapped(block([x])), unwrapped(same([x]))
        assert any(not torch.equal(a, b) for a, b in zip(actual, before, strict=True))
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).abs().max() <= 500 * EPS * max(e.abs().max().item(), 12.0)


@released
@pytest.mark.parametrize("name", ["hard", "rev", "soft", "hh1"])
def test_learned_permutation_keeps_its_gradient(name: str, peer: Callable[[], Any]) -> None:
    """Who asks for a gradient of the permutation's matrix gets it, as from the stock block."""
    case = Case(SHAPE, name)
    block, same = (stock_block(peer, case) for _ in range(2))
    for b in (block, same):
        (b.w_0 if name == "hh1" else b.w_perm).requires_grad_()
    assert report(accelerate(block)).changed
    x, c = make_input(case)
    actual, truth = (evaluate(b, x, c, False) for b in (block, same))
    assert_results(actual, truth, evaluate(same.float(), x.float(), [t.float() for t in c], False))
    assert truth["grad w_0" if name == "hh1" else "grad w_perm"].abs().max() > 0


# --- which maths: asked, not guessed --------------------------------------------------------------


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
    """What every copy of the block has, written from its documentation; the maths is the
    subclasses'.
    """

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
    given: Callable[[Tensor], Tensor] = lambda x1: x1,
) -> type:
    """A copy of the block in somebody's repository, with or without a change of its maths; it
    derives from no AllInOneBlock.
    """

    class AllInOneBlock(Interface):
        def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
            a = a * small
            s, t = soft(a[:, : x.shape[1]], self.clamp), shift * a[:, x.shape[1] :]
            j = volume * s.sum(self.sum_dims)
            return ((x - t) * torch.exp(-unscale * s), -j) if rev else (x * torch.exp(s) + t, j)

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
            x2, j = self._affine(x2, self.subnet(given(x1)), rev)
            v = torch.cat((x1, x2), 1)
            if not rev:
                v, log_scale = self._permute(v)
            return (v,), j + (-1) ** rev * v[0, 0].numel() * log_scale

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
    "what the subnet is given": {"given": lambda x1: 2.0 * x1},
    "order of what the subnet is given": {"given": lambda x1: x1.flip(1)},
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
    """The stock block lets it change the passive half; only where that is a copy, behind a
    condition, ours can do the same.
    """

    def subnet(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(i, o, 1))

    assert_left(peer()([(6, 4)], subnet_constructor=subnet), "in-place")
    assert report(accelerate(peer()([(6, 4)], [(2, 4)], subnet_constructor=subnet))).changed


def assert_left(block: nn.Module, match: str) -> None:
    """Not touched, with a reason and a warning, and restore finds nothing to do."""
    cls, attributes = type(block), dict(vars(block))
    with pytest.warns(
        UserWarning,
        match=r"no block of the model runs fused; print\(fastflow_kernels.report\(model\)\) says why",
    ) as caught:
        accelerate(block)
    assert len(caught) == 1
    said = report(block)
    assert not said.changed
    (entry,) = said.left
    assert match in entry.reason, entry.reason
    assert match in str(said)
    restore(block)
    assert type(block) is cls
    assert vars(block) == attributes


# --- subclasses and overrides ---------------------------------------------------------------------


def subclass(peer: Callable[[], Any], **methods: Any) -> type:
    base = peer()
    base = base.func if isinstance(base, functools.partial) else base
    return type("Mine", (base,), methods)


def overriding(name: str) -> dict[str, Any]:
    """A method that calls the stock one and adds something."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return {name: method}


STEPS = ["forward", "_affine", "_permute", "_pre_permute", "_construct_householder_permutation"]


@released
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["hard", "hh3-rev-cond"])
def test_subclass_that_overrides_a_step_is_left(
    step: str, name: str, peer: Callable[[], Any]
) -> None:
    case = Case(SHAPE, name)
    block = make_block(subclass(peer, **overriding(step)), case)
    assert_left(block, f"overrides {step}")
    # not by the class itself, but by its base
    block = make_block(type("MineToo", (subclass(peer, **overriding(step)),), {}), case)
    assert_left(block, f"overrides {step}")


@released
@pytest.mark.parametrize("step", STEPS)
def test_override_of_one_object_is_left(step: str, peer: Callable[[], Any]) -> None:
    block = stock_block(peer, HARD)
    setattr(block, step, lambda *args, **kwargs: None)
    assert_left(block, f"overrides {step}")


@released
@kinds
def test_benign_subclass_is_accelerated(case: Case, peer: Callable[[], Any]) -> None:
    stock = peer()

    class Named(stock):
        """Adds to the constructor, the shapes and the description only."""

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
    stock = peer()

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


# --- copies ---------------------------------------------------------------------------------------


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "torch.save": through_a_file,
}


@released
@pytest.mark.parametrize(
    "case", [HARD, HOUSEHOLDER, SOFT_HOUSEHOLDER], ids=["hard", "hh", "hh-soft"]
)
@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("used", ["fresh", "used", "used before"])
def test_copies(
    used: str, method: str, case: Case, peer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stock pass ("used before") a Householder block holds its matrix with the graph: that
    must not be in the way.
    """
    block = stock_block(peer, case)
    x, c = make_input(case)
    if used == "used before":
        evaluate(block, x, c, True)
    accelerate(block)
    if used == "used":
        evaluate(block, x, c, True)
    made = COPIES[method](block)
    assert type(made) is type(block)
    assert list(made.state_dict()) == list(block.state_dict())
    assert_equal_results(made, block, case)
    if method != "copy":
        assert not {p.data_ptr() for p in made.parameters()} & {
            p.data_ptr() for p in block.parameters()
        }
        made.load_state_dict(stock_block(peer, case, 12).state_dict())
        assert_same_as_stock(made, peer, case)
    assert_same_as_stock(block, peer, case)
    restore(made)
    assert type(made) is peer()
    assert type(block) is not peer(), "a copy's restoring is not the original's"
    assert_equal_results(made, same_block(peer, made, case, torch.float64), case)

    restore(block)
    if case.options.get("learned_householder_permutation") and used == "used":
        block = stock_block(peer, case)  # a pass of the stock block itself is not asked for here
    # FrEIA 0.2's own class holds lambdas (global_scale_activation), which no pickle takes:
    # accelerated or not, that is the stock block's.
    if method in ("copy", "deepcopy") or peer is anomalib_block:
        assert_equal_results(COPIES[method](block), block, case)


@released
def test_copy_of_a_restored_model_is_pickled_as_before(
    peer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """restore gives back the object as it was: also what can be pickled of it, and what cannot."""
    block = stock_block(peer, Case(SHAPE, "hard"))

    def pickles() -> bool:
        try:
            pickle.dumps(block)
        except (AttributeError, pickle.PicklingError):
            return False
        return True

    before = pickles()
    accelerate(block)
    assert pickles()
    restore(block)
    assert pickles() == before


@released
def test_graph_of_a_stock_pass_is_let_go(peer: Callable[[], Any]) -> None:
    """A stock Householder block keeps the graph of its last pass alive."""
    block = stock_block(peer, HOUSEHOLDER)
    x, c = make_input(HOUSEHOLDER)
    block([x], c, rev=True)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(block)
    kept = weakref.ref(block.w_perm)
    accelerate(block)
    assert kept() is None
    copy.deepcopy(block)
    block([x], c, rev=True)
    copy.deepcopy(block)
    restore(block)
    copy.deepcopy(block)
    block([x], c, rev=True)


# --- what is said ---------------------------------------------------------------------------------


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
    said = report(model)
    assert [entry.state for entry in said.entries] == ["accelerated", "fused", "left"]
    assert [entry.name for entry in said.changed] == ["1.0"]
    assert [entry.name for entry in said.left] == ["3"]
    assert said.changed[0].kind == f"{stock.__module__}.AllInOneBlock"
    assert (
        said.changed[0].reason
        == "computes dialect 'anomalib', SOFTPLUS, hard permutation; backend 'auto'"
    )
    assert (
        said.entries[1].reason == "dialect 'anomalib', SOFTPLUS, hard permutation; backend 'auto'"
    )
    assert said.left[0].reason == "Mine overrides _affine"
    assert "Mine" in said.left[0].kind
    lines = str(said).splitlines()
    assert lines[0] == "2 of 3 blocks run fused"
    assert len(lines) == 4
    for line, entry in zip(lines[1:], said.entries, strict=True):
        assert line.split()[0] == entry.state
        assert entry.name in line
        assert entry.kind in line
        assert entry.reason in line
    assert report(accelerate(model)) == said
    assert report(accelerate(model, backend="eager")).changed[0].reason.endswith("backend 'eager'")
    assert "backend='eager'" in str(model)
    assert report(restore(model)) == before
    assert "the model itself" in str(report(model[1][0]))
    assert str(report(nn.Linear(1, 1))) == "no AllInOneBlock found in the model"


def test_report_says_what_overrides_a_step_of_our_class() -> None:
    own = fastflow_kernels.AllInOneBlock([(4,)], subnet_constructor=nn.Linear)
    own._affine = own._affine
    (entry,) = report(own).entries
    assert (entry.state, entry.changed) == ("stock maths", False)
    assert "overridden" in entry.reason
    assert str(report(own)).startswith("0 of 1 blocks run fused")


@pytest.mark.peers
def test_report_of_chains() -> None:
    model = sequence(anomalib_block)
    (entry,) = report(model).chains
    assert (entry.state, entry.changed) == ("left", False)
    assert entry.reason.startswith("accelerate(model, reversible=True) would take it")
    assert type(model) is freia().framework.SequenceINN
    (entry,) = report(accelerate(model, reversible=True)).chains
    assert (entry.state, entry.changed, entry.reason[:8]) == ("reversible", True, "5 of its")
    assert "1 of 1 chains are reversible" in str(report(model))
    # runs the stock maths, which nothing reconstructs
    model.module_list[0]._affine = model.module_list[1]._affine
    assert report(model).chains[0].reason.startswith("4 of its 5")
    own = fastflow_kernels.ReversibleSequence(4)
    own.append(fastflow_kernels.AllInOneBlock, subnet_constructor=nn.Linear)
    (entry,) = report(own).chains
    assert (entry.state, entry.changed, entry.reason[:8]) == ("reversible", False, "1 of its")


@peers
def test_twice_and_back(peer: Callable[[], Any]) -> None:
    block = stock_block(peer, HARD)
    cls = type(block)
    assert restore(block) is block
    assert accelerate(block) is block
    accelerated = type(block)
    assert accelerated is not cls
    held = block._fastflow
    accelerate(block)
    assert type(block) is accelerated
    assert block._fastflow == held
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
