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
