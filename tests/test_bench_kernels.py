"""Tests of the kernels' passes, times and tuning questions, with a driver that does nothing."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

from bench import timing
from bench.gpu import kernel_times, tune
from bench.gpu.passes import Passes
from bench.workloads import Workload
from fastflow_kernels.engines.triton import backward, forward, inverse, launch, plan, sums
from tests.support.kernel_passes import PASSES
from tests.support.mock_driver import mock_gpu

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
PLANES = Workload("planes", (2, 8, 32, 32))
ROWS = Workload("rows", (512, 128))


@pytest.mark.parametrize("question", tune.QUESTIONS, ids=lambda question: question.name)
def test_a_question_asks_about_what_is_there(question: tune.Question) -> None:
    for module, constant, value in question.settings[0]:
        assert getattr(tune.module_of(module), constant) == value
    assert {job[2].name for job in tune.jobs([question.name])} == set(question.workloads)


@pytest.mark.parametrize(("name", "workload"), [("tile", PLANES), ("rows", ROWS), ("sums", PLANES)])
def test_a_variant_launches_what_its_value_cuts(
    name: str, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    (question,) = (q for q in tune.QUESTIONS if q.name == name)
    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        launch.Launch,
        "__call__",
        lambda self, *_: launched.append((self.grid, self.options, *self.values.values())),
    )

    def launches(variant: tune.Variant) -> list[tuple[object, ...]]:
        (call,) = variant.ready("backward", 1)
        launched.clear()
        call()
        return list(launched)

    with mock_gpu():
        passes = Passes(workload, torch.float32, CPU)
        present, changed = (tune.Variant(setting, passes) for setting in question.settings[:2])
        assert launches(changed) != launches(present)
        assert launches(changed) == launches(changed)


def test_tuning_times_every_value_and_leaves_the_code_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "SPAN", {"cpu": 0.0})
    monkeypatch.setattr(tune, "REPEATS", (2, 2))
    question = tune.Question(
        "tile",
        tune.settings_of("plan", "TILE_BYTES", 4096, 2048),
        ("planes",),
        ("forward", "inverse", "reversible"),
    )
    rows: list[dict] = []
    with mock_gpu():
        todo = [(question, setting, PLANES, "bfloat16") for setting in question.settings]
        tune.compile_variant(todo[0], "cpu")
        tune.measure(todo, CPU, rows.append, lambda line: None)
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (f"TILE_BYTES={value}", mode) for mode in question.passes for value in (4096, 2048)
    ]
    assert all(row["ratio"] == 1.0 for row in rows if row["provider"] == "TILE_BYTES=4096")
    lines = tune.table(rows).splitlines()
    assert len(lines) == 2 + 2 * len(question.passes)
    assert lines[2] == "| TILE_BYTES=4096 | forward | 1.000 | 1.000 | 1.000, planes, bfloat16 |"
    assert plan.TILE_BYTES == 4096


@pytest.mark.parametrize("workload", [PLANES, ROWS], ids=lambda workload: workload.name)
def test_passes_launch_every_kernel(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(
        launch.Launch, "__call__", lambda self, *_: launched.append(self.kernel.__name__)
    )
    with mock_gpu():
        passes = Passes(workload, torch.float32, CPU)
        for name in PASSES:
            for call in passes.calls(name, 2):
                call()
    defined = {
        name
        for module in (backward, forward, inverse, sums)
        for name in vars(module)
        if name.endswith("_kernel")
    } - {"_gin_sums_kernel"}
    of_the_other_shape = (
        {"_coupling_fwd_kernel", "_logdet_kernel"}
        if workload is ROWS
        else {"_coupling_rows_fwd_kernel"}
    )
    assert set(launched) == defined - of_the_other_shape


def test_kernel_times_are_medians_of_the_device_s_own() -> None:
    events = [SimpleNamespace(name="_logdet_kernel", device_time=t) for t in (2.0, 1.0, 9.0)]
    events += [
        SimpleNamespace(name="void at::native::fill", device_time=50.0),
        SimpleNamespace(name="_logdet_kernel", device_time=0),
    ]
    (row,) = kernel_times.rows_of(events, PLANES, "forward", "float32")
    assert (row["provider"], row["median_us"], row["repeats"], row["kind"]) == (
        "_logdet_kernel",
        2.0,
        3,
        "kernel",
    )
