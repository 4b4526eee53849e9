"""What a block asks of its own attributes in every call, where each microsecond of Python shows on small inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``, quickly for a parameter: nn.Module looks those up in Python, after Python's own look-up has failed (1 us).

    Where a parametrization, FSDP or a replica has put something else in its place, that.
    """
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def has_any(own: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether one of the names is among an object's own attributes, without the cost of a generator."""
    for name in names:  # noqa: SIM110
        if name in own:
            return True
    return False
