"""FastFlow (Yu et al. 2021, arXiv:2111.07677) as anomalib builds it, over any AllInOneBlock.

This file has the model, the loss and the anomaly map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow_kernels import ReversibleSequence


class SequenceINN(nn.Module):
    """FrEIA's chain, where FrEIA is not installed. ``accelerate`` knows it by its name."""

    def __init__(self, modules: Sequence[nn.Module], conditions: Sequence[int | None]) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(modules)
        self.conditions, self.force_tuple_output = list(conditions), False

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[Any, Any]:
        """Map features to the latent space, or back.

        Args:
            x_or_z: Features (B, C, *S), or with ``rev`` the latent variable.
            c: Conditions (B, C_c, *S), for the blocks that take them.
            rev: Compute the inverse.
            jac: Ignored.

        Returns:
            The latent variable (B, C, *S), or the features if ``rev``. And the log-determinant of
            the whole chain (B,), in nats per sample.
        """
        x: Any = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        log_det: Any = 0
        pairs: list[Any] = list(zip(self.module_list, self.conditions, strict=True))
        for module, place in reversed(pairs) if rev else pairs:
            condition = {} if place is None else {"c": [c[place]]}
            x, log_det_of_module = module(x, rev=rev, jac=jac, **condition)
            log_det = log_det_of_module + log_det
        return x[0], log_det


class SequenceFlow(SequenceINN):
    """A chain of invertible blocks, whose log-determinants add up."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__(blocks, [0 if block.conditional else None for block in blocks])

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in the forward direction."""
        return self.module_list

    def subnets(self) -> list[nn.Module]:
        """Return the subnets in the order of the blocks."""
        blocks: list[Any] = list(self.blocks)
        return [block.subnet for block in blocks]


class ReversibleFlow(SequenceFlow):
    """The same chain, trained in memory that does not grow with the number of blocks.

    Its state dict is that of the plain chain.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__(blocks)
        chain = ReversibleSequence(*blocks[0].dims_in[0])
        for block in blocks:
            chain.append(block)
        # Not a submodule: otherwise the state dict would hold everything twice.
        self.__dict__["chain"] = chain

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Map as the plain chain does. The blocks must take no conditions."""
        chain: ReversibleSequence = self.__dict__["chain"]
        z, logdet = chain(x_or_z, c, rev, jac)
        return z, logdet


def conv_subnet(kernel_size: int, hidden_ratio: float = 1.0) -> Callable[[int, int], nn.Sequential]:
    """Return a constructor of anomalib's FastFlow subnet: convolution, ReLU, convolution."""

    def construct(in_channels: int, out_channels: int) -> nn.Sequential:
        hidden = int(in_channels * hidden_ratio)
        return nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, kernel_size, padding="same"),
        )

    return construct


def linear_subnet(hidden_ratio: float) -> Callable[[int, int], nn.Sequential]:
    """Return a constructor of CFlow's subnet: linear, ReLU, linear."""

    def construct(in_channels: int, out_channels: int) -> nn.Sequential:
        hidden = int(hidden_ratio * in_channels)
        return nn.Sequential(
            nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, out_channels)
        )

    return construct


def fastflow(
    block_class: Callable[..., nn.Module],
    shape: tuple[int, int, int],
    steps: int = 8,
    flow: type[SequenceFlow] = SequenceFlow,
) -> SequenceFlow:
    """Build FastFlow's chain: 3x3 and 1x1 subnets in turn, clamp 2, hard permutations.

    Args:
        block_class: The AllInOneBlock to use. Another class here replaces the maths of the whole
            model.
        shape: Channels, height and width of the features.
        steps: Number of blocks.
        flow: The chain's class.
    """
    return flow(
        [
            block_class(
                [shape], subnet_constructor=conv_subnet(3 if i % 2 == 0 else 1), affine_clamping=2.0
            )
            for i in range(steps)
        ]
    )


def negative_log_likelihood(z: Tensor, logdet: Tensor) -> Tensor:
    """Compute FastFlow's loss, ``mean(0.5 * sum(z^2) - logdet)``, in nats per dimension.

    Per dimension, losses of different sizes can be compared.

    Args:
        z: Latent variable (B, C, H, W).
        logdet: Log-determinant (B,), in nats per sample.

    Returns:
        A scalar.
    """
    return (0.5 * z.square().sum(dim=(1, 2, 3)) - logdet).mean() / z[0].numel()


def anomaly_map(z: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute anomalib's heat map of one scale: minus the likelihood, upsampled.

    The likelihood of a pixel is ``exp(-0.5 * mean over channels of z^2)``.

    Args:
        z: Latent variable (B, C, H, W).
        size: Height and width of the image.

    Returns:
        (B, *size), between -1 (normal) and 0 (anomalous).
    """
    likelihood = torch.exp(-0.5 * z.square().mean(dim=1, keepdim=True))
    return F.interpolate(-likelihood, size=size, mode="bilinear", align_corners=False)[:, 0]
