"""Tests of the benchmarks of FrEIA's coupling blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import couplings, providers, timing
from bench.choice import Choice, Group
from bench.measure import Settings, Task
from bench.providers import Provider
from bench.subject import MODES, Sample, Subject, draw_samples, minimal_bytes
from bench.workloads import ALL_IN_ONE, WORKLOADS, Workload, workloads
from fastflow_kernels.accelerated_couplings import AcceleratedPermutation
from tests.support import coupling_blocks

CPU = torch.device("cpu")
GLOW = Workload("small", (3, 6), {"clamp": 1.5}, (2,), steps=2, block="GLOWCouplingBlock")
ONE_SIDED = replace(GLOW, block="AffineCouplingOneSided")
PROVIDERS = ("ours", "ours-accelerated", "freia", "freia-0.2")
STOCK = couplings.STOCK


@pytest.fixture(autouse=True)
def _without_peers_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the stand-in for FrEIA's classes, installed or not, and samples of single calls."""

    def missing() -> None:
        raise couplings.peers.PeerMissing

    monkeypatch.setattr(couplings, "STOCK", dict.fromkeys(STOCK, (missing, "absent")))
    monkeypatch.setattr(timing, "SPAN", {"cpu": 0.0})


def sample_of(workload: Workload, kind: str = "block") -> Sample:
    return draw_samples(kind, workload, torch.float32, CPU)[0]


def subject_of(workload: Workload, kind: str = "block", base: str = "ours") -> Subject:
    return Subject(kind, workload, Provider(base), [sample_of(workload, kind)])


def rows_of(workload: Workload, kind: str, mode: str) -> dict[str, Any]:
    settings = Settings(CPU, (2, 2), 0.0, copy_bandwidth=1e10)
    outcomes = Task(Group(kind, workload, "float32", mode), PROVIDERS, settings).measure(mode)
    assert not [o.failure for o in outcomes.values() if o.failure]
    return {name: outcome.row for name, outcome in outcomes.items()}


@pytest.mark.parametrize("block", coupling_blocks.NAMES)
def test_every_class_is_measured(block: str) -> None:
    options = {} if block == "NICECouplingBlock" else GLOW.options
    rows = rows_of(replace(GLOW, block=block, options=options), "block", "train")
    assert rows["ours-accelerated"]["skipped"] == "FrEIA is not installed"
    for name in ("ours", "freia", "freia-0.2"):
        assert rows[name]["median_us"] > 0
        assert rows[name]["block"] == block
        assert rows[name]["ratio"] == rows[name]["ratio_alike"]
    assert rows["ours"]["ratio"] == 1.0
    assert (rows["ours"]["class"], rows["freia"]["class"]) == ("fastflow_kernels", "reference")


@pytest.mark.parametrize("kind", ["block", "flow"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_measured(kind: str, mode: str) -> None:
    for block in ("GLOWCouplingBlock", "GINCouplingBlock"):
        rows = rows_of(replace(GLOW, block=block), kind, mode)
        assert rows["ours"]["median_us"] > 0
        assert ("kept_bytes" in rows["freia"]) == (mode == "train")


@pytest.mark.peers
@pytest.mark.parametrize("permutes", [False, True])
def test_the_real_classes_are_measured(monkeypatch: pytest.MonkeyPatch, permutes: bool) -> None:
    monkeypatch.setattr(couplings, "STOCK", STOCK)
    rows = rows_of(replace(GLOW, permutes=permutes), "block", "train")
    assert rows["freia-0.2"]["class"] == "FrEIA 0.2"
    assert rows["ours-accelerated"]["class"] == "FrEIA 0.2, accelerated"
    assert all(row["median_us"] > 0 for row in rows.values())


@pytest.mark.peers
def test_a_block_that_cannot_be_accelerated_is_not_timed_as_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(couplings, "STOCK", STOCK)
    workload = replace(GLOW, options={"clamp_activation": coupling_blocks.softsign})
    with pytest.raises(UserWarning, match="no block of the model runs fused"):
        subject_of(workload, base="ours-accelerated")


def test_a_permutation_follows_in_flows_and_where_the_workload_says_so() -> None:
    def permutations(workload: Workload, kind: str, base: str) -> int:
        modules = subject_of(workload, kind, base).model.modules()
        return sum(isinstance(m, couplings.PermuteRandom) for m in modules)

    for base in ("ours", "freia"):
        assert permutations(GLOW, "block", base) == 0
        assert permutations(GLOW, "flow", base) == GLOW.steps
        assert permutations(replace(GLOW, permutes=True), "block", base) == 1


def test_our_permutation_gathers_channels() -> None:
    model: Any = subject_of(replace(GLOW, permutes=True)).model
    assert isinstance(model.block.permutation, AcceleratedPermutation)


def test_each_subnet_hands_over_a_tensor_of_its_own() -> None:
    for workload in (w for w in WORKLOADS if w.block != ALL_IN_ONE):
        batch, channels, *spatial = workload.shape
        small = replace(workload, shape=(batch // 32 + 1, channels, *(4 for _ in spatial)))
        sample, results = sample_of(small), subject_of(small).results("train")
        sides = 1 if small.block == ONE_SIDED.block else 2
        assert sum(a.numel() for a in sample.stored) == sides * sample.x.numel()
        gradients = [t for name, t in results.items() if name.startswith("da")]
        for a, da in zip(sample.stored, gradients, strict=True):
            assert da is not None
            assert da.shape == a.shape
            assert da.any()


def test_minimal_bytes_count_all_coefficients() -> None:
    """A two-sided block has twice as many as its input has elements, a one-sided one as many."""
    expected = {"forward": (4, 3), "inverse": (4, 3), "backward": (7, 5), "train": (11, 8)}
    for place, workload in enumerate((GLOW, ONE_SIDED)):
        sample = sample_of(workload)
        for mode in MODES:
            assert minimal_bytes(mode, sample) == expected[mode][place] * sample.x.nbytes


def test_workloads_have_the_providers_of_their_blocks() -> None:
    def names(block: str, *chosen: str) -> list[str]:
        kinds, modes, dtypes = (["block"], ["train"], ["float32"])
        return Choice(kinds, ["all"], modes, dtypes, chosen, CPU).with_ours(block)

    eager = [provider.name for provider in providers.EAGER]
    assert names(ALL_IN_ONE, *eager) == ["ours", "ours-freia", "anomalib", "freia"]
    assert set(names(GLOW.block, *eager)) == set(PROVIDERS)
    assert names(ALL_IN_ONE, "freia") == ["ours", "ours-freia", "freia"]
    assert names(GLOW.block, "freia-compiled") == ["ours", "freia-compiled"]
    for block, name in ((ALL_IN_ONE, "freia-0.2"), (GLOW.block, "anomalib")):
        reason = providers.why_not(providers.PROVIDERS[name], replace(GLOW, block=block), True)
        assert reason == f"{name} has no {block}"


def test_reversible_chains_are_measured_of_all_in_one_blocks() -> None:
    assert {w.block for w in workloads("reversible", True)} == {ALL_IN_ONE}
    assert "cinn" in [w.name for w in workloads("flow", True)]
