"""The goals that result rows can decide, and the verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.records import Row, is_of_couplings

STOCK = ("anomalib", "freia")
STOCK_GRAPHS = ("anomalib-graphs", "freia-graphs")
LARGE = {"kind": "block", "workload": "fastflow-", "but": "one image"}
TRAIN: dict[str, Any] = {"kind": "block", "mode": "train"}
COUPLING: dict[str, Any] = {"of_couplings": True, "provider": ("freia-0.2", "freia")}
FLOW = {"kind": "flow", "mode": "train", "provider": "anomalib"}
DEPTH = {"kind": "depth", "provider": "reversible"}


@dataclass(frozen=True)
class Wanted:
    """A goal: a number, and the rows that decide whether it is reached.

    Attributes:
        device: "gpu", "cpu", or "any".
        text: The goal in words.
        number: The number to reach.
        key: The figure of a row that decides.
        where: The rows that count: a key of a row with its value, or with several in a tuple.
            ``workload`` is how the name begins, ``but`` what it does not contain. With
            ``of_couplings`` the rows of FrEIA's coupling blocks count, otherwise all others.
        by: "least" (all rows must reach the number), "most" (none may exceed it) or "mean" (their
            geometric mean must reach it).
    """

    device: str
    text: str
    number: float
    key: str
    where: Mapping[str, Any] = field(default_factory=dict)
    by: str = "least"


GOALS = (
    Wanted("gpu", "block alone, fastflow-*, forward: share of the copy bandwidth",
           0.90, "share", LARGE | {"mode": "forward", "provider": "ours"}),
    Wanted("gpu", "block alone, fastflow-*, inverse: share of the copy bandwidth",
           0.90, "share", LARGE | {"mode": "inverse", "provider": "ours"}),
    Wanted("gpu", "block alone, fastflow-*, backward: share of the copy bandwidth",
           0.85, "share", LARGE | {"mode": "backward", "provider": "ours"}),
    Wanted("gpu", "block alone, fastflow-*, training step on the GPU: anomalib / ours",
           6.0, "ratio", LARGE | {"mode": "train", "provider": "anomalib"}),
    Wanted("gpu", "block alone, fastflow-*, training step on the GPU: FrEIA main / ours",
           5.0, "ratio", LARGE | {"mode": "train", "provider": "freia"}),
    Wanted("gpu", "block alone, fastflow-*, training step on the GPU: compiled FrEIA main / ours",
           2.0, "ratio", LARGE | {"mode": "train", "provider": "freia-compiled"}),
    Wanted("gpu", "block alone, cflow, training step as called: best stock block / ours",
           3.0, "ratio_wall", TRAIN | {"workload": "cflow/", "provider": STOCK}),
    Wanted("gpu",
           "block alone, cflow, training step as called, in CUDA graphs: best stock block / ours",
           1.0, "ratio_wall_alike", TRAIN | {"workload": "cflow/", "provider": STOCK_GRAPHS}),
    Wanted("gpu", "block alone, tabular, training step as called: best stock block / ours",
           3.0, "ratio_wall", TRAIN | {"workload": "tabular", "provider": STOCK}),
    Wanted("gpu",
           "block alone, tabular, training step as called, in CUDA graphs: best stock block / ours",
           1.0, "ratio_wall_alike", TRAIN | {"workload": "tabular", "provider": STOCK_GRAPHS}),
    Wanted("gpu", "whole flow, fastflow-wrn50, training step as called: anomalib / ours",
           1.5, "ratio_wall", FLOW | {"workload": "fastflow-wrn50"}),
    Wanted("gpu", "whole flow, cflow, training step as called: anomalib / ours",
           3.0, "ratio_wall", FLOW | {"workload": "cflow/"}),
    Wanted("cpu", "block alone, all workloads and modes: anomalib / ours, geometric mean",
           4.0, "ratio", {"kind": "block", "provider": "anomalib"}, "mean"),
    Wanted("cpu", "block alone, all workloads and modes: FrEIA main / ours, geometric mean",
           2.0, "ratio", {"kind": "block", "provider": "freia"}, "mean"),
    Wanted("cpu", "block alone, both compiled, all rows: FrEIA main / ours, geometric mean",
           1.4, "ratio_alike", {"kind": "block", "provider": "freia-compiled"}, "mean"),
    Wanted("cpu", "block alone, soft (2048, 512): anomalib / ours",
           1.1, "ratio", {"kind": "block", "provider": "anomalib", "workload": "soft large batch"}),
    Wanted("cpu", "block alone, Householder 4, 256 channels: anomalib / ours",
           3.0, "ratio", {"kind": "block", "provider": "anomalib", "workload": "Householder 4/1"}),
    Wanted("cpu", "block alone, Householder 4, 512 channels: anomalib / ours",
           5.0, "ratio", {"kind": "block", "provider": "anomalib", "workload": "Householder 4/2"}),
    Wanted("cpu", "block alone, channels-last: anomalib / ours",
           2.0, "ratio", {"kind": "block", "provider": "anomalib", "workload": "channels-last"}),
    Wanted("any", "nowhere slower, block alone: best stock block / ours",
           1.0, "ratio", {"kind": "block", "provider": STOCK}),
    Wanted("gpu", "nowhere slower, block alone as called: best stock block / ours",
           1.0, "ratio_wall", {"kind": "block", "provider": STOCK}),
    Wanted("any", "nowhere slower, whole flow: best stock block / ours",
           1.0, "ratio", {"kind": "flow", "provider": STOCK}),
    Wanted("gpu", "nowhere slower, whole flow as called: best stock block / ours",
           1.0, "ratio_wall", {"kind": "flow", "provider": STOCK}),
    Wanted("any", "nowhere slower, coupling block alone: FrEIA / ours",
           1.0, "ratio", COUPLING | {"kind": "block"}),
    Wanted("gpu", "nowhere slower, coupling block alone as called: FrEIA / ours",
           1.0, "ratio_wall", COUPLING | {"kind": "block"}),
    Wanted("any", "nowhere slower, flow of coupling blocks: FrEIA / ours",
           1.0, "ratio", COUPLING | {"kind": "flow"}),
    Wanted("any", "block alone: bytes kept for backward, share of anomalib's",
           0.40, "kept_share", TRAIN | {"provider": "ours"}, "most"),
    Wanted("any", "reversible chain: bytes kept for backward at 32 blocks, divided by those at 4",
           1.2, "kept_growth", DEPTH, "most"),
    Wanted("any", "reversible chain: time of a training step, divided by our plain chain's",
           1.4, "times_plain", DEPTH, "most"),
    Wanted("any", "reversible chain: time of a training step, divided by anomalib's plain chain's",
           1.0, "times_anomalib", DEPTH, "most"),
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What was measured of a goal on one device and in one dtype.

    Attributes:
        wanted: The goal.
        value: The number measured, or None.
        where: The row that decides, or the number of rows of a mean.
    """

    wanted: Wanted
    value: float | None = None
    where: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.wanted.by == "most":
            is_reached = self.value <= self.wanted.number
        else:
            is_reached = self.value >= self.wanted.number
        return "reached" if is_reached else "NOT reached"


def goals(rows: Iterable[Row]) -> list[Goal]:
    """Decide the goals of a device by its rows in one dtype."""
    rows = [
        row for row in rows if "skipped" not in row and row["kind"] in ("block", "flow", "depth")
    ]
    if not rows:
        return []
    device = "cpu" if rows[0]["device"].startswith("cpu") else "gpu"
    rows = [_with_shares(row, rows) for row in rows]
    kinds = {"depth" if row["kind"] == "depth" else "block" for row in rows}
    return [
        _decide(wanted, rows)
        for wanted in GOALS
        if wanted.device in (device, "any")
        and ("depth" if wanted.where["kind"] == "depth" else "block") in kinds
    ]


def _with_shares(row: Row, rows: list[Row]) -> Row:
    """Return the row with its figures divided by those of anomalib's or a shorter chain's."""

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


def _decide(wanted: Wanted, rows: list[Row]) -> Goal:
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
    if is_of_couplings(row) != where.get("of_couplings", False):
        return False
    for key, value in where.items():
        if key == "of_couplings":
            continue
        if key == "workload":
            is_meant = row[key].startswith(value)
        elif key == "but":
            is_meant = value not in row["workload"]
        else:
            is_meant = row[key] in value if isinstance(value, tuple) else row[key] == value
        if not is_meant:
            return False
    return True
