"""accelerate makes FrEIA's coupling blocks and PermuteRandom fast, and changes nothing else."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastflow_kernels
from fastflow_kernels import accelerate, modules, report, restore
from tests.support import blocks
from tests.support.accelerated import assert_left, overriding
from tests.support.blocks import Results
from tests.support.cases import Shape, ids
from tests.support.coupling_blocks import (
    NAMES,
    Case,
    build,
    evaluate,
    make_input,
    make_subnet,
    softsign,
)
from tests.support.graphs import count_graphs
from tests.support.pairs import state_of
from tests.support.peers import freia
from tests.support.small_inputs import plain_and_fused

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("fused")]

EPS = torch.finfo(torch.float64).eps
SHAPE = Shape(3, 7, (3, 5))
AFFINE = [name for name in NAMES if name != "NICECouplingBlock"]
TWO_SIDED = [name for name in NAMES if name.endswith("CouplingBlock")]
FUNCTIONS = {"atan": "ATAN", "tanh": "TANH", "sigmoid": "SIGMOID"}
CASES = [Case(name, SHAPE, option) for option in FUNCTIONS for name in AFFINE]
CASES += [
    Case(name, shape, option)
    for shape, options in {
        SHAPE: ("split0.3", "split0", "splitC", "cond", "cond2-split0-tanh"),
        Shape(5, 12): ("atan", "cond"),
        Shape(3, 1): ("atan",),
        Shape(2, 5, (7,)): ("split1", "cond"),
        Shape(2, 4, (2, 3, 3)): ("tanh",),
    }.items()
    for option in options
    for name in NAMES
]
CASES += [Case(name, SHAPE, option) for option in ("clamp-1", "clamp0") for name in AFFINE]
every_class = pytest.mark.parametrize("name", NAMES)


def stock_block(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    return build(freia().modules, case, dtype, seed)


def pair(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Return an accelerated and a stock block with the same parameters."""
    block, stock = stock_block(case, dtype), stock_block(case, dtype)
    accelerate(block)
    assert state_of(block) == "accelerated", str(report(block))
    return block, stock


def results_or_error(block: nn.Module, case: Case, rev: bool) -> Results | Exception:
    try:
        return evaluate(block, *make_input(case), rev)
    except Exception as error:
        return error


def assert_same(block: nn.Module, stock: nn.Module, case: Case) -> None:
    """Assert that a block gives a stock block's results, gradients and errors.

    The bound is that of tests/support/pairs.py.
    """
    tolerance = 0.0 if state_of(block) != "accelerated" else 2000 * EPS
    for rev in (False, True):
        actual, expected = (results_or_error(b, case, rev) for b in (block, stock))
        if isinstance(expected, Exception):
            assert isinstance(actual, type(expected)), (actual, expected)
            continue
        assert not isinstance(actual, Exception), actual
        assert_same_results(actual, expected, tolerance)


def assert_same_results(actual: Results, expected: Results, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, e in expected.items():
        a = actual[key]
        if a is None or e is None:
            assert a is e, key
        elif e.numel():
            assert torch.equal(a.isnan(), e.isnan()), key
            a, e = a.nan_to_num(), e.nan_to_num()
            error, largest = (a - e).abs().max().item(), e.abs().max().clamp(min=1.0).item()
            assert error <= tolerance * largest, f"{key}: {error}"


# --- one block ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@plain_and_fused
def test_accelerated_block_gives_the_same(case: Case, small: int) -> None:
    block, stock = pair(case)
    cls = type(stock)
    assert isinstance(block, cls)
    assert_same(block, stock, case)
    x, c = make_input(case)
    with torch.no_grad():
        for rev in (False, True):
            actual, expected = (
                {"y": y, "log-det": torch.as_tensor(log_det)}
                for (y,), log_det in (b([x], c, rev=rev) for b in (block, stock))
            )
            assert_same_results(actual, expected, 2000 * EPS)
    assert restore(block) is block
    assert type(block) is cls
    assert_same(block, stock, case)


@pytest.mark.parametrize("option", FUNCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_report(name: str, option: str) -> None:
    block = stock_block(Case(name, SHAPE, option))
    words = f"an affine coupling with clamp function '{FUNCTIONS[option]}'"
    if name == "NICECouplingBlock":
        words = "an additive coupling, in plain operations"
    kind = f"FrEIA.modules.coupling_layers.{name}"
    (before,) = report(block).entries
    assert (before.kind, before.state, before.changed) == (kind, "left", False)
    assert before.reason == f"accelerate(model) would take it: computes {words}"
    assert str(report(block)).splitlines()[0] == "0 of 1 blocks run fused"
    (after,) = report(accelerate(block)).entries
    assert (after.kind, after.state, after.changed) == (kind, "accelerated", True)
    assert after.reason == f"computes {words}; backend 'auto'"
    assert str(report(block)).splitlines()[0] == "1 of 1 blocks run fused"
    assert "accelerated, " in repr(block)
    assert (FUNCTIONS[option] in repr(block)) == (name != "NICECouplingBlock")
    (eager,) = report(accelerate(block, backend="eager")).entries
    assert eager.reason == f"computes {words}; backend 'eager'"
    assert report(restore(block)).entries == (before,)


@every_class
def test_accelerated_block_is_fused(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case)
    for b in (block, stock, restore(copy.deepcopy(block))):
        with mock.patch.object(modules, "evaluate", wraps=modules.evaluate) as fused:
            b([make_input(case)[0]], make_input(case)[1])
        # NICE runs as it is, unless a reversible chain asks.
        assert fused.called == (b is block and name != "NICECouplingBlock")


@every_class
def test_everything_else_stays(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    block = stock_block(case).eval()
    next(block.parameters()).requires_grad_(False)
    block.register_buffer("more", torch.ones(2))
    block.register_forward_hook(lambda *_: None)
    next(block.children()).train()
    attributes, state = dict(vars(block)), copy.deepcopy(block.state_dict())
    metadata = vars(block.state_dict())["_metadata"]

    def contents() -> list[Any]:
        parameters = [
            (n, id(p), p._version, p.data_ptr(), p.requires_grad)
            for n, p in block.named_parameters()
        ]
        return [*parameters, *((n, id(m), m.training) for n, m in block.named_modules())]

    before = contents()
    for change in (accelerate, accelerate, restore):
        change(block)
        assert contents() == before
        after = block.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[key], value) for key, value in state.items())
        assert vars(after)["_metadata"] == metadata
        assert all(vars(block)[key] is value for key, value in attributes.items())
    assert vars(block) == attributes


def test_random_states_are_not_touched() -> None:
    model = graph()
    np.random.seed(3)

    def states() -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state(legacy=True)
        return torch.random.get_rng_state().tolist(), name, keys.tolist(), *rest, random.getstate()

    before = states()
    for change in (report, accelerate, report, accelerate, restore):
        change(model)
        assert states() == before


@every_class
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_made_before_keeps_working(name: str, optimizer: Any) -> None:
    case = Case(name, SHAPE, "cond")
    both = stock_block(case), stock_block(case)
    optimizers = [optimizer(b.parameters(), lr=1e-3) for b in both]
    accelerate(both[0])
    start = [p.detach().clone() for p in both[0].parameters()]
    for step in range(3):
        x, c = make_input(case, seed=step)
        for b, o in zip(both, optimizers, strict=True):
            o.zero_grad()
            (y,), log_det = b([x], c)
            ((0.5 * y.square().sum() - torch.as_tensor(log_det).sum()) / y.numel()).backward()
            o.step()
    for p, expected, old in zip(both[0].parameters(), both[1].parameters(), start, strict=True):
        assert (p - expected).abs().max() <= 1e-11
        assert (p - old).abs().max() > 1e-5


@every_class
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_still_fire(name: str) -> None:
    calls: list[str] = []
    case = Case(name, SHAPE, "cond")
    block = stock_block(case)
    block.register_forward_pre_hook(lambda *_: calls.append("pre"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    for child, subnet in block.named_children():
        subnet.register_forward_hook(lambda *_, child=child: calls.append(child))

    def calls_of_a_pass(rev: bool) -> list[str]:
        calls.clear()
        x, c = make_input(case)
        (y,), log_det = block([x.requires_grad_()], c, rev=rev)
        (y.sum() + torch.as_tensor(log_det).sum()).backward()
        return list(calls)

    expected = [calls_of_a_pass(rev) for rev in (False, True)]
    accelerate(block)
    assert len(calls) == len(expected[1]), "accelerate must not run the block itself"
    block.register_forward_hook(lambda *_: calls.append("later"))
    for rev in (False, True):
        actual = calls_of_a_pass(rev)
        assert [call for call in actual if call != "later"] == expected[rev]
        assert actual.index("later") == 1 + len(list(block.children()))
    assert ("backward" in actual) != case.preserves_volume  # autograd's hooks find the log-det.


class Dropping(nn.Sequential):
    """A subnet that computes something else in training."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        conv = nn.Conv2d(channels_in, channels_out, 1)
        super().__init__(conv, nn.BatchNorm2d(channels_out), nn.Dropout(0.5))


@every_class
def test_training_and_evaluation(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        cls = getattr(freia().modules, name)
        both.append(cls(case.dims_in, case.dims_c, subnet_constructor=Dropping).double())
    accelerate(both[0])
    x, c = make_input(case)
    for training in (True, False, True):
        outputs = []
        for b in both:
            torch.manual_seed(5)
            (y,), _ = b.train(training)([x], c)
            outputs.append(y)
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for buffer, expected in zip(both[0].buffers(), both[1].buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@every_class
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(name: str, assign: bool) -> None:
    case = Case(name, SHAPE, "cond")
    block, _ = pair(case)
    other = stock_block(case, seed=7)
    block.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign)
    assert_same(block, other, case)
    stock = stock_block(case, seed=8)
    stock.load_state_dict(block.state_dict(), strict=True)
    assert_same(block, stock, case)


def through_pickle(block: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(block))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": blocks.through_a_file,
}


@every_class
@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_copies(name: str, method: str, used: bool) -> None:
    """FrEIA's other clamp functions and NICE's are lambdas, which cannot be pickled."""
    is_file = method in ("pickle", "torch.save")
    if is_file and name == "NICECouplingBlock":
        pytest.skip("FrEIA's block holds a lambda")
    case = Case(name, SHAPE, "tanh" if is_file and name != "NICECouplingBlock" else "cond")
    block, stock = pair(case)
    if used:
        evaluate(block, *make_input(case))
    made = COPIES[method](block)
    assert type(made) is type(block)
    assert report(made) == report(block)
    assert_same(made, stock, case)
    if method != "copy":
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
        assert_same(block, stock, case)
        made.load_state_dict(stock.state_dict())
    restore(made)
    assert type(made) is type(stock)
    assert state_of(block) == "accelerated", "restoring a copy must not restore the original"
    assert_same(made, stock, case)


@every_class
def test_copy_is_accelerated_apart(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    stock = stock_block(case)
    for copied in (copy.deepcopy(stock), copy.copy(stock)):
        assert report(accelerate(copied)).changed
        assert not report(stock).changed
        assert_same(copied, stock, case)


@every_class
def test_twice_and_back(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case)
    accelerated, after = type(block), report(block)
    for _ in range(2):
        assert report(accelerate(block)) == after
        assert type(block) is accelerated
        assert_same(block, stock, case)
        for _ in range(2):
            assert type(restore(block)) is type(stock)


@every_class
def test_benign_subclass_is_accelerated(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    stock: Any = getattr(freia().modules, name)

    class Named(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.title = "one"

    block = Named(case.dims_in, case.dims_c, subnet_constructor=make_subnet(2)).double()
    twin = stock_block(case)
    twin.load_state_dict(block.state_dict())
    assert report(accelerate(block)).entries[0].kind.endswith("Named")
    assert (block.title, isinstance(block, Named)) == ("one", True)
    assert_same(block, twin, case)
    assert type(restore(block)) is Named


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case, dtype)
    x, c = make_input(case, dtype)
    for rev in (False, True):
        (y,), _ = block([x], c, rev=rev)
        (expected,), _ = stock([x], c, rev=rev)
        assert y.dtype is dtype
        atol = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(y, expected, rtol=0.0, atol=atol)
    assert_same(block.double(), stock.double(), case)


@pytest.mark.parametrize("name", ["NICECouplingBlock", "RNVPCouplingBlock", NAMES[-1]])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(name: str) -> None:
    """What is exchanged later takes effect in a compiled call, too."""
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case)
    compiled = torch.compile(block.__call__, backend="aot_eager", fullgraph=True)
    x, c = make_input(case)

    def assert_compiled_is_stock(*directions: bool) -> None:
        for rev in directions:
            (y,), log_det = compiled([x], c, rev=rev)
            (expected,), expected_log_det = stock([x], c, rev=rev)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(log_det, expected_log_det, rtol=1e-12, atol=1e-12)

    assert_compiled_is_stock(False, True)
    assert count_graphs() == 2
    for attribute, value in {"clamp": 0.7, "f_clamp": torch.tanh}.items():
        for b in (block, stock):
            setattr(b, attribute, value)
        assert_compiled_is_stock(False)


# --- containers -----------------------------------------------------------------------------------


def sequence() -> nn.Module:
    """Make a SequenceINN of all classes, each with another permutation after it."""
    model = freia().framework.SequenceINN(6, 3, 4)
    torch.manual_seed(4)
    for seed, name in enumerate(NAMES):
        options = {"subnet_constructor": make_subnet(2)}
        model.append(getattr(freia().modules, name), cond=0, cond_shape=(2, 3, 4), **options)
        model.append(freia().modules.PermuteRandom, seed=seed)
    return model.double()


def graph(net: str = "GraphINN") -> Any:
    """Make a graph with conditions, splits, and all classes."""
    framework, fm = freia().framework, freia().modules
    torch.manual_seed(4)
    options = {"subnet_constructor": make_subnet(2), "clamp": 1.2}
    start = framework.InputNode(6, 3, 4, name="in")
    condition = framework.ConditionNode(2, 3, 4, name="condition")
    nodes = [start, condition]

    def add(source: Any, module: Any, arguments: dict[str, Any], **more: Any) -> Any:
        nodes.append(framework.Node(source, module, arguments, name=module.__name__, **more))
        return nodes[-1]

    one = add(start, fm.GLOWCouplingBlock, options, conditions=condition)
    split = add(one, fm.Split, {"section_sizes": [2, 4], "dim": 0})
    permuted = add(split.out1, fm.PermuteRandom, {"seed": 2})
    tanh = {**options, "clamp_activation": "TANH"}
    two = add(permuted, fm.RNVPCouplingBlock, tanh, conditions=condition)
    sigmoid = {**options, "clamp_activation": "SIGMOID"}
    three = add(split.out0, fm.AffineCouplingOneSided, sigmoid)
    joined = add([three.out0, two.out0], fm.Concat, {"dim": 0})
    four = add(joined, fm.GINCouplingBlock, options)
    five = add(four, fm.NICECouplingBlock, {"subnet_constructor": make_subnet(2)})
    six = add(five, fm.ConditionalAffineTransform, options, conditions=condition)
    nodes.append(framework.OutputNode(six, name="out"))
    return getattr(framework, net)(nodes, verbose=False).double()


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "SequenceINN": (sequence, 12),
    "GraphINN": (graph, 7),
    "ReversibleGraphNet": (lambda: graph("ReversibleGraphNet"), 7),
}


@pytest.mark.filterwarnings("ignore:ReversibleGraphNet:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
@plain_and_fused
def test_models(kind: str, small: int) -> None:
    build_model, count = MODELS[kind]
    model = build_model()
    stock = copy.deepcopy(model)  # a graph orders its modules anew each time
    classes = [type(module) for module in model.modules()]
    after = report(accelerate(model))
    assert (len(after.changed), after.left) == (count, ())
    assert str(after).splitlines()[0] == f"{count} of {count} blocks run fused"
    x, c = torch.randn(3, 6, 3, 4).double(), [torch.randn(3, 2, 3, 4).double()]
    made = copy.deepcopy(model)
    for rev in (False, True):
        expected = blocks.evaluate(stock, x, c, rev, wrap=False)
        for m in (model, made):
            actual = blocks.evaluate(m, x, c, rev, wrap=False)
            assert_same_results(actual, expected, count * 2000 * EPS)
    z, log_det = model(x, c)
    torch.testing.assert_close(model(z, c, rev=True), (x, -log_det), rtol=1e-9, atol=1e-9)
    assert [type(module) for module in restore(model).modules()] == classes
    for rev in (False, True):
        actual, expected = (blocks.evaluate(m, x, c, rev, wrap=False) for m in (model, stock))
        assert_same_results(actual, expected, 0.0)


def test_what_a_graph_offers_beside_its_result() -> None:
    model = graph()
    stock = copy.deepcopy(model)
    accelerate(model)
    x, c = torch.randn(3, 6, 3, 4).double(), [torch.randn(3, 2, 3, 4).double()]
    actual, expected = (m(x, c, intermediate_outputs=True)[0] for m in (model, stock))
    by_name = [{(node.name, i): t for (node, i), t in out.items()} for out in (actual, expected)]
    assert by_name[0].keys() == by_name[1].keys()
    for key, value in by_name[1].items():
        torch.testing.assert_close(by_name[0][key], value, rtol=1e-12, atol=1e-12)
    numerical = model.log_jacobian_numerical(x, c)
    torch.testing.assert_close(numerical, model(x, c)[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x, c, jac=False)[0], stock(x, c)[0], rtol=1e-12, atol=1e-12)


def test_model_is_saved_and_loaded_as_a_whole() -> None:
    model = nn.Sequential(*(stock_block(Case(name, SHAPE, "tanh")) for name in AFFINE))
    accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert report(loaded) == report(model)
    restore(loaded)
    assert [type(block).__name__ for block in loaded] == AFFINE


# --- left alone -----------------------------------------------------------------------------------

SCALE = 0.636
CUSTOM: dict[str, tuple[Callable[[], Any], str]] = {
    "softsign": (lambda: softsign, "computes something else"),
    "clipped arctangent": (
        lambda: lambda u: 0.636 * torch.atan(u.clamp(-8.0, 8.0)),
        "computes something else",
    ),
    "arctangent with another factor": (
        lambda: lambda u: 0.6366 * torch.atan(u),
        "computes something else",
    ),
    "a global": (lambda: lambda u: SCALE * torch.atan(u), "reads variables around it"),
    "a closure": (lambda: (lambda k: lambda u: k * torch.atan(u))(0.636), "reads variables"),
    "a default": (lambda: lambda u, k=0.636: k * torch.atan(u), "reads variables"),
    "a module": (nn.Tanh, "reads its f_clamp"),
    "a bound method": (lambda: Bounded().clamp, "reads variables"),
}


class Bounded:
    """Something with a method that depends on its state."""

    factor = 0.636

    def clamp(self, u: Tensor) -> Tensor:
        return self.factor * torch.atan(u)


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("custom", CUSTOM)
def test_custom_clamp_function_is_left(name: str, custom: str) -> None:
    function, match = CUSTOM[custom]
    case = Case(name, SHAPE)
    cls = getattr(freia().modules, name)
    options = {"subnet_constructor": make_subnet(2), "clamp_activation": function()}
    assert_left(cls(case.dims_in, case.dims_c, **options), match)


@every_class
def test_known_clamp_function_of_ones_own_is_accelerated(name: str) -> None:
    case = Case(name, SHAPE)
    both = []
    for _ in range(2):
        both.append(stock_block(case))
        both[-1].f_clamp = lambda u: torch.atan(u) * 0.636
    assert report(accelerate(both[0])).changed
    assert_same(both[0], both[1], case)


@every_class
@pytest.mark.parametrize("step", ["forward", "_coupling1", "_coupling2"])
def test_overridden_step_is_left(name: str, step: str) -> None:
    case = Case(name, SHAPE)
    stock = getattr(freia().modules, name)
    cls = type("Mine", (stock,), overriding(step))
    options = {"subnet_constructor": make_subnet(2)}
    assert_left(cls(case.dims_in, case.dims_c, **options), f"Mine overrides {step}")
    derived = type("MineToo", (cls,), {})
    assert_left(derived(case.dims_in, case.dims_c, **options), f"MineToo overrides {step}")
    block = stock(case.dims_in, case.dims_c, **options)
    setattr(block, step, lambda *args, **kwargs: None)
    assert_left(block, f"{name} overrides {step}")


@every_class
def test_subnet_that_starts_in_place(name: str) -> None:
    """With a condition the subnet gets a copy, and the fused block computes the same.

    RNVP's two subnets of a side share that copy.
    """

    def subnet(channels_in: int, channels_out: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(channels_in, channels_out))

    cls = getattr(freia().modules, name)
    if name != "ConditionalAffineTransform":
        assert_left(cls([(6,)], subnet_constructor=subnet), "starts with an in-place operation")
    if name == "RNVPCouplingBlock":
        block = cls([(6,)], [(2,)], subnet_constructor=subnet)
        assert_left(block, "starts with an in-place operation, which the side's other sees")
        return
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        both.append(cls([(6,)], [(2,), (1,)], subnet_constructor=subnet).double())
    assert report(accelerate(both[0])).changed
    x, c = torch.randn(3, 6).double(), [torch.randn(3, n).double() for n in (2, 1)]
    for a, e in zip(*(b([x], c)[0] for b in both), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@every_class
@pytest.mark.parametrize("kind", ["tensor", "parameter", "nan", "complex"])
def test_clamp_that_is_no_number_is_left(name: str, kind: str) -> None:
    block = stock_block(Case(name, SHAPE))
    if kind == "parameter":
        del block.clamp
    block.clamp = {
        "tensor": torch.tensor(1.2),
        "parameter": nn.Parameter(torch.tensor(1.2)),
        "nan": float("nan"),
        "complex": 1.0 + 0j,
    }[kind]
    if kind == "parameter":
        block.clamp.requires_grad_()
    match = "clamp is a tensor" if kind in ("tensor", "parameter") else "is not a plain number"
    assert_left(block, match)


@every_class
def test_blocks_without_values_are_left(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, meta = stock_block(case), stock_block(case).to("meta")
    assert_left(meta, "on the meta device; accelerate it once they hold values")
    meta.load_state_dict(stock_block(case).state_dict(), assign=True)
    assert report(accelerate(meta)).changed
    assert_same(meta, stock_block(case), case)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert_left(block, "under FakeTensorMode or while tracing")
        cls = getattr(freia().modules, name)
        block = cls(case.dims_in, case.dims_c, subnet_constructor=make_subnet(2))
        assert_left(block, "under FakeTensorMode or while tracing")


class Old(nn.Module):
    """A GLOW block as FrEIA had it before there was a split_len."""

    def __init__(self, dims_in: Any, subnet_constructor: Any, clamp: float = 5.0) -> None:
        super().__init__()
        channels = dims_in[0][0]
        self.split_len1, self.clamp, self.conditional = channels // 2, clamp, False
        self.ndims, self.max_s = len(dims_in[0]), 1.0
        self.s1 = subnet_constructor(self.split_len1, 2 * (channels - self.split_len1))

    def forward(self, x: Any, c: Any = (), rev: bool = False) -> Any:
        a = self.s1(x[0][:, : self.split_len1])
        return [torch.cat((x[0][:, : self.split_len1], a), 1)]


@every_class
def test_old_class_of_the_same_name_is_left(name: str) -> None:
    block = type(name, (Old,), {})([(6,)], subnet_constructor=nn.Linear)
    assert_left(block, "could not be probed: AttributeError")


def other_maths(name: str, change: str) -> type:
    """Return a class of the same name, which changes a step of the stock block."""
    stock: Any = getattr(freia().modules, name)

    def run(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        small = change == "factor of 0.1"
        hooks = [m.register_forward_hook(lambda *a: 0.1 * a[-1]) for m in self.children() if small]
        (y,), log_det = stock.forward(self, x, c, rev=rev, jac=jac)
        for hook in hooks:
            hook.remove()
        if change == "sign of the log-determinant":
            log_det = 1.0 - log_det
        if change == "inverse" and rev:
            y = 0.9 * y
        if change == "order of the output":
            y = y.flip(1)
        return (y,), log_det

    def shifted(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        sign = 1.0 if rev else -1.0
        (y,), log_det = stock.forward(self, [sign * x[0]], c, rev=rev, jac=jac)
        return (y if not rev else -y,), log_det

    return type(name, (stock,), {"forward": shifted if change == "sign of x" else run})


@every_class
@pytest.mark.parametrize(
    "change",
    [
        "factor of 0.1",
        "sign of the log-determinant",
        "sign of x",
        "inverse",
        "order of the output",
    ],
)
def test_class_of_the_same_name_with_other_maths_is_left(name: str, change: str) -> None:
    case = Case(name, SHAPE, "cond")
    cls = other_maths(name, change)
    block = cls(case.dims_in, case.dims_c, subnet_constructor=make_subnet(2))
    assert_left(block, "computes something else")


def test_left_and_accelerated_side_by_side() -> None:
    left = stock_block(Case("GLOWCouplingBlock", SHAPE, "softsign"))
    model = nn.Sequential(stock_block(Case("GLOWCouplingBlock", SHAPE)), left, nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = report(accelerate(model))
    assert [entry.state for entry in after.entries] == ["accelerated", "left"]
    assert str(after).splitlines()[0] == "1 of 2 blocks run fused"
    assert "something else than FrEIA's block with a known clamp function" in str(after)
    own = fastflow_kernels.GLOWCouplingBlock([(4,)], subnet_constructor=nn.Linear)
    assert accelerate(own) is own
    assert str(report(own)).splitlines()[0] == "1 of 1 blocks run fused"
    assert report(own).entries[0].state == "fused"


# --- changed later --------------------------------------------------------------------------------


def halve(self: Any, x: Tensor, u: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
    """Compute something else than a coupling, as a step."""
    return (2.0 * x if rev else 0.5 * x), u.flatten(1).sum(1)


def setting(name: str, value: Any) -> Callable[[Any], object]:
    return lambda block: setattr(block, name, value)


def method(name: str) -> Callable[[Any], object]:
    return lambda block: setattr(block, name, halve.__get__(block))


def split_elsewhere(block: Any) -> None:
    block.split_len1, block.split_len2 = 2, 5


CHANGES: dict[str, Callable[[Any], object]] = {
    "f_clamp": setting("f_clamp", torch.tanh),
    "f_clamp, custom": setting("f_clamp", softsign),
    "f_clamp, a module": setting("f_clamp", nn.Tanh()),
    "clamp, a tensor": setting("clamp", torch.tensor(1.2, dtype=torch.float64)),
    "clamp, infinite": setting("clamp", float("inf")),
    "_coupling1": method("_coupling1"),
    "_coupling2": method("_coupling2"),
    "split": split_elsewhere,
    "split_len1": setting("split_len1", 2),
    "ndims": setting("ndims", 2),
    "channels": setting("channels", 6),
    "conditional": setting("conditional", False),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_on_the_block_takes_effect(name: str, change: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case)
    for b in (block, stock):
        CHANGES[change](b)
    (entry,) = report(block).entries
    if entry.state == "stock maths":
        assert "has changed since it was accelerated" in entry.reason
    else:
        assert name == "NICECouplingBlock" or not change.startswith(("f_clamp", "clamp"))
    assert_same(block, stock, case)
    assert_same(copy.deepcopy(block), stock, case)
    restore(block)
    assert_same(block, stock, case)


@pytest.mark.parametrize("name", AFFINE)
def test_another_clamp_takes_effect_fused(name: str) -> None:
    case = Case(name, SHAPE, "tanh")
    block, stock = pair(case)
    for clamp in (3, 0.7, -1.3, 0, True, np.float32(1.9), torch.tensor(1.1).double(), 1.4):
        block.clamp = stock.clamp = clamp
        is_fused = not isinstance(clamp, Tensor)
        assert state_of(block) == ("accelerated" if is_fused else "stock maths")
        assert_same(block, stock, case)


@pytest.mark.parametrize("name", AFFINE)
def test_learned_clamp_gets_its_gradient(name: str) -> None:
    case = Case(name, SHAPE, "tanh")
    block, stock = pair(case)
    for b in (block, stock):
        del b.clamp
        b.clamp = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
    assert "its clamp has changed" in report(block).entries[0].reason
    assert_same(block, stock, case)
    for b in (block, stock):
        b([make_input(case)[0]], make_input(case)[1])[0][0].sum().backward()
    assert torch.equal(block.clamp.grad, stock.clamp.grad)


@pytest.mark.parametrize("name", TWO_SIDED)
@pytest.mark.parametrize("step", ["_coupling1", "_coupling2", "forward"])
def test_step_patched_on_the_class_takes_effect(name: str, step: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case)

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        return (2.0 * x[0],), x[0].flatten(1).sum(1)

    with mock.patch.object(type(stock), step, forward if step == "forward" else halve):
        assert report(block).entries[0].reason == f"its {step} has changed since it was accelerated"
        assert_same(block, stock, case)
        copied = copy.deepcopy(block)
        assert_same(copied, stock, case)
    for b in (block, copied):
        assert state_of(b) == "accelerated"
        assert_same(b, stock, case)


@every_class
def test_exchanged_subnet_takes_effect(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, stock = pair(case)
    other = stock_block(case, seed=9)
    for child, subnet in other.named_children():
        setattr(block, child, subnet)
        setattr(stock, child, copy.deepcopy(subnet))
        assert state_of(block) == "accelerated"
        assert_same(block, stock, case)


@pytest.mark.parametrize("name", AFFINE)
def test_accelerate_again_asks_a_block_that_has_changed(name: str) -> None:
    case = Case(name, SHAPE, "atan")
    block, stock = pair(case)
    block.f_clamp = stock.f_clamp = torch.tanh
    assert state_of(block) == "stock maths"
    accelerate(block)
    assert "'TANH'" in report(block).changed[0].reason
    assert state_of(block) == "accelerated"
    assert_same(block, stock, case)
    block.f_clamp = stock.f_clamp = softsign
    with pytest.warns(UserWarning, match="no block of the model runs fused"):
        accelerate(block)
    assert_same(block, stock, case)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "NICECouplingBlock"])
def test_bad_calls_are_errors(name: str) -> None:
    case = Case(name, SHAPE, "cond")
    block, _ = pair(case)
    x, c = make_input(case)
    for bad in (x[:, :6], x[..., 0]):
        with pytest.raises(ValueError, match=r"expected an input of shape \(B, 7, S1, S2\)"):
            block([bad], c)
    with pytest.raises(ValueError, match=r"expected 1 condition\(s\), got 0"):
        block([x])
    with pytest.raises(ValueError, match="expected condition 0 of shape"):
        block([x], [c[0][:1]])
    with pytest.raises(TypeError, match="list with one tensor"):
        block(x, c)


@every_class
def test_conditions_that_were_not_declared_are_ignored(name: str) -> None:
    if name == "ConditionalAffineTransform":
        pytest.skip("it needs a condition")
    case = Case(name, SHAPE)
    block, stock = pair(case)
    x, _ = make_input(case)
    (expected,), _ = stock([x], [torch.randn(3, 5, 3, 5)])
    for conditions in ([torch.randn(3, 5, 3, 5)], (), None, []):
        (y,), _ = block([x], conditions)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


# --- permutations ---------------------------------------------------------------------------------

SIZES = [(3, 7), (2, 5, 4), (2, 6, 3, 5), (2, 3, 2, 2, 3), (2, 1, 3), (0, 4, 2), (16, 257, 9, 9)]


def permutations(channels: int, *spatial: int, seed: int = 1) -> tuple[Any, Any]:
    """Return an accelerated and a stock PermuteRandom with the same permutation."""
    module, stock = (
        freia().modules.PermuteRandom([(channels, *spatial)], seed=seed) for _ in range(2)
    )
    accelerate(module)
    assert state_of(module) == "accelerated", str(report(module))
    return module, stock


def assert_permutes_alike(module: Any, stock: Any, *size: int, layout: Any = None) -> None:
    """Assert that outputs, gradients and errors are equal, in both directions."""
    x = torch.randn(size)
    x = x if layout is None else x.to(memory_format=layout)
    for rev in (False, True):
        results = []
        for m in (module, stock):
            leaf = x.clone().requires_grad_()
            try:
                (y,), log_det = m([leaf], rev=rev)
                (y * torch.linspace(0.0, 1.0, y.numel()).view(y.shape)).sum().backward()
            except (IndexError, RuntimeError) as error:
                results.append(type(error))
            else:
                results.append((y, leaf.grad, log_det))
        if isinstance(results[1], type):
            assert results[0] is results[1]
            continue
        assert all(map(torch.equal, results[0][:2], results[1][:2]))
        assert results[0][2] == results[1][2] == 0.0


@pytest.mark.parametrize("size", SIZES, ids=str)
@plain_and_fused
def test_permutation_gives_the_same(size: tuple[int, ...], small: int) -> None:
    module, stock = permutations(*size[1:])
    assert_permutes_alike(module, stock, *size)
    if len(size) == 4:
        assert_permutes_alike(module, stock, *size, layout=torch.channels_last)
    x = torch.randn(size)
    (y,), _ = module([x])
    before = x.clone()
    y.add_(1.0)  # the output is a tensor of its own
    assert torch.equal(x, before)
    whole = torch.arange(x.numel()).view(size)
    for t in (whole, whole > 3, x.half(), x.double()):
        for rev in (False, True):
            assert torch.equal(module([t], rev=rev)[0][0], stock([t], rev=rev)[0][0])
    (y,), _ = module([x], jac=False)
    assert torch.equal(module([y], True, False)[0][0], x)
    assert type(restore(module)) is type(stock)
    assert_permutes_alike(module, stock, *size)


def test_gradients_through_an_overwritten_output() -> None:
    results = []
    for module in permutations(6):
        x = torch.linspace(-1.0, 1.0, 12).view(2, 6).requires_grad_()
        ((y,), _) = module([x])
        y.mul_(torch.arange(6.0))
        y.sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_second_gradients_and_transforms_of_a_permutation() -> None:
    module, stock = permutations(6)
    x, v = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    for rev in (False, True):

        def run(x: Tensor, rev: bool = rev) -> Tensor:
            return module([x], rev=rev)[0][0]

        def expected(x: Tensor, rev: bool = rev) -> Tensor:
            return stock([x], rev=rev)[0][0]

        assert torch.autograd.gradgradcheck(lambda x: run(x) ** 3, x.clone().requires_grad_())
        actual = torch.func.jvp(run, (x,), (v,)), torch.func.vmap(lambda t: run(t[None])[0])(x)
        assert all(map(torch.equal, actual[0], torch.func.jvp(expected, (x,), (v,))))
        assert torch.equal(actual[1], expected(x))


def test_report_of_a_permutation() -> None:
    module = freia().modules.PermuteRandom([(6,)], seed=1)
    words = "a permutation by a gather, forward and backward"
    assert report(module).entries[0].reason == f"accelerate(model) would take it: computes {words}"
    (entry,) = report(accelerate(module)).entries
    assert (entry.state, entry.changed, entry.reason) == ("accelerated", True, f"computes {words}")
    assert report(accelerate(module, backend="eager")).entries == (entry,)
    assert "accelerated, a gather" in repr(module)


OTHER_VALUES: dict[str, tuple[list[int], list[int]]] = {
    "another permutation": ([2, 0, 1, 4, 3], [1, 2, 0, 4, 3]),
    "the identity": ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    "no permutation": ([0, 0, 2, 4, 3], [0, 0, 2, 4, 3]),
    "another inverse": ([2, 0, 1, 4, 3], [2, 0, 1, 4, 3]),
    "from the end": ([-3, 0, 1, -1, 3], [1, 2, 0, -1, 3]),
    "out of range": ([2, 0, 1, 5, 3], [1, 2, 0, 4, 3]),
}


def write(module: Any, values: dict[str, Tensor], through: str) -> None:
    for name, value in values.items():
        if through == "copy_":
            getattr(module, name).copy_(value)
        elif through == "data":
            getattr(module, name).data = value.clone()
        elif through == "data.copy_":
            getattr(module, name).data.copy_(value)
        else:
            setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))


@pytest.mark.parametrize("through", ["load", "assign", "copy_", "data", "data.copy_", "another"])
@pytest.mark.parametrize("values", OTHER_VALUES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_other_values_take_effect(values: str, through: str, used: bool) -> None:
    module, stock = permutations(5)
    if used:
        assert_permutes_alike(module, stock, 3, 5)
    perm, perm_inv = map(torch.tensor, OTHER_VALUES[values])
    state = {"perm": perm, "perm_inv": perm_inv}
    for m in (module, stock):
        if through in ("load", "assign"):
            m.load_state_dict(copy.deepcopy(state), assign=through == "assign")
        else:
            write(m, state, through)
    is_permutation = values in ("another permutation", "the identity")
    assert state_of(module) == ("accelerated" if is_permutation else "stock maths")
    for _ in range(2):  # the second time from the cache
        assert_permutes_alike(module, stock, 3, 5)
    copied = copy.deepcopy(module)
    assert_permutes_alike(copied, stock, 3, 5)
    restore(copied)
    assert_permutes_alike(copied, stock, 3, 5)


def test_index_of_another_length_takes_effect() -> None:
    """FrEIA's module then takes some channels, and gradients of the others are zero."""
    module, stock = permutations(4)
    assert_permutes_alike(module, stock, 3, 6)
    for m in (module, stock):
        m.perm = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        m.perm_inv = nn.Parameter(torch.tensor([1, 2, 0]), requires_grad=False)
    assert_permutes_alike(module, stock, 3, 4)


@pytest.mark.parametrize("method", COPIES)
def test_copies_of_a_permutation(method: str) -> None:
    module, stock = permutations(6)
    module([torch.randn(2, 6)])
    made: Any = COPIES[method](module)
    assert type(made) is type(module)
    assert_permutes_alike(made, stock, 3, 6)
    if method != "copy":
        made.load_state_dict(permutations(6, seed=5)[1].state_dict())
        assert_permutes_alike(made, permutations(6, seed=5)[1], 3, 6)
    assert_permutes_alike(module, stock, 3, 6)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_permutation(used: bool) -> None:
    module, stock = permutations(6)
    if used:
        module([torch.randn(2, 6)])
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_permutes_alike(compiled, stock, 3, 6)
    other = permutations(6, seed=5)[1]
    module.load_state_dict(other.state_dict())
    assert_permutes_alike(compiled, other, 3, 6)


def test_exported_permutation() -> None:
    module, stock = permutations(6)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.module([x])[0][0], self.module([x], rev=True)[0][0]

    x = torch.randn(3, 6)
    program = torch.export.export(Wrapped(), (x,))
    y, back = program.module()(x)
    assert torch.equal(y, stock([x])[0][0])
    assert torch.equal(back, stock([x], rev=True)[0][0])


def test_forward_patched_on_the_class_of_permutations() -> None:
    module, stock = permutations(6)

    def flip(self: Any, x: Any, rev: bool = False, jac: bool = True) -> Any:
        return [x[0].flip(1)], 0.0

    x = torch.randn(3, 6)
    with mock.patch.object(type(stock), "forward", flip):
        assert torch.equal(module([x])[0][0], x.flip(1))
    assert_permutes_alike(module, stock, 3, 6)


def test_permutations_that_are_left() -> None:
    stock: Any = freia().modules.PermuteRandom

    class Flipped(stock):
        def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
            return [x[0].flip(1)], 0.0

    assert_left(Flipped([(6,)]), "Flipped overrides forward")
    Flipped.__name__ = "PermuteRandom"
    assert_left(Flipped([(6,)]), "computes something else than FrEIA's PermuteRandom")
    module = stock([(6,)])
    module.forward = module.forward
    assert_left(module, "overrides forward")
    assert_left(stock([(6,)]).to("meta"), "meta device")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert_left(stock([(6,)]), "under FakeTensorMode or while tracing")
    module = stock([(6,)])
    del module.perm_inv
    assert_left(module, "could not be probed: KeyError")
