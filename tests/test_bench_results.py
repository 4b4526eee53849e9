"""Result rows: their files, the goals, the report, and the rows of chains against depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import records, reversible
from bench.goals import goals
from bench.records import Row
from bench.subject import MODES
from tests.support import peers
from tests.support.memory import Peak

EVERY_ROW = {"kind", "workload", "shape", "mode", "dtype", "provider", "class"}


def row(**changes: Any) -> Row:
    made = {
        "kind": "block",
        "workload": "fastflow-wrn50/1",
        "shape": [32, 256, 64, 64],
        "mode": "train",
        "dtype": "float32",
        "provider": "ours",
        "class": "c",
        "median_us": 10.0,
        "p20_us": 9.0,
        "p80_us": 11.0,
        "wall_us": 10.0,
        "ratio": 1.0,
        "ratio_alike": 1.0,
        "ratio_wall": 1.0,
        "ratio_wall_alike": 1.0,
        "share": 0.93,
        "gbs": 3.0,
        "copy_gbs": 4000.0,
        "device": "nvidia-h200",
        "device_name": "NVIDIA H200",
        "threads": None,
        "date": "2026-01-01T00:00:00+00:00",
    }
    return made | changes


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("AMD EPYC", "cpu", "cpu-amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor", "cpu", "cpu-amd-epyc-7763"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu", "cpu-intel-xeon"),
        ("NVIDIA H200", "cuda", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "cuda", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_slug(name: str, kind: str, expected: str) -> None:
    assert records.slug(name, kind) == expected


def test_provenance_names_the_run() -> None:
    where = records.provenance(torch.device("cpu"))
    assert where.keys() == {
        "device",
        "device_name",
        "driver",
        "threads",
        "tf32",
        "torch",
        "triton",
        "commit",
        "date",
    }
    assert where["device"].startswith("cpu-")


def test_files_are_appended_and_the_newest_row_counts(tmp_path: Path) -> None:
    later = row(median_us=8.0, date="2026-02-01T00:00:00+00:00")
    records.append([later], tmp_path)
    records.append([row(), row(mode="forward"), row(kind="flow")], tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jsonl")} == {
        "nvidia-h200/block.jsonl",
        "nvidia-h200/flow.jsonl",
    }
    rows = records.read([tmp_path])
    assert len(rows) == 4
    newest = records.newest(rows)
    assert len(newest) == 3
    assert later in newest
    records.append(rows, tmp_path / "all.jsonl")
    assert records.read([tmp_path / "all.jsonl"]) == rows


def test_goals_are_decided_by_the_worst_row() -> None:
    rows = [
        row(mode="forward", share=0.95),
        row(mode="forward", share=0.89, dtype="bfloat16"),
        row(mode="inverse", share=0.91),
    ]
    rows += [
        row(provider="anomalib", ratio=6.5),
        row(provider="freia", ratio=4.0),
        row(provider="freia", ratio=0.9, workload="calo"),
    ]
    rows += [row(kept_bytes=40), row(provider="anomalib", ratio=7.0, kept_bytes=100)]
    rows += [
        row(kind="flow", provider="anomalib", ratio_wall=1.4),
        row(workload="bgad", provider="freia", ratio_wall=0.8),
    ]
    rows += [row(workload="cflow/1", provider="freia-graphs", ratio_wall=0.5, ratio_wall_alike=1.1)]
    rows += [
        row(workload="fastflow-wrn50/1 one image", mode="forward", share=0.1),
        row(kind="sweep", provider="freia", ratio=0.1),
    ]
    decided = {goal.wanted.text: (goal.value, goal.verdict) for goal in goals(rows)}
    assert decided["block alone, fastflow-*, forward: share of the copy bandwidth"] == (
        0.89,
        "NOT reached",
    )
    assert decided["block alone, fastflow-*, inverse: share of the copy bandwidth"] == (
        0.91,
        "reached",
    )
    assert decided["block alone, fastflow-*, backward: share of the copy bandwidth"] == (
        None,
        "not measured",
    )
    assert decided["block alone, fastflow-*, training step on the GPU: anomalib / ours"] == (
        6.5,
        "reached",
    )
    assert decided["block alone, fastflow-*, training step on the GPU: FrEIA main / ours"] == (
        4.0,
        "NOT reached",
    )
    assert decided[
        "block alone, cflow, training step as called, in CUDA graphs: best stock block / ours"
    ] == (1.1, "reached")
    assert decided["whole flow, fastflow-wrn50, training step as called: anomalib / ours"] == (
        1.4,
        "NOT reached",
    )
    assert decided["nowhere slower, block alone: best stock block / ours"] == (
        0.9,
        "NOT reached",
    )
    assert decided["nowhere slower, block alone as called: best stock block / ours"] == (
        0.8,
        "NOT reached",
    )
    assert decided["block alone: bytes kept for backward, share of anomalib's"] == (0.4, "reached")


def test_goals_of_a_cpu_are_means() -> None:
    rows = [
        row(device="cpu-x", threads=1, provider="anomalib", ratio=ratio) for ratio in (2.0, 8.0)
    ]
    (goal,) = (
        goal for goal in goals(rows) if "anomalib / ours, geometric mean" in goal.wanted.text
    )
    assert goal.value == pytest.approx(4.0)


def test_coupling_blocks_have_goals_of_their_own() -> None:
    common = {"workload": "glow/1", "block": "GLOWCouplingBlock"}
    rows = [row(provider="freia", ratio=1.5), row(provider="freia-0.2", ratio=0.9, **common)]
    rows += [row(provider="freia", kind="flow", ratio=1.1, **common)]
    rows += [row(provider="ours-accelerated", ratio=0.5, **common)]
    decided = {goal.wanted.text: goal for goal in goals(rows)}
    assert decided["nowhere slower, block alone: best stock block / ours"].value == 1.5
    alone = decided["nowhere slower, coupling block alone: FrEIA / ours"]
    assert (alone.value, alone.verdict) == (0.9, "NOT reached")
    assert decided["nowhere slower, flow of coupling blocks: FrEIA / ours"].verdict == "reached"


def test_coupling_blocks_have_sections_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import write_report

    common = {"workload": "glow/1", "block": "GLOWCouplingBlock"}
    rows = [row(), row(provider="freia", ratio=2.0, **{"class": "its block"})]
    rows += [
        row(provider=name, ratio=3.0, **common, **{"class": "its coupling"})
        for name in ("ours", "ours-accelerated", "freia", "freia-0.2")
    ]
    text = write_report(rows, tmp_path).read_text()
    alone, coupling = text.partition("### Coupling block alone\n")[::2]
    assert "freia-0.2 / ours |" in coupling
    assert "freia-0.2 / ours |" not in alone.partition("### Block alone\n")[2]
    assert "- freia: its block\n- ours (coupling blocks): its coupling" in text
    assert (tmp_path / "performance" / "cpu-couplings.md").is_file()


def test_report_of_made_up_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import write_report

    rows = [
        row(mode=mode, provider=name, ratio=2.0)
        for mode in MODES
        for name in ("ours", "anomalib", "freia-compiled")
    ]
    rows += [
        row(kind="flow", provider=name, ratio=1.6, ratio_wall=1.7, share=None)
        for name in ("ours", "anomalib")
    ]
    rows += [row(kind="kernel", provider="_logdet_kernel", mode="forward", median_us=2.04)]
    rows += [
        row(kind="sweep", workload="sweep-batch", shape=[n, 8, 4, 4], provider=p)
        for n in (1, 2)
        for p in ("ours", "freia")
    ]
    skipped = {
        key: value
        for key, value in row(provider="freia").items()
        if key in EVERY_ROW | {"device", "device_name", "threads", "date"}
    }
    text = write_report([*rows, skipped | {"skipped": "no such thing"}], tmp_path).read_text()
    plots = {
        "speedup-block-",
        "speedup-flow-",
        "speedup-block-called-",
        "speedup-flow-called-",
        "sweep-",
    }
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"{plot}nvidia-h200-float32.png" for plot in plots
    }
    assert all(f"({plot}nvidia-h200-float32.png)" in text for plot in plots)
    assert "## NVIDIA H200, float32" in text
    assert "| reached | 1.70 | >= 1.50 |" in text
    assert "### Block alone, as called from Python" in text
    assert "| fastflow-wrn50/1  32x256x64x64 | forward | logdet | 2.0 | 9.0 | 11.0 |" in text
    assert "freia not measured on fastflow-wrn50/1: no such thing" in text
    assert "| freia-compiled / ours | freia-compiled / ours alike |" in text


def test_ecosystem_rows_have_a_table_and_no_goals(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import write_report

    common = {"kind": "ecosystem", "workload": "its model", "shape": [1, 3, 64, 64]}
    rows = [
        row(provider=name, median_us=ms * 1e3, speedup_median=6 / ms, closed=closed, **common)
        for name, ms, closed in (("stock", 6, None), ("ours", 4, 0.5), ("subnets", 2, None))
    ]
    assert goals(rows) == []
    text = write_report(rows, tmp_path).read_text()
    assert "| stock / ours | p20 | p80 | closed by ours | stock / subnets |" in text
    line = (
        "| its model | 1x3x64x64 | train | 6.0 | 4.0 | 2.0 | 1.500 | – | – | 50% | 3.000 | – | – |"
    )
    assert line in text


def test_depth_rows_are_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.report import write_report

    def missing() -> None:
        raise peers.PeerMissing

    monkeypatch.setattr(reversible, "anomalib_block", missing)
    options = [
        "--shape",
        "2,16,24,24",
        "--depths",
        "4,32",
        "--repeats",
        "2",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    reversible.main(options)
    rows = records.read([tmp_path])
    assert {(r["provider"], r["depth"]) for r in rows} == {
        (p, d) for p in ("plain", "checkpoint", "reversible") for d in (4, 32)
    }
    by = {(r["provider"], r["depth"]): r for r in rows}
    assert by["plain", 32]["peak_bytes"] > 3 * by["plain", 4]["peak_bytes"]
    assert by["reversible", 32]["peak_bytes"] < 1.5 * by["reversible", 4]["peak_bytes"]
    decided = {goal.wanted.text: goal for goal in goals(rows)}
    kept = decided["reversible chain: bytes kept for backward at 32 blocks, divided by those at 4"]
    assert kept.value == by["reversible", 32]["kept_bytes"] / by["reversible", 4]["kept_bytes"]
    assert kept.verdict == "reached"
    assert kept.where == "depth-32 2x16x24x24, train; the worst of 1"
    assert (
        decided[
            "reversible chain: time of a training step, divided by anomalib's plain chain's"
        ].verdict
        == "not measured"
    )
    text = write_report([*rows, row()], tmp_path / "report").read_text()
    assert "### Against depth, 2x16x24x24" in text
    assert len(list((tmp_path / "report").glob("depth-2x16x24x24-*.png"))) == 1


def test_peak_counts_what_is_alive_at_a_time() -> None:
    with Peak() as peak:
        a = torch.zeros(1000)
        for _ in range(3):
            b = a + 1
            b.view(10, 100).add_(1)
            del b
    assert (peak.most, peak.now) == (8000, 4000)


def test_depth_compares_chains_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, copy = (reversible.build("plain", (2, 8, 4, 4), 2, "cpu") for _ in range(2))
    for c in (chain, copy):
        reversible.loss_of(c, torch.ones(2, 8, 4, 4)).backward()
    reversible.assert_gradients_agree({"plain": chain, "copy": copy})
    copy[0].global_scale.grad.mul_(10.0)
    with pytest.raises(AssertionError, match="copy: the gradients differ"):
        reversible.assert_gradients_agree({"plain": chain, "copy": copy})
