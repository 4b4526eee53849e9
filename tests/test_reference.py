"""Test the reference against mathematics.

The tests cover its inverse, the brute-force Jacobian, numerical gradients, and the formulas number
by number.
"""

from __future__ import annotations

import copy
import doctest
import math
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from reference import AllInOneBlock, InvertibleModule, all_in_one_block
from reference.all_in_one_block import random_rotation
from tests.support.cases import (
    CASES,
    SHAPES,
    Case,
    both_dialects,
    both_directions,
    ids,
    make_block,
    make_input,
    make_subnet,
)

every_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
some_cases = [case for case in CASES if case.shape in (SHAPES[0], SHAPES[6])]

# Relative tolerance in float64: eps = 2.2e-16, times a block's condition (scales and exponentials
# of up to e^clamp each way), times the root of the number of operations.
TIGHT = 1e-11


def block_of(case: Case, **extra: object) -> AllInOneBlock:
    return make_block(AllInOneBlock, case, dialect=case.dialect, **extra)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TIGHT) -> None:
    assert actual.shape == expected.shape
    limit = tolerance * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
    assert (actual - expected).abs().max().item() <= limit if expected.numel() else True


@every_case
def test_inverse_round_trip(case: Case) -> None:
    block = block_of(case)
    x, c = make_input(case)
    (y,), log_det = block([x], c)
    (back,), minus_log_det = block([y], c, rev=True)
    assert_near(back, x)
    assert_near(minus_log_det, -log_det)
    (z,), _ = block([x], c, rev=True)
    assert_near(block([z], c)[0][0], x)


@every_case
@both_directions
def test_log_det_equals_brute_force_jacobian(case: Case, rev: bool) -> None:
    block = block_of(case)
    x, c = make_input(case)
    _, log_det = block([x], c, rev=rev)
    assert log_det.shape == (case.shape.batch,)
    size = x[0].numel()
    for b in range(min(case.shape.batch, 2)):
        cb = [t[b : b + 1] for t in c]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, cb=cb: block([v], cb, rev=rev)[0][0], x[b : b + 1], vectorize=True
        )
        _, brute_force = torch.linalg.slogdet(jacobian.reshape(size, size))
        assert_near(log_det[b], brute_force)


@pytest.mark.parametrize("case", some_cases, ids=ids(some_cases))
@both_directions
def test_gradients_equal_numerical_ones(case: Case, rev: bool) -> None:
    block = block_of(case)
    x, c = make_input(case)
    names = [name for name, p in block.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in block.parameters() if p.requires_grad]
    tensors = [t.requires_grad_() for t in (x, *c)]

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, parameters = args[: len(tensors)], args[len(tensors) :]
        call = functional_call(
            block,
            dict(zip(names, parameters, strict=True)),
            ([inputs[0]], list(inputs[1:])),
            {"rev": rev},
        )
        return call[0][0], call[1]

    assert torch.autograd.gradcheck(run, (*tensors, *values), fast_mode=True)
    if case.shape == SHAPES[0]:
        assert torch.autograd.gradgradcheck(run, (*tensors, *values), fast_mode=True)


def scalar_block(block: AllInOneBlock, x: list[float], a: list[float]) -> tuple[list[float], float]:
    """Compute the docstring's formulas number by number.

    Args:
        block: A block with a hard permutation.
        x: One sample of rank 0.
        a: The sample's coefficients.

    Returns:
        The output and the log-determinant.
    """
    n, clamp = len(x), block.clamp
    n1, n2 = n - n // 2, n // 2
    s = [clamp * math.tanh(0.1 * v / (clamp if block.dialect == "freia" else 1.0)) for v in a[:n2]]
    if block.GIN:
        s = [v - math.fsum(s) / n2 for v in s]
    u = x[:n1] + [x[n1 + i] * math.exp(s[i]) + 0.1 * a[n2 + i] for i in range(n2)]
    g = block.global_scale.flatten().tolist()
    scale = {
        "SIGMOID": lambda v: 10 / (1 + math.exp(2 - v)),
        "SOFTPLUS": lambda v: 0.2 * math.log(1 + math.exp(v / 2)),
        "EXP": math.exp,
    }[block.activation_name]
    scales = [1.0] * n if block.GIN else [scale(v) for v in g]
    v = [u[i] * scales[i] + block.global_offset.flatten()[i].item() for i in range(n)]
    index = (
        block.w_perm.flatten(1).argmax(1).tolist()
        if block.dialect == "anomalib"
        else block.w_perm.tolist()
    )
    return [v[j] for j in index], math.fsum(s) + math.fsum(map(math.log, scales))


@both_dialects
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("activation", ["SIGMOID", "SOFTPLUS", "EXP"])
def test_formula_number_by_number(dialect: str, gin: bool, activation: str) -> None:
    class Coefficients(nn.Module):
        a: torch.Tensor

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return self.a

    block = AllInOneBlock(
        [(7,)], [], lambda *_: Coefficients(), 1.7, gin, 0.8, activation, dialect=dialect
    ).double()
    with torch.no_grad():
        block.global_scale.add_(torch.randn(1, 7))
        block.global_offset.add_(torch.randn(1, 7))
    block.activation_name = activation
    x, block.subnet.a = torch.randn(3, 7).double(), 12 * torch.randn(3, 6).double()
    (y,), log_det = block([x])
    for b in range(3):
        expected, expected_log_det = scalar_block(block, x[b].tolist(), block.subnet.a[b].tolist())
        assert_near(y[b], torch.tensor(expected, dtype=torch.float64), 1e-14)
        assert_near(log_det[b], torch.tensor(expected_log_det, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("case", some_cases, ids=ids(some_cases))
def test_empty_batch(case: Case) -> None:
    case = case.replace(shape=type(case.shape)(0, case.shape.channels, case.shape.spatial))
    block = block_of(case)
    x, c = make_input(case)
    x.requires_grad_()
    for rev in (False, True):
        (y,), log_det = block([x], c, rev=rev)
        assert y.shape == x.shape
        assert log_det.shape == (0,)
        (grad,) = torch.autograd.grad(y.sum() + log_det.sum(), x)
        assert grad.shape == x.shape


@pytest.mark.parametrize("case", some_cases, ids=ids(some_cases))
@both_directions
def test_the_log_determinant_is_returned_whatever_jac_is(case: Case, rev: bool) -> None:
    block = block_of(case)
    x, c = make_input(case)
    (y,), log_det = block([x], c, rev=rev)
    (same,), also = block([x], c, rev=rev, jac=False)
    assert torch.equal(same, y)
    assert torch.equal(also, log_det)


@every_case
def test_same_seed_gives_same_block(case: Case) -> None:
    first, second, third = (block_of(case, seed=seed).state_dict() for seed in (3, 3, 4))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["global_offset"], third["global_offset"])


@every_case
def test_state_dict_layout(case: Case) -> None:
    block = block_of(case)
    channels, ones = case.shape.channels, (1,) * case.rank
    keys = [key for key in block.state_dict() if not key.startswith("subnet")]
    if block.householder:
        assert keys == ["global_scale", "global_offset", "vk_householder", "w_0"]
        assert block.vk_householder.shape == (block.householder, channels)
        assert block.w_0.shape == (channels, channels)
        return
    assert keys == ["global_scale", "global_offset", "w_perm", "w_perm_inv"]
    if case.dialect == "freia" and not case.options.get("permute_soft"):
        assert block.w_perm.dtype == torch.int64
        assert torch.equal(block.w_perm[block.w_perm_inv], torch.arange(channels))
    else:
        assert block.w_perm.shape == (channels, channels, *ones)
        assert torch.equal(block.w_perm.flatten(1), block.w_perm_inv.flatten(1).T)


@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_random_rotation_is_a_rotation(n: int) -> None:
    for _ in range(8):  # half of the draws take the branch that negates a column
        w = random_rotation(n)
        assert_near(w @ w.T, torch.eye(n, dtype=torch.float64), 1e-13)
        assert_near(torch.linalg.det(w), torch.tensor(1.0, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("last", [nn.ReLU, nn.Sigmoid, nn.Identity])
def test_subnet_output_is_never_written(last: type) -> None:
    kept = []

    class Keep(nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            kept.append((a, a.detach().clone()))
            return a

    block = AllInOneBlock(
        [(6,)], [], lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, n_out), last(), Keep())
    )
    x = torch.randn(4, 6)
    before = x.clone()
    for rev in (False, True):
        (y,), log_det = block([x], rev=rev)
        (y.sum() + log_det.sum()).backward()
    assert torch.equal(x, before)
    assert all(torch.equal(a, copied) for a, copied in kept)
    assert len(kept) == 2


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@both_dialects
def test_householder_leaves_no_graph_behind(dialect: str, soft: bool) -> None:
    block = AllInOneBlock(
        [(5,)],
        [],
        nn.Linear,
        permute_soft=soft,
        learned_householder_permutation=2,
        reverse_permutation=True,
        dialect=dialect,
    )
    x = torch.randn(3, 5)
    (y,), log_det = block([x])
    block([y], rev=True)
    assert block.w_perm is None
    assert block.w_perm_inv is None
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin([x])[0][0], y)
    (y.sum() + log_det.sum()).backward()
    assert block.vk_householder.grad.abs().sum() > 0
    assert block.w_0.grad is None


@both_dialects
def test_non_finite_values_stay_in_their_channel(dialect: str) -> None:
    block = AllInOneBlock([(7, 3)], [], make_subnet(1), dialect=dialect)
    x = torch.randn(2, 7, 3)
    clean = block([x])[0][0]
    # Change active channels, which the subnet does not see.
    x[1, 6, 2], x[0, 5, 0] = float("nan"), float("inf")
    y = block([x])[0][0]
    assert int(y.isnan().sum()) == 1
    assert int(y.isinf().sum()) == 1
    assert torch.equal(y[y.isfinite()], clean[y.isfinite()])


def test_orthogonal_matrix_in_a_hard_block_is_applied() -> None:
    block = AllInOneBlock([(6, 2)], [], make_subnet(1)).double()
    w = random_rotation(6)
    block.load_state_dict(
        {**block.state_dict(), "w_perm": w[..., None], "w_perm_inv": w.T[..., None]}
    )
    x = torch.randn(2, 6, 2, dtype=torch.float64)
    (y,), log_det = block([x])
    (back,), minus = block([y], rev=True)
    assert_near(back, x)
    assert_near(minus, -log_det)
    assert int((y.abs() < 1e-12).sum()) == 0


@both_dialects
@pytest.mark.parametrize(
    "options",
    [{}, {"permute_soft": True}, {"learned_householder_permutation": 3}],
    ids=["hard", "soft", "hh3"],
)
def test_reverse_permutation_inverts_the_permutation_first(options: dict, dialect: str) -> None:
    """With a coupling and a global affine that do nothing, only W^-1 and then W remain."""
    zero = make_subnet(0, gain=0.0)
    block = AllInOneBlock(
        [(9,)],
        [],
        zero,
        global_affine_type="EXP",
        reverse_permutation=True,
        dialect=dialect,
        **options,
    )
    x = torch.randn(3, 9)
    assert_near(block([x])[0][0], x, 1e-5)
    v = torch.randn(3, 9)
    assert_near(block._pre_permute(block._permute(v)[0]), v, 1e-5)
    assert_near(block._permute(block._pre_permute(v))[0], v, 1e-5)
    assert_near(block._pre_permute(v, rev=True), block._permute(v)[0], 1e-5)
    assert not torch.allclose(block._permute(v)[0], v, atol=1e-2)


def test_clamp_zero_is_additive_coupling() -> None:
    block = AllInOneBlock(
        [(6,)], [], make_subnet(0), affine_clamping=0.0, global_affine_type="EXP"
    ).double()
    _, log_det = block([torch.randn(4, 6).double()])
    assert torch.equal(log_det, torch.zeros(4, dtype=torch.float64))


@both_dialects
@pytest.mark.parametrize(
    ("activation", "init"),
    [
        (name, init)
        for name in ("SIGMOID", "SOFTPLUS", "EXP")
        for init in (1e-6, 1e-2, 0.7, 0.92, 1.0, 3.0, 9.99)
    ]
    + [("SOFTPLUS", 25.0), ("SOFTPLUS", 400.0), ("SOFTPLUS", 1e-9), ("EXP", 1e20)],
)
def test_initial_scale(activation: str, init: float, dialect: str) -> None:
    block = AllInOneBlock(
        [(3, 2)],
        [],
        make_subnet(1),
        global_affine_init=init,
        global_affine_type=activation,
        dialect=dialect,
    )
    scale = block.global_scale_activation(block.global_scale.double())
    # anomalib's float32 formula exp(5 * init) - 1 cancels for small values of SOFTPLUS. The
    # reference reproduces its bits.
    cancels = activation == "SOFTPLUS" and dialect == "anomalib" and init < 1e-2
    expected = torch.full_like(scale, init)
    assert (scale / expected - 1).abs().max() < (0.15 if cancels else 2e-5)


def test_spatial_shape_is_free_in_one_dialect_only() -> None:
    x = torch.randn(2, 4, 6, 5)
    assert AllInOneBlock([(4, 1, 1)], [], make_subnet(2))([x])[0][0].shape == x.shape
    with pytest.raises(ValueError, match=r"must have shape \(B, 4, 1, 1\)"):
        AllInOneBlock([(4, 1, 1)], [], make_subnet(2), dialect="freia")([x])


def test_autocast_keeps_the_log_det_in_float32() -> None:
    block = AllInOneBlock([(8,)], [], lambda n_in, n_out: nn.Linear(n_in, n_out))
    with torch.autocast("cpu", torch.bfloat16):
        (y,), log_det = block([torch.randn(3, 8)])
    assert y.dtype == torch.float32
    assert log_det.dtype == torch.float32


BAD_OPTIONS = {
    "no subnet": ({"subnet_constructor": None}, "subnet_constructor"),
    "subnet not callable": ({"subnet_constructor": 3}, "subnet_constructor"),
    "dialect": ({"dialect": "FrEIA"}, "dialect"),
    "activation": ({"global_affine_type": "softplus"}, "global_affine_type"),
    "init 0": ({"global_affine_init": 0.0}, "global_affine_init"),
    "init negative": (
        {"global_affine_init": -1.0, "global_affine_type": "EXP"},
        "global_affine_init",
    ),
    "init nan": ({"global_affine_init": math.nan}, "global_affine_init"),
    "init inf": ({"global_affine_init": math.inf}, "global_affine_init"),
    "init over sigmoid": (
        {"global_affine_init": 10.0, "global_affine_type": "SIGMOID"},
        "global_affine_init",
    ),
    "clamp nan": ({"affine_clamping": math.nan}, "affine_clamping"),
    "clamp inf": ({"affine_clamping": math.inf}, "affine_clamping"),
    "clamp 0 in freia": ({"affine_clamping": 0.0, "dialect": "freia"}, "affine_clamping"),
    "householder": ({"learned_householder_permutation": -1}, "learned_householder"),
    "5 dimensions": ({"dims_in": [(4, 2, 2, 2, 2)]}, "dims_in"),
    "no dimension": ({"dims_in": [()]}, "dims_in"),
    "no channel": ({"dims_in": [(0, 2)]}, "dims_in"),
    "two inputs": ({"dims_in": [(4,), (4,)]}, "dims_in"),
    "condition": ({"dims_c": [(4, 2)]}, "condition"),
    "second condition": ({"dims_c": [(4,), (4, 2)]}, "condition"),
}


@pytest.mark.parametrize(
    ("options", "match"), BAD_OPTIONS.values(), ids=[name.replace(" ", "_") for name in BAD_OPTIONS]
)
def test_bad_option_is_a_value_error(options: dict, match: str) -> None:
    good = {"dims_in": [(4,)], "subnet_constructor": make_subnet(0)}
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=match):
        AllInOneBlock(**{**good, **options})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bad_input_is_a_value_error() -> None:
    block = AllInOneBlock([(4, 3)], [(2, 3)], make_subnet(1))
    x, c = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    block([x], [c])
    for bad in [
        (x, [c]),
        ([x, x], [c]),
        ([], [c]),
        ([x], []),
        ([x], [c, c]),
        ([x], c),
        ([x[:, :3]], [c]),
        ([x[..., 0]], [c]),
    ]:
        with pytest.raises(ValueError, match="must"):
            block(*bad)


def test_examples_run() -> None:
    failed, attempted = doctest.testmod(all_in_one_block)
    assert attempted > 0
    assert failed == 0


def test_invertible_module_is_abstract() -> None:
    module = InvertibleModule([(3, 4)])
    assert module.dims_in == [(3, 4)]
    assert module.dims_c == []
    with pytest.raises(NotImplementedError):
        module([torch.randn(1, 3, 4)])
    with pytest.raises(NotImplementedError):
        module.output_dims([(3, 4)])
    with pytest.raises(DeprecationWarning):
        module.log_jacobian()


def test_overrides_are_used() -> None:
    class Additive(AllInOneBlock):
        def _affine(
            self, x: torch.Tensor, a: torch.Tensor, rev: bool = False
        ) -> tuple[torch.Tensor, torch.Tensor]:
            t = a[:, x.shape[1] :]
            return (x - t if rev else x + t), x.new_zeros(len(x))

        def _permute(self, x: torch.Tensor, rev: bool = False) -> tuple[torch.Tensor, float]:
            return x.flip(1), 0.0

    block = Additive([(6,)], [], make_subnet(0)).double()
    x = torch.randn(3, 6).double()
    (y,), log_det = block([x])
    assert torch.equal(log_det, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(y.flip(1)[:, :3], x[:, :3])
    assert_near(block([y], rev=True)[0][0], x, 1e-14)
