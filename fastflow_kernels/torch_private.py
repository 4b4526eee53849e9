"""Everything that the package uses of torch's private API.

``tests/test_torch_private.py`` tests each name with every supported version of torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

_Function = TypeVar("_Function", bound=Callable[..., Any])
_KEYS = torch._C._TorchDispatchModeKey
_SYMBOLIC = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)

# --- what watches or records operations -----------------------------------------------------------


def is_watched() -> bool:
    """Return whether a dispatch mode is on.

    It may replace every tensor that is made. Therefore nothing that is made may be cached.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def is_symbolic() -> bool:
    """Return whether tensors have no values, as in FakeTensorMode, make_fx, functionalization."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in _SYMBOLIC
    )


def is_traced() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records the operations."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_recorded() -> bool:
    """Return whether operations are recorded, so that the values of tensors cannot be read."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or is_symbolic()


def is_transformed() -> bool:
    """Return whether a transform of torch.func is on, such as vmap, grad or jvp."""
    return torch._C._are_functorch_transforms_active()


def needs_plain(*tensors: Tensor | None) -> bool:
    """Return whether plain differentiable operations must run in place of hand-derived functions.

    They must while operations are recorded or transformed by torch.func, and in forward mode. They
    must also for fake tensors, batches of gradients and other subclasses. All of it is one
    function, because a call asks several times.

    Args:
        tensors: What the functions would get from outside. None is ignored.
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


def is_compiled_here() -> bool:
    """Return whether torch.compile makes a graph for this process. Such a graph may call operators.

    A graph that is exported must not, because whoever runs it may not have this package. Nor must a
    transform of torch.func or forward-mode AD, which need to look into every operation.
    """
    return torch.compiler.is_dynamo_compiling() and not _is_exported_or_transformed()


def constant_in_graphs(function: _Function) -> _Function:
    """Let Dynamo run a function while it traces, and take its result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def _is_exported_or_transformed() -> bool:
    # torch.compiler.is_exporting() is True in every torch.compile before 2.13. In torch 2.7 this
    # flag is not set in a strict export, which Dynamo traces.
    if torch.compiler._is_exporting_flag or is_onnx_export():
        return True
    tracer = getattr(torch._dynamo.symbolic_convert.tls, "current_tx", None)
    return (
        (tracer is not None and tracer.export)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_constant(number: float) -> bool:
    """Return whether Dynamo takes a number as a constant of the graph that it makes.

    A number on a module that has changed is a variable of the next graph. Torch 2.7 cannot tell,
    and makes a new graph for every value.
    """
    shapes = torch.fx.experimental.symbolic_shapes  # Dynamo has imported it
    return not hasattr(shapes, "has_static_value") or shapes.has_static_value(number)


def as_constant(number: float) -> float:
    """Make a number a constant of the graph that Dynamo makes. Another number takes another graph.

    Dynamo takes the keys of a dictionary as constants, once it has looked at them.
    """
    return next(iter({1.0 * number: None}))


@constant_in_graphs
def compiles_for_all_sizes() -> bool:
    """Return whether torch.compile is tracing with ``dynamic=True``.

    Then every number is a variable from the start.
    """
    return not torch._dynamo.config.assume_static_by_default


@constant_in_graphs  # Dynamo would take torch.onnx.is_in_onnx_export() as False
def is_onnx_export() -> bool:
    """Return whether an ONNX file is being made."""
    if "torch.onnx" not in sys.modules:  # importing it takes a while
        return False
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return torch.onnx.is_in_onnx_export() or (flags is not None and flags._is_onnx_exporting)


def has_saved_tensor_hooks() -> bool:
    """Return whether saved_tensors_hooks are set, or True if this version of torch cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def is_parametrization_cached() -> bool:
    """Return whether torch.nn.utils.parametrize.cached() is on."""
    return bool(parametrize._cache_enabled)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Hide operations from dispatch modes and from torch.jit.trace."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


# --- what a tensor is -----------------------------------------------------------------------------


# Returns whether a tensor is a wrapper of torch.func, which may stand for many values.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def version_of(t: Tensor) -> int | None:
    """Return how often t was written to in place; None in inference mode, which does not count."""
    return None if t.is_inference() else t._version


def versions_counted() -> AbstractContextManager[None]:
    """Return a context in which new tensors count their versions, also in inference mode.

    Use it for a tensor that the subnet reads and the coupling does not. The stock block's coupling
    would see what the subnet writes there, so a write must be noticed.
    """
    # Dynamo cannot trace the question, and a graph counts no versions.
    is_needed = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _outside_inference_mode() if is_needed else nullcontext()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def state_of(t: Tensor | None) -> tuple[int, int, int | None] | None:
    """Return a key that changes if a tensor is replaced, moved in memory, or written to."""
    return None if t is None else (id(t), t.data_ptr(), None if t.is_inference() else t._version)


def holders_of(t: Tensor) -> tuple[int, int, int]:
    """Count the references to t, to its storage in Python, and to its memory.

    Call it directly where t is a local variable: the count includes that variable.
    """
    storage = t.untyped_storage()
    return sys.getrefcount(t), sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


# --- modules, Functions, the environment ----------------------------------------------------------


def backward_pass() -> int:
    """Return a number of the backward pass that runs now, which no other pass has."""
    return torch._C._current_graph_task_id()


def parameter_of(module: Any, name: str) -> Any:
    """Return a parameter, directly from the module's dictionary unless its class computes it.

    nn.Module's search for an attribute takes 0.4 us.
    """
    parameter = None if hasattr(type(module), name) else module._parameters.get(name)
    # it may be parametrized, or an attribute of a replica
    return getattr(module, name) if parameter is None else parameter


def is_compiled(module: Any) -> bool:
    """Return whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is set on the module itself."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
)
_module_call, _call_impl = nn.Module.__call__, nn.Module._call_impl


def are_calls_hooked() -> bool:
    """Return whether something of this process watches the calls of all modules.

    That is a global hook, as profilers set it, or a replaced method of ``nn.Module``.
    """
    return (
        nn.Module.__call__ is not _module_call
        or _module_call.__module__ != nn.Module.__module__  # replaced before this package came
        or nn.Module._call_impl is not _call_impl
        or any(getattr(nn.modules.module, hooks) for hooks in _GLOBAL_HOOKS)
    )


def is_called_directly(module: nn.Module) -> bool:
    """Return whether a call of a module runs its ``forward`` and nothing else but global hooks.

    A parametrized module may compute its parameters in every call.
    """
    cls, own = type(module), module.__dict__
    return (
        cls.__call__ is _module_call
        and cls._call_impl is _call_impl
        and "_call_impl" not in own
        and module._compiled_call_impl is None
        and "parametrizations" not in own["_modules"]
        and not has_hooks(module)
    )


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """Return the C++ ``apply`` of an autograd Function.

    ``Function.apply`` spends 5 us for nine arguments in Python first. It looks for transforms of
    torch.func, which the caller has checked, and for a ``setup_context``, which ours do not have.
    It also looks for tensors that leaked out of a transform, which the C++ handles.
    """
    apply: Callable[..., Any] = super(Function, function).apply  # type: ignore[misc]
    return apply


_environment: Any = getattr(os.environ, "_data", None)  # CPython's own dictionary behind it


def is_certainly_unset(encoded: Any) -> bool:
    """Return whether an environment variable is certainly not set.

    This takes 0.1 us. A search in os.environ takes 0.5 us.

    Args:
        encoded: The variable's name as ``os.environ.encodekey`` returns it.
    """
    return _environment is not None and encoded not in _environment
