"""The predictions of bench/compiled.py: that SASS is counted as it runs, and that figures known
otherwise come out.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

from bench import compiled, kernel_times, timing, tune
from bench.cases import Workload
from bench.compiled import Loop, executed, parse, waits
from bench.mock_driver import mock_gpu
from bench.passes import PASSES, Passes
from fastflow_kernels.engines.triton import backward, forward, inverse, launch, plan, sums

pytestmark = pytest.mark.kernels

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0030*/                   LDG.E.64 R8, desc[UR6][R2.64+0x10] ;
        /*0040*/                   FADD R0, R5, R0 ;
        /*0050*/              @!P1 BRA 0x20 ;
        /*0060*/                   BRA 0x80 ;
        /*0070*/                   MUFU.RCP R0, R0 ;
        /*0080*/              @!P2 LDG.E.U16 R10, desc[UR6][R8.64] ;
        /*0090*/                   STG.E desc[UR6][R2.64], R10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_instructions_count_as_often_as_they_run() -> None:
    """8 iterations of 12 bytes, two of them in one pass through the body: it runs 4 times; what a
    branch jumps over, never.
    """
    run = list(executed(parse(SASS), [Loop(8, "LD", 12)]))
    assert [(i.name, times) for i, times in run] == [
        ("LDC", 1), ("BRA", 1), ("LDG.E.128", 4), ("LDG.E.64", 4), ("FADD", 4), ("BRA", 4),
        ("BRA", 1), ("LDG.E.U16", 1), ("STG.E", 1), ("EXIT", 1),
    ]  # fmt: skip


def test_waits_follow_from_registers() -> None:
    """In the loop for R5; then for R8, asked for before and asked for in the same turn; then for
    R10.
    """
    rounds, most = waits(list(executed(parse(SASS), [Loop(8, "LD", 12)])))
    assert rounds == 4 + 1
    assert most == 16 + 8


def test_predictions_of_a_small_workload() -> None:
    shape = (8, 16, 32, 32)
    found = {
        (p.phase, p.code.kernel): p for p in compiled.predict(Workload("small", shape), "fp32")
    }
    forward = found["forward", "_coupling_fwd_kernel"]
    assert len(found) == 7
    assert 12 <= forward.bytes / forward.elements < 12.5  # 3 N, and little for the rest
    assert 15 < forward.per_element < 60
    # 8 pairs for each thread
    assert forward.programs * forward.code.warps * 32 * 16 == forward.elements
    for p in found.values():
        assert p.code.spills == 0
        assert min(p.issue, p.pipe[0], p.memory, p.latency) > 0
        assert len(compiled.row(p, {})) == len(compiled.HEADER)
        assert compiled.row(p, {("small", "float32", p.phase, p.code.kernel): 2.34})[-1] == "2.3"
        assert 4 <= p.resident * p.code.warps <= 64


def test_loops_are_counted() -> None:
    """Twice the samples in twice the iterations of as many programs: about twice the instructions
    of a program.
    """
    few, many = (
        next(
            p
            for p in compiled.predict(Workload("rows", (batch, 512)), "fp32")
            if p.code.kernel == "_coupling_bwd_kernel"
        )
        for batch in (4096, 8192)
    )
    assert few.programs == many.programs
    assert 1.6 < many.instructions / few.instructions < 2.0


def test_workloads_are_those_of_the_kernels() -> None:
    names = [w.name for w in compiled.workloads()]
    assert "tabular GIN" in names
    assert "tabular soft" not in names
    assert len({(w.shape, compiled.spec_of(w.options)) for w in compiled.workloads()}) == len(names)


CPU = torch.device("cpu")
PLANES = Workload("planes", (2, 8, 32, 32))
ROWS = Workload("rows", (512, 128))


@pytest.mark.parametrize("question", tune.QUESTIONS, ids=lambda question: question.name)
def test_a_question_asks_about_what_is_there(question: tune.Question) -> None:
    for module, constant, value in question.settings[0]:
        assert getattr(tune._module(module), constant) == value
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
        now, other = (tune.Variant(setting, passes) for setting in question.settings[:2])
        assert launches(other) != launches(now)
        assert launches(other) == launches(other)


def test_tuning_times_every_value_and_leaves_the_code_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "SPAN", {"cpu": 0.0})
    monkeypatch.setattr(tune, "REPEATS", (2, 2))
    question = tune.Question(
        "tile",
        tune._tried("plan", "TILE_BYTES", 4096, 2048),
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
    other = (
        {"_coupling_fwd_kernel", "_logdet_kernel"}
        if workload is ROWS
        else {"_coupling_rows_fwd_kernel"}
    )
    assert set(launched) == defined - other


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
