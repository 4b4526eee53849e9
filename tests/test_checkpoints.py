"""Checkpoints: layouts, keys and strictness, into and out of the peers; copies and pickles; seeds;
FrEIA's containers.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from bench.peers import anomalib_block, freia, freia_block
from fastflow_kernels import AllInOneBlock
from fastflow_kernels.permutations import IndexPermutation
from tests.support import blocks
from tests.support.cases import DIALECTS, Case, Shape, ids, make_block, make_input, make_subnet

ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float64).eps

both_dialects = pytest.mark.parametrize("dialect", DIALECTS)
NAMES = (
    "hard",
    "rev",
    "gin-rev-cond",
    "soft",
    "soft-rev-exp",
    "hh3-rev-cond",
    "hh2-soft-sigmoid",
    "gin-hh2",
)
CASES = [Case(shape, name) for shape in (Shape(2, 7), Shape(2, 6, (3, 4))) for name in NAMES]
CASES += [Case(shape, "hard") for shape in (Shape(3, 1), Shape(2, 2, (3,)), Shape(2, 5, (2, 3, 2)))]
each_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER = (
    Case(Shape(2, 6, (3, 4)), name)
    for name in ("gin-rev-cond", "soft", "hh3-rev-cond", "hh2-soft-sigmoid")
)
kinds = pytest.mark.parametrize(
    "case", [HARD, SOFT, HOUSEHOLDER, SOFT_HOUSEHOLDER], ids=["hard", "soft", "hh", "hh-soft"]
)


def ours(
    case: Case, seed: int = 0, dtype: torch.dtype = torch.float64, dialect: str = "anomalib"
) -> AllInOneBlock:
    return make_block(AllInOneBlock, case, dtype, seed, dialect=dialect)


def results(block: nn.Module, case: Case) -> list[Tensor]:
    """Output, log-determinant, inverse and its log-determinant."""
    x, c = make_input(case, block.global_scale.dtype)
    with torch.no_grad():
        (y,), logdet = block([x], c)
        (z,), negated = block([x], c, rev=True)
    return [y, logdet, z, negated]


def assert_same_results(actual: nn.Module, expected: nn.Module, case: Case) -> None:
    """float64: to the roundings of a sum of C terms, and of the exponential of a log-factor of a
    few units, which multiplies its own.
    """
    for name, a, e in zip(
        ("output", "log-det", "inverse", "inverse's log-det"),
        results(actual, case),
        results(expected, case),
        strict=True,
    ):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        terms = case.shape.channels * max(1, e[0].numel())
        error = (a - e).abs().max().item()
        assert error <= 16 * terms * EPS * max(1.0, e.abs().max().item()), f"{name}: {error:.3g}"


def contents(block: nn.Module) -> dict[str, Tensor]:
    """Everything that a block holds, copied."""
    return {
        name: t.detach().clone() for name, t in [*block.named_parameters(), *block.named_buffers()]
    }


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].shape == value.shape, key
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def one_hot(index: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    channels = len(index)
    w = torch.zeros(channels, channels, dtype=dtype)
    w[torch.arange(channels), index] = 1.0
    return w.view(channels, channels, *[1] * rank)


def is_hard(case: Case) -> bool:
    return not case.options.get("permute_soft")


# --- layouts --------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
@both_dialects
def test_state_dict_is_in_the_dialects_layout(case: Case, dtype: torch.dtype, dialect: str) -> None:
    block = ours(case, dtype=dtype, dialect=dialect)
    theirs = make_block(reference.AllInOneBlock, case, dtype, seed=5, dialect=dialect)
    state, expected = block.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert [(t.shape, t.dtype) for t in state.values()] == [
        (t.shape, t.dtype) for t in expected.values()
    ]
    channels, ones = case.shape.channels, [1] * case.rank
    if "w_0" in state:
        assert state["w_0"].shape == (channels, channels)
        assert state["w_0"].dtype == dtype
    elif dialect == "freia" and is_hard(case):
        assert state["w_perm"].shape == (channels,)
        assert state["w_perm"].dtype == torch.int64
        assert torch.equal(state["w_perm_inv"], state["w_perm"].argsort())
    else:
        assert state["w_perm"].shape == (channels, channels, *ones)
        assert state["w_perm"].dtype == dtype
        assert torch.equal(state["w_perm_inv"], state["w_perm"].transpose(0, 1))
    if is_hard(case) and "w_perm" in state:
        x = torch.randn(3, channels)
        w = state["w_perm"]
        permuted = x[:, w] if w.dim() == 1 else x @ w.view(channels, channels).float().T
        assert torch.equal(permuted, block._permutation().permute(x)), "y[:, j] = v[:, w_perm[j]]"


@both_dialects
def test_state_dict_of_a_model_has_its_prefixes(dialect: str) -> None:
    model = nn.ModuleDict(
        {"flow": nn.ModuleList([ours(HARD, seed, dialect=dialect) for seed in range(2)])}
    )
    state = model.state_dict()
    assert [key for key in state if "w_perm" in key] == [
        f"flow.{i}.{name}" for i in range(2) for name in ("w_perm", "w_perm_inv")
    ]
    other = nn.ModuleDict(
        {"flow": nn.ModuleList([ours(HARD, seed, dialect=dialect) for seed in (7, 8)])}
    )
    other.load_state_dict(state)
    assert_equal_states(other.state_dict(), state)


@kinds
@pytest.mark.parametrize("source", DIALECTS)
@pytest.mark.parametrize("target", DIALECTS)
def test_either_layout_loads_into_either_dialect(case: Case, source: str, target: str) -> None:
    theirs = make_block(reference.AllInOneBlock, case, seed=3, dialect=source)
    given = theirs.state_dict()
    kept = {key: value.clone() for key, value in given.items()}
    block = ours(case, seed=4, dialect=target)
    block.load_state_dict(given, strict=True)
    assert_equal_states(given, kept)  # the caller's
    same = make_block(reference.AllInOneBlock, case, seed=4, dialect=target)
    if source == target:
        same.load_state_dict(given)
        assert_equal_states(block.state_dict(), given)
    else:
        same.load_state_dict(
            {key: value for key, value in given.items() if "perm" not in key}, strict=False
        )
        for name in ("w_perm", "w_perm_inv"):
            if name in given:
                w = given[name]
                if is_hard(case):
                    w = (
                        w.view(w.shape[:2]).argmax(1)
                        if w.dim() > 1
                        else one_hot(w, case.rank, torch.float64)
                    )
                getattr(same, name).data = w.clone()
        assert_equal_states(block.state_dict(), same.state_dict())
    assert_same_results(block, same, case)


@pytest.mark.parametrize(
    "case", [SOFT, SOFT_HOUSEHOLDER, HOUSEHOLDER], ids=["soft", "hh-soft", "hh"]
)
@pytest.mark.parametrize("form", ["index", "matrix"])
def test_hard_permutation_loads_into_any_block(case: Case, form: str) -> None:
    """A permutation is a rotation too (or a reflection)."""
    block = ours(case)
    index = torch.randperm(6)
    square = one_hot(index, 0 if block.householder else case.rank, torch.float64)
    state = block.state_dict()
    if block.householder:
        state["w_0"] = index if form == "index" else square
    else:
        state["w_perm"], state["w_perm_inv"] = (
            (index, index.argsort()) if form == "index" else (square, square.transpose(0, 1))
        )
    block.load_state_dict(state, strict=True)
    assert torch.equal(block.state_dict()["w_0" if block.householder else "w_perm"], square)
    if not block.householder:
        assert torch.equal(block.state_dict()["w_perm_inv"], square.transpose(0, 1))
    theirs = make_block(reference.AllInOneBlock, case)
    theirs.load_state_dict(block.state_dict())
    assert_same_results(block, theirs, case)


# --- the peers ------------------------------------------------------------------------------------

PEERS = pytest.mark.parametrize("peer", [anomalib_block, freia_block], ids=["anomalib", "freia0.2"])


@pytest.mark.peers
@PEERS
@each_case
def test_checkpoints_go_into_and_out_of_the_peers(case: Case, peer: Callable[[], type]) -> None:
    theirs, block = make_block(peer(), case, seed=3), ours(case, seed=4)
    block.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal_states(block.state_dict(), theirs.state_dict())
    assert_same_results(block, theirs, case)
    other = ours(case, seed=6)
    theirs.load_state_dict(other.state_dict(), strict=True)
    assert_equal_states(theirs.state_dict(), other.state_dict())
    assert_same_results(other, theirs, case)
    freia_dialect = ours(case, seed=7, dialect="freia")
    freia_dialect.load_state_dict(theirs.state_dict(), strict=True)
    again = ours(case, seed=8)
    again.load_state_dict(freia_dialect.state_dict(), strict=True)
    assert_equal_states(again.state_dict(), theirs.state_dict())


@pytest.mark.peers
@PEERS
@each_case
def test_optimizer_state_of_a_stock_block_loads(case: Case, peer: Callable[[], type]) -> None:
    """It goes by the number and order of the parameters; so the next step is the stock block's."""
    theirs, block = make_block(peer(), case, seed=3), ours(case, seed=4)
    assert [name for name, _ in block.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    assert [p.requires_grad for p in block.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]
    optimizers = [torch.optim.Adam(b.parameters(), lr=1e-2) for b in (theirs, block)]

    def step(b: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        x, c = make_input(case)
        optimizer.zero_grad()
        (y,), logdet = b([x], c)
        (y.square().sum() - logdet.sum()).backward()
        optimizer.step()

    step(theirs, optimizers[0])
    block.load_state_dict(theirs.state_dict())
    # which shares its tensors otherwise
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for b, optimizer in zip((theirs, block), optimizers, strict=True):
        step(b, optimizer)
    # Adam's step is lr * m / sqrt(v): an element's relative error is its gradient's, here 1e-12 or
    # less where the gradient is above 1e-2 (they are of order 1), and nothing is known where it is
    # rounding noise.
    for (name, p), expected in zip(block.named_parameters(), theirs.parameters(), strict=True):
        if expected.grad is not None and expected.numel():
            reliable = expected.grad.abs() > 1e-2
            assert ((p - expected)[reliable].abs() <= 1e-13).all(), name
            assert reliable.any() or expected.grad.abs().max() < 1e-12, name


INITS = [0.01, 0.37, 0.7, 0.92, 1.0, 3.3, 9.9]


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("activation", ["SIGMOID", "SOFTPLUS", "EXP"])
def test_same_seed_gives_anomalibs_block(case: Case, activation: str) -> None:
    for init in INITS:
        options = {**case.options, "global_affine_type": activation, "global_affine_init": init}
        blocks, states = [], []
        for cls in (anomalib_block(), AllInOneBlock):
            torch.manual_seed(17)
            blocks.append(
                cls(case.dims_in, case.dims_c, subnet_constructor=make_subnet(case.rank), **options)
            )
            states.append(torch.random.get_rng_state())
        expected, actual = (block.state_dict() for block in blocks)
        # the stock block draws its rotation by NumPy: that differs, all else does not
        if not is_hard(case):
            for name in ("w_0", "w_perm", "w_perm_inv"):
                actual.pop(name, None)
                expected.pop(name, None)
        assert_equal_states(actual, expected)
        assert torch.equal(*states)


@both_dialects
@kinds
def test_same_seed_gives_the_same_block(case: Case, dialect: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(
            AllInOneBlock(
                case.dims_in, case.dims_c, make_subnet(case.rank), **case.options, dialect=dialect
            ).state_dict()
        )
    assert_equal_states(states[0], states[1])
    name = "w_0" if "w_0" in states[0] else "w_perm"
    assert not torch.equal(states[0][name], states[2][name])
    torch.manual_seed(1)
    in_a_row = [
        AllInOneBlock(
            case.dims_in, case.dims_c, make_subnet(case.rank), **case.options
        ).state_dict()[name]
        for _ in range(2)
    ]
    assert not torch.equal(*in_a_row), "the blocks of a flow need permutations of their own"


# --- what is refused ------------------------------------------------------------------------------


def rotation(channels: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    return q


def hard(index: list[int], rank: int = 2) -> Tensor:
    return one_hot(torch.tensor(index), rank, torch.float64)


GOOD = [2, 0, 1, 5, 3, 4]
INVERSE = [1, 2, 0, 4, 5, 3]

# Name: (w_perm, w_perm_inv, what the message must say), for a hard block of 6 channels and rank 2.
BAD_HARD: dict[str, tuple[Tensor, Tensor, str]] = {
    "duplicate index": (
        torch.tensor([0, 0, 1, 2, 3, 4]),
        torch.tensor(INVERSE),
        "w_perm.*not a permutation of 6",
    ),
    "index out of range": (
        torch.tensor([1, 2, 3, 4, 5, 6]),
        torch.tensor(INVERSE),
        "w_perm.*not a permutation of 6",
    ),
    "negative index": (
        torch.tensor([-1, 0, 1, 2, 3, 4]),
        torch.tensor(INVERSE),
        "w_perm.*not a permutation of 6",
    ),
    "index of 5": (torch.arange(5), torch.arange(5), r"w_perm.*\(5,\).*6"),
    "index in floats": (
        torch.tensor(GOOD).double(),
        torch.tensor(INVERSE).double(),
        "w_perm.*not a permutation of 6",
    ),
    "inverse is no permutation": (
        torch.tensor(GOOD),
        torch.tensor([1, 1, 0, 4, 5, 3]),
        "w_perm_inv.*not a permutation of 6",
    ),
    "matrix of 5": (
        hard([0, 1, 2, 3, 4]),
        hard([0, 1, 2, 3, 4]),
        r"w_perm.*\(5, 5, 1, 1\).*expected.*6",
    ),
    "flattened matrix": (
        hard(GOOD).view(1, 36),
        hard(INVERSE).view(1, 36),
        r"w_perm.*\(1, 36\).*expected.*6",
    ),
    "scalar": (torch.tensor(3), torch.tensor(3), "w_perm.*expected.*6"),
    "kernel of 3x3": (
        hard(GOOD).repeat(1, 1, 3, 3),
        hard(INVERSE).repeat(1, 1, 3, 3),
        r"w_perm.*\(6, 6, 3, 3\).*expected.*6",
    ),
}
# Matrices that a stock block loads and multiplies by: means of checkpoints, matrices trained by
# accident, broken ones. The last column is what the warning says, where there must be one.
ELSEWHERE = 1e-3 * torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6, 1, 1)
ODD: dict[str, tuple[Tensor, Tensor, str | None]] = {
    "mean of ten": (
        sum(0.1 * hard(GOOD).float() for _ in range(10)),
        sum(0.1 * hard(INVERSE).float() for _ in range(10)),
        None,
    ),
    "rotation": ((r := rotation(6)).view(6, 6, 1, 1), r.T.reshape(6, 6, 1, 1), None),
    "trained a little": (hard(GOOD) + ELSEWHERE, hard(INVERSE) + ELSEWHERE, "not the inverse"),
    "not quite one": (hard(GOOD) * 0.999, hard(INVERSE) * 0.999, None),
    "sign": (-hard(GOOD), -hard(INVERSE), None),
    "inverse of another": (hard(GOOD), hard(GOOD), "not the inverse"),
    "of two rotations": (
        rotation(6).view(6, 6, 1, 1),
        rotation(6).view(6, 6, 1, 1),
        "not the inverse",
    ),
    "scaled": (
        2 * (r := rotation(6)).view(6, 6, 1, 1),
        0.5 * r.T.reshape(6, 6, 1, 1),
        "no rotation",
    ),
    "duplicate row": (hard([0, 0, 1, 2, 3, 4]), hard(INVERSE), "no rotation"),
    "zeros": (torch.zeros(6, 6, 1, 1), torch.zeros(6, 6, 1, 1), "no rotation"),
    "nan": (
        torch.full((6, 6, 1, 1), torch.nan),
        torch.full((6, 6, 1, 1), torch.nan),
        "no rotation",
    ),
}


def assert_refused(block: nn.Module, state: dict[str, Tensor], match: str, **options: Any) -> None:
    """Raises, and the block is what it was: parameters, subnet, results."""
    before, identities = contents(block), [id(p) for p in block.parameters()]
    with pytest.raises((ValueError, RuntimeError), match=match):
        block.load_state_dict(state, **options)
    assert [id(p) for p in block.parameters()] == identities
    assert_equal_states(contents(block), before)


def other_state(block: nn.Module) -> dict[str, Tensor]:
    """A state dict that differs from the block's everywhere but in the permutation."""
    return {
        key: value if key.startswith("w_") else value + 1
        for key, value in block.state_dict().items()
    }


@pytest.mark.parametrize("bad", BAD_HARD, ids=[name.replace(" ", "_") for name in BAD_HARD])
@pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
@both_dialects
def test_bad_permutation_is_refused(bad: str, assign: bool, dialect: str) -> None:
    w, w_inv, match = BAD_HARD[bad]
    block = ours(HARD, dialect=dialect)
    assert_refused(
        block, {**other_state(block), "w_perm": w, "w_perm_inv": w_inv}, match, assign=assign
    )


@pytest.mark.parametrize("bad", BAD_HARD, ids=[name.replace(" ", "_") for name in BAD_HARD])
def test_bad_permutation_is_refused_also_when_not_strict(bad: str) -> None:
    w, w_inv, match = BAD_HARD[bad]
    block = ours(HARD)
    assert_refused(
        block, {**other_state(block), "w_perm": w, "w_perm_inv": w_inv}, match, strict=False
    )


BAD_HOUSEHOLDER = [name for name in BAD_HARD if "inverse" not in name]


@pytest.mark.parametrize(
    "bad", BAD_HOUSEHOLDER, ids=[name.replace(" ", "_") for name in BAD_HOUSEHOLDER]
)
def test_bad_permutation_before_reflections_is_refused(bad: str) -> None:
    w, _, match = BAD_HARD[bad]
    block = ours(HOUSEHOLDER)
    w = w[..., 0, 0] if w.dim() == 4 and w.shape[-1] == 1 else w
    assert_refused(
        block,
        {**other_state(block), "w_0": w},
        match.replace("w_perm", "w_0").replace(r"\(5, 5, 1, 1\)", r"\(5, 5\)"),
    )


def assert_computes_like(block: nn.Module, stock: nn.Module, case: Case) -> None:
    """Both directions, NaN where the other has it."""
    x, c = make_input(case)
    for rev in (False, True):
        (y,), logdet = block([x], c, rev=rev)
        (expected,), expected_logdet = stock([x], c, rev=rev)
        # ones that are off by up to 4 eps(float64) may count as ones; beyond that the matrix itself
        # is taken
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(logdet, expected_logdet, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("odd", ODD, ids=[name.replace(" ", "_") for name in ODD])
@pytest.mark.parametrize("case", [HARD, SOFT], ids=["hard", "soft"])
def test_any_matrix_loads_and_is_computed_with(case: Case, odd: str) -> None:
    """As the stock block does: with the matrix itself, or within its rounding with the permutation
    that it is.
    """
    w, w_inv, warning = ODD[odd]
    block, stock = ours(case), make_block(reference.AllInOneBlock, case)
    state = {**other_state(block), "w_perm": w.double(), "w_perm_inv": w_inv.double()}
    with pytest.warns(UserWarning, match=warning) if warning else warnings.catch_warnings():
        if not warning:
            warnings.simplefilter("error")
        block.load_state_dict(state)
    stock.load_state_dict(state)
    assert_computes_like(block, stock, case)


@pytest.mark.parametrize(
    "odd", [name for name in ODD if name not in ("inverse of another", "of two rotations")]
)
def test_any_matrix_loads_before_reflections(odd: str) -> None:
    w, _, _ = ODD[odd]
    block, stock = ours(SOFT_HOUSEHOLDER), make_block(reference.AllInOneBlock, SOFT_HOUSEHOLDER)
    state = {**other_state(block), "w_0": w.double().flatten(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block.load_state_dict(state)
    stock.load_state_dict(state)
    assert_computes_like(block, stock, SOFT_HOUSEHOLDER)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16], ids=str)
@both_dialects
def test_a_permutation_matrix_of_another_dtype_loads(dtype: torch.dtype, dialect: str) -> None:
    block = ours(HARD, dialect=dialect)
    block.load_state_dict(
        {
            **other_state(block),
            "w_perm": hard(GOOD).to(dtype),
            "w_perm_inv": hard(INVERSE).to(dtype),
        }
    )
    assert block._index.permutation(block).perm.tolist() == GOOD


def test_means_of_checkpoints_stay_permutations() -> None:
    """Of ten float32 checkpoints, each a tenth: the ones carry rounding, and the index is taken all
    the same.
    """
    block = ours(HARD, dtype=torch.float32)
    state = {
        key: sum(value * (1 / 10) for _ in range(10)) for key, value in block.state_dict().items()
    }
    assert not torch.equal(state["w_perm"], block.w_perm)
    expected = block.w_perm.flatten(1).argmax(1)
    block.load_state_dict(state)
    permutation = block._index.permutation(block)
    assert isinstance(permutation, IndexPermutation)
    assert torch.equal(permutation.perm, expected)
    freia = ours(HARD, dtype=torch.float32, dialect="freia")
    freia.load_state_dict(state)
    assert torch.equal(freia.w_perm, expected)


@pytest.mark.parametrize(
    "odd", [name for name in ODD if name not in ("mean of ten", "inverse of another")]
)
def test_an_index_has_no_room_for_another_matrix(odd: str) -> None:
    """In dialect "freia" a hard block holds an index."""
    w, w_inv, _ = ODD[odd]
    block = ours(HARD, dialect="freia")
    assert_refused(
        block,
        {**other_state(block), "w_perm": w, "w_perm_inv": w_inv},
        "w_perm is not a permutation",
    )


def test_an_index_with_another_inverse_loads_with_a_warning() -> None:
    block = ours(HARD, dialect="freia")
    state = {**other_state(block), "w_perm": torch.tensor(GOOD), "w_perm_inv": torch.tensor(GOOD)}
    with pytest.warns(UserWarning, match="not the inverse"):
        block.load_state_dict(state)
    assert_equal_states(contents(block), state)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_rotation_in_low_precision_is_accepted(dtype: torch.dtype) -> None:
    """Orthogonal to what its dtype can say: a checkpoint in half precision is no error."""
    case = Case(Shape(2, 48), "soft")
    state = ours(case, dtype=dtype).state_dict()
    block = ours(case, seed=1)
    block.load_state_dict(state)
    assert torch.equal(block.w_perm.to(dtype), state["w_perm"])


@both_dialects
def test_strict_names_what_is_missing_and_what_is_too_much(dialect: str) -> None:
    block = ours(HARD, dialect=dialect)
    state = block.state_dict()
    missing = {key: value for key, value in state.items() if key != "w_perm_inv"}
    with pytest.raises(RuntimeError, match='Missing key.*"w_perm_inv"'):
        block.load_state_dict(missing)
    with pytest.raises(RuntimeError, match='Unexpected key.*"w_0"'):
        block.load_state_dict({**state, "w_0": state["w_perm"]})
    found = block.load_state_dict({**missing, "w_0": state["w_perm"]}, strict=False)
    assert found.missing_keys == ["w_perm_inv"]
    assert found.unexpected_keys == ["w_0"]


# --- one half of a pair ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("given", ["w_perm", "w_perm_inv"])
@pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
@both_dialects
def test_one_of_the_pair_brings_the_other(
    case: Case, given: str, assign: bool, dialect: str
) -> None:
    source, block = ours(case, 3, dialect=dialect), ours(case, 4, dialect=dialect)
    kept = contents(block)
    other = "w_perm_inv" if given == "w_perm" else "w_perm"
    found = block.load_state_dict({given: source.state_dict()[given]}, strict=False, assign=assign)
    assert other in found.missing_keys
    assert given not in found.missing_keys
    for name in (given, other):
        assert torch.equal(block.state_dict()[name], source.state_dict()[name]), name
    assert_equal_states(
        {key: value for key, value in contents(block).items() if "perm" not in key},
        {key: value for key, value in kept.items() if "perm" not in key},
    )
    x, c = make_input(case)
    with torch.no_grad():
        (y,), _ = block([x], c)
        (back,), _ = block([y], c, rev=True)
    assert (back - x).abs().max() < 1e-12


@kinds
def test_a_state_without_the_permutation_leaves_it(case: Case) -> None:
    block = ours(case)
    kept = contents(block)
    state = {key: value for key, value in other_state(block).items() if not key.startswith("w_")}
    block.load_state_dict(state, strict=False)
    for key, value in contents(block).items():
        assert torch.equal(value, kept[key] if key.startswith("w_") else state[key]), key


# --- copies and files -----------------------------------------------------------------------------


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "torch.save": blocks.through_a_file,
}


@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@kinds
def test_copies(case: Case, method: str, used: bool) -> None:
    """Also after a pass with gradients: the stock Householder block holds on to its graph then,
    which cannot be copied.
    """
    block = ours(case)
    if used:
        x, c = make_input(case)
        (y,), logdet = block([x], c)
        (y.sum() + logdet.sum()).backward()
        block([x], c, rev=True)
    made = COPIES[method](block)
    assert type(made) is AllInOneBlock
    assert_equal_states(made.state_dict(), block.state_dict())
    assert [p.requires_grad for p in made.parameters()] == [
        p.requires_grad for p in block.parameters()
    ]
    assert not {p.data_ptr() for p in made.parameters()} & {
        p.data_ptr() for p in block.parameters()
    }
    for a, e in zip(results(made, case), results(block, case), strict=True):
        assert torch.equal(a, e)
    kept = contents(block)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert_equal_states(contents(block), kept)


@kinds
@both_dialects
def test_state_goes_through_a_file(case: Case, dialect: str) -> None:
    block, other = ours(case, 1, dialect=dialect), ours(case, 2, dialect=dialect)
    state = through_a_file(block.state_dict())
    other.load_state_dict(state, strict=True)
    assert_equal_states(other.state_dict(), block.state_dict())
    for a, e in zip(results(other, case), results(block, case), strict=True):
        assert torch.equal(a, e)


@kinds
@pytest.mark.parametrize("source", DIALECTS)
@both_dialects
def test_assign(case: Case, source: str, dialect: str) -> None:
    state, block = ours(case, 1, dialect=source).state_dict(), ours(case, 2, dialect=dialect)
    expected = ours(case, 3, dialect=dialect)
    expected.load_state_dict(state)
    flags = {name: p.requires_grad for name, p in block.named_parameters()}
    block.load_state_dict(state, assign=True)
    assert_equal_states(block.state_dict(), expected.state_dict())
    assert {name: p.requires_grad for name, p in block.named_parameters()} == flags
    assert block.global_offset.data_ptr() == state["global_offset"].data_ptr()
    for a, e in zip(results(block, case), results(expected, case), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("case", [HARD, SOFT, HOUSEHOLDER], ids=["hard", "soft", "hh"])
def test_block_that_was_built_on_the_meta_device_loads(case: Case) -> None:
    state = ours(case, 1).state_dict()
    with torch.device("meta"):
        block = AllInOneBlock(case.dims_in, case.dims_c, make_subnet(case.rank), **case.options)
    assert block.global_scale.is_meta
    block.load_state_dict(state, assign=True)
    assert_equal_states(block.state_dict(), state)
    assert_same_results(block, ours(case, 1), case)


@kinds
def test_conversion_of_the_dtype_keeps_the_permutation(case: Case) -> None:
    block = ours(case)
    state = block.state_dict()
    for convert in (nn.Module.float, nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        convert(block)
        name = "w_0" if "w_0" in state else "w_perm"
        if is_hard(case):
            assert torch.equal(block.state_dict()[name].double(), state[name])
        assert block.state_dict()[name].dtype == block.global_scale.dtype


def test_hook_that_renames_keys_is_honoured() -> None:
    """torch calls it before the block loads, and what it changes in the state dict counts for the
    subnet too.
    """
    block, source = ours(HARD, 1), ours(HARD, 2)
    state = {
        key.replace("subnet.", "net.").replace("global_", ""): value
        for key, value in source.state_dict().items()
    }

    def rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in list(state_dict):
            new = (
                key.replace("net.", "subnet.")
                if key.startswith("net.")
                else f"global_{key}"
                if key in ("scale", "offset")
                else key
            )
            state_dict[new] = state_dict.pop(key)

    block.register_load_state_dict_pre_hook(rename)
    block.load_state_dict(state, strict=True)
    assert_equal_states(block.state_dict(), source.state_dict())


# --- FrEIA ----------------------------------------------------------------------------------------

ISINSTANCE = """
import sys
import torch
from fastflow_kernels import AllInOneBlock, InvertibleModule
assert not any(name.split(".")[0] in ("FrEIA", "scipy") for name in sys.modules), "importing the package must not import FrEIA"
make = lambda: AllInOneBlock([(4,)], subnet_constructor=torch.nn.Linear)
before = make()
state = before.state_dict()
assert not any(name.split(".")[0] == "FrEIA" for name in sys.modules)
import FrEIA.modules, FrEIA.framework
after = make()
assert isinstance(after, FrEIA.modules.InvertibleModule) and isinstance(before, FrEIA.modules.InvertibleModule)
assert isinstance(after, InvertibleModule) and isinstance(after, AllInOneBlock) and isinstance(before, InvertibleModule)
assert isinstance(InvertibleModule([(4,)]), FrEIA.modules.InvertibleModule)
assert not isinstance(torch.nn.Linear(1, 1), InvertibleModule)
after.load_state_dict(state)
x = torch.randn(3, 4)
for rev in (False, True):
    (y,), j = after([x], rev=rev)
    (z,), k = before([x], rev=rev)  # built before, works after
    assert torch.equal(y, z) and torch.equal(j, k)
make()
"""


@pytest.mark.peers
def test_freia_is_adopted_once_it_is_there() -> None:
    subprocess.run([sys.executable, "-c", ISINSTANCE], cwd=ROOT, check=True, timeout=100)


@pytest.mark.peers
def test_freias_sequence_takes_our_block() -> None:
    """By its class, and as an instance, which is what SequenceINN asks FrEIA's base class for."""
    framework = freia().framework
    stock, own = framework.SequenceINN(6, 3, 3), framework.SequenceINN(6, 3, 3)
    for sequence, cls in ((stock, freia_block()), (own, AllInOneBlock)):
        torch.manual_seed(1)
        for cond in (None, 0):
            sequence.append(
                cls,
                cond=cond,
                cond_shape=(2, 3, 3),
                subnet_constructor=make_subnet(2),
                permute_soft=True,
            )
        sequence.double()
    own.load_state_dict(stock.state_dict())
    x, c = (
        torch.randn(2, 6, 3, 3, dtype=torch.float64),
        [torch.randn(2, 2, 3, 3, dtype=torch.float64)],
    )
    for rev in (False, True):
        expected, actual = stock(x, c, rev=rev), own(x, c, rev=rev)
        for a, e in zip(actual, expected, strict=True):
            # two blocks of sums of 6 and 54 terms
            assert (a - e).abs().max() <= 1000 * EPS * max(1.0, e.abs().max().item())


@pytest.mark.peers
def test_freias_containers_take_instances() -> None:
    framework, modules = freia().framework, freia().modules
    block = AllInOneBlock([(6,)], subnet_constructor=make_subnet(0))
    assert isinstance(block, modules.InvertibleModule)
    own = framework.SequenceINN(6)
    own.append(lambda dims_in, **_: block)
    x = torch.randn(3, 6)
    z, logdet = own(x)
    (expected,), expected_logdet = block([x])
    assert torch.equal(z, expected)
    assert torch.equal(logdet, expected_logdet)
    start = framework.InputNode(6, name="in")
    node = framework.Node(
        start, AllInOneBlock, {"subnet_constructor": make_subnet(0)}, name="block"
    )
    graph = framework.GraphINN([start, node, framework.OutputNode(node)])
    z, logdet = graph(x)
    (expected,), expected_logdet = node.module([x])
    assert torch.equal(z, expected)
    assert torch.equal(logdet, expected_logdet)
    back, _ = graph(z, rev=True)
    assert (back - x).abs().max() < 1e-4
    assert [type(module) for module in graph.module_list] == [AllInOneBlock]


def test_index_layout_in_the_other_dialect_warns() -> None:
    """It was saved by FrEIA's main branch, whose formula is not this block's, unless the clamp is
    1.
    """
    state = AllInOneBlock([(6,)], subnet_constructor=nn.Linear, dialect="freia").state_dict()
    with pytest.warns(UserWarning, match="w_perm is stored as an index.*dialect='freia'"):
        AllInOneBlock([(6,)], subnet_constructor=nn.Linear).load_state_dict(state)
    for options in ({"affine_clamping": 1.0}, {"dialect": "freia"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AllInOneBlock([(6,)], subnet_constructor=nn.Linear, **options).load_state_dict(state)


@pytest.mark.parametrize("value", [None, np.eye(6)], ids=["none", "numpy"])
def test_permutation_that_is_no_tensor_is_refused(value: Any) -> None:
    block = AllInOneBlock([(6,)], subnet_constructor=nn.Linear)
    assert_refused(
        block,
        {**AllInOneBlock([(6,)], subnet_constructor=nn.Linear).state_dict(), "w_perm": value},
        "w_perm to be a tensor",
    )


def test_rotations_differ_even_if_nothing_else_is_drawn() -> None:
    """The rotation's own generator is seeded by torch's, which only the subnets advance."""

    def two() -> list[Tensor]:
        torch.manual_seed(0)
        return [
            AllInOneBlock(
                [(6,)], permute_soft=True, subnet_constructor=lambda i, o: nn.Identity()
            ).w_perm
            for _ in range(2)
        ]

    first, second = two()
    assert not torch.allclose(first, second, atol=1e-3)
    assert all(map(torch.equal, two(), (first, second)))
    with torch.device("meta"):
        assert AllInOneBlock([(6,)], permute_soft=True, subnet_constructor=nn.Linear).w_perm.is_meta


@pytest.mark.parametrize("shape", [Shape(3, 6), Shape(3, 6, (2, 2))], ids=str)
@pytest.mark.parametrize("name", ["hard", "soft", "soft-rev-exp"])
def test_matrices_that_are_trained_get_their_gradients(name: str, shape: Shape) -> None:
    """Either of them, in both directions; also a one-hot one, where it is no index any more."""
    case, x = Case(shape, name), torch.randn(shape.full, dtype=torch.float64)
    theirs = make_block(reference.AllInOneBlock, case)
    for trained in ("w_perm", "w_perm_inv"):
        for rev in (False, True):
            ours = make_block(AllInOneBlock, case)
            ours.load_state_dict(theirs.state_dict())
            ours([x], rev=rev)  # what is kept of the permutation is of matrices that are fixed
            gradients = []
            for block in (ours, copy.deepcopy(theirs)):
                getattr(block, trained).requires_grad_(True)
                block([x], rev=rev)[0][0].square().sum().backward()
                gradients.append(getattr(block, trained).grad)
            assert (gradients[0] is None) == (gradients[1] is None), (trained, rev)
            if gradients[1] is not None:
                torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["hard", "soft", "hh1", "hh2-soft-sigmoid"])
def test_parameters_can_be_swapped(name: str) -> None:
    """Nothing that is kept may be a view of them."""
    block = make_block(AllInOneBlock, Case(Shape(2, 6, (2, 2)), name), torch.float32)
    x = torch.randn(2, 6, 2, 2)
    with torch.no_grad():  # a graph would hold them as well
        expected = block([x])[0][0]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        block.double().load_state_dict(copy.deepcopy(block.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(block([x.double()])[0][0].float(), expected)


def test_a_rotation_that_is_transposed_where_it_lies_is_seen() -> None:
    block = make_block(AllInOneBlock, Case(Shape(2, 6, (2, 2)), "soft"), torch.float32)
    x = torch.randn(2, 6, 2, 2)
    block([x])
    for w in (block.w_perm, block.w_perm_inv):
        w.data = w.data.transpose(0, 1)
    torch.testing.assert_close(block([x])[0][0], copy.deepcopy(block)([x])[0][0])
