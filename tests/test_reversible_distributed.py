"""Reversible chains under DDP and FSDP2 on two gloo ranks.

They have the gradients of one process, and every parameter's hook fires once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastflow_kernels import AllInOneBlock, ReversibleSequence
from tests.support.cases import make_subnet
from tests.support.graph import nodes
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fused")

RANKS, BATCH, SHAPE = 2, 2, (6, 4, 4)
HOOKS = ["register_hook", "register_post_accumulate_grad_hook"]


def chain_of(depth: int = 4) -> ReversibleSequence:
    torch.manual_seed(0)
    chain = ReversibleSequence(*SHAPE)
    for _ in range(depth):
        chain.append(AllInOneBlock, subnet_constructor=make_subnet(2, 3.0))
    return chain.double()


def data() -> Tensor:
    return torch.randn(
        RANKS * BATCH, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def backward(model: nn.Module, x: Tensor) -> None:
    z, log_det = model(x)
    (z**3 + z.square()).flatten(1).sum(1).sub(log_det).mean().backward()


def expected(x: Tensor) -> dict[str, Tensor]:
    """Return the gradients in one process, of a chain that is not reversible."""
    chain = nn.Sequential(*chain_of())
    total = x.new_zeros(len(x))
    for block in chain:
        (x,), log_det = block([x])
        total = total + log_det
    (x**3 + x.square()).flatten(1).sum(1).sub(total).mean().backward()
    return {
        f"module_list.{name}": p.grad for name, p in chain.named_parameters() if p.grad is not None
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_hooks(model: nn.Module, register: str) -> Counter:
    """Count how often the parameters' hooks of one kind fire from now on."""
    fired: Counter = Counter()
    for name, p in trained(model).items():
        getattr(p, register)(lambda _, name=name: fired.update([name]))
    return fired


def check(model: nn.Module, truth: dict[str, Tensor], *hooks: Counter) -> None:
    """Check that the model holds these gradients.

    Every parameter's hooks must have fired once since the last check.
    """
    assert trained(model).keys() == truth.keys()
    for name, p in trained(model).items():
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(gradient, truth[name], rtol=1e-9, atol=1e-10, msg=name)
    for fired in hooks:
        assert fired == Counter(truth.keys())
        fired.clear()


def under_ddp(rank: int) -> None:
    chain = chain_of()
    hooks = [count_hooks(chain, kind) for kind in HOOKS]
    # Many buckets, so that some are sent while other blocks still compute.
    model = nn.parallel.DistributedDataParallel(chain, bucket_cap_mb=1e-3)
    own_batch = data()[rank * BATCH : (rank + 1) * BATCH]
    assert nodes(model(own_batch)[0])["_LinkedBlockBackward"] == len(chain)
    backward(model, own_batch)
    truth = expected(data())
    check(chain, truth, *hooks)
    chain.zero_grad()
    with model.no_sync():
        backward(model, own_batch)
    check(chain, expected(own_batch), *hooks)  # only this rank's gradients
    backward(model, own_batch)
    check(chain, {name: 2 * gradient for name, gradient in truth.items()}, *hooks)


def under_fsdp(rank: int) -> None:
    chain = chain_of()
    # FSDP2 shards the first dimension. These stay whole, so that the index can be read.
    for name in ("w_perm", "w_perm_inv"):
        for block in chain:
            assert not getattr(block, name).requires_grad
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for block in chain:
        kept = {block.w_perm, block.w_perm_inv}
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(
        chain,
        mesh=mesh,
        ignored_params={p for name, p in chain.named_parameters() if "w_perm" in name},
    )
    # A sharded parameter gets its gradient from FSDP2, which runs hooks of the second kind only;
    # autograd's see the whole parameters.
    hooks = [count_hooks(chain, "register_post_accumulate_grad_hook")]
    for block in chain:
        block.unshard()
    hooks.append(count_hooks(chain, "register_hook"))
    for block in chain:
        block.reshard()
    own_batch = data()[rank * BATCH : (rank + 1) * BATCH]
    for _ in range(2):
        chain.zero_grad()
        assert nodes(chain(own_batch)[0])["_LinkedBlockBackward"] == len(chain)
        backward(chain, own_batch)
        check(chain, expected(data()), *hooks)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_find_the_gradients_of_one_process(kind: str, tmp_path: Path) -> None:
    run_ranks({"ddp": under_ddp, "fsdp": under_fsdp}[kind], RANKS, tmp_path)
