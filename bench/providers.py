"""The providers: the stock blocks and ours, each eager, compiled, or in a CUDA graph.

:mod:`bench.couplings` has the classes of coupling blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastflow_kernels
import reference
from bench import couplings
from bench.workloads import ALL_IN_ONE, WHOLE, Workload
from tests.support import freia_main, peers

EXECUTIONS = ("eager", "compiled", "graphs")


@dataclass(frozen=True)
class Provider:
    """A block and a way to call it.

    Attributes:
        base: One of ALL_IN_ONE_BASES or COUPLING_BASES. The truth comes from "reference" and
            "reference-freia".
        execution: One of EXECUTIONS. "compiled" is ``torch.compile``. On a GPU the graph of ours
            calls our kernels as operators. "graphs" means ``mode="reduce-overhead"`` for the stock
            blocks. For ours it is a captured eager call, with the kernels that it launches.
    """

    base: str
    execution: str = "eager"

    @property
    def name(self) -> str:
        return self.base if self.execution == "eager" else f"{self.base}-{self.execution}"

    @property
    def is_ours(self) -> bool:
        return self.base.startswith("ours")

    @property
    def dialect(self) -> str:
        return "freia" if self.base.endswith("freia") else "anomalib"

    def our_base(self, block: str) -> str:
        """Return the base of ours that computes the same formula, for a class of blocks."""
        return "ours-freia" if self.dialect == "freia" and block == ALL_IN_ONE else "ours"

    def has(self, block: str) -> bool:
        """Return whether the provider has a class of blocks."""
        return self.base in (ALL_IN_ONE_BASES if block == ALL_IN_ONE else COUPLING_BASES)


ALL_IN_ONE_BASES = ("ours", "ours-freia", "anomalib", "freia")
COUPLING_BASES = ("ours", "ours-accelerated", "freia", "freia-0.2")
PROVIDERS = {
    p.name: p
    for execution in EXECUTIONS
    for p in (Provider(b, execution) for b in dict.fromkeys(ALL_IN_ONE_BASES + COUPLING_BASES))
}
EAGER = tuple(p for p in PROVIDERS.values() if p.execution == "eager")


# By dialect: functions that return the stock class, and its name. The first one installed counts.
STOCK_CLASSES: dict[str, list[tuple[Callable[[], Any], str]]] = {
    "anomalib": [
        (peers.anomalib_block, f"anomalib {peers.VERSIONS['anomalib']}"),
        (peers.freia_block, f"FrEIA {peers.VERSIONS['FrEIA']}"),
    ],
    "freia": [(freia_main.freia_main_block, f"FrEIA main, commit {freia_main.commit()}")],
}


class StandIn(reference.AllInOneBlock):
    """The reference block, permuting as the stock blocks do.

    An index is applied by indexing. Every matrix is applied by a dense product, also a one-hot one.
    """

    def permute_function(self, x: Tensor, w: Tensor) -> Tensor:
        if w.dtype == torch.int64:
            return x[:, w]
        return (F.linear, F.conv1d, F.conv2d, F.conv3d)[self.input_rank](x, w)


def block_class(
    provider: Provider, workload: Workload, kind: str
) -> tuple[Callable[..., nn.Module], str]:
    """Return the constructor of a provider's block, and the name of its class in words.

    For dialect "anomalib" the stock class is that of anomalib 2.7.0 if it is installed. Otherwise
    it is that of FrEIA 0.2, which has the same formula. For dialect "freia" it is that of FrEIA's
    main branch (ci/freia_main.sh installs it). If none is installed, the reference stands in.
    """
    if workload.block != ALL_IN_ONE:
        permutes = workload.permutes or kind in WHOLE
        return couplings.block_class(provider.base, workload.block, permutes)
    dialect = provider.dialect
    if provider.is_ours:
        ours = partial(fastflow_kernels.AllInOneBlock, dialect=dialect)
        return ours, f"fastflow_kernels, dialect {dialect}"
    if provider.base.startswith("reference"):
        return partial(reference.AllInOneBlock, dialect=dialect), f"reference, dialect {dialect}"
    for find, name in STOCK_CLASSES[dialect]:
        with contextlib.suppress(peers.PeerMissing):
            return find(), name
    stand_in = partial(StandIn, dialect=dialect)
    return stand_in, f"reference, dialect {dialect}, permuting as the stock block"


def why_not(provider: Provider, workload: Workload, on_cpu: bool) -> str | None:
    """Return the reason why a provider cannot run a workload, or None if it can."""
    if not provider.has(workload.block):
        return f"{provider.base} has no {workload.block}"
    if provider.base == "ours-accelerated" and not couplings.is_installed(provider.base):
        return "FrEIA is not installed"
    if provider.execution == "graphs" and on_cpu:
        return "CUDA graphs need a GPU"
    if provider.dialect == "freia" and workload.options.get("learned_householder_permutation"):
        return "FrEIA's main branch fails for Householder reflections over a hard permutation"
    return None


@contextlib.contextmanager
def rotations_drawn_once() -> Iterator[None]:
    """Let SciPy draw only one rotation of each size within this context.

    Otherwise the stock blocks take minutes to draw a large one.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            draw = "scipy.stats.special_ortho_group.rvs"
            stack.enter_context(mock.patch(draw, lambda n: _rotation(n).numpy().copy()))
        yield


@cache
def _rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of one model to another.

    Each may store its hard permutations as a matrix or as an index, and they are converted.
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
