"""Measure training memory and time of chains as they get longer.

    python -m bench.reversible [--shape 2,256,32,32] [--depths 1,2,4] [--record]

Four chains take turns: a plain one, one with torch.utils.checkpoint, anomalib's blocks in FrEIA's
chain, and a reversible one. A step is a forward and a backward pass. The subnets are those of
anomalib's FastFlow, or fully connected ones for an input (B, C). Peak memory counts every tensor
that a step allocates, including the parameters' gradients. On a CPU it misses what an operation
allocates internally. Rows of kind "depth" are appended to the results, and the report draws them.
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
    """Build a provider's chain. All providers get the same weights."""
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
    """Return the most bytes that a step has allocated at a time, without what existed before."""
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
    """Return a row for every provider that is installed."""
    x, chains, steps = torch.randn(shape, device=device), {}, {}
    for provider in PROVIDERS:
        try:
            chains[provider] = chain = build(provider, shape, depth, device)
        except PeerMissing as missing:
            print(missing)
            continue
        steps[provider] = partial(step, chain, x)
        steps[provider]()  # warm up, and allocate every gradient
    assert_gradients_agree(chains)
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
        seconds, plain = times[provider], times["plain"]
        low, *_, high = statistics.quantiles(seconds, n=5) if repeats > 1 else seconds * 2
        figures = {
            "provider": provider,
            "class": type(next(iter(chain.children()))).__module__,
            "median_us": statistics.median(seconds) * 1e6,
            "p20_us": low * 1e6,
            "p80_us": high * 1e6,
            "times_plain": statistics.median(a / b for a, b in zip(seconds, plain, strict=True)),
            # What torch.utils.checkpoint keeps is not visible from outside.
            "kept_bytes": None
            if provider == "checkpoint"
            else bytes_kept_for_backward(chain, partial(loss_of, chain, x)),
            "peak_bytes": peak_bytes(steps[provider], device),
        }
        rows.append(shared | figures)
    return rows


def assert_gradients_agree(chains: dict[str, nn.Module]) -> None:
    """Assert that the gradients of all chains agree after one step, by their norms.

    The bound is as wide as float32 needs, because rounding flips single ReLU gates.
    """

    def gradients(chain: nn.Module) -> Tensor:
        by_name = sorted(
            (name, p.grad) for name, p in chain.named_parameters() if p.grad is not None
        )
        return torch.cat([grad.flatten() for _, grad in by_name])

    expected = gradients(chains["plain"])
    for name, chain in chains.items():
        error = (gradients(chain) - expected).norm() / expected.norm()
        if not error <= 1e-2:
            raise AssertionError(
                f"{name}: the gradients differ from the plain chain's by {error:.2g} of their "
                "norm, more than 0.01"
            )


def describe(row: records.Row) -> str:
    kept = "" if row["kept_bytes"] is None else f"kept {row['kept_bytes'] * 1e-6:,.1f} MB, "
    time = f"{row['median_us'] * 1e-3:,.0f} ms ({row['times_plain']:.2f}x plain)"
    return f"{row['provider']} {time}, {kept}peak {row['peak_bytes'] * 1e-6:,.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reversible",
        description="Measure training memory and time of chains as they get longer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, metavar, default, meaning in (
        ("shape", "B,C[,H,W]", "2,256,32,32", "shape of the input"),
        ("depths", "N,...", "1,2,4,8,16,32,64", "numbers of blocks"),
        ("repeats", "N", 5, "timed steps of every chain"),
        ("threads", "N", 1, "CPU threads"),
        ("device", "NAME", "cuda" if torch.cuda.is_available() else "cpu", "torch device"),
        ("out", "PATH", Path("out/bench"), "folder or .jsonl file to append the rows to"),
    ):
        parser.add_argument(
            f"--{name}", metavar=metavar, type=type(default), default=default, help=meaning
        )
    parser.add_argument(
        "--record", action="store_true", help="append the rows to bench/results, not to --out"
    )
    options = parser.parse_args(arguments)
    set_up_torch(options.threads)
    shape = tuple(int(n) for n in options.shape.split(","))
    for depth in (int(n) for n in options.depths.split(",")):
        rows = measure(shape, depth, options.repeats, options.device)
        records.append(rows, records.RESULTS if options.record else options.out)
        print(f"depth {depth}: " + "; ".join(map(describe, rows)), flush=True)


if __name__ == "__main__":
    main()
