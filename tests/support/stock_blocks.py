"""The stock blocks that tests compare with, and marks that run a test with each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reference
from tests.support.cases import Case, make_block
from tests.support.peers import anomalib_block, freia_block


def freia_main_block() -> Callable[..., nn.Module]:
    """Return the reference in dialect "freia", in place of the block of FrEIA's main branch.

    That branch was never released.
    """
    return functools.partial(reference.AllInOneBlock, dialect="freia")


PEERS: dict[str, Callable[[], Any]] = {
    "anomalib": anomalib_block,
    "freia0.2": freia_block,
    "freia-main": freia_main_block,
}


def each_peer(peers: dict[str, Callable[[], Any]]) -> pytest.MarkDecorator:
    """Run a test with every peer; the marker ``peers`` marks those that need a package."""
    return pytest.mark.parametrize(
        "peer",
        [
            pytest.param(peer, id=name, marks=[] if peer is freia_main_block else pytest.mark.peers)
            for name, peer in peers.items()
        ],
    )


peers = each_peer(PEERS)
released = each_peer({name: peer for name, peer in PEERS.items() if peer is not freia_main_block})


def stock_block(
    peer: Callable[[], Any],
    case: Case,
    seed: int = 3,
    dtype: torch.dtype = torch.float64,
    **extra: Any,
) -> nn.Module:
    """Build a peer's block with random parameters."""
    cls = peer()
    np.random.seed(seed)  # FrEIA 0.2 draws its permutations from NumPy
    return make_block(cls, case, dtype, seed, **extra)
