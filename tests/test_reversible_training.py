"""Reversible chains with random numbers, buffers, hooks, frozen parts and low precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastflow_kernels import (
    AllInOneBlock,
    ReversibleSequence,
    link,
    replay,
)
from tests.support.cases import Case, make_input
from tests.support.chains import (
    DEPTH,
    SHAPE,
    Dropping,
    Narrow,
    Normed,
    assert_like_plain,
    assert_same,
    chain_of,
    gradients,
    loss_of,
    parameter_gradients,
    random_input,
    simple,
)
from tests.support.memory import Peak, bytes_kept_for_backward
from tests.support.plain_chain import plain_of

pytestmark = pytest.mark.usefixtures("fused")


def test_dropout_is_replayed_and_the_random_state_goes_on_as_without() -> None:
    chain = simple(subnet=Dropping)
    x, after = random_input(), []
    results = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        results.append(gradients(model, x))
        after.append(torch.get_rng_state())
    assert_same(*results)
    assert torch.equal(*after)


def test_training_flags_are_those_of_the_forward_pass() -> None:
    chain, x = simple(subnet=Dropping), random_input()
    results = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        z, log_det = model(x)
        model.eval()
        loss_of(z, log_det).backward()
        results.append(parameter_gradients(model))
    assert not any(m.training for m in chain.modules())
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_and_spectral_norm_are_updated_once(training: bool) -> None:
    chain, x = simple(subnet=Normed).train(training), random_input()
    plain = plain_of(chain)
    for _ in range(2):
        assert_same(gradients(chain, x), gradients(plain, x))
    buffers = zip(chain.named_buffers(), plain.named_buffers(), strict=True)
    for (name, actual), (_, expected) in buffers:
        assert torch.equal(actual, expected), name
    assert int(chain[0].subnet.layers[1].num_batches_tracked) == 2 * training


class Buffered(nn.Module):
    """A subnet with a buffer for every way in which one changes, or does not."""

    replaced: Tensor

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
            self.hidden.data.mul_(0.9)  # no version shows this
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

    class Noted(replay.ReplayedSubnet):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr(link, "ReplayedSubnet", Noted)
    chain, x = simple(subnet=Buffered).train(training), random_input()
    plain = plain_of(chain)
    for _ in range(2):
        assert_same(gradients(chain, x), gradients(plain, x))
    buffers = zip(chain.named_buffers(), plain.named_buffers(), strict=True)
    for (name, actual), (_, expected) in buffers:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=name)
    changed = {"written", "hidden", "replaced"} if training else {"evaluated"}
    for run in runs:
        # NaN is not equal to itself, so it counts as changed.
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
    results = []
    for model in (chain, plain_of(chain)):
        torch.manual_seed(5)
        results.append(gradients(model, random_input()))
    assert_same(*results)


def test_checkpoint_around_the_chain() -> None:
    chain, x = (
        simple(subnet=Dropping),
        torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True),
    )
    plain = plain_of(chain)
    results = []
    for run in (lambda: checkpoint(chain, x, use_reentrant=False), lambda: plain(x)):
        torch.manual_seed(5)
        x.grad = None
        loss_of(*run()).backward()
        results.append({"dx": x.grad})
    assert_same(*results)


def test_frozen_blocks_and_parts() -> None:
    for frozen in ([0, 1], [2], [4], [0, 1, 2, 3, 4]):
        chain = simple()
        for i in frozen:
            chain[i].requires_grad_(False)
        chain[3].global_scale.requires_grad_(False)
        assert_like_plain(chain, random_input())
        plain = plain_of(chain)
        if len(frozen) < 5:
            x = random_input()
            for model in (chain, plain):
                model.zero_grad()
                loss_of(*model(x)).backward()
            assert_same(*(parameter_gradients(m) for m in (chain, plain)))


def test_gradients_accumulate_and_a_graph_can_be_kept() -> None:
    chain = simple()
    plain = plain_of(chain)
    for _ in range(2):
        x = random_input()
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
    assert_like_plain(chain, random_input())


def test_hooks_fire_as_often_as_in_a_plain_chain() -> None:
    counts = []
    chain = simple()
    for model in (chain, plain_of(chain)):
        fired: dict[str, int] = {}

        def count(key: str, result: Tensor | None = None, fired: dict[str, int] = fired) -> Any:
            fired[key] = fired.get(key, 0) + 1
            return result

        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda g, name=name: count(f"hook {name}", 2 * g))
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
    chain, results = simple(), []
    for model in (chain, plain_of(chain)):
        seen: list[Tensor] = []
        model[2].register_forward_hook(
            lambda module, arguments, result, seen=seen: seen.append(result[0][0])
        )
        z, log_det = model(torch.ones(2, 6, 3, 5, dtype=torch.float64))
        (loss_of(z, log_det) + seen[0].square().sum()).backward()
        results.append(parameter_gradients(model))
    assert_same(*results)
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
    results = []
    for model in (chain, plain):
        condition = c[0].clone().requires_grad_()
        model(x, [condition])[1].sum().backward()
        results.append({"dc": condition.grad} | parameter_gradients(model))
    # The last block's offset has no gradient in one model and zero in the other.
    for gradients_of_model in results:
        gradients_of_model.pop(f"module_list.{DEPTH - 1}.global_offset", None)
    assert_same(*results)


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
    results = []
    for model, data in ((chain, x), (plain, x), (exact, x.double())):
        torch.manual_seed(5)
        for m in model.modules():
            m.training = False
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            z, log_det = model(data)
        if model is chain:
            assert z.dtype == log_det.dtype == torch.float32
            assert set(seen) == {(torch.float32, torch.bfloat16)}
            assert chain.drift == {}
        loss_of(z, log_det).backward()  # outside of autocast, as is usual
        if model is chain:
            assert set(seen) == {(torch.float32, torch.bfloat16)}
            assert len(seen) == 2 * DEPTH
            # The subnet's coefficients are the same half precision numbers both times.
            assert chain.drift[0] < 1e-5
        results.append(
            {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        )
    of_reversible, of_plain, truth = results
    for name, t in truth.items():
        error, allowed = ((g[name] - t).norm() for g in (of_reversible, of_plain))
        assert error <= 2 * allowed + 1e-5 * t.norm(), name


def test_grad_scaler_steps_and_skips_as_with_a_plain_chain() -> None:
    chain = simple(dtype=torch.float32, subnet=Dropping).eval()
    for scale, steps in ((2.0**10, True), (2.0**127, False)):
        model = copy.deepcopy(chain)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = model[0].global_offset.clone()
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = model(random_input(torch.float32))
        scaler.scale(1e3 * loss_of(z, log_det)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].global_offset, before) != steps
        assert (scaler.get_scale() < scale) != steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_reconstructed_where_the_user_says_so(dtype: torch.dtype) -> None:
    """A few blocks lose little enough not to raise: bfloat16 is off by 2e-3, float16 by 2e-4.

    The first of these is a warning.
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
    def assert_noticed(tensor_of: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> None:
        chain = simple(**options).eval()
        z, log_det = chain(random_input())
        with torch.no_grad():
            tensor_of(chain, z).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(z.clone(), log_det).backward()

    assert_noticed(lambda chain, z: chain[1].subnet.w1)
    assert_noticed(lambda chain, z: chain[1].global_scale)
    assert_noticed(lambda chain, z: z)
    assert_noticed(lambda chain, z: chain[1].subnet.layers[1].running_mean, subnet=Normed)


def test_second_gradients_and_changed_inputs_raise() -> None:
    chain, x = simple(), torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second or batched gradients"):
        torch.autograd.grad(loss_of(*chain(x)), x, create_graph=True)
    chain[1].register_forward_hook(
        lambda module, arguments, result: ((2 * result[0][0],), result[1])
    )
    with pytest.raises(RuntimeError, match="a hook replaced the input or the output of block 1"):
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
        chain(random_input())


def test_functional_call_reaches_the_given_parameters() -> None:
    chain, x = simple(), random_input()
    replacements = {
        name: (0.9 * p).detach().requires_grad_(p.requires_grad)
        for name, p in chain.named_parameters()
        if "perm" not in name
    }
    loss_of(*torch.func.functional_call(chain, replacements, (x,))).backward()
    plain = plain_of(chain)
    plain.load_state_dict(replacements, strict=False)
    expected = gradients(plain, x)
    assert_same(
        {name: p.grad for name, p in replacements.items()},
        {name: expected[name] for name in replacements},
    )
