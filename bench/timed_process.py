"""A process that times one version of the package. It answers requests through its pipes.

The process runs the benchmarks of this checkout. Only ``fastflow_kernels`` comes from the folder of
the version.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from bench.choice import Group
from bench.machine import set_up_torch
from bench.providers import PROVIDERS
from bench.records import ROOT
from bench.subject import Subject, draw_samples
from bench.timing import MOST_CALLS, calls_in_a_row, device_time, time_calls

MOST_BACKWARD = 8  # backward passes in a row, because each holds its forward pass
# Otherwise a process's history decides whether a large tensor costs page faults (glibc). Equal
# versions then differed by up to 20% (AMD EPYC with other work), and so they did on two cores.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
SPAN = 5e-3  # seconds of one sample
SERVE = """\
import sys
sys.path.insert(0, sys.argv[1])
from bench.timed_process import serve
serve()
"""


class Case(NamedTuple):
    """One thing to time: a group, a provider of ours, and a device."""

    group: Group
    provider: str
    device: str

    def __str__(self) -> str:
        return str(self.group) + ("" if self.provider == "ours" else f" {self.provider}")


class Failed(Exception):
    """The version cannot run a case. The message says why."""


class TimedProcess:
    """A context manager for a process that times the package in a folder."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> TimedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes its input, which ends it

    def calls(self, case: Case) -> int:
        """Warm up, and return how many calls in a row fill a sample."""
        return int(self._ask(case, 0))

    def seconds(self, case: Case, calls: int) -> float:
        """Time ``calls`` calls in a row, and return the seconds per call."""
        return self._ask(case, calls)

    def _ask(self, case: Case, calls: int) -> float:
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        pickle.dump((case, calls), requests)
        requests.flush()
        try:
            answer = pickle.load(answers)
        except EOFError:
            raise Failed("the process that times this version has ended") from None
        if isinstance(answer, str):
            raise Failed(answer)
        return float(answer)


def serve() -> None:
    """Answer requests until the input ends."""
    import fastflow_kernels

    assert str(fastflow_kernels.__file__).startswith(sys.argv[1]), fastflow_kernels.__file__
    set_up_torch(threads=1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # both versions on one core
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to stderr, not among the answers
    subject, subject_key = None, None
    while True:
        try:
            case, calls = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        group, provider, device = case
        try:
            if subject is None or subject_key != (group._replace(mode=""), provider):
                subject, subject_key = _subject(case), (group._replace(mode=""), provider)
            answer: float | str = _answer(subject, group.mode, torch.device(device), calls)
        except Exception as error:
            traceback.print_exc()
            answer = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        pickle.dump(answer, answers)
        answers.flush()


def _subject(case: Case) -> Subject:
    group, provider, device = case
    dtype = getattr(torch, group.dtype)
    samples = draw_samples(group.kind, group.workload, dtype, torch.device(device))
    return Subject(group.kind, group.workload, PROVIDERS[provider], samples)


def _answer(subject: Subject, mode: str, device: torch.device, calls: int) -> float:
    if not calls:
        most = MOST_BACKWARD if mode == "backward" else MOST_CALLS
        return calls_in_a_row(subject, mode, device, most, SPAN)
    if device.type == "cpu":
        return time_calls(subject.ready(mode, calls), device, time.process_time)
    return device_time(subject, mode, calls, time_calls(subject.ready(mode, calls), device))[0]
