"""Build the same flow in the terms of several libraries, for :mod:`bench.libraries`.

Every chain has the same number of affine couplings. A coupling transforms one half of the channels
and has a conditioner, which sees the other half: linear, ReLU, linear. Our block also holds a
learned scale and offset of each channel (ActNorm) and a fixed permutation. The other libraries have
layers for these, which follow every coupling block. All options keep the library's defaults.

=================== ============================================================================
ours                ``AllInOneBlock``: coupling (tanh clamp), scale, offset and permutation
FrEIA AllInOneBlock the block of FrEIA 0.2, the same formula
FrEIA GLOW          ``GLOWCouplingBlock`` (atan clamp), ``ActNorm``, ``PermuteRandom``. A block is
                    two couplings, one of each half: there are half as many layers of each kind
FrEIA RNVP          ``RNVPCouplingBlock``, otherwise like GLOW. A coupling has two conditioners, for
                    s and for t. They are narrower: together they have as many parameters as one
zuko                ``GeneralCouplingTransform`` (affine, soft clip), ``ElementWiseTransform``
                    (the learned scale and offset), ``PermutationTransform``
normflows           ``AffineCouplingBlock`` (exp, without a clamp), ``ActNorm``, ``Permute``
nflows              ``AffineCouplingTransform`` (sigmoid), ``ActNorm``, ``RandomPermutation``
=================== ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock
from tests.support import peers
from tests.support.plain_chain import Plain


class Size(NamedTuple):
    """The size of a chain.

    Attributes:
        channels: C, an even number.
        couplings: Affine couplings, an even number.
        width: Hidden units of a coupling's conditioner.
    """

    channels: int
    couplings: int
    width: int

    def parameters(self) -> int:
        """Return how many parameters all conditioners have together."""
        half = self.channels // 2
        return self.couplings * ((half + 1) * self.width + (self.width + 1) * self.channels)


@dataclass
class Chain:
    """A flow of one library.

    Attributes:
        module: Holds the parameters.
        conditioners: The networks that predict the couplings' coefficients.
        to_latent: Data (B, C) to latent variables (B, C) and log-determinant (B,), in nats.
        to_data: Latent variables to data: the inverse, whose log-determinant is dropped.
    """

    module: nn.Module
    conditioners: list[nn.Module]
    to_latent: Callable[[Tensor], tuple[Tensor, Tensor]]
    to_data: Callable[[Tensor], Tensor]


class Library(NamedTuple):
    """A peer, or ours.

    Attributes:
        distribution: Its name for pip.
        build: Makes a chain; raises ImportError where the library is not installed.
        networks: Conditioners of one coupling.
    """

    distribution: str
    build: Callable[[Size], Chain]
    networks: int = 1


class Conditioner(nn.Sequential):
    """Linear, ReLU, linear."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """Return the coefficients. nflows passes a context, which is None here."""
        return super().forward(x)


def narrower_width(size: Size) -> int:
    """Return the width at which two conditioners have as many parameters as one of full width."""
    half = size.channels // 2
    units = size.parameters() / size.couplings - size.channels
    return round(units / (2 * (2 * half + 1)))


def ours(size: Size) -> Chain:
    return _block_chain(Plain(size.channels), AllInOneBlock, size)


def freia_all_in_one(size: Size) -> Chain:
    freia = peers.freia()
    return _block_chain(freia.framework.SequenceINN(size.channels), peers.freia_block(), size)


def freia_glow(size: Size) -> Chain:
    return _two_sided_chain("GLOWCouplingBlock", size.width, size)


def freia_rnvp(size: Size) -> Chain:
    return _two_sided_chain("RNVPCouplingBlock", narrower_width(size), size)


def _block_chain(inn: Any, block: type, size: Size) -> Chain:
    made, construct = _recorded(size.width)
    for _ in range(size.couplings):
        inn.append(block, subnet_constructor=construct)
    return _inn_chain(inn, made)


def _two_sided_chain(name: str, width: int, size: Size) -> Chain:
    freia = peers.freia()
    inn = freia.framework.SequenceINN(size.channels)
    made, construct = _recorded(width)
    for _ in range(size.couplings // 2):
        inn.append(getattr(freia.modules, name), subnet_constructor=construct)
        inn.append(freia.modules.ActNorm)
        inn.append(freia.modules.PermuteRandom)
    return _inn_chain(inn, made)


def _recorded(width: int) -> tuple[list[nn.Module], Callable[[int, int], nn.Module]]:
    """Return a list and a constructor of conditioners, which appends to it what it makes."""
    made: list[nn.Module] = []

    def construct(inputs: int, outputs: int) -> nn.Module:
        made.append(Conditioner(inputs, outputs, width))
        return made[-1]

    return made, construct


def _inn_chain(inn: Any, made: list[nn.Module]) -> Chain:
    return Chain(inn, made, inn, lambda z: inn(z, rev=True)[0])


def zuko_chain(size: Size) -> Chain:
    import zuko

    channels, layers, conditioners = size.channels, [], []
    for _ in range(size.couplings):
        coupling = zuko.flows.GeneralCouplingTransform(
            channels, mask=torch.arange(channels) < channels // 2, hidden_features=(size.width,)
        )
        scale_and_offset = zuko.flows.ElementWiseTransform(channels)
        _zero(scale_and_offset.parameters())  # the library draws them at random
        permutation = zuko.flows.UnconditionalTransform(
            zuko.transforms.PermutationTransform, torch.randperm(channels), buffer=True
        )
        layers += [coupling, scale_and_offset, permutation]
        conditioners.append(coupling.hyper)
    base = zuko.flows.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(channels), torch.ones(channels), buffer=True
    )
    flow = zuko.flows.Flow(layers, base)
    return Chain(
        flow,
        conditioners,
        lambda x: flow().transform.call_and_ladj(x),
        lambda z: flow().transform.inv(z),
    )


def _zero(parameters: Iterable[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()


def normflows_chain(size: Size) -> Chain:
    """Build the chain of normflows, whose flows map latent variables to data."""
    import normflows

    channels, flows = size.channels, []
    made, construct = _recorded(size.width)
    for _ in range(size.couplings):
        flows += [
            normflows.flows.AffineCouplingBlock(construct(channels // 2, channels)),
            normflows.flows.ActNorm((channels,)),
            normflows.flows.Permute(channels, mode="shuffle"),
        ]
    base = normflows.distributions.base.DiagGaussian(channels, trainable=False)
    model = normflows.NormalizingFlow(base, flows)
    return Chain(model, made, model.inverse_and_log_det, model.forward)


def nflows_chain(size: Size) -> Chain:
    from nflows import distributions, flows, transforms

    channels, layers = size.channels, []
    made, construct = _recorded(size.width)
    mask = torch.arange(channels) >= channels // 2  # what is transformed
    for _ in range(size.couplings):
        layers += [
            transforms.AffineCouplingTransform(mask, construct),
            transforms.ActNorm(channels),
            transforms.RandomPermutation(channels),
        ]
    transform = transforms.CompositeTransform(layers)
    flow = flows.Flow(transform, distributions.StandardNormal([channels]))
    return Chain(flow, made, transform, lambda z: transform.inverse(z)[0])


LIBRARIES = {
    "ours": Library("fastflow_kernels", ours),
    "FrEIA AllInOneBlock": Library("FrEIA", freia_all_in_one),
    "FrEIA GLOW": Library("FrEIA", freia_glow),
    "FrEIA RNVP": Library("FrEIA", freia_rnvp, networks=2),
    "zuko": Library("zuko", zuko_chain),
    "normflows": Library("normflows", normflows_chain),
    "nflows": Library("nflows", nflows_chain),
}
