"""Rows of one group (workload, mode, dtype): parity first, then interleaved times, then memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Workload
from bench.providers import PROVIDERS, Provider, block_class, why_not
from bench.records import Row
from bench.subject import MINIMAL_BYTES, NotHere, Subject, build_model, draw_samples
from bench.timing import MOST_CALLS, Times, interleaved
from tests.compare import assert_close

HELD_FOR_BACKWARD = {"cpu": 1 << 30, "cuda": 8 << 30}  # bytes that forward passes may hold at a time while backward is timed


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: Where.
        repeats: The least and the most repetitions.
        seconds: What the repetitions of one group may take, once there are the least.
        copy_bandwidth: The device's, in bytes per second.
    """

    device: torch.device
    repeats: tuple[int, int]
    seconds: float
    copy_bandwidth: float


@dataclass
class Outcome:
    """What became of one provider in one group: times, or the reason why there are none.

    Attributes:
        row: The result row; without figures if the provider was skipped.
        times: For pytest-benchmark; None if skipped or failed.
        failure: Why the provider must not have a row: its results are wrong, or ours did not run.
    """

    row: Row
    times: Times | None = None
    failure: str | None = None


class Task:
    """The subjects of one workload and dtype, shared by the modes."""

    def __init__(self, kind: str, workload: Workload, dtype: torch.dtype, names: Sequence[str], settings: Settings) -> None:
        torch._dynamo.reset()  # or the compiled code of other workloads fills the cache, and Dynamo falls back to eager in silence
        torch._dynamo.config.recompile_limit = 64
        self.kind, self.workload, self.dtype, self.settings = kind, workload, dtype, settings
        self.samples = draw_samples(kind, workload, dtype, settings.device)
        build, _ = block_class(PROVIDERS["ours"])
        self.weights = build_model(kind, workload, build, "anomalib").to(dtype)
        self.subjects: dict[str, Subject] = {}
        self.absent: dict[str, str] = {}
        self.truths: dict[tuple[str, str], tuple[dict[str, Tensor | None], ...]] = {}
        for name in names:
            self._add(PROVIDERS[name])

    def _add(self, provider: Provider) -> None:
        reason = why_not(provider, self.workload, self.settings.device.type == "cpu")
        if reason is None:
            try:
                self.subjects[provider.name] = Subject(self.kind, self.workload, provider, self.samples, self.weights)
                return
            except Exception as error:
                if provider.ours and provider.execution == "eager":
                    raise
                reason = _in_short(error)
        self.absent[provider.name] = reason

    def measure(self, mode: str) -> dict[str, Outcome]:
        """The outcome of every provider in a mode."""
        outcomes = {name: Outcome(self._row(mode, name) | {"skipped": reason}) for name, reason in self.absent.items()}
        fit: dict[str, Subject] = {}
        for name, subject in self.subjects.items():
            try:
                self._check(subject, mode)
                fit[name] = subject
            except AssertionError as error:
                outcomes[name] = Outcome(self._row(mode, name), failure=f"parity: {error}")
            except Exception as error:
                row = self._row(mode, name) | {"skipped": _in_short(error)}
                broken = subject.provider.ours and not isinstance(error, NotHere)
                outcomes[name] = Outcome(row, failure=f"ours failed: {_in_short(error)}" if broken else None)
        if fit:
            times = interleaved(fit, mode, self.settings.device, self.settings.repeats, self.settings.seconds, self._most_calls(mode, fit))
            outcomes |= {name: Outcome(self._row(mode, name) | self._figures(mode, name, times), times[name]) for name in fit}
        return outcomes

    def _check(self, subject: Subject, mode: str) -> None:
        """Raise AssertionError unless a subject is as close to the float64 truth as the tests ask for.

        A chain of blocks adds up its steps' roundings, which the floor allows for.
        """
        truth, baseline = self._truth(subject.provider.dialect, mode)
        for name, value in subject.results(mode).items():
            exact = truth[name]
            magnitude = None if exact is None else max(1, self.workload.steps * (self.kind == "flow")) * exact.abs().max().item()
            assert_close(value, exact, baseline[name], f"{subject.provider.name}, {mode}, {name}", magnitude=magnitude)

    def _truth(self, dialect: str, mode: str) -> tuple[dict[str, Tensor | None], ...]:
        """The reference's results in float64 and in this dtype."""
        mode = "train" if mode == "backward" else mode
        if (dialect, mode) not in self.truths:
            provider = Provider("reference-freia" if dialect == "freia" else "reference")
            self.truths = {key: value for key, value in self.truths.items() if key[1] == mode}  # another mode's take memory for nothing
            self.truths[dialect, mode] = tuple(
                {
                    name: None if t is None else t.detach()
                    for name, t in Subject(self.kind, self.workload, provider, [self.samples[0].to(dtype)], self.weights)
                    .results(mode)
                    .items()
                }
                for dtype in (torch.float64, self.dtype)
            )
        return self.truths[dialect, mode]

    def _most_calls(self, mode: str, subjects: dict[str, Subject]) -> int:
        """Calls in a row, cut down where each holds a forward pass of its own until its backward."""
        if mode != "backward":
            return MOST_CALLS
        held = max((s.kept() for s in subjects.values()), default=0)
        calls = max(1, min(MOST_CALLS, HELD_FOR_BACKWARD[self.settings.device.type] // max(held, 1)))
        return 1 << (calls.bit_length() - 1)

    def _row(self, mode: str, name: str) -> Row:
        return {
            "kind": self.kind,
            "workload": self.workload.name,
            "shape": list(self.workload.shape),
            "mode": mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "provider": name,
            "class": block_class(PROVIDERS[name])[1],
        }

    def _figures(self, mode: str, name: str, times: dict[str, Times]) -> Row:
        mine, subject = times[name], self.subjects[name]
        p20, *_, p80 = statistics.quantiles(mine.seconds, n=5)
        median = statistics.median(mine.seconds)
        figures: Row = {
            "median_us": median * 1e6,
            "p20_us": p20 * 1e6,
            "p80_us": p80 * 1e6,
            "wall_us": statistics.median(mine.wall) * 1e6,
            "repeats": len(mine.seconds),
            "ratio": _ratio(mine, times.get(subject.provider.our_base)),
            "ratio_alike": _ratio(mine, times.get(Provider(subject.provider.our_base, subject.provider.execution).name)),
            "copy_gbs": self.settings.copy_bandwidth * 1e-9,
        }
        if self.kind != "flow":
            rate = MINIMAL_BYTES[mode] * self.samples[0].x.nbytes / median
            figures |= {"gbs": rate * 1e-9, "share": rate / self.settings.copy_bandwidth}
        if mode == "train" and subject.provider.execution != "graphs":
            figures["kept_bytes"] = subject.kept()
            figures["kept_in_inputs"] = figures["kept_bytes"] / self.samples[0].x.nbytes
        if self.settings.device.type == "cuda":
            figures["peak_bytes"] = _peak(subject, mode)
        return figures


def _ratio(theirs: Times, ours: Times | None) -> float | None:
    """How many times as long theirs takes, paired within each repetition. Above 1 ours is faster."""
    if ours is None:
        return None
    return statistics.median(t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True))


def _peak(subject: Subject, mode: str) -> int:
    """Bytes that a call needs on top of what was allocated before it."""
    ready = subject.ready(mode, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for run in ready:
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _in_short(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if not isinstance(error, NotHere) else str(error)
