"""Turn the names on the command line into the workloads, modes and dtypes that a run measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.providers import PROVIDERS
from bench.workloads import TYPICAL, Workload, workloads


class Group(NamedTuple):
    """One workload, dtype and mode, in which all providers or both versions take turns."""

    kind: str
    workload: Workload
    dtype: str
    mode: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.workload.shape))
        return f"{self.kind} {self.workload.name} {shape} {self.mode} {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """What a run measures, by name, and the device.

    Attributes:
        kinds: Some of :data:`bench.workloads.KINDS`.
        workloads: Names of workloads, or parts of names. "typical" and "all" select several.
        modes: Some of :data:`bench.subject.MODES`.
        dtypes: Some of :data:`bench.workloads.DTYPES`.
        providers: Some of :data:`bench.providers.PROVIDERS`.
        device: Where everything runs.
    """

    kinds: Sequence[str]
    workloads: Sequence[str]
    modes: Sequence[str]
    dtypes: Sequence[str]
    providers: Sequence[str]
    device: torch.device

    def groups(self) -> list[Group]:
        """Return the groups. Those that differ only in the mode follow each other."""
        return [
            Group(kind, workload, dtype, mode)
            for kind in self.kinds
            for workload in select(workloads(kind, self.device.type == "cpu"), self.workloads)
            for dtype in self.dtypes
            for mode in self.modes
        ]

    def with_ours(self, block: str) -> list[str]:
        """Return those providers that have a class of blocks, and ours to compare them with."""
        having = [name for name in self.providers if PROVIDERS[name].has(block)]
        needed = {"ours", *having, *(PROVIDERS[name].our_base(block) for name in having)}
        return [name for name in PROVIDERS if name in needed]


def select(known: list[Workload], parts: Sequence[str]) -> list[Workload]:
    """Return the workloads whose name contains one of the parts, in the order of the parts.

    A part that is a whole name selects this workload only.
    """
    names = {workload.name for workload in known}
    chosen: dict[int, Workload] = {}
    for part in parts:
        for workload in known:
            name = workload.name
            if part == "typical":
                is_chosen = name in TYPICAL or name.startswith("sweep")
            else:
                is_chosen = part == "all" or (name == part if part in names else part in name)
            if is_chosen:
                chosen[id(workload)] = workload
    return list(chosen.values())


def names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a type for argparse that parses some of these names, separated by commas.

    It returns them in the order of ``known``, and rejects names that are not among them.
    """
    expected = list(known)

    def names(text: str) -> list[str]:
        actual = [name for name in text.split(",") if name]
        if unknown := [name for name in actual if name not in expected]:
            raise argparse.ArgumentTypeError(
                f"expected names among {', '.join(expected)}; got {', '.join(unknown)}"
            )
        return [name for name in expected if name in actual]

    return names
