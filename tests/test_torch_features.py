"""Test blocks under what PyTorch does to any module.

That is torch.func, scaled gradients, parametrizations, memory formats, shared memory and other
processes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, Dataset

import reference
from fastflow_kernels import AllInOneBlock, accelerate, report, restore
from tests.support.cases import Case, Shape, make_block, make_input

pytestmark = pytest.mark.usefixtures("fused")

KINDS = ["ours", "accelerated"]
CASES = [
    Case(Shape(4, 6, (3, 5)), name) for name in ("hard", "gin-rev-cond", "soft", "hh3-rev-cond")
]
kinds = pytest.mark.parametrize("kind", KINDS)
cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def _build(kind: str, case: Case = CASES[0], seed: int = 0) -> Any:
    block = make_block(
        AllInOneBlock if kind == "ours" else reference.AllInOneBlock, case, seed=seed
    )
    if kind == "accelerated":
        assert report(accelerate(block)).changed
    return block


def _loss(block: nn.Module, x: Tensor, c: list[Tensor]) -> Tensor:
    (y,), logdet = block([x], c)
    return 0.5 * y.square().mean() - logdet.mean() / x[0].numel()


# --- torch.func


@cases
@kinds
def test_gradients_of_every_sample_at_once(kind: str, case: Case) -> None:
    block = _build(kind, case)
    x, c = make_input(case)
    parameters = {name: p.detach() for name, p in block.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in block.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor, *c: Tensor) -> Tensor:
        (y,), logdet = functional_call(
            block, (parameters, fixed), ([x[None]], [t[None] for t in c])
        )
        return y.square().sum() - logdet.sum()

    batched = vmap(grad(loss), in_dims=(None, 0, *[0] * len(c)))(parameters, x, *c)
    for k in range(len(x)):
        block.zero_grad()
        (y,), logdet = block([x[k : k + 1]], [t[k : k + 1] for t in c])
        (y.square().sum() - logdet.sum()).backward()
        for name, p in block.named_parameters():
            if not p.requires_grad:
                continue
            if p.grad is None:  # GIN does not use its scale
                assert ("gin" in case.name, name) == (True, "global_scale")
                assert not batched[name][k].any()
            else:
                torch.testing.assert_close(batched[name][k], p.grad, rtol=1e-9, atol=1e-9, msg=name)


@cases
@kinds
def test_an_ensemble_of_blocks_at_once(kind: str, case: Case) -> None:
    """Each block has its own permutation, so the template's cached permutation must not be used."""
    blocks = [_build(kind, case, seed) for seed in range(3)]
    x, c = make_input(case)
    parameters, buffers = stack_module_state(blocks)
    template = copy.deepcopy(blocks[0])
    with torch.no_grad():
        y, logdet = vmap(
            lambda p, b: (lambda r: (r[0][0], r[1]))(functional_call(template, (p, b), ([x], c)))
        )(parameters, buffers)
        for k, block in enumerate(blocks):
            (expected,), expected_logdet = block([x], c)
            torch.testing.assert_close(y[k], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(logdet[k], expected_logdet, rtol=1e-9, atol=1e-9)
    after = template([x], c)[0][0]
    torch.testing.assert_close(after, blocks[0]([x], c)[0][0])


@cases
@kinds
def test_tangents_go_back_through_the_inverse(kind: str, case: Case) -> None:
    block = _build(kind, case)
    x, c = make_input(case)
    v = torch.randn_like(x)
    y, tangent, *_ = jvp(lambda x: block([x], c)[0][0], (x,), (v,))
    back, again, *_ = jvp(lambda y: block([y], c, rev=True)[0][0], (y,), (tangent,))
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(again, v, rtol=1e-7, atol=1e-7)


# --- mixed precision


@cases
@kinds
def test_scaled_gradients(kind: str, case: Case) -> None:
    """GradScaler under autocast makes the steps of an unscaled run.

    It makes none if a gradient overflows.
    """
    scaled, plain = (_build(kind, case).float() for _ in range(2))
    x, c = make_input(case, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for m in (scaled, plain)
    ]
    for _ in range(3):
        for model, optimizer in zip((scaled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = _loss(model, x, c)
            assert loss.dtype is torch.float32
            (scaler.scale(loss) if model is scaled else loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
    for (name, p), q in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        # The scale is a power of two, so that roundings are the same except for underflow.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    before = [p.detach().clone() for p in scaled.parameters()]
    optimizers[0].zero_grad()
    (scaler.scale(_loss(scaled, x, c)) * torch.inf).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert all(map(torch.equal, before, scaled.parameters()))
    assert scaler.get_scale() == 2.0**9


# --- parametrizations


class _Doubled(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return 2 * p

    def right_inverse(self, p: Tensor) -> Tensor:
        return 0.5 * p


@kinds
def test_parametrized_block(kind: str) -> None:
    """Although torch exchanges the block's class, values, gradients and removal stay right."""
    block, same = _build(kind), _build(kind)
    x, _ = make_input(CASES[0])
    parametrize.register_parametrization(block, "global_scale", _Doubled())
    parametrizations.weight_norm(block.subnet, "w1")
    loss, expected = _loss(block, x, []), _loss(same, x, [])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(
        block.parametrizations.global_scale.original.grad, 2 * same.global_scale.grad
    )
    torch.testing.assert_close(block.global_offset.grad, same.global_offset.grad)
    if kind == "accelerated":
        with pytest.raises(
            RuntimeError,
            match="cannot restore the model itself: the class was changed again after accelerate",
        ):
            restore(block)
    parametrize.remove_parametrizations(block, "global_scale")
    torch.testing.assert_close(_loss(block, x, []), expected)
    if kind == "accelerated":
        assert not report(restore(block)).changed
        torch.testing.assert_close(_loss(block, x, []), expected)


# --- memory


@cases
@kinds
@pytest.mark.parametrize("first", ["parameters", "blocks"])
def test_parameters_in_channels_last(first: str, kind: str, case: Case) -> None:
    x, c = make_input(case)
    expected = _build(kind, case)([x], c)
    if first == "blocks":
        block = _build(kind, case).to(memory_format=torch.channels_last)
    else:
        block = make_block(AllInOneBlock if kind == "ours" else reference.AllInOneBlock, case).to(
            memory_format=torch.channels_last
        )
        assert kind == "ours" or report(accelerate(block)).changed
    for layout in (torch.contiguous_format, torch.channels_last):
        (y,), logdet = block([x.to(memory_format=layout)], [t.to(memory_format=layout) for t in c])
        torch.testing.assert_close(y, expected[0][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logdet, expected[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(block([y], c, rev=True)[0][0], x, rtol=1e-7, atol=1e-7)


def _train_shared(block: nn.Module, x: Tensor, c: list[Tensor]) -> None:
    torch.set_num_threads(1)
    _loss(block, x, c).backward()
    with torch.no_grad():
        for p in block.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)


class _Samples(Dataset):
    """A data set of latent variables that the workers compute."""

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        self.block, self.x = block, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> Tensor:
        with torch.no_grad():
            return self.block([self.x[k : k + 1]])[0][0][0]


@kinds
def test_another_process_trains_the_shared_block(kind: str) -> None:
    block, same = _build(kind).share_memory(), _build(kind)
    x, c = make_input(CASES[0])
    assert all(p.is_shared() for p in block.parameters())
    process = mp.get_context("spawn").Process(target=_train_shared, args=(block, x, c))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    _train_shared(same, x, c)
    for p, q in zip(block.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(block([x])[0][0], same([x])[0][0])


@kinds
def test_workers_of_a_loader_run_the_block(kind: str) -> None:
    block = _build(kind)
    x, _ = make_input(CASES[0])
    loader = DataLoader(
        _Samples(block, x), batch_size=2, num_workers=1, multiprocessing_context="spawn"
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(loader)), block([x])[0][0])
