"""Inspect the graph that autograd has recorded."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


def nodes(t: Tensor) -> Counter[str]:
    """Count the nodes in the graph behind a tensor by name."""
    seen, todo = set(), [t.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return Counter(type(node).__name__ for node in seen)


def reversible_blocks(t: Tensor) -> int:
    """Count the blocks in the graph that keep no activations."""
    return nodes(t)["_LinkedBlockBackward"]
