"""Test how many bytes the Triton kernels move, and the memory checker that counts them.

Run the tests as tests/test_kernels.py says.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from fastflow_kernels.coupling import ChainGrads, Halves, OutputGrads
from fastflow_kernels.engines.triton import backward, engine, forward, inverse, sums
from tests.support import every_kernel
from tests.support.coupling import inverse as inverse_of
from tests.support.coupling import make, make_side, part_of, shape_id
from tests.support.kernels import (  # noqa: F401  (fixtures)
    both_kinds,
    busy,
    default_device,
    in_the_interpreter,
    kernels_run,
    not_interpreted,
    on_this_machine,
    without_a_gpu,
)
from tests.support.launches import Launch
from tests.support.modes import sanitize, slow_when_executed
from tests.support.sanitizer import StrayAccess

pytestmark = on_this_machine

FEW = {"g_ptr", "offset_ptr", "inv_ptr", "perm_ptr", "dlogdet_ptr", "sums_ptr"}


planes_and_rows = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 16, 32, 32), torch.float32),
        ((1, 32, 28, 28), torch.bfloat16),
        pytest.param((128, 512), torch.float32, marks=not_interpreted),
        pytest.param((256, 100), torch.bfloat16, marks=not_interpreted),
    ],
    ids=["B2-C16-32x32-fp32", "B1-C32-28x28-bf16", "B128-C512-fp32", "B256-C100-bf16"],
)


def traffic(launches: list[Launch]) -> float:
    """Return the bytes moved.

    Tensors with a value per channel or sample count once a launch, because a cache serves later
    reads of these few kilobytes.
    """
    return sum(
        sum(n for name, n in run.loaded.items() if name not in FEW)
        + sum(n for name, n in run.distinct.items() if name in FEW)
        + sum(run.stored.values())
        for run in launches
    )


@without_a_gpu
@slow_when_executed
@pytest.mark.parametrize("unpermutes_input", [False, True], ids=["", "reverse"])
@both_kinds
@planes_and_rows
@pytest.mark.usefixtures("busy")
def test_coupling_moves_little_more_than_the_minimum(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    gin: bool,
    unpermutes_input: bool,
    record_property: Callable[[str, object], None],
) -> None:
    x, a, coupling = make(shape, gin=gin, unpermutes_input=unpermutes_input, x=dtype)
    with sanitize() as of_forward:
        y, _ = engine.forward(x, a, coupling)
    with sanitize() as of_backward:
        engine.backward(x, a, OutputGrads(y, torch.randn(shape[0])), coupling, True)
    with sanitize() as of_inverse:
        inverse_of(y, a, coupling)
    # GIN reads a_s once more for its mean. Its backward does not read x1 and a_t, which only the
    # scale's gradient needs, but reads a_s, x2 and dy2 twice.
    extra = 0.5 if gin else 0.0
    for name, launches, minimum in (
        ("forward", of_forward, 3.0 + extra),
        ("backward", of_backward, 5.0 + extra),
        ("inverse", of_inverse, 3.0 + extra),
    ):
        ratio = traffic(launches) / (x.numel() * x.element_size())
        record_property(name, round(ratio, 3))
        print(f"{shape_id(shape)} {dtype} {name}: {ratio:.3f} N, minimum {minimum} N")
        assert ratio <= 1.05 * minimum, name


@without_a_gpu
@slow_when_executed
@both_kinds
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 16, 32, 32), torch.float32),
        ((1, 32, 28, 28), torch.bfloat16),
        pytest.param((128, 256), torch.float32, marks=not_interpreted),
    ],
    ids=["B2-C16-32x32-fp32", "B1-C32-28x28-bf16", "B128-C256-fp32"],
)
def test_a_side_moves_little_more_than_the_minimum(
    shape: tuple[int, ...], dtype: torch.dtype, gin: bool
) -> None:
    """N is the size of the block's tensor, of which the side is one half."""
    x, a, coupling = make_side(shape, gin=gin, x=dtype)
    whole, n = 2 * x.numel() * x.element_size(), x.numel() // shape[1]
    x, y, dy, dx = (part_of(x).own for _ in range(4))
    with sanitize() as of_forward:
        engine.forward(x, a, coupling, y)
    with sanitize() as of_backward:
        engine.backward(x, a, OutputGrads(dy, torch.randn(shape[0])), coupling, False, dx)
    with sanitize() as of_inverse:
        engine.invert_active(y, dx, a, coupling)
    # Backward does not read a_t. GIN reads a_s once more for its mean, and backward a_s, x and dy.
    # It writes and reads one float32 sum per pixel, backward two.
    sums = 2 * 4 * n / whole
    for name, launches, minimum, extra in (
        ("forward", of_forward, 2.0, 0.5 + sums),
        ("backward", of_backward, 3.0, 1.5 + 2 * sums),
        ("inverse", of_inverse, 2.0, 0.5 + sums),
    ):
        minimum += extra if gin else 0.0
        ratio = traffic(launches) / whole
        print(f"{shape_id(shape)} {dtype} {name}: {ratio:.3f} N, minimum {minimum:.3f} N")
        assert minimum <= ratio <= 1.05 * minimum, name


def in_halves(t: torch.Tensor) -> Halves:
    active = t.shape[1] // 2
    return Halves(*(half.contiguous() for half in t.split((t.shape[1] - active, active), 1)))


@without_a_gpu
@slow_when_executed
@planes_and_rows
@pytest.mark.usefixtures("busy")
def test_a_block_between_halves_moves_little_more_than_the_minimum(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The backward pass reads the gradient from the next subnet, which is one half, as well."""
    x, a, coupling = make(shape, x=dtype)
    whole, halves = x.numel() * x.element_size(), in_halves(x)
    y = Halves(*map(torch.empty_like, halves))
    dsub = torch.randn_like(halves.passive)
    with sanitize() as of_forward:
        engine.forward_in_chain(halves, a, coupling, y)
    with sanitize() as of_backward:
        grads = ChainGrads(y, dsub, torch.randn(shape[0]))
        engine.backward_in_chain(halves, a, grads, coupling, True)
    for name, launches, minimum in (("forward", of_forward, 3.0), ("backward", of_backward, 5.5)):
        ratio = traffic(launches) / whole
        print(f"{shape_id(shape)} {dtype} {name}: {ratio:.3f} N, minimum {minimum} N")
        assert minimum <= ratio <= 1.05 * minimum, name


@without_a_gpu
@slow_when_executed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("busy")
def test_a_chain_of_blocks_moves_little_beside_what_its_subnets_move(dtype: torch.dtype) -> None:
    """A training step of 8 blocks, as FastFlow has them, moves at most 8.6 N for each block.

    The first block reads a whole tensor, and the last one writes one. It gets no gradient from a
    subnet behind it.
    """
    blocks, shape = 8, (2, 16, 32, 32)
    inputs = [make(shape, x=dtype) for _ in range(blocks)]
    x: Tensor = inputs[0][0]
    values: Tensor | Halves = x
    saved, sums = [], []
    with sanitize() as launches:
        for i, (_, a, coupling) in enumerate(inputs):
            zeros = torch.zeros_like(x)
            y = in_halves(zeros) if i + 1 < blocks else zeros
            saved.append((values, a, coupling))
            sums.append(engine.forward_in_chain(values, a, coupling, y))
            values = y
        engine.log_det_of_chain(sums, [coupling for _, _, coupling in inputs], 32 * 32)
        grads = ChainGrads(torch.randn_like(x), None, torch.randn(shape[0]))
        for values, a, coupling in reversed(saved):
            dx = engine.backward_in_chain(values, a, grads, coupling, True).x
            if isinstance(dx, Halves):
                grads = ChainGrads(dx, torch.randn_like(dx.passive), grads.log_det)
    # Two concatenations read and write the sums of s and the parameters.
    parameters = [coupling.parameters[0] for _, _, coupling in inputs]
    copied = 2 * sum(t.numel() * t.element_size() for t in (*sums, *parameters))
    per_block = (traffic(launches) + copied) / blocks / (x.numel() * x.element_size())
    print(f"{shape_id(shape)} {dtype}: {per_block:.3f} N for each block and training step")
    assert 8.4 <= per_block <= 8.6


# --- the memory checker itself --------------------------------------------------------------------


@without_a_gpu
@slow_when_executed
def test_the_case_for_compute_sanitizer_runs_every_kernel() -> None:
    with sanitize() as launches:
        every_kernel.run("cpu")
    modules = (backward, forward, inverse, sums)
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {run.kernel for run in launches} == defined


@in_the_interpreter
@pytest.mark.parametrize(
    ("index", "message"), [(5, "stored twice"), (40, "out of bounds"), (-9, "out of bounds")]
)
def test_sanitizer_catches_a_bad_index(index: int, message: str) -> None:
    x, a, coupling = make((2, 7, 3))
    inv = torch.arange(7)
    inv[0] = index
    # The interpreter wraps a kernel's exception in its own.
    with sanitize(), pytest.raises((StrayAccess, Exception), match=message):
        engine.forward(x, a, coupling._replace(inv=inv))


def test_sanitizer_poisons_fresh_memory() -> None:
    with sanitize():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(2).isnan().all()
    assert torch.empty.__name__ == "empty"
