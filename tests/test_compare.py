"""Test the criterion of accuracy itself: it passes and, above all, fails as it should."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import assert_close

TRUTH = torch.linspace(-3, 5, 101, dtype=torch.float64)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_limit_is_twice_the_baseline_plus_a_floor(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    baseline = (TRUTH + 16 * eps).to(dtype)
    off = (baseline.double() - TRUTH).abs().max().item()
    assert_close(TRUTH.to(dtype), TRUTH, baseline)
    assert_close((TRUTH + 1.5 * off).to(dtype), TRUTH, baseline)
    for wrong in (
        TRUTH + 2 * off + 25 * eps,
        TRUTH - 2 * off - 25 * eps,
        TRUTH * (1 + 30 * eps) + 32 * eps,
    ):
        with pytest.raises(AssertionError, match="max error .* > allowed"):
            assert_close(wrong.to(dtype), TRUTH, baseline, "y")


def test_rms_fails_where_the_maximum_does_not() -> None:
    baseline = TRUTH.float()
    baseline[7] += 1e-3
    with pytest.raises(AssertionError, match="rms error") as raised:
        assert_close((TRUTH + 9e-4).float(), TRUTH, baseline)
    assert "max error" not in str(raised.value)


def test_float64_is_measured_by_the_reference_in_float32() -> None:
    # The baseline's error is 32 eps, and 32 eps of float64 are 2^-47.
    baseline = (TRUTH + 2.0**-18).float()
    assert_close(TRUTH + 2.5 * 2.0**-47, TRUTH, baseline)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(TRUTH + 4 * 2.0**-47, TRUTH, baseline)
    with pytest.raises(AssertionError, match="must be in float32"):
        assert_close(TRUTH, TRUTH, TRUTH)


def test_magnitude_is_for_sums_that_cancel() -> None:
    truth, exact = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    result = exact + 1e-6
    with pytest.raises(AssertionError):
        assert_close(result, truth, exact)
    assert_close(result, truth, exact, magnitude=10.0)
    with pytest.raises(AssertionError):
        assert_close(result, truth, exact, magnitude=1.0)


def test_none_and_shapes_must_match() -> None:
    x = TRUTH.float()
    assert_close(None, None, None)
    for actual, truth in ((None, TRUTH), (x, None), (x[:-1], TRUTH), (x[None], TRUTH)):
        with pytest.raises(AssertionError, match="grad"):
            assert_close(actual, truth, x, "grad")
    assert_close(x[:0], TRUTH[:0], x[:0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_pattern_must_match(value: float) -> None:
    truth = TRUTH.clone()
    truth[5] = value
    assert_close(truth.float(), truth, truth.float())
    for wrong in (
        TRUTH.float(),
        truth.neg().float() if value == value else TRUTH.float() / 0,
        truth.roll(1).float(),
    ):
        with pytest.raises(AssertionError, match="differ in being"):
            assert_close(wrong, truth, truth.float())
    with pytest.raises(AssertionError, match="differ in being"):
        assert_close(truth.float(), TRUTH, TRUTH.float())


def test_overflow_of_the_dtype_is_no_error_of_ours() -> None:
    truth = torch.tensor([1.0, 1e5, 2.0], dtype=torch.float64)
    baseline = truth.half()
    assert baseline[1].isinf()
    assert_close(baseline, truth, baseline)
    assert_close(torch.tensor([1.0, 65504.0, 2.0]).half(), truth, baseline)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([float("inf"), float("inf"), 2.0]).half(), truth, baseline)
