"""The Triton kernels against plain PyTorch in float64.

pytest tests/test_kernels.py                      # on a GPU; without one compiled, and executed on
the CPU (tests/support/executor) TRITON_INTERPRET=1 pytest tests/test_kernels.py   # in Triton's
interpreter, under the memory checker of sanitizer.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow_kernels.engines import eager

pytest.importorskip("triton")

import triton
import triton.language as tl

import fastflow_kernels
from bench import smallest
from fastflow_kernels.engines.triton import coupling, launch, reduce, tiles
from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS, CouplingSpec
from tests.support import modes
from tests.support.cases import DEVICE, HARD_CASES, LAYOUTS, Case, Shape, make_block
from tests.support.coupling import (
    cast,
    check_everything,
    close,
    gradients,
    make,
    plain_fwd,
    plain_inv,
    plain_logdet,
    plain_s,
    poisoned_inverse,
    scale_of,
    shape_id,
)
from tests.support.launches import Launch
from tests.support.modes import EXECUTED, INTERPRETED, sanitize, slow_when_executed
from tests.support.parity import check_float16_range, compare, compare_fresh
from tests.support.sanitizer import StrayAccess

# numpy's: overflow to inf is meant
pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]
# A program takes about 20 ms in the interpreter, so shapes are chosen for few programs.
PLANES = ((2, 7, 4, 5), (3, 2, 3, 3), (2, 1, 2, 3), (1, 9, 7), (2, 6, 2, 4, 2))
ROWS = ((5, 7), (3, 2), (4, 1), (2, 9, 1, 1), (9, 130))
# more than one tile along the pixels, the channels, both
TILED = ((1, 3, 1100), (2, 70, 64), (3, 33, 14, 14))
# a batch beyond a grid's 65535 in y and z; rows too wide for one tile
EXTREME = ((70_000, 2), (2, 4096), (1, 4097, 1, 2))

in_the_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="is about the interpreter's memory checker"
)
not_interpreted = pytest.mark.skipif(
    INTERPRETED,
    reason="takes the interpreter long, or shows nothing there: compiled kernels run it",
)
without_a_gpu = pytest.mark.skipif(
    not (INTERPRETED or EXECUTED), reason="counts accesses, which a GPU does not tell"
)


def shortly(shapes, keep):
    """The shapes with their ids; all but those to keep are for slow runs where kernels are compiled
    for each.
    """
    return [
        pytest.param(shape, id=shape_id(shape), marks=() if shape in keep else slow_when_executed)
        for shape in shapes
    ]


@pytest.fixture(autouse=True, scope="module")
def _executor():
    with modes.kernels_run():
        yield


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        # the mode looks up which functions it serves at the first call: before sanitize() replaces
        # some of them
        torch.empty(0)
        yield


@pytest.fixture
def busy(monkeypatch):
    """Let one program be enough to keep the GPU busy, so that small inputs are walked in loops as
    large ones are.
    """
    monkeypatch.setattr(launch, "BUSY", 1)
    for name in ("FORWARD_ROWS", "BACKWARD_ROWS"):
        monkeypatch.setattr(coupling, name, getattr(launch, name)._replace(busy=1))
    launch.plan.cache_clear()
    yield
    launch.plan.cache_clear()


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", PLANES + ROWS, ids=shape_id)
def test_coupling_parity(shape):
    check_everything(make(shape))


@pytest.mark.parametrize("shape", shortly(PLANES + ROWS, keep=(PLANES[0], PLANES[2], *ROWS[::2])))
def test_coupling_parity_of_gin(shape):
    check_everything(make(shape, gin=True))


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", shortly(PLANES + ROWS, keep=(PLANES[0], ROWS[-1])))
def test_coupling_parity_in_float64(shape, gin):
    check_everything(make(shape, gin=gin, x=torch.float64))


@pytest.mark.parametrize("shape", TILED, ids=shape_id)
def test_coupling_parity_of_many_tiles(shape):
    check_everything(make(shape))


@not_interpreted
@pytest.mark.parametrize("shape", EXTREME, ids=shape_id)
def test_coupling_parity_of_extreme_sizes(shape):
    check_everything(make(shape))


@pytest.mark.parametrize(
    "shape", [(2, 70, 64), pytest.param((1, 3, 80, 1024), marks=not_interpreted)], ids=shape_id
)
def test_coupling_gin_parity_of_many_tiles(shape):
    """In the second each program of the sums walks more than one tile."""
    check_everything(make(shape, gin=True))


@not_interpreted
def test_log_determinant_of_many_programs():
    """The sum over more of them than one turn of the loop takes."""
    x, a, *rest, spec = make((1, 3, 260, 1024))
    logdet = coupling.coupling_fwd(x, a, *rest, spec, True)[1]
    truth = plain_logdet(plain_s(a.double(), spec), x, rest[0].double(), spec)
    terms = (
        plain_s(a, spec).abs().sum() + x[0, 0].numel() * scale_of(rest[0], spec).log().abs().sum()
    )
    close(logdet, truth, plain_logdet(plain_s(a, spec), x, rest[0], spec), "logdet", terms.item())


@pytest.mark.parametrize(
    "gin", [False, pytest.param(True, marks=slow_when_executed)], ids=["affine", "gin"]
)
@pytest.mark.parametrize("shape", [(7, 6, 5, 2), (131, 300), (70, 9)], ids=shape_id)
def test_coupling_parity_in_loops(shape, gin, busy):
    check_everything(make(shape, gin=gin))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
def test_coupling_parity_of_activations(shape, activation, dialect):
    check_everything(make(shape, activation, dialect))


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
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
def test_coupling_parity_of_dtypes(shape, dtypes):
    x, a, g = dtypes
    check_everything(make(shape, x=x, a=a, g=g))


def test_coupling_parity_with_a_row_beyond_the_registers(monkeypatch):
    monkeypatch.setattr(launch, "MAX_ROW_BYTES", 16)  # rows then count as planes of one pixel
    check_everything(make((5, 9)))
    check_everything(make((5, 9), gin=True))


@pytest.mark.parametrize("shape", [(3, 7, 4, 5), (5, 8)], ids=shape_id)
def test_coupling_parity_of_layouts(shape):
    x, a, *rest = make(shape)
    sliced = torch.randn(2 * shape[0], *shape[1:])[::2]
    check_everything((sliced, a, *rest))
    wider = torch.randn(shape[0], shape[1] + 3, *shape[2:])
    check_everything((wider[:, 2:-1], a[:1].expand_as(a), *rest))
    check_everything((x, torch.randn(shape[0], a.shape[1] + 1, *shape[2:])[:, : a.shape[1]], *rest))
    dy = torch.randn(1, *[1] * (len(shape) - 1)).expand(shape)
    check_everything((x, a, *rest), dy=dy, dlogdet=torch.ones(1).expand(shape[0]))


def misaligned(t):
    """The same values at an address that 16 does not divide."""
    return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)


@not_interpreted
@pytest.mark.parametrize(
    "gin", [False, pytest.param(True, marks=slow_when_executed)], ids=["affine", "gin"]
)
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (5, 8)], ids=shape_id)
def test_coupling_parity_of_misaligned_tensors(shape, gin):
    """x, then a, then all others, after a call with aligned tensors has prepared the launches."""
    x, a, *others, spec = make(shape, gin=gin)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    check_everything((x, a, *others, spec), dy, dlogdet)
    check_everything((misaligned(x), a, *others, spec), dy, dlogdet)
    check_everything((x, misaligned(a), *others, spec), dy, dlogdet)
    check_everything((x, a, *map(misaligned, others), spec), misaligned(dy), misaligned(dlogdet))


@pytest.mark.parametrize(
    "gin", [False, pytest.param(True, marks=slow_when_executed)], ids=["affine", "gin"]
)
@pytest.mark.parametrize("shape", [(2, 4, 16), (2, 16)], ids=shape_id)
def test_coupling_of_samples_far_apart(shape, gin):
    """2**31 elements, as in a slice of a large tensor: no product of the stride fits in 32 bits.
    Only a few of them are touched.
    """
    x, a, *rest = make(shape, gin=gin, x=torch.float16)
    size, stride = x[0].numel(), 2**31
    memory = torch.empty(stride + 2 * size, dtype=torch.float16)
    far_x, far_a = (
        memory.as_strided(shape, (stride, *x.stride()[1:]), k * size).copy_(t)
        for k, t in enumerate((x, a))
    )
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    results = []
    for inputs in ((far_x, far_a, *rest), (x, a, *rest)):
        with sanitize():
            forward, backward = (
                coupling.coupling_fwd(*inputs, True),
                coupling.coupling_bwd(dy, dlogdet, *inputs, True),
            )
            back, logdet = poisoned_inverse(inputs[0], inputs)
            undone = back.clone()
            both = coupling.coupling_inv_bwd(inputs[0], undone, dy, dlogdet, *inputs[1:], True)
        results.append((*forward, *backward, back, logdet, undone, *both))
    for far, near in zip(*results, strict=True):
        torch.testing.assert_close(far, near)


@triton.jit
def _columns_kernel(b_ptr, p_ptr, exists_ptr, first, B, P, BLOCK_Q: tl.constexpr):
    b, p, exists = tiles.columns(first + tl.program_id(0), B, P, BLOCK_Q, False)
    q = tl.arange(0, BLOCK_Q)[None, :]
    tl.store(b_ptr + q, b)
    tl.store(p_ptr + q, p)
    tl.store(exists_ptr + q, exists)


@pytest.mark.parametrize("sample", [0, 1])
def test_columns_at_the_end_of_the_largest_sample(sample):
    pixels, block = launch.MAX_SAMPLE, 1024
    b, p, exists = (torch.zeros(block, dtype=torch.int64) for _ in range(3))
    _columns_kernel[(1,)](
        b, p, exists, (sample + 1) * (2**31 // block) - 1, 2, pixels, block, enable_fp_fusion=True
    )
    assert (b == sample).all()
    assert torch.equal(p[:-1], torch.arange(pixels - block + 1, pixels))
    assert exists.tolist() == [1] * (block - 1) + [0]  # the last column is one past the end


def test_coupling_parity_of_global_parameter_shapes():
    x, a, g, offset, *rest = make((2, 7, 4, 5))
    check = coupling.coupling_bwd(
        torch.randn_like(x), None, x, a, g.view(1, 7, 1, 1), offset.view(1, 7, 1, 1), *rest, True
    )
    assert check[2].shape == check[3].shape == (1, 7, 1, 1)


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
def test_coupling_without_a_permutation(shape):
    x, a, g, offset, _, _, spec = make(shape)
    identity = torch.arange(shape[1])
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    results = []
    for index in (identity, None):
        args = (x, a, g, offset, index, index, spec)
        results.append(
            [
                *coupling.coupling_fwd(*args, True),
                *coupling.coupling_bwd(dy, dlogdet, *args, True),
                *poisoned_inverse(x, args),
            ]
        )
    for with_index, without in zip(*results, strict=True):
        assert torch.equal(with_index, without)


@pytest.mark.parametrize(("samples", "stride"), [(2, 0), (2, 3), (1, 2)])
@pytest.mark.parametrize("operations", [coupling, eager], ids=["kernels", "eager"])
def test_rows_that_share_a_log_determinant(operations, samples, stride):
    """A gradient for each sample of three rows is what it is repeated for each row; one element is
    contiguous whatever its stride.
    """
    rows = 3 * samples
    x, a, *rest = make((rows, 9), a=torch.float32)
    dy, dlogdet = torch.randn(rows, 9), torch.randn(4).as_strided((samples,), (stride,))
    back = operations.coupling_inv_passive(x, *rest)
    for function, arguments in (
        (operations.coupling_bwd, (x, a)),
        (operations.coupling_inv_bwd, None),
    ):
        found = []
        for gradient in (dlogdet, dlogdet.repeat_interleave(3)):
            given = (dy, gradient, *arguments) if arguments else (x, back.clone(), dy, gradient, a)
            with sanitize():
                found.append(function(*given, *rest, True))
        for per_sample, per_row in zip(*found, strict=True):
            torch.testing.assert_close(per_sample, per_row)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7), (2, 1, 3)], ids=shape_id)
def test_coupling_without_log_determinant_or_parameters(shape, gin):
    inputs = make(shape, gin=gin)
    x, a, g, offset, perm, _, spec = inputs
    with sanitize() as launches:
        y, logdet = coupling.coupling_fwd(*inputs, False)
        dy = torch.randn_like(y)
        dx, da, dg, doffset = coupling.coupling_bwd(dy, None, *inputs, False)
        x_back, logdet_back = poisoned_inverse(y, inputs, jac=False)
    assert logdet is logdet_back is dg is doffset is None
    assert not {"_logdet_kernel", "_params_bwd_kernel"} & {run.kernel for run in launches}
    stored = {name for run in launches for name in run.stored if run.kernel != "_gin_sums_kernel"}
    assert stored <= {"y_ptr", "dx_ptr", "da_ptr", "x_ptr"}
    assert torch.equal(y, coupling.coupling_fwd(*inputs, True)[0])
    truth = gradients(x, a, g, offset, perm, spec, dy, None, torch.float64)
    baseline = gradients(x, a, g, offset, perm, spec, dy, None, torch.float32)
    close(dx, truth[0], baseline[0], "dx")
    close(da, truth[1], baseline[1], "da")
    with sanitize():
        with_params = coupling.coupling_bwd(dy, None, *inputs, True)
    assert torch.equal(with_params[0], dx)
    assert torch.equal(with_params[1], da)
    if not gin:
        close(with_params[2], truth[2], baseline[2], "dg")
    close(with_params[3], truth[3], baseline[3], "doffset")


def test_coupling_of_clamp_zero_adds():
    x, a, g, offset, perm, inv, _ = make((2, 6, 3))
    check_everything((x, 1e4 * a, g, offset, perm, inv, CouplingSpec(0.0, 0.1, "EXP", False)))


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_coupling_of_huge_values_stays_finite(shape, dialect):
    x, a, *rest = make(shape, dialect=dialect)
    inputs = (1e20 * x, 1e30 * a, *rest)
    y, logdet = coupling.coupling_fwd(*inputs, True)
    grads = coupling.coupling_bwd(torch.randn_like(y), None, *inputs, False)
    for t in (y, logdet, *grads[:2]):
        assert t.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_coupling_of_scales_of_every_size(activation):
    x, a, _, offset, *rest = make((2, 40, 3), activation)
    check_everything((x, a, torch.linspace(-60, 60, 40), offset, *rest))


@pytest.mark.parametrize("shape", [(2, 7, 3), (3, 7)], ids=shape_id)
def test_log_determinant_of_gin_is_nan_where_a_coefficient_is(shape):
    x, a, *rest = make(shape, gin=True)
    a[1, 0] = torch.nan
    y, logdet = coupling.coupling_fwd(x, a, *rest, True)
    for t in (logdet, poisoned_inverse(torch.randn_like(x), (x, a, *rest))[1]):
        assert t.isnan().tolist() == [k == 1 for k in range(shape[0])]


@pytest.mark.parametrize("shape", [(2, 8, 3), (6, 8)], ids=shape_id)
def test_coupling_of_scales_near_the_largest(shape):
    """exp(g) up to 3.3e38. The values are small, so that results are finite."""
    x, a, _, offset, *rest = make(shape, "EXP", x=torch.float32)
    g = torch.linspace(87.34, 88.7, shape[1])
    check_everything((1e-3 * x, 1e-3 * a, g, offset, *rest))


@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 4)], ids=shape_id)
def test_sigmoid_scales_that_torch_takes_for_zero(shape):
    """10 / (1 + exp(2 - g)) overflows to 0 there, and a baseline in float32 has nothing to say."""
    x, a, _, offset, perm, inv, spec = make(shape, "SIGMOID")
    g, offset = torch.tensor([-86.0, -86.8, -90.0, -100.0]), torch.zeros_like(offset)
    y, logdet = coupling.coupling_fwd(1e3 * x, 0 * a, g, offset, perm, inv, spec, True)
    truth, expected = plain_fwd(
        1e3 * x.double(), 0 * a.double(), g.double(), offset.double(), perm, spec
    )
    assert (y - truth).abs().max() < 4e3 * 10 * 2.0**-149  # the rounding of a subnormal exponential
    torch.testing.assert_close(logdet, expected.float())
    assert poisoned_inverse(y, (x, 0 * a, g, offset, perm, inv, spec))[0].isfinite().all()


@pytest.mark.parametrize("activation", ["EXP", "SOFTPLUS"])
@pytest.mark.parametrize("shape", [(2, 8, 3), (6, 8)], ids=shape_id)
def test_coupling_of_subnormal_scales(shape, activation):
    """1 / scale is beyond the range there, (y - offset) / scale is not where y - offset is as
    small.
    """
    _, a, _, offset, perm, inv, spec = make(shape, activation)
    g = torch.linspace(-86.0, -100.0, shape[1]) * (2 if activation == "SOFTPLUS" else 1)
    inputs = (1e3 * torch.randn(shape), 1e-3 * a, g, torch.zeros_like(offset), perm, inv, spec)
    wide = cast(inputs[:4], torch.float64)
    y, logdet = coupling.coupling_fwd(*inputs, True)
    assert y.count_nonzero() > y.numel() // 2
    truth, baseline = plain_fwd(*wide, perm, spec), plain_fwd(*inputs[:4], perm, spec)
    close(y, truth[0], baseline[0], "y")
    close(logdet, truth[1], baseline[1], "logdet")
    y = y + 1e-38
    back, minus = poisoned_inverse(y, inputs)
    truth, baseline = (
        plain_inv(y.double(), *wide[1:], inv, spec),
        plain_inv(y, *inputs[1:4], inv, spec),
    )
    assert baseline[0].isfinite().sum() > y.numel() // 2
    close(minus, truth[1], baseline[1], "inverse logdet")
    undone = coupling.coupling_inv_passive(y, *inputs[2:])
    coupling.coupling_inv_bwd(y, undone, torch.randn(shape), None, *inputs[1:], False)
    for c in range(shape[1]):  # by itself: the baseline's error grows with 1 / scale
        for name, x in (("x", back), ("x undone", undone)):
            close(x[:, c], truth[0][:, c], baseline[0][:, c], f"{name}, channel {c}")


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="fp64", marks=slow_when_executed),
        pytest.param(torch.float32, id="fp32"),
    ],
)
@pytest.mark.parametrize("shape", [(3, 6, 4), (7, 6)], ids=shape_id)
def test_coupling_passes_nan_and_inf_through(shape, dtype):
    x, a, *rest = make(shape, x=dtype)
    x.view(-1)[[0, 5]] = torch.tensor([torch.nan, torch.inf], dtype=dtype)
    x[-1, -1] = -torch.inf
    a[0, :3].view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    check_everything((x, a, *rest))


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("shape", [(1, 8, 3), (1, 64)], ids=shape_id)
def test_coupling_small_arguments_keep_their_relative_accuracy(shape, size):
    """2 * sigmoid(2z) - 1 in place of tanh would fail here."""
    x, a, g, offset, perm, inv, spec = make(shape, "EXP")
    g = torch.zeros_like(g)  # log(exp(0)) = 0: the log-determinant is the sum of s alone
    a = size * a.abs()
    logdet = coupling.coupling_fwd(x, a, g, offset, perm, inv, spec, True)[1]
    close(
        logdet,
        plain_logdet(plain_s(a.double(), spec), x, g.double(), spec),
        plain_logdet(plain_s(a, spec), x, g, spec),
        "logdet",
    )


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (6, 7)], ids=shape_id)
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
def test_coupling_repeats_bit_for_bit(shape, gin):
    inputs = make(shape, gin=gin)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    runs = [
        [
            *coupling.coupling_fwd(*inputs, True),
            *coupling.coupling_bwd(dy, dlogdet, *inputs, True),
            *poisoned_inverse(dy, inputs),
        ]
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert first is second is None or torch.equal(first, second)


# --- traffic --------------------------------------------------------------------------------------

FEW = {"g_ptr", "offset_ptr", "inv_ptr", "perm_ptr", "dlogdet_ptr", "sums_ptr"}


def traffic(launches: list[Launch]) -> float:
    """Bytes moved. What has a value per channel or sample is counted once a launch: a cache serves
    later reads of these few kilobytes.
    """
    return sum(
        sum(n for name, n in run.loaded.items() if name not in FEW)
        + sum(n for name, n in run.distinct.items() if name in FEW)
        + sum(run.stored.values())
        for run in launches
    )


@without_a_gpu
@slow_when_executed
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 16, 32, 32), torch.float32),
        ((1, 32, 28, 28), torch.bfloat16),
        ((128, 512), torch.float32),
        ((256, 100), torch.bfloat16),
    ],
    ids=["B2-C16-32x32-fp32", "B1-C32-28x28-bf16", "B128-C512-fp32", "B256-C100-bf16"],
)
def test_coupling_moves_little_more_than_the_minimum(
    shape, dtype, gin, reverse, busy, record_property
):
    inputs = make(shape, gin=gin, reverse=reverse, x=dtype)
    n = inputs[0].numel() * inputs[0].element_size()
    with sanitize() as forward:
        y, _ = coupling.coupling_fwd(*inputs, True)
    with sanitize() as backward:
        coupling.coupling_bwd(y, torch.randn(shape[0]), *inputs, True)
    with sanitize() as inverse:
        poisoned_inverse(y, inputs)
    # GIN: a_s once more for its mean; backward without x1 and a_t, which only the scale's gradient
    # needs, but with a_s, x2, dy2 twice
    minimum = (
        {"forward": 3.5, "backward": 5.5, "inverse": 3.5}
        if gin
        else {"forward": 3.0, "backward": 5.0, "inverse": 3.0}
    )
    for name, launches in (("forward", forward), ("backward", backward), ("inverse", inverse)):
        ratio = traffic(launches) / n
        record_property(name, round(ratio, 3))
        print(f"{shape_id(shape)} {dtype} {name}: {ratio:.3f} N, minimum {minimum[name]} N")
        assert ratio <= 1.05 * minimum[name], name


# --- the memory checker itself --------------------------------------------------------------------


@without_a_gpu
@slow_when_executed
def test_the_case_for_compute_sanitizer_runs_every_kernel():
    with sanitize() as launches:
        smallest.run("cpu")
    defined = {
        name for module in (coupling, reduce) for name in vars(module) if name.endswith("_kernel")
    }
    assert {run.kernel for run in launches} == defined


@in_the_interpreter
@pytest.mark.parametrize(
    ("index", "message"), [(5, "stored twice"), (40, "out of bounds"), (-9, "out of bounds")]
)
def test_sanitizer_catches_a_bad_index(index, message):
    x, a, g, offset, perm, inv, spec = make((2, 7, 3))
    inv = torch.arange(7)
    inv[0] = index
    # the interpreter wraps what a kernel raises in its own exception
    with sanitize(), pytest.raises((StrayAccess, Exception), match=message):
        coupling.coupling_fwd(x, a, g, offset, perm, inv, spec, True)


def test_sanitizer_poisons_fresh_memory():
    with sanitize():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(2).isnan().all()
    assert torch.empty.__name__ == "empty"


# --- launch.py ------------------------------------------------------------------------------------


def test_uncovered_names_the_reason():
    x = torch.randn(2, 4, 3, 3)
    assert launch.uncovered(x) is None
    assert launch.uncovered(x[:, :3], x[:1].expand(2, 4, 3, 3)) is None
    assert "contiguous" in launch.uncovered(x.to(memory_format=torch.channels_last))
    assert "contiguous" in launch.uncovered(x, x.transpose(2, 3))
    assert "dtype" in launch.uncovered(x.to(torch.complex64))
    assert "dimensions" in launch.uncovered(x.view(-1))
    assert "32-bit" in launch.uncovered(torch.empty(2, 2**16, 2**15, device="meta"))
    assert "a batch of 2147483648 samples" in launch.uncovered(
        torch.empty(2**31, 2, 2, device="meta")
    )
    # rows: a tile holds several
    assert launch.uncovered(torch.empty(2**31, 2, device="meta")) is None
    assert launch.uncovered(torch.empty(2, 4, 1, 1).to(memory_format=torch.channels_last)) is None


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    "rows",
    [None, launch.FORWARD_ROWS, launch.BACKWARD_ROWS],
    ids=["planes", "forward rows", "backward rows"],
)
@pytest.mark.parametrize("batch", [1, 7, 4096, 100_000])
def test_plan_covers_everything_once(batch, rows, itemsize):
    for channels in (1, 2, 33, 512):
        for pixels in (1,) if rows else (1, 2, 49, 196, 784, 4096, 12_345):
            for columns in (1, 64):
                cut = launch.plan(channels, batch, pixels, itemsize, rows, columns)
                assert cut.tiles * cut.block_c >= channels > (cut.tiles - 1) * cut.block_c
                assert cut.groups * cut.loops >= cut.blocks > (cut.groups - 1) * cut.loops
                if rows:
                    assert cut.tiles == 1
                    assert cut.blocks * cut.block_q >= batch > (cut.blocks - 1) * cut.block_q
                else:
                    assert cut.blocks % batch == 0
                    assert (
                        (cut.blocks // batch) * cut.block_q
                        >= pixels
                        > (cut.blocks // batch - 1) * cut.block_q
                    )
                for block in (cut.block_c, cut.block_q, cut.loops, cut.warps):
                    assert block & (block - 1) == 0


def test_alignment_is_the_common_power_of_two():
    assert launch.alignment(196, 0) == 4
    assert launch.alignment(4096, 64 * 4096) == 16
    assert launch.alignment(7, 4096) == 1


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize(
    "shape", shortly(PLANES + ROWS + TILED[1:], keep=(PLANES[0], ROWS[0], ROWS[-1], TILED[1]))
)
def test_reverse_permutation(shape, gin):
    """x read, and its gradient and the inverse written, through the index as well."""
    torch.manual_seed(7)
    check_everything(make(shape, gin=gin, reverse=True))


class _Gathered(TorchDispatchMode):
    """Collects the sizes of what index operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "index" in str(function) or "gather" in str(function):
            self.sizes.append(
                tuple(args[3].shape if "index_add" in str(function) else result.shape)
            )
        return result


@pytest.mark.parametrize("shape", [(3, 7, 4, 5), (6, 10)], ids=shape_id)
def test_reverse_permutation_takes_no_pass_of_its_own(shape):
    """Gathered is what the subnet gets, the passive half, and its gradient is added back; never x,
    y or their gradients.
    """
    net = torch.nn.Conv2d if len(shape) > 2 else torch.nn.Linear
    more = (1,) if len(shape) > 2 else ()
    block = fastflow_kernels.AllInOneBlock(
        [shape[1:]],
        subnet_constructor=lambda i, o: net(i, o, *more),
        reverse_permutation=True,
        backend="triton",
        dialect="freia",
    )
    x = torch.randn(shape, requires_grad=True)
    half = (shape[0], shape[1] - shape[1] // 2, *shape[2:])
    with _Gathered() as gathered:
        (y,), logdet = block([x])
        assert gathered.sizes == [half]
        (y.sum() + logdet.sum()).backward()
        assert gathered.sizes == [half, half]
        with torch.no_grad():
            block([y], rev=True)
    assert gathered.sizes == [half, half, half]


@pytest.mark.parametrize("options", [{}, {"reverse_permutation": True}], ids=["", "reverse"])
def test_second_gradients_on_the_triton_backend(options):
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(5, 3)],
        subnet_constructor=lambda i, o: torch.nn.Conv1d(i, o, 1),
        dialect="freia",
        backend="triton",
        **options,
    ).double()
    results = []
    for backend in ("triton", "eager"):
        block.backend = backend
        torch.manual_seed(1)
        x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
        (y,), logdet = block([x])
        leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
        (dx,) = torch.autograd.grad(y.square().sum() + logdet.sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True))
    assert results[0][0].abs().max() > 0
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_float16_overflows_only_where_a_result_does_on_the_triton_backend():
    check_float16_range("triton")


BLOCK_CASES = HARD_CASES[::6]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=slow_when_executed if i % 2 else ())
        for i, case in enumerate(BLOCK_CASES)
    ],
)
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_block_on_the_triton_backend(case: Case, rev: bool) -> None:
    """The kernels through the module: dispatch, autograd and the subnet between the two halves of
    the inverse.
    """
    compare(case, torch.float32, rev, grad=not rev, backend="triton")


@pytest.mark.parametrize("shape", [Shape(3, 7, (3, 5)), Shape(4, 10)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "soft",
        "gin-soft",
        "hh1",
        *(
            pytest.param(name, marks=slow_when_executed)
            for name in ("soft-rev-exp", "hh3-rev-cond", "hh2-soft-sigmoid", "gin-hh2")
        ),
    ],
)
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_products_after_the_kernels(shape: Shape, name: str, rev: bool) -> None:
    """Soft and Householder permutations: the kernels without an index, then products."""
    compare(Case(shape, name), torch.float32, rev, grad=not rev, backend="triton")


@pytest.mark.parametrize(
    "case",
    [Case(Shape(2, 7, (3, 5)), name) for name in ("hard", "rev", "cond", "soft", "gin")],
    ids=str,
)
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_channels_last_on_the_triton_backend(case: Case, rev: bool) -> None:
    """On rows; GIN on a contiguous copy."""
    compare(case, torch.float32, rev, grad=not rev, backend="triton", layout="channels_last")


@slow_when_executed
@pytest.mark.parametrize(
    "shape", [Shape(2, 8, (3, 5)), Shape(1, 2, (3, 5)), Shape(1, 5, (2, 3, 2))], ids=str
)
@pytest.mark.parametrize("name", ["hard", "gin", "gin-rev-cond"])
@pytest.mark.parametrize("condition", ["contiguous", "channels_last"])
def test_a_subnet_is_given_the_layout_of_the_input(shape: Shape, name: str, condition: str) -> None:
    """As on the eager path. GIN's copy for the kernels does not change it: a convolution would
    round otherwise than the stock block's.
    """
    case = Case(shape, name)
    x = LAYOUTS["channels_last"](torch.randn(shape.full))
    c = [LAYOUTS[condition](torch.randn(shape.batch, *dims)) for dims in case.dims_c]
    given = []

    def subnet(channels_in: int, channels_out: int) -> torch.nn.Module:
        net = (torch.nn.Conv2d, torch.nn.Conv3d)[case.rank - 2](
            channels_in, channels_out, 3, padding=1
        )
        net.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].stride()))
        return net

    found = {}
    for backend in ("eager", "triton"):
        given.clear()
        block = fastflow_kernels.AllInOneBlock(
            case.dims_in, case.dims_c, subnet, **case.options, backend=backend
        )
        block([x.requires_grad_()], c)[0][0].sum().backward()
        with torch.no_grad():
            block([x], c, rev=True)
        if not c:
            chain = fastflow_kernels.ReversibleSequence(*case.dims_in[0])
            chain.append(block)
            chain(x)[0].sum().backward()
        # whether the channels of a pixel lie together
        found[backend] = [strides[1] == 1 for strides in given]
    assert found["triton"] == found["eager"]
    assert len(given) == (2 if c else 4)
    assert c or all(found["eager"])


class Doubling(torch.nn.Module):
    """Writes to its input, further in than one can see from outside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x.mul_(2), x), 1)


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_subnet_that_writes_to_its_input_is_noticed(gin: bool, rev: bool, layout: str) -> None:
    block = fastflow_kernels.AllInOneBlock(
        [(8, 3, 5)], subnet_constructor=lambda i, o: Doubling(), gin_block=gin, backend="triton"
    )
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="the subnet changed its input in place"),
    ):
        block([LAYOUTS[layout](torch.randn(2, 8, 3, 5))], rev=rev)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_any_layout_on_the_triton_backend(layout: str, rev: bool) -> None:
    compare(
        Case(Shape(2, 7, (3, 5)), "rev"),
        torch.float32,
        rev,
        grad=not rev,
        backend="triton",
        layout=layout,
    )


@slow_when_executed
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(64, 8, 8), (33, 5, 3), (64,)], ids=str)
def test_log_det_of_a_fresh_block_on_the_triton_backend(
    activation: str, shape: tuple[int, ...]
) -> None:
    compare_fresh(activation, shape, "triton")


def test_triton_backend_raises_where_it_cannot_be_honoured() -> None:
    block = make_block(
        fastflow_kernels.AllInOneBlock,
        Case(Shape(2, 6, (4, 4)), "hard"),
        torch.float32,
        backend="triton",
    )
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(RuntimeError, match="traced, transformed or compiled"):
        torch.func.vmap(lambda x: block([x])[0][0])(x[None])
    with pytest.raises(RuntimeError, match="no gradient of the inverse"):
        block([x], rev=True)
    # the subnet's layout is no reason
    block.subnet.register_forward_hook(lambda _, __, a: a.to(memory_format=torch.channels_last))
    expected = copy.deepcopy(block)
    expected.backend = "eager"
    torch.testing.assert_close(block([x])[0][0], expected([x])[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permute_soft": True},
        {"learned_householder_permutation": 1},
        {"reverse_permutation": True},
    ],
    ids=str,
)
def test_one_channels_last_sample_and_a_subnet_that_is_not(options: dict) -> None:
    """A transposed view of one sample has the shape of rows, and not their layout."""
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(4, 3, 5)],
        subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 1),
        backend="triton",
        **options,
    )
    block = block.double()
    block.subnet.register_forward_hook(lambda _, __, a: a.contiguous())
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (y,), logdet = block([x])
        (back,), minus = block([y], rev=True)
    assert (back - x).abs().max() < 1e-5  # the rotation was drawn in float32
    assert (logdet + minus).abs().max() < 1e-5  # the rotation was drawn in float32


@pytest.mark.parametrize(
    "options", [{}, {"permute_soft": True}, {"learned_householder_permutation": 1}], ids=str
)
def test_channels_last_gin_with_reverse_permutation_on_the_triton_backend(options: dict) -> None:
    """The contiguous copy that the kernels need stays one when the permutation is undone ahead of
    them.
    """
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(4, 3, 5)],
        subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 1),
        gin_block=True,
        reverse_permutation=True,
        backend="triton",
        **options,
    ).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("triton", "eager"):
        block.backend = backend
        leaf = x.clone().requires_grad_()
        (y,), _ = block([leaf])
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sin().sum().backward()
        with torch.no_grad():
            (back,), _ = block([y], rev=True)
        results.append((y, leaf.grad, back))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "gin", [False, pytest.param(True, marks=slow_when_executed)], ids=["affine", "gin"]
)
@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
def test_a_reversible_chain_runs_the_kernels(shape, gin):
    case = Case(Shape(shape[0], shape[1], shape[2:]), "gin" if gin else "hard")
    chain = fastflow_kernels.ReversibleSequence(*shape[1:])
    for seed in range(3):
        chain.append(
            make_block(fastflow_kernels.AllInOneBlock, case, torch.float32, seed, backend="triton")
        )
    x = torch.randn(shape, requires_grad=True)
    with sanitize() as launches:
        z, log_det = chain(x)
        (z**3).sum().sub(log_det.sum()).backward()
    expected_kernel = "_coupling_bwd_kernel" if gin else "_coupling_inv_bwd_kernel"
    assert not INTERPRETED or sum(run.kernel == expected_kernel for run in launches) == 3
    assert chain.drift[0] < 1e-5
    exact = copy.deepcopy(chain).double()
    for block in exact:
        block.backend = "eager"
    wide = x.detach().double().requires_grad_()
    z, log_det = wide, 0.0
    for block in exact:
        (z,), j = block([z])
        log_det = log_det + j
    (z**3).sum().sub(log_det.sum()).backward()
    pairs = [
        (x.grad, wide.grad),
        *((p.grad, q.grad) for p, q in zip(chain.parameters(), exact.parameters(), strict=True)),
    ]
    for mine, truth in pairs:
        if mine is not None and truth is not None:
            assert (mine - truth).norm() <= 1e-4 * truth.norm().clamp(min=1e-3)
