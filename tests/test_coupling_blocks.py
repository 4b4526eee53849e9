"""Test our coupling blocks against the reference and FrEIA, and under what PyTorch does to modules.

Results are compared by the criterion of tests/support/compare.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastflow_kernels
import reference
from tests.support.blocks import Counting, contents, through_a_file, unwrapped
from tests.support.cases import DEVICE, DTYPES, LAYOUTS, SHAPES, Shape, both_directions, ids
from tests.support.coupling_blocks import (
    AMPLIFYING_CASES,
    CASES,
    KINDS,
    NAMES,
    OPTIONS,
    PARITY_CASES,
    Case,
    TensorLogDet,
    build,
    compare,
    compare_typical,
    evaluate,
    make_input,
    make_subnet,
)
from tests.support.graphs import count_graphs
from tests.support.peers import freia
from tests.support.small_inputs import LIMIT, plain_and_fused, small_up_to

every_kind = pytest.mark.parametrize("case", KINDS, ids=[case.name for case in KINDS])
# What these classes do without conditions, where the subnet reads a view of x.
PLAIN_KINDS = tuple(case.replace(option="atan") for case in KINDS)


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def ours(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, **extra: Any) -> Any:
    """Build our block. Its backend is "auto", as users have it."""
    return build(fastflow_kernels, case, dtype, seed, **extra)


# --- parity

# Backend, number of elements up to which an input is small, and with gradients or not, by name.
WAYS = {
    "fused": ("eager", 0, True),
    "fused without gradients": ("eager", 0, False),
}
if DEVICE.type == "cpu":  # on a GPU no input is small
    WAYS["plain"] = ("auto", LIMIT, True)
WAYS_AND_DTYPES = [
    (way, dtype) for dtype in ("fp64", "fp32") for way in WAYS if dtype == "fp32" or WAYS[way][2]
]


@pytest.mark.parametrize(("way", "dtype"), WAYS_AND_DTYPES)  # first: what is expected is cached
@pytest.mark.parametrize("case", PARITY_CASES, ids=ids(PARITY_CASES))
@both_directions
def test_parity(case: Case, dtype: str, rev: bool, way: str) -> None:
    backend, small, with_grad = WAYS[way]
    with small_up_to(small):
        compare(case, DTYPES[dtype], rev, with_grad, backend)


@pytest.mark.parametrize("case", AMPLIFYING_CASES, ids=ids(AMPLIFYING_CASES))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@both_directions
@pytest.mark.usefixtures("fused")
def test_parity_where_errors_are_amplified(case: Case, dtype: str, rev: bool) -> None:
    compare_typical(case, DTYPES[dtype], rev, grad=not rev, backend="eager")


HALF_CASES = [case for case in PARITY_CASES if case.shape in (SHAPES[1], SHAPES[6], SHAPES[11])]


@pytest.mark.parametrize("case", HALF_CASES, ids=ids(HALF_CASES))
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@both_directions
def test_parity_in_half_precision(case: Case, dtype: str, rev: bool) -> None:
    with small_up_to(0):
        compare(case, DTYPES[dtype], rev, grad=not rev)


LAYOUT_CASES = [
    Case(name, Shape(2, 7, (3, 5)), option) for option in ("split0.3", "cond") for name in NAMES
]


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=ids(LAYOUT_CASES))
@pytest.mark.parametrize("layout", LAYOUTS)
@both_directions
@plain_and_fused
def test_parity_in_any_layout(case: Case, layout: str, rev: bool, small: int) -> None:
    backend = "auto" if small else "eager"
    compare(case, torch.float32, rev, grad=not rev, backend=backend, layout=layout)


# More than one tile in some direction, ragged ends, rank 0 to 3.
LARGE_CASES = [
    Case(name, shape)
    for shape in (Shape(300, 33), Shape(2, 33, (14, 14)), Shape(2, 10, (5, 6, 7)))
    for name in NAMES
]
BACKENDS = (
    ["eager", pytest.param("triton", marks=pytest.mark.gpu)] if DEVICE.type == "cuda" else ["eager"]
)


@pytest.mark.parametrize("case", LARGE_CASES, ids=ids(LARGE_CASES))
@both_directions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_on_large_shapes(case: Case, rev: bool, layout: str, backend: str) -> None:
    compare(case, torch.float32, rev, grad=not rev, backend=backend, layout=layout)


@every_kind
@plain_and_fused
def test_round_trip(case: Case, small: int) -> None:
    block = TensorLogDet(ours(case))
    x, c = make_input(case)
    (y,), log_det = block([x], c)
    with torch.no_grad():
        (back,), minus_log_det = block([y], c, rev=True)
        (z,), _ = block([x], c, rev=True)
        (forth,), _ = block([z], c)
    close(back, x)
    close(forth, x)
    close(minus_log_det, -log_det)


@every_kind
@both_directions
@plain_and_fused
def test_the_log_determinant_is_freias_whatever_jac_is(case: Case, rev: bool, small: int) -> None:
    block = ours(case)
    x, c = make_input(case)
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            results = [block([x], c, rev=rev, jac=jac)[1] for jac in (True, False)]
        if case.preserves_volume:
            assert results == [0.0, 0.0]
            assert all(type(log_det) is float for log_det in results)
        else:
            assert torch.equal(*results)
            assert results[0].shape == (4,)


@every_kind
@both_directions
def test_channels_last_stays_channels_last(case: Case, rev: bool) -> None:
    block = ours(case, torch.float32)
    x, c = make_input(case.replace(shape=Shape(2, 7, (40, 24))), torch.float32)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        (y,), _ = block([x], c, rev=rev)
    assert y.is_contiguous(memory_format=torch.channels_last)


# --- FrEIA


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_same_seed_gives_freias_block(case: Case) -> None:
    blocks, states = [], []
    for module in (freia().modules, fastflow_kernels):
        blocks.append(build(module, case, torch.float32, seed=17))
        states.append(torch.random.get_rng_state())
    stock, block = blocks
    expected, actual = stock.state_dict(), block.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert list(dict(block.named_parameters())) == list(dict(stock.named_parameters()))
    assert torch.equal(*states)
    for name in ("channels", "ndims", "split_len1", "split_len2", "clamp", "conditional"):
        assert getattr(block, name) == getattr(stock, name), name
    assert block.condition_length == stock.condition_length
    a = torch.linspace(-5, 5, 11)
    if case.name != "NICECouplingBlock":
        assert torch.equal(block.f_clamp(a), stock.f_clamp(a))


@pytest.mark.peers
@every_kind
@both_directions
@plain_and_fused
def test_state_dicts_are_exchanged_with_freia(case: Case, rev: bool, small: int) -> None:
    stock, block, again = (build(freia().modules, case), ours(case, seed=1), ours(case, seed=2))
    block.load_state_dict(stock.state_dict(), strict=True)
    again.load_state_dict(stock.state_dict(), strict=True)
    x, c = make_input(case)
    expected, actual = evaluate(stock, x, c, rev), evaluate(block, x, c, rev)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value)
    other = build(freia().modules, case, seed=3)
    other.load_state_dict(again.state_dict(), strict=True)
    close(evaluate(other, x, c, rev, grad=False)["output"], expected["output"])


@pytest.mark.peers
@every_kind
@plain_and_fused
def test_freias_containers_take_our_blocks(case: Case, small: int) -> None:
    framework = freia().framework
    results = []
    for module in (freia().modules, fastflow_kernels):
        torch.manual_seed(3)
        flow = framework.SequenceINN(7, 3, 5)
        for _ in range(2):
            flow.append(
                getattr(module, case.name),
                cond=0,
                cond_shape=(3, 3, 5),
                subnet_constructor=make_subnet(2),
            )
        flow.double()
        x, c = make_input(case)
        y, log_det = flow(x, c)
        back, minus_log_det = flow(y.detach(), c, rev=True)
        results.append([y, log_det, back, minus_log_det])
        assert isinstance(flow[0], freia().modules.InvertibleModule)
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


class _InPlace(nn.Module):
    """A subnet that writes to its input, in its first layer or where nobody can see it."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(inplace=True), nn.Linear(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class _InPlaceUnseen(_InPlace):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out)
        self._modules = {"second": self.second}

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x.relu_())


IN_PLACE = [name for name in NAMES if name != "ConditionalAffineTransform"]  # it reads no half


@pytest.mark.parametrize("name", IN_PLACE)
@both_directions
@plain_and_fused
def test_a_subnet_that_writes_to_its_input(name: str, rev: bool, small: int) -> None:
    """A first layer gets a copy, anything else raises.

    FrEIA's block goes on with the overwritten half, and its inverse is another function.
    """
    x = torch.randn(5, 6)
    block = getattr(fastflow_kernels, name)([(6,)], [], _InPlace)
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            (y,), _ = block([x], rev=rev)
            (back,), _ = block([y], rev=not rev)
        close(back, x, 1e-4)
    block = getattr(fastflow_kernels, name)([(6,)], [], _InPlaceUnseen)
    for with_grad in (False, True):
        with (
            torch.set_grad_enabled(with_grad),
            pytest.raises(RuntimeError, match="the subnet changed its input in place"),
        ):
            block([x.clone()], rev=rev)


@pytest.mark.peers
@pytest.mark.parametrize("case", PLAIN_KINDS, ids=[case.name for case in PLAIN_KINDS])
@plain_and_fused
def test_output_overwritten_before_the_backward_pass(case: Case, small: int) -> None:
    """FrEIA's output is a tensor of its own. Ours holds what the second side's subnet has saved.

    A change to it before the backward pass must not go unnoticed.
    """
    gradients = []
    shares_memory = small == 0 and case.name in (
        "RNVPCouplingBlock",
        "GLOWCouplingBlock",
        "GINCouplingBlock",
    )
    for module in (freia().modules, fastflow_kernels):
        block = build(module, case)
        x, c = make_input(case)
        (y,), _ = block([x.requires_grad_()], c)
        y.mul_(2.0)
        if module is fastflow_kernels and shares_memory:
            with pytest.raises(RuntimeError, match="modified in-?place"):
                y.sum().backward()
            return
        y.sum().backward()
        gradients.append(x.grad)
    close(*gradients)


# --- gradients


def as_function(block: nn.Module, case: Case, rev: bool) -> tuple[Any, list[Tensor]]:
    """Return the block as a function of x, the conditions and the parameters; and the latter."""
    names = [name for name, p in block.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    count = len(case.conditions)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        c, parameters = tensors[:count], tensors[count:]
        (y,), log_det = functional_call(
            block, dict(zip(names, parameters, strict=True)), ([x], list(c)), {"rev": rev}
        )
        return y if case.preserves_volume else torch.cat((y.flatten(1), log_det[:, None]), 1)

    return run, values


GRADIENT_CASES = [
    Case(name, shape, option)
    for name in NAMES
    for shape in (Shape(2, 5), Shape(2, 5, (2, 2)))
    for option in ("tanh", "cond")
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=ids(GRADIENT_CASES))
@both_directions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_equal_numerical_ones(case: Case, rev: bool, layout: str) -> None:
    if layout != "contiguous" and (case.rank == 0 or rev):
        pytest.skip("tested as contiguous")
    x, c = make_input(case)
    tensors = [LAYOUTS[layout](t).requires_grad_() for t in (x, *c)]
    with small_up_to(0):
        run, values = as_function(ours(case), case, rev)
        assert torch.autograd.gradcheck(run, (*tensors, *values), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (*tensors, *values), fast_mode=True)


@every_kind
@plain_and_fused
def test_inputs_without_gradients(case: Case, small: int) -> None:
    """Only the parameters, and then only x, require gradients."""
    block, stock = ours(case), build(reference, case)
    x, c = make_input(case)
    gradients = []
    for b in (block, stock):
        b([x], c)[0][0].square().sum().backward()
        by_parameters = [p.grad for p in b.parameters()]
        b.requires_grad_(False)
        xs = x.clone().requires_grad_()
        b([xs], c)[0][0].square().sum().backward()
        gradients.append([*by_parameters, xs.grad])
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected)


@every_kind
@plain_and_fused
def test_output_or_log_determinant_alone(case: Case, small: int) -> None:
    block, stock = ours(case), build(reference, case)
    for part in range(1 if case.preserves_volume else 2):
        gradients = []
        for b in (block, stock):
            x, c = make_input(case)
            (y,), log_det = b([x.requires_grad_()], c)
            loss = (y.square().sum(), log_det)[part].sum()
            wanted = [x, *b.parameters()]
            gradients.append(torch.autograd.grad(loss, wanted, materialize_grads=True))
        for actual, expected in zip(*gradients, strict=True):
            close(actual, expected)


# --- torch.func, graphs


@every_kind
@both_directions
@plain_and_fused
def test_gradients_of_every_sample_at_once(case: Case, rev: bool, small: int) -> None:
    block = ours(case)
    x, c = make_input(case)
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
        (y,), log_det = functional_call(block, parameters, ([x[None]], [c[None]]), {"rev": rev})
        return y.square().sum() - (0.0 if case.preserves_volume else log_det.sum())

    batched = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, c[0])
    for k in range(len(x)):
        for name, value in grad(loss)(parameters, x[k], c[0][k]).items():
            close(batched[name][k], value)


@every_kind
@plain_and_fused
def test_an_ensemble_of_blocks_at_once(case: Case, small: int) -> None:
    blocks = [ours(case, seed=seed) for seed in range(3)]
    x, c = make_input(case)
    parameters, buffers = stack_module_state(blocks)
    with torch.no_grad():
        y = vmap(lambda p, b: functional_call(blocks[0], (p, b), ([x], c))[0][0])(
            parameters, buffers
        )
        for k, block in enumerate(blocks):
            close(y[k], block([x], c)[0][0])


@every_kind
@plain_and_fused
def test_tangents_go_back_through_the_inverse(case: Case, small: int) -> None:
    block = ours(case)
    x, c = make_input(case)
    v = torch.randn_like(x)
    y, tangent, *_ = jvp(lambda x: block([x], c)[0][0], (x,), (v,))
    back, again, *_ = jvp(lambda y: block([y], c, rev=True)[0][0], (y,), (tangent,))
    close(back, x, 1e-7)
    close(again, v, 1e-7)


COMPILED = [(case, False) for case in KINDS] + [(KINDS[2], True), (KINDS[4], True)]


@pytest.mark.parametrize(("case", "rev"), COMPILED, ids=[f"{c.name}-{r}" for c, r in COMPILED])
@pytest.mark.usefixtures("fused", "fresh_compiler")
def test_every_batch_and_image_size_runs_the_same_graph(case: Case, rev: bool) -> None:
    block = TensorLogDet(ours(case, torch.float32))
    compiled: Any = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, *spatial in [(4, 9, 11), (2, 8, 6)]:
        x, c = make_input(case.replace(shape=Shape(batch, 7, tuple(spatial))), torch.float32)
        x.requires_grad_()
        results = []
        for model in (compiled, block):
            (y,), log_det = model([x], c, rev=rev)
            results.append((y, log_det, *torch.autograd.grad(y.square().mean(), x)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert count_graphs() == 1


@every_kind
@both_directions
def test_export(case: Case, rev: bool) -> None:
    block = ours(case, torch.float32)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TensorLogDet(block)

        def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            (y,), log_det = self.block([x], [c], rev=rev)
            return y, log_det

    x, c = make_input(case, torch.float32)
    with torch.no_grad():
        program = torch.export.export(Wrapped(), (x, c[0]))
        for actual, expected in zip(program.module()(x, c[0]), Wrapped()(x, c[0]), strict=True):
            close(actual, expected, 1e-5)


# --- what modules go through


@every_kind
@both_directions
@plain_and_fused
def test_autocast_keeps_the_dtype_of_the_input(case: Case, rev: bool, small: int) -> None:
    block, stock = ours(case, torch.float32), build(reference, case, torch.float32)
    x, c = make_input(case, torch.float32)
    x.requires_grad_()
    results = []
    for b in (block, stock):
        with torch.autocast("cpu", torch.bfloat16):
            (y,), log_det = TensorLogDet(b)([x], c, rev=rev)
        assert (y.dtype, log_det.dtype) == (torch.float32, torch.float32)
        results.append((y, log_det, *torch.autograd.grad(y.sum(), [x, *b.parameters()])))
    for actual, expected in zip(*results, strict=True):
        # Both have the subnets' bfloat16 coefficients, and round the second subnet's input alike,
        # unless a last bit of float32 moves it to the next bfloat16.
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual, expected, rtol=0.02, atol=0.02 * expected.abs().max().item()
        )


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
}


@every_kind
@pytest.mark.parametrize("way", COPIES)
@plain_and_fused
def test_copies_compute_the_same_and_are_independent(case: Case, way: str, small: int) -> None:
    block = ours(case, backend="eager")
    x, c = make_input(case)
    expected = block([x], c)[0][0]
    copied: Any = COPIES[way](block)
    assert copied.backend == "eager"
    assert torch.equal(copied([x], c)[0][0], expected)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(block([x], c)[0][0], expected)
    assert not torch.equal(copied([x], c)[0][0], expected)


@every_kind
@both_directions
@plain_and_fused
def test_inference_mode(case: Case, rev: bool, small: int) -> None:
    block = TensorLogDet(ours(case))
    x, c = make_input(case)
    expected = block([x], c, rev=rev)
    with torch.inference_mode():
        actual = block([x], c, rev=rev)
        again = block([x.clone()], [t.clone() for t in c], rev=rev)
    for results in (actual, again):
        close(results[0][0], expected[0][0])
        close(results[1], expected[1])
    block([x], c, rev=rev)[0][0].sum().backward()


@every_kind
@both_directions
@plain_and_fused
def test_empty_batch(case: Case, rev: bool, small: int) -> None:
    block = TensorLogDet(ours(case))
    x, c = make_input(case.replace(shape=Shape(0, 7, (3, 5))))
    (y,), log_det = block([x.requires_grad_()], c, rev=rev)
    assert (y.shape, log_det.shape) == (x.shape, (0,))
    (y.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())
    with torch.no_grad():
        assert block([x], c, rev=rev)[0][0].shape == x.shape


@pytest.mark.parametrize("case", PLAIN_KINDS, ids=[case.name for case in PLAIN_KINDS])
@plain_and_fused
def test_current_options_and_subnets_count(case: Case, small: int) -> None:
    """Attributes that are exchanged after the first call take effect in the next one."""
    block, stock = ours(case), build(reference, case)
    x, c = make_input(case)
    block([x], c)
    for b in (block, stock):
        if case.name != "NICECouplingBlock":
            b.clamp, b.f_clamp = 0.7, torch.tanh
        name, subnet = next(iter(b.named_children()))
        torch.manual_seed(9)
        fresh = make_subnet(2)(subnet.w1.shape[1], subnet.w2.shape[0])
        setattr(b, name, fresh.double())
    for rev in (False, True):
        expected, actual = (TensorLogDet(b)([x], c, rev=rev) for b in (stock, block))
        close(actual[0][0], expected[0][0])
        close(actual[1], expected[1])


@every_kind
@plain_and_fused
def test_input_is_not_changed(case: Case, small: int) -> None:
    block = ours(case)
    x, c = make_input(case)
    before = [t.clone() for t in (x, *c)]
    for rev in (False, True):
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                block([x], c, rev=rev)
    assert all(map(torch.equal, before, (x, *c)))


@every_kind
@both_directions
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@plain_and_fused
def test_values_that_are_not_finite(case: Case, rev: bool, value: float, small: int) -> None:
    """They spread as in the reference."""
    block, stock = TensorLogDet(ours(case)), TensorLogDet(build(reference, case))
    x, c = make_input(case)
    x[1, 2, 1, 1] = value
    x[2, 6, 0, 3] = value
    with torch.no_grad():
        actual, expected = block([x], c, rev=rev), stock([x], c, rev=rev)
    for a, e in ((actual[0][0], expected[0][0]), (actual[1], expected[1])):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9, equal_nan=True)


META_CASES = [Case(n, Shape(2, 6, (4, 4)), o) for n in NAMES for o in ("cond", "tanh", "sigmoid")]


@pytest.mark.parametrize("case", META_CASES, ids=ids(META_CASES))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_operand_lies_on_another_device(case: Case, layout: str) -> None:
    """Mixing devices raises on the meta device as on a GPU."""
    block = ours(case, torch.float32, backend="eager").to("meta")
    x, c = make_input(case, torch.float32)
    x, c = LAYOUTS[layout](x.to("meta")), [LAYOUTS[layout](t.to("meta")) for t in c]
    (y,), _ = block([x.requires_grad_()], c)
    y.sum().backward()
    with torch.no_grad():
        block([x], c, rev=True)
    assert x.grad.shape == x.shape


# --- errors

X, C = torch.randn(2, 7, 3, 5), torch.randn(2, 3, 3, 5)
BAD_CALLS: dict[str, tuple[Any, Any, str]] = {
    "channels": ([X[:, :6]], [C], r"\(B, 7, S1, S2\), got \(2, 6, 3, 5\)"),
    "rank 1": ([X[..., 0]], [C], r"\(B, 7, S1, S2\), got \(2, 7, 3\)"),
    "no batch": ([X[0]], [C], r"\(B, 7, S1, S2\), got \(7, 3, 5\)"),
    "a tensor": (X, [C], "list with one tensor, got a tensor"),
    "two inputs": ([X, X], [C], "one input tensor, got 2"),
    "no input": ([], [C], "one input tensor, got 0"),
    "complex": ([X.to(torch.complex64)], [C], "floating-point dtype, got torch.complex64"),
    "no condition": ([X], [], r"1 condition\(s\), got 0"),
    "condition is None": ([X], None, r"1 condition\(s\), got 0"),
    "condition of another width": ([X], [C[:, :2]], r"condition 0 of shape \(2, 3, 3, 5\)"),
    "condition of another size": ([X], [C[..., :1]], r"condition 0 of shape .*, got \(2, 3, 3, 1"),
    "condition of another batch": ([X], [C[:1]], r"condition 0 of shape .*, got \(1, 3, 3, 5"),
}


@every_kind
@both_directions
@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda name: name.replace(" ", "_"))
def test_bad_call_raises_before_any_work(case: Case, rev: bool, bad: str) -> None:
    block = getattr(fastflow_kernels, case.name)(case.dims_in, case.dims_c, Counting)
    x, c, match = BAD_CALLS[bad]
    before, state = contents(block), torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match=match) as caught:
        block(x, c, rev=rev)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert all(subnet.calls == 0 for subnet in block.children())
    assert all(torch.equal(value, before[name]) for name, value in contents(block).items())
    assert torch.equal(torch.random.get_rng_state(), state)


@every_kind
@both_directions
@plain_and_fused
def test_subnet_with_a_wrong_output_is_named(case: Case, rev: bool, small: int) -> None:
    class OneMore(Counting):
        def __init__(self, channels_in: int, channels_out: int) -> None:
            super().__init__(channels_in, channels_out + 1)

    block = getattr(fastflow_kernels, case.name)(case.dims_in, case.dims_c, OneMore)
    with pytest.raises(RuntimeError, match=r"expected the subnet to return shape \(2, \d+, 3, 5\)"):
        block([X], [C], rev=rev)


@plain_and_fused
def test_subnets_of_uneven_outputs_are_an_error(small: int) -> None:
    """RNVP's two subnets of a side return 4 and 2 channels instead of 3 each."""
    block = fastflow_kernels.RNVPCouplingBlock([(6,)], [], nn.Linear)
    block.subnet_s2, block.subnet_t2 = nn.Linear(3, 4), nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        block([torch.randn(2, 6)])


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "no subnet": {"subnet_constructor": None},
    "subnet not callable": {"subnet_constructor": 3},
    "activation": {"clamp_activation": "atan"},
    "clamp nan": {"clamp": float("nan")},
    "float split negative": {"split_len": -0.1},
    "float split above 1": {"split_len": 1.5},
    "int split negative": {"split_len": -1},
    "int split above C": {"split_len": 5},
    "backend": {"backend": "cuda"},
    "5 dimensions": {"dims_in": [(4, 2, 2, 2, 2)]},
    "two inputs": {"dims_in": [(4,), (4,)]},
    "condition": {"dims_c": [(4, 2)]},
}


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize("name", NAMES)
def test_bad_option_raises_before_any_work(name: str, bad: str) -> None:
    options = BAD_OPTIONS[bad]
    if name == "NICECouplingBlock" and any("clamp" in option for option in options):
        pytest.skip("NICE has no clamp")
    good = {"dims_in": [(4,)], "dims_c": [(2,)], "subnet_constructor": make_subnet(0)}
    state = torch.random.get_rng_state()
    with pytest.raises((ValueError, TypeError), match="expected|must"):
        getattr(fastflow_kernels, name)(**{**good, **options})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_conditional_transform_needs_a_condition() -> None:
    with pytest.raises(ValueError, match="condition"):
        fastflow_kernels.ConditionalAffineTransform([(4,)], [], make_subnet(0))


def test_table_has_every_option_and_class() -> None:
    assert {case.option for case in CASES} == set(OPTIONS)
    assert {case.name for case in CASES} == set(NAMES)


# --- sharing and copies


@pytest.mark.parametrize("case", PLAIN_KINDS, ids=[case.name for case in PLAIN_KINDS])
def test_threads_may_differentiate_one_graph_at_once(case: Case) -> None:
    """The parts of x's gradient are written to one tensor, which belongs to one pass."""
    block = ours(case.replace(shape=Shape(512, 7)), torch.float64, backend="eager")
    x, c = make_input(case.replace(shape=Shape(512, 7)), torch.float64)
    (y,), log_det = block([x.requires_grad_()], c)
    loss = y.square().sum() + torch.as_tensor(log_det).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)

    def differentiate() -> list[Tensor]:
        return [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(30)]

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(differentiate) for _ in range(4)]:
            for actual in future.result():
                close(actual, expected)


def test_a_subnet_may_be_any_callable() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x, 0.5 * x), 1)

    x, results = torch.randn(5, 6), []
    for constructor in (lambda *_: Half(), lambda *_: Half().forward):
        block = fastflow_kernels.GLOWCouplingBlock([(6,)], subnet_constructor=constructor)
        results.append(unwrapped(block([x])))
    for of_module, of_function in zip(*results, strict=True):
        assert torch.equal(of_module, of_function)
    with pytest.raises(TypeError, match="expected subnet_constructor to return a module"):
        fastflow_kernels.GLOWCouplingBlock([(6,)], subnet_constructor=lambda *_: None)


def test_an_attribute_replaces_a_subnet() -> None:
    """It shadows the module of that name, as in FrEIA."""
    block = fastflow_kernels.GLOWCouplingBlock([(6,)], subnet_constructor=nn.Linear)
    x = torch.randn(5, 6)
    block([x])
    block.__dict__["subnet2"] = lambda u: torch.cat((0.0 * u, u), 1)
    (y,), _ = block([x])
    close(y[:, :3], x[:, :3] + x[:, 3:])


def test_copies_leave_out_what_a_call_has_kept() -> None:
    block = fastflow_kernels.GLOWCouplingBlock([(6,)], subnet_constructor=nn.Linear)
    x = torch.randn(5, 6)
    y, _ = unwrapped(block([x]))
    for copied in (copy.deepcopy(block), through_a_file(block)):
        assert vars(copied).keys() == vars(block).keys() - {"_fastflow_call"}
        assert torch.equal(unwrapped(copied([x]))[0], y)
