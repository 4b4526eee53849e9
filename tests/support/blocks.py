"""Blocks as tests hand them to exporters."""

from __future__ import annotations

from torch import Tensor, nn


class TakesTensor(nn.Module):
    """A block that takes a tensor and returns two, in one direction."""

    def __init__(self, block: nn.Module, rev: bool) -> None:
        super().__init__()
        self.block, self.rev = block, rev

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (y,), log_det = self.block([x], rev=self.rev)
        return y, log_det
