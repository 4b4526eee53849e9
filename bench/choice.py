"""What a run measures: the names given on the command line, as workloads, modes and dtypes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.providers import PROVIDERS
from bench.workloads import TYPICAL, Workload, workloads


class Group(NamedTuple):
    """What is timed in turn: the providers, or the two versions, in one mode."""

    kind: str
    workload: Workload
    dtype: str
    mode: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.workload.shape))
        return f"{self.kind} {self.workload.name} {shape} {self.mode} {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """Names of what is measured, and where.

    Attributes:
        kinds, modes, dtypes, providers: Names.
        workloads: Names of workloads or parts of them; "all"; "typical".
        device: Where.
    """

    kinds: Sequence[str]
    workloads: Sequence[str]
    modes: Sequence[str]
    dtypes: Sequence[str]
    providers: Sequence[str]
    device: torch.device

    def groups(self) -> list[Group]:
        """The groups, the modes of one workload in a row."""
        return [
            Group(kind, workload, dtype, mode)
            for kind in self.kinds
            for workload in named(workloads(kind, self.device.type == "cpu"), self.workloads)
            for dtype in self.dtypes
            for mode in self.modes
        ]

    def with_ours(self) -> list[str]:
        """The providers, and those of ours that they are compared with."""
        needed = {"ours", *self.providers, *(PROVIDERS[p].our_base for p in self.providers)}
        return [name for name in PROVIDERS if name in needed]


def named(known: list[Workload], parts: Sequence[str]) -> list[Workload]:
    """Those whose name contains a part, in the order of the parts.

    A part that is a whole name stands for nothing else.
    """
    names = {w.name for w in known}
    chosen: dict[int, Workload] = {}
    for part in parts:
        for w in known:
            if part == "typical":
                is_chosen = w.name in TYPICAL or w.name.startswith("sweep")
            else:
                is_chosen = part == "all" or (w.name == part if part in names else part in w.name)
            if is_chosen:
                chosen[id(w)] = w
    return list(chosen.values())


def names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for argparse: some of these names, separated by commas, in the known order."""
    expected = list(known)

    def names(text: str) -> list[str]:
        actual = [name for name in text.split(",") if name]
        if unknown := [name for name in actual if name not in expected]:
            raise argparse.ArgumentTypeError(
                f"expected names among {', '.join(expected)}; got {', '.join(unknown)}"
            )
        return [name for name in expected if name in actual]

    return names
