"""Plant faults in the kernels and their launchers, and test that each makes a test fail.

For each fault, the package is copied and changed in one place. Then a few tests run on the copy,
with compiled and executed kernels. If the text occurs in several places, each is a separate fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

runs_compiled_kernels = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="runs compiled kernels"
)

ROOT = Path(__file__).resolve().parent.parent
FORWARD, BACKWARD, INVERSE, LAUNCH, MATH, SUMS, TILES = (
    f"engines/triton/{name}.py"
    for name in ("forward", "backward", "inverse", "launch", "math", "sums", "tiles")
)
PLANES, ROWS = "test_coupling_parity and B2-C7-4x5", "test_coupling_parity and B5-C7"
PARITY, VALUES, SIDES, HALVES, EXECUTED, BLOCKS, OPERATORS, GRAPHS = (
    f"tests/test_{name}.py"
    for name in (
        "kernels",
        "kernels_values",
        "kernels_sides",
        "kernels_halves",
        "kernels_executed",
        "kernels_blocks",
        "kernels_operators",
        "kernels_graphs",
    )
)
KEYS, LAUNCHES = "tests/test_launch_keys.py", "tests/test_executor_launches.py"


class Planted(NamedTuple):
    """A change of the package, and the tests that must notice it.

    Attributes:
        files: Files that contain the text, relative to the package.
        before: Text to change; each place is a separate fault.
        after: Text to put there instead.
        tests: Expression for -k that selects the tests.
        test_file: File of the tests.
    """

    files: tuple[str, ...]
    before: str
    after: str
    tests: str
    test_file: str = PARITY


FAULTS = {
    "a mask without the end of the row": Planted(
        (FORWARD,),
        "offs_y1), y1, mask=mask_passive)",
        "offs_y1), y1, mask=is_passive[:, None])",
        PLANES,
    ),
    "a mask of the other half": Planted(
        (FORWARD, BACKWARD, INVERSE),
        "    is_active = c < C2\n",
        "    is_active = c < C1\n",
        f"{PLANES} or {ROWS}",
    ),
    # Not in the inverse, where it does no harm: the active kernel overwrites the passive one's.
    "a mask of one channel more": Planted(
        (FORWARD, BACKWARD),
        "    is_passive = c < C1\n",
        "    is_passive = c <= C1\n",
        "test_coupling_parity and (B1-C9-7 or B2-C9-1x1)",
    ),
    "a log-determinant's gradient without a mask": Planted(
        (BACKWARD,),
        "ds += load(dlogdet_ptr + b * stride_l, b < B, ACC_DTYPE)",
        "ds += load(dlogdet_ptr + b * stride_l, b >= 0, ACC_DTYPE)",
        ROWS,
    ),
    "the other half": Planted(
        (FORWARD,), "a_t = load(a_ptr + C2 * P + offs,", "a_t = load(a_ptr + C1 * P + offs,", PLANES
    ),
    "an alignment that the row lacks": Planted(
        (LAUNCH,),
        "alignment(0 if plan.is_rows else pixels, ",
        "alignment(0, ",
        "parity and B3-C2-3x3",
    ),
    "an alignment that a stride lacks": Planted(
        (LAUNCH,),
        "*(stride or 0 for stride in strides.values())",
        "*(stride or 0 for stride in list(strides.values())[1:])",
        "layouts or parity and B5-C7",
    ),
    "pointers taken for aligned": Planted(
        (LAUNCH,), "return not merged & 15", "return True", "misaligned"
    ),
    "a pointer whose alignment is not checked": Planted(
        (FORWARD,),
        "aligned(x, a, g, offset, channel_index, y)",
        "aligned(x, a, g, channel_index, y)",
        "",
        KEYS,
    ),
    "a launch cached without the gradient's dtype": Planted(
        (BACKWARD,),
        "None if log_det is None else log_det.dtype",
        "None if log_det is None else torch.float32",
        "",
        KEYS,
    ),
    "a launch cached without the parameters' dtype": Planted(
        (LAUNCH,),
        "(g.dtype, offset.dtype)",
        "(g.dtype, g.dtype)",
        "",
        KEYS,
    ),
    "a launch cached without regard to the index": Planted(
        (LAUNCH,), "        coupling.perm is not None,\n", "        True,\n", "", KEYS
    ),
    "a sample's offset in 32 bits": Planted(
        (TILES,), "b = (tile // tiles).to(tl.int64)", "b = tile // tiles", "planes", EXECUTED
    ),
    "a row's offset in 32 bits": Planted(
        (TILES,),
        "b = tile.to(tl.int64) * BLOCK_COLUMNS + q",
        "b = tile * BLOCK_COLUMNS + q",
        "rows",
        EXECUTED,
    ),
    "a stride in 32 bits": Planted(
        (TILES,), "ptr + b * stride * ALIGN", "ptr + b * (stride * ALIGN)", "far_apart"
    ),
    "the same in a side": Planted(
        (TILES,), "ptr + b * stride * ALIGN", "ptr + b * (stride * ALIGN)", "far_apart", SIDES
    ),
    "a partial sum that is not stored": Planted(
        (FORWARD,),
        "        tl.store(part_ptr + program, CLAMP * tl.sum(t))\n",
        "        pass\n",
        PLANES,
    ),
    "two programs that store one sum": Planted(
        (SUMS,),
        "tl.store(sums_ptr + (b * PARTS + k), tl.sum(sum_s))",
        "tl.store(sums_ptr + b * PARTS, tl.sum(sum_s))",
        "gin_parity_of",
    ),
    "a program that skips a tile": Planted(
        (SUMS,),
        "        start += BLOCK_GROUPS\n",
        "        start += 2 * BLOCK_GROUPS\n",
        "extreme",
    ),
    "copies of a log-determinant that differ": Planted(
        (FORWARD, INVERSE),
        "CLAMP * tl.sum(t, axis=0, keep_dims=True)",
        "tl.sum(CLAMP * t, axis=0, keep_dims=True)",
        "float64 and B9-C130",
    ),
    "a count of tiles in 32 bits": Planted(
        (TILES,),
        "tiles = (P - 1) // BLOCK_COLUMNS + 1",
        "tiles = (P + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS",
        "columns_at_the_end",
    ),
    "copies of a sum that differ": Planted(
        (MATH,), "return tl.fma(a, b, tl.zeros_like(a))", "return a * b", "parity and B9-C130"
    ),
    "an inexact exponential": Planted(
        (MATH,),
        "return tl.exp2(r * LOG2E) * power_of_two(half) * power_of_two(k - half)",
        "return tl.exp2(x * LOG2E)",
        "scales",
        VALUES,
    ),
    "a reciprocal without its second factor": Planted(
        (INVERSE,), "factor * boost", "factor", "subnormal", VALUES
    ),
    "the same in a chain": Planted((BACKWARD,), "factor2 * boost2", "factor2", "subnormal", VALUES),
    "a reciprocal that overflows": Planted(
        (TILES,), "is_tiny = scale < 2.0**-64", "is_tiny = scale < 0.0", "subnormal", VALUES
    ),
    "a tanh that cancels": Planted(
        (MATH,),
        "tl.abs(x) < 0.625, near_zero",
        "tl.abs(x) < 0.0, near_zero",
        "small_arguments",
        VALUES,
    ),
    "a gradient's stride ignored": Planted(
        (BACKWARD, SUMS), "dlogdet_ptr + b * stride_l", "dlogdet_ptr + b", "layouts or share_a_log"
    ),
    "one stride for samples and rows": Planted(
        (BACKWARD,),
        "stride_l if operands.rows_per_sample == 1 else 1",
        "stride_l",
        "share_a_log",
    ),
    "an inverse that reads x for y": Planted(
        (BACKWARD,), "y_ptr + b * C * P + offs_y2", "x_ptr + b * C * P + offs_y2", PLANES
    ),
    "a copy for the kernels that is reverted": Planted(
        ("block.py",),
        "return x.contiguous() if route.is_copied else in_layout(x, route.layout)",
        "return in_layout(x, route.layout)",
        "channels_last_gin",
        BLOCKS,
    ),
    "the forward's sign in the inverse": Planted(
        (INVERSE,), "-(CLAMP * tl.sum(t, axis=0", "(CLAMP * tl.sum(t, axis=0", ROWS
    ),
    "a side without a gap between its samples": Planted(
        (TILES,), "return ptr + b * stride * ALIGN", "return ptr + b * C * P", "B2-C3-4x5", SIDES
    ),
    "a launch cached without the dtype of a side's output": Planted(
        (FORWARD,), "None if y is None else y.dtype", "None", "", KEYS
    ),
    "a side's result without its gaps": Planted(
        (FORWARD,),
        "None if y is None or y.is_contiguous() else y.stride(0)",
        "None",
        "B2-C3-4x5",
        SIDES,
    ),
    "a channel taken for one of the other half": Planted(
        (TILES,),
        "tl.where(j < C1, pointers[0]",
        "tl.where(j <= C1, pointers[0]",
        "B2-C7-4x5",
        HALVES,
    ),
    "one stride for both halves": Planted(
        (TILES,), "b, active_stride, C - C1,", "b, stride, C - C1,", "B2-C7-4x5-strided", HALVES
    ),
    "a subnet's gradient read beyond its half": Planted(
        (BACKWARD,), " & (j2 < C1)", "", "B2-C7-4x5", HALVES
    ),
    "a launch cached without the subnet's gradient": Planted(
        (BACKWARD,), "dtype_of(dy2), dtype_of(dsub))", "dtype_of(dy2), None)", "binary", HALVES
    ),
    "a pointer of halves whose alignment is not checked": Planted(
        (FORWARD,), "channel_index, y1, y2)", "channel_index, y1)", "binary", HALVES
    ),
    "a chain that skips sums": Planted(
        (SUMS,),
        "        start += BLOCK_PARTS\n",
        "        start += 2 * BLOCK_PARTS\n",
        "log_det",
        HALVES,
    ),
    "a chain with the scales of one block": Planted(
        (SUMS,), "torch.cat(scales)", "scales[0]", "log_det", HALVES
    ),
    "sums of a pixel read by its neighbour": Planted(
        (TILES,),
        "tl.load(sums_ptr + b * P + p,",
        "tl.load(sums_ptr + b * P + 0 * p,",
        "B2-C3-4x5",
        SIDES,
    ),
    "an atan that cancels": Planted(
        (MATH,),
        "t = tl.where(is_near, x, t)",
        "t = tl.where(is_near, (x + 1.0) - 1.0, t)",
        "every_size",
        SIDES,
    ),
    "an operator that trusts the strides of a graph": Planted(
        ("engines/operators.py",),
        "x if x.is_contiguous() else _readable(x, engine), a",
        "x, a",
        "depend_on_no_strides",
        OPERATORS,
    ),
    "an operator's result in another dtype": Planted(
        ("engines/operators.py",),
        "dtype = promoted(x, a, g)",
        "dtype = x.dtype",
        "opcheck and bfloat16",
        OPERATORS,
    ),
    "an index of a graph without its own inverse": Planted(
        ("permutations.py",), "elif not uses_perm:", "elif False:", "only_the_matrix", GRAPHS
    ),
    "a warm-up that leaves aligned launches to the capture": Planted(
        (LAUNCH,),
        "if self._run is None and isinstance",
        "if is_aligned and isinstance",
        "warm_up",
        LAUNCHES,
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy everything that the tests import into a separate folder."""
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
    # The tests ran, and passed or failed.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "error" not in done.stdout.splitlines()[-1], done.stdout
    assert "CompilationError" not in done.stdout, done.stdout
    return done.stdout


def places() -> list[tuple[str, str, int]]:
    """Return each fault's name with each of its places: a file, and a number within the file."""
    return [
        (name, file, place)
        for name, fault in FAULTS.items()
        for file in fault.files
        for place in range(max(1, text_of(ROOT, file).count(fault.before)))
    ]


def text_of(root: Path, file: str) -> str:
    return (root / "fastflow_kernels" / file).read_text()


def change(text: str, fault: Planted, place: int) -> str:
    parts = text.split(fault.before)
    return (
        fault.before.join(parts[: place + 1]) + fault.after + fault.before.join(parts[place + 1 :])
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_a_fault_changes_is_there(fault: Planted) -> None:
    for file in fault.files:
        assert fault.before in text_of(ROOT, file), f"{fault.before!r} is not in {file}"


@pytest.mark.slow
@runs_compiled_kernels
@pytest.mark.parametrize(("name", "file", "place"), places())
def test_a_planted_fault_is_noticed(copy: Path, name: str, file: str, place: int) -> None:
    fault, text = FAULTS[name], text_of(copy, file)
    path = copy / "fastflow_kernels" / file
    try:
        path.write_text(change(text, fault, place))
        output = run(copy, fault)
    finally:
        path.write_text(text)
    if "1 failed" not in output.splitlines()[-1]:
        pytest.fail(
            f"no test noticed {name!r}: {fault.before!r} -> {fault.after!r} in {file}, place "
            f"{place}\n{output}"
        )


@pytest.mark.slow
@runs_compiled_kernels
@pytest.mark.parametrize(
    "tests", sorted({(fault.test_file, fault.tests) for fault in FAULTS.values()})
)
def test_without_it_the_tests_pass(copy: Path, tests: tuple[str, str]) -> None:
    output = run(copy, Planted((), "", "", tests[1], tests[0]))
    assert "failed" not in output
    assert "passed" in output
