"""The one criterion of accuracy.

A result passes if its distance from the truth is at most twice that of the plain formula in the
same dtype, plus a floor. Both the maximum and the root mean square must pass::

    err(actual) <= 2 * err(baseline) + 4 * eps * magnitude

- truth: the reference in float64, on the same (already rounded) inputs and parameters.
- baseline: the reference in the dtype under test. Its error is the cost of that dtype: a result
  need not be better, and may not be much worse. The factor 2 allows for two roundings of the same
  size in opposite directions.
- eps: the dtype's unit roundoff.
- magnitude: the quantity's largest magnitude. The floor is for baselines that happen to be exact.

For float64 the truth is no more exact than the result, so the baseline is computed in float32. A
rounding error is proportional to eps while it is small, so the baseline's error is multiplied by
eps(float64) / eps(float32) = 2^-29. The measured distance contains the truth's own error as well:
``|actual - truth| <= |actual - exact| + |truth - exact|``. The factor is therefore 3 instead of 2.
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
    """Assert that a result meets the criterion of this file.

    Args:
        actual: The result, in the dtype under test.
        truth: The reference in float64, of the same shape. None if the result must be None, as for
            a gradient that does not exist.
        baseline: The reference in the dtype under test, or in float32 if that dtype is float64.
        name: Name of the result, for the message.
        magnitude: Replaces ``max(abs(truth))`` in the floor. For a sum whose terms cancel, pass the
            largest sum of absolute terms.
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
    # Beyond the dtype's range the baseline is not finite while the truth is: skip these elements.
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
        measured, base = reduce(error).item(), reduce(base_error).item()
        allowed = factor * base + floor
        if not measured <= allowed:
            problems.append(
                f"{kind} error {measured:.3g} > allowed {allowed:.3g} (baseline {base:.3g} x "
                f"{factor:g} + floor {floor:.3g})"
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
    """Assert that NaNs and infinities, with their signs, stand where those of the truth do."""
    __tracebackhide__ = True
    for kind, is_so in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = is_so(actual) != is_so(truth)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise AssertionError(
                f"{label}: {int(wrong.sum())} elements differ in being {kind}, first at flat index "
                f"{first}: "
                f"got {actual[first].item()}, truth {truth[first].item()}"
            )
