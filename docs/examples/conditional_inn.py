"""A conditional flow: sample what may have caused a measurement, p(x | measurement)."""

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock

NOISE = 0.5


def simulate(count: int) -> tuple[Tensor, Tensor]:
    """Draw causes (count, 2) and what is measured of each: their sum, with noise (count, 1)."""
    x = torch.randn(count, 2)
    measured = x.sum(dim=1, keepdim=True) + NOISE * torch.randn(count, 1)
    return x, measured


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels_in, 64), nn.ReLU(), nn.Linear(64, channels_out))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # such small networks gain nothing from more
    # Every block gets condition 0, which has one channel. The subnets see it as a further input.
    flow = SequenceINN(2)
    for _ in range(6):
        flow.append(
            AllInOneBlock,
            cond=0,
            cond_shape=(1,),
            subnet_constructor=subnet,
            permute_soft=True,
        )

    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=500)
    for _ in range(500):
        x, measured = simulate(512)
        z, log_det = flow(x, c=[measured])
        loss = (0.5 * z.square().sum(dim=1) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    for value in (-2.0, 2.0):
        with torch.no_grad():
            condition = torch.full((10_000, 1), value)
            samples, _ = flow(torch.randn(10_000, 2), c=[condition], rev=True)
        first, second = samples.mean(dim=0)
        exact = value / (2 + NOISE**2)  # the mean of x given its measured sum
        print(
            f"measured {value:+.1f}: samples have mean ({first:+.3f}, {second:+.3f}), "
            f"exact is ({exact:+.3f}, {exact:+.3f})"
        )


if __name__ == "__main__":
    main()
