"""Measure how exact a reversible chain stays as it gets longer.

    python -m bench.drift [--depths 4,8,16,32,64] [--steps 60]

FastFlow is trained on the demo's photographs, in float32. A Markdown table shows two errors, each
relative to a norm. One is that of the reconstructed input, of the half that is worse. The other is
that of all gradients against float64, for the reversible chain and for its plain copy.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from bench.demo.training import BATCH, GRADIENT_NORM, LEARNING_RATE, SHAPE, WEIGHT_DECAY, prepare
from bench.fastflow import conv_subnet, negative_log_likelihood
from fastflow_kernels import AllInOneBlock, ReversibleSequence
from tests.support.plain_chain import plain_of
from tests.support.textures import TEXTURES, load_photograph


def train_chain(depth: int, features: Tensor, steps: int) -> ReversibleSequence:
    """Build a chain of ``depth`` blocks and train it on features (N, C, H, W)."""
    torch.manual_seed(0)
    chain = ReversibleSequence(*SHAPE)
    for i in range(depth):
        chain.append(
            AllInOneBlock,
            subnet_constructor=conv_subnet(3 if i % 2 == 0 else 1),
            affine_clamping=2.0,
        )
    optimizer = torch.optim.Adam(chain.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        negative_log_likelihood(*chain(features[torch.randperm(len(features))[:BATCH]])).backward()
        nn.utils.clip_grad_norm_(chain.parameters(), GRADIENT_NORM)
        optimizer.step()
    return chain


def compute_gradients(chain: nn.Module, x: Tensor) -> Tensor:
    """Return the gradients of all parameters in one float64 vector."""
    chain.zero_grad()
    negative_log_likelihood(*chain(x)).backward()
    return torch.cat([p.grad.double().flatten() for p in chain.parameters() if p.grad is not None])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.drift",
        description="Measure how exact a reversible chain stays as it gets longer. Prints a "
        "Markdown table of the errors, relative to the norms.",
    )
    parser.add_argument(
        "--depths",
        metavar="N,...",
        default="4,8,16,32,64",
        help="numbers of blocks (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=60, help="training steps (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    features = prepare(
        TEXTURES[0],
        {name: load_photograph(name) for name in TEXTURES},
        crops=48,
        per_kind=2,
        seed=0,
    ).train
    print(
        "| blocks | error of the reconstructed input | error of the gradients, reversible chain "
        "| plain chain | reversible / plain |\n|---:|---:|---:|---:|---:|",
        flush=True,
    )
    for depth in map(int, options.depths.split(",")):
        chain = train_chain(depth, features, options.steps)
        x = features[:BATCH]
        truth = compute_gradients(plain_of(chain).double(), x.double())
        error, plain_error = (
            (compute_gradients(model, x) - truth).norm() / truth.norm()
            for model in (chain, plain_of(chain))
        )
        print(
            f"| {depth} | {chain.drift[0]:.1e} | {error:.1e} | {plain_error:.1e} "
            f"| {error / plain_error:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
