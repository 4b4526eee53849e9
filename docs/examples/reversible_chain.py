"""64 blocks: what a training step keeps in memory, in a plain chain and in a reversible one."""

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock, ReversibleSequence

BLOCKS = 64
CHANNELS = 64


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels_in, 64), nn.ReLU(), nn.Linear(64, channels_out))


def build(chain_class: type) -> nn.Module:
    chain = chain_class(CHANNELS)
    for _ in range(BLOCKS):
        chain.append(AllInOneBlock, subnet_constructor=subnet)
    return chain


def training_step(chain: nn.Module, x: Tensor) -> int:
    """Fill the parameters' gradients and return the bytes kept for the backward pass."""
    # The hook sees every tensor that autograd saves. Views share memory, which counts once.
    # On a GPU, torch.cuda.max_memory_allocated() tells the peak instead.
    kept = {}
    parameters = {p.data_ptr() for p in chain.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        z, log_det = chain(x)
        loss = (0.5 * z.square().sum(dim=1) - log_det).mean()
    loss.backward()
    return sum(kept.values())


def main() -> None:
    torch.manual_seed(0)
    reversible = build(ReversibleSequence)
    plain = build(SequenceINN)
    plain.load_state_dict(reversible.state_dict())  # both have the same names and shapes

    x = torch.randn(4096, CHANNELS)
    print(f"{BLOCKS} blocks, the input takes {x.nbytes / 2**20:.1f} MB")
    print(f"plain chain: keeps {training_step(plain, x) / 2**20:.1f} MB")
    print(f"reversible chain: keeps {training_step(reversible, x) / 2**20:.1f} MB")

    difference = norm = 0.0
    for p, q in zip(plain.parameters(), reversible.parameters(), strict=True):
        if p.grad is not None:
            difference += (p.grad - q.grad).square().sum().item()
            norm += p.grad.square().sum().item()
    print(f"gradients differ by {(difference / norm) ** 0.5:.1e} of their norm")


if __name__ == "__main__":
    main()
