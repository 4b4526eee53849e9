"""The one place that picks who does the work: the Triton kernels, the eager functions, or plain
differentiable operations.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import modes
from fastflow_kernels.engines import eager
from fastflow_kernels.layouts import as_rows
from fastflow_kernels.coupling import CouplingSpec

BACKENDS = ("auto", "eager", "triton")
ENVIRONMENT_VARIABLE = "FASTFLOW_KERNELS_BACKEND"

# Elements up to which "auto" runs plain operations on a CPU: autograd's own nodes cost less than a
# Python one, and here that is most of the time. Train step of one block on a thread of an AMD EPYC,
# plain against eager: 321 against 478 us for (100, 2), 417 against 533 us for (64, 256), 507
# against 592 us for (64, 512), 665 against 659 us for (1, 256, 16, 16).
SMALL = 1 << 15

_environment: Any = getattr(os.environ, "_data", None)  # CPython's own dictionary behind it
_variable: Any = os.environ.encodekey(ENVIRONMENT_VARIABLE)

# Clamps that kernels are compiled for in a process. Each costs half a second a kernel, and its
# binaries stay: a clamp that is annealed, with a new value in every step, runs the eager functions
# from here on.
MOST_CLAMPS = 16
_clamps: set[tuple[float, float]] = set()


def validated(backend: str, where: str = "backend") -> str:
    """Return ``backend``, or raise ValueError (TypeError) if it is none of "auto", "eager",
    "triton".
    """
    if not isinstance(backend, str):
        raise TypeError(
            f"{where} must be a string, one of {', '.join(BACKENDS)}; got {type(backend).__name__}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def default_backend() -> str:
    """What "auto" stands for: the value of FASTFLOW_KERNELS_BACKEND, or "auto"."""
    if _is_unset():
        return "auto"
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    return validated(value, ENVIRONMENT_VARIABLE) if value else "auto"


def _is_unset() -> bool:
    """Whether the variable is certainly not there; 0.1 us, where os.environ takes 0.5 to look for
    what is not there.
    """
    return _environment is not None and _variable not in _environment


def resolved(backend: str) -> str:
    """The backend that is meant: what the environment says for "auto"."""
    return default_backend() if backend == "auto" else validated(backend)


def unless_annealed(backend: str, x: Tensor, spec: CouplingSpec) -> str:
    """The backend, or "eager" in place of "auto" on a GPU where kernels were compiled for
    :data:`MOST_CLAMPS` other clamps.

    Args:
        backend: "auto", "eager" or "triton", :func:`resolved`; whoever asks for "triton" gets it
            compiled.
        x: The block's input, (B, C, *S).
        spec: The coupling's constants.
    """
    if backend != "auto" or not x.is_cuda:
        return backend
    clamp = (spec.clamp, spec.tanh_scale)
    if clamp not in _clamps:
        if len(_clamps) >= MOST_CLAMPS:
            _warn_of_annealing()
            return "eager"
        _clamps.add(clamp)
    return backend


@cache
def _warn_of_annealing() -> None:
    """Once."""
    warnings.warn(
        f"a kernel is compiled for every clamp, and {MOST_CLAMPS} have been: blocks with yet "
        "another one run the eager functions. Change "
        "the clamp in steps, or ask for backend='triton'",
        stacklevel=2,
    )


@cache
def triton_missing() -> str | None:
    """Why Triton cannot be used in this process at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        importlib.import_module("fastflow_kernels.engines.triton.coupling")
    except Exception as error:  # a broken or too old Triton must not break the eager path
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on, which runs kernels on CPU tensors (slowly, for
    tests).
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not_triton(x: Tensor) -> str | None:
    """Why the Triton kernels do not take this input, in words, or None if they do.

    Args:
        x: The block's input, (B, C, *S).
    """
    if not x.is_cuda and not interpreted():
        return f"the input is on {x.device}, and Triton runs on a GPU"
    if missing := triton_missing():
        return missing
    return _kernels().uncovered(x)


def is_plain(x: Tensor, backend: str, times: int = 1) -> bool:
    """Whether plain differentiable operations take this input: the call is recorded or transformed,
    or there is little to compute.

    Args:
        x: The block's input, (B, C, *S).
        backend: "auto", "eager" or "triton", :func:`resolved`.
        times: See :func:`is_small`.

    Raises:
        RuntimeError: If the backend is "triton" and it cannot be honoured.
    """
    if needs_composite(x):
        if backend == "triton":
            raise _not_triton("the call is being traced, transformed or compiled")
        return True
    # nothing to compute, so any backend agrees
    return is_small(x, times) if backend == "auto" else not x.numel()


def pick(x: Tensor, backend: str, rows: bool = False) -> ModuleType:
    """The module whose ``coupling_*`` functions take this input, for which plain operations are
    none.

    Args:
        x: The block's input, (B, C, *S).
        backend: "auto", "eager" or "triton", :func:`resolved`.
        rows: Whether it will be given as rows.

    Raises:
        RuntimeError: If the backend is "triton" and it cannot be honoured; the message says why.
    """
    if backend == "eager" or (backend == "auto" and not x.is_cuda):
        return eager
    reason = why_not_triton(as_rows(x) if rows else x)
    if reason is None:
        return _kernels()
    if backend == "triton":
        raise _not_triton(reason)
    return eager


def _not_triton(reason: str) -> RuntimeError:
    return RuntimeError(
        f"backend 'triton' cannot be used here: {reason}. Use backend='auto' to run what is "
        "available."
    )


def is_small(x: Tensor, times: int = 1) -> bool:
    """Whether what a call costs outweighs what it computes; never on a GPU, where fused kernels
    save launches.

    Args:
        x: The block's input, (B, C, *S).
        times: How many times dearer the computation is by what fusing does not shorten, such as a
            matrix product.
    """
    return x.numel() <= times * SMALL and not x.is_cuda


def coverable(x: Tensor, backend: str) -> Tensor:
    """The block's input, or a contiguous copy of it where the kernels could take that."""
    if (
        x.is_contiguous()
        or backend == "eager"
        or needs_composite(x)
        or not (x.is_cuda or (backend == "triton" and interpreted()))
    ):
        return x
    return x if triton_missing() or _kernels().uncovered(x) is None else x.contiguous()


def packed(operations: ModuleType, a: Tensor) -> Tensor:
    """The subnet's output in a layout that suits ``operations``; a copy if it does not."""
    return a if operations is eager or _kernels().uncovered(a) is None else a.contiguous()


def needs_composite(*tensors: Tensor | None) -> bool:
    """Whether hand-derived functions must stand aside: tracing, export, compilation, torch.func,
    forward mode, fake and other tensors.

    Args:
        tensors: What they would be given from outside; None counts for nothing.
    """
    if (
        modes.is_recorded()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return True
    for t in tensors:
        if t is not None and (
            (type(t) is not Tensor and type(t) is not torch.nn.Parameter)
            # autograd.grad(is_grads_batched=True)
            or torch._C._functorch.is_legacy_batchedtensor(t)
        ):
            return True
    return False


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors on this device; the meta device has none, and
    torch.amp.is_autocast_available has no compiler.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


@cache
def _kernels() -> ModuleType:
    return importlib.import_module("fastflow_kernels.engines.triton.coupling")
