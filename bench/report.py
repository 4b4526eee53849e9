"""Result files as Markdown and plots: goals, every figure, speedups, and the cost as shapes grow.

    python -m bench report [FILE.jsonl or FOLDER ...] [--out DIR]

Of rows that measure the same thing the newest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.goals import Goal, goals
from bench.plots import label, save_depth, save_speedup, save_sweep
from bench.providers import PROVIDERS
from bench.records import Row, newest
from bench.subject import MODES
from bench.workloads import WORKLOADS

HEADINGS = {
    "block": "Block alone",
    "flow": "Whole flow, with its subnets",
    "sweep": "As batch, channels and pixels grow",
}


def write_report(rows: list[Row], out: Path) -> Path:
    """Write ``report.md`` and its plots into a folder.

    Args:
        rows: Of any number of runs and devices.
        out: The folder; it is made.

    Returns:
        The Markdown file.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks", ""]
    for setting, found in _grouped(sorted(newest(rows), key=_place), _setting):
        parts += _section(setting, found, out)
    path = out / "report.md"
    path.write_text("\n".join(parts).rstrip() + "\n")
    return path


def _place(row: Row) -> tuple:
    """Where a row stands: as in the tables of workloads, modes and providers, whatever was measured
    first.
    """

    def index(known: list[str], name: str) -> int:
        return known.index(name) if name in known else len(known)

    workload = index([w.name for w in WORKLOADS], row["workload"])
    return (
        *_setting(row),
        workload,
        row["workload"],
        row["shape"],
        index(list(MODES), row["mode"]),
        index(list(PROVIDERS), row["provider"]),
    )


def _setting(row: Row) -> tuple[str, int, str]:
    """What belongs into one section: a device, its threads, and a dtype."""
    return row["device"], row["threads"] or 0, row["dtype"]


def _section(setting: tuple[str, int, str], rows: list[Row], out: Path) -> list[str]:
    device, threads, dtype = setting
    first = rows[0]
    on_threads = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    title = f"{first['device_name']}{on_threads}, {dtype}"
    name = f"{device}{f'-{threads}-threads' if threads > 1 else ''}-{dtype}"
    parts = [
        f"## {title}",
        "",
        _provenance(rows),
        "",
        "### Goals",
        "",
        *goal_table(goals(rows)),
        "",
    ]
    ratios = {"": "ratio"} if threads else {"": "ratio", "-called": "ratio_wall"}
    for kind in ("block", "flow"):
        for suffix, key in ratios.items():
            file = f"speedup-{kind}{suffix}-{name}.png"
            if save_speedup(rows, kind, key, title, out / file):
                parts += _image(file)
    if save_sweep(rows, title, out / f"sweep-{name}.png"):
        parts += _image(f"sweep-{name}.png")
    parts += _depths(rows, title, name, out)
    for kind, heading in HEADINGS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            parts += [f"### {heading}", "", *figure_table(chosen), ""]
            if threads == 0:
                parts += [f"### {heading}, as called from Python", "", *called_table(chosen), ""]
            parts += _notes(chosen)
    return parts + _kernels(rows)


def _image(file: str) -> list[str]:
    return [f"![{file.removesuffix('.png')}]({file})", ""]


def _kernels(rows: list[Row]) -> list[str]:
    """What each kernel takes by itself, if that was measured."""
    chosen = [row for row in rows if row["kind"] == "kernel"]
    if not chosen:
        return []
    lines = [
        "### Kernels by themselves",
        "",
        "| workload | pass | kernel | us (p20 to p80) |",
        "|---|---|---|---:|",
    ]
    for row in chosen:
        kernel = row["provider"].strip("_").removesuffix("_kernel")
        times = f"{row['median_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
        lines.append(f"| {label(row)} | {row['mode']} | {kernel} | {times} |")
    return [*lines, ""]


def called_table(rows: list[Row]) -> list[str]:
    """A line per workload and mode as Markdown: the wall clock's time of a call of ours, and the
    others' as multiples of it.
    """
    names = [
        name
        for name in dict.fromkeys(row["provider"] for row in rows if "skipped" not in row)
        if name != "ours"
    ]
    lines = [
        f"| workload | mode | ours, us | {' | '.join(names)} |",
        "|---|---|" + "---:|" * (1 + len(names)),
    ]
    for (workload, mode), group in _grouped(rows, lambda row: (label(row), row["mode"])):
        by_name = {row["provider"]: row for row in group}
        cells = [_number(by_name.get("ours", {}), "wall_us", "{:,.0f}")]
        for name in names:
            key, form = (
                ("wall_us", "{:,.0f}") if name.startswith("ours") else ("ratio_wall", "{:.2f}x")
            )
            cells.append(_number(by_name.get(name, {}), key, form))
        lines.append(f"| {workload} | {mode} | {' | '.join(cells)} |")
    return lines


def _depths(rows: list[Row], title: str, name: str, out: Path) -> list[str]:
    """Memory and time against depth: for every shape a plot and a table."""
    parts = []
    for shape, found in _grouped(
        (row for row in rows if row["kind"] == "depth"),
        lambda row: "x".join(map(str, row["shape"])),
    ):
        file = f"depth-{shape}-{name}.png"
        save_depth(found, f"{shape}, {title}", out / file)
        parts += [
            f"### Against depth, {shape}",
            "",
            *_image(file),
            *depth_table(found),
            "",
        ]
    return parts


def depth_table(rows: list[Row]) -> list[str]:
    """A line per depth: peak memory and time per step of every chain, the time also as a multiple
    of the plain chain's.
    """
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [
        "Peak MB of a train step; ms, and times the plain chain's.",
        "",
        f"| blocks | {' | '.join(providers)} |",
    ]
    lines.append("|---:|" + "---:|" * len(providers))
    for depth, group in _grouped(
        sorted(rows, key=lambda row: row["depth"]), lambda row: row["depth"]
    ):
        cells = [
            f"{row['peak_bytes'] * 1e-6:,.1f} MB; {row['median_us'] * 1e-3:,.0f} ms "
            f"({row['times_plain']:.2f}x)"
            for provider in providers
            for row in group
            if row["provider"] == provider
        ]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    return lines


def _provenance(rows: list[Row]) -> str:
    parts = []
    for key, text in (
        ("driver", "driver"),
        ("torch", "torch"),
        ("triton", "Triton"),
        ("commit", "commit"),
        ("class", "classes:"),
    ):
        values = sorted({str(row[key]) for row in rows if row.get(key)})
        parts += [f"{text} {', '.join(values)}".strip()] if values else []
    dates = sorted(row["date"][:10] for row in rows)
    copies = [row["copy_gbs"] for row in rows if "copy_gbs" in row]
    if copies:
        parts.append(f"copies at {min(copies):,.0f} to {max(copies):,.0f} GB/s")
    return (
        "; ".join([*parts, dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"])
        + "."
    )


def goal_table(found: list[Goal]) -> list[str]:
    """The goals as Markdown: number found / number wanted."""
    lines = ["| goal | found / wanted | | decided by |", "|---|---:|---|---|"]
    for goal in found:
        wanted, number = goal.wanted, "–" if goal.found is None else f"{goal.found:.2f}"
        limit = f"{'<= ' if wanted.by == 'most' else ''}{wanted.number:.2f}"
        lines.append(f"| {wanted.text} | {number} / {limit} | {goal.verdict} | {goal.where} |")
    return lines


def figure_table(rows: list[Row]) -> list[str]:
    """A line per workload and mode as Markdown: our times and rates, and the others' times as
    multiples of ours.
    """
    names = [
        name
        for name in dict.fromkeys(row["provider"] for row in rows if "skipped" not in row)
        if name != "ours"
    ]
    head = [
        "workload",
        "mode",
        "ours, us (p20 to p80)",
        "wall, us",
        "GB/s",
        "share of copy",
        "kept, in inputs",
        "allocated, MB",
    ]
    lines = [
        "Others of ours in us; the rest as multiples of ours called eagerly, in brackets of ours "
        "run in the same way.",
        "",
        f"| {' | '.join(head + names)} |",
        "|---|---|" + "---:|" * (len(head) - 2 + len(names)),
    ]
    for (workload, mode), group in _grouped(rows, lambda row: (label(row), row["mode"])):
        by_name = {row["provider"]: row for row in group}
        ours = by_name.get("ours", {})
        cells = [
            _time(ours),
            _number(ours, "wall_us", "{:,.0f}"),
            _number(ours, "gbs", "{:.1f}"),
            _number(ours, "share", "{:.0%}"),
        ]
        cells += [
            _number(ours, "kept_in_inputs", "{:.1f}"),
            _number(ours, "call_bytes", "{:,.0f}", 1e-6),
        ]
        cells += [_other(by_name.get(name, {}), name) for name in names]
        lines.append(f"| {workload} | {mode} | {' | '.join(cells)} |")
    return lines


def _other(row: Row, name: str) -> str:
    if name.startswith("ours"):
        return _number(row, "median_us", "{:,.0f}")
    alike = (
        _number(row, "ratio_alike", " ({:.2f}x)") if name.endswith(("-compiled", "-graphs")) else ""
    )
    return _number(row, "ratio", "{:.2f}x") + alike


def _time(row: Row) -> str:
    return (
        f"{row['median_us']:,.0f} ({row['p20_us']:,.0f} to {row['p80_us']:,.0f})"
        if "median_us" in row
        else ""
    )


def _number(row: Row, key: str, form: str, unit: float = 1.0) -> str:
    return "" if row.get(key) is None else form.format(row[key] * unit)


def _notes(rows: Iterable[Row]) -> list[str]:
    """Why cells are empty: a line per provider and reason."""
    skipped = [row for row in rows if "skipped" in row]
    lines = []
    for (provider, reason), group in _grouped(
        skipped, lambda row: (row["provider"], row["skipped"])
    ):
        where = ", ".join(dict.fromkeys(f"{row['workload']}" for row in group))
        lines.append(f"- {provider} not measured on {where}: {reason}")
    return [*lines, ""] if lines else []


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by key, keys and rows in the order of their first appearance."""
    rows = list(rows)
    order = {value: i for i, value in enumerate(dict.fromkeys(map(key, rows)))}
    return [
        (value, list(group))
        for value, group in groupby(sorted(rows, key=lambda row: order[key(row)]), key=key)
    ]
