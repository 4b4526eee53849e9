"""Compile whole models with torch.compile: one graph for all batches, without breaks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from anomalib.models.image.cflow.utils import cflow_head
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.models.image.uflow.torch_model import UflowModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastflow_kernels import accelerate, report
from tests.support.anomalib_flows import Flows
from tests.support.graphs import Graphs, operators
from tests.support.mock_driver import mock_gpu

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _assert_one_graph(stock: nn.Module, calls: list[list[object]]) -> None:
    """Assert that the accelerated model compiles once and gives the stock results for all calls."""
    ours = copy.deepcopy(stock)
    assert report(accelerate(ours)).changed
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in calls:
        with torch.no_grad():
            for actual, expected in zip(
                _flat(compiled(*inputs)), _flat(stock(*inputs)), strict=True
            ):
                assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def _flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for result in results if result is not None for t in _flat(result)]


def test_whole_model_in_one_graph_for_every_batch() -> None:
    stock = FastflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=2)
    _assert_one_graph(stock, [[torch.rand(batch, 3, 64, 64)] for batch in (2, 3, 7)])


def test_freias_graph_in_one_graph_for_every_batch() -> None:
    stock = UflowModel((64, 64), backbone="resnet18", flow_steps=1).flow
    _assert_one_graph(
        stock,
        [
            [[torch.randn(batch, 64 << k, 16 >> k, 16 >> k) for k in range(3)]]
            for batch in (5, 3, 7)
        ],
    )


def test_flow_in_one_graph_for_every_image_size() -> None:
    stock = create_fast_flow_block([8, 10, 12], conv3x3_only=False, hidden_ratio=1.0, flow_steps=2)
    _assert_one_graph(
        stock, [[torch.randn(shape)] for shape in ((4, 8, 10, 12), (2, 8, 9, 7), (9, 8, 30, 30))]
    )


@pytest.mark.parametrize("kind", ["fastflow", "cflow"])
def test_flow_compiled_by_inductor_trains_with_every_batch(kind: str) -> None:
    """Every batch runs in one graph.

    On a CPU, torch specializes a convolution on the image size, and on batches below or above 16
    samples. It does so for the stock model too, so the test does not vary them.
    """
    if kind == "fastflow":
        stock, shape = (
            create_fast_flow_block([8, 10, 12], conv3x3_only=False, hidden_ratio=1.0, flow_steps=1),
            (8, 10, 12),
        )
    else:
        stock, shape = cflow_head(4, 1, 1.9, 16), (16,)
    ours = copy.deepcopy(stock)
    assert report(accelerate(ours)).changed
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for batch in (5, 2, 13):
        x, c = torch.randn(batch, *shape), [torch.randn(batch, 4)] if kind == "cflow" else None
        results = []
        for model in (compiled, stock):
            z, logdet = model(x, c)
            loss = 0.5 * z.square().mean() - logdet.mean() / x[0].numel()
            results.append(
                [
                    z,
                    logdet,
                    *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]),
                ]
            )
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_graphs_of_operators_are_smaller_than_plain_ones() -> None:
    """So the 24 blocks of FastFlow with wide_resnet50_2 take no longer to compile.

    Times are in bench/TUNING.md: they vary too much for a test.
    """
    sizes = {}
    for backend in ("triton", "eager"):
        flows = accelerate(Flows("wide_resnet50_2", 64), backend=backend)
        features = [t.requires_grad_() for t in flows.features(1)]
        graphs = Graphs()
        with mock_gpu():  # no kernel runs
            z, log_dets = torch.compile(flows, fullgraph=True, backend=graphs)(*features)
            torch.stack([t.sum() for t in (*z, *log_dets)]).sum().backward()
        (forward,), (backward,) = graphs.forward, graphs.backward
        sizes[backend] = len(forward.nodes) + len(backward.nodes)
        expected = {"coupling_forward": 24} if backend == "triton" else {}
        assert operators(forward) == expected
    assert sizes["triton"] < sizes["eager"], sizes
