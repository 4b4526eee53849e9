"""The comparison with other flow libraries as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from bench.cells import grouped, number, shape_of, table
from bench.records import Row

HEADINGS = {"train": "Training step", "inverse": "Sampling"}


def plain_ratio(row: Row | None) -> str:
    """Format a library's time divided by ours, for a terminal."""
    return number(row, "ratio", "{:.2f}")


def library_tables(
    rows: list[Row], ratio_cell: Callable[[Row | None], str] = plain_ratio
) -> list[str]:
    """Return a table of training and one of sampling, under a heading.

    Args:
        rows: The rows of one device and dtype. Those of other kinds are left out.
        ratio_cell: What formats a ratio.

    Returns:
        Lines of Markdown, none if there is nothing to show.
    """
    rows = [row for row in rows if row["kind"] == "library"]
    if not rows:
        return []
    lines = [
        "### Other flow libraries",
        "",
        f"The same flow of {rows[0]['workload']} in every library. CPU time / ours: above 1 ours "
        "is faster.",
        "",
    ]
    for mode, heading in HEADINGS.items():
        if measured := [row for row in rows if row["mode"] == mode]:
            lines += [*library_table(measured, heading, ratio_cell), ""]
    return lines


def library_table(
    rows: list[Row], heading: str, ratio_cell: Callable[[Row | None], str]
) -> list[str]:
    """Return a line per library and a column per shape. Our own line is in milliseconds."""
    shapes = list(dict.fromkeys(map(shape_of, rows)))
    lines = []
    for name, group in grouped(rows, lambda row: row["provider"]):
        by_shape = {shape_of(row): row for row in group}
        measured = [by_shape.get(shape) for shape in shapes]
        if name == "ours":
            cells = [number(row, "median_us", "{:.2f}", 1e-3) for row in measured]
            lines.append(["ours, ms", *cells])
        else:
            lines.append([name, *map(ratio_cell, measured)])
    return table([heading, *shapes], lines)
