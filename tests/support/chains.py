"""A reversible chain that runs as an ordinary one, to compare with."""

from __future__ import annotations

import copy
from typing import Any

from fastflow_kernels import ReversibleSequence


class Plain(ReversibleSequence):
    """The same chain as an ordinary one."""

    def _links(self, x: Any, c: Any) -> dict[int, Any]:
        return {}


def plain_of(chain: ReversibleSequence) -> Plain:
    """A copy that runs as an ordinary chain."""
    plain = copy.deepcopy(chain)
    plain.__class__ = Plain
    assert isinstance(plain, Plain)
    return plain
