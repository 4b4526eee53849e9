"""Compile the kernels for several GPUs, without one, and print figures of the machine code.

    python -m bench.gpu.compiled [--only cflow/1] [--targets sm_90]

Run it before and after a change of a kernel. It prints a line for each kernel: registers, spilled
bytes, shared memory, and the number of global accesses of each width in bits. The tests hold the
same figures to limits (tests/test_kernels_compiled.py).
"""

from __future__ import annotations

import argparse

import torch

from bench.workloads import DTYPES, WORKLOADS
from tests.support.compile_targets import TARGETS, compile_for, launches_of_passes
from tests.support.kernel_passes import spec_of

DEFAULT = "fastflow-wrn50/1,cflow/1,tabular GIN"


def format_widths(counts: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.compiled",
        description="Compile every kernel without a GPU, and print its registers, spilled bytes, "
        "bytes of shared memory, and loads and stores (COUNTxBITS).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--only", metavar="NAME,...", default=DEFAULT, help="workloads (bench/workloads.py)"
    )
    parser.add_argument(
        "--targets", metavar="NAME,...", default=",".join(TARGETS), help="GPUs to compile for"
    )
    options = parser.parse_args(arguments)
    print(
        f"{'target':<7} {'workload':<17} {'dtype':<9} {'pass':<9} {'kernel':<30} warps regs spills "
        "shared  loads | stores"
    )
    for target in options.targets.split(","):
        for workload in (w for w in WORKLOADS if w.name in options.only.split(",")):
            for dtype in DTYPES:
                spec = spec_of(workload.options)
                passes = launches_of_passes(workload.shape, getattr(torch, dtype), spec)
                for name, launches in passes.items():
                    for launch in launches:
                        code = compile_for(target, launch)
                        print(
                            f"{target:<7} {workload.name:<17} {dtype:<9} {name:<9} "
                            f"{code.kernel:<30} {code.warps:>5} {code.registers:>4} "
                            f"{code.spills:>6} {code.shared:>6}  "
                            f"{format_widths(code.loads)} | {format_widths(code.stores)}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
