"""Density estimation: fit a flow to points in the plane and compare with their known entropy."""

import math

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock

NOISE = 0.3
# The entropy of the points below, in nats: x is a standard normal, y a normal around sin(2x).
ENTROPY = math.log(2 * math.pi * math.e) + math.log(NOISE)


def draw_points(count: int) -> Tensor:
    """Draw points (x, y) along a sine wave: (count, 2)."""
    x = torch.randn(count)
    y = torch.sin(2 * x) + NOISE * torch.randn(count)
    return torch.stack([x, y], dim=1)


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(channels_in, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, channels_out),
    )


def negative_log_likelihood(flow: nn.Module, points: Tensor) -> Tensor:
    """Return the mean of -log p(point) in nats. The flow maps points to a standard normal."""
    z, log_det = flow(points)
    log_normal = -0.5 * z.square().sum(dim=1) - math.log(2 * math.pi)
    return -(log_normal + log_det).mean()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # such small networks gain nothing from more
    # permute_soft rotates the two channels. A permutation could only exchange them.
    flow = SequenceINN(2)
    for _ in range(6):
        flow.append(AllInOneBlock, subnet_constructor=subnet, permute_soft=True)

    test_points = draw_points(100_000)
    with torch.no_grad():
        print(f"before training: {negative_log_likelihood(flow, test_points):.2f} nats")

    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=500)
    for _ in range(500):
        optimizer.zero_grad()
        negative_log_likelihood(flow, draw_points(512)).backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        print(f"after training: {negative_log_likelihood(flow, test_points):.2f} nats")
        print(f"entropy of the data: {ENTROPY:.2f} nats, which no model can go below")
        # To sample, draw from the normal and run the flow backward.
        samples, _ = flow(torch.randn(100_000, 2), rev=True)
    x, y = samples.T
    noise = (y - torch.sin(2 * x)).std()
    print(f"noise around the sine wave: {noise:.2f} in the samples, {NOISE:.2f} in the data")


if __name__ == "__main__":
    main()
