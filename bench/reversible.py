"""Training memory and time against depth: a plain chain, torch.utils.checkpoint, anomalib's blocks
in FrEIA's chain, a reversible chain.

    python -m bench.reversible [--shape 2,256,32,32] [--depths 1,2,4] [--record]

Rows of kind "depth" are appended as those of the other benchmarks are, and drawn by the report. A
step is a forward and a backward pass with the subnets of anomalib's FastFlow (fully connected ones
for an input of rank 0). The chains are timed in turn. Peak memory counts every tensor that a step
allocates, parameters' gradients included. On a CPU the operations are watched, so that what they
allocate inside is not seen.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import records
from bench.fastflow import conv_subnet, linear_subnet
from bench.machine import set_up_torch
from bench.timing import time_calls
from fastflow_kernels import AllInOneBlock, ReversibleSequence
from tests.support.memory import Peak, bytes_kept_for_backward
from tests.support.peers import PeerMissing, anomalib_block, freia
from tests.support.plain_chain import Plain

PROVIDERS = ("plain", "checkpoint", "anomalib", "reversible")


class Checkpointed(Plain):
    """The same chain, each block under torch.utils.checkpoint."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        log_det = x.new_zeros(x.shape[0])
        for block in self:
            (x,), j = checkpoint(block, (x,), use_reentrant=False)
            log_det = log_det + j
        return x, log_det


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
            else linear_subnet(2.0),
        )
    return chain.to(device)


def loss_of(chain: nn.Module, x: Tensor) -> Tensor:
    z, log_det = chain(x)
    return (0.5 * z.square().flatten(1).sum(1) - log_det).mean()


def step(chain: nn.Module, x: Tensor) -> None:
    loss_of(chain, x).backward()


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


def measure(shape: tuple[int, ...], depth: int, repeats: int, device: str) -> list[records.Row]:
    """A row for every provider that is installed."""
    x, chains, steps = torch.randn(shape, device=device), {}, {}
    for provider in PROVIDERS:
        try:
            chains[provider] = chain = build(provider, shape, depth, device)
        except PeerMissing as missing:
            print(missing)
            continue
        steps[provider] = partial(step, chain, x)
        steps[provider]()  # warm up; and every gradient is there
    assert_alike(chains)
    times: dict[str, list[float]] = {provider: [] for provider in steps}
    for _ in range(repeats):
        for provider, call in steps.items():
            times[provider].append(time_calls([call], torch.device(device)))
    shared = {
        "kind": "depth",
        "workload": f"depth-{depth}",
        "shape": list(shape),
        "mode": "train",
        "dtype": "float32",
        "depth": depth,
        "repeats": repeats,
        **records.provenance(torch.device(device)),
    }
    rows = []
    for provider, chain in chains.items():
        mine, plain = times[provider], times["plain"]
        low, *_, high = statistics.quantiles(mine, n=5) if repeats > 1 else mine * 2
        figures = {
            "provider": provider,
            "class": type(next(iter(chain.children()))).__module__,
            "median_us": statistics.median(mine) * 1e6,
            "p20_us": low * 1e6,
            "p80_us": high * 1e6,
            "times_plain": statistics.median(a / b for a, b in zip(mine, plain, strict=True)),
            # what torch.utils.checkpoint keeps cannot be seen from outside
            "kept_bytes": None
            if provider == "checkpoint"
            else bytes_kept_for_backward(chain, partial(loss_of, chain, x)),
            "peak_bytes": peak_bytes(steps[provider], device),
        }
        rows.append(shared | figures)
    return rows


def assert_alike(chains: dict[str, nn.Module]) -> None:
    """After one step: the gradients of all chains agree, by their norms, as float32 can (single
    ReLU gates flip by rounding).
    """

    def gradients(chain: nn.Module) -> Tensor:
        found = sorted((name, p.grad) for name, p in chain.named_parameters() if p.grad is not None)
        return torch.cat([grad.flatten() for _, grad in found])

    exact = gradients(chains["plain"])
    for name, chain in chains.items():
        error = (gradients(chain) - exact).norm() / exact.norm()
        if not error <= 1e-2:
            raise AssertionError(f"{name}: the gradients are off by {error:.2g} of their norm")


def in_words(row: records.Row) -> str:
    kept = "" if row["kept_bytes"] is None else f"kept {row['kept_bytes'] * 1e-6:,.1f} MB, "
    time = f"{row['median_us'] * 1e-3:,.0f} ms ({row['times_plain']:.2f}x)"
    return f"{row['provider']} {time}, {kept}peak {row['peak_bytes'] * 1e-6:,.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reversible",
        description="Training memory and time against depth.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, meaning in (
        ("shape", "2,256,32,32", "of the input, (B, C) or (B, C, H, W)"),
        ("depths", "1,2,4,8,16,32,64", "numbers of blocks"),
        ("repeats", 5, "timed steps of every chain"),
        ("threads", 1, "CPU threads"),
        ("device", "cuda" if torch.cuda.is_available() else "cpu", "where"),
        ("out", Path("out/bench"), "where to append the rows without --record"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument("--record", action="store_true", help="append the rows under bench/results")
    options = parser.parse_args(arguments)
    set_up_torch(options.threads)
    shape = tuple(int(n) for n in options.shape.split(","))
    for depth in (int(n) for n in options.depths.split(",")):
        rows = measure(shape, depth, options.repeats, options.device)
        records.append(rows, records.RESULTS if options.record else options.out)
        print(f"depth {depth}: " + "; ".join(in_words(row) for row in rows), flush=True)


if __name__ == "__main__":
    main()
