"""Run every kernel once on a small, odd shape: forward, backward, inverse and reconstruction.

Those of a block run a second time between halves, as in a chain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock, ReversibleSequence
from fastflow_kernels.coupling import ChainGrads, Coupling, CouplingSpec, Halves, OutputGrads

SHAPES = ((3, 33, 7, 9), (5, 66))  # P not divisible by 4; and rank 0


class Subnet(nn.Module):
    """A subnet that repeats its input and multiplies it by a weight.

    It runs no kernels of a library, which the sanitizer would watch as well.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.channels_out, self.weight = channels_out, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.cat((x, x), 1)[:, : self.channels_out]


def run(device: str) -> None:
    """Run all shapes, affine and GIN, as blocks and as sides of coupling blocks."""
    for shape in SHAPES:
        run_between_halves(shape, device)
        for gin in (False, True):
            run_one(shape, gin, device)
            run_side(shape, gin, device)


def run_one(full: tuple[int, ...], gin: bool, device: str) -> None:
    """Run a block by itself and in a reversible chain."""
    batch, *shape = full
    block = AllInOneBlock([shape], subnet_constructor=Subnet, gin_block=gin, backend="triton")
    chain = ReversibleSequence(*shape)
    chain.append(block)
    # Add a second block, so that one is reconstructed.
    chain.append(AllInOneBlock, subnet_constructor=Subnet, gin_block=gin, backend="triton")
    chain.to(device)
    x = torch.randn(batch, *shape, device=device, requires_grad=True)
    for call in (lambda x: block([x]), chain):
        z, logdet = call(x)
        (sum(t.square().sum() for t in z) - logdet.sum()).backward()
    with torch.no_grad():
        block([x], rev=True)


def run_side(full: tuple[int, ...], gin: bool, device: str) -> None:
    """Run a side, which reads and writes some channels of larger tensors."""
    from fastflow_kernels.engines.triton import engine

    batch, channels, *spatial = full
    x, y, dy, dx = (
        torch.randn(batch, channels + 4, *spatial, device=device)[:, 3:-1] for _ in range(4)
    )
    a = torch.randn(batch, 2 * channels, *spatial, device=device)
    coupling = Coupling(None, None, CouplingSpec(1.272, 1.0, None, gin, "atan", 1.0, gin))
    engine.forward(x, a, coupling, y)
    engine.backward(x, a, OutputGrads(dy, None), coupling, False, dx)
    engine.invert_active(y, x, a, coupling)


def run_between_halves(full: tuple[int, ...], device: str) -> None:
    """Run the first and the last block of a chain, whose activations travel in halves."""
    from fastflow_kernels.engines.triton import engine

    batch, channels, *spatial = full
    active = channels // 2
    whole = torch.randn(full, device=device)
    g, perm = torch.randn(channels, device=device), torch.randperm(channels, device=device)
    spec = CouplingSpec.of(1.9, "anomalib", "SOFTPLUS", False)
    coupling = Coupling(g, g, spec, perm, perm.argsort())
    a = torch.randn(batch, 2 * active, *spatial, device=device)
    halves = Halves(*(half.contiguous() for half in whole.split((channels - active, active), 1)))
    log_det = torch.randn(batch, device=device)
    ends: tuple[tuple[Any, Any], ...] = ((whole, halves), (halves, whole))
    for x, y in ends:
        sums = engine.forward_in_chain(x, a, coupling, y)
        engine.log_det_of_chain([sums] * 2, [coupling] * 2, whole[0, 0].numel())
        grads = ChainGrads(y, halves.passive.clone(), log_det)
        engine.backward_in_chain(x, a, grads, coupling, True)
