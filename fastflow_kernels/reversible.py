"""Chains of invertible blocks whose training memory does not grow with their depth.

A flow's activations need not be kept: the backward pass walks the chain from its output, inverts
one block at a time and differentiates it. Every block is an autograd node of its own, so that
hooks, distributed training and frozen parameters see an ordinary graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import torch_private
from fastflow_kernels.drift import Checkpoints, Segment
from fastflow_kernels.dtypes import promoted
from fastflow_kernels.link import Link, Pass, identity
from fastflow_kernels.modules import FusedForward, takes_link
from fastflow_kernels.predicates import is_autocast
from fastflow_kernels.torch_private import needs_plain

# what a reversible chain holds beside the attributes of FrEIA's SequenceINN
OWN_ATTRIBUTES = ("_checkpoints", "debug", "drift")


class Reversible:
    """What the class of a reversible chain adds to that of FrEIA's SequenceINN; see
    :class:`ReversibleSequence`.
    """

    module_list: Any  # an nn.ModuleList of modules of which no type tells the attributes
    conditions: list[int | None]
    force_tuple_output: bool
    debug: bool = False
    drift: Mapping[int, float] = MappingProxyType({})
    _checkpoints: Checkpoints | None = None

    @property
    def checkpoint_every(self) -> int | None:
        """How many blocks lie between two activations that are kept, None for as many as the
        measured error allows; can be set.
        """
        return None if self._checkpoints is None else self._checkpoints.every

    @checkpoint_every.setter
    def checkpoint_every(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"expected checkpoint_every as an integer or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"expected checkpoint_every of 1 or more, got {value}")
        # a new one, because a shallow copy of the chain shares the former
        measured = math.inf if self._checkpoints is None else self._checkpoints.measured
        self._checkpoints = Checkpoints(value, measured)

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
            c: The conditions, in which the blocks' ``cond`` count.
            rev: Compute the inverse. Its gradients, if asked for, are those of an ordinary chain.
            jac: Whether the log-determinant is wanted; the blocks return it anyway, other modules
                of the chain are told.

        Returns:
            The result, in a tuple if ``force_tuple_output``, and the log-determinant (B,) in nats
            per sample.

        Raises:
            RuntimeError: A hook exchanged a block's input or output.
            TypeError: A subnet's parameters are no plain tensors while its block runs, or it widens
                the dtype.
        """
        x: Sequence[Tensor] = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        links = {} if rev else self._links(x, c)
        order = range(len(self.module_list))
        # as FrEIA's, also where no module has one
        log_det: Any = torch.zeros(len(x[0]), device=x[0].device) if _is_batch(x) else 0
        for i in reversed(order) if rev else order:
            module, link, condition = self.module_list[i], links.get(i), self.conditions[i]
            if link is not None and x[0].is_floating_point() and is_autocast(x[0].device):
                # the chain's state stays in the parameters' dtype
                x = (x[0].to(promoted(x[0], module.global_scale)),)
            x_in = x[0]
            arguments: dict[str, Any] = (
                {"jac": jac, "rev": rev} if link is None else {"jac": jac, "rev": rev, "link": link}
            )
            if condition is not None and c is not None:
                arguments["c"] = [c[condition]]
            x, j = module(x, **arguments)
            if link is not None and link.seen != (identity(x_in), identity(x[0])):
                raise RuntimeError(
                    f"a hook exchanged the input or the output of block {i}, which a reversible "
                    "chain cannot reconstruct"
                )
            log_det = j + log_det
        return x if self.force_tuple_output else x[0], log_det

    def drift_report(self) -> str:
        """The reconstruction's errors in the last backward pass, and with ``debug`` the block that
        has made them grow most.
        """
        if not self.drift:
            return "nothing was compared yet"
        places = sorted(self.drift, reverse=True)
        lines = [
            f"block {place}: its input is off by {self.drift[place]:.2g} of its norm"
            for place in places
        ]
        growth = {
            after: self.drift[after] / max(self.drift[before], 1e-30)
            for before, after in pairwise(places)
            if before == after + 1
        }
        if growth:
            worst = max(growth, key=growth.__getitem__)
            lines.append(
                f"worst: block {worst}, whose inverse multiplies the error by {growth[worst]:.2g}"
            )
        return "\n".join(lines)

    def _links(self, x: Sequence[Tensor], c: Sequence[Tensor] | None) -> dict[int, Link]:
        """A link for every block that is to be reconstructed.

        None where plain operations must do, or where no gradients are wanted.
        """
        if not torch.is_grad_enabled() or not _is_reconstructible(x):
            return {}
        if self._checkpoints is None:
            self._checkpoints = Checkpoints()
        chain_pass = Pass(self._checkpoints, self.debug)
        self.drift = chain_pass.drift
        links: dict[int, Link] = {}
        is_needed = x[0].requires_grad  # whether the backward pass reaches the block
        for i, (module, place) in enumerate(zip(self.module_list, self.conditions, strict=True)):
            condition = None if place is None or c is None else c[place]
            is_needed = (
                is_needed
                or any(p.requires_grad for p in module.parameters())
                or (isinstance(condition, Tensor) and condition.requires_grad)
            )
            if is_needed and is_reversible(module):
                previous = links.get(i - 1)
                segment = None if previous is None else previous.segment
                spacing = self._checkpoints.spacing(promoted(x[0], module.global_scale))
                if segment is None or i - segment.first >= spacing:
                    segment = Segment(i, i)
                segment.last = i
                links[i] = Link(chain_pass, module, i, segment, previous)
        return links


def _is_reconstructible(x: Sequence[Any]) -> bool:
    """Whether blocks can be reconstructed for this input of a chain."""
    return (
        len(x) == 1
        and isinstance(x[0], Tensor)
        and x[0].numel() > 0
        and not needs_plain(x[0])
        # there is nothing to look at for drift; integers run step by step
        and not x[0].is_meta
        and x[0].is_floating_point()
        # the cache would hand a first run's parameters to the second
        and not torch_private.is_parametrization_cached()
    )


def _is_batch(x: Sequence[Any]) -> bool:
    return len(x) > 0 and isinstance(x[0], Tensor) and x[0].dim() > 0


def is_reversible(module: nn.Module) -> bool:
    """Whether a module is a block whose every gradient the reversible backward knows."""
    # of its own type, for wrappers hand on what they are asked for
    if not issubclass(type(module), FusedForward):
        return False
    block: Any = module
    if not takes_link(block) or torch_private.is_compiled(block) or not _runs_twice(block.subnet):
        return False
    return not any(
        getattr(getattr(block, name, None), "requires_grad", False)
        for name in ("w_perm", "w_perm_inv", "w_0")
    )


def _runs_twice(subnet: Any) -> bool:
    """Whether a subnet can run again with stand-ins for its parameters, which collect their
    gradients.
    """
    if not isinstance(subnet, nn.Module):
        return False
    if any(b.requires_grad for b in subnet.buffers()) or any(
        map(nn.parameter.is_lazy, subnet.parameters())
    ):
        return False
    # takes no other tensors for its parameters
    return not any(isinstance(m, torch.jit.ScriptModule) for m in subnet.modules())
