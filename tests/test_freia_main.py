"""Compare the reference in dialect "freia" with the block of FrEIA's main branch.

ci/freia_main.sh installs it. Without it there is nothing to compare with, and the stand-in that
tests and benchmarks take instead is this reference.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from fastflow_kernels import accelerate, report
from reference import AllInOneBlock
from tests.support import freia_main
from tests.support.blocks import evaluate
from tests.support.cases import CASES, Case, both_directions, ids, make_block, make_input
from tests.support.peers import PeerMissing
from tests.support.stock_blocks import stock_block

# FrEIA main raises UnboundLocalError for reflections over a hard permutation.
cases = [
    case
    for case in CASES
    if case.dialect == "freia" and not case.options.get("learned_householder_permutation")
]
EPS = torch.finfo(torch.float64).eps
needs_freia_main = pytest.mark.skipif(
    not freia_main.FOLDER.is_dir(), reason="FrEIA main is not installed: ci/freia_main.sh"
)


def test_pinned_commit_is_whole() -> None:
    requirement = freia_main.REQUIREMENT.read_text().strip().splitlines()[-1]
    assert len(requirement.rsplit("@", 1)[1]) == 40
    assert len(freia_main.commit()) == 12


@pytest.mark.skipif(freia_main.FOLDER.is_dir(), reason="FrEIA main is installed")
def test_without_it_the_command_is_named() -> None:
    with pytest.raises(PeerMissing, match="ci/freia_main.sh"):
        freia_main.freia_main_block()


@needs_freia_main
@both_directions
@pytest.mark.parametrize("case", cases, ids=ids(cases))
def test_reference_equals_the_branch(case: Case, rev: bool) -> None:
    stock = stock_block(freia_main.freia_main_block, case, seed=0)
    ours = make_block(partial(AllInOneBlock, dialect="freia"), case, seed=9)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x, c = make_input(case)
    expected, actual = evaluate(stock, x, c, rev), evaluate(ours, x, c, rev)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # A sum of 100 terms in another order: 4 + sqrt(100) roundings of values up to 30 times
        # as large as the result, 14 * 30 = 420.
        torch.testing.assert_close(actual[name], value, rtol=420 * EPS, atol=420 * EPS)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the benchmarks name the pinned commit."""
    (tmp_path / "all_in_one_block.py").write_text("AllInOneBlock = object\n")
    monkeypatch.setattr(freia_main, "FOLDER", tmp_path)
    with pytest.raises(PeerMissing, match=f"is not of commit {freia_main.commit()}"):
        freia_main.freia_main_block.__wrapped__()


@needs_freia_main
def test_accelerate_takes_the_branch() -> None:
    block = accelerate(stock_block(freia_main.freia_main_block, cases[0]))
    assert "dialect 'freia'" in str(report(block))
