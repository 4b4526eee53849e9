"""The working tree against another commit: two processes, one for each, which take turns.

On a CPU both run on one core and their own processor time counts, so that other work on the machine
adds little. A row below the threshold is measured twice more, by new processes, and the median of
the three counts.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.choice import Choice
from bench.providers import PROVIDERS, why_not
from bench.records import ROOT
from bench.timed_process import Case, Failed, TimedProcess

ROUNDS = (10, 400)  # of a row, at least and at most
PARTS = 5  # of a row's rounds, to say how far their ratios lie apart
MORE_PASSES = 2  # over rows that are below the threshold


@dataclass(frozen=True)
class Outcome:
    """Seconds per call of a case, one entry a round.

    Attributes:
        case: What was timed.
        before: In the commit.
        after: In the working tree.
    """

    case: Case
    before: list[float]
    after: list[float]

    @property
    def ratio(self) -> float:
        """before / after, by medians. Above 1 the working tree is faster."""
        return statistics.median(self.before) / statistics.median(self.after)

    def parts(self) -> list[float]:
        """The ratio in each of PARTS runs of rounds."""
        size = len(self.before) // PARTS
        starts = range(0, size * PARTS, size)
        return [
            statistics.median(self.before[i : i + size])
            / statistics.median(self.after[i : i + size])
            for i in starts
        ]

    def line(self, threshold: float) -> str:
        before, after = (1e6 * statistics.median(t) for t in (self.before, self.after))
        low, high = min(self.parts()), max(self.parts())
        mark = "  <-- below" if self.ratio < threshold else ""
        times = f"{before:>11,.1f} {after:>11,.1f} {self.ratio:>8.3f}"
        return f"{self.case!s:<60} {times}  ({low:.3f} to {high:.3f}){mark}"


def compare(commit: str, choice: Choice, seconds: float, threshold: float) -> int:
    """Compare the working tree with a commit, and print a table.

    Args:
        commit: What git understands.
        choice: What is timed; of the providers, ours.
        seconds: What a row may take, once it has the least rounds.
        threshold: The least before / after that is not marked.

    Returns:
        The exit status: 1 if a row is below the threshold or could not be timed.
    """
    cases = cases_of(choice)
    ratios: dict[str, list[float]] = {str(case): [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        extract(commit, Path(folder))
        print(f"{'us per call':<60} {'before':>11} {'after':>11} before / after (of fifths)")
        for is_again in (False, *[True] * MORE_PASSES):
            if is_again:
                cases = [c for c in cases if ratios[str(c)] and ratios[str(c)][0] < threshold]
            if not cases:
                break
            if is_again:
                print(f"once more, by new processes: {len(cases)} rows")
            for outcome in outcomes_of(Path(folder), cases, seconds):
                ratios[str(outcome.case)].append(outcome.ratio)
                print(outcome.line(threshold), flush=True)
    return _conclude(ratios, threshold)


def cases_of(choice: Choice) -> list[Case]:
    chosen = [PROVIDERS[name] for name in choice.providers]
    ours = [p for p in chosen if p.ours and p.execution == "eager"]
    if not ours:
        raise SystemExit("compare COMMIT: --providers has to name ours or ours-freia")
    on_cpu = choice.device.type == "cpu"
    return [
        Case(group, provider.name, str(choice.device))
        for group in choice.groups()
        for provider in ours
        if not why_not(provider, group.workload, on_cpu)
    ]


def extract(commit: str, folder: Path) -> None:
    """The package as it is in a commit, and nothing else, into a folder."""
    command = ["git", "archive", commit, "fastflow_kernels"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}: {found.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder)


def outcomes_of(folder: Path, cases: Sequence[Case], seconds: float) -> Iterator[Outcome]:
    """The outcome of every case by two new processes; says which could not be timed."""
    with TimedProcess(folder) as before, TimedProcess(ROOT) as after:
        for case in cases:
            try:
                yield in_turn(before, after, case, seconds)
            except Failed as error:
                print(f"{case!s:<60} not timed: {error}", flush=True)


def in_turn(before: TimedProcess, after: TimedProcess, case: Case, seconds: float) -> Outcome:
    calls = min(before.calls(case), after.calls(case))
    outcome, began = Outcome(case, [], []), time.perf_counter()
    sides = [(before, outcome.before), (after, outcome.after)]
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.perf_counter() - began > seconds:
            break
        for process, times in sides:
            times.append(process.seconds(case, calls))
        sides.reverse()  # neither always goes first
    return outcome


def _conclude(ratios: dict[str, list[float]], threshold: float) -> int:
    medians = {case: statistics.median(found) for case, found in ratios.items() if found}
    if not medians:
        return 1
    worst = min(medians, key=lambda case: medians[case])
    mean = statistics.geometric_mean(medians.values())
    print(
        f"{len(medians)} rows, before / after: geometric mean {mean:.3f}, "
        f"worst {medians[worst]:.3f} ({worst})"
    )
    for case, ratio in medians.items():
        if ratio < threshold:
            print(f"below {threshold}: {ratio:.3f}  {case}")
    return int(medians[worst] < threshold or len(medians) < len(ratios))
