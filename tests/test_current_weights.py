"""Test that a call permutes by its current weights, in eager mode and in recorded graphs.

The weights are exchanged, loaded, broadcast or passed in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import reference
from fastflow_kernels import AllInOneBlock, accelerate, predicates
from fastflow_kernels.permutations import IndexPermutation
from tests.support.blocks import TakesTensor
from tests.support.cases import Case, Shape, both_directions, make_block, make_input
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.usefixtures("fused", "fresh_compiler")

ROWS, PLANES = Shape(3, 6), Shape(3, 6, (3, 4))
CASES = [
    Case(ROWS, "hard"),
    Case(PLANES, "rev"),
    Case(PLANES, "hh1"),
    Case(ROWS, "soft"),
    Case(ROWS, "hard", "freia"),
    Case(PLANES, "rev", "freia"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
kinds = pytest.mark.parametrize("kind", ["ours", "accelerated"])


def make(kind: str, case: Case, seed: int = 0) -> nn.Module:
    block = make_block(
        AllInOneBlock if kind == "ours" else reference.AllInOneBlock,
        case,
        seed=seed,
        dialect=case.dialect,
    )
    if kind == "accelerated":
        accelerate(block)
    return block


def truth(block: nn.Module, case: Case, x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
    """Return the reference's results with the weights that the block holds now."""
    stock = make_block(reference.AllInOneBlock, case, dialect=case.dialect)
    with torch.no_grad():
        for name, p in stock.named_parameters():
            p.copy_(block.get_parameter(name))
    (y,), log_det = stock([x], rev=rev)
    return y, log_det


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# --- recorded graphs ------------------------------------------------------------------------------


def _trace(model: nn.Module, x: Tensor) -> nn.Module:
    # Tracing warns that it is deprecated, and that shapes are constants in it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(copy.deepcopy(model), (x,))


RECORDERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(copy.deepcopy(model), (x,)).module(),
    "strict export": lambda model, x: torch.export.export(
        copy.deepcopy(model), (x,), strict=True
    ).module(),
    "trace": _trace,
    "compile": lambda model, x: torch.compile(
        copy.deepcopy(model), fullgraph=True, backend="eager"
    ),
}


@cases
@kinds
@pytest.mark.parametrize("recorder", RECORDERS)
@both_directions
def test_a_recorded_block_takes_another_checkpoint(
    case: Case, kind: str, recorder: str, rev: bool
) -> None:
    model, source = (TakesTensor(make(kind, case, seed), rev) for seed in (0, 1))
    x, _ = make_input(case)
    with torch.no_grad():
        recorded = RECORDERS[recorder](model, x)
        assert_same(recorded(x), truth(model.block, case, x, rev))
        state = source.state_dict()
        # A strict export, also of a stock block, leaves out weights that the graph does not use.
        if recorder == "strict export":
            state = {key: value for key, value in state.items() if key in recorded.state_dict()}
        recorded.load_state_dict(
            {f"_orig_mod.{key}": value for key, value in state.items()}
            if "compile" in recorder
            else state
        )
        assert_same(recorded(x), truth(source.block, case, x, rev))


@cases
@kinds
@both_directions
def test_a_compiled_block_sees_what_is_written_past_it(case: Case, kind: str, rev: bool) -> None:
    """DDP's broadcast also writes through ``.data``, without calling a hook of the block."""
    block, source = make(kind, case, 0), make(kind, case, 1)
    x, _ = make_input(case)
    compiled = torch.compile(TakesTensor(block, rev), fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        for p, q in zip(block.parameters(), source.parameters(), strict=True):
            p.data.copy_(q)
        assert_same(compiled(x), truth(source, case, x, rev))


@cases
@kinds
@both_directions
def test_functional_call_in_a_graph(case: Case, kind: str, rev: bool) -> None:
    model, source = (TakesTensor(make(kind, case, seed), rev) for seed in (0, 1))
    x, _ = make_input(case)
    parameters = dict(source.named_parameters())

    def call(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(model, parameters, (x,))

    expected = truth(source.block, case, x, rev)
    with torch.no_grad():
        assert_same(torch.compile(call, backend="eager")(parameters, x), expected)
        assert_same(make_fx(call)(dict(model.named_parameters()), x)(parameters, x), expected)


@cases
@kinds
@both_directions
def test_a_compiled_ensemble(case: Case, kind: str, rev: bool) -> None:
    models = [TakesTensor(make(kind, case, seed), rev) for seed in range(3)]
    x, _ = make_input(case)
    with torch.no_grad():
        parameters, _ = stack_module_state(models)
        together = torch.compile(
            vmap(lambda p: functional_call(models[0], p, (x,))), backend="eager"
        )(parameters)
        for k, model in enumerate(models):
            assert_same((together[0][k], together[1][k]), truth(model.block, case, x, rev))


@pytest.mark.parametrize("recorder", RECORDERS)
@both_directions
def test_a_graph_of_a_permutation_raises_if_it_is_given_a_rotation(
    recorder: str, rev: bool
) -> None:
    """The graph holds a gather and cannot compute the rotation's product.

    A compiled block loads by its own method, and is compiled again.
    """
    case = Case(Shape(3, 6), "hard")
    model = TakesTensor(make("ours", case), rev)
    x, _ = make_input(case)
    w, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    with torch.no_grad():
        recorded = RECORDERS[recorder](model, x)
        state = {**model.state_dict(), "block.w_perm": w, "block.w_perm_inv": w.T}
        if "compile" in recorder:
            recorded.load_state_dict({f"_orig_mod.{key}": value for key, value in state.items()})
            model.load_state_dict(state)
            assert_same(recorded(x), truth(model.block, case, x, rev))
            # Write past every hook: the graph computes a product, and reads the new values.
            recorded._orig_mod.block.w_perm.data.copy_(-w)
            recorded._orig_mod.block.w_perm_inv.data.copy_(-w.T)
            model.block.w_perm.data.copy_(-w)
            model.block.w_perm_inv.data.copy_(-w.T)
            assert_same(recorded(x), truth(model.block, case, x, rev))
        else:
            recorded.load_state_dict(
                {key: value for key, value in state.items() if key in recorded.state_dict()}
            )
            with pytest.raises((RuntimeError, IndexError), match="out of"):
                recorded(x)


@kinds
def test_matrices_that_take_gradients_keep_them_when_compiled(kind: str) -> None:
    case = Case(Shape(3, 6), "hard")
    block = make(kind, case)
    block.w_perm.requires_grad_()
    x, _ = make_input(case)
    (y, _) = torch.compile(TakesTensor(block, False), fullgraph=True, backend="eager")(x)
    y.square().sum().backward()
    actual, block.w_perm.grad = block.w_perm.grad, None
    assert actual is not None
    block([x])[0][0].square().sum().backward()
    torch.testing.assert_close(actual, block.w_perm.grad)


@kinds
@both_directions
def test_a_pass_without_values_leaves_nothing_behind(kind: str, rev: bool) -> None:
    case = Case(Shape(3, 6), "hard")
    block = make(kind, case)
    x, _ = make_input(case)
    with torch.no_grad():
        expected = truth(block, case, x, rev)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake, _ = TakesTensor(block, rev)(mode.from_tensor(x))
        assert fake.shape == x.shape
        assert_same(TakesTensor(block, rev)(x), expected)


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Return a function that calls a block as if a CUDA graph were being captured.

    It returns the index and its inverse, which the graph knows by their addresses.
    """

    def capture(block: nn.Module, x: Tensor) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(predicates, "is_capturing", lambda t: True)
            block([x])
        cache = block._index if hasattr(block, "_index") else block._fastflow.index
        return list(cache._cached.index)

    return capture


@kinds
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("hard", "rev")], ids=str)
def test_a_captured_index_follows_the_weights(
    kind: str, case: Case, captured: Callable[..., list[Tensor]]
) -> None:
    """It stays where it is in memory, because a replay asks nobody."""
    block, source = make(kind, case, 0), make(kind, case, 1)
    x, _ = make_input(case)
    perm, inv = captured(block, x)
    block.load_state_dict(source.state_dict())
    expected = _permutation_of(source)
    assert torch.equal(perm, expected)
    assert torch.equal(inv, expected.argsort())
    other = make(kind, case, 2)
    with torch.no_grad():
        for p, q in zip(block.parameters(), other.parameters(), strict=True):
            p.copy_(q)
        block([x])  # a call finds out
    assert torch.equal(perm, _permutation_of(other))
    assert_same(TakesTensor(block, False)(x), truth(other, case, x, False))


def _permutation_of(block: nn.Module) -> Tensor:
    w = block.get_parameter("w_perm").detach()
    return w if w.dim() == 1 else w.flatten(1).argmax(1)


@kinds
def test_a_pending_backward_pass_notices_that_a_captured_index_changes(
    kind: str, captured: Callable[..., list[Tensor]]
) -> None:
    """As for a stock block, whose weights it has saved."""
    case = Case(PLANES, "hard")
    block, source = make(kind, case, 0), make(kind, case, 1)
    x, _ = make_input(case)
    captured(block, x)
    y, _ = TakesTensor(block, False)(x.requires_grad_())
    block.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@kinds
def test_a_captured_permutation_cannot_become_a_rotation(
    kind: str, captured: Callable[..., list[Tensor]]
) -> None:
    block = make(kind, Case(ROWS, "hard"))
    x, _ = make_input(Case(ROWS, "hard"))
    copied = copy.deepcopy(block)
    captured(block, x)
    w, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    state = {**block.state_dict(), "w_perm": w, "w_perm_inv": w.T}
    copied.load_state_dict(state)  # nobody has captured the copy
    with pytest.raises(RuntimeError, match="capture the graph again"):
        block.load_state_dict(state)


# --- eager mode -----------------------------------------------------------------------------------

PERMUTATION = [1, 2, 3, 4, 5, 0]


def _exchange(p: nn.Parameter, through: str) -> None:
    """Write another permutation into a parameter."""
    permutation = (
        torch.tensor(PERMUTATION)
        if p.dim() == 1
        else torch.eye(6, dtype=p.dtype)[PERMUTATION].view(p.shape)
    )
    if through == "data":
        p.data.copy_(permutation)
    elif through == "new data":
        p.data = permutation
    else:
        with torch.no_grad():
            p.copy_(permutation)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("hard", "rev")], ids=str)
@kinds
@pytest.mark.parametrize("through", ["data", "new data", "copy_"])
@pytest.mark.parametrize("name", ["w_perm", "w_perm_inv"])
@plain_and_fused
@both_directions
def test_one_matrix_exchanged_without_the_other(
    case: Case, kind: str, through: str, name: str, small: int, rev: bool
) -> None:
    """Results and gradients are those of the matrix in use, whatever the second matrix is."""
    block = make(kind, case)
    x, _ = make_input(case)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    block([x])  # fills the cache
    _exchange(getattr(block, name), through)
    results = TakesTensor(block, rev)(leaves[0]), truth(block, case, leaves[1], rev)
    assert_same(*results)
    for y, log_det in results:
        (y.sin().sum() + log_det.sum()).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("name", ["hard", "rev", "hh1"])
@pytest.mark.parametrize("written", ["beside", "beside, twice", "one"])
@pytest.mark.parametrize("channels", [7, 80])
@both_directions
@plain_and_fused
def test_values_written_past_the_version_are_seen(
    name: str, written: str, channels: int, rev: bool, small: int, dtype: torch.dtype
) -> None:
    """A value is written beside the ones, into a one, or as a pair that cancels in a sum."""
    case = Case(Shape(70, channels), name)
    block = make_block(AllInOneBlock, case, dtype)
    x, _ = make_input(case, dtype)
    TakesTensor(block, rev)(x)
    before = block._index.permutation(block, rev)
    assert isinstance(before.base if name == "hh1" else before, IndexPermutation)
    for w in (block.w_0,) if name == "hh1" else (block.w_perm, block.w_perm_inv):
        beside = (w == 0).nonzero()
        if written == "one":
            w.data[tuple((w == 1).nonzero()[3])] = 0.5
        else:
            w.data[tuple(beside[5])] = 0.25
        if "twice" in written:
            w.data[tuple(beside[9])] = -0.25
    stock = make_block(reference.AllInOneBlock, case)
    stock.load_state_dict({key: value.double() for key, value in block.state_dict().items()})
    y, log_det = TakesTensor(block, rev)(x)
    (expected,), expected_log_det = stock([x.double()], rev=rev)
    tolerance = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    tolerance = (
        64 * channels * torch.finfo(dtype).eps * max(1.0, expected_log_det.abs().max().item())
    )
    torch.testing.assert_close(log_det.double(), expected_log_det, rtol=0, atol=tolerance)
