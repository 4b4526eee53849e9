"""Test which permutations of a checkpoint load, and which are refused.

Any matrix loads that a stock block computes with. A refused checkpoint leaves nothing half-loaded.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import AllInOneBlock
from fastflow_kernels.permutations import IndexPermutation
from tests.support.blocks import contents
from tests.support.cases import (
    Case,
    Shape,
    both_dialects,
    make_block,
    make_input,
)
from tests.support.checkpoints import (
    HARD,
    HOUSEHOLDER,
    SOFT,
    SOFT_HOUSEHOLDER,
    assert_equal_states,
    kinds,
    make_our_block,
    one_hot,
)

pytestmark = pytest.mark.usefixtures("fused")


def rotation(channels: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    return q


def hard(index: list[int], rank: int = 2) -> Tensor:
    return one_hot(torch.tensor(index), rank, torch.float64)


GOOD = [2, 0, 1, 5, 3, 4]
INVERSE = [1, 2, 0, 4, 5, 3]

# w_perm, w_perm_inv and a pattern of the message, for a hard block of 6 channels and rank 2.
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


def mean_of_ten(w: Tensor) -> Tensor:
    """Return the mean of ten float32 checkpoints: a sum of tenths, which rounds."""
    mean = torch.zeros(w.shape)
    for _ in range(10):
        mean += 0.1 * w.float()
    return mean


# Matrices that a stock block loads and multiplies by: means of checkpoints, matrices trained by
# accident, and broken ones. The last entry is a pattern of the warning, if one is expected.
ELSEWHERE = 1e-3 * torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6, 1, 1)
ODD: dict[str, tuple[Tensor, Tensor, str | None]] = {
    "mean of ten": (
        mean_of_ten(hard(GOOD)),
        mean_of_ten(hard(INVERSE)),
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
        "not a rotation",
    ),
    "duplicate row": (hard([0, 0, 1, 2, 3, 4]), hard(INVERSE), "not a rotation"),
    "zeros": (torch.zeros(6, 6, 1, 1), torch.zeros(6, 6, 1, 1), "not a rotation"),
    "nan": (
        torch.full((6, 6, 1, 1), torch.nan),
        torch.full((6, 6, 1, 1), torch.nan),
        "not a rotation",
    ),
}


def assert_refused(block: nn.Module, state: dict[str, Tensor], match: str, **options: Any) -> None:
    """Assert that loading raises and leaves the block unchanged."""
    before, identities = contents(block), [id(p) for p in block.parameters()]
    with pytest.raises((ValueError, RuntimeError), match=match):
        block.load_state_dict(state, **options)
    assert [id(p) for p in block.parameters()] == identities
    assert_equal_states(contents(block), before)


def other_state(block: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that differs from the block's everywhere except in the permutation."""
    return {
        key: value if key.startswith("w_") else value + 1
        for key, value in block.state_dict().items()
    }


@pytest.mark.parametrize("bad", BAD_HARD, ids=[name.replace(" ", "_") for name in BAD_HARD])
@pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
@both_dialects
def test_bad_permutation_is_refused(bad: str, assign: bool, dialect: str) -> None:
    w, w_inv, match = BAD_HARD[bad]
    block = make_our_block(HARD, dialect=dialect)
    assert_refused(
        block, {**other_state(block), "w_perm": w, "w_perm_inv": w_inv}, match, assign=assign
    )


@pytest.mark.parametrize("bad", BAD_HARD, ids=[name.replace(" ", "_") for name in BAD_HARD])
def test_bad_permutation_is_refused_also_when_not_strict(bad: str) -> None:
    w, w_inv, match = BAD_HARD[bad]
    block = make_our_block(HARD)
    assert_refused(
        block, {**other_state(block), "w_perm": w, "w_perm_inv": w_inv}, match, strict=False
    )


BAD_HOUSEHOLDER = [name for name in BAD_HARD if "inverse" not in name]


@pytest.mark.parametrize(
    "bad", BAD_HOUSEHOLDER, ids=[name.replace(" ", "_") for name in BAD_HOUSEHOLDER]
)
def test_bad_permutation_before_reflections_is_refused(bad: str) -> None:
    w, _, match = BAD_HARD[bad]
    block = make_our_block(HOUSEHOLDER)
    w = w[..., 0, 0] if w.dim() == 4 and w.shape[-1] == 1 else w
    assert_refused(
        block,
        {**other_state(block), "w_0": w},
        match.replace("w_perm", "w_0").replace(r"\(5, 5, 1, 1\)", r"\(5, 5\)"),
    )


def assert_computes_like(block: nn.Module, stock: nn.Module, case: Case) -> None:
    """Assert that both directions agree, NaNs included."""
    x, c = make_input(case)
    for rev in (False, True):
        (y,), logdet = block([x], c, rev=rev)
        (expected,), expected_logdet = stock([x], c, rev=rev)
        # Values within 4 eps(float64) of one may count as ones. Beyond that, the matrix itself is
        # used.
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(logdet, expected_logdet, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("odd", ODD, ids=[name.replace(" ", "_") for name in ODD])
@pytest.mark.parametrize("case", [HARD, SOFT], ids=["hard", "soft"])
def test_any_matrix_loads_and_is_computed_with(case: Case, odd: str) -> None:
    """The block computes with the matrix itself, like the stock block.

    If the matrix is a permutation within rounding, the block uses the permutation.
    """
    w, w_inv, warning = ODD[odd]
    block, stock = make_our_block(case), make_block(reference.AllInOneBlock, case)
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
    block, stock = (
        make_our_block(SOFT_HOUSEHOLDER),
        make_block(reference.AllInOneBlock, SOFT_HOUSEHOLDER),
    )
    state = {**other_state(block), "w_0": w.double().flatten(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block.load_state_dict(state)
    stock.load_state_dict(state)
    assert_computes_like(block, stock, SOFT_HOUSEHOLDER)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16], ids=str)
@both_dialects
def test_a_permutation_matrix_of_another_dtype_loads(dtype: torch.dtype, dialect: str) -> None:
    block = make_our_block(HARD, dialect=dialect)
    block.load_state_dict(
        {
            **other_state(block),
            "w_perm": hard(GOOD).to(dtype),
            "w_perm_inv": hard(INVERSE).to(dtype),
        }
    )
    assert block._index.permutation(block).perm.tolist() == GOOD


def test_means_of_checkpoints_stay_permutations() -> None:
    """The ones of a mean of ten float32 checkpoints are rounded; the index is used all the same."""
    block = make_our_block(HARD, dtype=torch.float32)
    state = {
        key: sum(value * (1 / 10) for _ in range(10)) for key, value in block.state_dict().items()
    }
    assert not torch.equal(state["w_perm"], block.w_perm)
    expected = block.w_perm.flatten(1).argmax(1)
    block.load_state_dict(state)
    permutation = block._index.permutation(block)
    assert isinstance(permutation, IndexPermutation)
    assert torch.equal(permutation.perm, expected)
    freia = make_our_block(HARD, dtype=torch.float32, dialect="freia")
    freia.load_state_dict(state)
    assert torch.equal(freia.w_perm, expected)


@pytest.mark.parametrize(
    "odd", [name for name in ODD if name not in ("mean of ten", "inverse of another")]
)
def test_an_index_has_no_room_for_another_matrix(odd: str) -> None:
    """In dialect "freia", a hard block holds an index."""
    w, w_inv, _ = ODD[odd]
    block = make_our_block(HARD, dialect="freia")
    assert_refused(
        block,
        {**other_state(block), "w_perm": w, "w_perm_inv": w_inv},
        "w_perm is not a permutation",
    )


def test_an_index_with_another_inverse_loads_with_a_warning() -> None:
    block = make_our_block(HARD, dialect="freia")
    state = {**other_state(block), "w_perm": torch.tensor(GOOD), "w_perm_inv": torch.tensor(GOOD)}
    with pytest.warns(UserWarning, match="not the inverse"):
        block.load_state_dict(state)
    assert_equal_states(contents(block), state)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_rotation_in_low_precision_is_accepted(dtype: torch.dtype) -> None:
    """A rotation in half precision is orthogonal only to that precision, which is not an error."""
    case = Case(Shape(2, 48), "soft")
    state = make_our_block(case, dtype=dtype).state_dict()
    block = make_our_block(case, seed=1)
    block.load_state_dict(state)
    assert torch.equal(block.w_perm.to(dtype), state["w_perm"])


@both_dialects
def test_strict_names_what_is_missing_and_what_is_too_much(dialect: str) -> None:
    block = make_our_block(HARD, dialect=dialect)
    state = block.state_dict()
    missing = {key: value for key, value in state.items() if key != "w_perm_inv"}
    with pytest.raises(RuntimeError, match='Missing key.*"w_perm_inv"'):
        block.load_state_dict(missing)
    with pytest.raises(RuntimeError, match='Unexpected key.*"w_0"'):
        block.load_state_dict({**state, "w_0": state["w_perm"]})
    keys = block.load_state_dict({**missing, "w_0": state["w_perm"]}, strict=False)
    assert keys.missing_keys == ["w_perm_inv"]
    assert keys.unexpected_keys == ["w_0"]


def test_index_layout_in_the_other_dialect_warns() -> None:
    """FrEIA's main branch saved it, and its formula differs from this block's unless clamp is 1."""
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


# --- one half of a pair ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("loaded", ["w_perm", "w_perm_inv"])
@pytest.mark.parametrize("assign", [False, True], ids=["", "assign"])
@both_dialects
def test_one_of_the_pair_brings_the_other(
    case: Case, loaded: str, assign: bool, dialect: str
) -> None:
    source, block = (
        make_our_block(case, 3, dialect=dialect),
        make_our_block(case, 4, dialect=dialect),
    )
    before = contents(block)
    derived = "w_perm_inv" if loaded == "w_perm" else "w_perm"
    keys = block.load_state_dict({loaded: source.state_dict()[loaded]}, strict=False, assign=assign)
    assert derived in keys.missing_keys
    assert loaded not in keys.missing_keys
    for name in (loaded, derived):
        assert torch.equal(block.state_dict()[name], source.state_dict()[name]), name
    assert_equal_states(
        {key: value for key, value in contents(block).items() if "perm" not in key},
        {key: value for key, value in before.items() if "perm" not in key},
    )
    x, c = make_input(case)
    with torch.no_grad():
        (y,), _ = block([x], c)
        (back,), _ = block([y], c, rev=True)
    assert (back - x).abs().max() < 1e-12


@kinds
def test_a_state_without_the_permutation_leaves_it(case: Case) -> None:
    block = make_our_block(case)
    before = contents(block)
    state = {key: value for key, value in other_state(block).items() if not key.startswith("w_")}
    block.load_state_dict(state, strict=False)
    for key, value in contents(block).items():
        assert torch.equal(value, before[key] if key.startswith("w_") else state[key]), key
