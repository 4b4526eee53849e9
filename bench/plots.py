"""Plots of result rows: the speedups, and the cost as a shape or a chain grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # it draws into files, also on a machine without a screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.cells import COUPLING_PEERS, PEERS, input_name
from bench.records import Row
from bench.subject import MODES

# The colours of Okabe and Ito, which colour-blind people can tell apart. Each has a marker of its
# own for those who print in grey.
BLACK, SKY, GREEN, BLUE, RED = "#000000", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
PURPLE = "#CC79A7"
BASE_COLOURS = {
    "ours": BLUE,
    "ours-freia": SKY,
    "ours-accelerated": SKY,
    "anomalib": RED,
    "freia": GREEN,
    "freia-0.2": PURPLE,
}
DEPTH_STYLES = {
    "plain": (SKY, "s"),
    "checkpoint": (GREEN, "^"),
    "anomalib": (RED, "D"),
    "reversible": (BLUE, "o"),
}
EXECUTION_MARKERS = {"": "o", "-compiled": "^", "-graphs": "s"}
LINES = {"o": "-", "^": "--", "s": ":"}
NAMES = PEERS | COUPLING_PEERS
MARGIN = {"left": 3.2, "right": 0.25, "top": 0.75, "bottom": 1.25}  # inches


def label(row: Row) -> str:
    """Return a workload and its shape, for an axis or a table."""
    return f"{row['workload']}  {'x'.join(map(str, row['shape']))}"


def _axis_name(row: Row) -> str:
    return input_name(row).replace("`", "")


def _provider_style(name: str) -> tuple[str, str]:
    execution = next(suffix for suffix in ("-compiled", "-graphs", "") if name.endswith(suffix))
    return BASE_COLOURS[name.removesuffix(execution)], EXECUTION_MARKERS[execution]


def save_speedup(rows: list[Row], kind: str, key: str, title: str, path: Path) -> bool:
    """Draw a panel per mode with every peer's time divided by ours.

    Args:
        rows: The rows of one device and dtype.
        kind: "block" or "flow".
        key: "ratio" (on a GPU of the device's own times) or "ratio_wall" (of the calls).
        title: The second line of the picture's title.
        path: The file to write.

    Returns:
        Whether there was something to draw.
    """
    rows = [
        row
        for row in rows
        if row["kind"] == kind and not row["provider"].startswith("ours") and row.get(key)
    ]
    if not rows:
        return False
    names, modes = (
        list(dict.fromkeys(map(_axis_name, rows))),
        [mode for mode in MODES if any(row["mode"] == mode for row in rows)],
    )
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = _panels(len(modes), len(names), width=2.3)
    drawn_at = [against_ours(row, key) for row in rows]
    low, high = min(0.8, *drawn_at) / 1.1, max(2.0, *drawn_at) * 1.1
    for axis, mode in zip(axes, modes, strict=True):
        axis.set_title("training step" if mode == "train" else mode, fontsize=10)
        for provider in providers:
            colour, marker = _provider_style(provider)
            drawn = [row for row in rows if row["mode"] == mode and row["provider"] == provider]
            axis.plot(
                [against_ours(row, key) for row in drawn],
                [names.index(_axis_name(row)) for row in drawn],
                marker,
                color=colour,
                alpha=0.85,
            )
        axis.axvline(1, color=BLACK, linewidth=1)
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        _plain_ticks(axis, [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low <= t <= high])
    _name_rows(axes[0], names)
    what = "block alone" if kind == "block" else "whole flow with its subnets"
    if rows[0]["threads"] is None:  # a GPU, which is timed in two ways
        title += ", as called from Python" if key == "ratio_wall" else ", the GPU's own time"
    handles = [
        _handle(name, f"{NAMES.get(name, name)} / {_compared_with(name)}") for name in providers
    ]
    _finish(
        figure,
        f"Time of the stock block / ours, {what}\n{title}; right of the line ours is faster",
        handles,
        path,
    )
    return True


def _compared_with(provider: str) -> str:
    return "ours-graphs" if provider.endswith("-graphs") else "ours"


def against_ours(row: Row, key: str) -> float:
    """Return a provider's time divided by ours, which runs in a CUDA graph where it does."""
    return row.get(f"{key}_alike") or row[key] if row["provider"].endswith("-graphs") else row[key]


def save_sweep(rows: list[Row], title: str, path: Path) -> bool:
    """Draw the time per call as batch, channels and pixels grow; return whether there is any."""
    rows = [
        row
        for row in rows
        if row["kind"] == "sweep" and row["mode"] == "train" and "median_us" in row
    ]
    if not rows:
        return False
    grown: dict[str, Callable[[Sequence[int]], int]] = {
        "batch": lambda shape: shape[0],
        "channels": lambda shape: shape[1],
        "pixels": lambda shape: shape[2] * shape[3],
    }
    names, providers = (
        [name for name in grown if any(row["workload"] == f"sweep-{name}" for row in rows)],
        list(dict.fromkeys(r["provider"] for r in rows)),
    )
    figure, axes = plt.subplots(
        1, len(names), figsize=(1 + 3.6 * len(names), 4.6), dpi=120, sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        here = [row for row in rows if row["workload"] == f"sweep-{name}"]
        for provider in providers:
            points = sorted(
                (grown[name](row["shape"]), row["median_us"])
                for row in here
                if row["provider"] == provider
            )
            colour, marker = _provider_style(provider)
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                linestyle=LINES[marker],
                markersize=4,
                linewidth=1.3,
            )
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.set_title(_fixed_part(name, here[0]["shape"]), fontsize=9)
        _plain_ticks(axis, sorted({grown[name](row["shape"]) for row in here}))
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(True, which="major", color="0.88")
    axes[0][0].set_ylabel("microseconds per training step")
    axes[0][0].yaxis.set_major_locator(LogLocator(base=10))
    axes[0][0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.tight_layout(rect=(0, 0.1, 1, 0.88))
    _finish(
        figure,
        f"Cost as the input grows: training step of the block alone\n{title}",
        [_handle(p, p) for p in providers],
        path,
    )
    return True


def save_depth(rows: list[Row], title: str, path: Path) -> None:
    """Draw peak memory and time of a training step as a chain gets longer."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.6), dpi=120, squeeze=False)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for axis, key, unit, text in zip(
        axes[0],
        ("peak_bytes", "median_us"),
        (1e-6, 1e-3),
        ("peak, MB", "ms per training step"),
        strict=True,
    ):
        for provider in providers:
            points = sorted(
                (row["depth"], row[key] * unit) for row in rows if row["provider"] == provider
            )
            colour, marker = DEPTH_STYLES[provider]
            axis.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.3
            )
        axis.set(xscale="log", yscale="log", xlabel="blocks")
        axis.set_title(text, fontsize=9)
        _plain_ticks(axis, sorted({row["depth"] for row in rows}))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.grid(True, which="major", color="0.88")
    figure.tight_layout(rect=(0, 0.1, 1, 0.88))
    handles = [
        Line2D([], [], color=DEPTH_STYLES[p][0], marker=DEPTH_STYLES[p][1], label=p)
        for p in providers
    ]
    _finish(figure, f"Training a chain: memory and time against depth\n{title}", handles, path)


def _fixed_part(name: str, shape: Sequence[int]) -> str:
    batch, channels, height, width = shape
    parts = {
        "batch": f"batch {batch}",
        "channels": f"{channels} channels",
        "pixels": f"{height}x{width} pixels",
    }
    return ", ".join(text for key, text in parts.items() if key != name)


def _panels(count: int, rows: int, width: float) -> tuple[Figure, list[Axes]]:
    """Return panels side by side, each with a line per row.

    Sizes are in inches, so that labels always have the same room.
    """
    total = (
        MARGIN["left"] + count * width + MARGIN["right"],
        MARGIN["top"] + 0.25 + 0.24 * rows + MARGIN["bottom"],
    )
    figure, axes = plt.subplots(1, count, figsize=total, dpi=120, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=MARGIN["left"] / total[0],
        right=1 - MARGIN["right"] / total[0],
        bottom=(MARGIN["bottom"] - 0.35) / total[1],
        top=1 - (MARGIN["top"] + 0.25) / total[1],
        wspace=0.08,
    )
    for axis in axes[0]:
        axis.grid(True, axis="both", color="0.9")
        axis.set_axisbelow(True)
    return figure, list(axes[0])


def _name_rows(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top


def _plain_ticks(axis: Axes, ticks: Sequence[float]) -> None:
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()


def _handle(provider: str, text: str) -> Line2D:
    colour, marker = _provider_style(provider)
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=text)


def _finish(figure: Figure, title: str, handles: list, path: Path) -> None:
    longest = max(len(line) for line in title.split("\n"))
    # a letter is about 0.55 of its size wide
    size = min(11.0, 125 * figure.get_figwidth() / longest)
    figure.suptitle(title, fontsize=size, y=1 - 0.12 / figure.get_figheight(), va="top")
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), 6),
        frameon=False,
        bbox_to_anchor=(0.5, 0.02 / figure.get_figheight()),
    )
    figure.savefig(path)
    plt.close(figure)
