"""Checks of a block that run on every engine: against the reference, by the design's criterion."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import fastflow_kernels
import reference
from tests.support.blocks import Stored, unwrapped
from tests.support.cases import DEVICE, LAYOUTS, Case, make_block, make_input
from tests.support.compare import assert_close


def evaluate(
    block: nn.Module, x: Tensor, c: list[Tensor], rev: bool = False, grad: bool = True
) -> dict[str, Tensor]:
    """Output and log-determinant, and the gradients of a random linear function of both to
    everything that takes one.
    """
    x, c = x.detach().requires_grad_(grad), [t.detach().requires_grad_(grad) for t in c]
    with torch.set_grad_enabled(grad):
        (y,), logdet = block([x], c, rev=rev)
    results = {"output": y, "log-det": logdet}
    if not grad:
        return results
    generator = torch.Generator().manual_seed(2)
    dy, dlogdet = (
        torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in (y, logdet)
    )
    block.zero_grad()
    # both: also GIN's log-determinant, 0, is part of the graph
    torch.autograd.backward([y, logdet], [dy, dlogdet])
    results |= {"grad x": x.grad, **{f"grad c{i}": t.grad for i, t in enumerate(c)}}
    return results | {
        f"grad {name}": p.grad for name, p in block.named_parameters() if p.requires_grad
    }


def compare(
    case: Case,
    dtype: torch.dtype,
    rev: bool,
    grad: bool,
    backend: str = "eager",
    layout: str = "contiguous",
) -> None:
    """The criterion over a few draws of weights and inputs: of a handful of numbers one baseline
    may be exact by luck.
    """
    draws = 4 if math.prod(case.shape.full) < 1000 else 1
    found = []
    for seed in range(draws):
        ours, stock = _blocks(case, dtype, backend, seed)
        x, c = make_input(case, dtype, seed + 1)
        x, c = LAYOUTS[layout](x.to(DEVICE)), [LAYOUTS[layout](t.to(DEVICE)) for t in c]
        found.append(_results(ours, stock, x, c, rev, grad))
    for name in found[0][0]:
        actual, baseline, truth = (_stacked([f[i][name] for f in found]) for i in range(3))
        assert_close(
            actual,
            truth,
            baseline,
            f"{case} {name}",
            magnitude=max(f[3] for f in found) if name == "log-det" else None,
        )


def _stacked(values: list[Tensor | None]) -> Tensor | None:
    """Together, or None where there is no gradient (global_scale of GIN)."""
    return None if values[0] is None else torch.stack(values)


def _blocks(case: Case, dtype: torch.dtype, backend: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """A block of ours and the reference, with the same weights."""
    stock = make_block(reference.AllInOneBlock, case, dtype, seed, dialect=case.dialect).to(DEVICE)
    ours = make_block(
        fastflow_kernels.AllInOneBlock, case, dtype, seed, dialect=case.dialect, backend=backend
    ).to(DEVICE)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def _results(
    ours: nn.Module, stock: nn.Module, x: Tensor, c: list[Tensor], rev: bool, grad: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """Ours, the reference in that dtype (float32 for float64), the truth, and the magnitude of the
    log-determinant's terms.
    """
    dtype = x.dtype
    actual = evaluate(ours, x, c, rev, grad)
    truth_block = copy.deepcopy(stock).double()
    lower = torch.float32 if dtype is torch.float64 else dtype
    baseline = evaluate(stock.to(lower), x.to(lower), [t.to(lower) for t in c], rev, grad)
    truth = evaluate(truth_block, x.double(), [t.double() for t in c], rev, grad)
    assert actual.keys() == truth.keys()
    assert actual["output"].dtype == dtype
    assert actual["log-det"].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # float32 in half precision; judged by what the baseline's dtype allows
    actual["log-det"] = actual["log-det"].to(dtype)
    return actual, baseline, truth, _terms(truth, truth_block)


def _terms(truth: dict[str, Tensor], block: nn.Module) -> float:
    """The log-determinant is a sum that may cancel: the size of its terms, the log-factors' (adding
    up at random) and the log-scales'.
    """
    log_factors = abs(block.clamp) * truth["output"][0].numel() ** 0.5
    if block.GIN:
        return log_factors
    pixels = truth["output"][0, 0].numel()
    return (
        log_factors
        + pixels * block.global_scale_activation(block.global_scale).log().abs().sum().item()
    )


def compare_fresh(activation: str, shape: tuple[int, ...], backend: str) -> None:
    """The log-determinant of a block as it is built: log(scale) is near 0 and the same in every
    channel, so that its error adds up.
    """
    results = []
    # where every block is built, for the initial scale to have the same bits in all
    with torch.device("cpu"):
        x, a = torch.randn(2, *shape), torch.randn(2, shape[0] // 2 * 2, *shape[1:])
        options = {"subnet_constructor": lambda *_: Stored(a), "global_affine_type": activation}
        for dtype in (torch.float32, torch.float64):
            block = reference.AllInOneBlock([shape], **options).to(dtype)
            results.append(
                [unwrapped(block([x.to(dtype)], rev=rev))[1].detach() for rev in (False, True)]
            )
        block = fastflow_kernels.AllInOneBlock([shape], **options, backend=backend).to(DEVICE)
    with torch.no_grad():
        actual = [unwrapped(block([x.to(DEVICE)], rev=rev))[1] for rev in (False, True)]
    for mine, baseline, truth in zip(actual, *results, strict=True):
        assert_close(mine, truth, baseline, f"{activation} {shape}")


def check_float16_range(backend: str) -> None:
    """x2 * exp(s) reaches 3000 * e^5, far beyond float16's 65504, and the sum of s too; y, dx and
    the log-determinant do not.
    """
    shape = (2, 128, 12, 12)
    a = torch.full(shape, 100.0, dtype=torch.float16, requires_grad=True)
    block = fastflow_kernels.AllInOneBlock(
        [shape[1:]],
        subnet_constructor=lambda *_: Stored(a),
        affine_clamping=5.0,
        global_affine_type="EXP",
        global_affine_init=0.01,
        backend=backend,
    ).half()
    x = (3000.0 * torch.rand(shape)).half().requires_grad_()
    (y,), logdet = block([x])
    assert 4000 < y.max() < 5000
    expected = 64 * 144 * 5.0 + 128 * 144 * block.global_scale.detach().double()[0, 0, 0, 0].item()
    assert abs(logdet[0].item() - expected) < 1e-5 * 128 * 144 * 5
    torch.autograd.backward([y, logdet], [torch.ones_like(y), torch.zeros_like(logdet)])
    assert x.grad.isfinite().all()
    assert a.grad.isfinite().all()
    with torch.no_grad():
        (back,), _ = block([y.detach()], rev=True)
    # rounding of y and of what came before it, in units of the largest x
    assert (back - x).abs().max() <= 4 * 3000 * torch.finfo(torch.float16).eps
