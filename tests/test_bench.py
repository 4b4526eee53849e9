"""Tests of the benchmarks: what they count, which rows they write, and how names select groups."""

from __future__ import annotations

import json
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
from bench import measure, providers, records, run, subject, timing
from bench.__main__ import main
from bench.choice import Choice, Group, names_among
from bench.measure import Settings, Task
from bench.providers import Provider
from bench.subject import MODES
from bench.workloads import ALL_IN_ONE, TYPICAL, WORKLOADS, Workload, workloads
from tests.support import peers as stock_blocks

ROOT = Path(__file__).resolve().parent.parent
SMALL = Workload(
    "small", (3, 6, 4, 4), {"affine_clamping": 1.9}, (2,), steps=2, subnet="conv", hidden=1.0
)
SETTINGS = Settings(torch.device("cpu"), (2, 3), 0.0, copy_bandwidth=1e10)
EVERY_ROW = {"kind", "workload", "shape", "mode", "dtype", "block", "provider", "class"}
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
    """Use the stand-in for the stock classes, installed or not, and samples of single calls."""

    def missing() -> None:
        raise providers.peers.PeerMissing

    absent = {dialect: [(missing, "absent")] for dialect in providers.STOCK_CLASSES}
    monkeypatch.setattr(providers, "STOCK_CLASSES", absent)
    monkeypatch.setattr(timing, "SPAN", {"cpu": 0.0})


def task(*names: str, kind: str = "block", dtype: str = "float32") -> Task:
    return Task(Group(kind, SMALL, dtype, ""), names, SETTINGS)


@pytest.mark.parametrize("kind", ["block", "flow"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_task_measures_every_mode(kind: str, dtype: str) -> None:
    names = ("ours", "ours-freia", "anomalib", "freia", "freia-graphs")
    measured = task(*names, kind=kind, dtype=dtype)
    for mode in MODES:
        outcomes = measured.measure(mode)
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
    measured = task("ours")
    for mode, inputs in {"forward": 3, "inverse": 3, "backward": 5, "train": 8}.items():
        figures = measured.measure(mode)["ours"].row
        seconds = figures["median_us"] * 1e-6
        assert figures["gbs"] == pytest.approx(inputs * 4 * 3 * 6 * 4 * 4 / seconds * 1e-9)
        assert figures["share"] == pytest.approx(figures["gbs"] / 10.0)


class Wrong(reference.AllInOneBlock):
    """A block whose log-determinant is wrong by a factor."""

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
    """A block that cannot run."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("not in this dtype\nmore")


def replaced(block: Callable[..., nn.Module], base: str) -> Callable:
    real = providers.block_class

    def block_class(provider: Provider, workload: Workload, kind: str) -> tuple[Any, str]:
        is_replaced = provider.base == base
        return (block, "replaced") if is_replaced else real(provider, workload, kind)

    return block_class


def test_wrong_results_give_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, subject):
        monkeypatch.setattr(module, "block_class", replaced(Wrong, "anomalib"))
    outcomes = task("ours", "anomalib").measure("forward")
    assert "log-det" in outcomes["anomalib"].failure
    assert "median_us" not in outcomes["anomalib"].row
    assert outcomes["ours"].failure is None


def test_a_stock_block_may_be_unable_and_ours_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for base, failure in (("anomalib", None), ("ours-freia", "RuntimeError: not in this dtype")):
        with monkeypatch.context() as patch:
            for module in (measure, subject):
                patch.setattr(module, "block_class", replaced(Unable, base))
            outcome = task("ours", base).measure("forward")[base]
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
    """The calls fill 4 ms at most. If the GPU had to wait for Python, the writes last longer."""
    tries = []

    def queued(ready: list[Callable[[], None]], delay: float) -> tuple[float, bool]:
        tries.append((len(ready), round(delay, 4)))
        return 5e-5, delay > 0.01

    monkeypatch.setattr(timing, "queued_time", queued)
    subject = SimpleNamespace(ready=lambda mode, calls: [lambda: None] * calls)
    assert timing.device_time(subject, "train", 64, wall=1e-3) == (5e-5, True)
    assert tries == [(4, 0.006), (4, 0.012)]
    tries.clear()
    assert timing.device_time(subject, "train", 64, wall=0.1) == (5e-5, True)
    assert tries == [(1, 0.15)]
    tries.clear()
    # Neither of the two tries was long enough, and the result says so.
    assert timing.device_time(subject, "train", 1, wall=1e-3) == (5e-5, False)
    assert tries == [(1, 0.0015), (1, 0.003)]


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
    assert set(TYPICAL) <= set(names)
    assert next(w for w in workloads("flow", True) if w.name == "fastflow-wrn50/1").shape == (
        1,
        256,
        64,
        64,
    )


# --- runs -----------------------------------------------------------------------------------------


def choice(**changes: Any) -> Choice:
    names = {
        "kinds": ["block"],
        "workloads": ["typical"],
        "modes": ["train"],
        "dtypes": ["float32"],
        "providers": ["ours", "ours-freia", "anomalib", "freia"],
        "device": torch.device("cpu"),
    }
    return Choice(**(names | changes))


def test_names_choose_groups() -> None:
    assert {g.workload.name for g in choice().groups()} == set(TYPICAL)
    assert len(choice(workloads=["all"]).groups()) == len(WORKLOADS)
    chosen = choice(kinds=["flow"], workloads=["bgad"], modes=["forward", "train"]).groups()
    assert [(g.kind, g.workload.name, g.mode) for g in chosen] == [
        ("flow", "bgad", "forward"),
        ("flow", "bgad", "train"),
    ]
    # In the order of the names. "tabular" is a whole name, so it does not select "tabular soft".
    chosen = choice(workloads=["tabular", "cflow/"]).groups()
    assert [g.workload.name for g in chosen] == ["tabular", "cflow/1", "cflow/2", "cflow/3"]
    assert str(chosen[0]) == "block tabular 4096x64 train float32"


def test_providers_are_measured_with_those_of_ours_that_they_are_compared_with() -> None:
    names = choice(providers=["freia-compiled"]).with_ours(ALL_IN_ONE)
    assert names == ["ours", "ours-freia", "freia-compiled"]


def test_names_on_the_command_line_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert names_among(MODES)("train,forward") == ["forward", "train"]
    for arguments, message in (
        (["--modes", "sideways"], "expected names among forward, inverse, backward, train; got"),
        (["--providers", "zuko"], "expected names among ours, "),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["compare", *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no workload is called nothing"):
        main(["compare", "--workloads", "nothing"])


@pytest.fixture
def _quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REPEATS", {"cpu": (2, 2)})
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1e10)


@pytest.mark.usefixtures("_quick_run")
def test_a_run_appends_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.jsonl"
    chosen = choice(workloads=["small/sample"], modes=["forward", "train"])
    assert run.compare(chosen, 0.0, float("inf"), target) == 0
    rows = records.read([target])
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (mode, name) for mode in chosen.modes for name in chosen.providers
    ]
    assert all(r["median_us"] > 0 and r["device"].startswith("cpu-") for r in rows)
    assert "block small/sample 1x64 train float32: ours" in capsys.readouterr().err


@pytest.mark.usefixtures("_quick_run")
def test_wrong_results_fail_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, subject):
        monkeypatch.setattr(module, "block_class", replaced(Wrong, "anomalib"))
    target = tmp_path / "rows.jsonl"
    chosen = choice(workloads=["small/sample"], modes=["forward"])
    assert run.compare(chosen, 0.0, float("inf"), target) == 1
    (failed,) = (r for r in records.read([target]) if r["provider"] == "anomalib")
    assert "max error" in failed["skipped"]
    assert "median_us" not in failed


@pytest.mark.usefixtures("_quick_run")
def test_a_spent_budget_begins_no_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.jsonl"
    assert run.compare(choice(workloads=["small/sample"]), 0.0, -1.0, target) == 0
    assert not target.exists()
    left_out = "left out, because the budget of -1 s was spent: block small/sample 1x64 train"
    assert left_out in capsys.readouterr().err


@pytest.mark.slow
def test_pytest_benchmark_times_each_block(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    table = tmp_path / "table.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/test_speed.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    chosen = ["-k", "block and small and sample and train", f"--benchmark-json={table}"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(table.read_text())["benchmarks"]
    assert len(entries) == 4
    assert all(entry["stats"]["median"] > 0 for entry in entries)


@pytest.mark.peers
def test_stock_blocks_share_no_rotation() -> None:
    """SciPy's draw is replaced by a cached one. Blocks that shared it would share their weights."""
    pytest.importorskip("scipy")
    block_class = stock_blocks.anomalib_block()
    with providers.rotations_drawn_once():
        first, second = (
            block_class([(4,)], subnet_constructor=nn.Linear, permute_soft=True) for _ in range(2)
        )
    assert torch.equal(first.w_perm, second.w_perm)
    first.w_perm.data.zero_()
    assert second.w_perm.any()
