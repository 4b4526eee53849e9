"""The Triton kernels against plain PyTorch in float64: on a GPU, or in Triton's interpreter under the memory checker of sanitizer.py.

pytest tests/test_kernels.py                      # where there is a GPU
TRITON_INTERPRET=1 pytest tests/test_kernels.py   # anywhere
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow_kernels import dispatch, eager

if not dispatch.interpreted() and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or a process of its own with TRITON_INTERPRET=1 (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

import fastflow_kernels
from bench import smallest
from fastflow_kernels.kernels import coupling, launch, reduce, tiles
from fastflow_kernels.spec import ACTIVATIONS, DIALECTS, CouplingSpec
from tests.cases import DEVICE, HARD_CASES, LAYOUTS, Case, Shape, ids, make_block
from tests.compare import assert_close
from tests.sanitizer import Launch, StrayAccess, sanitize
from tests.test_inputs import check_float16_range
from tests.test_parity import compare, compare_fresh

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's: overflow to inf is meant
# A program takes about 20 ms in the interpreter, so shapes are chosen for few programs.
PLANES = ((2, 7, 4, 5), (3, 2, 3, 3), (2, 1, 2, 3), (1, 9, 7), (2, 6, 2, 4, 2))
ROWS = ((5, 7), (3, 2), (4, 1), (2, 9, 1, 1), (9, 130))
TILED = ((1, 3, 1100), (2, 70, 64), (3, 33, 14, 14))  # more than one tile along the pixels, the channels, both
EXTREME = ((70_000, 2), (2, 4096), (1, 4097, 1, 2))  # a batch beyond a grid's 65535 in y and z; rows too wide for one tile

INTERPRETED = dispatch.interpreted()
LOW = {torch.bfloat16: 2.0**-7, torch.float16: 0.0} if INTERPRETED else {}
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter sees")


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        torch.empty(0)  # the mode looks up which functions it serves at the first call: before sanitize() replaces some of them
        yield


# --- plain PyTorch ------------------------------------------------------------------------------------------------------------------


def scale_of(g, spec):
    if spec.gin:
        return torch.ones_like(g)
    if spec.activation == "SIGMOID":
        return 10 * torch.sigmoid(g - 2)
    return 0.1 * F.softplus(g, beta=0.5) if spec.activation == "SOFTPLUS" else g.exp()


def plain_s(a, spec):
    s = spec.clamp * torch.tanh(spec.tanh_scale * a[:, : a.shape[1] // 2])
    return s - s.mean(tuple(range(1, s.dim())), keepdim=True) if spec.gin and s.numel() else s


def plain_logdet(s, x, g, spec):
    if spec.gin:
        return s.new_zeros(x.shape[0])
    return s.flatten(1).sum(1) + x[0, 0].numel() * scale_of(g, spec).log().sum()


def plain_fwd(x, a, g, offset, perm, spec):
    c2 = a.shape[1] // 2
    c1 = x.shape[1] - c2
    view = (1, -1) + (1,) * (x.dim() - 2)
    x = x[:, perm.argsort()] if spec.reverse else x
    s = plain_s(a, spec)
    u = torch.cat((x[:, :c1], x[:, c1:] * s.exp() + 0.1 * a[:, c2:]), 1)
    v = u * scale_of(g, spec).view(view) + offset.view(view)
    return v[:, perm], plain_logdet(s, x, g, spec)


def plain_inv(y, a, g, offset, inv, spec):
    c2 = a.shape[1] // 2
    c1 = y.shape[1] - c2
    view = (1, -1) + (1,) * (y.dim() - 2)
    s = plain_s(a, spec)
    u = (y[:, inv] - offset.view(view)) / scale_of(g, spec).view(view)
    x = torch.cat((u[:, :c1], (u[:, c1:] - 0.1 * a[:, c2:]) * (-s).exp()), 1)
    return x[:, inv.argsort()] if spec.reverse else x, -plain_logdet(s, y, g, spec)


def cast(values, dtype):
    return [v.detach().to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def gradients(x, a, g, offset, perm, spec, dy, dlogdet, dtype):
    """Autograd's gradients of the plain forward for x, a, g, offset, all cast to dtype (None: as they are)."""
    leaves = [t.detach().clone() if dtype is None else t.detach().to(dtype, copy=True) for t in (x, a, g, offset)]
    for t in leaves:
        t.requires_grad_()
    y, logdet = plain_fwd(*leaves, perm, spec)
    outputs, seeds = [y], [dy.to(y.dtype)]
    if dlogdet is not None and logdet.requires_grad:
        outputs, seeds = [y, logdet], [dy.to(y.dtype), dlogdet.to(logdet.dtype)]
    return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)


# --- comparison ---------------------------------------------------------------------------------------------------------------------


def close(actual, truth, baseline, name, magnitude=None):
    """compare.assert_close; in the interpreter with one more rounding for bfloat16.

    The interpreter truncates where a GPU rounds to nearest when it stores bfloat16. That costs up to 2^-7 of a value; so far the result
    is moved towards the truth before it is judged.
    """
    if actual is not None and actual.dtype in LOW:
        room = LOW[actual.dtype] * actual.double().abs()
        moved = actual.double() + (truth - actual.double()).clamp(-room, room)
        actual = torch.where(moved.isfinite(), moved, actual.double()).to(actual.dtype)
    assert_close(actual, truth, baseline, name, magnitude=magnitude)


def make(shape, spec_name="SOFTPLUS", dialect="anomalib", gin=False, clamp=1.9, reverse=False, x=torch.float32, a=None, g=None):
    """(x, a, g, offset, perm, inv, spec) with random values."""
    batch, channels, *spatial = shape
    spec = CouplingSpec.of(clamp, dialect, spec_name, gin)._replace(reverse=reverse)
    perm = torch.randperm(channels)
    return (
        torch.randn(shape, dtype=x),
        (5 * torch.randn(batch, channels // 2 * 2, *spatial)).to(a or x),
        (1.5 * torch.randn(channels)).to(g or x),
        torch.randn(channels).to(g or x),
        perm,
        perm.argsort(),
        spec,
    )


def poisoned_inverse(y, inputs, jac=True):
    _, a, g, offset, perm, inv, spec = inputs
    x = coupling.coupling_inv_passive(y, g, offset, perm, inv, spec)
    assert x.is_contiguous()
    passive = x[:, inv] if spec.reverse else x
    assert not passive[:, : x.shape[1] - x.shape[1] // 2].isnan().any() or y.isnan().any()
    return x, coupling.coupling_inv_active(y, x, a, g, offset, perm, inv, spec, jac)


def check_everything(inputs, dy=None, dlogdet=None):
    """Forward, backward and inverse of one set of inputs, under the memory checker, against the truth."""
    x, a, g, offset, perm, inv, spec = inputs
    kept = [t.clone() for t in (x, a, g, offset)]
    result = torch.promote_types(torch.promote_types(x.dtype, a.dtype), g.dtype)
    acc = torch.float64 if result is torch.float64 else torch.float32
    base = torch.float32 if result is torch.float64 else result  # see compare.py
    wide, narrow = cast((x, a, g, offset), torch.float64), cast((x, a, g, offset), base)
    terms = plain_s(wide[1], spec).nan_to_num().flatten(1).abs().sum(1).max() + x[0, 0].numel() * scale_of(wide[2], spec).log().abs().sum()
    terms = terms.item()  # the log-determinant is a sum that cancels: its floor is that of the terms

    with sanitize():
        y, logdet = coupling.coupling_fwd(*inputs, True)
    assert y.dtype == result
    assert y.is_contiguous()
    assert logdet.dtype == acc
    assert logdet.shape == (x.shape[0],)
    truth, baseline = plain_fwd(*wide, perm, spec), plain_fwd(*narrow, perm, spec)
    close(y, truth[0], baseline[0], "y")
    close(logdet, truth[1], baseline[1], "logdet", terms)
    if spec.gin:
        assert (logdet == 0).all()

    dy = torch.randn(y.shape).to(y.dtype) if dy is None else dy
    dlogdet = torch.randn(x.shape[0], dtype=acc) if dlogdet is None else dlogdet
    with sanitize():
        grads = coupling.coupling_bwd(dy, dlogdet, *inputs, True)
    truth = gradients(x, a, g, offset, perm, spec, dy, dlogdet, torch.float64)
    baseline = gradients(x, a, g, offset, perm, spec, dy, dlogdet, base)
    for name, t, source, true, plain in zip(("dx", "da", "dg", "doffset"), grads, (x, a, g, offset), truth, baseline, strict=True):
        if t is not None:
            assert (t.dtype, t.shape, t.is_contiguous()) == (source.dtype, source.shape, True), name
        if name == "dg" and spec.gin:
            assert t is None
        else:
            close(t, true, plain, name)

    other = torch.randn(x.shape).to(y.dtype)
    with sanitize():
        x_back, logdet = poisoned_inverse(other, inputs)
    assert x_back.dtype == torch.promote_types(other.dtype, g.dtype)
    wide, narrow = cast((other, a, g, offset), torch.float64), cast((other, a, g, offset), base)
    truth, baseline = plain_inv(*wide, inv, spec), plain_inv(*narrow, inv, spec)
    close(x_back, truth[0], baseline[0], "x")
    close(logdet, truth[1], baseline[1], "inverse logdet", terms)

    # a chain is undone in its own dtype and permutes by itself; and no y comes of coefficients that are not finite
    if result == x_back.dtype and not spec.reverse and a.isfinite().all():
        check_inverse_and_backward(other, dy, dlogdet, inputs, x_back, base)

    for before, after in zip(kept, (x, a, g, offset), strict=True):
        assert torch.equal(before, after) or before.isnan().any(), "an input was written to"


def check_inverse_and_backward(y, dy, dlogdet, inputs, x_back, base):
    """Both in one: the inverse that the two kernels give, and the gradients there."""
    _, a, g, offset, perm, inv, spec = inputs
    with sanitize():
        x = coupling.coupling_inv_passive(y, g, offset, perm, inv, spec)
        grads = coupling.coupling_inv_bwd(y, x, dy, dlogdet, a, g, offset, perm, inv, spec, True)
    wide, narrow = cast((y, a, g, offset), torch.float64), cast((y, a, g, offset), base)
    truth, baseline = plain_inv(*wide, inv, spec)[0], plain_inv(*narrow, inv, spec)[0]
    close(x, truth, baseline, "x undone")
    exact = gradients(truth, a, g, offset, perm, spec, dy, dlogdet, torch.float64)
    plain = gradients(baseline, a, g, offset, perm, spec, dy, dlogdet, base)
    for name, t, true, other in zip(("dx", "da", "dg", "doffset"), grads, exact, plain, strict=True):
        if name == "dg" and spec.gin:
            assert t is None
        else:
            close(t, true, other, f"{name} of x undone")


def shape_id(shape):
    return "B{}-C{}".format(*shape[:2]) + ("-" + "x".join(map(str, shape[2:])) if shape[2:] else "")


@pytest.fixture
def busy(monkeypatch):
    """Let one program be enough to keep the GPU busy, so that small inputs are walked in loops as large ones are."""
    monkeypatch.setattr(launch, "BUSY", 1)
    for name in ("FORWARD_ROWS", "BACKWARD_ROWS"):
        monkeypatch.setattr(coupling, name, getattr(launch, name)._replace(busy=1))
    launch.plan.cache_clear()
    yield
    launch.plan.cache_clear()


# --- parity -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", PLANES + ROWS, ids=shape_id)
def test_coupling_parity(shape, dtype, gin):
    check_everything(make(shape, gin=gin, x=dtype))


@pytest.mark.parametrize("shape", TILED, ids=shape_id)
def test_coupling_parity_of_many_tiles(shape):
    check_everything(make(shape))


@pytest.mark.parametrize("shape", EXTREME, ids=shape_id)
def test_coupling_parity_of_extreme_sizes(shape):
    check_everything(make(shape))


def test_coupling_gin_parity_of_many_tiles():
    check_everything(make((2, 70, 64), gin=True))


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
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
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
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
    dy = torch.randn(1, *[1] * (len(shape) - 1)).expand(shape)
    check_everything((x, a, *rest), dy=dy, dlogdet=torch.ones(1).expand(shape[0]))


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [(2, 4, 16), (2, 16)], ids=shape_id)
def test_coupling_of_samples_far_apart(shape, gin):
    """2**31 elements, as in a slice of a large tensor: no product of the stride fits in 32 bits. Only a few of them are touched."""
    x, a, *rest = make(shape, gin=gin, x=torch.float16)
    size, stride = x[0].numel(), 2**31
    memory = torch.empty(stride + 2 * size, dtype=torch.float16)
    far_x, far_a = (memory.as_strided(shape, (stride, *x.stride()[1:]), k * size).copy_(t) for k, t in enumerate((x, a)))
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    results = []
    for inputs in ((far_x, far_a, *rest), (x, a, *rest)):
        with sanitize():
            forward, backward = coupling.coupling_fwd(*inputs, True), coupling.coupling_bwd(dy, dlogdet, *inputs, True)
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
    _columns_kernel[(1,)](b, p, exists, (sample + 1) * (2**31 // block) - 1, 2, pixels, block)
    assert (b == sample).all()
    assert torch.equal(p[:-1], torch.arange(pixels - block + 1, pixels))
    assert exists.tolist() == [1] * (block - 1) + [0]  # the last column is one past the end


def test_coupling_parity_of_global_parameter_shapes():
    x, a, g, offset, *rest = make((2, 7, 4, 5))
    check = coupling.coupling_bwd(torch.randn_like(x), None, x, a, g.view(1, 7, 1, 1), offset.view(1, 7, 1, 1), *rest, True)
    assert check[2].shape == check[3].shape == (1, 7, 1, 1)


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
def test_coupling_without_a_permutation(shape):
    x, a, g, offset, _, _, spec = make(shape)
    identity = torch.arange(shape[1])
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    results = []
    for index in (identity, None):
        args = (x, a, g, offset, index, index, spec)
        results.append([*coupling.coupling_fwd(*args, True), *coupling.coupling_bwd(dy, dlogdet, *args, True), *poisoned_inverse(x, args)])
    for with_index, without in zip(*results, strict=True):
        assert torch.equal(with_index, without)


@pytest.mark.parametrize(("samples", "stride"), [(2, 0), (2, 3), (1, 2)])
@pytest.mark.parametrize("operations", [coupling, eager], ids=["kernels", "eager"])
def test_rows_that_share_a_log_determinant(operations, samples, stride):
    """A gradient for each sample of three rows is what it is repeated for each row; one element is contiguous whatever its stride."""
    rows = 3 * samples
    x, a, *rest = make((rows, 9), a=torch.float32)
    dy, dlogdet = torch.randn(rows, 9), torch.randn(4).as_strided((samples,), (stride,))
    back = operations.coupling_inv_passive(x, *rest)
    for function, arguments in ((operations.coupling_bwd, (x, a)), (operations.coupling_inv_bwd, None)):
        found = []
        for gradient in (dlogdet, dlogdet.repeat_interleave(3)):
            given = (dy, gradient, *arguments) if arguments else (x, back.clone(), dy, gradient, a)
            with sanitize():
                found.append(function(*given, *rest, True))
        for per_sample, per_row in zip(*found, strict=True):
            torch.testing.assert_close(per_sample, per_row)


# --- options ------------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
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
    close(logdet, plain_logdet(plain_s(a.double(), spec), x, g.double(), spec), plain_logdet(plain_s(a, spec), x, g, spec), "logdet")


@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (6, 7)], ids=shape_id)
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
def test_coupling_repeats_bit_for_bit(shape, gin):
    inputs = make(shape, gin=gin)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])
    runs = [
        [*coupling.coupling_fwd(*inputs, True), *coupling.coupling_bwd(dy, dlogdet, *inputs, True), *poisoned_inverse(dy, inputs)]
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert first is second is None or torch.equal(first, second)


# --- traffic ------------------------------------------------------------------------------------------------------------------------

PER_CHANNEL = {"g_ptr", "offset_ptr", "inv_ptr", "perm_ptr", "dlogdet_ptr"}


def traffic(launches: list[Launch]) -> float:
    """Bytes moved. What has a value per channel is counted once a launch: later reads of these few kilobytes are served by a cache."""
    return sum(
        sum(n for name, n in run.loaded.items() if name not in PER_CHANNEL)
        + sum(n for name, n in run.distinct.items() if name in PER_CHANNEL)
        + sum(run.stored.values())
        for run in launches
    )


@in_the_interpreter
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 16, 32, 32), torch.float32), ((1, 32, 28, 28), torch.bfloat16), ((128, 512), torch.float32), ((256, 100), torch.bfloat16)],
    ids=["B2-C16-32x32-fp32", "B1-C32-28x28-bf16", "B128-C512-fp32", "B256-C100-bf16"],
)
def test_coupling_moves_little_more_than_the_minimum(shape, dtype, gin, reverse, busy, record_property):
    inputs = make(shape, gin=gin, reverse=reverse, x=dtype)
    n = inputs[0].numel() * inputs[0].element_size()
    with sanitize() as forward:
        y, _ = coupling.coupling_fwd(*inputs, True)
    with sanitize() as backward:
        coupling.coupling_bwd(y, torch.randn(shape[0]), *inputs, True)
    with sanitize() as inverse:
        poisoned_inverse(y, inputs)
    # GIN: a_s once more for its mean; backward without x1 and a_t, which only the scale's gradient needs, but with a_s, x2, dy2 twice
    minimum = {"forward": 3.5, "backward": 5.5, "inverse": 3.5} if gin else {"forward": 3.0, "backward": 5.0, "inverse": 3.0}
    for name, launches in (("forward", forward), ("backward", backward), ("inverse", inverse)):
        ratio = traffic(launches) / n
        record_property(name, round(ratio, 3))
        print(f"{shape_id(shape)} {dtype} {name}: {ratio:.3f} N, minimum {minimum[name]} N")
        assert ratio <= 1.05 * minimum[name], name


# --- the memory checker itself ------------------------------------------------------------------------------------------------------


@in_the_interpreter
def test_the_case_for_compute_sanitizer_runs_every_kernel():
    with sanitize() as launches:
        smallest.run("cpu")
    defined = {name for module in (coupling, reduce) for name in vars(module) if name.endswith("_kernel")}
    assert {run.kernel for run in launches} == defined


@in_the_interpreter
@pytest.mark.parametrize(("index", "message"), [(5, "stored twice"), (40, "out of bounds"), (-9, "out of bounds")])
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


# --- launch.py ----------------------------------------------------------------------------------------------------------------------


def test_uncovered_names_the_reason():
    x = torch.randn(2, 4, 3, 3)
    assert launch.uncovered(x) is None
    assert launch.uncovered(x[:, :3], x[:1].expand(2, 4, 3, 3)) is None
    assert "contiguous" in launch.uncovered(x.to(memory_format=torch.channels_last))
    assert "contiguous" in launch.uncovered(x, x.transpose(2, 3))
    assert "dtype" in launch.uncovered(x.to(torch.complex64))
    assert "dimensions" in launch.uncovered(x.view(-1))
    assert "32-bit" in launch.uncovered(torch.empty(2, 2**16, 2**15, device="meta"))
    assert launch.uncovered(torch.empty(2, 4, 1, 1).to(memory_format=torch.channels_last)) is None


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("rows", [None, launch.FORWARD_ROWS, launch.BACKWARD_ROWS], ids=["planes", "forward rows", "backward rows"])
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
                    assert (cut.blocks // batch) * cut.block_q >= pixels > (cut.blocks // batch - 1) * cut.block_q
                for block in (cut.block_c, cut.block_q, cut.loops, cut.warps):
                    assert block & (block - 1) == 0


def test_alignment_is_the_common_power_of_two():
    assert launch.alignment(196, 0) == 4
    assert launch.alignment(4096, 64 * 4096) == 16
    assert launch.alignment(7, 4096) == 1


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", PLANES + ROWS + TILED[1:], ids=shape_id)
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
            self.sizes.append(tuple(args[3].shape if "index_add" in str(function) else result.shape))
        return result


@pytest.mark.parametrize("shape", [(3, 7, 4, 5), (6, 10)], ids=shape_id)
def test_reverse_permutation_takes_no_pass_of_its_own(shape):
    """Gathered is what the subnet gets, the passive half, and its gradient is added back; never x, y or their gradients."""
    net = torch.nn.Conv2d if len(shape) > 2 else torch.nn.Linear
    more = (1,) if len(shape) > 2 else ()
    block = fastflow_kernels.AllInOneBlock(
        [shape[1:]], subnet_constructor=lambda i, o: net(i, o, *more), reverse_permutation=True, backend="triton", dialect="freia"
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
        [(5, 3)], subnet_constructor=lambda i, o: torch.nn.Conv1d(i, o, 1), dialect="freia", backend="triton", **options
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


@pytest.mark.parametrize("case", BLOCK_CASES, ids=ids(BLOCK_CASES))
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_block_on_the_triton_backend(case: Case, rev: bool) -> None:
    """The kernels through the module: dispatch, autograd and the subnet between the two halves of the inverse."""
    compare(case, torch.float32, rev, grad=not rev, backend="triton")


@pytest.mark.parametrize("shape", [Shape(3, 7, (3, 5)), Shape(4, 10)], ids=str)
@pytest.mark.parametrize("name", ["soft", "gin-soft", "soft-rev-exp", "hh1", "hh3-rev-cond", "hh2-soft-sigmoid", "gin-hh2"])
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_products_after_the_kernels(shape: Shape, name: str, rev: bool) -> None:
    """Soft and Householder permutations: the kernels without an index, then products."""
    compare(Case(shape, name), torch.float32, rev, grad=not rev, backend="triton")


@pytest.mark.parametrize("case", [Case(Shape(2, 7, (3, 5)), name) for name in ("hard", "rev", "cond", "soft", "gin")], ids=str)
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_channels_last_on_the_triton_backend(case: Case, rev: bool) -> None:
    """On rows; GIN on a contiguous copy."""
    compare(case, torch.float32, rev, grad=not rev, backend="triton", layout="channels_last")


@pytest.mark.parametrize("shape", [Shape(2, 8, (3, 5)), Shape(1, 2, (3, 5)), Shape(1, 5, (2, 3, 2))], ids=str)
@pytest.mark.parametrize("name", ["hard", "gin", "gin-rev-cond"])
@pytest.mark.parametrize("condition", ["contiguous", "channels_last"])
def test_a_subnet_is_given_the_layout_of_the_input(shape: Shape, name: str, condition: str) -> None:
    """As on the eager path. GIN's copy for the kernels does not change it: a convolution would round otherwise than the stock block's."""
    case = Case(shape, name)
    x = LAYOUTS["channels_last"](torch.randn(shape.full))
    c = [LAYOUTS[condition](torch.randn(shape.batch, *dims)) for dims in case.dims_c]
    given = []

    def subnet(channels_in: int, channels_out: int) -> torch.nn.Module:
        net = (torch.nn.Conv2d, torch.nn.Conv3d)[case.rank - 2](channels_in, channels_out, 3, padding=1)
        net.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].stride()))
        return net

    found = {}
    for backend in ("eager", "triton"):
        given.clear()
        block = fastflow_kernels.AllInOneBlock(case.dims_in, case.dims_c, subnet, **case.options, backend=backend)
        block([x.requires_grad_()], c)[0][0].sum().backward()
        with torch.no_grad():
            block([x], c, rev=True)
        if not c:
            chain = fastflow_kernels.ReversibleSequence(*case.dims_in[0])
            chain.append(block)
            chain(x)[0].sum().backward()
        found[backend] = [strides[1] == 1 for strides in given]  # whether the channels of a pixel lie together
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
    block = fastflow_kernels.AllInOneBlock([(8, 3, 5)], subnet_constructor=lambda i, o: Doubling(), gin_block=gin, backend="triton")
    with torch.no_grad(), pytest.raises(RuntimeError, match="the subnet changed its input in place"):
        block([LAYOUTS[layout](torch.randn(2, 8, 3, 5))], rev=rev)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
def test_any_layout_on_the_triton_backend(layout: str, rev: bool) -> None:
    compare(Case(Shape(2, 7, (3, 5)), "rev"), torch.float32, rev, grad=not rev, backend="triton", layout=layout)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(64, 8, 8), (33, 5, 3), (64,)], ids=str)
def test_log_det_of_a_fresh_block_on_the_triton_backend(activation: str, shape: tuple[int, ...]) -> None:
    compare_fresh(activation, shape, "triton")


def test_triton_backend_raises_where_it_cannot_be_honoured() -> None:
    block = make_block(fastflow_kernels.AllInOneBlock, Case(Shape(2, 6, (4, 4)), "hard"), torch.float32, backend="triton")
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(RuntimeError, match="traced, transformed or compiled"):
        torch.func.vmap(lambda x: block([x])[0][0])(x[None])
    with pytest.raises(RuntimeError, match="no gradient of the inverse"):
        block([x], rev=True)
    block.subnet.register_forward_hook(lambda _, __, a: a.to(memory_format=torch.channels_last))  # the subnet's layout is no reason
    expected = copy.deepcopy(block)
    expected.backend = "eager"
    torch.testing.assert_close(block([x])[0][0], expected([x])[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"permute_soft": True}, {"learned_householder_permutation": 1}, {"reverse_permutation": True}], ids=str
)
def test_one_channels_last_sample_and_a_subnet_that_is_not(options: dict) -> None:
    """A transposed view of one sample has the shape of rows, and not their layout."""
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(4, 3, 5)], subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 1), backend="triton", **options
    )
    block = block.double()
    block.subnet.register_forward_hook(lambda _, __, a: a.contiguous())
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (y,), logdet = block([x])
        (back,), minus = block([y], rev=True)
    assert (back - x).abs().max() < 1e-5  # the rotation was drawn in float32
    assert (logdet + minus).abs().max() < 1e-5  # the rotation was drawn in float32


@pytest.mark.parametrize("options", [{}, {"permute_soft": True}, {"learned_householder_permutation": 1}], ids=str)
def test_channels_last_gin_with_reverse_permutation_on_the_triton_backend(options: dict) -> None:
    """The contiguous copy that the kernels need stays one when the permutation is undone ahead of them."""
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


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (5, 7)], ids=shape_id)
def test_a_reversible_chain_runs_the_kernels(shape, gin):
    case = Case(Shape(shape[0], shape[1], shape[2:]), "gin" if gin else "hard")
    chain = fastflow_kernels.ReversibleSequence(*shape[1:])
    for seed in range(3):
        chain.append(make_block(fastflow_kernels.AllInOneBlock, case, torch.float32, seed, backend="triton"))
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
    pairs = [(x.grad, wide.grad), *((p.grad, q.grad) for p, q in zip(chain.parameters(), exact.parameters(), strict=True))]
    for mine, truth in pairs:
        if mine is not None and truth is not None:
            assert (mine - truth).norm() <= 1e-4 * truth.norm().clamp(min=1e-3)
