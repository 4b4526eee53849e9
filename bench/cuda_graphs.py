"""Record a model's calls in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Positional(nn.Module):
    """A model that takes only positional arguments, as make_graphed_callables requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(*arguments)


def graphed(model: nn.Module, arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Record the forward and the backward pass of a model once each.

    The graph overwrites its inputs, so they are copies.
    """
    static = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in arguments)
    return torch.cuda.make_graphed_callables(_Positional(model), static, allow_unused_input=True)


def captured(call: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Record a call without gradients. A replay copies its inputs into place."""
    static = [t.detach().clone() for t in arguments]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        # Warm up: what compiles or allocates on a first call must not be recorded.
        for _ in range(3):
            call(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = call(*static)

    def replay(*inputs: Tensor) -> Any:
        for recorded, new in zip(static, inputs, strict=True):
            recorded.copy_(new)
        graph.replay()
        return outputs

    return replay
