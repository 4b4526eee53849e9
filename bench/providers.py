"""Who is measured: the stock blocks and ours, called eagerly, compiled by torch.compile, or
replayed from a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastflow_kernels
import reference
from bench.workloads import Workload
from tests.support import peers

EXECUTIONS = ("eager", "compiled", "graphs")


@dataclass(frozen=True)
class Provider:
    """A block and a way to call it.

    Attributes:
        base: "ours", "ours-freia", "anomalib" or "freia"; the truth comes from "reference" and
            "reference-freia".
        execution: One of EXECUTIONS. "graphs" is ``mode="reduce-overhead"`` for the stock blocks
            and a captured eager call for ours.
    """

    base: str
    execution: str = "eager"

    @property
    def name(self) -> str:
        return self.base if self.execution == "eager" else f"{self.base}-{self.execution}"

    @property
    def ours(self) -> bool:
        return self.base.startswith("ours")

    @property
    def dialect(self) -> str:
        return "freia" if self.base.endswith("freia") else "anomalib"

    @property
    def our_base(self) -> str:
        """Which of ours computes the same formula."""
        return "ours-freia" if self.dialect == "freia" else "ours"


PROVIDERS = {
    p.name: p
    for execution in EXECUTIONS
    for p in (Provider(b, execution) for b in ("ours", "ours-freia", "anomalib", "freia"))
}
EAGER = tuple(p for p in PROVIDERS.values() if p.execution == "eager")


class StandIn(reference.AllInOneBlock):
    """The reference with the stock blocks' permutation: an index by indexing, every matrix by a
    dense product, also a one-hot one.
    """

    def permute_function(self, x: Tensor, w: Tensor) -> Tensor:
        if w.dtype == torch.int64:
            return x[:, w]
        return (F.linear, F.conv1d, F.conv2d, F.conv3d)[self.input_rank](x, w)


def block_class(provider: Provider) -> tuple[Callable[..., nn.Module], str]:
    """The constructor of a provider's block, and in words which class that is.

    The real stock class where it is installed: anomalib 2.7.0's, else FrEIA 0.2's, which has the
    same formula. FrEIA's main branch has no release, so that its formula is always the reference's.
    """
    if provider.ours:
        return partial(
            fastflow_kernels.AllInOneBlock, dialect=provider.dialect
        ), f"fastflow_kernels, dialect {provider.dialect}"
    if provider.base.startswith("reference"):
        return partial(
            reference.AllInOneBlock, dialect=provider.dialect
        ), f"reference, dialect {provider.dialect}"
    if provider.dialect == "anomalib":
        for find, name in ((peers.anomalib_block, "anomalib"), (peers.freia_block, "FrEIA")):
            with contextlib.suppress(peers.PeerMissing):
                return find(), f"{name} {peers.VERSIONS[name]}"
    return partial(
        StandIn, dialect=provider.dialect
    ), f"reference, dialect {provider.dialect}, permuting as the stock block"


def why_not(provider: Provider, workload: Workload, on_cpu: bool) -> str | None:
    """Why a provider is not measured on a workload, or None."""
    if provider.execution == "graphs" and on_cpu:
        return "CUDA graphs need a GPU"
    if provider.dialect == "freia" and workload.options.get("learned_householder_permutation"):
        return "FrEIA's main branch fails for Householder reflections over a hard permutation"
    return None


@contextlib.contextmanager
def rotations_drawn_once() -> Iterator[None]:
    """Inside, SciPy draws one rotation of each size. Stock blocks take minutes for a large one."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            draw = "scipy.stats.special_ortho_group.rvs"
            stack.enter_context(mock.patch(draw, lambda n: _rotation(n).numpy()))
        yield


@cache
def _rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a model the weights of another whose hard permutations may be stored in the other form,
    matrix or index.
    """
    own = target.state_dict()
    converted = {}
    for key, value in source.state_dict().items():
        if own[key].dtype == torch.int64 and value.is_floating_point():
            value = value.flatten(1).argmax(1)
        elif own[key].is_floating_point() and value.dtype == torch.int64:
            value = F.one_hot(value, value.numel())
        converted[key] = value.reshape(own[key].shape)
    target.load_state_dict(converted)
