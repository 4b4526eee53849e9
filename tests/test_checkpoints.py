"""Test checkpoints, copies and seeds.

Checkpoints are tested for layouts, keys and strictness, and into and out of the peers. FrEIA's
containers are tested too.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import AllInOneBlock
from tests.support import blocks
from tests.support.blocks import contents
from tests.support.cases import (
    DIALECTS,
    Case,
    Shape,
    both_dialects,
    ids,
    make_block,
    make_input,
    make_subnet,
)
from tests.support.checkpoints import (
    CASES,
    EPS,
    HARD,
    HOUSEHOLDER,
    SOFT,
    SOFT_HOUSEHOLDER,
    assert_equal_states,
    assert_same_results,
    each_case,
    is_hard,
    kinds,
    make_our_block,
    one_hot,
    results,
)
from tests.support.peers import anomalib_block, freia, freia_block
from tests.support.stock_blocks import released

pytestmark = pytest.mark.usefixtures("fused")


# --- layouts --------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"]
)
@both_dialects
def test_state_dict_is_in_the_dialects_layout(case: Case, dtype: torch.dtype, dialect: str) -> None:
    block = make_our_block(case, dtype=dtype, dialect=dialect)
    stock = make_block(reference.AllInOneBlock, case, dtype, seed=5, dialect=dialect)
    state, expected = block.state_dict(), stock.state_dict()
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
        {"flow": nn.ModuleList([make_our_block(HARD, seed, dialect=dialect) for seed in range(2)])}
    )
    state = model.state_dict()
    assert [key for key in state if "w_perm" in key] == [
        f"flow.{i}.{name}" for i in range(2) for name in ("w_perm", "w_perm_inv")
    ]
    target = nn.ModuleDict(
        {"flow": nn.ModuleList([make_our_block(HARD, seed, dialect=dialect) for seed in (7, 8)])}
    )
    target.load_state_dict(state)
    assert_equal_states(target.state_dict(), state)


@kinds
@pytest.mark.parametrize("source", DIALECTS)
@pytest.mark.parametrize("target", DIALECTS)
def test_either_layout_loads_into_either_dialect(case: Case, source: str, target: str) -> None:
    stock = make_block(reference.AllInOneBlock, case, seed=3, dialect=source)
    state = stock.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    block = make_our_block(case, seed=4, dialect=target)
    block.load_state_dict(state, strict=True)
    assert_equal_states(state, before)  # the caller's state dict is unchanged
    expected = make_block(reference.AllInOneBlock, case, seed=4, dialect=target)
    if source == target:
        expected.load_state_dict(state)
        assert_equal_states(block.state_dict(), state)
    else:
        expected.load_state_dict(
            {key: value for key, value in state.items() if "perm" not in key}, strict=False
        )
        for name in ("w_perm", "w_perm_inv"):
            if name in state:
                w = state[name]
                if is_hard(case):
                    w = (
                        w.view(w.shape[:2]).argmax(1)
                        if w.dim() > 1
                        else one_hot(w, case.rank, torch.float64)
                    )
                getattr(expected, name).data = w.clone()
        assert_equal_states(block.state_dict(), expected.state_dict())
    assert_same_results(block, expected, case)


@pytest.mark.parametrize(
    "case", [SOFT, SOFT_HOUSEHOLDER, HOUSEHOLDER], ids=["soft", "hh-soft", "hh"]
)
@pytest.mark.parametrize("form", ["index", "matrix"])
def test_hard_permutation_loads_into_any_block(case: Case, form: str) -> None:
    """A permutation is also a rotation, or a product of reflections."""
    block = make_our_block(case)
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
    stock = make_block(reference.AllInOneBlock, case)
    stock.load_state_dict(block.state_dict())
    assert_same_results(block, stock, case)


# --- the peers ------------------------------------------------------------------------------------


@released
@each_case
def test_checkpoints_go_into_and_out_of_the_peers(case: Case, peer: Callable[[], type]) -> None:
    stock, block = make_block(peer(), case, seed=3), make_our_block(case, seed=4)
    block.load_state_dict(stock.state_dict(), strict=True)
    assert_equal_states(block.state_dict(), stock.state_dict())
    assert_same_results(block, stock, case)
    source = make_our_block(case, seed=6)
    stock.load_state_dict(source.state_dict(), strict=True)
    assert_equal_states(stock.state_dict(), source.state_dict())
    assert_same_results(source, stock, case)
    freia_dialect = make_our_block(case, seed=7, dialect="freia")
    freia_dialect.load_state_dict(stock.state_dict(), strict=True)
    again = make_our_block(case, seed=8)
    again.load_state_dict(freia_dialect.state_dict(), strict=True)
    assert_equal_states(again.state_dict(), stock.state_dict())


@released
@each_case
def test_optimizer_state_of_a_stock_block_loads(case: Case, peer: Callable[[], type]) -> None:
    """The state goes by the parameters' order, so that the next step is the stock block's."""
    stock, block = make_block(peer(), case, seed=3), make_our_block(case, seed=4)
    assert [name for name, _ in block.named_parameters()] == [
        name for name, _ in stock.named_parameters()
    ]
    assert [p.requires_grad for p in block.parameters()] == [
        p.requires_grad for p in stock.parameters()
    ]
    optimizers = [torch.optim.Adam(b.parameters(), lr=1e-2) for b in (stock, block)]

    def step(b: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        x, c = make_input(case)
        optimizer.zero_grad()
        (y,), logdet = b([x], c)
        (y.square().sum() - logdet.sum()).backward()
        optimizer.step()

    step(stock, optimizers[0])
    block.load_state_dict(stock.state_dict())
    # Copy it, because the optimizers would share its tensors otherwise.
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for b, optimizer in zip((stock, block), optimizers, strict=True):
        step(b, optimizer)
    # Adam's step lr * m / sqrt(v) has the gradient's relative error. That is at most 1e-12 for
    # gradients above 1e-2 (they are of order 1), and unknown for rounding noise.
    for (name, p), expected in zip(block.named_parameters(), stock.parameters(), strict=True):
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
        # The stock block draws its rotation from NumPy, so only the rotation differs.
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
    """A used block can be copied too.

    The stock Householder block keeps its graph after a pass with gradients, and a graph cannot be
    copied.
    """
    block = make_our_block(case)
    if used:
        x, c = make_input(case)
        (y,), logdet = block([x], c)
        (y.sum() + logdet.sum()).backward()
        block([x], c, rev=True)
    copied = COPIES[method](block)
    assert type(copied) is AllInOneBlock
    assert_equal_states(copied.state_dict(), block.state_dict())
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in block.parameters()
    ]
    assert not {p.data_ptr() for p in copied.parameters()} & {
        p.data_ptr() for p in block.parameters()
    }
    for a, e in zip(results(copied, case), results(block, case), strict=True):
        assert torch.equal(a, e)
    before = contents(block)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert_equal_states(contents(block), before)


@kinds
@both_dialects
def test_state_goes_through_a_file(case: Case, dialect: str) -> None:
    block, target = (
        make_our_block(case, 1, dialect=dialect),
        make_our_block(case, 2, dialect=dialect),
    )
    state = through_a_file(block.state_dict())
    target.load_state_dict(state, strict=True)
    assert_equal_states(target.state_dict(), block.state_dict())
    for a, e in zip(results(target, case), results(block, case), strict=True):
        assert torch.equal(a, e)


@kinds
@pytest.mark.parametrize("source", DIALECTS)
@both_dialects
def test_assign(case: Case, source: str, dialect: str) -> None:
    state, block = (
        make_our_block(case, 1, dialect=source).state_dict(),
        make_our_block(case, 2, dialect=dialect),
    )
    expected = make_our_block(case, 3, dialect=dialect)
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
    state = make_our_block(case, 1).state_dict()
    with torch.device("meta"):
        block = AllInOneBlock(case.dims_in, case.dims_c, make_subnet(case.rank), **case.options)
    assert block.global_scale.is_meta
    block.load_state_dict(state, assign=True)
    assert_equal_states(block.state_dict(), state)
    assert_same_results(block, make_our_block(case, 1), case)


@kinds
def test_conversion_of_the_dtype_keeps_the_permutation(case: Case) -> None:
    block = make_our_block(case)
    state = block.state_dict()
    for convert in (nn.Module.float, nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        convert(block)
        name = "w_0" if "w_0" in state else "w_perm"
        if is_hard(case):
            assert torch.equal(block.state_dict()[name].double(), state[name])
        assert block.state_dict()[name].dtype == block.global_scale.dtype


def test_hook_that_renames_keys_is_honoured() -> None:
    """The hook runs before the block loads, and its changes reach the subnet too."""
    block, source = make_our_block(HARD, 1), make_our_block(HARD, 2)
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


@pytest.mark.peers
def test_freias_sequence_takes_our_block() -> None:
    """SequenceINN takes our class like the stock class, and gives the same results."""
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
            # The tolerance is for two blocks with sums of 6 and 54 terms.
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


def test_rotations_differ_even_if_nothing_else_is_drawn() -> None:
    """The rotation's generator is seeded from torch's, which usually only the subnets advance."""

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
    """Either matrix is trained, in both directions; a trained one-hot matrix is not an index."""
    case, x = Case(shape, name), torch.randn(shape.full, dtype=torch.float64)
    stock = make_block(reference.AllInOneBlock, case)
    for trained in ("w_perm", "w_perm_inv"):
        for rev in (False, True):
            block = make_block(AllInOneBlock, case)
            block.load_state_dict(stock.state_dict())
            block([x], rev=rev)  # caches the permutation while its matrices are not trained
            gradients = []
            for b in (block, copy.deepcopy(stock)):
                getattr(b, trained).requires_grad_(True)
                b([x], rev=rev)[0][0].square().sum().backward()
                gradients.append(getattr(b, trained).grad)
            assert (gradients[0] is None) == (gradients[1] is None), (trained, rev)
            if gradients[1] is not None:
                torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["hard", "soft", "hh1", "hh2-soft-sigmoid"])
def test_parameters_can_be_swapped(name: str) -> None:
    """No cached tensor may be a view of the parameters."""
    block = make_block(AllInOneBlock, Case(Shape(2, 6, (2, 2)), name), torch.float32)
    x = torch.randn(2, 6, 2, 2)
    with torch.no_grad():  # a graph would hold the parameters too
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
