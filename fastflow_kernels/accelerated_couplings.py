"""The classes that accelerate gives to FrEIA's coupling blocks and random permutations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.accelerated import AcceleratedModule, change_class, class_before
from fastflow_kernels.call import PermutationCall, SidesCall, check_conditions, single_input
from fastflow_kernels.coupling_forms import Form, constants_of, sides_of
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.modules import FORWARDS_WITH_LINK, ChainLink
from fastflow_kernels.permutations import IndexPermutation
from fastflow_kernels.predicates import is_small
from fastflow_kernels.probe_couplings import CouplingMaths, reads_of_permutation
from fastflow_kernels.seen import Seen
from fastflow_kernels.sides import evaluate


@dataclass(frozen=True)
class HeldCoupling:
    """What an accelerated coupling block keeps beside its own attributes."""

    form: Form
    clamp_function: str
    backend: str
    seen: Seen


class AcceleratedCoupling(AcceleratedModule):
    """A mixin that makes a stock coupling block run fused."""

    _fastflow_attributes = ("_fastflow", "_fastflow_call")

    channels: int  # the stock block's
    ndims: int

    def _checked_call(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool
    ) -> SidesCall | None:
        held: HeldCoupling = self._fastflow
        if self._find_change() is not None:
            return None
        x = single_input(x, self.channels, self.ndims - 1)
        c = check_conditions(c, self.dims_c, x)
        constants = constants_of(self, held.form, held.clamp_function)
        return SidesCall(x, c, *constants, rev, held.backend)

    def _subnets(self) -> tuple[Any, ...]:
        form = self._fastflow.form
        return tuple(subnet for side in sides_of(self, form) for subnet in side.subnets)

    def _describe(self) -> str:
        held: HeldCoupling = self._fastflow
        words = f"clamp function {held.clamp_function}" if held.clamp_function else "additive"
        return f"{words}, backend={held.backend!r}"


class AcceleratedAdditive(AcceleratedCoupling):
    """A mixin for NICECouplingBlock, which runs as it is but can be reconstructed in a chain."""

    def forward(
        self,
        x: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
        *,
        link: ChainLink | None = None,
    ) -> tuple[tuple[Tensor], Any]:
        """Evaluate the block as FrEIA does: see :meth:`FusedForward.forward`."""
        if link is None:  # an addition alone has nothing to fuse
            return self._stock_forward(x, c, rev, jac)
        return super().forward(x, c, rev, jac, link=link)


FORWARDS_WITH_LINK.add(AcceleratedAdditive.forward)


class HeldPermutation(IndexCache):
    """What an accelerated permutation keeps beside its own attributes."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"seen": self.seen}


class AcceleratedPermutation(AcceleratedModule):
    """A mixin that makes FrEIA's PermuteRandom gather channels, forward and backward."""

    _fastflow: HeldPermutation

    perm: Tensor  # the stock module's
    perm_inv: Tensor

    def forward(  # type: ignore[override]  # as in FrEIA, without conditions
        self,
        x: Sequence[Tensor],
        rev: bool = False,
        jac: bool = True,
        *,
        link: ChainLink | None = None,
    ) -> tuple[list[Tensor], float]:
        """Permute x[0], (B, C, *S), or invert the permutation.

        Args:
            x: A list with one tensor.
            rev: Compute the inverse.
            jac: Ignored.
            link: For reversible chains only.

        Returns:
            ``([y], 0.0)``.
        """
        permutation = None
        # FrEIA's module takes other numbers of channels, too.
        if self._find_change() is None and len(self.perm) == x[0].shape[1]:
            if link is None and (torch_private.is_recorded() or is_small(x[0])):
                return [x[0].index_select(1, self.perm_inv if rev else self.perm)], 0.0
            permutation = self._fastflow.of_index(self.perm, self.perm_inv, rev)
        if not isinstance(permutation, IndexPermutation):  # a load may have left none
            result: tuple[list[Tensor], float] = self._fastflow_stock.forward(self, x, rev, jac)
            return result
        call = PermutationCall(x[0], permutation, rev)
        return [(evaluate(call) if link is None else link.evaluate(call))[0]], 0.0

    def _find_change(self) -> str | None:
        return self._fastflow.seen.find_change(self)

    def _why_not_fused(self) -> str | None:
        if (reason := super()._why_not_fused()) is not None:
            return reason
        index = self._fastflow.of_index(self.perm, self.perm_inv, False)
        return None if isinstance(index, IndexPermutation) else "its index is not a permutation"

    def _subnets(self) -> tuple[Any, ...]:
        return ()

    def _describe(self) -> str:
        return "a gather"


FORWARDS_WITH_LINK.add(AcceleratedPermutation.forward)


def hold_coupling(block: Any, maths: CouplingMaths, backend: str) -> None:
    """Turn a stock coupling block into an accelerated one, or renew what it holds."""
    held = HeldCoupling(maths.form, maths.clamp_function, backend, maths.seen)
    mixin = AcceleratedAdditive if maths.form.is_additive else AcceleratedCoupling
    change_class(block, held, mixin)


def hold_permutation(block: Any) -> None:
    """Turn a stock PermuteRandom into an accelerated one."""
    seen = reads_of_permutation(block, class_before(block))
    change_class(block, HeldPermutation(seen), AcceleratedPermutation)
