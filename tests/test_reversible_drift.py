"""What a reversible chain measures of its own errors, and what it does about them."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import (
    AllInOneBlock,
    ReversibleSequence,
    drift,
)
from tests.support.cases import Case, Shape, make_block, make_input
from tests.support.chains import Narrow, chain_of, gradients, loss_of, random_input, simple
from tests.support.compare import assert_close
from tests.support.dispatch_modes import NoFloat64
from tests.support.plain_chain import plain_of

pytestmark = pytest.mark.usefixtures("fused")


def drifting(factor: float, depth: int = 8, **options: Any) -> ReversibleSequence:
    """Make a float32 chain that loses digits in block 3.

    That block scales one channel by ``factor`` and then adds 1.
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


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint_every": 1}, {"checkpoint_every": 2, "debug": True}], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1e25])
@pytest.mark.parametrize("gin", [True, False])
def test_the_drift_is_measured_without_float64(
    gin: bool, scale: float, options: dict[str, Any]
) -> None:
    """It is measured in float32, whose squares would overflow."""
    torch.manual_seed(0)
    chain = ReversibleSequence(8, **options)
    for _ in range(4):
        chain.append(AllInOneBlock, subnet_constructor=Narrow, gin_block=gin)
    x = scale * torch.randn(5, 8)
    with NoFloat64():
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
        (norm,) = drift._norms(x * factor)
        assert norm == pytest.approx(exact * factor, rel=1e-3)
    x[0, 0] = math.inf
    assert drift._norms(x) == [math.inf]
    x[0, 1] = math.nan
    assert math.isnan(drift._norms(x)[0])


def test_an_inverse_that_is_no_number_is_noticed() -> None:
    """A scale that has underflowed to 0 cannot be inverted, although the forward pass is finite."""
    chain = ReversibleSequence(6)
    for _ in range(2):
        chain.append(AllInOneBlock, subnet_constructor=nn.Linear, global_affine_type="EXP")
    with torch.no_grad():
        chain[1].global_scale.fill_(-120.0)
    z, log_det = chain(torch.randn(64, 6))
    assert z.isfinite().all()
    with pytest.raises(RuntimeError, match="off by inf"):
        (z.square().mean() - log_det.mean()).backward()


def test_an_inverse_without_digits_left_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises. A pass that keeps every activation has a plain chain's gradients."""
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

    def gradient(chain: nn.Module) -> Tensor:
        z, log_det = chain(x)
        assert z.isfinite().all()
        return torch.autograd.grad(z.square().mean() - log_det.mean(), x)[0]

    with pytest.raises(RuntimeError, match="input of block 0 .* is off by"):
        gradient(chain)
    chain.checkpoint_every = 1
    torch.testing.assert_close(gradient(chain), gradient(plain_of(chain)))


def test_the_drift_is_looked_at_wherever_the_backward_pass_ends() -> None:
    """The drift is measured behind frozen blocks, and in the smaller half of an input."""
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
    assert drift.error_of(x + off, x, x, drift.Segment(0, 0)) > 2**-20


def test_a_hook_that_changes_a_result_in_place_is_noticed() -> None:
    chain = simple()
    chain[1].register_forward_hook(lambda _, __, out: (out[0][0].detach().add_(1e-5), None)[1])
    with pytest.raises(RuntimeError, match="a hook replaced"):
        chain(random_input())


def test_cached_parametrizations_run_an_ordinary_chain() -> None:
    chain = simple()
    for block in chain:
        nn.utils.parametrize.register_parametrization(block.subnet, "w1", nn.Identity())
    x = random_input()
    with nn.utils.parametrize.cached():
        loss_of(*chain(x)).backward()
    assert all(block.subnet.parametrizations.w1.original.grad is not None for block in chain)


def test_an_overflow_forward_is_the_users() -> None:
    """As in a plain chain, there is no error, and gradients are not finite.

    GradScaler then skips the step.
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
    chain, x = drifting(1.0), random_input(torch.float32)
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
    x = random_input(torch.float32)
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
    chain, x = simple(dtype=torch.float32), random_input(torch.float32)
    x[0, 0, 0, 0] = float("nan")
    for model in (chain, plain_of(chain)):
        assert gradients(model, x)["module_list.0.subnet.w1"].isnan().any()


def test_gradients_by_the_criterion() -> None:
    """A chain's gradients in float32 meet the criterion that every result of a block must meet."""
    for name in ("hard", "gin", "soft", "hh1"):
        case = Case(Shape(4, 7, (6, 5)), name)
        x, _ = make_input(case, torch.float32)
        chain = chain_of(case, 2, torch.float32)
        plain = ReversibleSequence(*case.shape.full[1:])
        for seed in range(2):
            plain.append(make_block(reference.AllInOneBlock, case, torch.float32, seed=seed))
        plain.load_state_dict(chain.state_dict())
        baseline, truth = gradients(plain, x), gradients(copy.deepcopy(plain).double(), x.double())
        for key, actual in gradients(chain, x).items():
            if truth[key] is not None:
                assert_close(
                    actual,
                    truth[key],
                    baseline[key],
                    f"{name} {key}",
                    magnitude=4 * truth[key].abs().max().item(),
                )
