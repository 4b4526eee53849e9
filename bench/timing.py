"""Times of several subjects in one interleaved run: on a GPU the device's own and those of the
calls, on a CPU the wall clock's.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch

# Seconds of calls in a row that one sample averages over: small inputs are measured as a loop runs
# them, not from cold.
SPAN = {"cpu": 10e-3, "cuda": 3e-3}
MOST_CALLS = 64
HEAD_START = 1 << 30  # bytes of one write ahead of a sample of the device's time
QUEUED = 4e-3  # seconds of calls that are queued behind such writes
# bytes copied to measure the bandwidth: far above any cache
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}


class Timeable(Protocol):
    """Gives calls that are ready to be timed in a row; what must not be timed has been done."""

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]: ...


@dataclass
class Times:
    """Seconds per call, one entry per repetition.

    Attributes:
        seconds: On a GPU the device's own time, see :func:`device_time`. On a CPU by the wall
            clock.
        wall: As called: by the wall clock on both, until the device is done.
        hidden: Whether Python was hidden from all of the GPU's own times.
    """

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    hidden: bool = True


def interleaved(
    subjects: Mapping[str, Timeable],
    mode: str,
    device: torch.device,
    repeats: tuple[int, int],
    most_seconds: float,
    most_calls: int = MOST_CALLS,
) -> dict[str, Times]:
    """Time every subject once per repetition, in turn, so that what slows the machine for a while
    slows all of them.

    Args:
        subjects: By name.
        mode: Passed to ``ready``.
        device: Whose clock counts.
        repeats: The least and the most repetitions; between them it is what fits into
            ``most_seconds``.
        most_seconds: See ``repeats``.
        most_calls: Calls in a row of one sample, at most.
    """
    began = time.perf_counter()
    calls = {
        name: calls_in_a_row(subject, mode, device, most_calls, SPAN[device.type])
        for name, subject in subjects.items()
    }
    spent = time.perf_counter() - began
    began = time.perf_counter()
    times = {name: Times() for name in subjects}
    least, most = repeats
    for done in range(most):
        if done >= least and (time.perf_counter() - began) * (done + 1) / done > max(
            most_seconds - spent, 0.0
        ):
            break
        for name, subject in subjects.items():
            wall = time_calls(subject.ready(mode, calls[name]), device)
            times[name].wall.append(wall)
            seconds, hidden = (
                device_time(subject, mode, calls[name], wall)
                if device.type == "cuda"
                else (wall, True)
            )
            times[name].seconds.append(seconds)
            times[name].hidden &= hidden
    return times


def calls_in_a_row(
    subject: Timeable, mode: str, device: torch.device, most: int, span: float
) -> int:
    """As many as fill ``span`` seconds, a power of two; the first calls warm up."""
    time_calls(subject.ready(mode, 1), device)
    calls = 1
    while calls < most and time_calls(subject.ready(mode, calls), device) * calls < span:
        calls *= 2
    return calls


def time_calls(
    ready: Sequence[Callable[[], Any]],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds per call, until the device is done, of calls in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with _no_collector():
        wait()
        begin = clock()
        for run in ready:
            run()
        wait()
        return (clock() - begin) / len(ready)


def device_time(subject: Timeable, mode: str, calls: int, wall: float) -> tuple[float, bool]:
    """Seconds per call on the GPU alone, and whether what Python and the launches take was hidden,
    as is meant.

    The calls are queued behind writes that take longer than queueing does, so that the GPU finds
    each launch ready. The writes also empty the L2 cache.

    Args:
        subject, mode: What is called.
        calls: The most calls in a row.
        wall: Seconds that a call takes by the wall clock.
    """
    calls = max(1, min(calls, int(QUEUED / wall)))
    found = (0.0, False)
    # of a subject that waits for the device itself nothing can be hidden
    for patience in (1.5, 3.0):
        if not found[1]:
            found = queued_time(subject.ready(mode, calls), patience * wall * calls)
    return found


def queued_time(ready: Sequence[Callable[[], Any]], delay: float) -> tuple[float, bool]:
    """Seconds per call of calls that are queued while the GPU is busy for ``delay`` seconds, and
    whether it was for long enough.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    writes = math.ceil(delay / _write_seconds())
    with _no_collector():
        torch.cuda.synchronize()
        for _ in range(writes):
            _head_start().zero_()
        start.record()
        for run in ready:
            run()
        was_hidden = not start.query()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / len(ready), was_hidden


@cache
def _write_seconds() -> float:
    """Seconds of one write ahead of a sample."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _head_start().zero_()
    torch.cuda.synchronize()
    start.record()
    for _ in range(10):
        _head_start().zero_()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-4


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector must not run inside the timed region."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@cache
def _head_start() -> torch.Tensor:
    return torch.empty(HEAD_START, dtype=torch.uint8, device="cuda")


class _Copy:
    def __init__(self, device: torch.device) -> None:
        self.source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]:
        return [lambda: self.target.copy_(self.source)] * calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a large copy on this device with the threads
    that torch uses.
    """
    copy = _Copy(device)
    times = interleaved({"copy": copy}, "", device, (5, 25), 0.5)["copy"]
    return 2 * copy.source.nbytes / statistics.median(times.seconds)
