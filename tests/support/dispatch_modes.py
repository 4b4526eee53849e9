"""Dispatch modes that users may turn on around a pass: they refuse, wrap or overwrite results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as Apple's.

    Operations raise if they make float64 from narrower floating-point tensors, or from no tensors.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not any(t.dtype is torch.float64 for t in inputs):
            for t in tree_flatten(result)[0]:
                if isinstance(t, Tensor) and t.dtype is torch.float64:
                    raise TypeError(f"float64 from {function}")
        return result


class Wrapped(Tensor):
    """A tensor that holds another tensor and has no memory of its own."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        wrapped = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=held.device,
        )
        wrapped.held = held
        return wrapped

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _wrapping(function, args, kwargs or {})


def _wrapping(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function on the tensors inside the wrapped ones, and wrap its result.

    An argument that the function returns, as in-place functions do, stays the same object.
    """
    plain = tree_map_only(Wrapped, lambda t: t.held, (args, kwargs))
    result = function(*plain[0], **plain[1])
    wrapped = {id(t.held): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Wrapped)}
    return tree_map_only(
        Tensor,
        lambda t: (
            wrapped[id(t)] if id(t) in wrapped else t if isinstance(t, Wrapped) else Wrapped(t)
        ),
        result,
    )


class Wrapping(TorchDispatchMode):
    """A mode in which every result becomes a :class:`Wrapped`."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _wrapping(function, args, kwargs or {})


class Spoiling(TorchDispatchMode):
    """A mode that records every result, so that :meth:`spoil` can fill them with NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.made += [
            t for t in tree_flatten(result)[0] if isinstance(t, Tensor) and t.is_floating_point()
        ]
        return result

    def spoil(self, keep: set[int]) -> None:
        """Fill all recorded results with NaN, except the storages at these addresses."""
        with torch.no_grad():
            for t in self.made:
                if t.untyped_storage().data_ptr() not in keep:
                    t.data.fill_(float("nan"))
