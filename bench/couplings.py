"""The providers' coupling blocks: FrEIA's and ours, alone or with a permutation behind each."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fastflow_kernels
import reference
from tests.support import freia_main, peers


def _freia_main() -> Any:
    package = freia_main.freia_main_block().__module__.rpartition(".")[0]
    layers, fixed = (
        importlib.import_module(f"{package}.{name}")
        for name in ("coupling_layers", "fixed_transforms")
    )
    return SimpleNamespace(**vars(layers) | {"PermuteRandom": fixed.PermuteRandom})


# By base: a function that returns the stock classes, and their name.
_RELEASE = (lambda: peers.freia().modules, f"FrEIA {peers.VERSIONS['FrEIA']}")
STOCK: dict[str, tuple[Callable[[], Any], str]] = {
    "freia": (_freia_main, f"FrEIA main, commit {freia_main.commit()}"),
    "freia-0.2": _RELEASE,
    "ours-accelerated": _RELEASE,
}


class PermuteRandom(nn.Module):
    """FrEIA's permutation of the channels, where FrEIA is not installed."""

    def __init__(self, dims_in: Sequence[Sequence[int]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        perm = torch.randperm(dims_in[0][0], generator=generator)
        self.perm = nn.Parameter(perm, requires_grad=False)
        self.perm_inv = nn.Parameter(perm.argsort(), requires_grad=False)

    def forward(
        self, x: Sequence[Tensor], rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], float]:
        return [x[0][:, self.perm_inv if rev else self.perm]], 0.0


class Permuted(nn.Module):
    """A coupling block and the permutation behind it, called like one block."""

    def __init__(self, block: Any, permutation: nn.Module) -> None:
        super().__init__()
        self.block, self.permutation = block, permutation
        self.conditional = block.conditional

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> Any:
        if rev:
            x, _ = self.permutation(x, rev=True)
            return self.block(x, c, rev=True)
        x, logdet = self.block(x, c)
        return self.permutation(x)[0], logdet


def block_class(base: str, block: str, permutes: bool) -> tuple[Callable[..., nn.Module], str]:
    """Return the constructor of a coupling block, and the name of its class in words.

    Args:
        base: One of :data:`bench.providers.COUPLING_BASES`, or of the reference.
        block: The name of the class in FrEIA.
        permutes: Whether a PermuteRandom follows the block.
    """
    classes, name = _classes(base)
    build = partial(_build, classes, block, permutes, base.startswith("ours"))
    return build, f"{name}{', accelerated' if base == 'ours-accelerated' else ''}"


def is_installed(base: str) -> bool:
    """Return whether the stock classes of a base are installed."""
    with contextlib.suppress(peers.PeerMissing):
        STOCK[base][0]()
        return True
    return False


def _classes(base: str) -> tuple[Any, str]:
    if base == "ours":
        return fastflow_kernels, "fastflow_kernels"
    if base in STOCK:
        find, name = STOCK[base]
        with contextlib.suppress(peers.PeerMissing):
            return find(), name
    return reference, "reference"


def _build(
    classes: Any, block: str, permutes: bool, accelerates: bool, /, *shapes: Any, **options: Any
) -> nn.Module:
    made: nn.Module = getattr(classes, block)(*shapes, **options)
    if permutes:
        permute_class = getattr(classes, "PermuteRandom", PermuteRandom)
        made = Permuted(made, permute_class(shapes[0], seed=0))
    if not accelerates:
        return made
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # if it runs the stock maths, its times mean nothing
        return fastflow_kernels.accelerate(made)


def subnet_outputs(block: str, dims_in: Any, dims_c: Any) -> list[int]:
    """Return how many channels each subnet of a coupling block returns, in their order."""
    outputs: list[int] = []

    def construct(_: int, channels: int) -> nn.Module:
        outputs.append(channels)
        return nn.Identity()

    getattr(reference, block)(dims_in, dims_c, construct)
    return outputs
