"""A reversible chain that runs as an ordinary one, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import ReversibleSequence


class Plain(ReversibleSequence):
    """The same chain as an ordinary one: autograd keeps what every block keeps."""

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
    """A copy that runs as an ordinary chain."""
    plain = copy.deepcopy(chain)
    plain.__class__ = Plain
    assert isinstance(plain, Plain)
    return plain
