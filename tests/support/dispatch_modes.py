"""Dispatch modes that users may have on around a pass: they refuse, wrap or spoil what is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as Apple's: no float64 comes of narrower floating-point
    tensors, nor out of nothing.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not any(t.dtype is torch.float64 for t in given):
            for t in tree_flatten(result)[0]:
                if isinstance(t, Tensor) and t.dtype is torch.float64:
                    raise TypeError(f"float64 from {function}")
        return result


class Wrapped(Tensor):
    """A tensor that holds another one and has no memory of its own."""

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
    """The function on what wrapped tensors hold, its result wrapped; what was given to be written
    to stays the same object.
    """
    plain = tree_map_only(Wrapped, lambda t: t.held, (args, kwargs))
    result = function(*plain[0], **plain[1])
    given = {id(t.held): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Wrapped)}
    return tree_map_only(
        Tensor,
        lambda t: given[id(t)] if id(t) in given else t if isinstance(t, Wrapped) else Wrapped(t),
        result,
    )


class Wrapping(TorchDispatchMode):
    """Every result becomes a :class:`Wrapped`."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _wrapping(function, args, kwargs or {})


class Spoiling(TorchDispatchMode):
    """Fills everything that was made meanwhile with nan when the mode ends."""

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
        """Fill it all, but for the storages at these addresses."""
        with torch.no_grad():
            for t in self.made:
                if t.untyped_storage().data_ptr() not in keep:
                    t.data.fill_(float("nan"))
