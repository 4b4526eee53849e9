"""A reversible chain that runs as an ordinary one, for comparisons."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import ReversibleSequence


class Plain(ReversibleSequence):
    """A chain for which autograd keeps the activations of every block, as for an ordinary one."""

    def forward(
        self,
        x_or_z: Tensor | Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Any]:
        x = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        log_det: Any = torch.zeros(len(x[0]), device=x[0].device)
        pairs = list(zip(self.module_list, self.conditions, strict=True))
        for module, place in reversed(pairs) if rev else pairs:
            condition = {} if place is None or c is None else {"c": [c[place]]}
            x, j = module(x, rev=rev, jac=jac, **condition)
            log_det = j + log_det
        return x if self.force_tuple_output else x[0], log_det


def plain_of(chain: ReversibleSequence) -> Plain:
    """Return a copy that runs as an ordinary chain."""
    plain = copy.deepcopy(chain)
    plain.__class__ = Plain
    assert isinstance(plain, Plain)
    return plain
