"""A backend of torch.compile that keeps the graphs, to look at what they call and keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

NAMESPACE = "fastflow_kernels"


@dataclass
class Graphs:
    """A backend that runs the graphs of AOTAutograd as they are, divided as Inductor divides them.

    Attributes:
        forward: The graphs of calls without gradients, and of forward passes.
        backward: The graphs of backward passes.
    """

    forward: list[fx.Graph] = field(default_factory=list)
    backward: list[fx.Graph] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiler = aot_autograd(
            fw_compiler=self._keep_in(self.forward),
            bw_compiler=self._keep_in(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        return compiler(module, inputs)

    def _keep_in(self, graphs: list[fx.Graph]) -> Callable[..., Any]:
        def compiled(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(module.graph)
            return make_boxed_func(module)

        return compiled


def calls(graph: fx.Graph) -> Counter[str]:
    """Count the operations of a graph by name: "aten.cat", or an operator of ours by its own name.

    A call that writes to its arguments counts as what it calls, in a functional graph too.
    """
    counted: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            functional = "auto_functionalized" in str(node.target)
            target = str(node.args[0] if functional else node.target)
            name, _, _ = target.removeprefix("torch.ops.").rpartition(".")
            counted[name.removeprefix(f"{NAMESPACE}.") or target] += 1
    return counted


def operators(graph: fx.Graph) -> Counter[str]:
    """Count the operators of ours in a graph, by their own names."""
    names = {name.removeprefix(f"{NAMESPACE}::") for name in defined()}
    return Counter({name: n for name, n in calls(graph).items() if name in names})


def defined() -> list[str]:
    """Return the names of all operators of ours, "fastflow_kernels::..."."""
    schemas = torch._C._jit_get_all_schemas()
    return sorted({s.name for s in schemas if s.name.startswith(f"{NAMESPACE}::")})


def kept_for_backward(graph: fx.Graph, results: int = 2) -> list[Tensor]:
    """Return what a forward graph computes and keeps for the backward pass.

    Its arguments, such as parameters, are in memory anyway. Of a view its base is kept.
    """
    (outputs,) = (node.args[0] for node in graph.nodes if node.op == "output")
    bases = dict.fromkeys(map(_base, outputs[results:]))
    values = [node.meta["val"] for node in bases if node.op != "placeholder"]
    return [value for value in values if isinstance(value, Tensor)]


_VIEWS = {f"aten.{name}" for name in ("t", "view", "permute", "slice", "unsqueeze", "expand")}


def _base(node: Any) -> fx.Node:
    while str(node.target).rpartition(".")[0] in _VIEWS:
        node = node.args[0]
    return node


def count_graphs() -> int:
    """Return how many graphs Dynamo has made. There must be no break between them."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]
