"""The one criterion of accuracy.

A result passes if it is at most twice as far from the truth as the plain formula is when it is
evaluated in the same dtype, plus a floor::

    err(actual) <= 2 * err(baseline) + 4 * eps * magnitude         by the maximum and by the root
    mean square

- truth: the reference in float64, on the same (already rounded) inputs and parameters.
- baseline: the reference in the dtype under test. Its error is what that dtype costs; nobody is
  asked to be better, nor allowed to be much worse. The factor 2 is for two roundings of the same
  size that fall on different sides.
- eps: the dtype's unit; magnitude: the quantity's largest magnitude. The floor is for baselines
  that happen to be exact.

In float64 no dtype is better, so both the error of a float64 result and the truth itself are of
that dtype's size. A rounding error is proportional to eps as long as it stays small, so that the
baseline's error in float64 is estimated from float32: pass the reference in float32 as the
baseline, and its error is multiplied by eps(float64) / eps(float32) = 2^-29. In this case the
measured distance holds the truth's own error as well, ``|actual - truth| <= |actual - exact| +
|truth - exact|``, which adds one to the factor: 3 in place of 2.
"""

from __future__ import annotations

import torch


def assert_close(
    actual: torch.Tensor | None,
    truth: torch.Tensor | None,
    baseline: torch.Tensor | None,
    name: str = "",
    *,
    magnitude: float | None = None,
    units: float = 4.0,
) -> None:
    """Assert the criterion above.

    Args:
        actual: The result, in the dtype under test.
        truth: The reference in float64, of the same shape. None if there must be no result (a
            gradient that is None).
        baseline: The reference in the dtype under test; in float32 if that is float64.
        name: What is compared, for the message.
        magnitude: Stands in for ``max(abs(truth))`` in the floor. Right for a sum whose terms
            cancel: the largest sum of absolute terms.
        units: The floor in units of eps * magnitude.

    Raises:
        AssertionError: With the measured and the allowed error.
    """
    __tracebackhide__ = True
    label = name or "result"
    if truth is None or actual is None:
        assert truth is None, f"{label}: got None, expected a tensor of shape {tuple(truth.shape)}"
        assert actual is None, (
            f"{label}: got a tensor of shape {tuple(actual.shape)}, expected None"
        )
        return
    assert baseline is not None, f"{label}: the baseline is None and the truth is not"
    assert truth.dtype == torch.float64, f"{label}: the truth must be float64, it is {truth.dtype}"
    assert actual.shape == truth.shape, (
        f"{label}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    assert baseline.shape == truth.shape, (
        f"{label}: the baseline has shape {tuple(baseline.shape)}, the truth {tuple(truth.shape)}"
    )

    eps = torch.finfo(actual.dtype).eps
    factor, shrink = 2.0, 1.0
    if actual.dtype == torch.float64:
        assert baseline.dtype == torch.float32, (
            f"{label}: for float64 the baseline must be in float32, it is {baseline.dtype}"
        )
        factor, shrink = 3.0, eps / torch.finfo(torch.float32).eps

    actual, truth, baseline = (
        t.detach().to(truth.device, torch.float64).flatten() for t in (actual, truth, baseline)
    )
    # Where the dtype's range ends, the baseline is infinite or NaN and the truth is not: there, and
    # only there, anything goes.
    in_range = baseline.isfinite() | ~truth.isfinite()
    actual, truth, baseline = actual[in_range], truth[in_range], baseline[in_range]
    _assert_same_pattern(actual, truth, label)
    finite = truth.isfinite()
    actual, truth, baseline = actual[finite], truth[finite], baseline[finite]
    if truth.numel() == 0:
        return

    floor = units * eps * (truth.abs().max().item() if magnitude is None else magnitude)
    error, base_error = (actual - truth).abs(), (baseline - truth).abs() * shrink
    problems = []
    for kind, reduce in (("max", torch.max), ("rms", lambda d: d.square().mean().sqrt())):
        got, base = reduce(error).item(), reduce(base_error).item()
        allowed = factor * base + floor
        if not got <= allowed:
            problems.append(
                f"{kind} error {got:.3g} > allowed {allowed:.3g} (baseline {base:.3g} x {factor:g} "
                f"+ floor {floor:.3g})"
            )
    if problems:
        worst = int(error.argmax())
        where = (
            f"worst of {error.numel()} at flat index {worst}: got {actual[worst]:.17g}, "
            f"truth {truth[worst]:.17g}"
        )
        raise AssertionError(
            f"{label}: {'; '.join(problems)}; {where}, baseline {baseline[worst]:.17g}"
        )


def _assert_same_pattern(actual: torch.Tensor, truth: torch.Tensor, label: str) -> None:
    """NaN where the truth is NaN, inf where it is inf with the same sign, finite elsewhere."""
    __tracebackhide__ = True
    for what, is_so in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = is_so(actual) != is_so(truth)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise AssertionError(
                f"{label}: {int(wrong.sum())} elements differ in being {what}, first at flat index "
                f"{first}: "
                f"got {actual[first].item()}, truth {truth[first].item()}"
            )
