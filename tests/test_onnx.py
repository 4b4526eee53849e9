"""Test ONNX files of both of torch's exporters.

They give the same results, and hold an index in place of a permutation's matrix.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import AllInOneBlock, ReversibleSequence, accelerate
from tests.support.blocks import TakesTensor
from tests.support.cases import Case, Shape, both_directions, make_block, make_input

pytestmark = pytest.mark.usefixtures("fused")

exporters = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
kinds = pytest.mark.parametrize("kind", ["ours", "accelerated"])
# All sizes differ, because PyTorch 2.13's exporter takes equal sizes for one.
CASES = [Case(Shape(3, 6), name) for name in ("rev", "soft", "hh2-soft-sigmoid")]
CASES += [Case(Shape(2, 6, (4, 5)), name) for name in ("gin", "hh1")]
CASES += [Case(Shape(3, 6), "hard", "freia")]


def export(model: nn.Module, x: Tensor, dynamo: bool) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The older exporter warns that it is old, and that sizes are constants.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (x,), None if dynamo else file, dynamo=dynamo, verbose=False
        )
        if program is not None:
            program.save(file)
    return file.getvalue()


def assert_file_computes(file: bytes, x: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    session = onnxruntime.InferenceSession(file)
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # ONNX Runtime sums in another order.
    for actual, value in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@kinds
@exporters
@both_directions
def test_a_block_exports(case: Case, kind: str, dynamo: bool, rev: bool) -> None:
    cls = AllInOneBlock if kind == "ours" else reference.AllInOneBlock
    block = make_block(cls, case, torch.float32, dialect=case.dialect).eval()
    if kind == "accelerated":
        accelerate(block)
    model = TakesTensor(block, rev)
    x, _ = make_input(case, torch.float32)
    with torch.no_grad():
        expected = model(x)
        file = export(model, x, dynamo)
    assert_file_computes(file, x, expected)
    assert not {node.domain for node in onnx.load_from_string(file).graph.node} & {
        "fastflow_kernels",
        "pkg.fastflow_kernels",
    }


@exporters
def test_reflections_of_a_reversible_chain_export(dynamo: bool) -> None:
    chain = ReversibleSequence(12)
    for _ in range(2):
        chain.append(
            AllInOneBlock,
            subnet_constructor=nn.Linear,
            learned_householder_permutation=2,
            reverse_permutation=True,
        )
    x = torch.randn(8, 12)
    with torch.no_grad():
        assert_file_computes(export(chain.eval(), x, dynamo), x, chain(x))


@exporters
@both_directions
def test_a_permutation_is_an_index_in_the_file(dynamo: bool, rev: bool) -> None:
    """The matrix of 1024 channels alone would take 4 MB.

    The index is that of the current weights, even if they were written past every hook.
    """
    block = AllInOneBlock(
        [(1024,)], subnet_constructor=lambda i, o: nn.Sequential(nn.Linear(i, 2), nn.Linear(2, o))
    ).eval()
    x = torch.randn(3, 1024)
    with torch.no_grad():
        file = export(TakesTensor(block, rev), x, dynamo)
        assert_file_computes(file, x, TakesTensor(block, rev)(x))
        assert len(file) < 100_000
        permutation = torch.randperm(1024)
        for w, index in (
            (block.w_perm, permutation),
            (block.w_perm_inv, torch.argsort(permutation)),
        ):
            w.data.copy_(nn.functional.one_hot(index, 1024))
        assert_file_computes(
            export(TakesTensor(block, rev), x, dynamo), x, TakesTensor(block, rev)(x)
        )
