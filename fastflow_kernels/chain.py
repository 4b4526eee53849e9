"""A chain of invertible modules whose consecutive blocks are evaluated together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.block import evaluate
from fastflow_kernels.call import BlockCall
from fastflow_kernels.modules import FusedForward
from fastflow_kernels.runs import evaluate_together, is_alike
from fastflow_kernels.torch_private import needs_plain


class FusedChain:
    """A mixin for a chain with the attributes of FrEIA's SequenceINN.

    Consecutive blocks run together: see :mod:`fastflow_kernels.runs`. A module with hooks is
    called as in FrEIA's chain, and so is any other module.
    """

    module_list: Any  # an nn.ModuleList of modules of which no type tells the attributes
    conditions: list[int | None]
    force_tuple_output: bool

    def forward(
        self,
        x_or_z: Tensor | Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Any]:
        """Evaluate the chain or its inverse.

        Args:
            x_or_z: (B, C, *S), or a list or tuple with that one tensor.
            c: The conditions (B, C_k, *S). A module's entry of ``conditions`` is an index into
                them.
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted. Blocks return it anyway; other modules of
                the chain are told.

        Returns:
            The result, in a tuple if ``force_tuple_output``, and the log-determinant (B,) in nats
            per sample.
        """
        x: Sequence[Tensor] = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        places = [self.conditions[i] for i in range(len(self.module_list))]
        x, log_det = self._evaluate(x, c, places, rev, jac)
        return x if self.force_tuple_output else x[0], log_det

    def _evaluate(
        self,
        x: Sequence[Tensor],
        c: Sequence[Tensor] | None,
        places: Sequence[int | None],
        rev: bool,
        jac: bool,
    ) -> tuple[Sequence[Tensor], Any]:
        """Evaluate the modules, each with the condition at its place in c."""
        log_det: Any = 0
        pairs = list(zip(self.module_list, places, strict=True))
        if rev:
            pairs.reverse()
        while pairs:
            calls = _calls_together(pairs, x, c, rev)
            if len(calls) > 1:
                y, log_det_of_run = evaluate_together(calls)
                x, pairs = (y,), pairs[len(calls) :]
            elif calls:
                y, log_det_of_run = evaluate(calls[0])
                x, pairs = (y,), pairs[1:]
            else:
                (module, place), *pairs = pairs
                arguments: dict[str, Any] = {"jac": jac, "rev": rev}
                if place is not None:
                    arguments["c"] = [c[place]]  # type: ignore[index]
                x, log_det_of_run = module(x, **arguments)
            log_det = log_det_of_run + log_det
        return x, log_det


def _calls_together(
    pairs: Sequence[tuple[Any, int | None]],
    x: Sequence[Tensor],
    c: Sequence[Tensor] | None,
    rev: bool,
) -> list[BlockCall]:
    """Return the checked calls of the first modules, as far as these can be evaluated together.

    Args:
        pairs: Modules in the order in which they run, with the places of their conditions in c.
        x: The input.
        c: The conditions.
        rev: Whether to compute the inverse.
    """
    calls: list[BlockCall] = []
    if not _is_one_tensor(x) or torch_private.are_calls_hooked():
        return calls
    for module, place in pairs:
        if not _is_called_directly(module):
            break
        conditions = None if place is None else [c[place]]  # type: ignore[index]
        call = module._checked_call(x, conditions, rev)
        if not isinstance(call, BlockCall) or (calls and not is_alike(call, calls[0])):
            break
        calls.append(call)
    return calls


def _is_one_tensor(x: Sequence[Any]) -> bool:
    """Return whether an input is one tensor whose operations nobody records or transforms."""
    return (
        isinstance(x, (tuple, list))
        and len(x) == 1
        and isinstance(x[0], Tensor)
        and not needs_plain(x[0])
    )


def _is_called_directly(module: Any) -> bool:
    """Return whether calling a module does nothing but run an AllInOneBlock's fused ``forward``."""
    return (
        issubclass(type(module), FusedForward)
        and type(module)._is_all_in_one
        and type(module).forward is FusedForward.forward
        and "forward" not in module.__dict__
        and torch_private.is_called_directly(module)
    )
