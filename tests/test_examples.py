"""The scripts of docs/examples run and print lines like the page's, within derived bounds.

Those that need anomalib, Lightning or a C++ compiler: tests/ecosystem/test_examples.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES, ROOT, printed_values, run_example

ROUNDING = 2.0**-24  # of float32, relative


def test_every_script_is_run_and_shown() -> None:
    scripts = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    tests = [Path(__file__), ROOT / "tests" / "ecosystem" / "test_examples.py"]
    run = re.findall(r'run_example\(\s*"(\w+\.py)"', "".join(path.read_text() for path in tests))
    page = (ROOT / "docs" / "examples.md").read_text()
    shown = re.findall(r"^```\{literalinclude\} examples/(\w+\.py)$", page, re.MULTILINE)
    assert set(run) == scripts
    assert sorted(shown) == sorted(scripts)


@pytest.mark.peers
def test_tabular_density(tmp_path: Path) -> None:
    text = run_example("tabular_density.py", tmp_path)
    (before,) = printed_values("before training: # nats", text)
    (after,) = printed_values("after training: # nats", text)
    (entropy,) = printed_values("entropy of the data: # nats, which no model can go below", text)
    samples, data = printed_values(
        "noise around the sine wave: # in the samples, # in the data", text
    )
    # x is a standard normal, y = sin(2x) + 0.3 n: the data's covariance, and the entropy of the
    # normal that has it, which is the best without a non-linear flow.
    variance, covariance = (1 - math.exp(-8)) / 2 + 0.3**2, 2 * math.exp(-2)
    exact = math.log(2 * math.pi * math.e * 0.3)
    gain = 0.5 * math.log(variance - covariance**2) - math.log(0.3)
    assert entropy == pytest.approx(exact, abs=0.005)  # two digits are printed
    # -log p of a point deviates by 1 nat, and 100000 points are averaged
    assert after >= exact - 4 / math.sqrt(100_000) - 0.005
    assert after <= exact + 0.1 * gain
    assert before >= after + 0.5 * gain
    # what a normal of another width costs
    ratio = samples / data
    assert math.log(ratio) + (ratio**-2 - 1) / 2 <= 0.1 * gain


@pytest.mark.peers
def test_conditional_inn(tmp_path: Path) -> None:
    text = run_example("conditional_inn.py", tmp_path)
    # A normal with variance 1 - 1 / 2.25 around value / 2.25; 10000 samples are averaged. A mean
    # that is off by a tenth of the standard deviation costs 0.005 nats.
    deviation = math.sqrt(1 - 1 / 2.25)
    for sign, value in (("-", -2.0), ("\\+", 2.0)):
        first, second, *exact = printed_values(
            rf"measured {sign}2\.0: samples have mean \(#, #\), exact is \(#, #\)", text
        )
        assert exact == pytest.approx([value / 2.25] * 2, abs=5e-4)
        assert [first, second] == pytest.approx(exact, abs=(0.1 + 4 / 100) * deviation)


@pytest.mark.peers
def test_accelerated_inn(tmp_path: Path) -> None:
    text = run_example("accelerated_inn.py", tmp_path)
    assert text.startswith("8 of 8 blocks run fused\n")
    accelerated, least = printed_values("after training: # nats, # are the least possible", text)
    (stock,) = printed_values("with FrEIA's own blocks the same weights give # nats", text)
    (percent,) = printed_values("the samples' mean, mixed as .*, is off by #%", text)
    # What the measurement tells of 32 standard normals. -log p of a point deviates by
    # sqrt(32 / 2) nats, and 20000 points are averaged. Two digits are printed.
    gain = 0.5 * 32 * math.log(2 * math.pi * math.e) - least
    assert accelerated >= least - 4 * math.sqrt(32 / 2) / math.sqrt(20_000) - 0.01
    assert accelerated <= least + 0.25 * gain
    assert stock == pytest.approx(accelerated, abs=0.011)
    # A quarter of the gain is what a mean costs that is off by 2 sqrt(gain / 8) standard
    # deviations. The noise's is 0.5, the norm of the eight mixtures some 2.5.
    assert percent <= 100 * math.sqrt(gain / 2) * 0.5 / 2.5


@pytest.mark.peers
def test_reversible_chain(tmp_path: Path) -> None:
    text = run_example("reversible_chain.py", tmp_path)
    blocks, size = printed_values("# blocks, the input takes # MB", text)
    (plain,) = printed_values("plain chain: keeps # MB", text)
    (reversible,) = printed_values("reversible chain: keeps # MB", text)
    (difference,) = printed_values("gradients differ by # of their norm", text)
    assert (blocks, size) == (64, 1.0)
    # a block keeps its input and the subnet's hidden layer, which is as wide
    assert plain >= blocks * 2 * size
    # the chain's input and output, and a log-determinant for each block and row of 64 channels
    assert reversible <= (2 + blocks / 64) * size
    # some ten roundings a block and chain, forward and backward
    assert 0 < difference <= blocks * 10 * 2 * ROUNDING


@pytest.mark.peers
def test_compiled(tmp_path: Path) -> None:
    """With a backend that needs no C++ compiler."""
    text = run_example("compiled.py", tmp_path, "--backend", "aot_eager")
    _check_compiled(text, operators=0)


@pytest.mark.peers
def test_compiled_with_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", "triton")
    text = run_example("compiled.py", tmp_path, "--backend", "aot_eager")
    _check_compiled(text, operators=2)  # one for each block


def _check_compiled(text: str, operators: int) -> None:
    assert f"graphs: 1, breaks: 0\noperators of ours: {operators}\n" in text
    for batch in (8, 5, 100):
        errors = printed_values(f"batch {batch}: z, log_det, gradient differ by #, #, #", text)
        assert max(errors) <= 100 * ROUNDING  # two blocks, forward and backward


@pytest.mark.peers
def test_distributed(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    text = run_example("distributed.py", tmp_path, launcher=launcher)
    losses = [
        printed_values(f"epoch {epoch}: loss of its last batch #", text)[0] for epoch in range(5)
    ]
    # Up to a constant the loss is at least the entropy of 8 normals with standard deviation 2. That
    # of a point deviates by 2 nats, and 64 are averaged.
    least = 8 * (0.5 + math.log(2))
    assert losses[0] > losses[-1] >= least - 4 * 2 / math.sqrt(64)
    assert "2 processes hold equal weights\n" in text
