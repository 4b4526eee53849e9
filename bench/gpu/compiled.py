"""Compile the kernels for several GPUs, without one, and print figures of the machine code.

    python -m bench.gpu.compiled [--only cflow/1] [--targets sm_90]

Run it before and after a change of a kernel. It prints a line for each kernel: registers, spilled
bytes, shared memory, and the number of global accesses of each width in bits. The tests hold the
same figures to limits (tests/test_kernels_compiled.py). A pass "in halves" is that of a block
between two others of a chain.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from bench.workloads import DTYPES, WORKLOADS
from fastflow_kernels.coupling import CouplingSpec
from tests.support.compile_targets import (
    TARGETS,
    Recorded,
    compile_for,
    launches_of,
    launches_of_passes,
)
from tests.support.kernel_passes import (
    PASSES_BETWEEN_HALVES,
    empty_inputs_in_halves,
    run_between_halves,
    spec_of,
)

DEFAULT = "fastflow-wrn50/1,cflow/1,tabular GIN"


def format_widths(counts: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True))


def launches_in_halves(
    shape: tuple[int, ...], dtype: torch.dtype, spec: CouplingSpec
) -> dict[str, list[Recorded]]:
    """Return the launches between halves for an input of this shape, by pass. GIN has none."""
    if spec.gin:
        return {}
    inputs = empty_inputs_in_halves(shape, dtype, spec)
    return {
        f"{name} in halves": launches_of(partial(run_between_halves, name, inputs))
        for name in PASSES_BETWEEN_HALVES
    }


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
        f"{'target':<7} {'workload':<17} {'dtype':<9} {'pass':<18} {'kernel':<30} warps regs "
        "spills shared  loads | stores"
    )
    for target in options.targets.split(","):
        for workload in (w for w in WORKLOADS if w.name in options.only.split(",")):
            for dtype in DTYPES:
                spec = spec_of(workload.options)
                case = (workload.shape, getattr(torch, dtype), spec)
                passes = launches_of_passes(*case) | launches_in_halves(*case)
                for name, launches in passes.items():
                    for launch in launches:
                        code = compile_for(target, launch)
                        print(
                            f"{target:<7} {workload.name:<17} {dtype:<9} {name:<18} "
                            f"{code.kernel:<30} {code.warps:>5} {code.registers:>4} "
                            f"{code.spills:>6} {code.shared:>6}  "
                            f"{format_widths(code.loads)} | {format_widths(code.stores)}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
