"""Chains of invertible blocks whose training memory does not grow with their depth.

A flow's activations need not be kept. The backward pass walks the chain from its output, inverts
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
from fastflow_kernels.chain import FusedChain
from fastflow_kernels.drift import Checkpoints, Segment
from fastflow_kernels.dtypes import promoted
from fastflow_kernels.link import Link, Pass, identity_of
from fastflow_kernels.modules import FusedForward, subnets_of, takes_link
from fastflow_kernels.predicates import is_autocast
from fastflow_kernels.torch_private import needs_plain

# The attributes of a reversible chain that FrEIA's SequenceINN does not have.
OWN_ATTRIBUTES = ("_checkpoints", "debug", "drift")


class ReversibleChain(FusedChain):
    """A mixin that makes a chain with the attributes of FrEIA's SequenceINN reversible.

    See :class:`ReversibleSequence`.
    """

    debug: bool = False
    drift: Mapping[int, float] = MappingProxyType({})
    _checkpoints: Checkpoints | None = None

    @property
    def checkpoint_every(self) -> int | None:
        """The number of blocks between two activations that are kept; it can be set.

        None means as many as the measured error allows.
        """
        return None if self._checkpoints is None else self._checkpoints.every

    @checkpoint_every.setter
    def checkpoint_every(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"expected checkpoint_every as an integer or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"expected checkpoint_every of 1 or more, got {value}")
        # A new object, because a shallow copy of the chain shares the old one.
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
            c: The conditions (B, C_k, *S). A block's ``cond`` is an index into them.
            rev: Compute the inverse. Gradients through it are those of an ordinary chain, which
                keeps its activations.
            jac: Whether the log-determinant is wanted. The blocks return it anyway; other modules
                of the chain are told.

        Returns:
            The result, in a tuple if ``force_tuple_output``, and the log-determinant (B,) in nats
            per sample.

        Raises:
            RuntimeError: A hook replaced a block's input or output.
            TypeError: A subnet's parameters are not plain tensors while its block runs, or a block
                returns another dtype than its input's.
        """
        x: Sequence[Tensor] = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        links = {} if rev else self._links(x, c)
        # FrEIA starts from zeros, too, which stay if no module has a log-determinant.
        log_det: Any = torch.zeros(len(x[0]), device=x[0].device) if _is_batch(x) else 0
        if not links:
            # Without conditions a block says what it expects.
            count = len(self.module_list)
            places = [None if c is None else self.conditions[i] for i in range(count)]
            x, log_det_of_chain = self._evaluate(x, c, places, rev, jac)
            return x if self.force_tuple_output else x[0], log_det_of_chain + log_det
        for i in range(len(self.module_list)):
            module, link, condition = self.module_list[i], links.get(i), self.conditions[i]
            if link is not None and x[0].is_floating_point() and is_autocast(x[0].device):
                # the chain's state stays in the parameters' dtype
                x = (x[0].to(promoted(x[0], getattr(module, "global_scale", None))),)
            x_in = x[0]
            arguments: dict[str, Any] = {"jac": jac, "rev": False}
            if link is not None:
                arguments["link"] = link
            if condition is not None and c is not None:
                arguments["c"] = [c[condition]]
            x, log_det_of_module = module(x, **arguments)
            if link is not None and link.seen != (identity_of(x_in), identity_of(x[0])):
                raise RuntimeError(
                    f"a hook replaced the input or the output of block {i}, which a reversible "
                    "chain cannot reconstruct"
                )
            log_det = log_det_of_module + log_det
        return x if self.force_tuple_output else x[0], log_det

    def drift_report(self) -> str:
        """Describe the reconstruction's errors in the last backward pass.

        With ``debug`` this names the block that has made them grow most.
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
        """Make a link for every block whose input the backward pass will reconstruct.

        There are no links where plain operations must run or where no gradients are wanted.
        """
        if not torch.is_grad_enabled() or not _is_reconstructible(x):
            return {}
        if self._checkpoints is None:
            self._checkpoints = Checkpoints()
        chain_pass = Pass(self._checkpoints, self.debug)
        self.drift = chain_pass.drift
        links: dict[int, Link] = {}
        is_needed = x[0].requires_grad  # whether the backward pass reaches the block
        for i, (module, cond) in enumerate(zip(self.module_list, self.conditions, strict=True)):
            condition = None if cond is None or c is None else c[cond]
            is_needed = (
                is_needed
                or any(p.requires_grad for p in module.parameters())
                or (isinstance(condition, Tensor) and condition.requires_grad)
            )
            if is_needed and is_reversible(module):
                previous = links.get(i - 1)
                segment = None if previous is None else previous.segment
                spacing = self._checkpoints.spacing(
                    promoted(x[0], getattr(module, "global_scale", None))
                )
                if segment is None or i - segment.first >= spacing:
                    segment = Segment(i, i)
                segment.last = i
                links[i] = Link(chain_pass, module, i, segment, previous)
        return links


def _is_reconstructible(x: Sequence[Any]) -> bool:
    """Return whether blocks can be reconstructed for this input of a chain."""
    return (
        len(x) == 1
        and isinstance(x[0], Tensor)
        and x[0].numel() > 0
        and not needs_plain(x[0])
        # Without values there is no drift to measure; integers run step by step.
        and not x[0].is_meta
        and x[0].is_floating_point()
        # The cache would give a first run's parameters to the second.
        and not torch_private.is_parametrization_cached()
    )


def _is_batch(x: Sequence[Any]) -> bool:
    return len(x) > 0 and isinstance(x[0], Tensor) and x[0].dim() > 0


def is_reversible(module: nn.Module) -> bool:
    """Return whether a module is a block all of whose gradients the reversible backward knows."""
    # Look at its own type, because a wrapper may pass on the ``__class__`` of what it wraps.
    if not issubclass(type(module), FusedForward):
        return False
    block: Any = module
    if not takes_link(block) or torch_private.is_compiled(block):
        return False
    if not all(map(_runs_twice, subnets_of(block))):
        return False
    return not any(
        getattr(getattr(block, name, None), "requires_grad", False)
        for name in ("w_perm", "w_perm_inv", "w_0")
    )


def _runs_twice(subnet: Any) -> bool:
    """Return whether a subnet can run again with stand-ins for its parameters.

    The stand-ins collect the parameters' gradients.
    """
    if not isinstance(subnet, nn.Module):
        return False
    if any(b.requires_grad for b in subnet.buffers()) or any(
        map(nn.parameter.is_lazy, subnet.parameters())
    ):
        return False
    # A ScriptModule takes no other tensors for its parameters.
    return not any(isinstance(m, torch.jit.ScriptModule) for m in subnet.modules())
