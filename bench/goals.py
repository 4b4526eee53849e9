"""The goals that result rows can decide: a table, and what was found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.records import Row

STOCK = ("anomalib", "freia")
LARGE = {"kind": "block", "workload": "fastflow-", "but": "one image"}
TRAIN: dict[str, Any] = {"kind": "block", "mode": "train"}
FLOW = {"kind": "flow", "mode": "train", "provider": "anomalib"}
DEPTH = {"kind": "depth", "provider": "reversible"}


@dataclass(frozen=True)
class Wanted:
    """A line of the table.

    Attributes:
        device: "gpu", "cpu", or "any".
        text: What is wanted.
        number: The number to reach.
        key: The figure of a row that decides.
        where: Which rows count: values of a row's keys, or several in a tuple. ``workload`` is how
            the name begins, ``but`` what it does not contain.
        by: "least" (all rows have to reach it), "most" (all have to stay below it) or "mean"
            (geometric).
    """

    device: str
    text: str
    number: float
    key: str
    where: Mapping[str, Any] = field(default_factory=dict)
    by: str = "least"


GOALS = (
    *(
        Wanted(
            "gpu",
            f"block alone, fastflow-*, {mode}: share of the copy bandwidth",
            share,
            "share",
            LARGE | {"mode": mode, "provider": "ours"},
        )
        for mode, share in (("forward", 0.90), ("inverse", 0.90), ("backward", 0.85))
    ),
    *(
        Wanted(
            "gpu",
            f"block alone, fastflow-*, train step on the GPU: times {provider}",
            ratio,
            "ratio",
            LARGE | {"mode": "train", "provider": provider},
        )
        for provider, ratio in (("anomalib", 6.0), ("freia", 5.0), ("freia-compiled", 2.0))
    ),
    *(
        Wanted("gpu", f"block alone, {name}, train step as called{text}", number, key, where)
        for name, workload in (("cflow", "cflow/"), ("tabular", "tabular"))
        for text, number, key, where in (
            (
                ": times the best stock eager",
                3.0,
                "ratio_wall",
                TRAIN | {"workload": workload, "provider": STOCK},
            ),
            (
                ", all in CUDA graphs: times the best stock",
                1.0,
                "ratio_wall_alike",
                TRAIN | {"workload": workload, "provider": ("anomalib-graphs", "freia-graphs")},
            ),
        )
    ),
    *(
        Wanted(
            "gpu",
            f"whole flow, {name.rstrip('/')}, train step as called: times anomalib",
            ratio,
            "ratio_wall",
            FLOW | {"workload": name},
        )
        for name, ratio in (("fastflow-wrn50", 1.5), ("cflow/", 3.0))
    ),
    *(
        Wanted("cpu", text, ratio, key, {"kind": "block", "provider": provider}, "mean")
        for provider, ratio, key, text in (
            (
                "anomalib",
                4.0,
                "ratio",
                "block alone, all workloads and modes: times anomalib, geometric mean",
            ),
            (
                "freia",
                2.0,
                "ratio",
                "block alone, all workloads and modes: times freia, geometric mean",
            ),
            ("freia-compiled", 1.4, "ratio_alike", "the same, compiled against compiled freia"),
        )
    ),
    *(
        Wanted(
            "cpu",
            f"block alone, {text}: times anomalib",
            ratio,
            "ratio",
            {"kind": "block", "provider": "anomalib", "workload": workload},
        )
        for text, ratio, workload in (
            ("soft (2048, 512)", 1.1, "soft large batch"),
            ("Householder 4, 256 channels", 3.0, "Householder 4/1"),
            ("Householder 4, 512 channels", 5.0, "Householder 4/2"),
            ("channels-last", 2.0, "channels-last"),
        )
    ),
    *(
        Wanted(
            device,
            f"nowhere slower, {what}{how}: times the best stock eager",
            1.0,
            key,
            {"kind": kind, "provider": STOCK},
        )
        for kind, what in (("block", "block alone"), ("flow", "whole flow"))
        for device, key, how in (("any", "ratio", ""), ("gpu", "ratio_wall", " as called"))
    ),
    Wanted(
        "any",
        "block alone: bytes kept for backward, share of anomalib's",
        0.40,
        "kept_share",
        TRAIN | {"provider": "ours"},
        "most",
    ),
    *(
        Wanted("any", f"reversible chain: {text}", number, key, DEPTH, "most")
        for text, number, key in (
            ("bytes kept for backward at 32 blocks, times those at 4", 1.2, "kept_growth"),
            ("time of a train step, times our plain chain's", 1.4, "times_plain"),
            ("time of a train step, times anomalib's plain chain's", 1.0, "times_anomalib"),
        )
    ),
)


@dataclass(frozen=True)
class Goal:
    """A goal and what was found on one device and in one dtype.

    Attributes:
        wanted: The line of the table.
        found: The number found, None if it was not measured.
        where: The row that decides, or how many rows the mean is over.
    """

    wanted: Wanted
    found: float | None = None
    where: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        if self.wanted.by == "most":
            is_reached = self.found <= self.wanted.number
        else:
            is_reached = self.found >= self.wanted.number
        return "reached" if is_reached else "NOT reached"


def goals(rows: Iterable[Row]) -> list[Goal]:
    """What the rows of one device and dtype say about the goals of such a device."""
    rows = [
        row for row in rows if "skipped" not in row and row["kind"] in ("block", "flow", "depth")
    ]
    if not rows:
        return []
    device = "cpu" if rows[0]["device"].startswith("cpu") else "gpu"
    rows = [_with_shares(row, rows) for row in rows]
    kinds = {"depth" if row["kind"] == "depth" else "block" for row in rows}
    return [
        _found(wanted, rows)
        for wanted in GOALS
        if wanted.device in (device, "any")
        and ("depth" if wanted.where["kind"] == "depth" else "block") in kinds
    ]


def _with_shares(row: Row, rows: list[Row]) -> Row:
    """The row and its figures divided by another row's: anomalib's, or a shorter chain's."""

    def share(figure: str, **changes: object) -> float | None:
        keys = ("kind", "workload", "shape", "mode", "provider", "depth")
        key = [changes.get(k, row.get(k)) for k in keys]
        alike = (r[figure] for r in rows if [r.get(k) for k in keys] == key and r.get(figure))
        whole = next(alike, None)
        return row[figure] / whole if row.get(figure) and whole else None

    if row["kind"] == "block":
        return row | {"kept_share": share("kept_bytes", provider="anomalib")}
    if row["kind"] == "flow":
        return row
    if row["depth"] < 4:  # shorter chains have nothing to gain
        return row | {"times_plain": None}
    growth = share("kept_bytes", depth=4, workload="depth-4") if row["depth"] == 32 else None
    times_anomalib = share("times_plain", provider="anomalib")
    return row | {"kept_growth": growth, "times_anomalib": times_anomalib}


def _found(wanted: Wanted, rows: list[Row]) -> Goal:
    chosen = [r for r in rows if _is_meant(r, wanted.where) and r.get(wanted.key) is not None]
    if not chosen:
        return Goal(wanted)
    if wanted.by == "mean":
        mean = statistics.geometric_mean(row[wanted.key] for row in chosen)
        return Goal(wanted, mean, f"{len(chosen)} rows")
    choose: Callable[..., Row] = max if wanted.by == "most" else min
    row = choose(chosen, key=lambda row: row[wanted.key])
    against = "" if row["provider"] in ("ours", "reversible") else f", {row['provider']}"
    shape = "x".join(map(str, row["shape"]))
    where = f"{row['workload']} {shape}, {row['mode']}{against}; the worst of {len(chosen)}"
    return Goal(wanted, row[wanted.key], where)


def _is_meant(row: Row, where: Mapping[str, Any]) -> bool:
    for key, value in where.items():
        if key == "workload":
            is_meant = row[key].startswith(value)
        elif key == "but":
            is_meant = value not in row["workload"]
        else:
            is_meant = row[key] in value if isinstance(value, tuple) else row[key] == value
        if not is_meant:
            return False
    return True
