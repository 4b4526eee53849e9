"""Count the bytes that a forward pass keeps for its backward pass, and the peak of live bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_kept_for_backward(
    model: nn.Module, forward: Callable[[], object], leave_out: Iterable[nn.Module] = ()
) -> int:
    """Count the bytes of the distinct storages that autograd saves while ``forward`` runs.

    A storage counts once and whole, even if several views of it are saved, because all of it stays
    allocated. Parameters and buffers of ``model`` do not count, because they stay allocated anyway.
    Only tensors saved through autograd count (``save_for_backward`` included), not tensors hidden
    in attributes.

    Args:
        model: The module whose parameters and buffers are excluded.
        forward: Runs the forward pass with gradients enabled, and returns what holds its graph, for
            instance the loss.
        leave_out: Modules whose own saved tensors do not count, for instance the subnets if only
            the couplings are of interest. A storage that is also saved outside of them counts.

    Returns:
        Bytes kept between the forward and the backward pass.
    """
    own = {_address(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    depth = 0  # number of left-out modules that are running now

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    def pack(tensor: Tensor) -> Tensor:
        if depth == 0 and _address(tensor) not in own:
            kept[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = [
        h
        for m in leave_out
        for h in (
            m.register_forward_pre_hook(enter),
            m.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # Hold the graph until the sum is taken, because a freed address could be used again.
            graph = forward()
        total = sum(kept.values())
        del graph
    finally:
        for hook in hooks:
            hook.remove()
    return total


class Peak(TorchDispatchMode):
    """A mode that counts the bytes of all storages that operations allocate.

    Attributes:
        now: Bytes that are alive now.
        most: The most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
