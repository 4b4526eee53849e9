"""Test that the kernels compile without spills, to wide accesses, and to few enough registers.

They are compiled for several GPUs; none is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

from triton.compiler.compiler import LazyDict
from triton.runtime.jit import JITFunction

from fastflow_kernels import AllInOneBlock
from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines.triton import (
    backward,
    engine,
    forward,
    inverse,
    launch,
)
from tests.support import mock_driver
from tests.support.cases import OPTIONS, Case, Shape, make_block
from tests.support.compile_targets import (
    Code,
    Recorded,
    compile_for,
    launches_of,
    launches_of_passes,
    launches_of_reconstruction,
    launches_of_side,
)
from tests.support.kernel_passes import (
    PASSES_BETWEEN_HALVES,
    empty_inputs_in_halves,
    run_between_halves,
)

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]

# A multiprocessor has 65536 registers. With 128 a thread, 16 warps are resident: 4 programs of 4
# warps, or 2 of 8.
REGISTERS = 128
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# Tensors that a kernel reads and writes in 128-bit accesses. Halves of x, a, y, dx and da count one
# by one.
WIDE = {
    "_coupling_fwd_kernel": (4, 2),
    "_coupling_bwd_kernel": (6, 4),
    "_coupling_bwd_kernel, inverting": (6, 5),
    "_coupling_inv_passive_kernel": (1, 1),
    "_coupling_inv_active_kernel": (3, 1),
    "_coupling_fwd_kernel, side": (3, 1),
    "_coupling_bwd_kernel, side": (3, 3),
    "_coupling_inv_active_kernel, side": (3, 1),
    "_coupling_fwd_kernel, in halves": (4, 2),
    # It also reads the gradient from the next subnet, for the passive and for the active half.
    "_coupling_bwd_kernel, in halves": (8, 4),
}


def spec_of(gin: bool = False) -> CouplingSpec:
    return CouplingSpec.of(1.9, "anomalib", "SOFTPLUS", gin)


def launches(
    shape: tuple[int, ...], dtype: torch.dtype, gin: bool = False, unpermutes_input: bool = False
) -> list[Recorded]:
    """Return all launches of a training step, plain and reversible, and of an inverse."""
    passes = launches_of_passes(shape, dtype, spec_of(gin), unpermutes_input)
    if not unpermutes_input:  # a reversible chain permutes by itself
        passes |= {"reconstruction": launches_of_reconstruction(shape, dtype, spec_of(gin))}
    return [run for runs in passes.values() for run in runs]


@cache
def compiled(target: str, shape: tuple[int, ...], dtype: str, **options: bool) -> tuple[Code, ...]:
    """Return the code of every kernel of one case; the backward's two kinds have two names."""
    codes = {}
    for run in launches(shape, DTYPES[dtype], **options):
        name = run.kernel.__name__ + (", inverting" if run.values.get("INVERT") else "")
        codes[name] = replace(compile_for(target, run), kernel=name)
    return tuple(codes.values())


def assert_lean(codes: tuple[Code, ...], registers: int = REGISTERS) -> None:
    for code in codes:
        print(code)
        assert code.spills == 0, code
        assert code.registers <= registers, code


def assert_wide(codes: tuple[Code, ...], width: int = 128) -> None:
    """Assert that every large tensor is read and written ``width`` bits at a time.

    Only a few accesses, to constants of a channel and to sums, may be narrower.
    """
    for code in codes:
        if code.kernel in WIDE:
            loads, stores = WIDE[code.kernel]
            # One access for each, or two. The count lies between if dtypes are mixed.
            assert (
                loads <= sum(n for bits, n in code.loads.items() if bits >= width) <= 2 * loads
            ), code
            assert (
                stores <= sum(n for bits, n in code.stores.items() if bits >= width) <= 2 * stores
            ), code
            assert sum(n for bits, n in code.loads.items() if bits < width) <= 12, code
            assert sum(n for bits, n in code.stores.items() if bits < width) <= 4, code


PLANES = (32, 64, 64, 64)
ROWS = (4096, 512)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [PLANES, ROWS], ids=["planes", "rows"])
def test_kernels_compile_lean_on_sm_90(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = compiled("sm_90", shape, dtype)
    assert_lean(codes)
    if shape is PLANES:
        assert_wide(codes)


@pytest.mark.parametrize("shape", [PLANES, ROWS], ids=["planes", "rows"])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [("sm_80", "fp32"), ("sm_100", "bf16"), ("gfx942", "fp32"), ("gfx942", "bf16")],
)
def test_kernels_compile_lean_elsewhere(
    target: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    codes = compiled(target, shape, dtype)
    assert_lean(codes)
    if shape is PLANES:
        # The backward's tile of 1024 values is made for 128 threads. AMD has 256, which get four
        # bfloat16 values each.
        assert_wide(codes, 64 if (target, dtype) == ("gfx942", "bf16") else 128)


@pytest.mark.parametrize("shape", [PLANES, ROWS], ids=["planes", "rows"])
def test_gin_kernels_compile_lean(shape: tuple[int, ...]) -> None:
    assert_lean(compiled("sm_90", shape, "fp32", gin=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [PLANES, (10_000, 100)], ids=["planes", "rows"])
def test_kernels_compile_lean_with_reverse_permutation(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes = compiled("sm_90", shape, dtype, unpermutes_input=True)
    assert_lean(codes)
    without = launches_of_passes(shape, DTYPES[dtype], spec_of())
    assert len(launches(shape, DTYPES[dtype], unpermutes_input=True)) == sum(
        map(len, without.values())
    )
    if shape is PLANES:
        assert_wide(codes)


def compiled_side(
    target: str, shape: tuple[int, ...], dtype: str, *options: Any
) -> tuple[Code, ...]:
    """Return the code of every kernel of one side of a block; options are gin and the function."""
    gin, function = options
    spec = CouplingSpec(1.272, 1.0, None, gin, function, 1.0, gin)
    codes = (
        (run.kernel.__name__ + ", side", compile_for(target, run))
        for run in launches_of_side(shape, DTYPES[dtype], spec)
    )
    return tuple(replace(code, kernel=name) for name, code in codes)


@pytest.mark.parametrize("function", ["tanh", "atan"])
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [PLANES, ROWS], ids=["planes", "rows"])
@pytest.mark.parametrize(
    ("target", "dtype"), [("sm_90", "fp32"), ("sm_90", "bf16"), ("gfx942", "fp32")]
)
def test_kernels_of_sides_compile_lean(
    target: str, dtype: str, shape: tuple[int, ...], gin: bool, function: str
) -> None:
    codes = compiled_side(target, shape, dtype, gin, function)
    assert_lean(codes)
    if shape is PLANES and not gin:
        assert_wide(codes)
        assert {code.kernel for code in codes} >= {name for name in WIDE if ", side" in name}


def launches_in_halves(shape: tuple[int, ...], dtype: str) -> list[list[Recorded]]:
    """Return the launches of each pass between two blocks of a chain."""
    inputs = empty_inputs_in_halves(shape, DTYPES[dtype], spec_of())
    return [
        launches_of(partial(run_between_halves, name, inputs)) for name in PASSES_BETWEEN_HALVES
    ]


@pytest.mark.parametrize("shape", [PLANES, ROWS], ids=["planes", "rows"])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *(("sm_90", dtype) for dtype in DTYPES),
        *((target, dtype) for target in ("sm_80", "sm_100") for dtype in ("fp32", "bf16")),
        ("gfx942", "fp32"),
        ("gfx942", "bf16"),
    ],
)
def test_kernels_between_halves_compile_lean(
    target: str, dtype: str, shape: tuple[int, ...]
) -> None:
    codes = tuple(
        replace(compile_for(target, run), kernel=run.kernel.__name__ + ", in halves")
        for runs in launches_in_halves(shape, dtype)
        for run in runs
    )
    # float64 takes 140 in the backward pass. 3 programs of 4 warps are then resident, not 4.
    assert_lean(codes, 144 if dtype == "fp64" else REGISTERS)
    if shape is PLANES:
        assert_wide(codes, 64 if (target, dtype) == ("gfx942", "bf16") else 128)
        assert {code.kernel for code in codes} >= {name for name in WIDE if "halves" in name}


def test_gaps_between_rows_leave_accesses_wide() -> None:
    forward, _, inverse = compiled_side("sm_90", ROWS, "fp32", False, "tanh")
    for code in (forward, inverse):
        assert max(code.loads) == max(code.stores) == 128, code


@pytest.mark.parametrize("shape", [(32, 768, 28, 28), (8, 384, 14, 14)], ids=["28x28", "14x14"])
def test_accesses_stay_wide_where_16_does_not_divide_the_row(shape: tuple[int, ...]) -> None:
    """Rows are 16-byte aligned in float32 because 14 * 14 = 4 * 49, though 16 divides no size."""
    codes = compiled("sm_90", shape, "fp32")
    assert_lean(codes)
    assert_wide(codes)


@pytest.mark.parametrize(
    ("spatial", "fp32", "bf16"),
    [((8, 8), 128, 128), ((14, 14), 128, 64), ((7, 14), 64, 32), ((7, 7), 32, 16)],
    ids=["8", "4", "2", "1"],
)
def test_accesses_are_as_wide_as_the_shape_allows(
    spatial: tuple[int, ...], fp32: int, bf16: int
) -> None:
    """The width depends on the power of two that divides the row (see engines/triton/plan.py)."""
    for dtype, bits in (("fp32", fp32), ("bf16", bf16)):
        for code in compiled("sm_90", (32, 64, *spatial), dtype):
            if code.kernel in ("_coupling_fwd_kernel", "_coupling_bwd_kernel"):
                assert max(code.stores, key=code.stores.get) == bits, code


def test_kernels_compile_with_odd_sizes() -> None:
    assert_lean(compiled("sm_90", (3, 7, 5, 7), "fp32"))
    assert_lean(compiled("sm_90", (3, 1, 5), "fp32"))


@pytest.mark.parametrize("shape", [(64, 2048), (10_000, 100)], ids=["B64-C2048", "B10000-C100"])
def test_row_kernels_compile_lean_at_other_widths(shape: tuple[int, ...]) -> None:
    assert_lean(compiled("sm_90", shape, "fp32"))


def test_launches_are_few() -> None:
    """A forward and a backward pass take two launches each; the forward pass of rows takes one.

    More than 16 arguments would make a launch slower.
    """
    for shape, count in ((PLANES, 2 + 2 + 3 + 3), (ROWS, 1 + 2 + 2 + 3)):
        runs = launches(shape, torch.float32)
        assert len(runs) == count
        for run in runs:
            assert len(arguments_of(run)) <= 15


def test_launches_between_halves_are_few() -> None:
    """One for the forward pass, two for the backward pass, and one for a whole chain.

    The backward pass has an argument for each half. Strides without gaps are not arguments.
    """
    for shape in (PLANES, ROWS):
        forward, backward, log_det = launches_in_halves(shape, "fp32")
        assert (len(forward), len(backward), len(log_det)) == (1, 2, 1)
        assert len(arguments_of(forward[0])) <= 12
        assert len(arguments_of(backward[0])) <= 17


def arguments_of(run: Recorded) -> list[object]:
    """Return the binary's arguments, without constants and without None, which is compiled in."""
    constants = {param.name for param in run.kernel.params if param.is_constexpr}
    return [v for name, v in run.values.items() if name not in constants and v is not None]


# --- prepared launches ----------------------------------------------------------------------------


def launched(call: Callable[[], object]) -> list[tuple[object, ...]]:
    """Return what ``call`` passes to the driver's launcher.

    That is the grid, handles and the kernel's arguments of each launch.
    """
    calls: list[tuple[object, ...]] = []
    with mock.patch.object(
        mock_driver.Launcher, "__call__", lambda self, *args: calls.append(args)
    ):
        call()
    return calls


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [(4, 33), (3, 16, 5, 4)], ids=str)
def test_a_prepared_launch_gives_the_driver_what_triton_gives_it(
    shape: tuple[int, ...], gin: bool
) -> None:
    """The first call goes through Triton's dispatcher, and the second straight to the binary.

    A call with misaligned tensors goes through the dispatcher again.
    """
    x, dy, log_det = torch.randn(shape), torch.randn(shape), torch.randn(shape[0])
    a = torch.randn(shape[0], shape[1] // 2 * 2, *shape[2:])
    g, offset, perm = torch.randn(shape[1]), torch.randn(shape[1]), torch.randperm(shape[1])
    spec = CouplingSpec.of(1.25, "anomalib", "SOFTPLUS", gin)
    coupling, grads = Coupling(g, offset, spec, perm, perm.argsort()), OutputGrads(dy, log_det)

    def run(x: torch.Tensor = x) -> None:
        engine.forward(x, a, coupling)
        engine.backward(x, a, grads, coupling, True)
        v = engine.invert_passive(x, coupling)
        engine.invert_active(x, v, a, coupling)
        engine.invert_and_backward(x, v, a, grads, coupling, True)

    with mock_driver.mock_gpu():
        first, second = launched(run), launched(run)
        with mock.patch.object(
            JITFunction, "run", side_effect=AssertionError("not straight to the binary")
        ):
            run()
            with pytest.raises(AssertionError, match="not straight"):
                run(torch.randn(x.numel() + 1)[1:].view(shape))
    assert len(first) == len(second) >= 4
    for expected, actual in zip(first, second, strict=True):
        for a, b in zip(expected, actual, strict=True):
            if isinstance(a, torch.Tensor):  # results have other addresses
                assert isinstance(b, torch.Tensor)
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
            elif not isinstance(a, LazyDict):  # a LazyDict is for profilers
                assert a == b


@pytest.mark.parametrize("shape", [Shape(2, 6, (4, 4)), Shape(2, 7)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_pointer_lies_on_another_device(name: str, channels_last: bool, shape: Shape) -> None:
    """All operations around the launches, and the launches' pointers, are on the meta device.

    Mixing devices raises there as on a GPU.
    """
    case, launched = Case(shape, name), []
    x = torch.empty(shape.full, device="meta")
    x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x).requires_grad_()
    with (
        mock_driver.mock_gpu(),
        mock.patch.object(backward, "aligned", return_value=True),
        mock.patch.object(forward, "aligned", return_value=True),
        mock.patch.object(inverse, "aligned", return_value=True),
        mock.patch.object(
            launch.Launch,
            "__call__",
            lambda self, _, *pointers: launched.append((self.kernel.__name__, pointers)),
        ),
    ):
        block = make_block(
            AllInOneBlock, case, torch.float32, dialect="freia", backend="triton"
        ).to("meta")
        c = [torch.empty(2, *dims, device="meta") for dims in case.dims_c]
        (y,), logdet = block([x], c)
        torch.autograd.backward([y, logdet], [y, logdet])
        with torch.no_grad():
            (back,), minus = block([y], c, rev=True)
    assert all(t.is_meta for t in (y, logdet, x.grad, back, minus))
    assert {"_coupling_bwd_kernel", "_coupling_inv_active_kernel"} <= {
        kernel for kernel, _ in launched
    }
    for kernel, pointers in launched:
        assert all(t is None or t.is_meta for t in pointers), kernel
