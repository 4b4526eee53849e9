"""Reversible chains under DDP and FSDP2 on two gloo ranks: the gradients of one process, every parameter's hook fired once."""

from __future__ import annotations

import copy
import socket
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock, ReversibleSequence, dispatch
from tests.cases import make_subnet

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
RANKS, BATCH, SHAPE = 2, 2, (6, 4, 4)


def chain_of(depth: int = 4) -> ReversibleSequence:
    torch.manual_seed(0)
    chain = ReversibleSequence(*SHAPE)
    for _ in range(depth):
        chain.append(AllInOneBlock, subnet_constructor=make_subnet(2, 3.0))
    return chain.double()


def data() -> Tensor:
    return torch.randn(RANKS * BATCH, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def backward(model: nn.Module, x: Tensor) -> None:
    z, log_det = model(x)
    (z**3 + z.square()).flatten(1).sum(1).sub(log_det).mean().backward()


def expected() -> dict[str, Tensor]:
    """Gradients in one process, of a chain that is not reversible."""
    chain = nn.Sequential(*chain_of())
    x, total = data(), torch.zeros(RANKS * BATCH, dtype=torch.float64)
    for block in chain:
        (x,), log_det = block([x])
        total = total + log_det
    (x**3 + x.square()).flatten(1).sum(1).sub(total).mean().backward()
    return {f"module_list.{name}": p.grad for name, p in chain.named_parameters() if p.grad is not None}


def nodes(z: Tensor) -> Counter:
    seen, todo = set(), [z.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return Counter(type(node).__name__ for node in seen)


def count_hooks(model: nn.Module) -> Counter:
    fired: Counter = Counter()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda g, name=name: fired.update([name]))
    return fired


def check(found: dict[str, Tensor], fired: Counter) -> None:
    truth = expected()
    assert found.keys() == truth.keys()
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10)
    assert set(fired.values()) == {1}, fired


def under_ddp(rank: int) -> None:
    chain = chain_of()
    fired = count_hooks(chain)
    model = nn.parallel.DistributedDataParallel(chain, bucket_cap_mb=1e-3)  # many buckets: they leave while blocks behind still compute
    mine = data()[rank * BATCH : (rank + 1) * BATCH]
    assert nodes(model(mine)[0])["_BlockBackward"] == len(chain)
    backward(model, mine)
    check({name: p.grad for name, p in chain.named_parameters() if p.requires_grad}, fired)
    before = copy.deepcopy(chain.module_list[0].global_scale.grad)
    with model.no_sync():
        backward(model, mine)
    backward(model, mine)
    assert not torch.equal(before, chain.module_list[0].global_scale.grad)


def under_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    chain = chain_of()
    for name in ("w_perm", "w_perm_inv"):  # FSDP2 asks for a sharded first dimension; these stay whole for the index to be read
        for block in chain:
            assert not getattr(block, name).requires_grad
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in chain:
        kept = {block.w_perm, block.w_perm_inv}
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(chain, mesh=mesh, ignored_params={p for block in chain for p in (block.w_perm, block.w_perm_inv)})
    mine = data()[rank * BATCH : (rank + 1) * BATCH]
    for _ in range(2):
        chain.zero_grad()
        assert nodes(chain(mine)[0])["_BlockBackward"] == len(chain)
        backward(chain, mine)
    found = {name: p.grad.full_tensor() for name, p in chain.named_parameters() if p.requires_grad}
    check(found, Counter(none=1))


def work(rank: int, kind: str, port: int) -> None:
    torch.set_num_threads(1)
    dispatch.SMALL = 0
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        {"ddp": under_ddp, "fsdp": under_fsdp}[kind](rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_find_the_gradients_of_one_process(kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (kind, port), nprocs=RANKS)
