"""Faults planted in the kernels and their launchers, each of which makes a test fail.

For each the package is copied, changed in one place, and a few tests run on the copy (the compiled
kernels, executed). Where the text to change stands in several places, each of them is a fault of
its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="runs compiled kernels"
    ),
]
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
COUPLING, MATH, PREPARED, REDUCE, TILES = (
    f"engines/triton/{name}.py" for name in ("coupling", "math", "prepared", "reduce", "tiles")
)
PLANES, ROWS = "test_coupling_parity and B2-C7-4x5", "test_coupling_parity and B5-C7"


class Planted(NamedTuple):
    """A change of a file of the package, and the tests that must notice it."""

    file: str
    before: str
    after: str
    tests: str  # of tests/test_kernels.py, unless another file is named
    test_file: str = "tests/test_kernels.py"


FAULTS = {
    "a mask without the end of the row": Planted(
        COUPLING,
        "tl.store(y_ptr + at1, y1, mask=passive)",
        "tl.store(y_ptr + at1, y1, mask=is_passive[:, None])",
        PLANES,
    ),
    "a mask of the other half": Planted(
        COUPLING, "    is_active = c < C2\n", "    is_active = c < C1\n", f"{PLANES} or {ROWS}"
    ),
    "a mask of one channel more": Planted(
        COUPLING,
        # in the passive half of the inverse it would do no harm: the active one overwrites it
        "    is_passive = c < C1\n    is_active",
        "    is_passive = c <= C1\n    is_active",
        "test_coupling_parity and (B1-C9-7 or B2-C9-1x1)",
    ),
    "a log-determinant's gradient without a mask": Planted(
        COUPLING,
        "ds += load(dlogdet_ptr + b * stride_l, b < B, ACC)",
        "ds += load(dlogdet_ptr + b * stride_l, b >= 0, ACC)",
        ROWS,
    ),
    "the other half": Planted(
        COUPLING, "a_t = load(a_ptr + C2 * P + at,", "a_t = load(a_ptr + C1 * P + at,", PLANES
    ),
    "an alignment that the row has not": Planted(
        COUPLING,
        "mul = alignment(pixels, stride_xb, stride_ab)",
        "mul = alignment(0, stride_xb, stride_ab)",
        "parity and B3-C2-3x3",
    ),
    "an alignment that a stride has not": Planted(
        COUPLING,
        "mul = alignment(0 if rows else pixels, stride_xb, stride_ab)",
        "mul = alignment(0 if rows else pixels, stride_ab)",
        "layouts or parity and B5-C7",
    ),
    "pointers taken for aligned": Planted(
        PREPARED, "return not merged & 15", "return True", "misaligned"
    ),
    "a pointer whose alignment is not asked for": Planted(
        COUPLING,
        "aligned(x, a, g, offset, perm, inv)",
        "aligned(x, a, g, perm, inv)",
        "",
        "tests/test_launch_keys.py",
    ),
    "a launch kept whatever the gradient's dtype": Planted(
        COUPLING,
        "dlogdet_dtype = None if dlogdet is None else dlogdet.dtype",
        "dlogdet_dtype = None if dlogdet is None else torch.float32",
        "",
        "tests/test_launch_keys.py",
    ),
    "a launch kept whether or not there is an index": Planted(
        COUPLING, "indexed = perm is not None", "indexed = True", "", "tests/test_launch_keys.py"
    ),
    "a sample's offset in 32 bits": Planted(
        TILES,
        "b = (block // tiles).to(tl.int64)",
        "b = block // tiles",
        "planes",
        "tests/test_kernels_executed.py",
    ),
    "a row's offset in 32 bits": Planted(
        TILES,
        "b = block.to(tl.int64) * BLOCK_Q + q",
        "b = block * BLOCK_Q + q",
        "rows",
        "tests/test_kernels_executed.py",
    ),
    "a stride in 32 bits": Planted(
        COUPLING, "b * stride_xb * MUL", "b * (stride_xb * MUL)", "far_apart"
    ),
    "a partial sum that is not stored": Planted(
        COUPLING,
        "        tl.store(part_ptr + program, CLAMP * tl.sum(t))\n",
        "        pass\n",
        PLANES,
    ),
    "two programs that store one sum": Planted(
        REDUCE,
        "tl.store(sums_ptr + (b * PARTS + k), tl.sum(sum_t))",
        "tl.store(sums_ptr + b * PARTS, tl.sum(sum_t))",
        "gin_parity_of",
    ),
    "a program that skips a tile": Planted(
        REDUCE, "        start += BLOCK_K\n", "        start += 2 * BLOCK_K\n", "extreme"
    ),
    "copies of a log-determinant that differ": Planted(
        COUPLING,
        "CLAMP * tl.sum(t, axis=0, keep_dims=True)",
        "tl.sum(CLAMP * t, axis=0, keep_dims=True)",
        "float64 and B9-C130",
    ),
    "a count of tiles in 32 bits": Planted(
        TILES,
        "tiles = (P - 1) // BLOCK_Q + 1",
        "tiles = (P + BLOCK_Q - 1) // BLOCK_Q",
        "columns_at_the_end",
    ),
    "copies of a sum that differ": Planted(
        MATH, "return tl.fma(a, b, tl.zeros_like(a))", "return a * b", "parity and B9-C130"
    ),
    "an inexact exponential": Planted(
        MATH,
        "return tl.exp2(r * LOG2E) * power_of_two(half) * power_of_two(k - half)",
        "return tl.exp2(x * LOG2E)",
        "scales",
    ),
    "a reciprocal without its second factor": Planted(
        COUPLING, "factor * boost", "factor", "subnormal"
    ),
    "the same in a chain": Planted(COUPLING, "factor2 * boost2", "factor2", "subnormal"),
    "a reciprocal that overflows": Planted(
        TILES, "is_tiny = scale < 2.0**-64", "is_tiny = scale < 0.0", "subnormal"
    ),
    "a tanh that cancels": Planted(
        MATH, "tl.abs(x) < 0.625, near_zero", "tl.abs(x) < 0.0, near_zero", "small_arguments"
    ),
    "a gradient's stride ignored": Planted(
        COUPLING, "dlogdet_ptr + b * stride_l", "dlogdet_ptr + b", "layouts or share_a_log"
    ),
    "one stride for samples and rows": Planted(
        COUPLING,
        "(dlogdet.stride(0), dlogdet_of_row.stride(0))",
        "(dlogdet.stride(0), dlogdet.stride(0))",
        "share_a_log",
    ),
    "a copy for the kernels that is undone": Planted(
        "block.py",
        ".contiguous(memory_format=memory_format(x))",
        ".contiguous(memory_format=layout)",
        "channels_last_gin",
    ),
    "the forward's sign in the inverse": Planted(
        COUPLING, "-(CLAMP * tl.sum(t, axis=0", "(CLAMP * tl.sum(t, axis=0", ROWS
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests import, in a folder of its own."""
    root = tmp_path_factory.mktemp("planted")
    for name in ("fastflow_kernels", "reference", "tests", "bench"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def run(root: Path, fault: Planted) -> str:
    options = [
        "-q",
        "-x",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        fault.tests,
    ]
    command = [sys.executable, "-m", "pytest", fault.test_file, *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    # the tests ran, and passed or failed
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "error" not in done.stdout.splitlines()[-1], done.stdout
    assert "CompilationError" not in done.stdout, done.stdout
    return done.stdout


def places() -> list[tuple[str, int]]:
    """The faults, and which of the places each changes."""
    counts = {
        name: (ROOT / "fastflow_kernels" / fault.file).read_text().count(fault.before)
        for name, fault in FAULTS.items()
    }
    return [(name, place) for name, count in counts.items() for place in range(max(1, count))]


def changed(text: str, fault: Planted, place: int) -> str:
    parts = text.split(fault.before)
    assert len(parts) > 1, f"{fault.file} has no {fault.before!r}"
    return (
        fault.before.join(parts[: place + 1]) + fault.after + fault.before.join(parts[place + 1 :])
    )


@pytest.mark.parametrize(("name", "place"), places())
def test_a_planted_fault_is_noticed(copy: Path, name: str, place: int) -> None:
    fault = FAULTS[name]
    path = copy / "fastflow_kernels" / fault.file
    text = path.read_text()
    try:
        path.write_text(changed(text, fault, place))
        output = run(copy, fault)
    finally:
        path.write_text(text)
    if "1 failed" not in output.splitlines()[-1]:
        pytest.fail(
            f"no test noticed {name!r}: {fault.before!r} -> {fault.after!r} in {fault.file}, place "
            f"{place}\n{output}"
        )


@pytest.mark.parametrize(
    "tests", sorted({(fault.test_file, fault.tests) for fault in FAULTS.values()})
)
def test_without_it_the_tests_pass(copy: Path, tests: tuple[str, str]) -> None:
    output = run(copy, Planted("", "", "", tests[1], tests[0]))
    assert "failed" not in output
    assert "passed" in output
