"""Subnets of reversible chains whose second run differs, and compiled and scripted ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import (
    AllInOneBlock,
    ReversibleSequence,
    drift,
)
from tests.support.chains import (
    Narrow,
    assert_same,
    gradients,
    loss_of,
    parameter_gradients,
    simple,
)
from tests.support.graph import reversible_blocks
from tests.support.plain_chain import Plain, plain_of

pytestmark = pytest.mark.usefixtures("fused")


class OwnGenerator(Narrow):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[0], 1, generator=self.generator) > 0.5
        return super().forward(x) * kept.to(x.dtype) * 2


class PythonsNumbers(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.uniform(0.5, 2.0)


class NumpysNumbers(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        numpy = pytest.importorskip("numpy")
        return super().forward(x) * float(numpy.random.uniform(0.5, 2.0))


class Counting(Narrow):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class ShiftOnly(Narrow):
    """A subnet whose second run differs in what the log-determinant does not show."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        s, t = super().forward(x).chunk(2, 1)
        self.calls += 1
        return torch.cat((s, t + self.calls), 1)


class AsksForGrad(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        a = super().forward(x)
        return a if torch.is_grad_enabled() else a.sin()


class AsksItsInput(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        a = super().forward(x)
        return a.sin() if x.requires_grad else a


class BufferWithGradient(Narrow):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("factor", torch.full((1,), 1.5).requires_grad_())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class AttributeWithGradient(Narrow):
    """A subnet that learns a tensor which ``to()`` does not find."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.factor = torch.full((1,), 1.5, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor.to(x.dtype)


class HandsOnItsAttribute(AttributeWithGradient):
    def forward(self, x: Tensor) -> Tensor:
        return self.factor.to(x.dtype).expand(len(x), self.last.out_features)


class DifferentiatesInside(Narrow):
    """A subnet that takes a gradient by its input, as those of gradient flows do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(self.first(x).tanh().square().sum(), x, create_graph=True)
        return self.last(self.first(dx + x).tanh())


class HyperNetwork(AttributeWithGradient):
    """A subnet with a graph that leads out of it, and that a backward pass frees."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.made = self.factor.exp()

    def forward(self, x: Tensor) -> Tensor:
        return Narrow.forward(self, x) * self.made.to(x.dtype)


REPEATABLE = [
    AsksForGrad,
    AsksItsInput,
    BufferWithGradient,
    AttributeWithGradient,
    HandsOnItsAttribute,
    HyperNetwork,
    DifferentiatesInside,
]
UNREPEATABLE = [OwnGenerator, PythonsNumbers, NumpysNumbers, Counting, ShiftOnly]
CHAINS: dict[str, tuple[int, dict[str, Any], torch.dtype]] = {
    "one": (1, {}, torch.float64),
    "five": (5, {}, torch.float64),
    "every": (3, {"checkpoint_every": 1}, torch.float64),
    "two": (4, {"checkpoint_every": 2}, torch.float64),
    "float32": (1, {}, torch.float32),
    "bfloat16": (3, {}, torch.bfloat16),
}


@pytest.mark.parametrize("wanted", [True, False], ids=["dx", "x"])
@pytest.mark.parametrize("which", CHAINS)
@pytest.mark.parametrize("subnet", [*REPEATABLE, *UNREPEATABLE])
def test_gradients_of_a_plain_chain_or_an_error(subnet: type, which: str, wanted: bool) -> None:
    depth, options, dtype = CHAINS[which]
    x = torch.linspace(-1.0, 1.0, 128).view(16, 8).to(dtype)
    results: list[dict[str, Tensor | None]] = []
    refused = None
    for kind in (Plain, ReversibleSequence):
        torch.manual_seed(0)
        random.seed(0)
        chain = kind(8, **(options if kind is ReversibleSequence else {}))
        for _ in range(depth):
            chain.append(AllInOneBlock, subnet_constructor=subnet)
        chain.to(dtype)
        leaf = x.clone().requires_grad_(wanted)
        try:
            loss_of(*chain(leaf)).backward()
        except RuntimeError as error:
            refused = (kind, str(error))
            break
        tensors = {**dict(chain.named_parameters()), **dict(chain.named_buffers()), "x": leaf}
        tensors |= {
            f"{i}.factor": block.subnet.factor
            for i, block in enumerate(chain)
            if isinstance(block.subnet, AttributeWithGradient)
        }
        results.append({name: t.grad for name, t in tensors.items()})
    assert (refused is None) == (subnet in REPEATABLE)
    if refused is not None:
        assert refused[0] is ReversibleSequence
        assert "reversible chain" in refused[1]
        return
    assert_same(
        results[1],
        results[0],
        1e-8 if dtype is torch.float64 else 1e-5 if dtype is torch.float32 else 0.0,
    )


def test_a_buffer_that_takes_gradients_keeps_its_block_plain() -> None:
    chain = simple(2, shape=(8,))
    chain.append(AllInOneBlock, subnet_constructor=BufferWithGradient)
    assert reversible_blocks(chain.double()(torch.randn(3, 8, dtype=torch.float64))[0]) == 2


def test_frozen_blocks_at_the_start_are_kept_for_what_else_learns() -> None:
    chain = simple(2, subnet=AttributeWithGradient, shape=(8,)).requires_grad_(False)
    plain = plain_of(chain)
    for model in (chain, plain):
        loss_of(*model(torch.ones(3, 8, dtype=torch.float64))).backward()
    assert_same(
        *(
            {str(i): block.subnet.factor.grad for i, block in enumerate(model)}
            for model in (chain, plain)
        )
    )


def test_what_a_subnet_hands_out_beside_its_result_is_refused() -> None:
    """Its gradient would not reach the blocks before. If there are none, the gradient is right."""

    class Auxiliary(Narrow):
        def forward(self, x: Tensor) -> Tensor:
            a = super().forward(x)
            self.loss = a.square().sum()
            return a

    for wanted in (True, False):
        x = torch.randn(3, 8, requires_grad=wanted)
        results = []
        chain = simple(1, torch.float32, Auxiliary, (8,))
        for model in (chain, plain_of(chain)):
            z, log_det = model(x)
            loss = loss_of(z, log_det) + model[0].subnet.loss
            if wanted and model is chain:
                with pytest.raises(RuntimeError, match="handed out something beside its result"):
                    loss.backward()
            else:
                loss.backward()
            results.append(parameter_gradients(model))
        if not wanted:
            assert_same(results[0], results[1], 1e-5)


def test_small_differences_of_one_channel_show() -> None:
    """They show also in a channel that is small beside the others, and where squares overflow."""
    differences = drift.Differences()
    for factor in (1.0, 1e30, 1e-30):
        y = (
            factor
            * torch.randn(64, 3, 5).double()
            * torch.tensor([1.0, 0.1, 1e3]).double().view(3, 1)
        )
        for dtype, off in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
            again = y.clone()
            differences.record(0, again.to(dtype), y.to(dtype))
            again[:, 1] *= 1 + off
            with pytest.raises(
                RuntimeError, match="block 0 of the reversible chain returned something else"
            ):
                differences.record(0, again.to(dtype), y.to(dtype))


# --- compiled and scripted subnets and blocks -----------------------------------------------------


def traced(i: int, o: int) -> nn.Module:
    return torch.jit.trace(Narrow(i, o), torch.randn(16, i))


def scripted(i: int, o: int) -> nn.Module:
    return torch.jit.script(Narrow(i, o))


def holding_scripted(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, i), scripted(i, o))


def compiled(i: int, o: int) -> Any:
    return torch.compile(Narrow(i, o), backend="aot_eager")


def compiled_in_place(i: int, o: int) -> nn.Module:
    subnet = Narrow(i, o)
    subnet.compile(backend="aot_eager")
    return subnet


def holding_compiled(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, i), compiled(i, o))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    "subnet", [traced, scripted, holding_scripted, compiled, compiled_in_place, holding_compiled]
)
def test_compiled_and_scripted_subnets(subnet: Callable[[int, int], nn.Module], depth: int) -> None:
    """The chains are float32, as a scripted module's parameters are."""
    torch._dynamo.reset()
    results = []
    for kind in (ReversibleSequence, Plain):
        torch.manual_seed(0)
        chain = kind(8)
        for _ in range(depth):
            chain.append(AllInOneBlock, subnet_constructor=subnet)
        for seed in range(3):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_(
                seed > 0
            )
            loss_of(*chain(x)).backward()
        results.append(parameter_gradients(chain))
    assert_same(results[0], results[1], 1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_blocks_are_kept(in_place: bool) -> None:
    torch._dynamo.reset()
    chain, x = simple(4, torch.float64, shape=(8,)), torch.randn(5, 8, dtype=torch.float64)
    plain = plain_of(chain)
    if in_place:
        chain[1].compile(backend="aot_eager")
    else:
        chain.module_list[1] = torch.compile(chain[1], backend="aot_eager")
    assert reversible_blocks(chain(x)[0]) == 3
    results = [
        {name.replace("_orig_mod.", ""): t for name, t in gradients(model, x).items()}
        for model in (chain, plain)
    ]
    assert_same(*results)
