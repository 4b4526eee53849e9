"""What torch has no public name for: every private API that the package uses is in this file.

``tests/test_torch_private.py`` asks each of them, with every supported version of torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

_KEYS = torch._C._TorchDispatchModeKey
_SYMBOLIC = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)

# --- who looks on while operations run ------------------------------------------------------------


def is_watched() -> bool:
    """Whether a dispatch mode is on.

    It may exchange every tensor that is made: nothing made may be kept for later calls then.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def is_symbolic() -> bool:
    """Whether tensors have no values: FakeTensorMode, make_fx, functionalization."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in _SYMBOLIC
    )


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records the operations."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_recorded() -> bool:
    """Whether operations are recorded, so that tensors cannot be asked for their values."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or is_symbolic()


def is_transformed() -> bool:
    """Whether a transform of torch.func is on: vmap, grad, jvp, and others."""
    return torch._C._are_functorch_transforms_active()


def needs_plain(*tensors: Tensor | None) -> bool:
    """Whether hand-derived functions must stand aside for differentiable operations.

    So it is while operations are recorded or transformed by torch.func, in forward mode, and for
    fake tensors, batches of gradients and other subclasses. Asked several times a call, and
    therefore in one function.

    Args:
        tensors: What the functions would be given from outside; None counts for nothing.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_symbolic()
    ):
        return True
    for t in tensors:
        if t is not None and (
            (type(t) is not Tensor and type(t) is not nn.Parameter)
            or torch._C._functorch.is_legacy_batchedtensor(t)  # grad(is_grads_batched=True)
        ):
            return True
    return False


def is_onnx_export() -> bool:
    """Whether a file for ONNX is being made.

    Dynamo takes torch.onnx.is_in_onnx_export for False, but not what that reads.
    """
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return torch.onnx.is_in_onnx_export() or (flags is not None and flags._is_onnx_exporting)


def has_saved_tensor_hooks() -> bool:
    """Whether saved_tensors_hooks are set by somebody; True where torch cannot be asked."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def is_parametrization_cached() -> bool:
    """Whether torch.nn.utils.parametrize.cached() is on."""
    return bool(parametrize._cache_enabled)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within: neither a dispatch mode nor torch.jit.trace sees what is done."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


# --- what a tensor is -----------------------------------------------------------------------------


# Whether a tensor is a wrapper of torch.func, which may stand for many values.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def version_of(t: Tensor) -> int | None:
    """How often t was written to in place; None if nobody counts (in inference mode)."""
    return None if t.is_inference() else t._version


def versions_counted() -> AbstractContextManager[None]:
    """Within: new tensors count their versions, in inference mode too, whose own ones do not.

    Use it for a tensor that the subnet reads and the coupling does not. The stock block's coupling
    would see what the subnet writes there, so a write must be noticed.
    """
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def state_of(t: Tensor | None) -> tuple[int, int, int | None] | None:
    """What changes when a tensor is another one, lies elsewhere, or is written to."""
    return None if t is None else (id(t), t.data_ptr(), None if t.is_inference() else t._version)


def holders_of(t: Tensor) -> tuple[int, int, int]:
    """How many references there are to t, to its storage as Python knows it, and to its memory.

    Call it directly where t is a local variable: the count includes that variable.
    """
    storage = t.untyped_storage()
    return sys.getrefcount(t), sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


# --- modules, Functions, the environment ----------------------------------------------------------


def parameter_of(module: Any, name: str) -> Any:
    """A parameter, found at once where it is one and no subclass computes it.

    nn.Module's search for an attribute takes 0.4 us.
    """
    parameter = None if hasattr(type(module), name) else module._parameters.get(name)
    # it may be parametrized, or an attribute of a replica
    return getattr(module, name) if parameter is None else parameter


def is_compiled(module: Any) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is set on the module itself."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """The C++ ``apply`` of an autograd Function.

    ``Function.apply`` spends 5 us for nine arguments in Python first: it looks for transforms of
    torch.func (the caller has checked), for a ``setup_context`` (ours have none) and for tensors
    that leaked out of a transform (the C++ handles them).
    """
    apply: Callable[..., Any] = super(Function, function).apply  # type: ignore[misc]
    return apply


_environment: Any = getattr(os.environ, "_data", None)  # CPython's own dictionary behind it


def is_certainly_unset(encoded: Any) -> bool:
    """Whether a variable, as ``os.environ.encodekey`` gives it, is not in the environment.

    Takes 0.1 us; os.environ takes 0.5 us to look for what is not there.
    """
    return _environment is not None and encoded not in _environment
