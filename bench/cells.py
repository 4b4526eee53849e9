"""Names, cells and tables of the report: one number a cell, faster and slower told apart."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, TypeVar

from bench.records import Row

NOISE = 0.02  # ratios this close to 1 differ no more than two runs of the same code
EMPTY = "–"

PEERS = {"anomalib": "anomalib 2.7.0", "freia": "FrEIA main"}
COUPLING_PEERS = {"freia-0.2": "FrEIA 0.2", "freia": "FrEIA main"}
# Workloads by how their names begin, in words.
MODELS = {
    "fastflow-wrn50": "FastFlow, wide-resnet50",
    "fastflow-r18": "FastFlow, resnet18",
    "fastflow-cait": "FastFlow, CaiT",
    "uflow-mcait": "UFlow, CaiT",
    "cflow-ad": "CFlow-AD, soft permutation",
    "cflow": "CFlow, conditional",
    "bgad": "BGAD, soft permutation",
    "msflow": "MSFlow, conditional",
    "hyperspectral": "hyperspectral, `reverse_permutation`",
    "calo": "CaloINN, conditional",
    "tabular Householder 8": "tabular, 8 reflections",
    "tabular GIN": "tabular, GIN",
    "tabular soft": "tabular, soft permutation",
    "tabular": "tabular",
    "soft large batch": "soft permutation",
    "Householder 4": "4 reflections",
    "channels-last": "channels-last",
    "small/posterior": "posterior, conditional",
    "small/sample": "one sample",
    "small/image channels-last": "small images, channels-last",
    "small/image": "small images",
    "small/signal": "one signal",
    "cinn-images": "GLOW, conditional",
    "cinn": "GLOW, conditional",
    "glow": "GLOW",
    "rnvp": "RNVP",
    "gin": "GIN",
    "one-sided": "one-sided, permuted",
}

Item = TypeVar("Item")


def table(heads: list[str], lines: Iterable[list[str]], texts: int = 1) -> list[str]:
    """Return the lines of a table, whose first columns are texts and the others numbers."""
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * texts + "---:|" * (len(heads) - texts),
        *(f"| {' | '.join(cells)} |" for cells in lines),
    ]


def number(row: Row | None, key: str, form: str, unit: float = 1.0) -> str:
    """Format a figure of a row, or a dash where there is none.

    Args:
        row: The row, or None.
        key: The figure.
        form: How it is written, as for ``str.format``.
        unit: What it is multiplied by.
    """
    if row is None or row.get(key) is None:
        return EMPTY
    return form.format(row[key] * unit)


def speedup(row: Row | None, key: str = "ratio") -> str:
    """Format a stock time divided by ours, marked as faster, slower, or neither."""
    if row is None or row.get(key) is None:
        return EMPTY
    text = f"{row[key]:.2f}" if row[key] < 9.95 else f"{row[key]:.1f}"
    ratio = float(text)
    if ratio > 1 + NOISE:
        return f'<span class="faster">{text}</span>'
    if ratio < 1 - NOISE:
        return f'<span class="slower">{text} ▼</span>'
    return text


def shape_of(row: Row) -> str:
    """Return a row's shape as Python writes it, with spaces that do not break."""
    numbers = ",\u00a0".join(map(str, row["shape"]))
    return f"({numbers})"


def input_name(row: Row) -> str:
    """Return a row's model and shape in words."""
    names = (name for key, name in MODELS.items() if row["workload"].startswith(key))
    return f"{next(names, row['workload'])} {shape_of(row)}"


def grouped(items: Iterable[Item], key: Any) -> list[tuple[Any, list[Item]]]:
    """Group by a key, keys and items in the order of their first appearance."""
    items = list(items)
    order = {value: i for i, value in enumerate(dict.fromkeys(map(key, items)))}
    return [
        (value, list(group))
        for value, group in groupby(sorted(items, key=lambda item: order[key(item)]), key=key)
    ]
