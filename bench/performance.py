"""The tables that the documentation's pages include, made of result rows.

``python -m bench report`` writes each to a file of its own. A cell holds one number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.cells import COUPLING_PEERS, PEERS, grouped, input_name, number, shape_of, speedup, table
from bench.libraries_report import library_table
from bench.records import RESULTS, Row, is_of_couplings

CPU, GPU = "cpu-amd-epyc", "nvidia-h200"
CHAINS = {
    "plain": "plain chain",
    "checkpoint": "`checkpoint`",
    "anomalib": "anomalib's blocks",
    "reversible": "reversible",
}


def save_tables(rows: list[Row], folder: Path) -> None:
    """Write every table into a folder, as ``NAME.md``.

    Args:
        rows: The newest rows of all devices, in the order of the tables.
        folder: The folder; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines_of in TABLES.items():
        (folder / f"{name}.md").write_text("\n".join(lines_of(rows)) + "\n")


def headline(rows: list[Row]) -> list[str]:
    """Return four figures of a training step, ours against anomalib's block, on two machines."""
    block = {"kind": "block", "workload": "fastflow-wrn50/1", "mode": "train", "dtype": "float32"}
    flow = block | {"kind": "flow"}
    depth = {"kind": "depth", "workload": "depth-64", "shape": [4, 64, 32, 32]}

    def faster(device: str, where: Row) -> str:
        row = _one(rows, device, where, "anomalib")
        return f"{row['ratio_wall']:.1f}x faster" if row and "ratio_wall" in row else "not measured"

    def share(device: str, where: Row, key: str, provider: str) -> str:
        ours, stock = (_one(rows, device, where, name) for name in (provider, "anomalib"))
        if not ours or not stock or not ours.get(key) or not stock.get(key):
            return "not measured"
        part = ours[key] / stock[key]
        return f"{part:.0%}" if part > 0.1 else f"{part:.1%}"

    return table(
        ["a training step, against anomalib's block", "NVIDIA H200", "AMD EPYC"],
        [
            ["one block: time", *(faster(device, block) for device in (GPU, CPU))],
            [
                "a whole flow, 8 blocks with their subnets: time",
                *(faster(device, flow) for device in (GPU, CPU)),
            ],
            [
                "one block: memory kept for backward",
                *(share(device, block, "kept_bytes", "ours") for device in (GPU, CPU)),
            ],
            [
                "a reversible chain of 64 blocks: peak memory",
                *(share(device, depth, "peak_bytes", "reversible") for device in (GPU, CPU)),
            ],
        ],
    )


def cpu_blocks(peer: str) -> Callable[[list[Row]], list[str]]:
    """Return the maker of a table: a peer's time divided by ours, of blocks on a CPU."""

    def lines_of(rows: list[Row]) -> list[str]:
        chosen = _chosen(rows, CPU, kind="block", provider=peer, dtype="float32")
        modes = ("forward", "train", "inverse")
        return table(
            ["input", "forward", "training step", "inverse"],
            [
                [name, *(speedup(_first(group, mode=mode)) for mode in modes)]
                for name, group in grouped(chosen, input_name)
            ],
        )

    return lines_of


def freia_class(rows: list[Row]) -> list[str]:
    """Return a sentence: which class was timed as FrEIA main's."""
    chosen = _chosen(rows, CPU, kind="block", provider="freia")
    names = list(dict.fromkeys(row["class"] for row in chosen))
    return [f"The branch has no release. The block that was timed is {'; '.join(names)}."]


def kept(rows: list[Row]) -> list[str]:
    """Return a table: what a block keeps for backward, as multiples of its input."""
    return _kept(_chosen(rows, CPU, kind="block", mode="train", dtype="float32"), PEERS)


def _kept(rows: list[Row], peers: dict[str, str]) -> list[str]:
    return table(
        ["input", "ours", *peers.values()],
        [
            [
                name,
                *(
                    number(_first(group, provider=p), "kept_in_inputs", "{:.1f}")
                    for p in ("ours", *peers)
                ),
            ]
            for name, group in grouped(rows, input_name)
        ],
    )


def gpu(kind: str, dtype: str) -> Callable[[list[Row]], list[str]]:
    """Return the maker of a table: training steps on a GPU, its own time and the time as called.

    Args:
        kind: "block", in microseconds, or "flow", in milliseconds.
        dtype: "float32" or "bfloat16".
    """
    name, form, unit = ("us", "{:,.0f}", 1.0) if kind == "block" else ("ms", "{:.2f}", 1e-3)

    def lines_of(rows: list[Row]) -> list[str]:
        chosen = _chosen(rows, GPU, kind=kind, mode="train", dtype=dtype)
        heads, lines = ["input"], []
        for time in ("GPU", "as called"):
            heads.append(f"ours, {time}, {name}")
            heads += [f"{peer} / ours, {time}" for peer in PEERS.values()]
        for title, group in grouped(chosen, input_name):
            cells = [title]
            for time, ratio in (("median_us", "ratio"), ("wall_us", "ratio_wall")):
                cells.append(number(_first(group, provider="ours"), time, form, unit))
                cells += [speedup(_first(group, provider=peer), ratio) for peer in PEERS]
            lines.append(cells)
        return table(heads, lines)

    return lines_of


def graphs(rows: list[Row]) -> list[str]:
    """Return a table: one block's training step on a GPU: eager, compiled, and in a CUDA graph."""
    chosen = _chosen(rows, GPU, kind="block", workload="cflow/1", mode="train", dtype="float32")
    calls = {
        "ours": "ours",
        "ours-compiled": "ours, `torch.compile`",
        "freia-compiled": "FrEIA main's, `torch.compile`",
        "ours-graphs": "ours, `torch.cuda.make_graphed_callables`",
        "anomalib-graphs": 'anomalib\'s, `torch.compile(mode="reduce-overhead")`',
        "freia-graphs": "FrEIA main's, the same",
    }
    lines = [
        [text, *(number(row, key, "{:,.0f}") for key in ("wall_us", "median_us"))]
        for provider, text in calls.items()
        if (row := _first(chosen, provider=provider)) is not None
    ]
    return table(["CFlow (64, 512)", "as called, us", "on the GPU, us"], lines)


def shares(rows: list[Row]) -> list[str]:
    """Return a table: our share of the bandwidth of a large copy on a GPU."""
    chosen = _chosen(rows, GPU, kind="block", workload="fastflow-wrn50/1", provider="ours")
    dtypes = ("float32", "bfloat16")
    return table(
        ["(32, 256, 64, 64)", *dtypes],
        [
            [mode, *(number(_first(chosen, mode=mode, dtype=d), "share", "{:.1%}") for d in dtypes)]
            for mode in ("forward", "backward", "inverse")
        ],
    )


def cpu_bfloat16(rows: list[Row]) -> list[str]:
    """Return a table: a peer's time divided by ours, of blocks in bfloat16 on a CPU."""
    chosen = _chosen(rows, CPU, kind="block", dtype="bfloat16")
    columns = [(peer, mode) for mode in ("train", "inverse") for peer in PEERS]
    words = {"train": "training step", "inverse": "inverse"}
    return table(
        ["input", *(f"{PEERS[peer]}, {words[mode]}" for peer, mode in columns)],
        [
            [name, *(speedup(_first(group, provider=p, mode=mode)) for p, mode in columns)]
            for name, group in grouped(chosen, input_name)
        ],
    )


def demo(_: list[Row]) -> list[str]:
    """Return a table of what `make demo` measured, from its own file."""
    figures = json.loads((RESULTS / CPU / "texture_demo.json").read_text())
    seconds, kept_bytes = figures["seconds_per_step"], figures["bytes_kept_for_backward"]
    auroc = figures["pixel_auroc"]
    sides = ("stock", "ours")
    return table(
        ["`make demo`", "anomalib's block", "ours"],
        [
            ["training step, ms", *(f"{1e3 * seconds[side]:.0f}" for side in sides)],
            [
                "kept for backward, MB",
                *(f"{1e-6 * kept_bytes[side]['whole']:.0f}" for side in sides),
            ],
            ["pixel AUROC", *(f"{auroc[side]:.3f}" for side in sides)],
        ],
    )


def cpu_flows(rows: list[Row]) -> list[str]:
    """Return a table: training steps of whole flows on a CPU, a peer's time divided by ours."""
    chosen = _chosen(rows, CPU, kind="flow", mode="train", dtype="float32")
    return table(
        ["flow", *PEERS.values()],
        [
            [name, *(speedup(_first(group, provider=peer)) for peer in PEERS)]
            for name, group in grouped(chosen, input_name)
        ],
    )


def couplings(kind: str) -> Callable[[list[Row]], list[str]]:
    """Return the maker of a table: FrEIA's time divided by ours, of coupling blocks on a CPU.

    Args:
        kind: "block" or "flow".
    """
    modes = {"forward": "forward", "train": "training step", "inverse": "inverse"}
    columns = [(peer, mode) for peer in COUPLING_PEERS for mode in modes]

    def lines_of(rows: list[Row]) -> list[str]:
        chosen = _chosen(rows, CPU, of_couplings=True, kind=kind, dtype="float32")
        return table(
            ["input", *(f"{COUPLING_PEERS[peer]}, {modes[mode]}" for peer, mode in columns)],
            [
                [name, *(speedup(_first(group, provider=p, mode=mode)) for p, mode in columns)]
                for name, group in grouped(chosen, input_name)
            ],
        )

    return lines_of


def couplings_kept(rows: list[Row]) -> list[str]:
    """Return a table: what a coupling block keeps for backward, as multiples of its input."""
    chosen = _chosen(rows, CPU, of_couplings=True, kind="block", mode="train", dtype="float32")
    return _kept(chosen, COUPLING_PEERS)


def depths(key: str, form: str, unit: float = 1.0) -> Callable[[list[Row]], list[str]]:
    """Return the maker of a table: one figure of chains that grow, on a CPU.

    Args:
        key: The figure of a row.
        form: How it is written, as for ``str.format``.
        unit: What it is multiplied by.
    """

    def lines_of(rows: list[Row]) -> list[str]:
        chosen = sorted(_chosen(rows, CPU, kind="depth"), key=lambda r: (r["shape"], r["depth"]))
        chosen.sort(key=lambda row: len(row["shape"]), reverse=True)
        return table(
            ["input", "blocks", *CHAINS.values()],
            [
                [*names, *(number(_first(group, provider=c), key, form, unit) for c in CHAINS)]
                for names, group in grouped(chosen, lambda r: (shape_of(r), str(r["depth"])))
            ],
        )

    return lines_of


def libraries(mode: str) -> Callable[[list[Row]], list[str]]:
    """Return the maker of a table: other libraries' time divided by ours, on a CPU."""

    def lines_of(rows: list[Row]) -> list[str]:
        chosen = _chosen(rows, CPU, kind="library", mode=mode, dtype="float32")
        return library_table(chosen, "library", speedup)

    return lines_of


def _chosen(rows: list[Row], device: str, of_couplings: bool = False, **where: object) -> list[Row]:
    """Return the rows of a device whose values are those of ``where``, without skipped ones.

    Args:
        rows: Any rows.
        device: The device's folder.
        of_couplings: Choose the rows of FrEIA's coupling blocks, instead of all others.
        where: Keys of a row with their values.
    """
    return [
        row
        for row in rows
        if row["device"] == device
        and row.get("threads") in (None, 1)
        and is_of_couplings(row) == of_couplings
        and _agrees(row, where)
    ]


def _one(rows: list[Row], device: str, where: Row, provider: str) -> Row | None:
    return _first(rows, device=device, provider=provider, **where)


def _first(rows: list[Row], **where: object) -> Row | None:
    return next((row for row in rows if _agrees(row, where)), None)


def _agrees(row: Row, where: Row) -> bool:
    return "skipped" not in row and all(row.get(key) == value for key, value in where.items())


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "headline": headline,
    "cpu-blocks-anomalib": cpu_blocks("anomalib"),
    "cpu-blocks-freia": cpu_blocks("freia"),
    "cpu-freia-class": freia_class,
    "cpu-bfloat16": cpu_bfloat16,
    "cpu-flows": cpu_flows,
    "cpu-couplings": couplings("block"),
    "cpu-coupling-flows": couplings("flow"),
    "couplings-kept": couplings_kept,
    "demo": demo,
    "kept": kept,
    "libraries-train": libraries("train"),
    "libraries-inverse": libraries("inverse"),
    "gpu-blocks-float32": gpu("block", "float32"),
    "gpu-blocks-bfloat16": gpu("block", "bfloat16"),
    "gpu-graphs": graphs,
    "gpu-shares": shares,
    "gpu-flows-float32": gpu("flow", "float32"),
    "gpu-flows-bfloat16": gpu("flow", "bfloat16"),
    "depth-memory": depths("peak_bytes", "{:,.1f}", 1e-6),
    "depth-time": depths("times_plain", "{:.2f}"),
}
