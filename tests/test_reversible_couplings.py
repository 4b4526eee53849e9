"""Reversible chains of FrEIA's coupling blocks: a plain chain's gradients in constant memory."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastflow_kernels
from fastflow_kernels import AllInOneBlock, ReversibleSequence, accelerate, report, restore
from tests.support import chains
from tests.support.chains import (
    Dropping,
    Narrow,
    Normed,
    assert_same,
    parameter_gradients,
)
from tests.support.coupling_blocks import NAMES, OPTIONS, TWO_SIDED, make_subnet
from tests.support.graph import reversible_blocks
from tests.support.memory import Peak, bytes_kept_for_backward
from tests.support.peers import freia
from tests.support.plain_chain import plain_of

pytestmark = pytest.mark.usefixtures("fused")

DEPTH, SIZE, CONDITION = 4, (6, 3, 5), (2, 3, 5)
every_class = pytest.mark.parametrize("name", NAMES)
two_sided = pytest.mark.parametrize("name", TWO_SIDED)
AFFINE = [name for name in NAMES if name != "NICECouplingBlock"]


def fill(chain: Any, module: Any, name: str, depth: int = DEPTH, **options: Any) -> Any:
    """Append blocks of one class to a chain. ConditionalAffineTransform gets its condition."""
    torch.manual_seed(0)
    size = tuple(chain.shapes[0])
    options = {"subnet_constructor": make_subnet(len(size) - 1), **options}
    if name == "NICECouplingBlock":
        options = {key: v for key, v in options.items() if not key.startswith("clamp")}
    else:
        options = {"clamp": 0.9, **options}
    if name == "ConditionalAffineTransform" or options.pop("conditional", False):
        options |= {"cond": 0, "cond_shape": (2, *size[1:])}
    options.pop("conditional", None)
    for _ in range(depth):
        chain.append(getattr(module, name), **options)
    return chain


def ours(
    name: str,
    depth: int = DEPTH,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, ...] = SIZE,
    **options: Any,
) -> ReversibleSequence:
    """Make a reversible chain of our blocks."""
    chain = fill(ReversibleSequence(*size), fastflow_kernels, name, depth, **options)
    return chain.to(dtype)


def data(
    dtype: torch.dtype = torch.float64, batch: int = 2, size: tuple[int, ...] = SIZE
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, *size), (batch, 2, *size[1:])
    x, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), [c.to(dtype)]


def run(model: nn.Module, x: Tensor, c: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Run a chain. FrEIA 0.2 returns the number 0.0 if all modules preserve volume."""
    z, log_det = model(x, c)
    return z, log_det if isinstance(log_det, Tensor) else torch.zeros(len(x))


def loss_of(model: nn.Module, x: Tensor, c: list[Tensor] | None = None) -> Tensor:
    return chains.loss_of(*run(model, x, c))


def gradients(model: nn.Module, x: Tensor, c: list[Tensor]) -> dict[str, Tensor | None]:
    """Return the output, the log-determinant and all gradients, from the same random numbers."""
    torch.manual_seed(5)
    model.zero_grad()
    x, c0 = x.detach().requires_grad_(), c[0].detach().clone().requires_grad_()
    z, log_det = run(model, x, [c0])
    chains.loss_of(z, log_det).backward()
    own = {"z": z, "log_det": log_det, "dx": x.grad, "dc": c0.grad}
    return own | parameter_gradients(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return gradients(model, *data())


def check(chain: ReversibleSequence, expected_blocks: int | None = None) -> None:
    """Check that a chain has a plain chain's gradients, and that its blocks are reversible."""
    plain = plain_of(chain)
    x, c = data()
    torch.manual_seed(5)
    count = reversible_blocks(chain(x.requires_grad_(), c)[0])
    assert count == (len(chain) if expected_blocks is None else expected_blocks)
    plain.load_state_dict(chain.state_dict())
    assert_same(gradients_of(chain), gradients_of(plain))
    for buffer, expected in zip(chain.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected)


# --- chains of FrEIA, made reversible -------------------------------------------------------------


@pytest.mark.peers
@every_class
@pytest.mark.parametrize(
    "option", ["atan", "tanh", "sigmoid", "split0.3", "split1", "split0", "cond"]
)
def test_accelerated_chain(name: str, option: str) -> None:
    options = {key: v for key, v in OPTIONS[option].items() if key not in ("clamp", "conditions")}
    framework, fm = freia().framework, freia().modules
    stock = framework.SequenceINN(*SIZE)
    for seed in range(DEPTH):
        fill(stock, fm, name, 1, conditional=option == "cond", **options)
        stock.append(fm.PermuteRandom, seed=seed)
    stock.double()
    chain = accelerate(copy.deepcopy(stock), reversible=True)
    (entry,) = report(chain).chains
    words = "8 of its 8 modules are reconstructed in the backward pass"
    assert (entry.state, entry.reason) == ("reversible", words)
    for made in (chain, copy.deepcopy(chain)):
        assert_same(gradients_of(made), gradients_of(stock))
        assert made.drift[0] < 1e-10
        assert reversible_blocks(made(*data())[0]) in (2 * DEPTH, 2 * DEPTH - 1)
    x, c = data()
    torch.testing.assert_close(chain(chain(x, c)[0], c, rev=True)[0], x)
    if option == "tanh" and name != "NICECouplingBlock":  # FrEIA's other blocks hold lambdas
        assert_same(gradients_of(pickle.loads(pickle.dumps(chain))), gradients_of(stock))
    restore(chain)
    assert type(chain) is framework.SequenceINN
    assert_same(gradients_of(chain), gradients_of(stock), tolerance=0.0)


@pytest.mark.peers
@pytest.mark.parametrize("every", [None, 1, 2, 3])
def test_accelerated_chain_of_all_classes(every: int | None) -> None:
    fm = freia().modules
    stock = freia().framework.SequenceINN(*SIZE)
    for seed, name in enumerate(NAMES):
        fill(stock, fm, name, 1, conditional=True)
        stock.append(fm.PermuteRandom, seed=seed)
        stock.append(fm.AllInOneBlock, subnet_constructor=make_subnet(2))
    stock.append(fm.Flatten)
    fill_flat = {"subnet_constructor": make_subnet(0), "clamp": 0.9}
    stock.append(fm.PermuteRandom, seed=7)
    stock.append(fm.GLOWCouplingBlock, **fill_flat, clamp_activation="TANH")
    stock.append(fm.Reshape, output_dims=SIZE)
    stock.append(fm.RNVPCouplingBlock, subnet_constructor=make_subnet(2), clamp=0.9)
    stock.double()
    chain: Any = accelerate(copy.deepcopy(stock), reversible=True)
    assert report(chain).chains[0].reason.startswith("21 of its 23 modules")
    chain.checkpoint_every = every
    expected = gradients_of(stock)
    for _ in range(2):
        assert_same(gradients_of(chain), expected)


@pytest.mark.peers
def test_block_that_is_left_keeps_its_activations() -> None:
    fm = freia().modules
    stock = freia().framework.SequenceINN(*SIZE)
    for function in ("ATAN", torch.sin, "TANH", "SIGMOID"):
        fill(stock, fm, "GLOWCouplingBlock", 1, clamp_activation=function)
    stock.double()
    chain: Any = accelerate(copy.deepcopy(stock), reversible=True)
    assert report(chain).chains[0].reason.startswith("3 of its 4 modules")
    assert_same(gradients_of(chain), gradients_of(stock))
    chain.module_list[3].f_clamp = stock.module_list[3].f_clamp = torch.sin
    assert report(chain).chains[0].reason.startswith("2 of its 4 modules")
    assert_same(gradients_of(chain), gradients_of(stock))
    chain.module_list[0].clamp = stock.module_list[0].clamp = torch.tensor(1.1).double()
    assert_same(gradients_of(chain), gradients_of(stock))


@pytest.mark.peers
def test_loaded_permutation_takes_effect() -> None:
    """Values that are no permutation cannot be inverted: the module keeps its activations."""
    fm = freia().modules
    stock = freia().framework.SequenceINN(*SIZE)
    for seed in range(2):
        fill(stock, fm, "GLOWCouplingBlock", 1)
        stock.append(fm.PermuteRandom, seed=seed)
    fill(stock, fm, "RNVPCouplingBlock", 1)
    stock.double()
    chain: Any = accelerate(copy.deepcopy(stock), reversible=True)
    for index in ([2, 0, 1, 5, 4, 3], [0, 0, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        perm = torch.tensor(index)
        state = {**stock.state_dict(), "module_list.1.perm": perm}
        state["module_list.1.perm_inv"] = perm.argsort()
        for model in (chain, stock):
            model.load_state_dict(state)
        assert_same(gradients_of(chain), gradients_of(stock))


# --- our blocks -----------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("option", ["atan", "tanh", "sigmoid", "split0.3", "split1", "cond"])
def test_chain_of_our_blocks(name: str, option: str) -> None:
    options = {key: v for key, v in OPTIONS[option].items() if key not in ("clamp", "conditions")}
    check(ours(name, conditional=option == "cond", **options))


@every_class
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_other_ranks(name: str, rank: int) -> None:
    size = (5, *(2, 3, 2)[:rank])
    chain = ours(name, size=size)
    x, c = data(size=size)
    plain = plain_of(chain)
    assert_same(gradients(chain, x, c), gradients(plain, x, c))


@every_class
def test_channels_last(name: str) -> None:
    chain = ours(name)
    x, c = data()
    plain = plain_of(chain)
    x = x.to(memory_format=torch.channels_last)
    assert_same(gradients(chain, x, c), gradients(plain, x, c))


def test_mixed_with_all_in_one_blocks() -> None:
    chain = ReversibleSequence(*SIZE)
    options: dict[str, Any] = {"subnet_constructor": make_subnet(2)}
    for i, name in enumerate(NAMES):
        fill(chain, fastflow_kernels, name, 1, conditional=bool(i % 2))
        chain.append(AllInOneBlock, **options, learned_householder_permutation=2 * (i == 2))
        chain.append(AllInOneBlock, **options, gin_block=i == 3, permute_soft=i == 4)
    check(chain.double())


@every_class
@pytest.mark.parametrize("subnet", [Dropping, Normed])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_and_batch_norm(name: str, subnet: type, training: bool) -> None:
    chain = ours(name, subnet_constructor=subnet).train(training)
    plain, after = plain_of(chain), []
    results: list[Any] = []
    for model in (chain, plain):
        results.append([gradients_of(model) for _ in range(2)])
        after.append(torch.get_rng_state())
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)
    assert torch.equal(*after)
    for buffer, expected in zip(chain.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@every_class
def test_training_flags_are_those_of_the_forward_pass(name: str) -> None:
    chain = ours(name, subnet_constructor=Dropping)
    results = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        z, log_det = model(*data())
        model.eval()
        chains.loss_of(z, log_det).backward()
        results.append(parameter_gradients(model))
    assert not any(m.training for m in chain.modules())
    assert_same(*results)


@every_class
def test_frozen_subnets(name: str) -> None:
    for frozen in ([0], [1, 2], [3], [0, 1, 2, 3]):
        chain = ours(name)
        for i in frozen:
            chain[i].requires_grad_(False)
        next(chain[2].parameters()).requires_grad_(False)
        next(chain[3].children()).requires_grad_(False)
        check(chain)
        plain = plain_of(chain)
        for model in (chain, plain):
            model.zero_grad()
            if any(p.requires_grad for p in model.parameters()):
                loss_of(model, *data()).backward()
        assert_same(parameter_gradients(chain), parameter_gradients(plain))


class Counted(nn.Module):
    """A subnet whose result depends on a buffer that each call changes."""

    factor: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.factor = self.factor * 0.9
        return self.conv(x).tanh() * self.factor


SHARED = {  # which subnets are the first one's of a block
    "s and t of a side": ("subnet_t1",),
    "both sides": ("subnet_s2",),
    "all": ("subnet_t1", "subnet_s2", "subnet_t2"),
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("subnet", [None, Dropping, Normed, Counted])
def test_subnets_that_share_modules(shared: str, subnet: type | None) -> None:
    options = {} if subnet is None else {"subnet_constructor": subnet}
    chain = ours("RNVPCouplingBlock", **options)
    for block in chain:
        for other in SHARED[shared]:
            setattr(block, other, block.subnet_s1)
    plain = plain_of(chain)
    for _ in range(2):
        assert_same(gradients_of(chain), gradients_of(plain))
    for buffer, expected in zip(chain.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@two_sided
def test_blocks_that_share_modules(name: str) -> None:
    chain = ours(name, 2)
    chain.append(chain[0])
    for child, subnet in chain[0].named_children():
        setattr(chain[1], child, subnet)
    check(chain)


def test_conditions_with_gradients_and_the_log_determinant_alone() -> None:
    for name in AFFINE:
        if name == "GINCouplingBlock":
            continue
        chain = ours(name, conditional=True)
        results = []
        for model in (chain, plain_of(chain)):
            x, c = data()
            condition = c[0].requires_grad_()
            model(x, [condition])[1].sum().backward()
            results.append({"dc": condition.grad} | parameter_gradients(model))
        # What only the last shift depends on has no gradient in one and zero in the other.
        for key, value in results[1].items():
            if value is None:
                assert results[0][key] is None or not results[0][key].any()
                results[0][key] = None
        assert_same(*results)


@every_class
def test_gradients_add_up_and_a_graph_can_be_kept(name: str) -> None:
    chain = ours(name)
    plain = plain_of(chain)
    x, c = data()
    for _ in range(2):
        for model in (chain, plain):
            loss_of(model, x, c).backward()
        assert_same(parameter_gradients(chain), parameter_gradients(plain))
    x.requires_grad_()
    loss = loss_of(chain, x, c)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


@every_class
@pytest.mark.parametrize("value", [-3.0, 0.5])
def test_changed_parameters_are_noticed(name: str, value: float) -> None:
    chain = ours(name)
    z, log_det = chain(*data())
    with torch.no_grad():
        next(chain[1].parameters()).mul_(value)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chains.loss_of(z, log_det).backward()


# --- hooks, precision, memory ---------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", [*NAMES, "PermuteRandom"])
def test_hook_that_replaces_an_output_is_an_error(name: str) -> None:
    chain: Any = fill(ReversibleSequence(*SIZE), fastflow_kernels, "GLOWCouplingBlock", 2)
    if name == "PermuteRandom":
        chain.append(freia().modules.PermuteRandom, seed=1)
        accelerate(chain)
    else:
        fill(chain, fastflow_kernels, name, 1)
    chain.double()
    chain[2].register_forward_hook(lambda module, arguments, out: ([2.0 * out[0][0]], out[1]))
    with pytest.raises(RuntimeError, match="a hook replaced the input or the output of block 2"):
        chain(*data())


@every_class
def test_hooks_fire_as_often_as_in_a_plain_chain(name: str) -> None:
    chain, counts = ours(name), []
    for model in (chain, plain_of(chain)):
        fired: list[str] = []
        for key, p in model.named_parameters():
            p.register_hook(lambda _, key=key, fired=fired: fired.append(key))
        for i, block in enumerate(model):
            block.register_forward_hook(lambda *_, i=i, fired=fired: fired.append(f"{i}"))
        gradients_of(model)
        counts.append(sorted(fired))
    assert counts[0] == counts[1]
    assert len(set(counts[0])) == len(counts[0])


@every_class
def test_second_gradients_raise(name: str) -> None:
    chain = ours(name)
    x, c = data()
    loss = loss_of(chain, x.requires_grad_(), c)
    with pytest.raises(RuntimeError, match="no second or batched gradients"):
        torch.autograd.grad(loss, x, create_graph=True)


@every_class
def test_drift_is_recorded(name: str) -> None:
    chain = ours(name)
    assert chain.drift == {}
    gradients_of(chain)
    assert list(chain.drift) == [0]
    assert 0.0 <= chain.drift[0] < 1e-10
    chain.debug = True
    gradients_of(chain)
    assert sorted(chain.drift) == [0, 1, 2, 3][: len(chain.drift)]
    assert len(chain.drift) >= DEPTH - 1
    assert "block 0: its input is off by" in chain.drift_report()


@every_class
def test_float32_is_as_exact_as_a_plain_chain(name: str) -> None:
    chain = ours(name, 4, torch.float32, clamp=0.5)
    plain, exact = plain_of(chain), plain_of(chain).double()
    results = []
    for model in (chain, plain, exact):
        x, c = data(torch.float64 if model is exact else torch.float32)
        z, log_det = model(x, c)
        chains.loss_of(z, log_det).backward()
        results.append({key: p.grad.double() for key, p in model.named_parameters()})
    assert 0.0 < chain.drift[0] < 2.0**-17
    for key, truth in results[2].items():
        error, allowed = ((r[key] - truth).norm() for r in results[:2])
        assert error <= 2 * allowed + 2.0**-17 * truth.norm(), key


class Shifting(Narrow):
    """A subnet that adds a constant to the shift."""

    shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        a = super().forward(0.1 * x)
        return torch.cat((a[:, :-3], a[:, -3:] + self.shift), 1)


@two_sided
def test_float32_that_loses_its_digits_is_noticed(name: str) -> None:
    """Block 3 adds a million, and block 4 subtracts it again."""
    chain = ours(name, 8, torch.float32, (6,), subnet_constructor=Shifting)
    for block, shift in ((chain[3], 1e6), (chain[4], -1e6)):
        for child, subnet in block.named_children():
            subnet.shift = 0.0 if child.startswith("subnet_s") else shift
    x, c = data(torch.float32, size=(6,))
    z, log_det = chain(x, c)
    with pytest.raises(RuntimeError, match="Discard them; later passes keep an activation every"):
        chains.loss_of(z, log_det).backward()
    assert chain.drift[0] > 2.0**-6
    chain.checkpoint_every = 1
    assert_same(gradients(chain, x, c), gradients(plain_of(chain), x, c), tolerance=0.0)


@every_class
def test_autocast_keeps_the_chain_in_float32(name: str) -> None:
    chain = ours(name, 4, torch.float32, subnet_constructor=Dropping).eval()
    plain, exact = plain_of(chain), plain_of(chain).double()
    results = []
    for model in (chain, plain, exact):
        x, c = data(torch.float64 if model is exact else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            z, log_det = model(x, c)
        if model is chain:
            assert z.dtype is torch.float32
        chains.loss_of(z, log_det).backward()
        results.append({key: p.grad.double() for key, p in model.named_parameters()})
    assert chain.drift[0] < 1e-5
    for key, truth in results[2].items():
        error, allowed = ((r[key] - truth).norm() for r in results[:2])
        assert error <= 2 * allowed + 1e-5 * truth.norm(), key


@every_class
def test_half_precision_keeps_activations(name: str) -> None:
    chain = ours(name, dtype=torch.bfloat16)
    x, c = data(torch.bfloat16)
    assert_same(gradients(chain, x, c), gradients(plain_of(chain), x, c), tolerance=0.0)


MEMORY = (16, 12, 12)


@every_class
def test_bytes_kept_do_not_grow_with_depth(name: str) -> None:
    x, c = data(torch.float32, 8, MEMORY)

    def kept_by(chain: nn.Module) -> int:
        return bytes_kept_for_backward(chain, lambda: loss_of(chain, x, c))

    shallow, deep = (ours(name, depth, torch.float32, MEMORY, clamp=0.3) for depth in (4, 16))
    assert kept_by(deep) == kept_by(shallow)
    assert kept_by(plain_of(deep)) > 5 * kept_by(deep)


@pytest.mark.peers
@every_class
def test_peak_memory_does_not_grow_with_depth(name: str) -> None:
    """It is that of a training step of FrEIA's chain, with a permutation after each block."""
    x, c = data(torch.float32, 8, MEMORY)

    def peak_of(depth: int, reversible: bool) -> int:
        chain = freia().framework.SequenceINN(*MEMORY)
        for seed in range(depth):
            fill(chain, freia().modules, name, 1, clamp=0.3)
            chain.append(freia().modules.PermuteRandom, seed=seed)
        accelerate(chain, reversible=reversible)
        for p in chain.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        with Peak() as peak:
            loss_of(chain, x, c).backward()
        return peak.most

    peaks = [peak_of(depth, True) for depth in (4, 16)]
    parameters = 12 * sum(p.nbytes for p in ours(name, 1, torch.float32, MEMORY).parameters())
    assert peaks[1] <= peaks[0] + parameters + 12 * 1024
    assert peaks[1] < 0.5 * peak_of(16, False)


@every_class
def test_inverse_and_calls_without_gradients_are_plain(name: str) -> None:
    chain = ours(name)
    x, c = data()
    with torch.no_grad():
        z, log_det = chain(x, c)
        torch.testing.assert_close(chain(z, c, rev=True), (x, -log_det))
    assert not z.requires_grad
    back = chain(z.requires_grad_(), c, rev=True)[0]
    assert reversible_blocks(back) == 0
    plain = plain_of(chain)
    expected = plain(z, c, rev=True)[0]
    for actual, e in zip(*(torch.autograd.grad(t.sum(), z) for t in (back, expected)), strict=True):
        torch.testing.assert_close(actual, e)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_transformed_calls_run_an_ordinary_chain() -> None:
    chain = ours("RNVPCouplingBlock", 2)
    x, c = data()
    expected = gradients(plain_of(chain), x, c)
    compiled: Any = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert_same({"dx": gradients(compiled, x, c)["dx"]}, {"dx": expected["dx"]})
    grad = torch.func.grad(lambda x: loss_of(chain, x, c))(x)
    torch.testing.assert_close(grad, expected["dx"])


def test_no_warning_is_given() -> None:
    chain = ours("GLOWCouplingBlock", 8, torch.float32, clamp=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(chain, *data(torch.float32)).backward()
