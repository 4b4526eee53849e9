"""Test the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import fastflow_kernels
from fastflow_kernels import __main__ as cli
from fastflow_kernels import backends, check
from fastflow_kernels.engines import eager


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "shapes", lambda: {"planes": (2, 10, 4, 4), "rows": (6, 7)})


def test_info_names_versions_backends_and_switches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "eager")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        fastflow_kernels.__version__,
        torch.__version__,
        "backend eager",
        "backend triton",
        "eager   auto | eager | triton",
        "soft",
    ):
        assert expected in printed
    if not torch.cuda.is_available():
        assert "not available: torch finds no GPU" in printed


@pytest.mark.usefixtures("small")
def test_check_passes_and_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "every backend is accurate" in printed
    assert printed.count("eager") >= 4  # two shapes in two dtypes


@pytest.mark.usefixtures("small")
def test_check_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["passed"]
    assert {row["dtype"] for row in results["rows"]} == {"float32", "bfloat16"}
    assert all(0 < row["fraction"] <= 1 for row in results["rows"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["forward", "backward", "invert_active"])
def test_check_fails_on_an_inaccurate_backend(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function of a backend has a relative error of 1e-4.

    The error is in float32 only, because the truth is computed in float64.
    """
    original = getattr(eager, name)

    def wrong(*arguments: object) -> object:
        result = original(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        if first.dtype == torch.float32:
            first.mul_(1.0001)
        return result

    monkeypatch.setattr(eager, name, wrong)
    assert cli.main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["nonsense"])
    assert refused.value.code == 2


def test_check_refuses_an_unknown_default_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(SystemExit) as refused:
        cli.main(["check"])
    assert refused.value.code == 2
    assert (
        "expected FASTFLOW_KERNELS_BACKEND to be one of auto, eager, triton; got 'cuda'"
        in capsys.readouterr().err
    )
    assert cli.main(["info"]) == 1
    assert "UNKNOWN" in capsys.readouterr().out


def test_the_device_s_own_time_is_taken_behind_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test mocks a GPU's clock.

    A copy takes 0.1 ms, a call 0.05 ms, and Python takes 1 ms to queue a call.
    """
    clock = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time = 0.0

        def record(self) -> None:
            self.time = clock

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    def advance(milliseconds: float) -> None:
        nonlocal clock
        clock += milliseconds

    copies = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def copy(_: object) -> None:
        copies.append(1)
        advance(0.1)

    monkeypatch.setattr(check._Device, "_copy", copy)
    device = check._Device()
    assert device.bandwidth() == pytest.approx(2 * 2**28 / 1e-4)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20)
    )
    assert device.share(2**28, 1e-4) == pytest.approx(0.5)
    assert device.share(2**21, 1e-6) is None  # fits into the cache
    copies.clear()
    assert device.seconds(lambda: advance(0.05), as_called=1e-3) == pytest.approx(5e-5)
    assert len(copies) == device.REPEATS * 2 * device.CALLS * 10  # last twice as long as queueing
