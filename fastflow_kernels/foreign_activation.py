"""The activation of a foreign block's global scale: what it reads, and which known one it is."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow_kernels.coupling import ACTIVATIONS
from fastflow_kernels.engines import plain
from fastflow_kernels.seen import ACTIVATION, Activation, is_of_torch
from fastflow_kernels.stock import Left, is_named

_TORCH = (torch, nn, F, torch.exp, torch.sigmoid, F.sigmoid, F.softplus, nn.Softplus)
_TORCH_NAMES = {"nn", "functional", "exp", "sigmoid", "softplus", "Softplus"}


def activation_of(block: Any, cls: Any) -> tuple[Callable[[Tensor], Tensor], Any]:
    """Return a block's activation, and the module whose softplus it calls, if it calls one.

    Raises:
        Left: The activation may read something that changes later, when a probe's result would not
            hold any more.
    """
    own = vars(block).get(ACTIVATION)
    function = own if own is not None else inspect.getattr_static(cls, ACTIVATION, None)
    if isinstance(function, Activation):
        return function, None
    if isinstance(function, BuiltinFunctionType) and is_of_torch(function):
        return function, None
    owner: Any = block if own is None and isinstance(function, FunctionType) else None
    if isinstance(function, MethodType):
        owner = function.__self__
    function = getattr(function, "__func__", function)  # a bound or a static method's
    if not isinstance(function, FunctionType):
        kind = type(getattr(block, ACTIVATION, None)).__name__
        raise Left(
            f"its {ACTIVATION} is not a function but of class {kind}, and what that reads may "
            "change"
        )
    for cell in function.__closure__ or ():
        owner = cell.cell_contents
    if owner is not None and not (
        isinstance(owner, nn.Module)
        and is_named(type(owner))
        and len(function.__closure__ or ()) <= 1
    ):
        raise Left(
            f"its {ACTIVATION} reads variables of the function around it, and those may change"
        )
    if (name := _foreign_name(function, owner)) is not None:
        raise Left(f"its {ACTIVATION} uses {name}, which no known form does and which may change")
    calls_softplus = (
        owner is not None
        and "softplus" in function.__code__.co_names
        and "softplus" in owner._modules
    )
    return getattr(block, ACTIVATION), owner if calls_softplus else None


def _foreign_name(function: FunctionType, owner: Any) -> str | None:
    """Return something that an activation reads and no known form does, or None.

    The known forms read some of torch's functions and their block's softplus.
    """
    code = function.__code__
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if any(not isinstance(value, numbers.Real) for value in defaults):
        return "its default arguments"
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        return "what a function in it reads"
    for name in code.co_names:
        if name in function.__globals__:
            known = any(function.__globals__[name] is value for value in _TORCH)
        else:
            known = name in _TORCH_NAMES and (
                name == "softplus" or owner is None or not hasattr(owner, name)
            )
        if not known:
            return name
    return None


def known_activation(function: Callable[[Tensor], Tensor], like: Tensor) -> str:
    """Return the name of an activation, recognised by its values.

    They are compared over the whole range of the dtype of ``like``, relative to their size.

    Raises:
        Left: It is not one of the known activations.
    """
    dense, far = (700.0, 8.0) if like.dtype is torch.float64 else (80.0, 8.0)
    sizes = torch.logspace(-6.0, far, 500, dtype=torch.float64, device="cpu")
    samples = torch.cat(
        (torch.linspace(-dense, dense, 14001, dtype=torch.float64, device="cpu"), sizes, -sizes)
    ).to(like)
    values = function(samples)
    tolerance = 1e-12 if like.dtype is torch.float64 else 1e-4
    for name in ACTIVATIONS:
        known = plain.activated(samples, name)
        if (
            values.shape == known.shape
            and ((values == known) | ((values - known).abs() <= tolerance * known.abs())).all()
        ):
            return name
    raise Left(f"its {ACTIVATION} is not one of {', '.join(ACTIVATIONS)}")
