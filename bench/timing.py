"""Time several subjects in one interleaved run.

On a CPU the wall clock counts. On a GPU two times are measured: the GPU's own, and the time as
called, which is the wall clock's.
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

# One sample averages over calls in a row that last so many seconds, so that small inputs are
# measured with warm caches, as in a loop.
SPAN = {"cpu": 10e-3, "cuda": 3e-3}
MOST_CALLS = 64
HEAD_START = 1 << 30  # bytes of one write that keeps the GPU busy ahead of a sample
QUEUED = 4e-3  # seconds of calls that are queued behind such writes
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes of the copy, far more than any cache holds


class Timeable(Protocol):
    """An object whose calls can be timed.

    ``ready`` returns calls to run in a row, and has already done what must not be timed.
    """

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]: ...


@dataclass
class Times:
    """Seconds per call, one entry per repetition.

    Attributes:
        seconds: The GPU's own time, see :func:`device_time`. On a CPU the wall clock's.
        wall: The time as called: by the wall clock, until the device is done.
        hidden: Whether none of the GPU's own times includes waiting for Python.
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
    """Time every subject once per repetition, in turn.

    What slows the machine for a while then slows all subjects alike.

    Args:
        subjects: What to time, by name.
        mode: Passed to ``ready``.
        device: The device on which the calls run.
        repeats: The least and the most repetitions. ``most_seconds`` decides between them.
        most_seconds: Time limit, which holds once there are the least repetitions.
        most_calls: The most calls in a row of one sample.

    Returns:
        The times by the names of ``subjects``.
    """
    start = time.perf_counter()
    calls = {
        name: calls_in_a_row(subject, mode, device, most_calls, SPAN[device.type])
        for name, subject in subjects.items()
    }
    spent = time.perf_counter() - start
    start = time.perf_counter()
    times = {name: Times() for name in subjects}
    least, most = repeats
    for done in range(most):
        if done >= least and (time.perf_counter() - start) * (done + 1) / done > max(
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
    """Warm up, and return how many calls fill ``span`` seconds: a power of 2, at most ``most``."""
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
    """Run calls in a row until the device is done, and return the seconds per call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with _without_garbage_collector():
        wait()
        start = clock()
        for run in ready:
            run()
        wait()
        return (clock() - start) / len(ready)


def device_time(subject: Timeable, mode: str, calls: int, wall: float) -> tuple[float, bool]:
    """Measure the GPU's own time of a call, without Python and the launches.

    The calls are queued behind long writes. Queueing takes less time than the writes, so that the
    GPU never waits for Python. The writes also empty the L2 cache.

    Args:
        subject: What is called.
        mode: Passed to ``ready``.
        calls: The most calls in a row.
        wall: Seconds that a call takes by the wall clock.

    Returns:
        Seconds per call, and whether the writes lasted until all calls were queued.
    """
    calls = max(1, min(calls, int(QUEUED / wall)))
    measured = (0.0, False)
    # Two tries only: if the subject itself waits for the device, no writes are long enough.
    for patience in (1.5, 3.0):
        if not measured[1]:
            measured = queued_time(subject.ready(mode, calls), patience * wall * calls)
    return measured


def queued_time(ready: Sequence[Callable[[], Any]], delay: float) -> tuple[float, bool]:
    """Time calls that are queued while the GPU is busy for ``delay`` seconds.

    Returns:
        Seconds per call, and whether the GPU was busy until all calls were queued.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    writes = math.ceil(delay / _write_seconds())
    with _without_garbage_collector():
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
    """Return the seconds of one write that keeps the GPU busy."""
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
def _without_garbage_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of the timed region."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
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
    """Measure the bandwidth of a large copy on this device, with torch's number of threads.

    Returns:
        Bytes per second, read and written together.
    """
    copy = _Copy(device)
    times = interleaved({"copy": copy}, "", device, (5, 25), 0.5)["copy"]
    return 2 * copy.source.nbytes / statistics.median(times.seconds)
