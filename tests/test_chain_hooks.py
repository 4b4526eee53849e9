"""Accelerated chains of FrEIA: hooks, changed blocks, errors and copies, as block by block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from fastflow_kernels import AllInOneBlock, accelerate, report, restore
from tests.support.blocks import Function, through_a_file, unwrapped
from tests.support.cases import Case, Shape, both_directions, make_block
from tests.support.chains import (
    SHAPE,
    accelerated,
    append,
    assert_like_stock,
    called_one_by_one,
    inputs_of_chain,
    loss_of,
    runs_seen,
    stock_chain,
)
from tests.support.graph import reversible_blocks
from tests.support.peers import freia, freia_block
from tests.support.small_inputs import plain_and_fused
from tests.support.stock_blocks import stock_block

pytestmark = pytest.mark.peers

Run = Callable[[Any], Any]


def outcome(run: Run, chain: Any) -> Any:
    """Return a chain's results, or the error's type and message."""
    try:
        return run(chain)
    except Exception as error:
        return [base for base in type(error).__mro__ if base is not object], str(error)


def assert_equal(actual: Any, expected: Any) -> None:
    """Assert that two trees are equal, and tensors up to rounding."""
    assert type(actual) is type(expected), (actual, expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert actual.requires_grad == expected.requires_grad
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), (actual, expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        assert_equal(list(actual.values()), list(expected.values()))
    else:
        assert actual == expected


def assert_as_one_by_one(stock: Any, run: Run) -> Any:
    """Assert that a run of an accelerated chain does what it does if blocks are called one by one.

    Returns:
        The results, or the error's types and message.
    """
    chain = accelerated(stock)
    one_by_one = called_one_by_one(chain)
    actual, expected = outcome(run, chain), outcome(run, one_by_one)
    assert_equal(actual, expected)
    return actual


def results_of(chain: Any, x: Tensor, rev: bool = False, *conditions: Any) -> list[Any]:
    """Return the output, the log-determinant and all gradients."""
    chain.zero_grad()
    x = x.detach().requires_grad_()
    z, log_det = chain(x, *conditions, rev=rev)
    loss_of(z, log_det).backward()
    return [z, log_det, x.grad, [p.grad for p in chain.parameters()]]


# --- hooks ----------------------------------------------------------------------------------------


class Log(list[Any]):
    """What hooks have seen."""

    def takes(self, name: str) -> Callable[..., None]:
        """Return a hook that notes its arguments, without the module."""

        def note(module: Any, *arguments: Any) -> None:
            # copies, because FrEIA's block multiplies the subnet's output in place
            copies = tree_map_only(Tensor, torch.clone, arguments)
            self.append((name, type(module).__name__.removeprefix("Accelerated"), *copies))

        return note


HOOKS: dict[str, Callable[[Any, Log], Any]] = {
    "pre": lambda m, log: m.register_forward_pre_hook(log.takes("pre")),
    "pre with kwargs": lambda m, log: m.register_forward_pre_hook(
        log.takes("pre"), with_kwargs=True
    ),
    "forward": lambda m, log: m.register_forward_hook(log.takes("forward")),
    "forward with kwargs": lambda m, log: m.register_forward_hook(
        log.takes("forward"), with_kwargs=True
    ),
    "always": lambda m, log: m.register_forward_hook(log.takes("always"), always_call=True),
    "backward": lambda m, log: m.register_full_backward_hook(log.takes("backward")),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(log.takes("backward")),
    "changes the output": lambda m, log: m.register_forward_hook(
        lambda _, x, out: ((2.0 * out[0][0],), out[1] + 1.0)
    ),
    "changes the input": lambda m, log: m.register_forward_pre_hook(
        lambda _, x: ((0.5 * x[0][0],),)
    ),
}
WHERE: dict[str, Callable[[Any], list[nn.Module]]] = {
    "first": lambda chain: [chain.module_list[0]],
    "middle": lambda chain: [chain.module_list[2]],
    "last": lambda chain: [chain.module_list[4]],
    "all": lambda chain: list(chain.module_list),
    "subnets": lambda chain: [block.subnet for block in chain.module_list],
    "chain": lambda chain: [chain],
}
RUNS = {"first": [4], "middle": [2, 2], "last": [4], "all": [], "subnets": [5], "chain": [5]}


@plain_and_fused
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_see_what_they_see_in_the_stock_chain(name: str, where: str, small: int) -> None:
    if name.startswith("changes") and where in ("subnets", "chain"):
        return
    stock, (x, _) = stock_chain(*["hard"] * 5), inputs_of_chain()
    if where == "subnets" and name.startswith("backward"):  # the stock block forbids them
        stock = called_one_by_one(accelerated(stock))
    seen = []
    for chain in (accelerated(stock), stock):
        log = Log()
        hooks = [HOOKS[name](module, log) for module in WHERE[where](chain)]
        with runs_seen() as lengths:
            results = results_of(chain, x)
        assert lengths == ([] if chain is stock else RUNS[where])
        assert log or name.startswith("changes")
        for hook in hooks:
            hook.remove()
        log_before = list(log)
        with runs_seen() as lengths:
            results += results_of(chain, x)
        assert lengths == ([] if chain is stock else [5])
        assert log == log_before
        seen.append([results, log_before])
    assert_equal(*seen)


GLOBAL = {
    "forward": torch_modules.register_module_forward_hook,
    "pre": torch_modules.register_module_forward_pre_hook,
    "backward": torch_modules.register_module_full_backward_hook,
    "backward pre": torch_modules.register_module_full_backward_pre_hook,
}


@plain_and_fused
@pytest.mark.parametrize("name", GLOBAL)
def test_global_hooks(name: str, small: int) -> None:
    """They see the same modules, except FrEIA's Softplus, which a fused block does not call."""
    stock, (x, _) = stock_chain(*["hard"] * 3), inputs_of_chain()
    if name.startswith("backward"):  # the stock block forbids them for its subnet
        stock = called_one_by_one(accelerated(stock))
    seen = []
    for chain in (accelerated(stock), stock):
        log = Log()
        hook = GLOBAL[name](log.takes(name))
        try:
            results = results_of(chain, x)
        finally:
            hook.remove()
        seen.append([results, [entry for entry in log if entry[1] != "Softplus"]])
    assert len(seen[0][1]) == 3 * 2 + 1
    assert_equal(*seen)


class Calls(nn.Module):
    """A module that counts calls, and is one of a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Any, c: Any = "none", rev: bool = False, jac: bool = True) -> Any:
        self.seen.append((len(x), c, rev, jac))
        return x, x[0].new_zeros(len(x[0]))


def test_other_modules_get_the_same_arguments() -> None:
    x, c = inputs_of_chain()
    stock = stock_chain("hard", "hard")
    append(stock, Calls())
    append(stock, Calls(), 1)
    for rev, jac in ((False, True), (True, False)):
        chain = accelerated(stock)
        chain(x, c, rev=rev, jac=jac)
        first, second = (module.seen for module in chain.module_list[2:])
        assert first == [(1, "none", rev, jac)]
        ((size, (condition,), *flags),) = second
        assert (size, flags) == (1, [rev, jac])
        assert condition is c[1]


# --- blocks that are changed ----------------------------------------------------------------------


def give_own_forward(chain: Any) -> None:
    block = chain.module_list[1]
    forward = block.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        (y,), log_det = forward(*args, **kwargs)
        return (2.0 * y,), log_det

    block.forward = doubled


def replace_step(chain: Any) -> None:
    block = chain.module_list[1]
    affine = block._affine
    block._affine = lambda x, a, rev=False: affine(x, 0.5 * a, rev)


def replace_class(chain: Any) -> None:
    block = chain.module_list[1]
    cls: Any = type(block)

    class Called(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            (y,), log_det = super().__call__(*args, **kwargs)
            return (2.0 * y,), log_det

    block.__class__ = Called


def override_forward(chain: Any) -> None:
    block = chain.module_list[1]
    cls: Any = type(block)

    class Overriding(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            (y,), log_det = super().forward(*args, **kwargs)
            return (2.0 * y,), log_det

    block.__class__ = Overriding


def rotate(chain: Any) -> None:
    w = torch.eye(6, dtype=torch.float64).roll(1, 0)
    chain.module_list[1].w_perm.data.copy_(w.view(6, 6, 1, 1))
    chain.module_list[1].w_perm_inv.data.copy_(w.T.view(6, 6, 1, 1))


def clamp_all(chain: Any) -> None:
    for block in chain.module_list:
        block.clamp = 0.9


def load(chain: Any) -> None:
    others = stock_chain(*["hard"] * 5)
    others.module_list = others.module_list[1:]
    chain.load_state_dict(others.state_dict())


class Times(nn.Module):
    def forward(self, g: Tensor) -> Tensor:
        return 1.5 * g


def register(chain: Any) -> None:
    for block in chain.module_list[1:]:
        parametrize.register_parametrization(block, "global_scale", Times())


CHANGES: dict[str, tuple[Callable[[Any], object], list[int]]] = {
    "own forward": (give_own_forward, [2]),
    "own step": (replace_step, [2]),
    "own call": (replace_class, [2]),
    "own class": (override_forward, [2]),
    "clamp": (lambda chain: setattr(chain.module_list[1], "clamp", 0.9), [2]),
    "tensor clamp": (
        lambda chain: setattr(chain.module_list[1], "clamp", torch.tensor(0.9).double()),
        [2],
    ),
    "every clamp": (clamp_all, [4]),
    "gin": (lambda chain: setattr(chain.module_list[1], "GIN", True), [2]),
    "w_perm": (rotate, [4]),
    "load": (load, [4]),
    "parametrized": (register, []),
    "taken out": (lambda chain: chain.module_list.__setitem__(1, Calls()), [2]),
    "compiled": (lambda chain: chain.module_list[1].compile(backend="eager"), [2]),
    "integer scale": (
        lambda chain: setattr(chain.module_list[1], "global_scale", nn.Parameter(torch.ones(6))),
        [2],
    ),
}


@plain_and_fused
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_calls(name: str, small: int) -> None:
    change, runs = CHANGES[name]
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    chain = accelerated(stock)
    with runs_seen() as lengths:
        before = chain(x)
    assert lengths == [4]
    one_by_one = called_one_by_one(chain)
    for model in (chain, one_by_one, stock):
        change(model)
    with runs_seen() as lengths:
        after = outcome(lambda model: results_of(model, x), chain)
    assert lengths == runs
    assert_equal(after, outcome(lambda model: results_of(model, x), one_by_one))
    if name not in ("integer scale", "taken out"):
        assert_equal(after[:2], outcome(lambda model: results_of(model, x)[:2], stock))
    assert name in ("compiled", "integer scale") or not torch.equal(after[0], before[0])


@pytest.mark.parametrize(
    "change", [give_own_forward, override_forward, replace_step, replace_class]
)
def test_changes_of_a_block_of_our_class(change: Callable[[Any], None], fused: None) -> None:
    x, _ = inputs_of_chain()
    ours = freia().framework.SequenceINN(*SHAPE.full[1:])
    for seed in range(4):
        append(ours, make_block(AllInOneBlock, Case(SHAPE, "hard"), seed=seed))
    chain = accelerated(ours)
    for model in (ours, chain):
        change(model)
    with runs_seen() as lengths:
        actual = results_of(chain, x)
    assert lengths == [2]
    assert_equal(actual, results_of(ours, x))


@plain_and_fused
def test_one_block_in_two_places_and_alone(small: int) -> None:
    stock = stock_chain("hard", "hard", "hard")
    append(stock, stock.module_list[0])
    append(stock, stock.module_list[1])
    x, c = inputs_of_chain()
    assert_like_stock(stock, x, c)
    assert_like_stock(stock, x, c, rev=True)
    chain = accelerated(stock)
    with runs_seen() as lengths:
        (y,), log_det = chain.module_list[0]((x,))
    assert not lengths
    assert_equal([y, log_det], list(unwrapped(stock.module_list[0]((x,)))))
    part = chain[:2]  # FrEIA 0.2 makes a ModuleList of a slice
    assert type(part) is nn.ModuleList


@plain_and_fused
@both_directions
def test_chains_in_chains(small: int, rev: bool) -> None:
    outer, inner = stock_chain("hard", "hard"), stock_chain(*["soft"] * 3, force_tuple_output=True)
    append(outer, inner)
    for block in stock_chain("rev", "rev").module_list:
        append(outer, block)
    chain, (x, _) = accelerated(outer), inputs_of_chain()
    with runs_seen() as lengths:
        actual = chain(x, rev=rev)
    assert lengths == [2, 3, 2]
    assert_equal(actual, outer(x, rev=rev))


def test_a_subnet_that_is_a_chain(fused: None) -> None:
    """The scratch memory of the inner chain is that of the outer one."""
    stock = stock_chain(*["hard"] * 3)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = stock_chain(*["hard"] * 2, shape=Shape(2, 3, (3, 5)))

        def forward(self, x: Tensor) -> Tensor:
            z, log_det = self.chain(x)
            return torch.cat((z, z * log_det.view(-1, 1, 1, 1)), 1)

    for block in stock.module_list:
        block.subnet = Inner()
    x, _ = inputs_of_chain()
    with runs_seen() as lengths:
        actual = results_of(accelerated(stock), x)
    assert lengths == [3, 2, 2, 2]
    assert_equal(actual, results_of(stock, x))


@plain_and_fused
def test_dropout_draws_the_same(small: int) -> None:
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    for block in stock.module_list:
        block.subnet = nn.Sequential(nn.Dropout(0.5), block.subnet)

    def run(chain: Any) -> Any:
        torch.manual_seed(3)
        return results_of(chain, x)

    assert_equal(assert_as_one_by_one(stock, run), run(stock))


# --- errors ---------------------------------------------------------------------------------------


def writes(x: Tensor) -> Tensor:
    x.mul_(2.0)
    return torch.cat((x, x), 1)


SUBNETS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x,
    "integers": lambda x: torch.ones_like(torch.cat((x, x), 1), dtype=torch.int64),
    "None": lambda x: None,
    "tuple": lambda x: (torch.cat((x, x), 1),),
    "device": lambda x: torch.cat((x, x), 1).to("meta"),
    "raises": lambda x: [][1],
    "ignores": lambda x: torch.full_like(torch.cat((x, x), 1), 0.3).detach(),
    "detaches": lambda x: torch.cat((x, x), 1).detach(),
    "NaN": lambda x: torch.full_like(torch.cat((x, x), 1), torch.nan),
    "float": lambda x: torch.cat((x, x), 1).float(),
    "half": lambda x: torch.cat((x, x), 1).half(),
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "transposed": lambda x: torch.cat((x, x), 1).mT.contiguous().mT,
    "channels-last": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last),
}


@both_directions
@plain_and_fused
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("name", SUBNETS)
def test_unusual_subnets(name: str, place: int, small: int, rev: bool) -> None:
    """Nothing stays behind of a call that fails."""
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    chain = accelerated(stock)
    one_by_one = called_one_by_one(chain)
    before, state = results_of(chain, x, rev)[:2], copy.deepcopy(chain.state_dict())
    results = []
    for model in (chain, one_by_one):
        block = model.module_list[place]
        subnet, block.subnet = block.subnet, Function(SUBNETS[name])
        results.append(outcome(lambda model: results_of(model, x, rev), model))
        with torch.no_grad():
            results.append(outcome(lambda model: list(model(x, rev=rev)), model))
        block.subnet = subnet
    assert_equal(results[:2], results[2:])
    assert_equal(results_of(chain, x, rev)[:2], before)
    assert all(torch.equal(t, state[key]) for key, t in chain.state_dict().items())


@plain_and_fused
@both_directions
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_subnets_that_write_to_their_input(mode: str, place: int, small: int, rev: bool) -> None:
    """They fail as one by one, or act as in the stock chain."""
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    stock.module_list[place].subnet = Function(writes)
    modes: Any = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
    chain = accelerated(stock)
    results = []

    def run(chain: Any) -> Any:
        # what the subnet writes to, or a leaf, which it must not write to
        read = x.clone().requires_grad_() if mode == "grad" else x.clone()
        return [t.clone() for t in chain(read, rev=rev)]

    for model in (chain, called_one_by_one(chain), stock):
        with modes.get(mode, torch.inference_mode)():
            results.append(outcome(run, model))
    actual, expected, of_stock = results
    if isinstance(expected[0], Tensor):
        assert_equal(actual, expected)
        assert_equal(actual, of_stock)
        return
    assert actual[0][0] is expected[0][0] is RuntimeError
    assert "modified inplace" in actual[1] or "changed its input in place" in actual[1]


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None,
    "two": lambda x: [x, x],
    "channels": lambda x: x[:, :5],
    "rank": lambda x: x[0],
    "complex": lambda x: x.to(torch.complex128),
    "sparse": lambda x: x.to_sparse(),
    "nothing": lambda x: [],
    "integers": lambda x: (10 * x).long(),
    "bool": lambda x: x > 0,
    "float32": lambda x: x.float(),
    "float16": lambda x: x.half(),
    "no pixels": lambda x: x[..., :0],
    "list": lambda x: [x],
    "parameter": nn.Parameter,
}


@both_directions
@plain_and_fused
@pytest.mark.parametrize("name", WRONG)
def test_unusual_inputs(name: str, small: int, rev: bool) -> None:
    x = WRONG[name](inputs_of_chain()[0])
    assert_as_one_by_one(
        stock_chain(*["hard"] * 3), lambda chain: [t.detach() for t in chain(x, rev=rev)]
    )


CONDITIONS: dict[str, Callable[[list[Tensor]], Any]] = {
    "None": lambda c: None,
    "empty": lambda c: [],
    "one": lambda c: c[:1],
    "channels": lambda c: [c[0], c[0]],
    "batch": lambda c: [c[0], c[1][:1]],
    "no tensor": lambda c: [c[0], 1],
    "meta": lambda c: [c[0], c[1].to("meta")],
    "integers": lambda c: [c[0], c[1].long()],
    "float32": lambda c: [c[0], c[1].float()],
    "tuple": tuple,
    "dictionary": lambda c: {1: c[1]},
}


@both_directions
@plain_and_fused
@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("names", [("cond",) * 3, ("hard", "hard", "cond")])
def test_unusual_conditions(names: tuple[str, ...], name: str, small: int, rev: bool) -> None:
    x, c = inputs_of_chain()
    c = CONDITIONS[name](c)
    assert_as_one_by_one(stock_chain(*names), lambda chain: list(chain(x, c, rev=rev)))


def test_a_condition_that_its_block_does_not_declare(fused: None) -> None:
    x, c = inputs_of_chain()
    stock = stock_chain("hard", "hard", "hard")
    stock.conditions = [None, 1, 1]
    assert_equal(list(accelerated(stock)(x, c)), list(stock(x, c)))


def test_chains_without_modules_and_more_conditions(fused: None) -> None:
    x, _ = inputs_of_chain()
    assert_as_one_by_one(stock_chain(), lambda chain: list(chain(x)))
    stock = stock_chain("hard", "hard", force_tuple_output=True)
    stock.conditions.append(None)
    (z,), log_det = accelerated(stock)([x])
    assert_equal([z, log_det], list(unwrapped(stock(x))))


@both_directions
def test_a_module_without_an_entry_of_conditions(rev: bool, fused: None) -> None:
    x, _ = inputs_of_chain()
    stock = stock_chain(*["hard"] * 4)
    stock.conditions.pop()
    types, _ = assert_as_one_by_one(stock, lambda chain: list(chain(x, rev=rev)))
    assert types[0] is IndexError


# --- copies ---------------------------------------------------------------------------------------


@plain_and_fused
def test_copies_and_files(small: int) -> None:
    stock, (x, _) = stock_chain("hard", "hard", "soft", "soft"), inputs_of_chain()
    chain = accelerated(stock)
    expected = results_of(stock, x)
    for copied in (
        copy.deepcopy(chain),
        copy.copy(chain),
        pickle.loads(pickle.dumps(chain)),
        through_a_file(chain),
    ):
        assert type(copied) is type(chain)
        copied.zero_grad()
        assert_equal(results_of(copied, x), expected)
        restore(copied)
        assert type(copied) is type(stock)


@plain_and_fused
def test_accelerate_again_reversible_and_restore(small: int) -> None:
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    chain = copy.deepcopy(stock)
    identities = [id(p) for p in chain.parameters()]
    expected = results_of(stock, x)

    def check(lengths_expected: list[int], reversible: int) -> None:
        chain.zero_grad()
        with runs_seen() as lengths:
            results = results_of(chain, x)
        assert lengths == lengths_expected
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)
        assert reversible_blocks(results[0]) == reversible
        assert [id(p) for p in chain.parameters()] == identities
        assert chain.state_dict().keys() == stock.state_dict().keys()

    for _ in range(2):
        assert accelerate(chain) is chain
        assert isinstance(chain, freia().framework.SequenceINN)
        (entry,) = report(chain).chains
        assert "run together" in entry.reason
        check([4], 0)
    accelerate(chain, reversible=True)
    (entry,) = report(chain).chains
    assert (entry.changed, "4 of its 4 modules" in entry.reason) == (True, True)
    check([], 4)
    with torch.no_grad(), runs_seen() as lengths:
        chain(x)
        chain(x, rev=True)
    assert lengths == [4, 4]
    restore(chain)
    assert type(chain) is type(stock)
    assert all(type(block) is freia_block() for block in chain.module_list)
    check([], 0)


def test_reversible_chains_run_together_in_the_inverse(fused: None) -> None:
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    chain = accelerate(copy.deepcopy(stock), reversible=True)
    with runs_seen() as lengths:
        actual = results_of(chain, x, True)
    assert lengths == [4]
    assert_equal(actual, results_of(stock, x, True))


def test_one_block_alone_in_a_chain(fused: None) -> None:
    chain = accelerated(stock_chain("hard"))
    append(chain, accelerate(stock_block(freia_block, Case(SHAPE, "soft"))))
    with runs_seen() as lengths:
        chain(inputs_of_chain()[0])
    assert lengths == []


# --- changes in the middle of a call --------------------------------------------------------------


class Changing(nn.Module):
    """A subnet that first does something else."""

    def __init__(self, subnet: nn.Module, change: Callable[[], object]) -> None:
        super().__init__()
        self.subnet, self.change = subnet, change

    def forward(self, x: Tensor) -> Tensor:
        self.change()
        return self.subnet(x)


@torch.no_grad()
def add_to_scale(block: Any) -> None:
    block.global_scale += 0.5


def double_output(_: Any, x: Any, out: Any) -> Any:
    return (2.0 * out[0][0],), out[1]


IN_THE_PASS: dict[str, Callable[[Any], object]] = {
    "scale": add_to_scale,
    "scale.data": lambda block: block.global_scale.data.add_(0.5),
    "another scale": lambda block: setattr(
        block, "global_scale", nn.Parameter(1.5 * block.global_scale.detach())
    ),
    "clamp": lambda block: setattr(block, "clamp", 0.5 * block.clamp),
    "hook": lambda block: block.register_forward_hook(double_output),
    "own forward": lambda block: setattr(block, "forward", lambda x, **_: (x, x[0][:, 0, 0, 0])),
    "subnet": lambda block: setattr(
        block, "subnet", Function(lambda x: torch.cat((x, x), 1).tanh())
    ),
    "offset": lambda block: block.global_offset.data.add_(0.5),
}


@plain_and_fused
@pytest.mark.parametrize("name", IN_THE_PASS)
def test_a_subnet_changes_a_block_that_runs_later(name: str, small: int) -> None:
    """A run reads its blocks before the first subnet, so the change counts from the next call."""
    stock, (x, _) = stock_chain(*["hard"] * 4), inputs_of_chain()
    chain = accelerated(stock)
    second, last = chain.module_list[1], chain.module_list[3]
    subnet = second.subnet
    second.subnet = Changing(subnet, lambda: IN_THE_PASS[name](last))
    before = chain(x)
    second.subnet = subnet
    one_by_one = called_one_by_one(chain)
    after = chain(x)
    assert_equal(list(after), list(one_by_one(x)))
    assert not torch.equal(after[0], before[0]) or name in ("offset", "scale")


class Noisy(nn.Module):
    """A parametrization that draws random numbers."""

    def forward(self, g: Tensor) -> Tensor:
        return g + 0.1 * torch.randn_like(g)


@plain_and_fused
def test_a_parametrization_and_a_subnet_that_draw_random_numbers(small: int) -> None:
    stock, (x, _) = stock_chain(*["hard"] * 3), inputs_of_chain()

    def run(chain: Any) -> Any:
        chain = copy.deepcopy(chain)
        for block in chain.module_list:
            block.subnet = nn.Sequential(nn.Dropout(0.5), block.subnet)
            parametrize.register_parametrization(block, "global_scale", Noisy())
        torch.manual_seed(3)
        return list(chain(x))

    assert_as_one_by_one(stock, run)


@pytest.mark.parametrize("where", ["instance", "class", "everywhere"])
def test_a_replaced_call_impl(where: str, fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools that trace modules replace it."""
    stock, (x, _) = stock_chain(*["hard"] * 3), inputs_of_chain()
    called: list[str] = []
    call: Any = nn.Module._call_impl

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(type(self).__name__)
        return call(self, *args, **kwargs)

    def run(chain: Any) -> Any:
        called.clear()
        chain = copy.deepcopy(chain)
        block = chain.module_list[1]
        if where == "everywhere":
            monkeypatch.setattr(nn.Module, "_call_impl", spy)
        elif where == "class":
            block.__class__ = type(type(block).__name__, (type(block),), {"_call_impl": spy})
        else:
            block._call_impl = lambda *args, **kwargs: spy(block, *args, **kwargs)
        results = list(chain(x))
        monkeypatch.undo()
        return [results, [name for name in called if name.endswith("Block")]]

    assert_as_one_by_one(stock, run)


def test_a_scale_that_changes_before_the_backward_pass(fused: None) -> None:
    """Autograd raises an error, as after an optimizer's step between the passes."""
    stock, (x, _) = stock_chain(*["hard"] * 3), inputs_of_chain()

    def run(chain: Any) -> Any:
        loss = loss_of(*chain(x))
        add_to_scale(chain.module_list[1])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    run(stock)
    run(accelerated(stock))


class Wide(nn.Module):
    """A subnet that computes in float64, or in the dtype of its input."""

    def __init__(self, seed: int, is_wide: bool) -> None:
        super().__init__()
        self.is_wide = is_wide
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(6, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = x.double() if self.is_wide else x
        return torch.einsum("oi,bi...->bo...", self.w.to(x.dtype), x)


@plain_and_fused
@pytest.mark.parametrize("first", [0, 1, 2])
def test_subnets_that_widen_the_dtype(small: int, first: int) -> None:
    """All that follows is computed in float64, the scales of later blocks included."""
    stock = stock_chain(*["hard"] * 4, dtype=torch.float32)
    for seed, block in enumerate(stock.module_list):
        block.subnet = Wide(seed, seed >= first)
    x, _ = inputs_of_chain(dtype=torch.float32)

    def run(chain: Any) -> Any:
        z, log_det = chain(x)
        assert (z.dtype, log_det.dtype) == (torch.float64, torch.float64)
        return [z, log_det] if first == 0 else [z]  # earlier blocks round theirs to float32

    assert_as_one_by_one(stock, run)
