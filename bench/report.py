"""The report: result files as Markdown and plots.

    python -m bench report [FILE.jsonl or FOLDER ...] [--out DIR]

It shows the goals, every figure, the speedups, and the cost as shapes grow. Where several rows
measure the same thing, the newest counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.cells import EMPTY, grouped, number, speedup, table
from bench.ecosystem import ecosystem_tables
from bench.goals import Goal, goals
from bench.libraries_report import library_tables
from bench.performance import CPU, save_tables
from bench.plots import label, save_depth, save_speedup, save_sweep
from bench.providers import PROVIDERS
from bench.records import Row, is_of_couplings, newest
from bench.subject import MODES
from bench.workloads import WORKLOADS

# By kind, and by whether the rows are of FrEIA's coupling blocks.
HEADINGS = {
    ("block", False): "Block alone",
    ("block", True): "Coupling block alone",
    ("flow", False): "Whole flow, with its subnets",
    ("flow", True): "Whole flow of coupling blocks, with its subnets",
    ("sweep", False): "As batch, channels and pixels grow",
}


LEGEND = (
    'The tables name workloads and modes as the options of `make bench` do. "train" is a training',
    "step, forward and backward. Times are medians in microseconds, and p20 and p80 are their",
    'percentiles. "anomalib / ours" is a time divided by ours called eagerly. "Alike" means ours',
    'compiled, or in a CUDA graph, as the peer is. "wall" is the time as called. "kept" is what a',
    "block keeps for backward, in multiples of its input.",
)
README_WORKLOADS = (
    "fastflow-wrn50/1",
    "fastflow-wrn50/3",
    "fastflow-r18/1",
    "fastflow-cait",
    "uflow-mcait/2",
    "cflow/2",
    "msflow/1",
    "hyperspectral",
    "calo",
    "tabular",
    "tabular GIN",
    "bgad",
    "small/image",
)


def write_report(rows: list[Row], out: Path) -> Path:
    """Write ``report.md``, its plots, and the tables of the documentation into a folder.

    Args:
        rows: The rows of any number of runs and devices.
        out: The folder; it is made.

    Returns:
        The path of the Markdown file.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = sorted(newest(rows), key=_place)
    save_tables(rows, out / "performance")
    parts = ["# Benchmarks", "", *LEGEND, ""]
    for setting, group in grouped(rows, _setting):
        parts += _section(setting, group, out)
    path = out / "report.md"
    path.write_text("\n".join(parts).rstrip() + "\n")
    return path


def save_readme_picture(rows: list[Row], path: Path) -> None:
    """Draw the README's picture: training steps of a dozen blocks on a CPU."""
    rows = [
        row
        for row in sorted(newest(rows), key=_place)
        if row["device"] == CPU
        and row["dtype"] == "float32"
        and row["mode"] == "train"
        and row["workload"] in README_WORKLOADS
    ]
    save_speedup(rows, "block", "ratio", "AMD EPYC, 1 thread, float32", path)


def _place(row: Row) -> tuple:
    """Return a sort key: the order of the tables of workloads, modes and providers."""

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
    """Return what makes a section: a device, its threads, and a dtype."""
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
        _classes(rows),
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
    for what, heading in HEADINGS.items():
        chosen = [row for row in rows if (row["kind"], is_of_couplings(row)) == what]
        if chosen:
            parts += [f"### {heading}", "", *figure_table(chosen), ""]
            if threads == 0:
                parts += [f"### {heading}, as called from Python", "", *called_table(chosen), ""]
            parts += _notes(chosen)
    return parts + library_tables(rows, speedup) + ecosystem_tables(rows) + _kernels(rows)


def _image(file: str) -> list[str]:
    return [f"![{file.removesuffix('.png')}]({file})", ""]


def _kernels(rows: list[Row]) -> list[str]:
    """Return the table of what each kernel takes by itself, if that was measured."""
    chosen = [row for row in rows if row["kind"] == "kernel"]
    if not chosen:
        return []
    lines = [
        [label(row), row["mode"], row["provider"].strip("_").removesuffix("_kernel"), *_times(row)]
        for row in chosen
    ]
    heads = ["workload", "pass", "kernel", "us", "p20", "p80"]
    return ["### Kernels by themselves", "", *table(heads, lines, texts=3), ""]


def called_table(rows: list[Row]) -> list[str]:
    """Return the times as called, by the wall clock: ours, and the peers' divided by ours."""
    peers = _peers(rows)
    lines = []
    for (workload, mode), group in grouped(rows, _case):
        by_name = {row["provider"]: row for row in group}
        cells = [workload, mode, number(by_name.get("ours"), "wall_us", "{:,.0f}")]
        for name in peers:
            row = by_name.get(name)
            is_ours = name.startswith("ours")
            cells.append(
                number(row, "wall_us", "{:,.0f}") if is_ours else speedup(row, "ratio_wall")
            )
        lines.append(cells)
    return table(["workload", "mode", "ours, us", *map(_title, peers)], lines, texts=2)


def _depths(rows: list[Row], title: str, name: str, out: Path) -> list[str]:
    """Return memory and time against depth: for every shape a plot and two tables."""
    parts = []
    chosen = [row for row in rows if row["kind"] == "depth"]
    for shape, group in grouped(chosen, lambda row: "x".join(map(str, row["shape"]))):
        file = f"depth-{shape}-{name}.png"
        save_depth(group, f"{shape}, {title}", out / file)
        parts += [f"### Against depth, {shape}", "", *_image(file)]
        parts += ["Peak memory of a training step, MB:", ""]
        parts += [*_depth_table(group, "peak_bytes", "{:,.1f}", 1e-6), ""]
        parts += ["Time of a training step, divided by the plain chain's:", ""]
        parts += [*_depth_table(group, "times_plain", "{:.2f}"), ""]
    return parts


def _depth_table(rows: list[Row], key: str, form: str, unit: float = 1.0) -> list[str]:
    chains = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for depth, group in grouped(sorted(rows, key=lambda r: r["depth"]), lambda r: r["depth"]):
        by_name = {row["provider"]: row for row in group}
        lines.append([str(depth), *(number(by_name.get(c), key, form, unit) for c in chains)])
    return table(["blocks", *chains], lines)


def _provenance(rows: list[Row]) -> str:
    parts = []
    for key, text in (
        ("driver", "driver"),
        ("torch", "torch"),
        ("triton", "Triton"),
        ("commit", "commit"),
    ):
        values = sorted({str(row[key]) for row in rows if row.get(key)})
        parts += [f"{text} {', '.join(values)}"] if values else []
    dates = sorted(row["date"][:10] for row in rows)
    copies = [row["copy_gbs"] for row in rows if "copy_gbs" in row]
    if copies:
        parts.append(f"copies at {min(copies):,.0f} to {max(copies):,.0f} GB/s")
    return (
        "; ".join([*parts, dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"])
        + "."
    )


def _classes(rows: list[Row]) -> str:
    """Return which classes the providers' names stand for."""
    names: dict[tuple[str, bool], str] = {}
    for row in rows:
        if (row["kind"], is_of_couplings(row)) in HEADINGS:
            names[row["provider"], is_of_couplings(row)] = row["class"]
    lines = [
        f"- {provider}{' (coupling blocks)' * of_couplings}: {name}"
        for (provider, of_couplings), name in names.items()
    ]
    return "\n".join(lines)


def goal_table(decided: list[Goal]) -> list[str]:
    """Return the goals as Markdown: what was measured, and what was wanted."""
    lines = []
    for goal in decided:
        wanted = goal.wanted
        value = EMPTY if goal.value is None else f"{goal.value:.2f}"
        limit = f"{'<=' if wanted.by == 'most' else '>='} {wanted.number:.2f}"
        lines.append([wanted.text, goal.where or EMPTY, goal.verdict, value, limit])
    return table(["goal", "decided by", "verdict", "measured", "wanted"], lines, texts=3)


def figure_table(rows: list[Row]) -> list[str]:
    """Return a line per workload and mode: our times and rates, and the peers' times."""
    peers = _peers(rows)
    heads = ["workload", "mode", "ours, us", "p20", "p80", "wall, us", "GB/s", "share of copy"]
    heads += ["kept, in inputs", "allocated, MB"]
    for name in peers:
        heads += [_title(name)] + [f"{name} / ours alike"] * _has_alike(name)
    lines = []
    for (workload, mode), group in grouped(rows, _case):
        by_name = {row["provider"]: row for row in group}
        ours = by_name.get("ours")
        cells = [workload, mode, *_times(ours)]
        cells += [
            number(ours, "wall_us", "{:,.0f}"),
            number(ours, "gbs", "{:.1f}"),
            number(ours, "share", "{:.0%}"),
            number(ours, "kept_in_inputs", "{:.1f}"),
            number(ours, "call_bytes", "{:,.0f}", 1e-6),
        ]
        for name in peers:
            row = by_name.get(name)
            is_ours = name.startswith("ours")
            cells.append(number(row, "median_us", "{:,.0f}") if is_ours else speedup(row))
            cells += [speedup(row, "ratio_alike")] * _has_alike(name)
        lines.append(cells)
    return table(heads, lines, texts=2)


def _case(row: Row) -> tuple[str, str]:
    return label(row), row["mode"]


def _peers(rows: list[Row]) -> list[str]:
    """Return the providers beside ours, in their order."""
    names = dict.fromkeys(row["provider"] for row in rows if "skipped" not in row)
    return [name for name in names if name != "ours"]


def _title(name: str) -> str:
    """Return a column's heading: another form of ours has times, a peer a ratio."""
    return f"{name}, us" if name.startswith("ours") else f"{name} / ours"


def _has_alike(name: str) -> bool:
    """Return whether a column compares with ours run in the same way, not called eagerly."""
    return not name.startswith("ours") and name.endswith(("-compiled", "-graphs"))


def _times(row: Row | None) -> list[str]:
    """Return the cells of the median and of its spread, in microseconds."""
    form = "{:.1f}" if row and row.get("median_us", 0) < 100 else "{:,.0f}"
    return [number(row, key, form) for key in ("median_us", "p20_us", "p80_us")]


def _notes(rows: Iterable[Row]) -> list[str]:
    """Return why cells are empty: a line per provider and reason."""
    skipped = [row for row in rows if "skipped" in row]
    lines = []
    for (provider, reason), group in grouped(
        skipped, lambda row: (row["provider"], row["skipped"])
    ):
        where = ", ".join(dict.fromkeys(f"{row['workload']}" for row in group))
        lines.append(f"- {provider} not measured on {where}: {reason}")
    return [*lines, ""] if lines else []
