"""How exact a reversible chain is as it gets longer: FastFlow trained on the demo's photographs,
float32, against float64.

    python -m bench.drift [--depths 4,8,16,32,64] [--steps 60]

Prints a Markdown table: the error of the reconstructed input relative to its norm; and the error of
all gradients relative to theirs, of the reversible chain and of the same chain as an ordinary one.
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


def trained(depth: int, features: Tensor, steps: int) -> ReversibleSequence:
    """A chain trained for some steps."""
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


def gradients(chain: nn.Module, x: Tensor) -> Tensor:
    """All gradients in one vector."""
    chain.zero_grad()
    negative_log_likelihood(*chain(x)).backward()
    return torch.cat([p.grad.double().flatten() for p in chain.parameters() if p.grad is not None])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.drift",
        description="How exact a reversible chain is as it gets longer.",
    )
    parser.add_argument("--depths", default="4,8,16,32,64", help="numbers of blocks")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
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
        "| blocks | input rebuilt, off by | gradients off by: reversible | plain | reversible / "
        "plain |\n|---:|---:|---:|---:|---:|",
        flush=True,
    )
    for depth in map(int, options.depths.split(",")):
        chain = trained(depth, features, options.steps)
        x = features[:BATCH]
        truth = gradients(plain_of(chain).double(), x.double())
        ours, plain = (
            (gradients(c, x) - truth).norm() / truth.norm() for c in (chain, plain_of(chain))
        )
        print(
            f"| {depth} | {chain.drift[0]:.1e} | {ours:.1e} | {plain:.1e} | {ours / plain:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
