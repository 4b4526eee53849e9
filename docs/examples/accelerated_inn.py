"""A conditional INN of FrEIA's own blocks, accelerated: sample the causes of a measurement."""

import math

import torch
from FrEIA.framework import ConditionNode, GraphINN, InputNode, Node, OutputNode
from FrEIA.modules import GLOWCouplingBlock, PermuteRandom
from torch import Tensor, nn

from fastflow_kernels import accelerate, report, restore

CAUSES, MEASURED, NOISE = 32, 8, 0.5


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels_in, 128), nn.ReLU(), nn.Linear(128, channels_out))


def build() -> GraphINN:
    """Return a network as it is written with FrEIA alone."""
    last, condition = InputNode(CAUSES), ConditionNode(MEASURED)
    nodes = [last, condition]
    for i in range(4):
        block = Node(last, GLOWCouplingBlock, {"subnet_constructor": subnet}, conditions=condition)
        last = Node(block, PermuteRandom, {"seed": i})
        nodes += [block, last]
    return GraphINN([*nodes, OutputNode(last)])


def simulate(mixing: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw causes (count, CAUSES) and mixtures of them, with noise (count, MEASURED)."""
    x = torch.randn(count, CAUSES)
    return x, x @ mixing.T + NOISE * torch.randn(count, MEASURED)


def negative_log_likelihood(inn: GraphINN, x: Tensor, measured: Tensor) -> Tensor:
    """Return the mean of -log p(x | measured) in nats."""
    z, log_det = inn(x, c=measured)
    log_normal = -0.5 * z.square().sum(dim=1) - 0.5 * CAUSES * math.log(2 * math.pi)
    return -(log_normal + log_det).mean()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # such small networks gain nothing from more
    mixing = torch.randn(MEASURED, CAUSES) / CAUSES**0.5
    inn = accelerate(build())  # the only new line
    print(str(report(inn)).splitlines()[0])

    optimizer = torch.optim.Adam(inn.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400)
    for _ in range(400):
        # Up to 1024 samples of 32 causes, 32768 elements, would run plain operations on a CPU.
        loss = negative_log_likelihood(inn, *simulate(mixing, 1536))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    # The causes of a measurement have a normal distribution, so that the best result is known.
    precision = torch.eye(CAUSES) + mixing.T @ mixing / NOISE**2
    best = 0.5 * (CAUSES * math.log(2 * math.pi * math.e) - torch.logdet(precision).item())
    x, measured = simulate(mixing, 20_000)
    with torch.no_grad():
        accelerated = negative_log_likelihood(inn, x, measured).item()
        condition = measured[:1].expand(20_000, -1)
        samples, _ = inn(torch.randn(20_000, CAUSES), c=condition, rev=True)
        stock = negative_log_likelihood(restore(inn), x, measured).item()
    print(f"after training: {accelerated:.2f} nats, {best:.2f} are the least possible")
    print(f"with FrEIA's own blocks the same weights give {stock:.2f} nats")

    exact = mixing @ torch.linalg.solve(precision, mixing.T @ measured[0] / NOISE**2)
    error = (samples @ mixing.T).mean(dim=0) - exact
    share = error.norm() / exact.norm()
    print(f"the samples' mean, mixed as in the measurement, is off by {share:.0%}")


if __name__ == "__main__":
    main()
