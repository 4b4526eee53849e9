"""What the compiler makes of every kernel for every workload, and how long that should take on a
GPU that is not here.

    python -m bench.compiled [--target sm_90] [--markdown] [--short] [--only cflow] [--kernel rows]

Each launch that the launchers ask for is compiled, its machine code (SASS) disassembled, and its
instructions counted as often as they run:

- A loop's body counts as often as it runs; how many of the source's iterations one pass through it
  covers is told by the bytes that it loads or stores. A loop over partial sums counts for the
  longest program.
- Every other instruction counts once: a forward branch with a condition is taken as not taken, one
  without is followed, and subroutines (rare cases of division) are left out. What a predicate
  switches off counts, since it is issued.

Four times follow, none of which knows of the others; the largest is the bound:

- issue: one instruction a cycle and scheduler, programs spread evenly over the multiprocessors (the
  fullest one counts).
- pipe: the busiest of the arithmetic and load/store units, at the rates of _CYCLES. Of a gather's
  scattered addresses it knows nothing.
- memory: the bytes that must move, at the share of the peak that a copy reaches. What the L2 still
  holds makes it faster.
- latency: waits for loads, one after the other, each _WAIT long, while all programs that fit on a
  multiprocessor wait together.

What a launch itself costs (2 us and more) is in none of them.

Where the GPU has been measured (bench/kernel_times.py), the newest times stand beside the
predictions. On an H200 a plane's kernel of 10 us and more took 1.02 to 1.30 times its bound, which
is that of memory. The other times are leads and no predictions: in rows, where they are the
largest, a kernel took 0.6 to 3.1 times as long. The model knows nothing of what scattered addresses
cost.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from bench import records
from bench.cases import WORKLOADS, Workload
from bench.compile_targets import Code, Recorded, compile_for, launches_of_passes, sass_of
from fastflow_kernels.coupling import CouplingSpec


@dataclass(frozen=True)
class Gpu:
    """What the predictions need to know of a GPU: data-sheet figures, and a share of the peak
    bandwidth that copies usually reach.
    """

    name: str
    multiprocessors: int
    clock: float  # Hz, sustained
    bandwidth: float  # bytes/s, peak
    shared: int  # bytes of a multiprocessor
    reachable: float = 0.9
    schedulers: int = 4
    registers: int = 65536
    warps: int = 64
    programs: int = 32


GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41e9, 2.04e12, 164 << 10),
    "sm_90": Gpu("H200", 132, 1.75e9, 4.8e12, 228 << 10),
    "sm_100": Gpu("B200", 148, 1.85e9, 8.0e12, 228 << 10),
}
# Shapes of the design's table that are not measured on a CPU.
MORE = (
    Workload("fastflow-cait", (32, 768, 28, 28)),
    Workload("uflow-mcait/1", (8, 384, 14, 14)),
    Workload("hyperspectral", (10_000, 100), {"affine_clamping": 1.0}),
    Workload("planes GIN", (32, 64, 64, 64), {"gin_block": True}),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# seconds that a load takes to arrive, between the L2's 0.2 and a loaded memory's 0.8
_WAIT = 0.6e-6
# Cycles that a warp's instruction keeps a unit of its scheduler busy, from the CUDA programming
# guide's table of throughputs: results per cycle and multiprocessor are 128 (fma), 64 (alu, IMAD,
# fp64), 16 (xu). Loads and stores: 128 bytes a cycle for all four schedulers.
_CYCLES = (
    (r"MUFU|F2F|I2F|F2I|FRND", "xu", 8),
    (r"D(ADD|MUL|FMA|SETP|MNMX)", "fp64", 2),
    (r"IMAD", "fma", 2),
    (r"F(ADD|MUL|FMA)", "fma", 1),
    (
        r"IADD|ISETP|LOP|LEA|SHF|SEL|FSEL|FSETP|FMNMX|IMNMX|VIADD|PRMT|PLOP|F2FP|MOV|VIMNMX",
        "alu",
        2,
    ),
    (r"SHFL|BAR|LD|ST", "lsu", 4),
)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS; ``target`` is where a branch leads to."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        return int(self.operands.split()[-1], 16) if self.name.startswith("BRA") else None

    @property
    def bytes(self) -> int:
        """Bytes that a thread loads or stores."""
        width = re.search(r"\.(?:[US](8|16)|(64|128))\b", self.name)
        return int(width[1] or width[2]) // 8 if width else 4

    def is_global(self, kind: str) -> bool:
        return self.name.startswith(f"{kind}G.")


def parse(sass: str) -> list[Instruction]:
    """The instructions of a kernel, as cuobjdump prints them."""
    lines = re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", sass, re.M
    )
    return [
        Instruction(int(address, 16), predicate, name, operands)
        for address, predicate, name, operands in lines
    ]


@dataclass(frozen=True)
class Loop:
    """A loop of the source: how often it runs at most, and the bytes that a thread loads (or
    stores) in one iteration.
    """

    iterations: int
    kind: str  # "LD" or "ST"
    bytes: float


def executed(code: list[Instruction], loops: list[Loop]) -> Iterator[tuple[Instruction, float]]:
    """The instructions that run, each with how often; see the top of this file."""
    spans = []  # innermost last
    bodies = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    exit_at = next(i.address for i in code if i.name == "EXIT" and not i.predicate)
    for (first, last), loop in zip(
        sorted(body for body in bodies if body[1] < exit_at), loops, strict=False
    ):
        moved = sum(i.bytes for i in code if first <= i.address <= last and i.is_global(loop.kind))
        covered = max(1, round(moved / loop.bytes))
        spans.append((first, last, loop.iterations // covered))
    skip_to = 0
    for i in code:
        if i.address < skip_to:
            continue
        yield i, math.prod(times for first, last, times in spans if first <= i.address <= last)
        if i.name == "EXIT" and not i.predicate:
            return
        if (
            i.target is not None
            and not i.predicate
            and re.fullmatch(r"0x[0-9a-f]+", i.operands)
            and i.target > i.address
        ):
            skip_to = i.target


def waits(run: list[tuple[Instruction, float]]) -> tuple[float, int]:
    """How often a thread waits for loads, one after the other, and the most bytes it has asked for
    and not got.

    A wait brings what was asked for before the awaited load too; what was asked for before an
    earlier wait has come by then.
    """
    waited = most = 0
    rounds = 0.0
    pending: list[tuple[set[int], int, int]] = []  # registers, bytes, waits before it was asked for
    for i, times in run:
        used = {int(r) for r in re.findall(r"\bR(\d+)", i.operands)}
        last = max((k for k, load in enumerate(pending) if load[0] & used), default=None)
        if last is not None:
            if pending[last][2] == waited:
                waited, rounds = waited + 1, rounds + times
            del pending[: last + 1]
        first = re.match(r"R(\d+)", i.operands)
        if i.is_global("LD") and first:
            registers = {int(first[1]) + k for k in range(max(1, i.bytes // 4))}
            pending.append((registers, i.bytes, waited))
            most = max(most, sum(load[1] for load in pending))
    return rounds, most


@dataclass(frozen=True)
class Prediction:
    """One launch of one workload: what was compiled and what follows from it. Times in seconds."""

    workload: str
    dtype: str
    phase: str
    code: Code
    gpu: Gpu
    programs: int
    elements: int
    bytes: int
    run: list[tuple[Instruction, float]]

    @cached_property
    def resident(self) -> int:
        """Programs that fit on a multiprocessor."""
        code, gpu = self.code, self.gpu
        # registers are handed out to warps in 256s
        warps = gpu.registers // (-(-code.registers // 8) * 8 * 32) // 4 * 4
        shared = -(-(code.shared + 1024) // 128) * 128
        return max(
            1, min(warps // code.warps, gpu.warps // code.warps, gpu.shared // shared, gpu.programs)
        )

    @cached_property
    def fullest(self) -> int:
        """Programs of the multiprocessor that gets most."""
        return -(-self.programs // self.gpu.multiprocessors)

    @cached_property
    def instructions(self) -> float:
        """Of one warp."""
        return sum(times for _, times in self.run)

    @property
    def per_element(self) -> float:
        return self.instructions * self.programs * self.code.warps * 32 / self.elements

    def _of_schedulers(self, cycles: float) -> float:
        return cycles * self.fullest * self.code.warps / self.gpu.schedulers / self.gpu.clock

    @property
    def issue(self) -> float:
        return self._of_schedulers(self.instructions)

    @cached_property
    def pipes(self) -> Counter:
        """Cycles that one warp keeps each kind of unit busy."""
        cycles: Counter = Counter()
        for i, times in self.run:
            pipe, cost = next(
                ((pipe, cost) for names, pipe, cost in _CYCLES if re.match(names, i.name)),
                (None, 0),
            )
            if pipe == "lsu":
                cost *= max(1, i.bytes / 4)
            if pipe:
                cycles[pipe] += cost * times
        return cycles

    @property
    def pipe(self) -> tuple[float, str]:
        name, cycles = self.pipes.most_common(1)[0]
        return self._of_schedulers(cycles), name

    @property
    def memory(self) -> float:
        return self.bytes / (self.gpu.bandwidth * self.gpu.reachable)

    @cached_property
    def _waits(self) -> tuple[float, int]:
        return waits(self.run)

    @property
    def latency(self) -> float:
        return (
            self._waits[0]
            * _WAIT
            * max(1.0, self.programs / (self.gpu.multiprocessors * self.resident))
        )

    @property
    def rounds(self) -> float:
        return self._waits[0]

    @property
    def in_flight(self) -> int:
        """Bytes that the loads of a full multiprocessor ask for at a time; 36 bytes a ns for 0.8 us
        take about 29 KB of an H200's.
        """
        return self._waits[1] * 32 * self.code.warps * min(self.resident, self.fullest)

    @property
    def bound(self) -> str:
        times = {
            "issue": self.issue,
            self.pipe[1]: self.pipe[0],
            "memory": self.memory,
            "latency": self.latency,
        }
        return max(times, key=times.get)


def _traffic(launch: Recorded) -> int:
    """Bytes that a launch must move, each tensor or the part of it that is used once."""
    values, name = launch.values, launch.kernel.__name__
    c = values["C"]
    c2 = c // 2
    share: dict[str, float] = {}
    if name == "_coupling_inv_passive_kernel":
        share = {"y_ptr": (c - c2) / c, "x_ptr": (c - c2) / c}
    elif name == "_coupling_inv_active_kernel":
        share = {"y_ptr": c2 / c, "x_ptr": c2 / c}
    elif name == "_gin_sums_kernel":
        share = {"a_ptr": 0.5, "dy_ptr": c2 / c, "x_ptr": c2 / c}
    elif name == "_coupling_bwd_kernel" and values["ACTIVATION"] is None:
        share = {"a_ptr": 0.5, "x_ptr": c2 / c}
    return round(
        sum(
            t.numel() * t.element_size() * share.get(k, 1)
            for k, t in values.items()
            if isinstance(t, torch.Tensor)
        )
    )


def _loops(launch: Recorded) -> list[Loop]:
    """The loops of a kernel, in the order of the source."""
    values, name = launch.values, launch.kernel.__name__
    threads = 32 * launch.kwargs["num_warps"]

    def size(*pointers: str) -> int:
        return sum(values[p].element_size() for p in pointers if values[p] is not None)

    if "TILES_PER_PROGRAM" in values:
        out = {"_coupling_rows_fwd_kernel": "y_ptr", "_coupling_bwd_kernel": "dx_ptr"}.get(
            name, "x_ptr"
        )
        tile = values["BLOCK_CHANNELS"] * values["BLOCK_COLUMNS"]
        stores = 4 if name == "_coupling_bwd_kernel" else 1
        stored = stores * size(out) * max(1, tile / threads)
        return [Loop(values["TILES_PER_PROGRAM"], "ST", stored)]
    if name == "_gin_sums_kernel":
        pixels = values["P"] * values["ALIGN"]
        across = -(-pixels // values["BLOCK_COLUMNS"])
        tiles = across * -(-(values["C"] // 2) // values["BLOCK_CHANNELS"])
        tile = max(1, values["BLOCK_CHANNELS"] * values["BLOCK_COLUMNS"] / threads)
        return [Loop(-(-tiles // values["PARTS"]), "LD", size("a_ptr", "dy_ptr", "x_ptr") * tile)]
    if name == "_logdet_kernel":
        return [
            Loop(
                -(-values["PART_COUNT"] // values["BLOCK_PARTS"]),
                "LD",
                size("part_ptr") * max(1, values["BLOCK_PARTS"] / threads),
            )
        ]
    if name == "_params_bwd_kernel":
        tile = values["BLOCK_GROUPS"] * values["BLOCK_CHANNELS"] / threads
        sums = 1 if values["ACTIVATION"] is None else 2
        over_batch = -(-values["B"] // (values["BLOCK_GROUPS"] * values["BLOCK_CHANNELS"]))
        return [
            Loop(
                -(-values["GROUPS"] // values["BLOCK_GROUPS"]), "LD", sums * size("part_ptr") * tile
            ),
            Loop(over_batch, "LD", size("dlogdet_ptr") * tile),
        ]
    return []


def spec_of(options: dict) -> CouplingSpec:
    """The constants of a block with these options."""
    return CouplingSpec.of(
        options.get("affine_clamping", 2.0),
        "anomalib",
        options.get("global_affine_type", "SOFTPLUS"),
        options.get("gin_block", False),
    )


def predict(workload: Workload, dtype: str, target: str = "sm_90") -> list[Prediction]:
    """Compile every launch of a training step and an inverse of a workload, and say what
    follows.
    """
    found = []
    for phase, launches in launches_of_passes(
        workload.shape, DTYPES[dtype], spec_of(workload.options)
    ).items():
        for launch in launches:
            code = compile_for(target, launch)
            run = list(executed(parse(sass_of(code)), _loops(launch)))
            elements = math.prod(workload.shape)
            found.append(
                Prediction(
                    workload.name,
                    dtype,
                    phase,
                    code,
                    GPUS[target],
                    launch.grid[0],
                    elements,
                    _traffic(launch),
                    run,
                )
            )
    return found


def workloads(only: str = "") -> list[Workload]:
    """Those that the kernels run (soft and Householder permutations do not), each shape and set of
    constants once.
    """
    seen: dict = {}
    for w in (*WORKLOADS, *MORE):
        if (
            re.search(only, w.name)
            and not {"permute_soft", "learned_householder_permutation"} & w.options.keys()
        ):
            seen.setdefault((w.shape, spec_of(w.options)), w)
    return list(seen.values())


HEADER = (
    "workload", "type", "pass", "kernel", "programs x warps", "reg.", "spill", "warps/SM", "in flight KB/SM", "load bits", "store bits",
    "SASS/el.", "B/el.", "issue us", "pipe us", "memory us", "waits", "latency us", "bound", "measured us",
)  # fmt: skip


SHORT = (0, 1, 3, 4, 5, 7, 8, 11, 12, 13, 15, 16, 17, 18, 19)  # columns
Measured = dict[tuple[str, str, str, str], float]


def measured(gpu: Gpu) -> tuple[Measured, list[str]]:
    """Microseconds by workload, dtype, pass and kernel: the newest rows of bench/kernel_times.py on
    that GPU; and their commits.
    """
    folder = records.RESULTS / records.slug(f"NVIDIA {gpu.name}", "cuda")
    rows = (
        [r for r in records.newest(records.read([folder])) if r["kind"] == "kernel"]
        if folder.is_dir()
        else []
    )
    found = {(r["workload"], r["dtype"], r["mode"], r["provider"]): r["median_us"] for r in rows}
    return found, sorted({r["commit"] for r in rows})


def row(p: Prediction, found: Measured) -> tuple[str, ...]:
    """A prediction as the columns of HEADER."""
    time = found.get(
        (p.workload, str(DTYPES[p.dtype]).removeprefix("torch."), p.phase, p.code.kernel)
    )
    pipe, name = p.pipe
    kernel = p.code.kernel.strip("_").removesuffix("_kernel").removeprefix("coupling_")
    widths = [
        " ".join(f"{n}x{bits}" for bits, n in sorted(counts.items(), reverse=True))
        for counts in (p.code.loads, p.code.stores)
    ]
    return (
        p.workload, p.dtype, p.phase, kernel, f"{p.programs} x {p.code.warps}", str(p.code.registers), str(p.code.spills),
        str(p.resident * p.code.warps), f"{p.in_flight / 1024:.1f}", *widths, f"{p.per_element:.1f}", f"{p.bytes / p.elements:.2f}",
        f"{p.issue * 1e6:.2f}", f"{pipe * 1e6:.2f} {name}", f"{p.memory * 1e6:.2f}", f"{p.rounds:.0f}", f"{p.latency * 1e6:.1f}", p.bound,
        "" if time is None else f"{time:.1f}",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--target", choices=GPUS, default="sm_90")
    parser.add_argument(
        "--only", default="", help="workloads whose name matches this regular expression"
    )
    parser.add_argument("--kernel", default="", help="kernels whose name contains this")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be given twice; both if left out"
    )
    parser.add_argument(
        "--short", action="store_true", help="leave out the columns of widths, spills and pipes"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    chosen = parser.parse_args(arguments)
    gpu = GPUS[chosen.target]
    found, commits = measured(gpu)
    rows = [
        row(p, found)
        for workload in workloads(chosen.only)
        for dtype in chosen.dtype or DTYPES
        for p in predict(workload, dtype, chosen.target)
        if chosen.kernel in p.code.kernel
    ]
    print(
        f"Predicted from code compiled for {chosen.target}, for an {gpu.name} "
        f"({gpu.multiprocessors} multiprocessors, "
        f"{gpu.clock / 1e9:.2f} GHz, {gpu.reachable:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s)."
        + (
            f" Measured at {' and '.join(commits)}; launches may have changed since."
            if commits
            else ""
        )
        + "\n"
    )
    table = [tuple(cells[k] for k in SHORT) if chosen.short else cells for cells in (HEADER, *rows)]
    if chosen.markdown:
        table.insert(1, ("---",) * len(table[0]))
        print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    else:
        sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(
            "\n".join(
                "  ".join(cell.ljust(size) for cell, size in zip(cells, sizes, strict=True))
                for cells in table
            )
        )


if __name__ == "__main__":
    main()
