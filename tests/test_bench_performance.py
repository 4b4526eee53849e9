"""Test the tables that the documentation includes: which figure of which row stands where."""

from __future__ import annotations

from typing import Any

import pytest

from bench import cells, performance
from bench.performance import CPU, GPU
from bench.records import Row


def row(**values: Any) -> Row:
    return {
        "device": CPU,
        "kind": "block",
        "workload": "tabular",
        "shape": [8, 4],
        "mode": "train",
        "dtype": "float32",
        "provider": "anomalib",
        "class": "a class",
    } | values


def cells_of(lines: list[str]) -> list[list[str]]:
    """Return the cells of a table, without its heading and without marks."""
    return [
        [
            cell.split(">")[1].split("<")[0] if ">" in cell else cell
            for cell in line.strip("| ").split(" | ")
        ]
        for line in lines[2:]
    ]


def test_a_ratio_says_faster_slower_or_neither() -> None:
    def shown(ratio: float | None) -> str:
        return cells.speedup({"ratio": ratio})

    assert shown(1.021) == "1.02"  # by what is shown
    assert shown(1.03) == '<span class="faster">1.03</span>'
    assert shown(0.979) == "0.98"
    assert shown(0.97) == '<span class="slower">0.97 ▼</span>'
    assert shown(12.34) == '<span class="faster">12.3</span>'
    assert shown(None) == cells.speedup(None) == "–"


def test_blocks_on_a_cpu() -> None:
    ratios = {"forward": 2.0, "train": 3.0, "inverse": 4.0, "backward": 5.0}
    rows = [row(mode=mode, ratio=ratio) for mode, ratio in ratios.items()]
    rows += [row(mode="train", ratio=9.0, **other) for other in (
        {"device": GPU}, {"provider": "freia"}, {"dtype": "bfloat16"}, {"kind": "flow"},
        {"threads": 2},
    )]  # fmt: skip
    (line,) = cells_of(performance.cpu_blocks("anomalib")(rows))
    assert line == ["tabular (8,\u00a04)", "2.00", "3.00", "4.00"]


def test_skipped_rows_are_dashes() -> None:
    rows = [row(mode="forward", ratio=2.0), row(mode="train", skipped="it failed")]
    assert cells_of(performance.cpu_blocks("anomalib")(rows))[0][1:] == ["2.00", "–", "–"]


@pytest.mark.parametrize(("kind", "unit"), [("block", 1.0), ("flow", 1e-3)])
def test_steps_on_a_gpu_have_two_clocks(kind: str, unit: float) -> None:
    common = {"device": GPU, "kind": kind}
    rows = [
        row(provider="ours", median_us=100.0, wall_us=400.0, **common),
        row(provider="anomalib", ratio=3.0, ratio_wall=1.5, **common),
        row(provider="freia", ratio=2.0, ratio_wall=1.25, **common),
    ]
    (line,) = cells_of(performance.gpu(kind, "float32")(rows))
    assert [float(cell) for cell in line[1:]] == pytest.approx(
        [100 * unit, 3.0, 2.0, 400 * unit, 1.5, 1.25]
    )


def test_graphs_have_a_line_for_each_provider_that_was_measured() -> None:
    common: dict[str, Any] = {"device": GPU, "workload": "cflow/1"}
    rows = [
        row(provider="ours-compiled", wall_us=300.0, median_us=100.0, **common),
        row(provider="ours-graphs", wall_us=200.0, median_us=50.0, **common),
        row(provider="anomalib-graphs", skipped="it failed", **common),
    ]
    assert cells_of(performance.graphs(rows)) == [
        ["ours, `torch.compile`", "300", "100"],
        ["ours, `torch.cuda.make_graphed_callables`", "200", "50"],
    ]


def test_kept_and_depths() -> None:
    rows = [
        row(provider=name, kept_in_inputs=kept)
        for name, kept in (("ours", 2.0), ("anomalib", 4.0), ("freia", 3.0))
    ]
    assert cells_of(performance.kept(rows)) == [["tabular (8,\u00a04)", "2.0", "4.0", "3.0"]]
    rows = [
        row(kind="depth", provider=name, depth=4, peak_bytes=peak, times_plain=time)
        for name, peak, time in (
            ("plain", 4e6, 1.0), ("checkpoint", 3e6, 1.5), ("anomalib", 5e6, 1.25),
            ("reversible", 2e6, 1.75),
        )
    ]  # fmt: skip
    name = ["(8,\u00a04)", "4"]
    memory, time = (performance.TABLES[f"depth-{key}"](rows) for key in ("memory", "time"))
    assert cells_of(memory) == [[*name, "4.0", "3.0", "5.0", "2.0"]]
    assert cells_of(time) == [[*name, "1.00", "1.50", "1.25", "1.75"]]


def test_coupling_blocks_have_tables_of_their_own() -> None:
    common: Row = {"workload": "glow/1", "block": "GLOWCouplingBlock"}
    rows = [row(ratio=9.0, provider="freia"), row(ratio=8.0, provider="freia", kind="flow")]
    for factor, provider in ((1.0, "freia-0.2"), (2.0, "freia")):
        rows += [
            row(provider=provider, mode=mode, ratio=ratio * factor, kept_in_inputs=factor, **common)
            for mode, ratio in (("forward", 1.5), ("train", 2.0), ("inverse", 2.5))
        ]
        rows.append(row(provider=provider, ratio=3.0 * factor, kind="flow", **common))
    rows.append(row(provider="ours", kept_in_inputs=0.5, **common))
    name, tables = "GLOW (8,\u00a04)", performance.TABLES
    assert cells_of(tables["cpu-couplings"](rows)) == [
        [name, "1.50", "2.00", "2.50", "3.00", "4.00", "5.00"]
    ]
    flows = cells_of(tables["cpu-coupling-flows"](rows))
    assert flows == [[name, "–", "3.00", "–", "–", "6.00", "–"]]
    assert cells_of(tables["couplings-kept"](rows)) == [[name, "0.5", "1.0", "2.0"]]
    for table in ("cpu-blocks-freia", "cpu-flows", "kept"):
        assert [line[0] for line in cells_of(tables[table](rows))] == ["tabular (8,\u00a04)"]


def test_libraries_and_bfloat16() -> None:
    rows = [
        row(kind="library", mode=mode, provider=name, ratio=ratio, median_us=2500.0)
        for mode, factor in (("train", 1.0), ("inverse", 2.0))
        for name, ratio in (("ours", 1.0), ("zuko", 1.5 * factor))
    ]
    train, inverse = (cells_of(performance.libraries(mode)(rows)) for mode in ("train", "inverse"))
    assert train == [["ours, ms", "2.50"], ["zuko", "1.50"]]
    assert inverse == [["ours, ms", "2.50"], ["zuko", "3.00"]]
    rows = [
        row(dtype="bfloat16", mode=mode, provider=provider, ratio=ratio)
        for mode, provider, ratio in (
            ("train", "anomalib", 2.0), ("train", "freia", 3.0),
            ("inverse", "anomalib", 4.0), ("inverse", "freia", 5.0),
        )
    ]  # fmt: skip
    assert cells_of(performance.cpu_bfloat16(rows))[0][1:] == ["2.00", "3.00", "4.00", "5.00"]


def test_headline_divides_by_the_time_as_called() -> None:
    common: dict[str, Any] = {"workload": "fastflow-wrn50/1"}
    rows = [
        row(device=GPU, ratio=9.0, ratio_wall=3.0, kept_bytes=400, **common),
        row(device=GPU, provider="ours", kept_bytes=100, **common),
        row(device=GPU, kind="flow", ratio=8.0, ratio_wall=2.0, **common),
    ]
    assert [line[1:] for line in cells_of(performance.headline(rows))] == [
        ["3.0x faster", "not measured"],
        ["2.0x faster", "not measured"],
        ["25%", "not measured"],
        ["not measured", "not measured"],
    ]
