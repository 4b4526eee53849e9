"""Reversible chains: the gradients of a plain chain, in memory that does not grow with depth,
wherever training gets complicated.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reference
from bench.memory import bytes_kept_for_backward
from bench.peers import anomalib_block, freia, freia_block
from bench.reversible import Peak, Plain
from fastflow_kernels import (
    AllInOneBlock,
    ReversibleSequence,
    accelerate,
    dispatch,
    report,
    restore,
    reversible,
)
from fastflow_kernels.engines import eager
from fastflow_kernels.spec import CouplingSpec
from tests.cases import LAYOUTS, OPTIONS, Case, Shape, make_block, make_input, make_subnet
from tests.compare import assert_close
from tests.graph import reversible_blocks

DEPTH = 5
SHAPE = Shape(2, 6, (3, 5))


def chain_of(
    case: Case, depth: int = DEPTH, dtype: torch.dtype = torch.float64, **options: Any
) -> ReversibleSequence:
    chain = ReversibleSequence(*case.shape.full[1:], **options)
    for seed in range(depth):
        chain.append(
            make_block(AllInOneBlock, case, dtype, seed=seed), cond=0 if case.conditions else None
        )
    return chain


def simple(depth: int = DEPTH, dtype: torch.dtype = torch.float64, subnet: Callable | None = None, shape: tuple[int, ...] = (6, 3, 5),
           **options: Any) -> ReversibleSequence:  # fmt: skip
    torch.manual_seed(0)
    chain = ReversibleSequence(*shape, **options)
    for _ in range(depth):
        chain.append(AllInOneBlock, subnet_constructor=subnet or make_subnet(len(shape) - 1, 3.0))
    return chain.to(dtype)


def plain_of(chain: ReversibleSequence) -> ReversibleSequence:
    other = copy.deepcopy(chain)
    other.__class__ = Plain
    return other


def loss_of(z: Tensor, log_det: Tensor) -> Tensor:
    weights = torch.linspace(-1.0, 1.0, z.numel(), dtype=z.dtype).view(z.shape)
    return (
        (z * weights).sum()
        + 0.1 * z.square().sum()
        - (log_det * torch.linspace(0.5, 1.0, len(log_det), dtype=log_det.dtype)).sum()
    )


def gradients(
    chain: nn.Module, x: Tensor, c: list[Tensor] | None = None, backward: bool = True
) -> dict[str, Tensor | None]:
    """Result, log-determinant and every gradient; parameters' gradients are added up over calls."""
    x = x.detach().requires_grad_()
    c = None if c is None else [t.detach().clone().requires_grad_() for t in c]
    z, log_det = chain(x, c)
    if backward:
        loss_of(z, log_det).backward()
    found = {
        "z": z,
        "log_det": log_det,
        "dx": x.grad,
        **{f"dc{i}": t.grad for i, t in enumerate(c or ())},
    }
    return found | {name: p.grad for name, p in chain.named_parameters()}


def assert_same(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], tolerance: float = 1e-8
) -> None:
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        mine = ours[name]
        assert (mine is None) == (truth is None), name
        if truth is not None and truth.numel():
            error, magnitude = (mine - truth).abs().max().item(), truth.abs().max().item()
            assert error <= tolerance * max(magnitude, 1e-3), f"{name}: {error} of {magnitude}"


def assert_like_plain(
    chain: ReversibleSequence, x: Tensor, c: list[Tensor] | None = None, tolerance: float = 1e-8
) -> None:
    plain = plain_of(chain)
    assert_same(gradients(chain, x, c), gradients(plain, x, c), tolerance)


# --- every kind of block --------------------------------------------------------------------------


@pytest.mark.parametrize("small", [0, dispatch.SMALL], ids=["fused", "small"])
@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if len(OPTIONS[name].get("conditions", ())) < 2]
)
def test_every_option_rank_and_layout_gives_a_plain_chains_gradients(
    name: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "SMALL", small)
    for shape in (
        Shape(3, 7),
        Shape(2, 5, (7,)),
        SHAPE,
        Shape(2, 6, (2, 3, 2)),
        Shape(2, 2),
        Shape(2, 1, (3,)),
    ):
        layouts = (
            ("contiguous", "channels_last", "expanded")
            if shape is SHAPE and not small
            else ("contiguous",)
        )
        for layout in layouts if len(shape.spatial) != 3 else ("channels_last",):
            case = Case(shape, name)
            x, c = make_input(case)
            chain = chain_of(case, 3)
            for every in (None, 1, 2):
                chain.checkpoint_every = every
                chain.zero_grad()
                assert_like_plain(chain, LAYOUTS[layout](x), c)


@pytest.mark.parametrize("small", [0, dispatch.SMALL], ids=["fused", "small"])
@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if len(OPTIONS[name].get("conditions", ())) < 2]
)
def test_every_option_where_the_input_takes_no_gradient(
    name: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training. Only the first trained parameter needs the gradient there: reflections ahead
    of the coupling, for one.
    """
    monkeypatch.setattr(dispatch, "SMALL", small)
    for shape, layout in (
        (Shape(3, 7), "contiguous"),
        (SHAPE, "contiguous"),
        (SHAPE, "channels_last"),
        (Shape(2, 3), "contiguous"),
    ):
        case = Case(shape, name)
        x, c = make_input(case)
        x = LAYOUTS[layout](x)
        for every, frozen in ((None, ()), (None, ("subnet", "global")), (1, ()), (2, ("vk",))):
            chain = chain_of(case, 3, checkpoint_every=every)
            for key, p in chain[0].named_parameters():
                p.requires_grad_(p.requires_grad and not key.startswith(frozen or "-"))
            plain = plain_of(chain)
            for model in (chain, plain):
                loss_of(*model(x, c or None)).backward()
            assert_same(
                *({key: p.grad for key, p in model.named_parameters()} for model in (chain, plain))
            )


def with_matrices(
    chain: ReversibleSequence, changed: Callable[[Tensor], Tensor]
) -> ReversibleSequence:
    """The chain with its rotations w exchanged for changed(w)."""
    for block in chain:
        w, w_inv = (block.w_0, None) if block.householder else (block.w_perm, block.w_perm_inv)
        matrix = changed(w.detach().flatten(1))
        w.data.copy_(matrix.view_as(w))
        if w_inv is not None:
            w_inv.data.copy_(matrix.T.reshape(w.shape))
    return chain


def nearest_rotation(w: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(w)
    return u @ v


@pytest.mark.parametrize(
    "name", ["soft", "soft-rev-exp", "gin-soft", "hh2-soft-sigmoid", "hh2-soft-rev"]
)
def test_rotations_made_in_float32_are_undone_as_those_made_in_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both errors are float64's rounding, which the blocks amplify alike; by luck of signs one may
    be a few times the other.
    """
    monkeypatch.setitem(
        OPTIONS, "hh2-soft-rev", OPTIONS["hh2-soft-sigmoid"] | {"reverse_permutation": True}
    )
    for shape in (Shape(5, 16), Shape(2, 3), SHAPE):  # reflections in compact and in dense form
        case = Case(shape, name)
        x, _ = make_input(case)
        drift = []
        for changed in (lambda w: w.float().double(), nearest_rotation):
            chain = with_matrices(chain_of(case, 12), changed)
            assert_like_plain(chain, x)
            drift.append(chain.drift[0])
        assert drift[0] <= 8 * drift[1] + 64 * torch.finfo(torch.float64).eps


def test_the_chain_is_what_is_tested() -> None:
    z, _ = simple()(torch.randn(2, 6, 3, 5, dtype=torch.float64))
    assert reversible_blocks(z) == DEPTH
    assert (
        reversible_blocks(plain_of(simple())(torch.randn(2, 6, 3, 5, dtype=torch.float64))[0]) == 0
    )


def test_float32_is_as_accurate_as_a_plain_chain() -> None:
    """By the norm over each kind of parameter; at most three times the plain chain's own error."""
    chain = simple(32, torch.float64, shape=(8, 6, 6))
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    for p in chain.parameters():
        if p.requires_grad:
            p.data.copy_(p.data.float())
    x = x.float().double()
    truth = gradients(plain_of(chain), x)
    chain.float()
    ours, theirs = gradients(chain, x.float()), gradients(plain_of(chain), x.float())
    assert 0 < chain.drift[0] < 1e-5
    errors = {}
    for found in (ours, theirs):
        for name, t in found.items():
            if truth[name] is not None:
                error = (t.double() - truth[name]).norm().item() / truth[name].norm().item()
                errors.setdefault(name.split(".", 2)[-1], {}).setdefault(id(found), []).append(
                    error**2
                )
    for kind, pair in errors.items():
        mine, plain = (sum(values) ** 0.5 for values in pair.values())
        assert mine <= 3 * plain, kind


def test_no_gradient_of_the_input() -> None:
    chain = simple()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    plain = plain_of(chain)
    for model in (chain, plain):
        loss_of(*model(x)).backward()
    assert_same(
        *({name: p.grad for name, p in model.named_parameters()} for model in (chain, plain))
    )


def test_without_gradients_in_reverse_and_with_jac_false() -> None:
    chain = simple()
    plain, x = plain_of(chain), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            z, log_det = chain(x)
            assert torch.equal(z, plain(x)[0])
            torch.testing.assert_close(chain(z, rev=True)[0], x)
    z, log_det = chain(x.requires_grad_(), jac=False)
    torch.testing.assert_close(log_det, plain(x)[1])
    z.square().sum().backward()
    expected = x.clone().detach().requires_grad_()
    plain(expected)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-9, atol=1e-9)
    back = chain(z.detach().requires_grad_(), rev=True)[0]
    assert back.requires_grad
    assert reversible_blocks(back) == 0


# --- memory ---------------------------------------------------------------------------------------


def test_bytes_kept_do_not_grow_with_depth() -> None:
    x = torch.randn(8, 16, 12, 12)
    kept = {}
    for depth in (4, 32):
        chain = simple(depth, torch.float32, shape=(16, 12, 12))
        kept[depth] = bytes_kept_for_backward(chain, lambda chain=chain: loss_of(*chain(x)))
    index = 2 * 8 * 16  # of each further block: its permutation, both ways
    assert kept[32] <= kept[4] + 28 * index
    assert kept[32] <= 1.2 * kept[4]
    assert (
        bytes_kept_for_backward(plain := plain_of(chain), lambda: loss_of(*plain(x)))
        > 10 * kept[32]
    )


def test_activations_are_freed_in_the_forward_and_in_the_backward_pass() -> None:
    chain = simple(8, torch.float32, shape=(16, 12, 12))
    born: list[weakref.ref] = []

    def note(module: nn.Module, arguments: Any, result: Any) -> None:
        born.append(weakref.ref(result[0][0].untyped_storage()))

    for block in chain:
        block.register_forward_hook(note)
    x = torch.randn(8, 16, 12, 12)
    z, log_det = chain(x)
    assert [ref() is not None for ref in born] == [False] * 7 + [True]
    undone: list[weakref.ref] = []
    undo = reversible.all_in_one_block_bwd

    def noted(*args: Any, **kwargs: Any) -> Any:
        alive = sum(ref() is not None for ref in undone)
        # what the blocks behind have reconstructed: this block's output, and while it is handed on,
        # another
        assert alive <= 2, alive
        found = undo(*args, **kwargs)
        undone.append(weakref.ref(found.x.untyped_storage()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible, "all_in_one_block_bwd", noted)
        loss_of(z, log_det).backward()
    assert len(undone) == 8
    assert not any(ref() is not None for ref in undone)


# --- where others are not correct -----------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(i, 8, 3, padding=1), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, o, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_dropout_is_replayed_and_the_random_state_goes_on_as_without() -> None:
    chain = simple(subnet=Dropping)
    x, after = torch.randn(2, 6, 3, 5, dtype=torch.float64), []
    found = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        found.append(gradients(model, x))
        after.append(torch.get_rng_state())
    assert_same(*found)
    assert torch.equal(*after)


def test_training_flags_are_those_of_the_forward_pass() -> None:
    chain, x = simple(subnet=Dropping), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    found = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        z, log_det = model(x)
        model.eval()
        loss_of(z, log_det).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert not any(m.training for m in chain.modules())
    assert_same(*found)


class Normed(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, 8, 3, padding=1))
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_and_spectral_norm_are_updated_once(training: bool) -> None:
    chain, x = simple(subnet=Normed).train(training), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    plain = plain_of(chain)
    for _ in range(2):
        assert_same(gradients(chain, x), gradients(plain, x))
    for (name, ours), (_, theirs) in zip(chain.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert int(chain[0].subnet.layers[1].num_batches_tracked) == 2 * training


class Buffered(nn.Module):
    """A subnet with a buffer for every way in which one changes, or does not."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 1)
        for name in ("constant", "nan", "written", "hidden", "replaced", "evaluated"):
            self.register_buffer(name, torch.full((1, o, 1, 1), 0.5))
        self.nan.fill_(float("nan"))
        self.register_buffer("mask", torch.ones(o, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.written.mul_(0.9)
            self.hidden.data.mul_(0.9)  # which shows in no version
            self.replaced = self.replaced * 0.9
        else:
            self.evaluated.mul_(0.9)
        return (
            self.conv(x)
            * (self.constant + self.written + self.hidden + self.replaced + self.evaluated)
            * self.mask.view(-1, 1, 1)
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_buffers_are_copied_where_they_change(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    class Noted(reversible._Subnet):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr(reversible, "_Subnet", Noted)
    chain, x = simple(subnet=Buffered).train(training), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    plain = plain_of(chain)
    for _ in range(2):
        assert_same(gradients(chain, x), gradients(plain, x))
    for (name, ours), (_, theirs) in zip(chain.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=name)
    changed = {"written", "hidden", "replaced"} if training else {"evaluated"}
    for run in runs:
        # which is not equal to itself
        assert {name for _, name, _ in run.changed} == changed | {"nan"}


def test_a_large_constant_is_not_kept_for_every_block() -> None:
    class WithTable(Narrow):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.register_buffer("table", torch.ones(1 << 16))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.table[: len(x), None]

    chain, x = simple(16, torch.float32, WithTable, (8,)), torch.randn(4, 8)
    with Peak() as peak:
        loss = loss_of(*chain(x))
        assert peak.now < 4 << 16  # less than one copy
        loss.backward()
    assert peak.most < 3 * 4 << 16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_inside_a_subnet(use_reentrant: bool) -> None:
    class Checkpointed(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x, use_reentrant=use_reentrant)

    chain = simple(subnet=Checkpointed)
    found = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        found.append(gradients(model, torch.randn(2, 6, 3, 5, dtype=torch.float64)))
    assert_same(*found)


def test_checkpoint_around_the_chain() -> None:
    chain, x = (
        simple(subnet=Dropping),
        torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True),
    )
    plain = plain_of(chain)
    found = []
    for run in (lambda: checkpoint(chain, x, use_reentrant=False), lambda: plain(x)):
        torch.manual_seed(5)
        x.grad = None
        loss_of(*run()).backward()
        found.append({"dx": x.grad})
    assert_same(*found)


def test_frozen_blocks_and_parts() -> None:
    for frozen in ([0, 1], [2], [4], [0, 1, 2, 3, 4]):
        chain = simple()
        for i in frozen:
            chain[i].requires_grad_(False)
        chain[3].global_scale.requires_grad_(False)
        assert_like_plain(chain, torch.randn(2, 6, 3, 5, dtype=torch.float64))
        plain = plain_of(chain)
        if len(frozen) < 5:
            x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
            for model in (chain, plain):
                model.zero_grad()
                loss_of(*model(x)).backward()
            assert_same(
                *({name: p.grad for name, p in m.named_parameters()} for m in (chain, plain))
            )


def test_gradients_accumulate_and_a_graph_can_be_kept() -> None:
    chain = simple()
    plain = plain_of(chain)
    for _ in range(2):
        x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
        assert_same(gradients(chain, x), gradients(plain, x))
    x.requires_grad_()
    loss = loss_of(*chain(x))
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_one_block_twice_in_a_chain() -> None:
    chain = simple(2)
    chain.append(chain[0])
    chain.append(chain[1])
    chain.append(chain[0])
    assert_like_plain(chain, torch.randn(2, 6, 3, 5, dtype=torch.float64))


def test_hooks_fire_as_often_as_in_a_plain_chain() -> None:
    counts = []
    chain = simple()
    for model in (chain, plain_of(chain)):
        fired: dict[str, int] = {}

        def count(key: str, fired: dict[str, int] = fired) -> None:
            fired[key] = fired.get(key, 0) + 1

        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda g, name=name: (count(f"hook {name}"), 2 * g)[1])
                p.register_post_accumulate_grad_hook(
                    lambda p, name=name: count(f"accumulated {name}")
                )
        for i, block in enumerate(model):
            block.register_forward_pre_hook(lambda *_, i=i: count(f"pre {i}"))
            block.register_forward_hook(lambda *_, i=i: count(f"forward {i}"))
            block.register_full_backward_hook(lambda *_, i=i: count(f"backward {i}"))
        counts.append((fired, gradients(model, torch.ones(2, 6, 3, 5, dtype=torch.float64))))
    assert counts[0][0] == counts[1][0]
    assert set(counts[0][0].values()) == {1}
    assert_same(counts[0][1], counts[1][1])


def test_a_loss_on_what_a_hook_saw_in_between() -> None:
    chain, found = simple(), []
    for model in (chain, plain_of(chain)):
        seen = []
        model[2].register_forward_hook(
            lambda module, arguments, result, seen=seen: seen.append(result[0][0])
        )
        z, log_det = model(torch.ones(2, 6, 3, 5, dtype=torch.float64))
        (loss_of(z, log_det) + seen[0].square().sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*found)
    seen = []
    chain[2].register_forward_hook(lambda module, arguments, result: seen.append(result[0][0]))
    chain(torch.ones(2, 6, 3, 5, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match="block 2 of the reversible chain has no output to start from"
    ):
        seen[0].square().sum().backward()


def test_conditions_with_gradients_and_the_log_determinant_alone() -> None:
    case = Case(SHAPE, "cond")
    x, c = make_input(case)
    chain = chain_of(case)
    plain = plain_of(chain)
    found = []
    for model in (chain, plain):
        condition = c[0].clone().requires_grad_()
        model(x, [condition])[1].sum().backward()
        found.append(
            {"dc": condition.grad} | {name: p.grad for name, p in model.named_parameters()}
        )
    # of the last block's offset: none in one, zero in the other
    found = [
        {k: v for k, v in f.items() if k != f"module_list.{DEPTH - 1}.global_offset"} for f in found
    ]
    assert_same(*found)


@pytest.mark.parametrize("permute_soft", [False, True], ids=["hard", "soft"])
def test_autocast_keeps_the_chain_in_float32(permute_soft: bool) -> None:
    torch.manual_seed(0)
    chain = ReversibleSequence(16, 8, 8)
    seen = []

    class Seeing(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            a = super().forward(x)
            seen.append((x.dtype, a.dtype))
            return a

    for _ in range(DEPTH):
        chain.append(AllInOneBlock, subnet_constructor=Seeing, permute_soft=permute_soft)
    plain, x = plain_of(chain), torch.randn(4, 16, 8, 8)
    exact = copy.deepcopy(plain).double()
    found = []
    for model, like in ((chain, x), (plain, x), (exact, x.double())):
        torch.manual_seed(5)
        for m in model.modules():
            m.training = False
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            z, log_det = model(like)
        if model is chain:
            assert z.dtype == log_det.dtype == torch.float32
            assert set(seen) == {(torch.float32, torch.bfloat16)}
            assert chain.drift == {}
        loss_of(z, log_det).backward()  # outside of autocast, as is usual
        if model is chain:
            assert set(seen) == {(torch.float32, torch.bfloat16)}
            assert len(seen) == 2 * DEPTH
            # the subnet's coefficients are the same half precision numbers both times
            assert chain.drift[0] < 1e-5
        found.append(
            {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        )
    ours, theirs, truth = found
    for name, t in truth.items():
        error, allowed = ((g[name] - t).norm() for g in (ours, theirs))
        assert error <= 2 * allowed + 1e-5 * t.norm(), name


def test_grad_scaler_steps_and_skips_as_with_a_plain_chain() -> None:
    chain = simple(dtype=torch.float32, subnet=Dropping).eval()
    for scale, steps in ((2.0**10, True), (2.0**127, False)):
        model = copy.deepcopy(chain)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = model[0].global_offset.clone()
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = model(torch.randn(2, 6, 3, 5))
        scaler.scale(1e3 * loss_of(z, log_det)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].global_offset, before) != steps
        assert (scaler.get_scale() < scale) != steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_undone_where_the_user_says_so(dtype: torch.dtype) -> None:
    """What it loses in a few blocks is a warning, or nothing, as the dtype has it: bfloat16 is off
    by 2e-3, float16 by 2e-4.
    """
    torch.manual_seed(0)
    chain = ReversibleSequence(8, 4, 4, checkpoint_every=4)
    for _ in range(4):
        chain.append(AllInOneBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    z, log_det = chain.to(dtype)(torch.randn(2, 8, 4, 4, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        (z.float().square().sum() - log_det.sum()).backward()
    assert 0 < chain.drift[0] < 16 * torch.finfo(dtype).eps


def test_half_precision_keeps_activations_but_not_coefficients() -> None:
    chain = simple(dtype=torch.bfloat16, shape=(16, 12, 12))
    x = torch.randn(8, 16, 12, 12, dtype=torch.bfloat16)
    assert_like_plain(chain, x, tolerance=0.0)  # what runs again is the same
    kept = bytes_kept_for_backward(chain, lambda: chain(x)[0])
    assert DEPTH * x.nbytes <= kept <= (DEPTH + 1.5) * x.nbytes  # and the result, for comparison


def test_a_changed_parameter_result_or_buffer_is_noticed() -> None:
    def changed(what: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> None:
        chain = simple(**options).eval()
        z, log_det = chain(torch.randn(2, 6, 3, 5, dtype=torch.float64))
        with torch.no_grad():
            what(chain, z).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(z.clone(), log_det).backward()

    changed(lambda chain, z: chain[1].subnet.w1)
    changed(lambda chain, z: chain[1].global_scale)
    changed(lambda chain, z: z)
    changed(lambda chain, z: chain[1].subnet.layers[1].running_mean, subnet=Normed)


def test_what_cannot_be_had_says_so() -> None:
    chain, x = simple(), torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second or batched gradients"):
        torch.autograd.grad(loss_of(*chain(x)), x, create_graph=True)
    chain[1].register_forward_hook(
        lambda module, arguments, result: ((2 * result[0][0],), result[1])
    )
    with pytest.raises(RuntimeError, match="a hook exchanged the input or the output of block 1"):
        chain(x)


def test_the_meta_device_runs_an_ordinary_chain() -> None:
    chain = simple(2).to("meta")
    x = torch.empty(2, 6, 3, 5, device="meta", dtype=torch.float64, requires_grad=True)
    z, log_det = chain(x)
    (z.sum() + log_det.sum()).backward()
    assert x.grad.shape == x.shape


def test_transformed_traced_and_compiled_calls_run_an_ordinary_chain() -> None:
    chain, x = simple(2), torch.randn(3, 6, 3, 5, dtype=torch.float64)
    single = torch.stack([chain(sample[None])[0][0] for sample in x])
    torch.testing.assert_close(torch.func.vmap(lambda sample: chain(sample[None])[0][0])(x), single)
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss_of(*chain(x)))(x), gradients(plain_of(chain), x)["dx"]
    )
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert_same({"dx": gradients(compiled, x)["dx"]}, {"dx": gradients(plain_of(chain), x)["dx"]})


def test_a_subnet_with_other_parameters_than_tensors_is_refused() -> None:
    class Wrapped(torch.Tensor):
        pass

    chain = simple()
    chain[2].subnet.w1 = nn.Parameter(chain[2].subnet.w1.detach().as_subclass(Wrapped))
    with pytest.raises(
        TypeError, match="subnet of block 2 in a reversible chain to be plain tensors, got Wrapped"
    ):
        chain(torch.randn(2, 6, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 9, 61, 67), (2, 2, 4)], ids=str)
def test_inverse_and_backward_in_one_are_those_apart(shape: tuple[int, ...], gin: bool) -> None:
    batch, channels, *spatial = shape
    spec, perm = CouplingSpec.of(1.9, "anomalib", "SIGMOID", gin), torch.randperm(channels)
    for x_dtype, a_dtype in (
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        y, dy = torch.randn(shape, dtype=x_dtype), torch.randn(shape, dtype=x_dtype)
        a = torch.randn(batch, channels // 2 * 2, *spatial).to(a_dtype)
        g, offset, dlogdet = (
            torch.randn(channels, dtype=x_dtype),
            torch.randn(channels, dtype=x_dtype),
            torch.randn(batch),
        )
        arguments = (a, g, offset, perm, perm.argsort(), spec)
        x = eager.coupling_inv_passive(y, g, offset, perm, perm.argsort(), spec)
        together = x.clone()
        eager.coupling_inv_active(y, x, *arguments, False)
        expected = (x, *eager.coupling_bwd(dy, dlogdet, x, *arguments, True))
        found = (together, *eager.coupling_inv_bwd(y, together, dy, dlogdet, *arguments, True))
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                eps = torch.finfo(theirs.dtype).eps
                torch.testing.assert_close(
                    mine, theirs, rtol=8 * eps, atol=64 * eps * theirs.abs().max().item()
                )


def test_functional_call_reaches_the_given_parameters() -> None:
    chain, x = simple(), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    given = {
        name: (0.9 * p).detach().requires_grad_(p.requires_grad)
        for name, p in chain.named_parameters()
        if "perm" not in name
    }
    loss_of(*torch.func.functional_call(chain, given, (x,))).backward()
    other = plain_of(chain)
    other.load_state_dict(given, strict=False)
    expected = gradients(other, x)
    assert_same(
        {name: p.grad for name, p in given.items()}, {name: expected[name] for name in given}
    )


# --- subnets whose second run is another one ------------------------------------------------------


class Narrow(nn.Module):
    """A subnet in two layers, on which others build."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(i, 7), nn.Linear(7, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


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
    """Differs in what the log-determinant does not show."""

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
    """A tensor that no to() finds."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.factor = torch.full((1,), 1.5, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor.to(x.dtype)


class HandsOnItsAttribute(AttributeWithGradient):
    def forward(self, x: Tensor) -> Tensor:
        return self.factor.to(x.dtype).expand(len(x), self.last.out_features)


class DifferentiatesInside(Narrow):
    """Of its input, as subnets of gradient flows are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(self.first(x).tanh().square().sum(), x, create_graph=True)
        return self.last(self.first(dx + x).tanh())


class HyperNetwork(AttributeWithGradient):
    """With a graph that leads out of the subnet, and that a backward pass frees."""

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
    found: list[dict[str, Tensor | None]] = []
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
        found.append({name: t.grad for name, t in tensors.items()})
    assert (refused is None) == (subnet in REPEATABLE)
    if refused is not None:
        assert refused[0] is ReversibleSequence
        assert "reversible chain" in refused[1]
        return
    assert_same(
        found[1],
        found[0],
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
    """Its gradient would not reach the blocks before; where there is nothing before, it is
    right.
    """

    class Auxiliary(Narrow):
        def forward(self, x: Tensor) -> Tensor:
            a = super().forward(x)
            self.loss = a.square().sum()
            return a

    for wanted in (True, False):
        x = torch.randn(3, 8, requires_grad=wanted)
        found = []
        chain = simple(1, torch.float32, Auxiliary, (8,))
        for model in (chain, plain_of(chain)):
            z, log_det = model(x)
            loss = loss_of(z, log_det) + model[0].subnet.loss
            if wanted and model is chain:
                with pytest.raises(RuntimeError, match="handed out something beside its result"):
                    loss.backward()
            else:
                loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        if not wanted:
            assert_same(*found, 1e-5)


def test_small_differences_of_one_channel_show() -> None:
    """A channel that is small beside the others, and numbers whose squares overflow."""
    link = reversible._Link(simple(1), 0, reversible._Segment(0, 0), None, {})
    for factor in (1.0, 1e30, 1e-30):
        y = (
            factor
            * torch.randn(64, 3, 5).double()
            * torch.tensor([1.0, 0.1, 1e3]).double().view(3, 1)
        )
        for dtype, off in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
            again = y.clone()
            link.compare_runs(again.to(dtype), y.to(dtype))
            again[:, 1] *= 1 + off
            with pytest.raises(
                RuntimeError, match="block 0 of the reversible chain returned something else"
            ):
                link.compare_runs(again.to(dtype), y.to(dtype))


# --- compiled and scripted subnets and blocks -----------------------------------------------------


def traced(i: int, o: int) -> nn.Module:
    return torch.jit.trace(Narrow(i, o), torch.randn(16, i))


def scripted(i: int, o: int) -> nn.Module:
    return torch.jit.script(Narrow(i, o))


def holding_scripted(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, i), scripted(i, o))


def compiled(i: int, o: int) -> nn.Module:
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
    """float32, of which a scripted module's parameters are made."""
    torch._dynamo.reset()
    found = []
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
        found.append({name: p.grad for name, p in chain.named_parameters()})
    assert_same(*found, 1e-5)


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
    found = [
        {name.replace("_orig_mod.", ""): t for name, t in gradients(model, x).items()}
        for model in (chain, plain)
    ]
    assert_same(*found)


# --- other modules, other classes -----------------------------------------------------------------


class Doubled(reference.InvertibleModule):
    """An invertible module that is no block of ours."""

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        n = x[0][0].numel() * 0.6931471805599453
        return (x[0] * (0.5 if rev else 2.0),), x[0].new_full((len(x[0]),), -n if rev else n)

    def output_dims(self, input_dims: Any) -> Any:
        return input_dims


class Overriding(AllInOneBlock):
    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return super()._affine(x, 0.5 * a, rev)


@pytest.mark.parametrize("every", [None, 2])
def test_mixed_chains(every: int | None) -> None:
    torch.manual_seed(0)
    chain = ReversibleSequence(6, 3, 5, checkpoint_every=every)
    for kind in (
        Doubled,
        AllInOneBlock,
        AllInOneBlock,
        Doubled,
        AllInOneBlock,
        Overriding,
        AllInOneBlock,
        AllInOneBlock,
        Doubled,
    ):
        chain.append(kind, **({} if kind is Doubled else {"subnet_constructor": make_subnet(2)}))
    chain.double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    assert_like_plain(chain, x)
    assert reversible_blocks(chain(x)[0]) == 5


@pytest.mark.peers
def test_mixed_chains_with_modules_of_freia() -> None:
    import FrEIA.modules as fm

    torch.manual_seed(0)
    chain = ReversibleSequence(6, 4, 4)
    for kind in (
        fm.PermuteRandom,
        AllInOneBlock,
        AllInOneBlock,
        fm.ActNorm,
        AllInOneBlock,
        fm.IRevNetDownsampling,
        AllInOneBlock,
    ):
        chain.append(
            kind, **({"subnet_constructor": make_subnet(2)} if kind is AllInOneBlock else {})
        )
    chain.double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    chain(x)  # ActNorm initialises itself
    assert_like_plain(chain, x)
    assert reversible_blocks(chain(x)[0]) == 4
    torch.testing.assert_close(chain(chain(x)[0], rev=True)[0], x)


@pytest.mark.peers
@pytest.mark.parametrize("peer", [anomalib_block, freia_block], ids=["anomalib", "freia0.2"])
def test_accelerate_makes_freias_chains_reversible_and_restore_undoes_it(peer: Callable) -> None:
    chain = freia().framework.SequenceINN(6, 4, 4)
    for i in range(DEPTH):
        chain.append(
            peer(),
            cond=0 if i % 2 else None,
            cond_shape=(2, 4, 4),
            subnet_constructor=make_subnet(2),
        )
    model = nn.Sequential(chain.double())
    x, c = (
        torch.randn(2, 6, 4, 4, dtype=torch.float64),
        [torch.randn(2, 2, 4, 4, dtype=torch.float64)],
    )
    before, state = gradients(chain, x, c), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = report(accelerate(model, reversible=True))
    assert [(entry.name, entry.changed) for entry in found.chains] == [("0", True)]
    assert f"{DEPTH} of its {DEPTH} modules" in str(found)
    assert [id(p) for p in model.parameters()] == [
        id(p) for group in optimizer.param_groups for p in group["params"]
    ]
    assert state.keys() == model.state_dict().keys()
    chain.zero_grad()
    assert_same(gradients(chain, x, c), before)
    assert reversible_blocks(chain(x, c)[0]) == DEPTH
    assert isinstance(chain, freia().framework.SequenceINN)
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        other.zero_grad()
        assert_same(gradients(other, x, c), before)
        assert reversible_blocks(other(x, c)[0]) == DEPTH
    assert report(accelerate(model, reversible=True)) == found
    chain.checkpoint_every = 2
    assert [entry.state for entry in report(restore(model)).chains] == ["left"]
    assert type(chain) is freia().framework.SequenceINN
    assert not {"checkpoint_every", "drift"} & vars(chain).keys()
    chain.zero_grad()
    assert_same(gradients(chain, x, c), before)


def test_accelerate_says_where_there_is_no_chain() -> None:
    blocks = nn.ModuleList(simple())
    with pytest.warns(UserWarning, match="no chain of the model was made reversible"):
        assert report(accelerate(blocks, reversible=True)).chains == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(blocks)


@pytest.mark.peers
def test_accelerate_leaves_chains_of_another_kind() -> None:
    base = freia().framework.SequenceINN

    class Overridden(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class SequenceINN(nn.Module):
        """A copy that counts the log-determinant twice."""

        def __init__(self) -> None:
            super().__init__()
            self.module_list, self.conditions, self.force_tuple_output = nn.ModuleList(), [], False

        def forward(
            self, x: Tensor, c: Any = None, rev: bool = False, jac: bool = True
        ) -> tuple[Tensor, Any]:
            total: Any = 0
            for i in reversed(range(2)) if rev else range(2):
                (x,), j = self.module_list[i](
                    (x,),
                    c=[] if self.conditions[i] is None else [c[self.conditions[i]]],
                    rev=rev,
                    jac=jac,
                )
                total = total + 2 * j
            return x, total

    model = nn.ModuleList([Overridden(4), SequenceINN()])
    with pytest.warns(
        UserWarning,
        match="no block of the model runs fused and no chain of the model was made reversible",
    ):
        accelerate(model, reversible=True)
    assert [(entry.changed, entry.reason) for entry in report(model).chains] == [
        (False, "Overridden overrides forward"),
        (False, "it computes something else than FrEIA's SequenceINN"),
    ]


def test_slices_of_a_chain_that_was_made_reversible() -> None:
    """As FrEIA's main branch slices; where the stock class makes something else of a slice, as
    FrEIA 0.2 does, that stays so.
    """

    class SequenceINN(nn.Module):
        def __init__(self, modules: Any, conditions: Any) -> None:
            super().__init__()
            self.module_list, self.conditions, self.force_tuple_output = (
                nn.ModuleList(modules),
                list(conditions),
                False,
            )

        def forward(
            self, x: Any, c: Any = None, rev: bool = False, jac: bool = True
        ) -> tuple[Tensor, Any]:
            x, total = (x,), torch.zeros(len(x))
            for i in (
                reversed(range(len(self.module_list))) if rev else range(len(self.module_list))
            ):
                more = {} if self.conditions[i] is None else {"c": [c[self.conditions[i]]]}
                x, j = self.module_list[i](x, **more, jac=jac, rev=rev)
                total = j + total
            return x[0], total

        def __getitem__(self, item: Any) -> Any:
            taken = self.module_list[item]
            return (
                SequenceINN(taken, self.conditions[item])
                if isinstance(item, slice) and item.step is None
                else taken
            )

    chain = SequenceINN(simple().module_list, [None] * DEPTH)
    accelerate(chain, reversible=True)
    chain.checkpoint_every = 2
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    part = chain[1:4]
    assert (part.checkpoint_every, part.debug, reversible_blocks(part(x)[0])) == (2, False, 3)
    assert part.module_list[0] is chain[1]
    assert type(chain[::1]) is nn.ModuleList


class Inverted(nn.Module):
    """What FrEIA's main branch makes of a chain in its Inverse, which its distributions wrap in
    turn.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.dims_in = module.output_dims(module.dims_in if module.force_tuple_output else None)

    def forward(self, *args: Any, rev: bool = False, **kwargs: Any) -> Any:
        return self.module(*args, rev=not rev, **kwargs)

    def output_dims(self, _: Any) -> Any:
        return self.module.dims_in


@pytest.mark.parametrize("wrap", [False, True], ids=["tensor", "tuple"])
def test_a_chain_in_freias_inverse_and_distributions(wrap: bool) -> None:
    """Called as they call it: with jac=False, whose log-determinant they add all the same, and with
    conditions.
    """
    chain = conditional(None, 0, None, force_tuple_output=wrap)
    normal, c = torch.distributions.Normal(0.0, 1.0), [torch.randn(3, 2, 3, 4, dtype=torch.float64)]
    inverse = Inverted(chain)
    assert inverse.dims_in == inverse.output_dims(None) == [(6, 3, 4)]
    z = normal.sample((3, 6, 3, 4)).double()
    with torch.no_grad():
        sample = inverse((z,) if wrap else z, jac=False, c=c)[0]
    assert not (sample[0] if wrap else sample).requires_grad
    plain = plain_of(chain)
    found = []
    for model in (chain, plain):
        latent, log_det = Inverted(model)(sample, c=c, jac=False, rev=True)
        latent = latent[0] if wrap else latent
        torch.testing.assert_close(latent, z)
        (normal.log_prob(latent).flatten(1).sum(1) + log_det).mean().neg().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*found)
    rsample = inverse(
        (z.clone().requires_grad_(),) if wrap else z.clone().requires_grad_(), jac=False, c=c
    )[0]
    assert (rsample[0] if wrap else rsample).requires_grad


@pytest.mark.peers
def test_sequence_is_freias_sequence() -> None:
    ours, theirs = (
        ReversibleSequence(6, 4, 4, force_tuple_output=True),
        freia().framework.SequenceINN(6, 4, 4, force_tuple_output=True),
    )
    for chain in (ours, theirs):
        torch.manual_seed(0)
        chain.append(anomalib_block(), subnet_constructor=make_subnet(2))
        chain.append(
            anomalib_block(), cond=1, cond_shape=(3, 4, 4), subnet_constructor=make_subnet(2)
        )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert (ours.shapes, ours.conditions, len(ours)) == (
        theirs.shapes,
        theirs.conditions,
        len(theirs),
    )
    assert [type(b) for b in ours] == [type(b) for b in theirs]
    assert ours[1] is ours.module_list[1]
    assert len(ours[0:1]) == 1
    assert ours.output_dims([(6, 4, 4)]) == theirs.output_dims([(6, 4, 4)])
    c = [torch.zeros(0), torch.randn(2, 3, 4, 4)]
    x = torch.randn(2, 6, 4, 4)
    for rev in (False, True):
        for given in (x, (x,), [x]):
            mine, other = (chain(given, c, rev=rev) for chain in (ours, theirs))
            assert isinstance(mine[0], tuple)
            torch.testing.assert_close(mine, other)


class Halving(nn.Module):
    """Leaves out every second pixel; no inverse, but other shapes."""

    def __init__(self, dims_in: Any) -> None:
        super().__init__()
        self.dims_in, self.dims_c = dims_in, []

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        return (x[0].repeat_interleave(2, -1) if rev else x[0][..., ::2],), 0.0

    def output_dims(self, input_dims: Any) -> Any:
        (*shape, width) = input_dims[0]
        return [(*shape, width // 2)]


def conditional(*conditions: int | None, **options: Any) -> ReversibleSequence:
    """A chain whose conditions have as many channels as their number and 2."""
    torch.manual_seed(0)
    chain = ReversibleSequence(6, 3, 4, **options)
    for cond in conditions:
        shape = None if cond is None else (cond + 2, 3, 4)
        chain.append(AllInOneBlock, cond=cond, cond_shape=shape, subnet_constructor=make_subnet(2))
    return chain.double()


def test_slices_are_chains() -> None:
    chain = conditional(None, 2, 0, 2, None, checkpoint_every=2, force_tuple_output=True)
    x, c = (
        torch.randn(2, 6, 3, 4, dtype=torch.float64),
        [torch.randn(2, n + 2, 3, 4, dtype=torch.float64) for n in range(3)],
    )
    (z,), log_det = chain(x, c)
    for cut in range(6):
        first, last = chain[:cut], chain[cut:]
        assert type(first) is type(last) is ReversibleSequence
        assert (first.checkpoint_every, first.force_tuple_output, len(first), len(last)) == (
            2,
            True,
            cut,
            5 - cut,
        )
        (middle,), j = first(x, [c[2], c[0]])
        (end,), k = last(middle, [c[0], c[2]] if cut == 2 else [c[2], c[0]])
        torch.testing.assert_close((end, j + k), (z, log_det))
        assert j.shape == k.shape == (2,)
        assert reversible_blocks(first(x.clone().requires_grad_(), [c[2], c[0]])[0][0]) == cut
    assert chain[1:4].conditions == [0, 1, 0]
    assert chain[1] is chain[1:4][0]
    assert chain[::-1].conditions == [None, 0, 1, 0, None]
    (back,), j = chain[::-1](z, [c[2], c[0]])
    torch.testing.assert_close((back, j), (x, -log_det))
    (again,), j = chain[::-1](x, [c[2], c[0]], rev=True)
    torch.testing.assert_close((again, j), (z, log_det))
    assert [name for name, _ in chain[4:3:-1].named_parameters()][
        0
    ] == "module_list.0.module.global_scale"
    twice = chain[::-1][::-1]
    torch.testing.assert_close(twice(x, [c[2], c[0]]), chain(x, c))
    assert (
        len(chain[3:3])
        == len(chain[0:3:-1])
        == len(chain[9:])
        == len(ReversibleSequence(4)[::-1])
        == 0
    )
    every_other = chain[0](chain[2](chain[4]([x], rev=True)[0], [c[0]], rev=True)[0], rev=True)[0]
    torch.testing.assert_close(chain[::-2](x, [c[0]])[0], every_other)


def test_gradients_of_a_slice_and_of_its_inverse() -> None:
    chain = simple()
    plain, x = plain_of(chain), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    for item in (slice(1, 4), slice(None, None, -1)):
        chain.zero_grad()
        part, like = chain[item], plain_of(plain[item])
        assert_same(gradients(part, x), gradients(like, x))


def test_slices_where_shapes_change() -> None:
    chain = ReversibleSequence(6, 3, 8)
    for _ in range(2):
        chain.append(AllInOneBlock, subnet_constructor=make_subnet(2))
        chain.append(Halving)
    assert chain[1:3].shapes == [(6, 3, 8), (6, 3, 4), (6, 3, 4)]
    assert chain[3:0:-1].shapes == [(6, 3, 2), (6, 3, 4), (6, 3, 4), (6, 3, 8)]
    assert chain[::-1](torch.randn(2, 6, 3, 2))[0].shape == (2, 6, 3, 8)
    with pytest.raises(ValueError, match="expected a module for inputs of shape"):
        chain[::2]


def test_modules_can_be_exchanged() -> None:
    chain = conditional(None, 0, None)

    def block(*shape: int, **options: Any) -> AllInOneBlock:
        return AllInOneBlock([shape], subnet_constructor=make_subnet(len(shape) - 1), **options)

    for place in (0, -1):
        chain[place] = new = block(6, 3, 4).double()
        assert chain[place] is new
    chain[1] = new = block(6, 3, 4, dims_c=[(2, 3, 4)]).double()
    assert chain[1] is chain.module_list[1] is new
    x, c = (
        torch.randn(2, 6, 3, 4, dtype=torch.float64),
        [torch.randn(2, 2, 3, 4, dtype=torch.float64)],
    )
    assert_like_plain(chain, x, c)
    before = list(chain)
    with pytest.raises(ValueError, match="inputs of shape"):
        chain[0] = block(6, 3, 5)
    with pytest.raises(ValueError, match="outputs of shape"):
        chain[0] = Halving([(6, 3, 4)])
    with pytest.raises(ValueError, match="conditions of shape"):
        chain[0] = block(6, 3, 4, dims_c=[(2, 3, 4)])
    with pytest.raises(ValueError, match="conditions of shape"):
        chain[1] = block(6, 3, 4)
    with pytest.raises(NotImplementedError, match="got a slice"):
        chain[0:1] = chain[0:1]
    with pytest.raises(TypeError, match="an invertible module, got Linear"):
        chain[0] = nn.Linear(6, 6)
    with pytest.raises(IndexError):
        chain[3] = block(6, 3, 4)
    assert list(chain) == before


def test_output_dims_are_known() -> None:
    chain = ReversibleSequence(6, 3, 8)
    chain.append(Halving)
    assert chain.output_dims() == chain.output_dims(None) == [(6, 3, 4)]
    with pytest.raises(ValueError, match="force_tuple_output=True"):
        chain.output_dims([(6, 3, 8)])
    chain.force_tuple_output = True
    assert (
        chain.output_dims([(6, 3, 8)])
        == chain.output_dims([[6, 3, 8]])
        == chain.output_dims((6, 3, 8))
        == [(6, 3, 4)]
    )
    with pytest.raises(ValueError, match="expected input_dims"):
        chain.output_dims([(6, 3, 4)])


def test_the_log_determinant_starts_at_zero() -> None:
    """Also where no module of the chain has one; in the default dtype, as FrEIA's."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(3, 8, dtype=dtype)
        chain = ReversibleSequence(8)
        for rev in (False, True):
            z, log_det = chain(x, rev=rev)
            assert torch.equal(z, x)
            assert torch.equal(log_det, torch.zeros(3))
        chain.append(Halving)
        assert chain(x)[1].shape == (3,)
    assert chain.to("meta")(torch.empty(3, 8, device="meta"))[1].device.type == "meta"
    with pytest.raises((TypeError, ValueError)):
        simple(1)([[1.0]])


def test_append_refuses_what_does_not_fit() -> None:
    chain = ReversibleSequence(6, 4, 4)
    block = AllInOneBlock([(6, 4, 4)], subnet_constructor=make_subnet(2))
    with pytest.raises(ValueError, match="expected a module for inputs of shape"):
        chain.append(AllInOneBlock([(4, 4, 4)], subnet_constructor=make_subnet(2)))
    for error in (TypeError, ValueError):
        with pytest.raises(
            error, match="expected no arguments beside an instance, got affine_clamping"
        ):
            chain.append(block, affine_clamping=1.0)
    with pytest.raises(TypeError, match="expected cond_shape"):
        chain.append(AllInOneBlock, cond=0, subnet_constructor=make_subnet(2))
    assert len(chain) == len(chain.conditions) == 0
    with pytest.raises(ValueError, match="force_tuple_output"):
        chain.output_dims([(6, 4, 4)])
    with pytest.raises(ValueError, match="checkpoint_every of 1 or more, got 0"):
        ReversibleSequence(6, checkpoint_every=0)
    with pytest.raises(TypeError, match="checkpoint_every as an integer or None, got 1.5"):
        ReversibleSequence(6, checkpoint_every=1.5)


def test_copies_and_files() -> None:
    chain, x = simple(checkpoint_every=2), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    expected = gradients(chain, x)
    file = io.BytesIO()
    torch.save(simple(), file)
    file.seek(0)
    for other in (copy.deepcopy(chain), torch.load(file, weights_only=False)):
        other.load_state_dict(chain.state_dict())
        other.zero_grad()
        assert_same(gradients(other, x), expected)


# --- the drift ------------------------------------------------------------------------------------


def drifting(factor: float, depth: int = 8, **options: Any) -> ReversibleSequence:
    """A float32 chain that loses digits in block 3, which scales one channel by ``factor`` and then
    adds 1.
    """
    chain = simple(depth, torch.float32, **options)
    with torch.no_grad():
        g = chain[3].global_scale
        g.copy_(
            2
            * torch.log(torch.expm1(torch.tensor([1.0, 1.0, 1.0, factor, 1.0, 1.0]) / 0.2)).view_as(
                g
            )
        )
        chain[3].global_offset.fill_(1.0)
    return chain


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64: no operation makes one of narrower tensors, or of nothing."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            assert not (isinstance(t, Tensor) and t.dtype is torch.float64), (
                f"float64 from {function}"
            )
        return result


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint_every": 1}, {"checkpoint_every": 2, "debug": True}], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1e25])
@pytest.mark.parametrize("gin", [True, False])
def test_the_drift_is_measured_without_float64(
    gin: bool, scale: float, options: dict[str, Any]
) -> None:
    """In float32, whose squares would overflow."""
    torch.manual_seed(0)
    chain = ReversibleSequence(8, **options)
    for _ in range(4):
        chain.append(AllInOneBlock, subnet_constructor=Narrow, gin_block=gin)
    x = scale * torch.randn(5, 8)
    with WithoutFloat64():
        z, log_det = chain(x)
        (z.abs().mean() / scale - log_det.mean()).backward()
    assert (len(chain.drift) > 0) == (options.get("checkpoint_every") != 1)
    assert all(error < 2**-17 for error in chain.drift.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norms_do_not_leave_their_range(dtype: torch.dtype) -> None:
    x = torch.randn(7, 300).to(dtype)
    limits = torch.finfo(dtype)
    exact = x.double().norm().item()
    for factor in (
        1.0,
        2.0 ** int(math.log2(limits.max) - 4),
        2.0 ** int(math.log2(limits.tiny) + 8),
        0.0,
    ):
        (norm,) = reversible._norms(x * factor)
        assert norm == pytest.approx(exact * factor, rel=1e-3)
    x[0, 0] = math.inf
    assert reversible._norms(x) == [math.inf]
    x[0, 1] = math.nan
    assert math.isnan(reversible._norms(x)[0])


def test_an_inverse_that_is_no_number_is_noticed() -> None:
    """A scale that has underflowed to 0 cannot be undone; the forward pass is finite all the
    same.
    """
    chain = ReversibleSequence(6)
    for _ in range(2):
        chain.append(AllInOneBlock, subnet_constructor=nn.Linear, global_affine_type="EXP")
    with torch.no_grad():
        chain[1].global_scale.fill_(-120.0)
    z, log_det = chain(torch.randn(64, 6))
    assert z.isfinite().all()
    with pytest.raises(RuntimeError, match="off by inf"):
        (z.square().mean() - log_det.mean()).backward()


def test_an_inverse_without_digits_left_is_noticed() -> None:
    """An error, and a pass that keeps every activation has a plain chain's gradients."""
    torch.manual_seed(0)
    chain = ReversibleSequence(8)
    for _ in range(24):
        chain.append(
            AllInOneBlock,
            subnet_constructor=lambda i, o: nn.Sequential(
                nn.Linear(i, 32), nn.ReLU(), nn.Linear(32, o)
            ),
        )
    with torch.no_grad():
        for block in chain:
            for p in block.subnet.parameters():
                p.mul_(8)
    x = torch.randn(64, 8, requires_grad=True)

    def gradient() -> Tensor:
        z, log_det = chain(x)
        assert z.isfinite().all()
        return torch.autograd.grad(z.square().mean() - log_det.mean(), x)[0]

    with pytest.raises(RuntimeError, match="input of block 0 .* is off by"):
        gradient()
    chain.checkpoint_every = 1
    found = gradient()
    chain._links = lambda *_: {}  # an ordinary chain
    plain = gradient()
    torch.testing.assert_close(found, plain)


def test_the_drift_is_looked_at_wherever_the_backward_pass_ends() -> None:
    """Behind frozen blocks, and in the smaller half of an input."""
    torch.manual_seed(0)
    chain = ReversibleSequence(8)
    for _ in range(12):
        chain.append(AllInOneBlock, subnet_constructor=lambda i, o: nn.Linear(i, o))
    chain[0].requires_grad_(False)
    z, log_det = chain(torch.randn(64, 8))
    (z.square().mean() - log_det.mean()).backward()
    assert set(chain.drift) == {1}
    x = torch.randn(64, 8) * torch.tensor([1e6] * 4 + [1.0] * 4)
    off = torch.tensor([0.0] * 4 + [1e-4] * 4)  # 1e-10 of the whole's norm
    reversible._Link(chain, 0, reversible._Segment(0, 0), None, drift := {}).compare(x + off, x, x)
    assert drift[0] > 2**-20


def test_a_hook_that_changes_a_result_in_place_is_noticed() -> None:
    chain = simple()
    chain[1].register_forward_hook(lambda _, __, out: (out[0][0].detach().add_(1e-5), None)[1])
    with pytest.raises(RuntimeError, match="a hook exchanged"):
        chain(torch.randn(2, 6, 3, 5, dtype=torch.float64))


def test_cached_parametrizations_run_an_ordinary_chain() -> None:
    chain = simple()
    for block in chain:
        nn.utils.parametrize.register_parametrization(block.subnet, "w1", nn.Identity())
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    with nn.utils.parametrize.cached():
        loss_of(*chain(x)).backward()
    assert all(block.subnet.parametrizations.w1.original.grad is not None for block in chain)


def test_an_overflow_forward_is_the_users() -> None:
    """As in a plain chain: gradients that are not finite and no error, which is what GradScaler
    skips a step for.
    """
    chain = simple(dtype=torch.float32)
    x = torch.full((2, 6, 3, 5), 1e38, requires_grad=True)
    with torch.no_grad():
        for block in chain:
            block.global_scale.fill_(1e4)
    z, _ = chain(x)
    assert not z.isfinite().all()
    assert not torch.autograd.grad(z.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_input_that_a_plain_chain_refuses(dtype: torch.dtype) -> None:
    chain = simple(dtype=torch.float32)
    with pytest.raises((TypeError, RuntimeError)):
        chain(torch.ones(2, 6, 3, 5).to(dtype))


def test_spacing_is_checked_when_it_is_set() -> None:
    chain = simple()
    with pytest.raises(ValueError, match="checkpoint_every of 1 or more, got 0"):
        chain.checkpoint_every = 0
    assert chain.checkpoint_every is None


def test_drift_is_measured_and_makes_later_passes_keep_more() -> None:
    chain, x = drifting(1.0), torch.randn(2, 6, 3, 5)
    gradients(chain, x)
    assert list(chain.drift) == [0]
    assert 0 < chain.drift[0] < 2**-17
    chain = drifting(1e-3)
    gradients(chain, x)
    assert chain.drift[0] > 2**-17
    first = chain.drift[0]
    gradients(chain, x)
    assert len(chain.drift) > 1
    assert max(chain.drift.values()) < first


def test_drift_warns_and_refuses_and_debug_names_the_block() -> None:
    x = torch.randn(2, 6, 3, 5)
    with pytest.warns(
        RuntimeWarning,
        match="input of block 0 of the reversible chain, reconstructed from the output of block 7",
    ):
        gradients(drifting(3e-5), x)
    with pytest.raises(
        RuntimeError,
        match="input of block 0 of the reversible chain, reconstructed from the output of block 7",
    ):
        gradients(drifting(1e-7), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = drifting(3e-5, debug=True)
        gradients(chain, x)
    assert sorted(chain.drift) == list(range(8))
    assert "worst: block 3, whose inverse multiplies the error by" in chain.drift_report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(drifting(3e-5, checkpoint_every=1), x)
    with pytest.warns(
        RuntimeWarning,
        match="input of block 0 of the reversible chain, .* set a smaller checkpoint_every",
    ):
        gradients(drifting(3e-5, checkpoint_every=4), x)


def test_values_out_of_range_give_nan_as_a_plain_chain() -> None:
    chain, x = simple(dtype=torch.float32), torch.randn(2, 6, 3, 5)
    x[0, 0, 0, 0] = float("nan")
    ours, theirs = gradients(chain, x), gradients(plain_of(chain), x)
    assert ours["module_list.0.subnet.w1"].isnan().any()
    assert theirs["module_list.0.subnet.w1"].isnan().any()


def test_gradients_by_the_criterion() -> None:
    """One block of a chain, in float32, by the criterion that every result of a block is held
    to.
    """
    for name in ("hard", "gin", "soft", "hh1"):
        case = Case(Shape(4, 7, (6, 5)), name)
        x, _ = make_input(case, torch.float32)
        chain = chain_of(case, 2, torch.float32)
        plain = ReversibleSequence(*case.shape.full[1:])
        for seed in range(2):
            plain.append(make_block(reference.AllInOneBlock, case, torch.float32, seed=seed))
        plain.load_state_dict(chain.state_dict())
        baseline, truth = gradients(plain, x), gradients(copy.deepcopy(plain).double(), x.double())
        for key, found in gradients(chain, x).items():
            if truth[key] is not None:
                assert_close(
                    found,
                    truth[key],
                    baseline[key],
                    f"{name} {key}",
                    magnitude=4 * truth[key].abs().max().item(),
                )
