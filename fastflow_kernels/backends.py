"""The names of the backends, and which one is asked for."""

from __future__ import annotations

import os
from typing import Any

from fastflow_kernels import torch_private

BACKENDS = ("auto", "eager", "triton")
ENVIRONMENT_VARIABLE = "FASTFLOW_KERNELS_BACKEND"

_variable: Any = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def validated(backend: str, where: str = "backend") -> str:
    """Return ``backend`` if it is "auto", "eager" or "triton".

    Raises:
        TypeError, ValueError: It is not. ``where`` names it in the message.
    """
    if not isinstance(backend, str):
        raise TypeError(
            f"{where} must be a string, one of {', '.join(BACKENDS)}; got {type(backend).__name__}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def default_backend() -> str:
    """What "auto" stands for: the value of FASTFLOW_KERNELS_BACKEND, or "auto".

    Raises:
        ValueError: The value is not the name of a backend.
    """
    if torch_private.is_certainly_unset(_variable):
        return "auto"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    return validated(value, ENVIRONMENT_VARIABLE) if value else "auto"


def requested(backend: str) -> str:
    """The backend that is meant: for "auto" what the environment says."""
    if backend != "auto":
        return validated(backend)
    # asked in every call, and therefore here too
    return "auto" if torch_private.is_certainly_unset(_variable) else default_backend()
