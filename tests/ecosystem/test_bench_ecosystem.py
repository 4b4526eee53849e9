"""Test the comparison of anomalib's FastFlow with its subnets alone, ``bench.ecosystem``.

No time is asserted. Other work on the machine changes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import ecosystem, records
from bench.ecosystem import TimedSubnets
from tests.support.anomalib_flows import Flows, stock_and_ours

SMALL = ["--backbones", "resnet18", "--image", "64", "--rounds", "2"]


def test_rows_follow_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    ecosystem.main([*SMALL, "--record"])
    (path,) = tmp_path.rglob("*.jsonl")
    assert path.name == "ecosystem.jsonl"
    rows = records.read([path])
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, name) for mode in ("inference", "train") for name in ("stock", "ours", "subnets")
    ]
    assert all(row["median_us"] > 0 and row["threads"] == 1 for row in rows)
    stock, ours, subnets = rows[:3]
    assert (stock["speedup_median"], stock["closed"], subnets["closed"]) == (1.0, None, None)
    assert ours["closed"] == pytest.approx(
        (stock["median_us"] - ours["median_us"]) / (stock["median_us"] - subnets["median_us"])
    )
    assert "| anomalib FastFlow, resnet18 | 1x3x64x64 | train |" in capsys.readouterr().out


def _shift_offset(ours: Flows) -> None:
    with torch.no_grad():
        ours.flows[1].module_list[3].global_offset[0, 0] += 1e-4


def _scale_gradient(ours: Flows) -> None:
    ours.flows[1].module_list[3].global_offset.register_hook(lambda gradient: 1.2 * gradient)


@pytest.mark.parametrize(
    ("fault", "mode", "message"),
    [
        (_shift_offset, "inference", "ours, inference, chain 1: output"),
        (_shift_offset, "train", "ours, train, chain 1: output"),
        (_scale_gradient, "train", r"chain 1: the gradient of module_list\.3\.global_offset"),
    ],
)
def test_a_wrong_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, fault: Any, mode: str, message: str
) -> None:
    def wrong(backbone: str, size: int) -> tuple[Flows, Flows]:
        stock, ours = stock_and_ours(backbone, size)
        fault(ours)
        return stock, ours

    monkeypatch.setattr(ecosystem, "stock_and_ours", wrong)
    with pytest.raises(AssertionError, match=message):
        ecosystem.main([*SMALL, "--modes", mode])


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_subnets_alone_run_as_inside_the_chains(mode: str) -> None:
    """A call runs each subnet once. Inputs have the shape that they have inside a chain.

    In training they require a gradient where they do inside a chain.
    """
    flows, _ = stock_and_ours("resnet18", 64)
    features = flows.features(1)
    seen: list[tuple[torch.Size, bool]] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append((inputs[0].shape, inputs[0].requires_grad))

    for name, module in flows.named_modules():
        if name.endswith("subnet"):
            module.register_forward_pre_hook(note)
    with torch.set_grad_enabled(mode == "train"):
        flows(*features)
    inside = list(seen)
    seen.clear()
    (call,) = TimedSubnets(flows, features).ready(mode, 1)
    call()
    assert seen == inside
    trained = [p.grad is not None for name, p in flows.named_parameters() if ".subnet." in name]
    assert trained == [mode == "train"] * len(inside) * 4
