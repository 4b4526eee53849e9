"""Tests of ``python -m bench compare COMMIT``: turns, ratios, marks, and a real comparison."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench import commits
from bench.choice import Choice, Group
from bench.commits import Outcome
from bench.timed_process import Case
from bench.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
CASE = Case(Group("block", Workload("small", (3, 6)), "float32", "train"), "ours", "cpu")
CHOICE = Choice(["block"], ["small/"], ["train"], ["float32"], ["ours"], torch.device("cpu"))


class Fake:
    """A process whose calls take a fixed time."""

    def __init__(self, name: str, most: int, order: list[str]) -> None:
        self.name, self.most, self.order = name, most, order

    def calls(self, case: Case) -> int:
        return self.most

    def seconds(self, case: Case, calls: int) -> float:
        assert calls == 4
        self.order.append(self.name)
        return 3.0 if self.name == "before" else 2.0


def test_processes_take_turns_and_neither_always_goes_first() -> None:
    order: list[str] = []
    before, after = Fake("before", 8, order), Fake("after", 4, order)
    outcome = commits.time_in_turn(before, after, CASE, seconds=0.0)
    assert order == ["before", "after", "after", "before"] * (commits.ROUNDS[0] // 2)
    assert outcome.ratio == 1.5
    assert len(outcome.before) == len(outcome.after) == commits.ROUNDS[0]


def test_a_ratio_is_that_of_medians() -> None:
    outcome = Outcome(CASE, [2.0, 2.0, 90.0] * 5, [1.0, 50.0, 1.0] * 5)
    assert outcome.ratio == 2.0
    assert outcome.part_ratios() == [2.0] * 5
    assert outcome.line(0.98).endswith("2.000  (2.000 to 2.000)")
    assert outcome.line(2.5).endswith("<-- below")


def fake_outcomes(
    monkeypatch: pytest.MonkeyPatch, ratios: Sequence[Sequence[float]]
) -> list[list[str]]:
    """Give every pass these ratios, and return a list that fills with the cases of each pass."""
    passes: list[list[str]] = []

    def outcomes_of(folder: Path, cases: Sequence[Case], seconds: float) -> Iterator[Outcome]:
        passes.append([case.group.workload.name for case in cases])
        for case, ratio in zip(cases, ratios[len(passes) - 1], strict=False):
            yield Outcome(case, [ratio] * 10, [1.0] * 10)

    monkeypatch.setattr(commits, "outcomes_of", outcomes_of)
    monkeypatch.setattr(commits, "extract", lambda commit, folder: None)
    return passes


NAMES = ["small/posterior", "small/sample", "small/image", "small/image channels-last"]
NAMES += ["small/signal"]


@pytest.mark.parametrize(
    ("again", "expected"), [((0.99, 1.01), 0), ((0.97, 1.01), 1), ((0.9, 0.9), 1)]
)
def test_rows_below_the_threshold_are_measured_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    again: tuple[float, float],
    expected: int,
) -> None:
    """The median of the three ratios decides."""
    passes = fake_outcomes(monkeypatch, [[1.0, 0.95, 1.0, 1.1, 1.0], [again[0]], [again[1]]])
    assert commits.compare("HEAD", CHOICE, 1.0, 0.98) == expected
    assert passes == [NAMES, ["small/sample"], ["small/sample"]]
    output = capsys.readouterr().out
    assert "5 rows, before / after: geometric mean" in output
    assert ("below 0.98: " in output) == bool(expected)


def test_a_row_that_could_not_be_timed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = fake_outcomes(monkeypatch, [[1.0, 1.0]])
    assert commits.compare("HEAD", CHOICE, 1.0, 0.98) == 1
    assert passes == [NAMES]


def test_only_ours_can_be_compared_with_a_commit() -> None:
    stock = Choice(["block"], ["all"], ["train"], ["float32"], ["freia"], torch.device("cpu"))
    with pytest.raises(SystemExit, match="--providers has to name ours or ours-freia"):
        commits.compare("HEAD", stock, 1.0, 0.98)


in_a_repository = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")


@in_a_repository
def test_a_commit_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SystemExit, match="git archive nowhere fastflow_kernels: "):
        commits.compare("nowhere", CHOICE, 1.0, 0.98)


@pytest.mark.slow
@in_a_repository
def test_a_planted_delay_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version before is the working tree's package with 200 us of extra work in every call."""

    def extract(commit: str, folder: Path) -> None:
        subprocess.run(["cp", "-r", str(ROOT / "fastflow_kernels"), str(folder)], check=True)
        with (folder / "fastflow_kernels/modules.py").open("a") as file:
            file.write(
                "\nforward = AllInOneBlock.forward\n"
                "def slow(*args, **kwargs):\n    sum(range(20000))\n"
                "    return forward(*args, **kwargs)\nAllInOneBlock.forward = slow\n"
            )

    monkeypatch.setattr(commits, "extract", extract)
    cases = commits.cases_of(CHOICE)[1:2]
    extract("", tmp_path)
    (outcome,) = commits.outcomes_of(tmp_path, cases, 1.0)
    assert outcome.ratio > 1.2


@pytest.mark.slow
@in_a_repository
def test_the_command_compares_with_a_commit() -> None:
    command = [sys.executable, "-m", "bench", "compare", "HEAD", "--workloads", "small/sample"]
    options = ["--modes", "train", "--seconds", "0.2", "--threshold", "0.1", "--device", "cpu"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rows, before / after: geometric mean" in done.stdout
