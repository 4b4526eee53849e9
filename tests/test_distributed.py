"""DDP and FSDP2 on two processes: results and gradients of one process on the whole batch."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import reference
from fastflow_kernels import AllInOneBlock, accelerate, report
from fastflow_kernels.backends import ENVIRONMENT_VARIABLE
from tests.support.cases import Case, Shape, make_block
from tests.support.graphs import Graphs, operators
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fused")

SHAPE = Shape(4, 6, (3, 5))
NAMES = ["hard", "gin", "soft", "hh3-rev-cond"]
KINDS = ["ours", "accelerated"]
WRAPPERS = ["ddp", "fsdp2"]


class Flow(nn.Module):
    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        case = Case(SHAPE, name)
        cls = AllInOneBlock if kind == "ours" else reference.AllInOneBlock
        self.blocks = nn.ModuleList(make_block(cls, case, seed=seed) for seed in range(3))
        if kind == "accelerated":
            assert len(report(accelerate(self)).changed) == 3

    def forward(self, x: Tensor, c: list[Tensor]) -> Tensor:
        loss = x.new_zeros(x.shape[0])
        for block in self.blocks:
            (x,), logdet = block([x], c)
            loss = loss - logdet
        return (loss + 0.5 * x.square().sum((1, 2, 3))).mean()


def _batch(name: str) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    widths = (SHAPE.channels, *Case(SHAPE, name).conditions)
    x, *c = (
        torch.randn(SHAPE.batch, width, *SHAPE.spatial, generator=generator, dtype=torch.float64)
        for width in widths
    )
    return x, c


def _trained(model: nn.Module, flow: Flow, x: Tensor, c: list[Tensor]) -> dict[str, Tensor]:
    """Train two steps; return the gradients of the second and the weights before it."""
    optimizer = torch.optim.SGD([p for p in flow.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, c).backward()
        weights = {name: p.detach().clone() for name, p in flow.named_parameters()}
        gradients = {
            f"{name}.grad": p.grad for name, p in flow.named_parameters() if p.requires_grad
        }
        optimizer.step()
    results: dict[str, Any] = weights | gradients
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in results.items()
    }


class Block(nn.Module):
    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        case = Case(SHAPE, "hard")
        self.block = make_block(
            AllInOneBlock if kind == "ours" else reference.AllInOneBlock, case, seed=seed
        )
        if kind == "accelerated":
            accelerate(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.block([x])[0][0]


def _compiled_from_another_seed(kind: str, rank: int) -> Tensor:
    """Return what a compiled block computes after DDP has broadcast its weights.

    They are those of rank 0, and so is its permutation.
    """
    model = DistributedDataParallel(Block(kind, seed=rank + 1))
    with torch.no_grad():
        return torch.compile(model, backend="eager")(_batch("hard")[0])


def _one_rank(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}
    for name in NAMES:
        x, c = _batch(name)
        half = slice(2 * rank, 2 * rank + 2)
        for kind in KINDS:
            for wrapper in WRAPPERS:
                flow = Flow(name, kind)
                if wrapper == "ddp":
                    # As in the stock block, no result of GIN depends on its scale.
                    model = DistributedDataParallel(flow, find_unused_parameters="gin" in name)
                else:
                    mesh = dist.init_device_mesh("cpu", (2,))
                    for block in flow.blocks:
                        fully_shard(block, mesh=mesh)
                    model = fully_shard(flow, mesh=mesh)
                results[f"{name} {kind} {wrapper}"] = _trained(
                    model, flow, x[half], [t[half] for t in c]
                )
    for kind in KINDS:
        results[f"compiled {kind}"] = _compiled_from_another_seed(kind, rank)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(functools.partial(_one_rank, folder=folder), 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_like_one(
    name: str, kind: str, wrapper: str, ranks: list[dict[str, Any]]
) -> None:
    flow = Flow(name, kind)
    expected = _trained(flow, flow, *_batch(name))
    for results in ranks:
        actual = results[f"{name} {kind} {wrapper}"]
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if value is None:  # GIN's scale takes no gradient; DDP sums it up to zero all the same
                assert "gin" in name
                assert key.endswith("global_scale.grad")
                assert actual[key] is None or not actual[key].any()
                continue
            torch.testing.assert_close(
                actual[key], value, rtol=1e-10, atol=1e-11 * value.abs().max().item(), msg=key
            )


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_ranks_compute_the_same_function(kind: str, ranks: list[dict[str, Any]]) -> None:
    """They do so although each was built from a seed of its own."""
    expected = Block("ours", seed=1)(_batch("hard")[0])
    for results in ranks:
        torch.testing.assert_close(results[f"compiled {kind}"], expected, rtol=1e-11, atol=1e-11)


# --- compiled, with the kernels in the graph ------------------------------------------------------


def _one_compiled_rank(rank: int, folder: Path) -> None:
    """Train a compiled DDP model; each rank starts from a seed of its own."""
    flow, graphs = Flow("hard", "ours"), Graphs()
    if rank:
        for block, other in zip(flow.blocks, reversed(Flow("hard", "ours").blocks), strict=True):
            block.load_state_dict(other.state_dict())
    x, c = _batch("hard")
    half = slice(2 * rank, 2 * rank + 2)
    model = torch.compile(DistributedDataParallel(flow), backend=graphs)
    results: dict[str, Any] = _trained(model, flow, x[half], [t[half] for t in c])
    results["operators"] = [
        sum((operators(graph) for graph in part), Counter())
        for part in (graphs.forward, graphs.backward)
    ]
    torch.save(results, folder / f"{rank}.pt")


def test_compiled_ranks_call_the_kernels_and_train_like_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    expected = _trained(flow := Flow("hard", "ours"), flow, *_batch("hard"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the processes, which import Triton
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    run_ranks(functools.partial(_one_compiled_rank, folder=tmp_path), 2, tmp_path)
    for rank in range(2):
        actual = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert actual.pop("operators") == [{"coupling_forward": 3}, {"coupling_backward": 3}]
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                actual[key], value, rtol=1e-10, atol=1e-11 * value.abs().max().item(), msg=key
            )
