"""Counts the bytes that a forward pass keeps alive for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def bytes_kept_for_backward(
    model: nn.Module, forward: Callable[[], object], leave_out: Iterable[nn.Module] = ()
) -> int:
    """Count the bytes of the distinct storages that autograd saves while ``forward`` runs.

    A storage counts once and whole, however many views of it are saved: that is what stays
    allocated. Parameters and buffers of ``model`` do not count, they live anyway. Only tensors
    saved through autograd are seen (``save_for_backward`` included), not ones hidden in attributes.

    Args:
        model: The module whose parameters and buffers are excluded.
        forward: Runs the forward pass with gradients enabled and returns what holds its graph, for
            instance the loss.
        leave_out: Modules whose own saved tensors are left out, for instance the subnets when only
            the couplings are of interest. A storage that is saved outside of them too still counts.

    Returns:
        Bytes kept between the forward and the backward pass.
    """
    own = {_address(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    depth = 0  # how many of the left-out modules are running right now

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
            # held until the sum is taken: a freed storage's address could be given out again
            graph = forward()
        total = sum(kept.values())
        del graph
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
