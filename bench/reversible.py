"""Training memory and time against depth: a plain chain, torch.utils.checkpoint, anomalib's blocks
in FrEIA's chain, a reversible chain.

    python -m bench.reversible [--shape 2,256,32,32] [--depths 1,2,4] [--record]

Rows of kind "depth" are appended as those of the other benchmarks are (bench/records.py), and drawn
by bench.report. A step is a forward and a backward pass with the subnets of anomalib's FastFlow
(fully connected ones for an input of rank 0). The chains are timed in turn. Peak memory counts
every tensor that a step allocates, parameters' gradients included; on a CPU by watching the
operations, so that what they allocate within is not seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bench import records
from bench.fastflow import conv_subnet
from bench.memory import bytes_kept_for_backward
from bench.peers import PeerMissing, anomalib_block, freia
from fastflow_kernels import AllInOneBlock, ReversibleSequence

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
PROVIDERS = ("plain", "checkpoint", "anomalib", "reversible")


class Plain(ReversibleSequence):
    """The same chain as an ordinary one."""

    def _links(self, x: Any, c: Any) -> dict[int, Any]:
        return {}


class Checkpointed(Plain):
    """The same chain, each block under torch.utils.checkpoint."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = 0
        for block in self:
            (x,), j = checkpoint(block, (x,), use_reentrant=False)
            log_det = log_det + j
        return x, log_det


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, and the most that were alive at a
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def linear_subnet(channels_in: int, channels_out: int) -> nn.Module:
    """CFlow's subnet."""
    return nn.Sequential(
        nn.Linear(channels_in, 2 * channels_in), nn.ReLU(), nn.Linear(2 * channels_in, channels_out)
    )


def build(provider: str, shape: tuple[int, ...], depth: int, device: str) -> nn.Module:
    """A chain with the same weights for all providers."""
    torch.manual_seed(0)
    if provider == "anomalib":
        chain, block = freia().framework.SequenceINN(*shape[1:]), anomalib_block()
    else:
        kinds = {"plain": Plain, "checkpoint": Checkpointed, "reversible": ReversibleSequence}
        chain, block = kinds[provider](*shape[1:]), AllInOneBlock
    for i in range(depth):
        chain.append(
            block,
            subnet_constructor=conv_subnet(3 if i % 2 == 0 else 1)
            if len(shape) == 4
            else linear_subnet,
        )
    return chain.to(device)


def loss_of(chain: nn.Module, x: Tensor) -> Tensor:
    z, log_det = chain(x)
    return (0.5 * z.square().flatten(1).sum(1) - log_det).mean()


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most bytes that a step has allocated at a time, beside what was there before."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Peak() as peak:
        step()
    return peak.most


def seconds(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: tuple[int, ...], depth: int, repeats: int, device: str) -> list[records.Row]:
    """A row for every provider that is installed."""
    x, chains, steps = torch.randn(shape, device=device), {}, {}
    for provider in PROVIDERS:
        try:
            chains[provider] = chain = build(provider, shape, depth, device)
        except PeerMissing as missing:
            print(missing)
            continue
        steps[provider] = lambda chain=chain: loss_of(chain, x).backward()
        steps[provider]()  # warm up; and every gradient is there
    assert_alike(chains)
    times: dict[str, list[float]] = {provider: [] for provider in steps}
    for _ in range(repeats):
        for provider, step in steps.items():
            times[provider].append(seconds(step, device))
    provenance = records.provenance(torch.device(device))
    rows = []
    for provider, chain in chains.items():
        low, *_, high = (
            statistics.quantiles(times[provider], n=5) if repeats > 1 else times[provider] * 2
        )
        ratios = [mine / plain for mine, plain in zip(times[provider], times["plain"], strict=True)]
        figures = {
            "median_us": statistics.median(times[provider]) * 1e6,
            "p20_us": low * 1e6,
            "p80_us": high * 1e6,
            "repeats": repeats,
            "times_plain": statistics.median(ratios),
            # what torch.utils.checkpoint keeps cannot be seen from outside
            "kept_bytes": None
            if provider == "checkpoint"
            else bytes_kept_for_backward(chain, lambda chain=chain: loss_of(chain, x)),
            "peak_bytes": peak_bytes(steps[provider], device),
        }
        identity = {
            "kind": "depth",
            "workload": f"depth-{depth}",
            "shape": list(shape),
            "mode": "train",
            "dtype": "float32",
        }
        rows.append(
            {
                **identity,
                "depth": depth,
                "provider": provider,
                "class": type(chain[0]).__module__,
                **figures,
                **provenance,
            }
        )
    return rows


def assert_alike(chains: dict[str, nn.Module]) -> None:
    """After one step: the gradients of all chains agree, by their norms, as float32 can (single
    ReLU gates flip by rounding).
    """
    found = {
        name: {key: p.grad for key, p in chain.named_parameters() if p.grad is not None}
        for name, chain in chains.items()
    }
    for name, gradients in found.items():
        square = sum(
            (gradients[key] - exact).square().sum() for key, exact in found["plain"].items()
        )
        total = sum(exact.square().sum() for exact in found["plain"].values())
        if not square <= 1e-4 * total:
            raise AssertionError(
                f"{name}: the gradients are off by {(square / total).sqrt():.2g} of their norm"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reversible", description="Training memory and time against depth."
    )
    parser.add_argument(
        "--shape",
        default="2,256,32,32",
        help="of the input, (B, C) or (B, C, H, W) (default: 2,256,32,32)",
    )
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="numbers of blocks")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps of every chain (default: 5)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="append the rows under bench/results")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench"),
        help="where to append the rows without --record",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shape = tuple(int(n) for n in options.shape.split(","))
    for depth in (int(n) for n in options.depths.split(",")):
        rows = measure(shape, depth, options.repeats, options.device)
        records.append(rows, records.RESULTS if options.record else options.out)
        print(f"depth {depth}: " + "; ".join(in_words(row) for row in rows), flush=True)


def in_words(row: records.Row) -> str:
    kept = "" if row["kept_bytes"] is None else f"kept {row['kept_bytes'] * 1e-6:,.1f} MB, "
    return f"{row['provider']} {row['median_us'] * 1e-3:,.0f} ms ({row['times_plain']:.2f}x), {kept}peak {row['peak_bytes'] * 1e-6:,.1f} MB"


if __name__ == "__main__":
    main()
