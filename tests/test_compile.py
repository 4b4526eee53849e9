"""Test torch.compile: one graph for every batch and image size, without breaks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import reference
from fastflow_kernels import AllInOneBlock, accelerate, report
from tests.support.cases import Case, Shape, both_directions, make_block

pytestmark = pytest.mark.usefixtures("fused", "fresh_compiler")


def _compile(block: nn.Module) -> Any:
    return torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")


def _count_graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# Sizes on both sides of predicates.SMALL, which must not matter here. Those of the first input
# differ, because torch uses one symbol for equal sizes.
SIZES = [(4, 9, 7), (2, 8, 8), (9, 64, 40), (4, 64, 64)]


@both_directions
@pytest.mark.parametrize("name", ["hard", "gin-rev-cond", "soft", "hh1", "hh3-rev-cond"])
def test_every_batch_and_image_size_runs_the_same_graph(name: str, rev: bool) -> None:
    case = Case(Shape(2, 6, (8, 8)), name)
    block = make_block(AllInOneBlock, case, torch.float32)
    compiled = _compile(block)
    for batch, *spatial in SIZES:
        x = torch.randn(batch, 6, *spatial, requires_grad=True)
        c = [torch.randn(batch, width, *spatial) for width in case.conditions]
        results = []
        for model in (compiled, block):
            (y,), logdet = model([x], c, rev=rev)
            loss = y.square().mean() + logdet.mean() / x[0].numel()
            results.append((y, logdet, torch.autograd.grad(loss, x)[0]))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(
                actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
            )
    assert _count_graphs() == 1


def test_every_batch_of_rows_runs_the_same_graph() -> None:
    block = make_block(AllInOneBlock, Case(Shape(2, 64), "cond"), torch.float32)
    compiled = _compile(block)
    for batch in (5, 2, 600, 64):
        x, c = torch.randn(batch, 64), [torch.randn(batch, 3)]
        for actual, expected in zip(compiled([x], c), block([x], c), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert _count_graphs() == 1


@pytest.mark.parametrize("name", ["hard", "soft", "hh1"])
def test_autocast_runs_one_graph(name: str) -> None:
    block = make_block(AllInOneBlock, Case(Shape(2, 6, (8, 8)), name), torch.float32)
    compiled, x = _compile(block), torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled([x]), block([x])
    for a, e in zip((actual[0][0], actual[1]), (expected[0][0], expected[1]), strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * e.abs().max().item())
    assert _count_graphs() == 1


def test_calls_without_compilation_in_between_cost_no_other_graph() -> None:
    """Such calls refresh the cached permutation, which is an input of the graph."""
    block = make_block(AllInOneBlock, Case(Shape(2, 6, (8, 8)), "hard"), torch.float32)
    compiled, x = _compile(block), torch.randn(2, 6, 8, 8)
    before = compiled([x])[0][0]
    with torch.no_grad():
        block.w_perm.copy_(block.w_perm.roll(1, 0))
        block.w_perm_inv.copy_(block.w_perm.transpose(0, 1))
    expected = block([x])[0][0]
    after = compiled([x])[0][0]
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after)
    assert _count_graphs() == 1


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as built": lambda block: block,
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "double": lambda block: block.double(),
    "load": lambda block: (block.load_state_dict(copy.deepcopy(block.state_dict())), block)[1],
    "cuda": lambda block: block.cuda(),
}


@pytest.mark.parametrize(
    "move", [pytest.param(move, marks=pytest.mark.gpu if move == "cuda" else ()) for move in MOVES]
)
@pytest.mark.parametrize("stock", [True, False], ids=["accelerated", "ours"])
def test_block_is_compiled_straight_away(stock: bool, move: str) -> None:
    """No ordinary pass comes first, which would already put the index on the right device."""
    block = make_block(
        reference.AllInOneBlock if stock else AllInOneBlock,
        Case(Shape(2, 6, (4, 4)), "hard"),
        torch.float32,
    )
    if stock:
        assert report(accelerate(block)).changed
    x = torch.randn(2, 6, 4, 4)
    expected = block([x])[0][0]
    block = MOVES[move](block)
    operations: list[torch.fx.Node] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        operations.extend(node for node in graph.graph.nodes)
        return graph

    actual = torch.compile(block, fullgraph=True, backend=backend)([x.to(block.global_scale)])[0][0]
    torch.testing.assert_close(actual.to(x), expected, rtol=1e-4, atol=1e-4)
    names = [str(node.target) for node in operations]
    assert names.count("index_select") == 1
    # The two convolutions are the subnet's.
    assert (
        sum(
            "conv" in name and node.op != "placeholder"
            for name, node in zip(names, operations, strict=True)
        )
        == 2
    )


@pytest.mark.parametrize("stock", [True, False], ids=["accelerated", "ours"])
def test_index_does_not_stay_on_the_device_that_the_block_left(stock: bool) -> None:
    block = make_block(
        reference.AllInOneBlock if stock else AllInOneBlock,
        Case(Shape(2, 6, (4, 4)), "hard"),
        torch.float32,
    )
    if stock:
        assert report(accelerate(block)).changed
    assert _compile(block.to("meta"))([torch.randn(2, 6, 4, 4, device="meta")])[0][0].is_meta
