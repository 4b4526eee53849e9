"""The benchmark harness: what is counted, when a row is written, what a report makes of rows."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import reference
from bench import measure, providers, records, reversible, timing, warm
from bench.cases import QUICK, WORKLOADS, Workload, workloads
from bench.goals import goals
from bench.measure import Settings, Task
from bench.records import Row
from bench.run import Run
from bench.subject import MINIMAL_BYTES, MODES

ROOT = Path(__file__).resolve().parent.parent
SMALL = Workload(
    "small", (3, 6, 4, 4), {"affine_clamping": 1.9}, (2,), steps=2, subnet="conv", hidden=1.0
)
SETTINGS = Settings(torch.device("cpu"), (2, 3), 0.0, copy_bandwidth=1e10)
EVERY_ROW = {"kind", "workload", "shape", "mode", "dtype", "provider", "class"}
FIGURES = {
    "median_us",
    "p20_us",
    "p80_us",
    "wall_us",
    "wall_p20_us",
    "wall_p80_us",
    "repeats",
    "copy_gbs",
    "ratio",
    "ratio_alike",
    "ratio_wall",
    "ratio_wall_alike",
}


@pytest.fixture(autouse=True)
def _without_peers_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in in place of the real stock classes, whether or not they are installed; and
    samples of single calls.
    """

    def missing() -> None:
        raise providers.peers.PeerMissing

    monkeypatch.setattr(providers.peers, "anomalib_block", missing)
    monkeypatch.setattr(providers.peers, "freia_block", missing)
    monkeypatch.setattr(timing, "SPAN", {"cpu": 0.0})


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


@pytest.mark.parametrize("kind", ["block", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_task_measures_every_mode(kind: str, dtype: torch.dtype) -> None:
    task = Task(
        kind, SMALL, dtype, ["ours", "ours-freia", "anomalib", "freia", "freia-graphs"], SETTINGS
    )
    for mode in MODES:
        outcomes = task.measure(mode)
        assert not [o.failure for o in outcomes.values() if o.failure]
        assert outcomes["freia-graphs"].row["skipped"] == "CUDA graphs need a GPU"
        assert outcomes["freia-graphs"].row.keys() == EVERY_ROW | {"skipped"}
        for name in ("ours", "ours-freia", "anomalib", "freia"):
            figures = outcomes[name].row
            expected = EVERY_ROW | FIGURES | ({"gbs", "share"} if kind == "block" else set())
            assert figures.keys() == expected | (
                {"kept_bytes", "kept_in_inputs"} if mode == "train" else set()
            )
            assert figures["p20_us"] <= figures["median_us"] <= figures["p80_us"]
        assert outcomes["ours"].row["ratio"] == 1.0
        assert "reference" in outcomes["anomalib"].row["class"]


def test_rates_count_minimal_bytes() -> None:
    assert MINIMAL_BYTES == {"forward": 3, "inverse": 3, "backward": 5, "train": 8}
    task = Task("block", SMALL, torch.float32, ["ours"], SETTINGS)
    for mode, inputs in MINIMAL_BYTES.items():
        figures = task.measure(mode)["ours"].row
        seconds = figures["median_us"] * 1e-6
        assert figures["gbs"] == pytest.approx(inputs * 4 * 3 * 6 * 4 * 4 / seconds * 1e-9)
        assert figures["share"] == pytest.approx(figures["gbs"] / 10.0)


class Wrong(reference.AllInOneBlock):
    """One term of the log-determinant is off."""

    def _affine(
        self, x: torch.Tensor, a: torch.Tensor, rev: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, logdet = super()._affine(x, a, rev)
        return y, logdet * (1 + 1e-3)


def test_gradients_past_a_kink_are_judged_by_rms() -> None:
    truth = torch.randn(100, 100, dtype=torch.float64)
    flipped = truth.float()
    flipped[0, 0] += 0.3
    measure.assert_close_past_kinks(flipped, truth, truth.float(), 8, "one gate")
    with pytest.raises(AssertionError, match="all: rms error"):
        measure.assert_close_past_kinks(1.01 * truth, truth, truth.float(), 8, "all")


class Unable(reference.AllInOneBlock):
    def forward(self, *_: object, **__: object) -> None:
        raise RuntimeError("not in this dtype\nmore")


def replaced(block: Callable[..., nn.Module], base: str) -> Callable:
    real = providers.block_class
    return lambda provider: (block, "replaced") if provider.base == base else real(provider)


def test_wrong_results_give_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, sys.modules["bench.subject"]):
        monkeypatch.setattr(module, "block_class", replaced(Wrong, "anomalib"))
    outcomes = Task("block", SMALL, torch.float32, ["ours", "anomalib"], SETTINGS).measure(
        "forward"
    )
    assert "log-det" in outcomes["anomalib"].failure
    assert "median_us" not in outcomes["anomalib"].row
    assert outcomes["ours"].failure is None


def test_a_stock_block_may_be_unable_and_ours_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for base, failure in (("anomalib", None), ("ours-freia", "RuntimeError: not in this dtype")):
        with monkeypatch.context() as patch:
            for module in (measure, sys.modules["bench.subject"]):
                patch.setattr(module, "block_class", replaced(Unable, base))
            outcome = Task("block", SMALL, torch.float32, ["ours", base], SETTINGS).measure(
                "forward"
            )[base]
        assert outcome.row["skipped"] == "RuntimeError: not in this dtype"
        assert outcome.failure == failure


def test_interleaved_takes_turns() -> None:
    order = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def ready(self, mode: str, calls: int) -> list[Callable[[], None]]:
            return [lambda: order.append(self.name)] * calls

    times = timing.interleaved(
        {"a": Counting("a"), "b": Counting("b")}, "forward", torch.device("cpu"), (3, 3), 0.0
    )
    assert order[-6:] == ["a", "b"] * 3
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_a_gpu_s_own_time_is_measured_behind_a_long_enough_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few enough calls to fill 4 ms, and a longer wait where the GPU ran dry."""
    asked = []

    def queued(ready: list[Callable[[], None]], delay: float) -> tuple[float, bool]:
        asked.append((len(ready), round(delay, 4)))
        return 5e-5, delay > 0.01

    monkeypatch.setattr(timing, "_queued", queued)
    subject = SimpleNamespace(ready=lambda mode, calls: [lambda: None] * calls)
    assert timing.device_time(subject, "train", 64, wall=1e-3) == (5e-5, True)
    assert asked == [(4, 0.006), (4, 0.012)]
    asked.clear()
    assert timing.device_time(subject, "train", 64, wall=0.1) == (5e-5, True)
    assert asked == [(1, 0.15)]
    asked.clear()
    # tried twice, and said so
    assert timing.device_time(subject, "train", 1, wall=1e-3) == (5e-5, False)
    assert asked == [(1, 0.0015), (1, 0.003)]


def test_workload_table() -> None:
    names = [w.name for w in WORKLOADS]
    assert len(names) == len(set(names))
    models = (
        "fastflow-r18",
        "fastflow-wrn50",
        "fastflow-cait",
        "uflow-mcait",
        "cflow",
        "cflow-ad",
        "bgad",
        "msflow",
        "hyperspectral",
        "calo",
    )
    for model in (*models, "tabular"):
        assert any(name.startswith(model) for name in names), model
    for kind, quick in QUICK.items():
        assert set(quick) <= {w.name for w in workloads(kind, on_cpu=True)}
    assert next(w for w in workloads("flow", True) if w.name == "fastflow-wrn50/1").shape == (
        1,
        256,
        64,
        64,
    )


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
    found = {goal.text: (goal.found, goal.verdict) for goal in goals(rows)}
    assert found["block alone, fastflow-*, forward: share of the copy bandwidth"] == (
        0.89,
        "NOT reached",
    )
    assert found["block alone, fastflow-*, inverse: share of the copy bandwidth"] == (
        0.91,
        "reached",
    )
    assert found["block alone, fastflow-*, backward: share of the copy bandwidth"] == (
        None,
        "not measured",
    )
    assert found["block alone, fastflow-*, train step on the GPU: times anomalib"] == (
        6.5,
        "reached",
    )
    assert found["block alone, fastflow-*, train step on the GPU: times freia"] == (
        4.0,
        "NOT reached",
    )
    assert found[
        "block alone, cflow, train step as called, all in CUDA graphs: times the best stock"
    ] == (1.1, "reached")
    assert found["whole flow, fastflow-wrn50, train step as called: times anomalib"] == (
        1.4,
        "NOT reached",
    )
    assert found["nowhere slower, block alone: times the best stock eager"] == (0.9, "NOT reached")
    assert found["nowhere slower, block alone as called: times the best stock eager"] == (
        0.8,
        "NOT reached",
    )
    assert found["block alone: bytes kept for backward, share of anomalib's"] == (0.4, "reached")


def test_goals_of_a_cpu_are_means() -> None:
    rows = [
        row(device="cpu-x", threads=1, provider="anomalib", ratio=ratio) for ratio in (2.0, 8.0)
    ]
    (goal,) = (goal for goal in goals(rows) if "times anomalib, geometric mean" in goal.text)
    assert goal.found == pytest.approx(4.0)


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
        "share-",
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
    assert (
        "| whole flow, fastflow-wrn50, train step as called: times anomalib | 1.70 / 1.50 | "
        "reached |" in text
    )
    assert "### Block alone, as called from Python" in text
    assert "| fastflow-wrn50/1  32x256x64x64 | forward | logdet | 2.0 (9.0 to 11.0) |" in text
    assert "freia not measured on fastflow-wrn50/1: no such thing" in text
    assert "2.00x (1.00x)" in text


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["with pytest-benchmark", "without"])
def test_a_run_from_end_to_end(plugin: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/test_speed.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "--out",
        str(tmp_path / "rows.jsonl"),
    ]
    choice = [
        "--quick",
        "--kinds",
        "block",
        "--workloads",
        "r18/3 one",
        "--modes",
        "forward",
        "--dtypes",
        "float32",
        "--device",
        "cpu",
    ]
    if plugin == "without":
        choice += ["-p", "no:benchmark"]
    else:
        pytest.importorskip("pytest_benchmark")
        choice += [f"--benchmark-json={tmp_path / 'table.json'}"]
    done = subprocess.run([*command, *choice], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = records.read([tmp_path / "rows.jsonl"])
    assert {r["provider"] for r in rows} == {"ours", "ours-freia", "anomalib", "freia"}
    assert all(r["median_us"] > 0 and r["device"].startswith("cpu-") for r in rows)
    if plugin != "without":
        table = json.loads((tmp_path / "table.json").read_text())["benchmarks"]
        medians = {
            entry["extra_info"]["provider"]: entry["stats"]["median"] * 1e6 for entry in table
        }
        assert medians == pytest.approx({r["provider"]: r["median_us"] for r in rows})


def run_with(**options: Any) -> Run:
    """A run with the options of a command line, and the defaults of the others."""
    chosen = {
        "device": "cpu",
        "quick": True,
        "compiled": False,
        "budget": float("inf"),
        "record": False,
        "out": Path("out"),
    } | options
    return Run(SimpleNamespace(getoption=lambda name: chosen.get(name)))


def test_a_run_chooses() -> None:
    assert {
        (w.name, mode, dtype) for w, mode, dtype in run_with(dtypes="float32").groups("sweep")
    } == {("sweep-channels", "train", "float32")}
    assert [
        (w.name, mode)
        for w, mode, _ in run_with(
            workloads="bgad", modes="train,forward", dtypes="bfloat16"
        ).groups("flow")
    ] == [
        ("bgad", "forward"),
        ("bgad", "train"),
    ]
    assert run_with(kinds="flow").groups("block") == []
    # in the order that is asked for, and a whole name means nothing else ("tabular soft")
    named = run_with(workloads="tabular,cflow/", modes="train", dtypes="float32").groups("block")
    assert [w.name for w, _, _ in named] == ["tabular", "cflow/1", "cflow/2", "cflow/3"]
    assert run_with().providers() == ["ours", "ours-freia", "anomalib", "freia"]
    assert run_with(providers="freia-compiled").providers() == [
        "ours",
        "ours-freia",
        "freia-compiled",
    ]
    assert "freia-compiled" in run_with(compiled=True).providers()
    assert "freia-graphs" not in run_with(compiled=True).providers()
    with pytest.raises(
        pytest.UsageError,
        match="expected names among forward, inverse, backward, train; got sideways",
    ):
        run_with(modes="sideways").groups("block")


def test_a_spent_budget_begins_no_group() -> None:
    run = run_with(budget=0.0)
    for provider in ("ours", "freia"):
        assert run.outcome("block", SMALL, "train", "float32", provider) is None
    assert run.left_out == ["block small 3x6x4x4 train float32"]


# --- against depth --------------------------------------------------------------------------------


def test_depth_rows_are_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.report import write_report

    monkeypatch.setattr(reversible, "anomalib_block", providers.peers.anomalib_block)
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
    found = {goal.text: goal for goal in goals(rows)}
    kept = found["reversible chain: bytes kept for backward at 32 blocks, times those at 4"]
    assert kept.found == by["reversible", 32]["kept_bytes"] / by["reversible", 4]["kept_bytes"]
    assert (kept.verdict, kept.where) == ("reached", "2x16x24x24")
    assert (
        found["reversible chain: time of a train step, times anomalib's plain chain's"].verdict
        == "not measured"
    )
    text = write_report([*rows, row()], tmp_path / "report").read_text()
    assert "### Against depth, 2x16x24x24" in text
    assert len(list((tmp_path / "report").glob("depth-2x16x24x24-*.png"))) == 1


def test_peak_counts_what_is_alive_at_a_time() -> None:
    with reversible.Peak() as peak:
        a = torch.zeros(1000)
        for _ in range(3):
            b = a + 1
            b.view(10, 100).add_(1)
            del b
    assert (peak.most, peak.now) == (8000, 4000)


def test_depth_compares_chains_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, other = (reversible.build("plain", (2, 8, 4, 4), 2, "cpu") for _ in range(2))
    for c in (chain, other):
        reversible.loss_of(c, torch.ones(2, 8, 4, 4)).backward()
    reversible.assert_alike({"plain": chain, "other": other})
    other[0].global_scale.grad.mul_(10.0)
    with pytest.raises(AssertionError, match="other: the gradients are off"):
        reversible.assert_alike({"plain": chain, "other": other})


def test_what_is_warmed_is_what_the_benchmarks_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    todo = warm.jobs()
    assert len(todo) == len(set(map(repr, todo)))
    assert [w for w, dtype, name in todo if (dtype, name) == ("bfloat16", "ours")] == workloads(
        "block", False
    )
    assert {name for _, _, name in todo} == {"ours", "ours-freia"}
    calls = warm.todo("cuda")
    assert len(calls) == len(todo) + 2 * len(warm.smallest.SHAPES) + 2 * len(warm.check.GPU_SHAPES)
    assert all(map(pickle.dumps, calls.values()))  # for other processes
    modes = []
    monkeypatch.setattr(
        warm.Subject,
        "results",
        lambda self, mode: modes.append((self.provider.name, self.samples[0].x.dtype, mode)),
    )
    warm.run((SMALL, "bfloat16", "ours-freia"), "cpu")
    assert modes == [("ours-freia", torch.bfloat16, mode) for mode in ("train", "inverse")]


# --- a run on a GPU -------------------------------------------------------------------------------


def gpu_run(
    *arguments: str, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "ci/gpu.sh", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )


# Says that there is a GPU, collects tests instead of running them, and runs modules up to where
# they miss the GPU.
REHEARSING = """#!/usr/bin/env bash
case "$*" in
*is_available*) ;;
-c*) exit 1 ;;
"-m pytest "*) exec {python} "$@" --collect-only ;;
*) {python} "$@" 2>&1 | grep -E "torch finds no GPU|^torch " ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "runs_of_pytest"), [("first", 4), ("second", 4)])
def test_a_gpu_run_rehearsed(mode: str, runs_of_pytest: int, tmp_path: Path) -> None:
    """Every step up to where it needs a GPU: options are known, tests and workloads exist. And the
    clock.
    """
    python = tmp_path / "python"
    python.write_text(REHEARSING.format(python=sys.executable))
    python.chmod(0o755)
    done = gpu_run(str(tmp_path / "out"), mode, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(
        r"^== .* \(at most (\d+) s; \d+ s of at most (\d+) are gone\)$", done.stdout, re.M
    )
    skipped = (
        []
        if shutil.which("compute-sanitizer")
        else re.findall(r"^\w+check: SKIPPED", done.stdout, re.M)
    )
    (total,) = {int(total) for _, total in steps}
    assert (
        sum(int(limit) for limit, _ in steps)
        <= total
        <= sum(int(limit) for limit, _ in steps) + 40 * len(skipped)
    )
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("exit 0") == len(steps)
    collected = re.findall(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.M)
    assert len(collected) == runs_of_pytest
    assert all(map(int, collected))


def test_a_gpu_run_explains_itself() -> None:
    """The list of parts in its help, with the limits that hold."""
    asked, unasked = gpu_run("--help"), gpu_run()
    assert (asked.returncode, unasked.returncode) == (0, 2)
    assert asked.stdout == unasked.stdout
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", (ROOT / "ci/gpu.sh").read_text()))
    assert dict(re.findall(r"^  (\w+) +(\d+) s  ", asked.stdout, re.M)) == limits
    assert sum(map(int, limits.values())) <= 75 * 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tests:90", "everything"], "no part is called everything; parts: "),
        (["goals:soon"], "expected PART:SECONDS, got goals:soon"),
        pytest.param(
            ["smallest"],
            "torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_gpu_run_refuses_before_any_work(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = gpu_run(str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "minutes"), [("first", 6.5), ("second", 5.5)])
def test_first_and_second_end_in_time(mode: str, minutes: float) -> None:
    """The limits of all steps together; a part of benchmarks ends 15 seconds before its own."""
    (line,) = (
        line
        for line in (ROOT / "ci/gpu.sh").read_text().splitlines()
        if line.startswith(f"{mode}) parts=")
    )
    assert sum(map(int, re.findall(r":(\d+)", line))) <= 60 * minutes
