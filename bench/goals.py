"""The goals that result rows can decide, and what was found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.records import Row

STOCK = ("anomalib", "freia")


@dataclass(frozen=True)
class Goal:
    """One goal on one device and in one dtype.

    Attributes:
        text: What is wanted.
        wanted: The number to reach.
        found: The number found, None if it was not measured.
        where: The row that decides, or how many rows the mean is over.
        most: The number is an upper limit.
    """

    text: str
    wanted: float
    found: float | None
    where: str = ""
    most: bool = False

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return (
            "reached"
            if (self.found <= self.wanted if self.most else self.found >= self.wanted)
            else "NOT reached"
        )


def goals(rows: list[Row]) -> list[Goal]:
    """The goals for the rows of one device and dtype, which are other ones on a GPU than on a
    CPU.
    """
    depths = [row for row in rows if row["kind"] == "depth"]
    rows = [row for row in rows if "skipped" not in row and row["kind"] in ("block", "flow")]
    if not rows:
        return _of_reversible_chains(depths)
    on_cpu = any(row["device"].startswith("cpu") for row in rows)
    own = _on_cpu if on_cpu else _on_gpu
    return [
        *own(rows),
        *_everywhere(rows, on_cpu),
        *(_of_reversible_chains(depths) if depths else []),
    ]


def _on_gpu(rows: list[Row]) -> list[Goal]:
    found = []
    large = _of(rows, kind="block", workload="fastflow-", but="one image")
    for mode, share in (("forward", 0.90), ("inverse", 0.90), ("backward", 0.85)):
        text = f"block alone, fastflow-*, {mode}: share of the copy bandwidth"
        found.append(_worst(text, share, _of(large, mode=mode, provider=("ours",)), "share"))
    for provider, ratio in (("anomalib", 6.0), ("freia", 5.0), ("freia-compiled", 2.0)):
        text = f"block alone, fastflow-*, train step on the GPU: times {provider}"
        found.append(_worst(text, ratio, _of(large, mode="train", provider=(provider,)), "ratio"))
    for name in ("cflow/", "tabular"):
        small = _of(rows, kind="block", mode="train", workload=name)
        found.append(
            _worst(
                f"block alone, {name.rstrip('/')}, train step as called: times the best stock "
                "eager",
                3.0,
                _of(small, provider=STOCK),
                "ratio_wall",
            )
        )
        graphed = _of(small, provider=tuple(f"{stock}-graphs" for stock in STOCK))
        text = f"block alone, {name.rstrip('/')}, train step as called, all in CUDA graphs: times the best stock"
        found.append(_worst(text, 1.0, graphed, "ratio_wall_alike"))
    for name, ratio in (("fastflow-wrn50", 1.5), ("cflow/", 3.0)):
        whole = _of(rows, kind="flow", mode="train", workload=name, provider=("anomalib",))
        found.append(
            _worst(
                f"whole flow, {name.rstrip('/')}, train step as called: times anomalib",
                ratio,
                whole,
                "ratio_wall",
            )
        )
    return found


def _on_cpu(rows: list[Row]) -> list[Goal]:
    block = _of(rows, kind="block")
    return [
        _mean(
            "block alone, all workloads and modes: times anomalib, geometric mean",
            4.0,
            _of(block, provider=("anomalib",)),
            "ratio",
        ),
        _mean(
            "block alone, all workloads and modes: times freia, geometric mean",
            2.0,
            _of(block, provider=("freia",)),
            "ratio",
        ),
        _mean(
            "the same, compiled against compiled freia",
            1.4,
            _of(block, provider=("freia-compiled",)),
            "ratio_alike",
        ),
        *(
            _worst(
                f"block alone, {what}: times anomalib",
                ratio,
                _of(block, provider=("anomalib",), **where),
                "ratio",
            )
            for what, ratio, where in (
                ("soft (2048, 512)", 1.1, {"workload": "soft large batch"}),
                ("Householder 4, 256 channels", 3.0, {"workload": "Householder 4/1"}),
                ("Householder 4, 512 channels", 5.0, {"workload": "Householder 4/2"}),
                ("channels-last", 2.0, {"workload": "channels-last"}),
            )
        ),
    ]


def _of_reversible_chains(rows: list[Row]) -> list[Goal]:
    """Of chains of 4 blocks and more: shorter ones have nothing to gain."""
    ours = [row for row in _of(rows, provider=("reversible",)) if row["depth"] >= 4]
    kept = {(tuple(row["shape"]), row["depth"]): row["kept_bytes"] for row in ours}
    growth = [
        (kept[shape, 32] / kept[shape, 4], shape)
        for shape, depth in kept
        if depth == 32 and (shape, 4) in kept
    ]
    most, where = max(growth, default=(None, ()))
    theirs = {
        (tuple(row["shape"]), row["depth"]): row["times_plain"]
        for row in _of(rows, provider=("anomalib",))
    }

    def share(row: Row) -> float | None:
        stock = theirs.get((tuple(row["shape"]), row["depth"]))
        return row["times_plain"] / stock if stock else None

    return [
        Goal(
            "reversible chain: bytes kept for backward at 32 blocks, times those at 4",
            1.2,
            most,
            "x".join(map(str, where)),
            True,
        ),
        _decided_by(
            max,
            "reversible chain: time of a train step, times our plain chain's",
            1.4,
            ours,
            lambda r: r["times_plain"],
            True,
        ),
        _decided_by(
            max,
            "reversible chain: time of a train step, times anomalib's plain chain's",
            1.0,
            ours,
            share,
            True,
        ),
    ]


def _everywhere(rows: list[Row], on_cpu: bool) -> list[Goal]:
    nowhere = "nowhere slower, {}: times the best stock eager"
    clocks = {"ratio": ""} if on_cpu else {"ratio": "", "ratio_wall": " as called"}
    return [
        *(
            _worst(nowhere.format(f"{what}{how}"), 1.0, _of(rows, kind=kind, provider=STOCK), key)
            for kind, what in (("block", "block alone"), ("flow", "whole flow"))
            for key, how in clocks.items()
        ),
        _kept(rows),
    ]


def _of(
    rows: Iterable[Row],
    *,
    workload: str = "",
    but: str | None = None,
    provider: tuple[str, ...] | None = None,
    **exact: str,
) -> list[Row]:
    return [
        row
        for row in rows
        if row["workload"].startswith(workload)
        and (but is None or but not in row["workload"])
        and (provider is None or row["provider"] in provider)
        and all(row[key] == value for key, value in exact.items())
    ]


def _worst(text: str, wanted: float, rows: list[Row], key: str) -> Goal:
    return _decided_by(min, text, wanted, rows, lambda row: row.get(key))


def _decided_by(
    choose: Callable,
    text: str,
    wanted: float,
    rows: list[Row],
    value: Callable[[Row], float | None],
    most: bool = False,
) -> Goal:
    measured = [row for row in rows if value(row) is not None]
    if not measured:
        return Goal(text, wanted, None, most=most)
    row = choose(measured, key=value)
    against = "" if row["provider"] == "ours" else f", {row['provider']}"
    shape = "x".join(map(str, row["shape"]))
    return Goal(
        text,
        wanted,
        value(row),
        f"{row['workload']} {shape}, {row['mode']}{against}; the worst of {len(measured)}",
        most,
    )


def _mean(text: str, wanted: float, rows: list[Row], key: str) -> Goal:
    values = [row[key] for row in rows if row.get(key) is not None]
    return (
        Goal(text, wanted, statistics.geometric_mean(values), f"{len(values)} rows")
        if values
        else Goal(text, wanted, None)
    )


def _kept(rows: list[Row]) -> Goal:
    """Bytes kept for backward by ours, as a share of anomalib's on the same workload."""
    rows = [row for row in _of(rows, kind="block", mode="train") if row.get("kept_bytes")]
    theirs = {
        (row["workload"], tuple(row["shape"])): row["kept_bytes"]
        for row in rows
        if row["provider"] == "anomalib"
    }

    def share(row: Row) -> float | None:
        stock = theirs.get((row["workload"], tuple(row["shape"])))
        return row["kept_bytes"] / stock if stock else None

    return _decided_by(
        max,
        "block alone: bytes kept for backward, share of anomalib's",
        0.40,
        _of(rows, provider=("ours",)),
        share,
        True,
    )
