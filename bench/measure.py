"""Measure the rows of one group (workload, mode, dtype).

Parity comes first, then interleaved times, then memory.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.choice import Group
from bench.providers import PROVIDERS, Provider, block_class, why_not
from bench.records import Row
from bench.subject import NotMeasurable, Subject, build_model, draw_samples, minimal_bytes
from bench.timing import MOST_CALLS, Times, interleaved
from bench.workloads import WHOLE
from tests.support.compare import assert_close

# Bytes that all forward passes together may hold while backward passes are timed.
HELD_FOR_BACKWARD = {"cpu": 1 << 30, "cuda": 8 << 30}


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: Where everything runs.
        repeats: The least and the most repetitions.
        seconds: Time limit of one group, which holds once it has the least repetitions.
        copy_bandwidth: Bandwidth of the device in bytes per second.
    """

    device: torch.device
    repeats: tuple[int, int]
    seconds: float
    copy_bandwidth: float


@dataclass
class Outcome:
    """The result of one provider in one group: its figures, or the reason why it has none.

    Attributes:
        row: The result row. It has no figures if the provider was skipped.
        failure: Why the run has failed, or None. Either results are wrong, or ours did not run.
    """

    row: Row
    failure: str | None = None


class Task:
    """The subjects of one workload and dtype, which all modes share."""

    def __init__(self, group: Group, names: Sequence[str], settings: Settings) -> None:
        # Otherwise compiled code of earlier workloads fills Dynamo's cache, and it silently falls
        # back to eager.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        self.kind, self.workload, self.settings = group.kind, group.workload, settings
        self.dtype: torch.dtype = getattr(torch, group.dtype)
        self.samples = draw_samples(self.kind, self.workload, self.dtype, settings.device)
        build, _ = block_class(PROVIDERS["ours"], self.workload, self.kind)
        self.weights = build_model(self.kind, self.workload, build, "anomalib").to(self.dtype)
        self.subjects: dict[str, Subject] = {}
        self.absent: dict[str, Exception] = {}
        self.truths: dict[tuple[str, str], tuple[dict[str, Tensor | None], ...]] = {}
        for name in names:
            self._add(PROVIDERS[name])

    def is_of(self, group: Group) -> bool:
        """Tell whether the group has this workload and dtype."""
        dtype = getattr(torch, group.dtype)
        return (self.kind, self.workload, self.dtype) == (group.kind, group.workload, dtype)

    def _add(self, provider: Provider) -> None:
        try:
            if reason := why_not(provider, self.workload, self.settings.device.type == "cpu"):
                raise NotMeasurable(reason)
            self.subjects[provider.name] = Subject(
                self.kind, self.workload, provider, self.samples, self.weights
            )
        except Exception as error:
            self.absent[provider.name] = error

    def measure(self, mode: str) -> dict[str, Outcome]:
        """Measure every provider in a mode, and return the outcomes by name."""
        errors, fit = dict(self.absent), {}
        for name, subject in self.subjects.items():
            try:
                self._check(subject, mode)
                fit[name] = subject
            except Exception as error:
                errors[name] = error
        outcomes = {name: self._skip(mode, name, error) for name, error in errors.items()}
        if fit:
            times = interleaved(
                fit,
                mode,
                self.settings.device,
                self.settings.repeats,
                self.settings.seconds,
                self._most_calls(mode, fit),
            )
            outcomes |= {
                name: Outcome(self._row(mode, name) | self._figures(mode, name, times))
                for name in fit
            }
        return outcomes

    def _skip(self, mode: str, name: str, error: Exception) -> Outcome:
        """Return the outcome of a provider that cannot be measured.

        Wrong results are a failure, and so is any error of ours. A stock block may raise errors.
        """
        reason = (
            str(error)
            if isinstance(error, NotMeasurable)
            else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
        is_failure = isinstance(error, AssertionError) or (
            PROVIDERS[name].is_ours and not isinstance(error, NotMeasurable)
        )
        row = self._row(mode, name) | {"skipped": reason}
        return Outcome(row, failure=reason if is_failure else None)

    def _check(self, subject: Subject, mode: str) -> None:
        """Compare a subject's results with the float64 truth, by the criterion of the tests.

        Raises:
            AssertionError: If an error is too large.
        """
        truth, baseline = self._truth(subject.provider.dialect, mode)
        # Only whole flows have entries: one label for the same parameter of all blocks.
        gradients = defaultdict(list)
        for name, value in subject.results(mode).items():
            exact, label = truth[name], f"{subject.provider.name}, {mode}, {name}"
            if self.kind in WHOLE and exact is not None and name.startswith("d"):
                gradients[re.sub(r"blocks\.\d+", "blocks.*", label)].append(
                    (value, exact, baseline[name])
                )
                continue
            magnitude = (
                None if exact is None else self._roundings(subject, name) * exact.abs().max().item()
            )
            assert_close(value, exact, baseline[name], label, magnitude=magnitude)
        for label, triples in gradients.items():
            value, exact, baseline_value = (
                torch.cat([t.flatten().double() for t in tensors])
                for tensors in zip(*triples, strict=True)
            )
            assert_close_past_kinks(value, exact, baseline_value, self.workload.steps, label)

    def _roundings(self, subject: Subject, name: str) -> float:
        """Return the factor by which the criterion's floor grows for one result.

        A chain of blocks adds up the rounding errors of its steps. A sum adds to that: eager
        PyTorch sums in a tree, but Inductor's CPU code adds one term after the other. Its error
        grows like a random walk, by the square root of the number of terms. Without this factor
        the gradient of the scale over 4096 rows had 2.1 times the allowed error, in the stock block
        and in ours.
        """
        steps = self.workload.steps if self.kind in WHOLE else 1
        if subject.provider.execution == "eager" or name.startswith(("output", "dx", "da")):
            return steps
        batch, channels, *_ = self.workload.shape
        return steps * math.sqrt(
            self.samples[0].x.numel() // (batch if name == "log-det" else channels)
        )

    def _truth(self, dialect: str, mode: str) -> tuple[dict[str, Tensor | None], ...]:
        """Return the reference's results in float64 and in this dtype."""
        mode = "train" if mode == "backward" else mode
        if (dialect, mode) not in self.truths:
            provider = Provider("reference-freia" if dialect == "freia" else "reference")
            # Free the results of other modes.
            self.truths = {key: value for key, value in self.truths.items() if key[1] == mode}
            self.truths[dialect, mode] = tuple(
                self._reference(provider, mode, dtype) for dtype in (torch.float64, self.dtype)
            )
        return self.truths[dialect, mode]

    def _reference(
        self, provider: Provider, mode: str, dtype: torch.dtype
    ) -> dict[str, Tensor | None]:
        subject = Subject(
            self.kind, self.workload, provider, [self.samples[0].to(dtype)], self.weights
        )
        return {
            name: None if t is None else t.detach() for name, t in subject.results(mode).items()
        }

    def _most_calls(self, mode: str, subjects: dict[str, Subject]) -> int:
        """Return how many calls in a row may be timed at most.

        In mode "backward" each call holds a forward pass of its own, so memory limits them.
        """
        if mode != "backward":
            return MOST_CALLS
        held = max((subject.kept() for subject in subjects.values()), default=0)
        calls = max(
            1, min(MOST_CALLS, HELD_FOR_BACKWARD[self.settings.device.type] // max(held, 1))
        )
        return 1 << (calls.bit_length() - 1)

    def _row(self, mode: str, name: str) -> Row:
        return {
            "kind": self.kind,
            "workload": self.workload.name,
            "shape": list(self.workload.shape),
            "mode": mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "block": self.workload.block,
            "provider": name,
            "class": block_class(PROVIDERS[name], self.workload, self.kind)[1],
        }

    def _figures(self, mode: str, name: str, times: dict[str, Times]) -> Row:
        measured, subject = times[name], self.subjects[name]
        base = subject.provider.our_base(self.workload.block)
        ours, ours_alike = (
            times.get(base),
            times.get(Provider(base, subject.provider.execution).name),
        )
        p20, *_, p80 = statistics.quantiles(measured.seconds, n=5)
        wall_p20, *_, wall_p80 = statistics.quantiles(measured.wall, n=5)
        median = statistics.median(measured.seconds)
        figures: Row = {
            "median_us": median * 1e6,
            "p20_us": p20 * 1e6,
            "p80_us": p80 * 1e6,
            "wall_us": statistics.median(measured.wall) * 1e6,
            "wall_p20_us": wall_p20 * 1e6,
            "wall_p80_us": wall_p80 * 1e6,
            "repeats": len(measured.seconds),
            "ratio": _ratio(measured, ours),
            "ratio_alike": _ratio(measured, ours_alike),
            "ratio_wall": _ratio(measured, ours, "wall"),
            "ratio_wall_alike": _ratio(measured, ours_alike, "wall"),
            "copy_gbs": self.settings.copy_bandwidth * 1e-9,
        }
        if self.kind not in WHOLE:
            rate = minimal_bytes(mode, self.samples[0]) / median
            figures |= {"gbs": rate * 1e-9, "share": rate / self.settings.copy_bandwidth}
        if mode == "train" and subject.provider.execution != "graphs":
            figures["kept_bytes"] = subject.kept()
            figures["kept_in_inputs"] = figures["kept_bytes"] / self.samples[0].x.nbytes
        if self.settings.device.type == "cuda":
            figures["python_hidden"] = measured.hidden
            figures["call_bytes"] = _call_bytes(subject, mode)
        return figures


def assert_close_past_kinks(
    value: Tensor, truth: Tensor, baseline: Tensor, steps: int, name: str
) -> None:
    """Assert that gradients through the ReLUs of a whole flow are close enough to the truth.

    The gradients of all blocks are judged together, by their RMS alone, with a wider floor than
    that of :func:`tests.support.compare.assert_close`.

    The reason: if rounding moves a hidden value across zero, its whole gradient comes or goes. Of n
    such gates about n * steps * eps are that close. If k of n gates flip, a gradient changes by a
    relative sqrt(k / n). In float32 the baseline may have no flip at all. In bfloat16 it has flips
    too, but in different blocks, so all blocks count together.

    Measured with the strict criterion: one flipped gate of cflow-ad/1 in float32 causes 10 times
    the allowed error. For hyperspectral in bfloat16, the median block of ours has 0.7 times the
    baseline's error. The first layers of one or two blocks have 3 to 8 times it, and which blocks
    these are depends on the input. Blocks that are measured alone keep the strict criterion.
    """

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    error, allowed = (
        rms(value - truth),
        2 * rms(baseline - truth)
        + 4 * math.sqrt(steps * torch.finfo(torch.float32).eps) * rms(truth),
    )
    if not error <= allowed:
        raise AssertionError(
            f"{name}: rms error {error:.3g} > allowed {allowed:.3g} (rms of the truth: "
            f"{rms(truth):.3g})"
        )


def _ratio(times: Times, ours: Times | None, clock: str = "seconds") -> float | None:
    """Return the median of time / our time, paired by repetition. Above 1 ours is faster."""
    if ours is None:
        return None
    return statistics.median(
        seconds / our_seconds
        for seconds, our_seconds in zip(getattr(times, clock), getattr(ours, clock), strict=True)
    )


def _call_bytes(subject: Subject, mode: str) -> int:
    """Return the most bytes that a call has allocated at a time, its results included.

    An equal call runs first, so that the subject has released what it held of an earlier call.
    """
    warm_up, run = subject.ready(mode, 2)
    warm_up()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
