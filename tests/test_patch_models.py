"""accelerate and restore on whole models: FrEIA's containers, and modules that users write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastflow_kernels
from fastflow_kernels import accelerate, report, restore
from tests.support.accelerated import (
    HARD,
    SHAPE,
    assert_results,
)
from tests.support.blocks import evaluate
from tests.support.cases import (
    Case,
    make_input,
    make_subnet,
)
from tests.support.peers import anomalib_block, freia
from tests.support.stock_blocks import released, stock_block

pytestmark = pytest.mark.usefixtures("fused")


class Flow(nn.Module):
    """Blocks one after the other, as in anomalib's models, and a convolution after them."""

    def __init__(self, peer: Callable[[], Any], case: Case) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"a": stock_block(peer, case, 1)})
        self.later = nn.ModuleList(
            [
                stock_block(peer, case.replace(name=name), seed)
                for seed, name in enumerate(("rev", "soft", "hh1"), 2)
            ]
        )
        self.head = nn.Conv2d(6, 6, 1).double()

    def forward(self, x: Tensor, c: list[Tensor], rev: bool = False) -> tuple[Tensor, Tensor]:
        blocks = [self.first["a"], *self.later]
        total = x.new_zeros(len(x))
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
    """Make a chain with other blocks and modules of FrEIA.

    A part of it runs backwards.
    """
    framework, modules = freia().framework, freia().modules
    base: Any = modules.InvertibleModule

    class Inverse(base):
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
    """Make a ReversibleGraphNet, which FrEIA 0.2 deprecates but still has."""
    return graph(peer, freia().framework.ReversibleGraphNet)


def graph(peer: Callable[[], Any], net: type | None = None) -> nn.Module:
    """Make a graph as UFlow does, with a split and with nodes that hold references of their own."""
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
        ["first.a", "later.0", "later.1", "later.2"],
    ),
    "sequence": (sequence, [f"module_list.{i}" for i in range(5)]),
    "mixed": (
        mixed,
        [
            "module_list.0",
            "module_list.1",
            "module_list.2",
            "module_list.3.module",
            "module_list.4.module_list.0",
            "module_list.6",
        ],
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
    for twin in (same, lower):
        twin.load_state_dict(model.state_dict())
    lower.float()
    classes = [type(module) for module in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    after = report(accelerate(model))
    assert [entry.name for entry in after.changed] == names
    assert not after.left
    assert [id(p) for p in model.parameters()] == parameters
    x, _ = make_input(HARD)
    c = [torch.randn(2, 2, 3, 4, dtype=torch.float64)] if kind != "flow" else []
    for rev in (False, True):
        for _ in range(2):  # the second time from the cache
            actual, truth = (evaluate(m, x, c, rev, wrap=False) for m in (model, same))
            baseline = evaluate(lower, x.float(), [t.float() for t in c], rev, wrap=False)
            # The chain's permutation rounds nothing, and its GLOWCouplingBlock is two couplings.
            assert_results(actual, truth, baseline, blocks=len(names))
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
    assert [entry.name for entry in report(accelerate(model.later)).changed] == ["0", "1", "2"]
    assert [entry.name for entry in report(model).left] == ["first.a"]
    assert not report(accelerate(model)).left
    restore(model.first)
    assert [entry.name for entry in report(model).changed] == ["later.0", "later.1", "later.2"]
    assert not report(restore(model)).changed


@pytest.mark.peers
def test_block_that_stands_in_two_places_is_changed_once() -> None:
    block = stock_block(anomalib_block, Case(SHAPE, "hard"))
    model = nn.ModuleList([block, block])
    assert [entry.name for entry in report(accelerate(model)).changed] == ["0"]
    assert model[0] is model[1] is block
    assert not report(restore(model)).changed


@pytest.mark.peers
def test_report_says_that_a_graph_cannot_be_reversible() -> None:
    """The warning of accelerate(graph, reversible=True) sends its reader there."""
    framework = freia().framework
    start = framework.InputNode(4)
    block = framework.Node(start, anomalib_block(), {"subnet_constructor": nn.Linear})
    model = framework.GraphINN([start, block, framework.OutputNode(block)])
    with pytest.warns(UserWarning, match="no chain of the model was made reversible"):
        accelerate(model, reversible=True)
    (entry,) = report(model).chains
    assert (entry.state, entry.reason) == (
        "left",
        "a GraphINN cannot be made reversible; a SequenceINN of the same blocks can",
    )
    assert not report(framework.GraphINN([start, framework.OutputNode(start)])).chains


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
    # This block now runs the stock maths, so its input is not reconstructed.
    model.module_list[0]._affine = model.module_list[1]._affine
    assert report(model).chains[0].reason.startswith("4 of its 5")
    own = fastflow_kernels.ReversibleSequence(4)
    own.append(fastflow_kernels.AllInOneBlock, subnet_constructor=nn.Linear)
    (entry,) = report(own).chains
    assert (entry.state, entry.changed, entry.reason[:8]) == ("reversible", False, "1 of its")
