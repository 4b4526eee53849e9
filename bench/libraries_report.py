"""Write the comparison with other flow libraries as Markdown."""

from __future__ import annotations

from bench.records import Row

HEADINGS = {"train": "Training step", "inverse": "Sampling"}


def library_tables(rows: list[Row]) -> list[str]:
    """Return a table of training and one of sampling, with a line per library.

    Args:
        rows: The rows of one device and dtype. Those of other kinds are left out.

    Returns:
        Lines of Markdown, none if there is nothing to show. A cell is the library's time divided
        by ours. Our own line is in milliseconds.
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
            lines += [*_table(heading, measured), ""]
    return lines


def _table(heading: str, rows: list[Row]) -> list[str]:
    shapes = list(dict.fromkeys("x".join(map(str, row["shape"])) for row in rows))
    cells = {(row["provider"], "x".join(map(str, row["shape"]))): row for row in rows}
    lines = [
        f"| {heading} | {' | '.join(shapes)} |",
        "|---|" + "---:|" * len(shapes),
    ]
    for name in dict.fromkeys(row["provider"] for row in rows):
        measured = [_cell(cells.get((name, shape))) for shape in shapes]
        title = "ours, ms" if name == "ours" else name
        lines.append(f"| {title} | {' | '.join(measured)} |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["provider"] == "ours":
        return f"{row['median_us'] * 1e-3:.2f}"
    return f"{row['ratio']:.2f}"
