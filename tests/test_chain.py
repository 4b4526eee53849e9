"""Accelerated chains of FrEIA: results, gradients and what torch does with them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fastflow_kernels import AllInOneBlock
from fastflow_kernels.engines import chunks
from tests.support.blocks import Results, evaluate
from tests.support.cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    Case,
    Shape,
    both_directions,
    ids,
    make_block,
    make_subnet,
    with_and_without_grad,
)
from tests.support.chains import (
    SHAPE,
    accelerated,
    append,
    assert_like_stock,
    assert_meets,
    called_one_by_one,
    inputs_of_chain,
    loss_of,
    runs_seen,
    stock_chain,
)
from tests.support.dispatch_modes import Wrapped, Wrapping
from tests.support.graph import nodes
from tests.support.memory import bytes_kept_for_backward
from tests.support.peers import anomalib_block, freia
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.peers

SHAPES = (
    Shape(3, 7),
    Shape(1, 2),
    Shape(3, 1),
    Shape(3, 5, (7,)),
    Shape(2, 2, (1,)),
    Shape(1, 7, (3, 5)),
    Shape(3, 2, (3, 3)),
    Shape(3, 9, (1, 1)),
    Shape(2, 3, (2, 3, 3)),
)


MIXED = ("hard", "cond", "hard", "gin", "gin", "soft", "soft")


def linked(z: Tensor) -> int:
    """Count the blocks in the graph that an engine has evaluated together."""
    return nodes(z)["_CouplingInChainBackward"]


# --- results and gradients ------------------------------------------------------------------------


@both_directions
@plain_and_fused
@pytest.mark.parametrize("shape", SHAPES, ids=ids(SHAPES))
def test_every_shape(shape: Shape, small: int, rev: bool) -> None:
    stock = stock_chain(*MIXED, "rev", "rev", "hh1", "hh1", shape=shape)
    assert_like_stock(stock, *inputs_of_chain(shape), rev=rev)


@both_directions
@plain_and_fused
@pytest.mark.parametrize("name", [*KINDS, "exp", "sigmoid", "clamp0.5", "clamp8-exp", "clamp-3"])
def test_every_option(name: str, small: int, rev: bool) -> None:
    stock = stock_chain(*[name] * 4)
    x, c = inputs_of_chain()
    with runs_seen() as lengths:
        accelerated(stock)(x, c, rev=rev)
    assert lengths == [4]
    assert_like_stock(stock, x, c, rev=rev)


@pytest.mark.parametrize("name", ["hard", "cond", "sigmoid", "exp", "clamp8-exp", "clamp0.5"])
@pytest.mark.parametrize("shape", [SHAPE, Shape(1, 7, (4,)), Shape(5, 4)], ids=str)
def test_blocks_are_linked(shape: Shape, name: str, fused: None) -> None:
    chain = accelerated(stock_chain(*[name] * 4, shape=shape))
    x, c = inputs_of_chain(shape)
    z, _ = chain(x, c)
    assert linked(z) == 4
    assert nodes(z)["_ForkBackward"] == 0
    assert nodes(chain(x.requires_grad_(), c)[0])["_ForkBackward"] == 1


@both_directions
@plain_and_fused
def test_a_run_ends_where_options_change(small: int, rev: bool) -> None:
    names = ("hard", "hard", "rev", "rev", "gin", "gin", "gin", "hh1", "hh1")
    stock = stock_chain(*names, "exp", "exp", "clamp0.5", "sigmoid", "cond", "hard")
    x, c = inputs_of_chain()
    with runs_seen() as lengths:
        accelerated(stock)(x, c, rev=rev)
    expected = [2, 2, 3, 2, 2, 2]
    assert lengths == (expected[::-1] if rev else expected)
    assert_like_stock(stock, x, c, rev=rev)


class Doubled(nn.Module):
    """An invertible module that no library has."""

    dims_in: Any = None

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        n = x[0][0].numel() * 0.6931471805599453
        return (x[0] * (0.5 if rev else 2.0),), x[0].new_full((len(x[0]),), -n if rev else n)


@both_directions
@plain_and_fused
def test_other_modules_in_between(small: int, rev: bool) -> None:
    modules: Any = freia().modules
    x, c = inputs_of_chain()
    stock = stock_chain("hard", "hard")
    shape = [SHAPE.full[1:]]
    append(stock, modules.PermuteRandom(shape))
    append(stock, modules.GLOWCouplingBlock(shape, subnet_constructor=make_subnet(2, 1.0)))
    for module in (*stock_chain("hard", "hard").module_list, modules.ActNorm(shape), Doubled()):
        append(stock, module)
    for module in stock_chain("soft", "soft", "soft").module_list:
        append(stock, module)
    stock.double()(x, c)  # ActNorm initialises itself
    with runs_seen() as lengths:
        accelerated(stock)(x, c, rev=rev)
    assert lengths == ([3, 2, 2] if rev else [2, 2, 3])
    assert_like_stock(stock, x, c, rev=rev)


@both_directions
@plain_and_fused
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
def test_blocks_of_our_class(dialect: str, small: int, rev: bool) -> None:
    """FrEIA 0.2 has no blocks of dialect "freia", so they are called one by one for comparison."""
    ours = freia().framework.SequenceINN(*SHAPE.full[1:])
    for seed, name in enumerate(("hard", "cond", "hard", "gin", "gin", "soft", "soft")):
        block = make_block(AllInOneBlock, Case(SHAPE, name), seed=seed, dialect=dialect)
        append(ours, block, 1 if name == "cond" else None)
    x, c = inputs_of_chain()
    with runs_seen() as lengths:
        actual = evaluate(accelerated(ours), x, c, rev, wrap=False)
    assert lengths == ([2, 2, 3] if rev else [3, 2, 2])
    expected = evaluate(ours, x, c, rev, wrap=False)
    baseline = evaluate(
        copy.deepcopy(ours).float(), x.float(), [t.float() for t in c], rev, wrap=False
    )
    assert_meets(actual, expected, baseline, ours, torch.float64)


@plain_and_fused
def test_blocks_of_anomalib_and_of_freia_together(small: int) -> None:
    stock = stock_chain("hard", "hard", peer=anomalib_block)
    for block in stock_chain("hard", "hard").module_list:
        append(stock, block)
    x, c = inputs_of_chain()
    with runs_seen() as lengths:
        accelerated(stock)(x, c)
    assert lengths == [4]
    assert_like_stock(stock, x, c)


@both_directions
@plain_and_fused
@with_and_without_grad
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad: bool, small: int, rev: bool) -> None:
    """The result has the strides that blocks give it one by one."""
    stock = stock_chain(*MIXED)
    x, c = (LAYOUTS[layout](inputs_of_chain()[0]), list(map(LAYOUTS[layout], inputs_of_chain()[1])))

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        return evaluate(model, x, c, rev, grad, wrap=False)

    assert_like_stock(stock, x, c, run)
    chain = accelerated(stock)
    with torch.set_grad_enabled(grad):
        strides = [m(x, c, rev=rev)[0].stride() for m in (chain, called_one_by_one(chain))]
    assert strides[0] == strides[1]


@plain_and_fused
@with_and_without_grad
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtypes(dtype: str, grad: bool, small: int) -> None:
    stock = stock_chain(*MIXED, "rev", "rev", dtype=DTYPES[dtype])
    x, c = inputs_of_chain(dtype=DTYPES[dtype])

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        return evaluate(model, x, c, grad=grad, wrap=False)

    assert_like_stock(stock, x, c, run)
    chain = accelerated(stock)
    z, log_det = chain(x, c)
    assert (z.dtype, log_det.dtype) == (DTYPES[dtype], torch.float32)


@plain_and_fused
@with_and_without_grad
def test_inverse_in_float32(grad: bool, small: int) -> None:
    stock = stock_chain("hard", "hard", "soft", "soft", dtype=torch.float32)

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        return evaluate(model, x, c, True, grad, wrap=False)

    assert_like_stock(stock, *inputs_of_chain(dtype=torch.float32), run)


@both_directions
@plain_and_fused
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["hard", "gin", "soft"])
def test_autocast(name: str, dtype: str, small: int, rev: bool) -> None:
    stock = stock_chain(*[name] * 3, dtype=torch.float32)
    x, _ = inputs_of_chain(dtype=DTYPES[dtype])
    chain = accelerated(stock)
    results = []
    for model in (chain, called_one_by_one(chain)):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            results.append(model(x, rev=rev))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype is expected.dtype
        # Each block rounds to half precision where it does by itself, so that little is left.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@plain_and_fused
def test_empty_batches(small: int) -> None:
    chain = accelerated(stock_chain("hard", "hard", "soft", "soft"))
    x = torch.zeros(0, *SHAPE.full[1:], dtype=torch.float64, requires_grad=True)
    z, log_det = chain(x)
    assert (z.shape, log_det.shape) == (x.shape, (0,))
    (z.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [Shape(7, 6, (5, 9)), Shape(3, 7, (40, 41))], ids=str)
def test_many_chunks(shape: Shape, fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks are of a few samples, or of a few channel pairs of one sample."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 11)
    for dtype in (torch.float64, torch.bfloat16):
        stock = stock_chain("hard", "hard", "cond", "rev", "rev", shape=shape, dtype=dtype)
        assert_like_stock(stock, *inputs_of_chain(shape, dtype))


@both_directions
@plain_and_fused
@with_and_without_grad
def test_a_mode_that_wraps_every_result(grad: bool, small: int, rev: bool) -> None:
    stock = stock_chain("hard", "hard", "soft", "soft")
    x, _ = inputs_of_chain()
    with torch.set_grad_enabled(grad):
        expected = accelerated(stock)(x, rev=rev)
        with Wrapping():
            actual = accelerated(stock)(x, rev=rev)
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, Wrapped)
        torch.testing.assert_close(a.held, e, rtol=1e-9, atol=1e-9)


# --- which gradients ------------------------------------------------------------------------------


def freeze_subnets(chain: Any) -> None:
    for module in chain.module_list:
        module.subnet.requires_grad_(False)


def freeze_scales(chain: Any) -> None:
    for module in chain.module_list[1:]:
        module.global_scale.requires_grad_(False)
        module.global_offset.requires_grad_(module is chain.module_list[1])


def freeze_first(chain: Any) -> None:
    chain.module_list[:2].requires_grad_(False)


def freeze_all(chain: Any) -> None:
    chain.requires_grad_(False)


FROZEN: dict[str, Callable[[Any], None]] = {
    "nothing": lambda chain: None,
    "subnets": freeze_subnets,
    "scales": freeze_scales,
    "first": freeze_first,
    "all": freeze_all,
}


@plain_and_fused
@pytest.mark.parametrize("used", ["both", "z", "log_det"])
@pytest.mark.parametrize("wants_x", [True, False], ids=["x", "no_x"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_gradients(frozen: str, wants_x: bool, used: str, small: int) -> None:
    """The same gradients exist as for the stock chain, apart from zeros."""
    if frozen == "all" and not wants_x:
        return
    stock = stock_chain("hard", "hard", "hard", "gin", "gin", "soft", "soft")
    FROZEN[frozen](stock)

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        x = x.detach().requires_grad_(wants_x)
        z, log_det = model(x)
        weight = torch.linspace(-1.0, 1.0, z.numel()).to(z).view_as(z)
        loss = {"both": loss_of(z, log_det), "z": (z * weight).sum(), "log_det": log_det.sum()}
        loss[used].backward()
        results: Results = {"output": z.detach(), "dx": x.grad}
        return results | {name: p.grad for name, p in model.named_parameters()}

    assert_like_stock(stock, *inputs_of_chain(), run)


@plain_and_fused
def test_gradients_add_up(small: int) -> None:
    stock = stock_chain("hard", "hard", "soft", "soft", "gin", "gin")

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        for factor in (1.0, 0.5, -1.3):
            z, log_det = model(factor * x)
            loss_of(z, log_det).backward()
        return {"output": z} | {name: p.grad for name, p in model.named_parameters()}

    assert_like_stock(stock, *inputs_of_chain(), run)


@plain_and_fused
@pytest.mark.parametrize("used", ["both", "z", "log_det"])
@pytest.mark.parametrize("name", ["hard", "cond", "gin", "soft", "hh1"])
def test_second_derivatives(name: str, used: str, small: int) -> None:
    stock = stock_chain(*[name] * 3)

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        leaves = [t.detach().requires_grad_() for t in (x, *c)]
        z, log_det = model(leaves[0], leaves[1:])
        both = z.square().sum() + 0.1 * (log_det * z.flatten(1).sum(1)).sum()
        loss = {"both": both, "z": z.square().sum(), "log_det": log_det.sum()}[used]
        gradients = torch.autograd.grad(
            loss, [p for p in (*leaves, *model.parameters()) if p.requires_grad],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
        sum(g.square().sum() for g in gradients if g is not None and g.requires_grad).backward()
        results: Results = {"output": z, "dx": leaves[0].grad, "dc": leaves[2].grad}
        return results | {name: p.grad for name, p in model.named_parameters()}

    assert_like_stock(stock, *inputs_of_chain(), run)


@plain_and_fused
@pytest.mark.parametrize("shape", [Shape(1, 3, (2,)), Shape(2, 4)], ids=str)
def test_gradgradcheck_and_batched_gradients(shape: Shape, small: int) -> None:
    chain = accelerated(stock_chain("hard", "hard", shape=shape))
    x = inputs_of_chain(shape)[0].requires_grad_()
    assert torch.autograd.gradcheck(chain, (x,), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(chain, (x,))


@plain_and_fused
@pytest.mark.parametrize("name", ["hard", "soft"])
def test_a_graph_is_used_twice_if_retained(name: str, small: int) -> None:
    chain = accelerated(stock_chain(*[name] * 3))
    x = inputs_of_chain()[0].requires_grad_()
    loss = loss_of(*chain(x))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, x)


@plain_and_fused
def test_threads_that_share_a_graph(small: int) -> None:
    chain = accelerated(stock_chain(*["hard"] * 3, shape=Shape(3, 6, (20, 20))))
    x = inputs_of_chain(Shape(3, 6, (20, 20)))[0].requires_grad_()
    loss = loss_of(*chain(x))
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    results: list[Tensor] = []

    def run() -> None:
        for _ in range(10):
            results.append(torch.autograd.grad(loss, x, retain_graph=True)[0])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(torch.equal(result, expected) for result in results)


@plain_and_fused
@pytest.mark.parametrize("changed", ["x", "z", "log_det"])
def test_changes_in_place_between_the_passes(changed: str, small: int) -> None:
    """Results may be changed. A changed input is noticed, as in the stock chain."""
    stock = stock_chain(*["hard"] * 3)

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        x = x.detach().clone().requires_grad_()
        read = 1.0 * x
        z, log_det = model(read)
        with torch.no_grad():
            {"x": read, "z": z, "log_det": log_det}[changed].mul_(2.0)
        loss_of(z, log_det).backward()
        return {"output": z, "dx": x.grad}

    if changed == "x":
        for model in (stock, accelerated(stock)):
            with pytest.raises(RuntimeError, match="modified"):
                run(model, *inputs_of_chain())
        return
    assert_like_stock(stock, *inputs_of_chain(), run)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants_x", [True, False], ids=["x", "no_x"])
@pytest.mark.parametrize("name", ["hard", "soft", "gin"])
@pytest.mark.parametrize("shape", [Shape(3, 6, (9, 8)), Shape(1, 7, (9, 8)), Shape(50, 6)], ids=str)
def test_a_block_keeps_its_input_and_the_coefficients(
    shape: Shape, name: str, wants_x: bool, fused: None
) -> None:
    """Beside them it keeps scale and index, which have no pixels."""
    chain = accelerated(stock_chain(*[name] * 4, shape=shape))
    x = inputs_of_chain(shape)[0].requires_grad_(wants_x)
    kept = bytes_kept_for_backward(
        chain, lambda: chain(x), [block.subnet for block in chain.module_list]
    )
    coefficients = x[:, : x.shape[1] // 2 * 2].numel()
    assert kept >= 4 * 8 * (x.numel() + coefficients)
    assert kept <= 4 * 8 * (x.numel() + coefficients + 3 * x.shape[1])


# --- what torch does with a chain -----------------------------------------------------------------


def exported(chain: nn.Module, strict: bool) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        return torch.export.export(chain, (x,), strict=strict).module()(2.0 * x)

    return run


def compiled(chain: nn.Module, rev: bool) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        torch._dynamo.reset()
        graph = torch.compile(chain, backend="aot_eager", fullgraph=True)
        x = x.clone().requires_grad_()
        z, log_det = graph(x, rev=rev)
        return z, log_det, torch.autograd.grad(loss_of(z, log_det), x)[0]

    return run


def traced_by_fakes(chain: Any) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            z, log_det = chain(mode.from_tensor(x))
        return [(*t.shape, *t.stride(), str(t.dtype)) for t in (z, log_det)]

    return run


def gradients_of_parameters(chain: Any) -> Callable[[Tensor], Any]:
    names = ("global_scale", "global_offset", "w1", "b1", "w2", "b2")
    parameters = {n: p.detach() for n, p in chain.named_parameters() if n.endswith(names)}

    def run(x: Tensor) -> Any:
        def loss(replaced: dict[str, Tensor]) -> Tensor:
            return loss_of(*functional_call(chain, replaced, (x,)))

        return list(grad(loss)(parameters).values())

    return run


RECORDED: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "vmap": lambda chain: vmap(lambda sample: chain(sample[None])),
    "grad": lambda chain: grad(lambda x: loss_of(*chain(x))),
    "jvp": lambda chain: lambda x: jvp(lambda t: tuple(chain(t)), (x,), (x,)),
    "functional_call": lambda chain: (
        lambda x: functional_call(
            chain, {"module_list.1.global_scale": 2.0 + chain.module_list[1].global_scale}, (x,)
        )
    ),
    "grad of parameters": gradients_of_parameters,
    "fakes": traced_by_fakes,
    "make_fx": lambda chain: lambda x: make_fx(chain)(x)(2.0 * x),
    "symbolic": lambda chain: (
        lambda x: make_fx(chain, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)(2.0 * x)
    ),
    "trace": lambda chain: lambda x: torch.jit.trace(chain, x)(2.0 * x),
    "export": lambda chain: exported(chain, False),
    "strict export": lambda chain: exported(chain, True),
    "compile": lambda chain: compiled(chain, False),
    "compile inverse": lambda chain: compiled(chain, True),
}


@pytest.mark.parametrize("how", RECORDED)
def test_recorded_and_transformed(how: str, fused: None) -> None:
    """All of it sees the operations of blocks that are called one by one."""
    chain = accelerated(stock_chain("hard", "hard", "soft"))
    x, _ = inputs_of_chain()
    actual, expected = (RECORDED[how](m)(x) for m in (chain, called_one_by_one(chain)))
    if how == "fakes":
        assert actual == expected
        return
    tolerance = 1e-12 if how == "functional_call" else 0.0  # that one runs fused
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@both_directions
@plain_and_fused
def test_inference_mode(small: int, rev: bool) -> None:
    stock = stock_chain("hard", "hard", "soft", "soft")

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        with torch.inference_mode():
            z, log_det = model(x, rev=rev)
        return {"output": z.clone(), "log-det": log_det.clone()}

    assert_like_stock(stock, *inputs_of_chain(), run)


@plain_and_fused
@pytest.mark.parametrize("how", ["hooks", "cpu", "checkpoint", "reentrant", "anomaly"])
def test_contexts_of_autograd(how: str, small: int) -> None:
    stock = stock_chain("hard", "hard", "soft", "soft")

    def run(model: Any, x: Tensor, c: list[Tensor]) -> Results:
        x = x.detach().requires_grad_()
        if how == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
                z, log_det = model(x)
        elif how == "cpu":
            with torch.autograd.graph.save_on_cpu():
                z, log_det = model(x)
        elif how == "anomaly":
            with torch.autograd.detect_anomaly(check_nan=True):
                z, log_det = model(x)
        else:
            run_again = torch.utils.checkpoint.checkpoint
            z, log_det = run_again(model, x, use_reentrant=how == "reentrant")
        loss_of(z, log_det).backward()
        results: Results = {"output": z, "log-det": log_det, "dx": x.grad}
        return results | {name: p.grad for name, p in model.named_parameters()}

    assert_like_stock(stock, *inputs_of_chain(), run)
