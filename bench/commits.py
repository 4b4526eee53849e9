"""Compare the working tree with a commit. Each runs in a process of its own, and they take turns.

On a CPU both processes run on one core and are timed by their own processor time. Other work on the
machine then adds little. A row below the threshold is measured twice more in new processes, and the
median of its three ratios counts.
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

ROUNDS = (10, 400)  # at least and at most, for each row
PARTS = 5  # equal parts of a row's rounds; their ratios show the spread
REPEATED_PASSES = 2  # over the rows that are below the threshold


@dataclass(frozen=True)
class Outcome:
    """Seconds per call of one case, one entry a round.

    Attributes:
        case: What was timed.
        before: Times of the commit.
        after: Times of the working tree.
    """

    case: Case
    before: list[float]
    after: list[float]

    @property
    def ratio(self) -> float:
        """Median time before, divided by the one after. Above 1 the working tree is faster."""
        return statistics.median(self.before) / statistics.median(self.after)

    def part_ratios(self) -> list[float]:
        """Return the ratio in each of PARTS equal runs of rounds."""
        size = len(self.before) // PARTS
        starts = range(0, size * PARTS, size)
        return [
            statistics.median(self.before[i : i + size])
            / statistics.median(self.after[i : i + size])
            for i in starts
        ]

    def line(self, threshold: float) -> str:
        before, after = (1e6 * statistics.median(t) for t in (self.before, self.after))
        low, high = min(self.part_ratios()), max(self.part_ratios())
        mark = "  <-- below" if self.ratio < threshold else ""
        times = f"{before:>11,.1f} {after:>11,.1f} {self.ratio:>8.3f}"
        return f"{self.case!s:<60} {times}  ({low:.3f} to {high:.3f}){mark}"


def compare(commit: str, choice: Choice, seconds: float, threshold: float) -> int:
    """Compare the working tree with a commit, and print a table.

    Args:
        commit: A commit, branch or tag.
        choice: What is timed. Only eager providers of ours count.
        seconds: Time limit of a row, which holds once the row has its minimum of rounds.
        threshold: Rows with a smaller ratio before / after are marked.

    Returns:
        The exit status: 1 if a row is below the threshold or could not be timed.
    """
    cases = cases_of(choice)
    ratios: dict[str, list[float]] = {str(case): [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        extract(commit, Path(folder))
        print("ratio = before / after; in brackets: its range over fifths of the rounds")
        print(f"{'median us per call':<60} {'before':>11} {'after':>11} {'ratio':>8}")
        for is_repeated in (False, *[True] * REPEATED_PASSES):
            if is_repeated:
                cases = [c for c in cases if ratios[str(c)] and ratios[str(c)][0] < threshold]
            if not cases:
                break
            if is_repeated:
                print(f"measured again in new processes: {len(cases)} rows")
            for outcome in outcomes_of(Path(folder), cases, seconds):
                ratios[str(outcome.case)].append(outcome.ratio)
                print(outcome.line(threshold), flush=True)
    return _conclude(ratios, threshold)


def cases_of(choice: Choice) -> list[Case]:
    chosen = [PROVIDERS[name] for name in choice.providers]
    ours = [p for p in chosen if p.is_ours and p.execution == "eager"]
    if not ours:
        raise SystemExit(
            "bench compare COMMIT: --providers has to name ours or ours-freia, got "
            f"{', '.join(choice.providers)}"
        )
    on_cpu = choice.device.type == "cpu"
    return [
        Case(group, provider.name, str(choice.device))
        for group in choice.groups()
        for provider in ours
        if not why_not(provider, group.workload, on_cpu)
    ]


def extract(commit: str, folder: Path) -> None:
    """Write the package as it is in a commit into a folder, without the rest of the checkout."""
    command = ["git", "archive", commit, "fastflow_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder)


def outcomes_of(folder: Path, cases: Sequence[Case], seconds: float) -> Iterator[Outcome]:
    """Yield the outcome of every case, timed in two new processes.

    A case that one of them cannot run is printed with its reason and left out.
    """
    with TimedProcess(folder) as before, TimedProcess(ROOT) as after:
        for case in cases:
            try:
                yield time_in_turn(before, after, case, seconds)
            except Failed as error:
                print(f"{case!s:<60} not timed: {error}", flush=True)


def time_in_turn(before: TimedProcess, after: TimedProcess, case: Case, seconds: float) -> Outcome:
    calls = min(before.calls(case), after.calls(case))
    outcome, start = Outcome(case, [], []), time.perf_counter()
    sides = [(before, outcome.before), (after, outcome.after)]
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for process, times in sides:
            times.append(process.seconds(case, calls))
        sides.reverse()  # so that neither always goes first
    return outcome


def _conclude(ratios: dict[str, list[float]], threshold: float) -> int:
    medians = {case: statistics.median(values) for case, values in ratios.items() if values}
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
