"""The names of the backends, and the one that is requested."""

from __future__ import annotations

import os
from typing import Any

from fastflow_kernels import torch_private

BACKENDS = ("auto", "eager", "triton")
ENVIRONMENT_VARIABLE = "FASTFLOW_KERNELS_BACKEND"

_encoded_name: Any = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def validated(backend: str, where: str = "backend") -> str:
    """Return ``backend`` if it is "auto", "eager" or "triton".

    Args:
        backend: The name to check.
        where: What the message calls it.

    Raises:
        TypeError, ValueError: It is not one of them.
    """
    if not isinstance(backend, str):
        raise TypeError(
            f"expected {where} as a string, one of {', '.join(BACKENDS)}; got "
            f"{type(backend).__name__}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"expected {where} to be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def default_backend() -> str:
    """Return what "auto" stands for: the value of FASTFLOW_KERNELS_BACKEND, or "auto".

    Raises:
        ValueError: The value is not the name of a backend.
    """
    if torch_private.is_certainly_unset(_encoded_name):
        return "auto"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    return validated(value, ENVIRONMENT_VARIABLE) if value else "auto"


def auto_chooses() -> bool:
    """Return whether "auto" chooses by input, because the environment names no backend."""
    return (os.environ.get(ENVIRONMENT_VARIABLE) or "auto") == "auto"


def requested(backend: str) -> str:
    """Return the requested backend, which for "auto" is the one of the environment variable."""
    if backend != "auto":
        return validated(backend)
    # the same check as in default_backend, without its call, because every block call comes here
    return "auto" if torch_private.is_certainly_unset(_encoded_name) else default_backend()
