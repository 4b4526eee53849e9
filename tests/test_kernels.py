"""Test the Triton kernels against plain PyTorch in float64: shapes, dtypes and layouts.

``pytest tests/test_kernels.py`` runs them on a GPU. Without one, they are compiled and executed on
the CPU (tests/support/executor). ``TRITON_INTERPRET=1 pytest tests/test_kernels.py`` runs them in
Triton's interpreter, under the memory checker of tests/support/sanitizer.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastflow_kernels.engines import Engine, eager

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS, OutputGrads
from fastflow_kernels.engines.triton import engine, plan, tiles
from fastflow_kernels.layouts import is_packed
from tests.support.coupling import (
    cast,
    check_everything,
    close,
    inverse,
    make,
    plain_log_det,
    size_of_log_det_terms,
)
from tests.support.kernels import (  # noqa: F401  (fixtures)
    EXTREME,
    PLANES,
    ROWS,
    TILED,
    both_kinds,
    busy,
    default_device,
    gin_is_slow_when_executed,
    kernels_run,
    not_interpreted,
    on_this_machine,
    shape_id,
    shapes,
    shapes_but_shortly,
)
from tests.support.modes import sanitize, slow_when_executed

# NumPy warns of overflows to inf, which are intended.
pytestmark = [*on_this_machine, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]


@shapes(*PLANES, *ROWS)
def test_coupling_parity(shape: tuple[int, ...]) -> None:
    check_everything(*make(shape))


@shapes_but_shortly(PLANES + ROWS, keep=(PLANES[0], PLANES[2], *ROWS[::2]))
def test_coupling_parity_of_gin(shape: tuple[int, ...]) -> None:
    check_everything(*make(shape, gin=True))


@both_kinds
@shapes_but_shortly(PLANES + ROWS, keep=(PLANES[0], ROWS[-1]))
def test_coupling_parity_in_float64(shape: tuple[int, ...], gin: bool) -> None:
    check_everything(*make(shape, gin=gin, x=torch.float64))


@shapes(*TILED)
def test_coupling_parity_of_many_tiles(shape: tuple[int, ...]) -> None:
    check_everything(*make(shape))


@not_interpreted
@shapes(*EXTREME)
def test_coupling_parity_of_extreme_sizes(shape: tuple[int, ...]) -> None:
    check_everything(*make(shape))


@pytest.mark.parametrize(
    "shape", [(2, 70, 64), pytest.param((1, 3, 80, 1024), marks=not_interpreted)], ids=shape_id
)
def test_coupling_gin_parity_of_many_tiles(shape: tuple[int, ...]) -> None:
    """In the second case, each program of the sums walks more than one tile."""
    check_everything(*make(shape, gin=True))


@both_kinds
@shapes_but_shortly(PLANES + ROWS + TILED[1:], keep=(PLANES[0], ROWS[0], ROWS[-1], TILED[1]))
def test_reverse_permutation(shape: tuple[int, ...], gin: bool) -> None:
    """The kernels also read x, and write its gradient and the inverse, through the index."""
    torch.manual_seed(7)
    check_everything(*make(shape, gin=gin, unpermutes_input=True))


@not_interpreted
def test_log_determinant_of_many_programs() -> None:
    """The sum takes more programs than one iteration of the loop reads."""
    x, a, coupling = make((1, 3, 260, 1024))
    log_det = engine.forward(x, a, coupling)[1]
    wide = cast(torch.float64, x, a, coupling)
    terms = size_of_log_det_terms(x, a, coupling)
    close(log_det, plain_log_det(*wide), plain_log_det(x, a, coupling), "log_det", terms)


@gin_is_slow_when_executed
@shapes((7, 6, 5, 2), (131, 300), (70, 9))
@pytest.mark.usefixtures("busy")
def test_coupling_parity_in_loops(shape: tuple[int, ...], gin: bool) -> None:
    check_everything(*make(shape, gin=gin))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@shapes((2, 7, 4, 5), (5, 7))
def test_coupling_parity_of_activations(
    shape: tuple[int, ...], activation: str, dialect: str
) -> None:
    check_everything(*make(shape, activation, dialect))


@shapes((2, 7, 4, 5), (5, 7))
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        pytest.param((torch.bfloat16, torch.float16, torch.bfloat16), marks=slow_when_executed),
        pytest.param((torch.float32, torch.float64, torch.float32), marks=slow_when_executed),
        pytest.param((torch.bfloat16, torch.bfloat16, torch.float32), marks=slow_when_executed),
    ],
    ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes),
)
def test_coupling_parity_of_dtypes(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    x, a, g = dtypes
    check_everything(*make(shape, x=x, a=a, g=g))


def test_coupling_parity_with_a_row_beyond_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_ROW_BYTES", 16)  # rows then count as planes of one pixel
    check_everything(*make((5, 9)))
    check_everything(*make((5, 9), gin=True))


# --- layouts --------------------------------------------------------------------------------------


@shapes((3, 7, 4, 5), (5, 8))
def test_coupling_parity_of_layouts(shape: tuple[int, ...]) -> None:
    x, a, coupling = make(shape)
    sliced = torch.randn(2 * shape[0], *shape[1:])[::2]
    check_everything(sliced, a, coupling)
    wider = torch.randn(shape[0], shape[1] + 3, *shape[2:])
    check_everything(wider[:, 2:-1], a[:1].expand_as(a), coupling)
    wider = torch.randn(shape[0], a.shape[1] + 1, *shape[2:])
    check_everything(x, wider[:, : a.shape[1]], coupling)
    dy = torch.randn(1, *[1] * (len(shape) - 1)).expand(shape)
    check_everything(x, a, coupling, OutputGrads(dy, torch.ones(1).expand(shape[0])))


@shapes((3, 7, 4, 5), (5, 8))
def test_coefficients_in_any_layout(shape: tuple[int, ...]) -> None:
    """Coefficients whose sample is not contiguous are copied; their gradients are contiguous."""
    x, a, coupling = make(shape)
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    every_other = a.repeat_interleave(2, 1)[:, ::2]
    channels_last = a.movedim(1, -1).contiguous().movedim(-1, 1)
    for strided in (every_other, channels_last) if a.dim() > 2 else (every_other,):
        assert torch.equal(strided, a)
        assert not is_packed(strided)
        results = []
        for coefficients in (a, strided):
            y, log_det = engine.forward(x, coefficients, coupling)
            gradients = engine.backward(x, coefficients, grads, coupling, True)
            back, minus = inverse(y, coefficients, coupling)
            both = engine.invert_and_backward(y, back.clone(), coefficients, grads, coupling, True)
            results.append((y, log_det, *gradients, back, minus, *both))
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(expected, actual)
            assert actual.is_contiguous()


def misaligned(t: Tensor) -> Tensor:
    """Return the same values at an address that is not divisible by 16."""
    return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)


@not_interpreted
@gin_is_slow_when_executed
@shapes((2, 8, 4, 4), (5, 8))
def test_coupling_parity_of_misaligned_tensors(shape: tuple[int, ...], gin: bool) -> None:
    """Aligned tensors prepare the launches; then x, a and all others are misaligned."""
    x, a, coupling = make(shape, gin=gin)
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    check_everything(x, a, coupling, grads)
    check_everything(misaligned(x), a, coupling, grads)
    check_everything(x, misaligned(a), coupling, grads)
    names = ("global_scale", "global_offset", "perm", "inv")
    coupling = coupling._replace(**{name: misaligned(getattr(coupling, name)) for name in names})
    check_everything(x, a, coupling, OutputGrads(*map(misaligned, grads)))


@gin_is_slow_when_executed
@shapes((2, 4, 16), (2, 16))
def test_coupling_of_samples_far_apart(shape: tuple[int, ...], gin: bool) -> None:
    """Samples are 2**31 elements apart, as in a slice of a large tensor.

    No product of the stride fits in 32 bits. Only a few elements are touched.
    """
    x, a, coupling = make(shape, gin=gin, x=torch.float16)
    size, stride = x[0].numel(), 2**31
    memory = torch.empty(stride + 2 * size, dtype=torch.float16)
    far_x, far_a = (
        memory.as_strided(shape, (stride, *x.stride()[1:]), k * size).copy_(t)
        for k, t in enumerate((x, a))
    )
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    results = []
    for values, coefficients in ((far_x, far_a), (x, a)):
        with sanitize():
            forward = engine.forward(values, coefficients, coupling)
            backward = engine.backward(values, coefficients, grads, coupling, True)
            back, log_det = inverse(values, coefficients, coupling)
            again = back.clone()
            both = engine.invert_and_backward(values, again, coefficients, grads, coupling, True)
        results.append((*forward, *backward, back, log_det, again, *both))
    for far, near in zip(*results, strict=True):
        torch.testing.assert_close(far, near)


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]  # Triton's language
    b_ptr, p_ptr, mask_ptr, first, B, P, BLOCK_COLUMNS: tl.constexpr
):
    b, p, mask = tiles.columns(first + tl.program_id(0), B, P, BLOCK_COLUMNS, False)
    q = tl.arange(0, BLOCK_COLUMNS)[None, :]
    tl.store(b_ptr + q, b)
    tl.store(p_ptr + q, p)
    tl.store(mask_ptr + q, mask)


@pytest.mark.parametrize("sample", [0, 1])
def test_columns_at_the_end_of_the_largest_sample(sample: int) -> None:
    pixels, block = plan.MAX_SAMPLE, 1024
    b, p, mask = (torch.zeros(block, dtype=torch.int64) for _ in range(3))
    last = (sample + 1) * (2**31 // block) - 1
    _columns_kernel[(1,)](b, p, mask, last, 2, pixels, block, enable_fp_fusion=True)
    assert (b == sample).all()
    assert torch.equal(p[:-1], torch.arange(pixels - block + 1, pixels))
    assert mask.tolist() == [1] * (block - 1) + [0]  # the last column is one past the end


def test_coupling_parity_of_global_parameter_shapes() -> None:
    x, a, coupling = make((2, 7, 4, 5))
    coupling = coupling._replace(
        global_scale=coupling.global_scale.view(1, 7, 1, 1),
        global_offset=coupling.global_offset.view(1, 7, 1, 1),
    )
    grads = engine.backward(x, a, OutputGrads(torch.randn_like(x), None), coupling, True)
    assert grads.global_scale.shape == grads.global_offset.shape == (1, 7, 1, 1)


@shapes((2, 7, 4, 5), (5, 7))
def test_coupling_without_a_permutation(shape: tuple[int, ...]) -> None:
    x, a, coupling = make(shape)
    identity = torch.arange(shape[1])
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    results = []
    for index in (identity, None):
        permuted = coupling._replace(perm=index, inv=index)
        forward = engine.forward(x, a, permuted)
        backward = engine.backward(x, a, grads, permuted, True)
        results.append([*forward, *backward, *inverse(x, a, permuted)])
    for with_index, without in zip(*results, strict=True):
        assert torch.equal(with_index, without)


@shapes((2, 7, 4, 5), (5, 7))
def test_an_unknown_activation_is_none_of_the_known_ones(shape: tuple[int, ...]) -> None:
    x, a, coupling = make(shape)
    unknown = coupling._replace(spec=coupling.spec._replace(activation="TANH"))
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))
    refused = pytest.raises((triton.CompilationError, InterpreterError))
    with refused:
        engine.forward(x, a, unknown)
    with refused:
        engine.backward(x, a, grads, unknown, True)
    with refused:
        engine.invert_passive(x, unknown)


@pytest.mark.parametrize(("samples", "stride"), [(2, 0), (2, 3), (1, 2)])
@pytest.mark.parametrize("engine", [engine, eager], ids=["kernels", "eager"])
def test_rows_that_share_a_log_determinant(engine: Engine, samples: int, stride: int) -> None:
    """A gradient per sample of three rows gives the same as the gradient repeated for each row.

    A single element is contiguous whatever its stride.
    """
    x, a, coupling = make((3 * samples, 9), a=torch.float32)
    shared = coupling._replace(rows_per_sample=3)
    dy, log_det = torch.randn(x.shape), torch.randn(4).as_strided((samples,), (stride,))
    of_samples = OutputGrads(dy, log_det), shared
    of_rows = OutputGrads(dy, log_det.repeat_interleave(3)), coupling
    back = engine.invert_passive(x, coupling)
    results = []
    for grads, rows in (of_samples, of_rows):
        with sanitize():
            backward = engine.backward(x, a, grads, rows, True)
            both = engine.invert_and_backward(x, back.clone(), a, grads, rows, True)
        results.append((*backward, *both))
    for per_sample, per_row in zip(*results, strict=True):
        torch.testing.assert_close(per_sample, per_row)
