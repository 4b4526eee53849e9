"""Data-parallel training: every process has half of the data, and all get the same weights.

Two processes on one CPU: torchrun --standalone --nproc-per-node 2 docs/examples/distributed.py
"""

import os
import sys

import torch
import torch.distributed as dist
from FrEIA.framework import SequenceINN
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from fastflow_kernels import AllInOneBlock

CHANNELS = 8


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels_in, 32), nn.ReLU(), nn.Linear(32, channels_out))


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" for GPUs
    rank, processes = dist.get_rank(), dist.get_world_size()

    # The same data everywhere. The sampler deals them out.
    torch.manual_seed(0)
    data = TensorDataset(3 + 2 * torch.randn(1024, CHANNELS))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64, sampler=sampler)

    # Every process draws its own weights. DDP replaces them by those of rank 0.
    torch.manual_seed(rank)
    flow = SequenceINN(CHANNELS)
    for _ in range(4):
        flow.append(AllInOneBlock, subnet_constructor=subnet)
    model = DistributedDataParallel(flow)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for (x,) in loader:
            z, log_det = model(x)
            loss = (0.5 * z.square().sum(dim=1) - log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: loss of its last batch {loss.item():.2f}")

    weights = torch.cat([p.detach().flatten() for p in flow.parameters()])
    gathered = [torch.empty_like(weights) for _ in range(processes)]
    dist.all_gather(gathered, weights)
    if rank == 0:
        equal = all(torch.equal(weights, of_rank) for of_rank in gathered)
        print(f"{processes} processes hold {'equal' if equal else 'DIFFERENT'} weights")
    dist.destroy_process_group()
    # Python's shutdown sometimes aborts a finished gloo process, so leave without it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
