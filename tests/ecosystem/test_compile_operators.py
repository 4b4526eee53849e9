"""Compile anomalib's models with our kernels as operators in the graph.

The backend is forced by its switch, and Triton interprets the kernels on the CPU. ci/ecosystem.sh
runs this file so, in a process of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.cflow.utils import cflow_head
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel
from anomalib.models.image.patchflow.torch_model import PatchflowModel
from anomalib.models.image.uflow.torch_model import UflowModel
from torch import Tensor, nn

from fastflow_kernels import accelerate, report
from fastflow_kernels.backends import ENVIRONMENT_VARIABLE
from fastflow_kernels.engines.available import is_interpreted
from tests.support.graphs import Graphs, count_graphs, operators

if not is_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 (ci/ecosystem.sh sets it)", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(autouse=True)
def _switched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")


def _accelerated(stock: nn.Module) -> tuple[nn.Module, int]:
    ours = accelerate(copy.deepcopy(stock))
    return ours, len(report(ours).changed)


def _flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for result in results if result is not None for t in _flat(result)]


def _assert_close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    for a, e in zip(_flat(actual), _flat(expected), strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


# Whole models in inference: a function that builds one, and the sides of the images.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fastflow": (
        lambda: FastflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=2),
        64,
    ),
    "cflow": (
        lambda: CflowModel("resnet18", ("layer3",), pre_trained=False, coupling_blocks=2),
        64,
    ),
    "uflow": (lambda: UflowModel((64, 64), backbone="resnet18", flow_steps=1), 64),
    "patchflow": (
        lambda: PatchflowModel((64, 64), backbone="resnet18", pre_trained=False, flow_steps=1),
        64,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_graph_with_an_operator_for_each_block(name: str) -> None:
    build, size = MODELS[name]
    stock = build().eval()
    ours, blocks = _accelerated(stock)
    graphs = Graphs()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=graphs)
    for batch in (2, 3):
        images = torch.rand(batch, 3, size, size)
        with torch.no_grad():
            _assert_close(compiled(images), stock(images), 1e-3)
    assert count_graphs() == 1
    assert [operators(graph) for graph in graphs.forward] == [{"coupling_forward": blocks}]


@pytest.mark.parametrize("kind", ["fastflow", "uflow", "cflow"])
def test_the_flow_of_a_model_trains_in_one_graph(kind: str) -> None:
    """Its gradients are the stock model's. Each block has an operator in both directions."""
    torch.manual_seed(0)
    if kind == "cflow":
        stock: Any = cflow_head(4, 2, 1.9, 16)
        inputs: list[Any] = [torch.randn(6, 16), [torch.randn(6, 4)]]
    elif kind == "fastflow":
        stock = FastflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=1)
        stock = stock.fast_flow_blocks[0]
        inputs = [torch.randn(2, 64, 16, 16)]
    else:
        stock = UflowModel((64, 64), backbone="resnet18", flow_steps=1).flow
        inputs = [[torch.randn(2, 64 << k, 16 >> k, 16 >> k) for k in range(3)]]
    ours, blocks = _accelerated(stock)
    graphs = Graphs()
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    results = []
    for model in (compiled, stock):
        z, log_det = model(*inputs)
        loss = FastflowLoss()(list(z), [log_det] * len(z)) if kind == "uflow" else _loss(z, log_det)
        parameters = [p for p in model.parameters() if p.requires_grad]
        results.append([z, log_det, torch.autograd.grad(loss, parameters)])
    _assert_close(results[0], results[1], 1e-3)
    assert [operators(graph) for graph in graphs.forward] == [{"coupling_forward": blocks}]
    assert [operators(graph) for graph in graphs.backward] == [{"coupling_backward": blocks}]
    assert count_graphs() == 1


def _loss(z: Tensor, log_det: Tensor) -> Tensor:
    return 0.5 * z.square().mean() - log_det.mean() / z[0].numel()


def test_decoders_of_cflow_are_compiled_in_place() -> None:
    """The line that the documentation names for CFlow. State dicts stay, and both modes run."""
    stock = CflowModel("resnet18", ("layer3",), pre_trained=False, coupling_blocks=2)
    ours, blocks = _accelerated(stock)
    graphs = Graphs()
    for decoder in ours.decoders:
        decoder.compile(backend=graphs, fullgraph=True)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    images = torch.rand(5, 3, 64, 64)  # 80 fibers: 64, and 16 in another batch
    _assert_close(ours(images), stock(images), 1e-3)
    x, c = torch.randn(64, 256), [torch.randn(64, 128)]
    gradients = []
    for model in (ours, stock):
        decoder = model.decoders[0]
        parameters = [p for p in decoder.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(_loss(*decoder(x, c)), parameters))
    _assert_close(gradients[0], gradients[1], 1e-3)
    assert graphs.forward
    for graph in graphs.forward:
        assert operators(graph) == {"coupling_forward": blocks}
    assert [operators(graph) for graph in graphs.backward] == [{"coupling_backward": blocks}]
