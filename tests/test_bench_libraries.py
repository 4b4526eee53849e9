"""The comparison with other flow libraries: its chains, their checks, rows and tables."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import libraries, records
from bench.libraries import CHECKED, build_all, check_conditioners, check_flow, measure
from bench.libraries_report import library_tables
from bench.library_chains import LIBRARIES, Chain, Conditioner, Library, Size
from bench.records import Row

ROOT = Path(__file__).resolve().parent.parent
SMALL = (16, 6)
WITH_FREIA = ["ours", "FrEIA AllInOneBlock", "FrEIA GLOW", "FrEIA RNVP"]


def row(**changes: Any) -> Row:
    made = {
        "kind": "library",
        "workload": "8 couplings",
        "shape": [256, 8],
        "mode": "train",
        "dtype": "float32",
        "provider": "ours",
        "class": "c",
        "median_us": 2500.0,
        "ratio": 1.0,
        "device": "cpu-x",
        "device_name": "X",
        "threads": 1,
        "date": "2026-01-01T00:00:00+00:00",
    }
    return made | changes


@pytest.fixture
def _only_freia(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the libraries that the tests' environment holds, and time single calls."""
    chosen = {name: LIBRARIES[name] for name in WITH_FREIA}
    monkeypatch.setattr(libraries, "LIBRARIES", chosen)
    monkeypatch.setattr(libraries, "ROUNDS", (2, 2))
    monkeypatch.setattr(libraries.timing, "SPAN", {"cpu": 0.0})


# --- the chains -----------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", WITH_FREIA)
def test_chains_are_flows_with_equal_conditioners(name: str) -> None:
    check_flow(name, LIBRARIES[name].build(CHECKED), CHECKED.channels)
    for shape in libraries.SHAPES:
        size = libraries.size_of(shape)
        chain = LIBRARIES[name].build(size)
        check_conditioners(name, chain, size)
        assert len(chain.conditioners) == size.couplings * LIBRARIES[name].networks


def test_our_chain_holds_a_scale_and_an_offset_per_coupling() -> None:
    size = Size(channels=6, couplings=4, width=5)
    module = LIBRARIES["ours"].build(size).module
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == size.parameters() + size.couplings * 2 * size.channels


def wrong(**changes: Any) -> Chain:
    """Return our chain with some of its attributes exchanged."""
    chain = LIBRARIES["ours"].build(CHECKED)
    made = {name: change(chain) for name, change in changes.items()}
    return replace(chain, **made)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"to_data": lambda c: lambda z: c.to_data(z) + 1e-6}, "ours: inverse.* is off by 1e-06"),
        ({"to_data": lambda c: lambda z: z * float("nan")}, "ours: inverse.* is off by nan"),
        (
            {"to_latent": lambda c: lambda x: (c.to_latent(x)[0], c.to_latent(x)[1] * (1 + 1e-6))},
            "ours: log-determinant is off",
        ),
    ],
    ids=["inverse", "nan", "log-determinant"],
)
def test_a_wrong_flow_is_noticed(fault: dict[str, Any], message: str) -> None:
    check_flow("ours", wrong(), CHECKED.channels)
    with pytest.raises(AssertionError, match=message):
        check_flow("ours", wrong(**fault), CHECKED.channels)


@pytest.mark.parametrize("name", ["ours", "FrEIA RNVP"])
def test_a_larger_or_smaller_conditioner_is_noticed(name: str) -> None:
    size = Size(channels=6, couplings=1, width=20)
    networks = LIBRARIES[name].networks
    fits = {1: [(3, 6, 20)], 2: [(3, 3, 14), (3, 3, 14)]}[networks]

    def chain(*shapes: tuple[int, int, int]) -> Chain:
        made: list[nn.Module] = [Conditioner(*shape) for shape in shapes]
        return Chain(nn.ModuleList(made), made, lambda x: (x, x[:, 0]), lambda z: z)

    check_conditioners(name, chain(*fits), size)
    for change in (-1, 1):
        changed = [(inputs, outputs, width + change) for inputs, outputs, width in fits]
        with pytest.raises(AssertionError, match=r"parameters, expected 206"):
            check_conditioners(name, chain(*changed), size)


# --- rows and tables ------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.usefixtures("_only_freia")
def test_every_library_and_mode_has_a_row() -> None:
    rows = measure(SMALL, 0.0)
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (mode, name) for mode in libraries.MODES for name in WITH_FREIA
    ]
    assert all(r["p20_us"] <= r["median_us"] <= r["p80_us"] and r["ratio"] > 0 for r in rows)
    assert {r["ratio"] for r in rows if r["provider"] == "ours"} == {1.0}
    assert {r["class"].split()[0] for r in rows} == {"fastflow_kernels", "FrEIA"}
    assert "FrEIA 0.2" in {r["class"] for r in rows}


def test_a_training_step_leaves_gradients_and_sampling_takes_none() -> None:
    chain = LIBRARIES["ours"].build(CHECKED)
    timed = libraries.TimedChain(chain, torch.randn(4, 6), torch.randn(4, 6))
    (step,) = timed.ready("train", 1)
    step()
    first = [p.grad.clone() for p in timed.parameters]
    step()
    for p, grad in zip(timed.parameters, first, strict=True):
        assert torch.equal(p.grad, grad)  # of this step alone
        assert grad.abs().sum() > 0
    (sample,) = timed.ready("inverse", 1)
    assert not sample().requires_grad
    assert torch.equal(sample(), chain.to_data(timed.z))


def test_every_chain_begins_a_round_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def ready(self, mode: str, calls: int) -> list[Callable[[], None]]:
            return [lambda: order.append(self.name)] * calls

    monkeypatch.setattr(libraries, "ROUNDS", (3, 3))
    monkeypatch.setattr(libraries.timing, "SPAN", {"cpu": 0.0})
    times = libraries.time_in_turn({name: Counting(name) for name in "abc"}, "train", 0.0)
    assert "".join(order[-9:]) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.peers
@pytest.mark.usefixtures("_only_freia")
def test_the_command_records_rows_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(size: Size) -> Chain:
        importlib.import_module("no_such_library")
        raise AssertionError

    monkeypatch.setitem(libraries.LIBRARIES, "missing", Library("no-such-library", build))
    monkeypatch.setattr(libraries, "SHAPES", (SMALL,))
    monkeypatch.setattr(libraries.records, "RESULTS", tmp_path)
    monkeypatch.setattr(libraries.records, "ROOT", tmp_path.parent)
    libraries.main(["--seconds", "0"])
    assert not list(tmp_path.iterdir())
    out, err = capsys.readouterr()
    assert "| FrEIA GLOW |" in out
    assert "missing was not measured (No module named 'no_such_library')" in out
    assert "correct flows: ours, FrEIA AllInOneBlock, FrEIA GLOW, FrEIA RNVP" in err
    libraries.main(["--seconds", "0", "--record"])
    rows = records.read([tmp_path])
    assert {r["provider"] for r in rows} == set(WITH_FREIA)
    (file,) = tmp_path.rglob("*.jsonl")
    assert file.name == "library.jsonl"
    assert file.parent.name == rows[0]["device"]


@pytest.mark.parametrize("name", ["zuko", "normflows", "nflows"])
def test_a_library_that_is_not_installed_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    _, absent = build_all(CHECKED)
    assert absent[name].startswith(f"{name} was not measured (")
    assert absent[name].endswith("Run: make libraries")


def test_tables_hold_one_number_a_cell() -> None:
    rows = [
        row(),
        row(provider="zuko", ratio=1.294),
        row(shape=[512, 512], median_us=80000.0),
        row(mode="inverse", median_us=900.0),
        row(mode="inverse", provider="zuko", ratio=0.958),
    ]
    lines = library_tables([*rows, row(kind="block", provider="anomalib")])
    assert lines[0] == "### Other flow libraries"
    assert [line for line in lines if line.startswith("|")] == [
        "| Training step | (256,\u00a08) | (512,\u00a0512) |",
        "|---|---:|---:|",
        "| ours, ms | 2.50 | 80.00 |",
        "| zuko | 1.29 | – |",
        "| Sampling | (256,\u00a08) |",
        "|---|---:|",
        "| ours, ms | 0.90 |",
        "| zuko | 0.96 |",
    ]
    assert library_tables([row(kind="block")]) == []


def test_the_report_shows_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report import write_report

    text = write_report([row(), row(provider="zuko", ratio=1.294)], tmp_path).read_text()
    assert "## X, 1 thread, float32" in text
    assert "### Other flow libraries" in text
    assert '| zuko | <span class="faster">1.29</span> |' in text


def test_the_environment_pins_every_library() -> None:
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "ci/libraries.txt").read_text(), re.M))
    pinned |= dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "ci/peers.txt").read_text(), re.M))
    wanted = {library.distribution for library in LIBRARIES.values()} - {"fastflow_kernels"}
    assert wanted <= pinned.keys()


@pytest.mark.peers
def test_ratio_is_the_librarys_time_divided_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(timed: Mapping[str, Any], mode: str, seconds: float) -> dict[str, list[float]]:
        return {name: [2.0 if name == "ours" else 3.0] * 5 for name in timed}

    monkeypatch.setattr(libraries, "time_in_turn", times)
    rows = {row["provider"]: row for row in libraries.measure((16, 6), 0.0)}
    assert rows["ours"]["ratio"] == 1.0
    assert rows["FrEIA GLOW"]["ratio"] == 1.5
    assert rows["FrEIA GLOW"]["median_us"] == 3e6


def test_the_likelihood_counts_the_log_determinant() -> None:
    z, log_det = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([1.0, 3.0])
    assert libraries.negative_log_likelihood(z, log_det).item() == (4.5 - 4.0) / 2
