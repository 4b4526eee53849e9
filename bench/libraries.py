"""Time our block against what other flow libraries offer for the same flow, on a CPU.

    make libraries [LIBRARIES_ARGS="--record"]

:mod:`bench.library_chains` builds the chains. Each is checked before it is timed:

- Its inverse inverts it.
- Its log-determinant is that of its Jacobian.
- Its conditioners have as many parameters as those of the other chains.

Then all are timed in turn, in one process and one thread. A training step is the forward pass, the
negative log-likelihood of a standard normal and the backward pass. The likelihood is the same
function for all, and there is no optimizer. Sampling is the inverse without gradients. Rows have
the kind "library". Their ratio is the library's time divided by ours, the median over the rounds.
Times are CPU times of the process, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import records, timing
from bench.libraries_report import library_tables
from bench.library_chains import LIBRARIES, Chain, Size
from bench.machine import set_up_torch, version_of
from bench.records import Row

CPU = torch.device("cpu")
COUPLINGS = 8
SHAPES = ((4096, 64), (512, 512), (256, 8))
MODES = ("train", "inverse")
ROUNDS = (5, 200)  # the least and the most
CHECKED = Size(channels=6, couplings=4, width=5)  # small: its Jacobian is computed


def size_of(shape: tuple[int, int]) -> Size:
    """Return the size of the chain for inputs of a shape.

    The hidden layers are as wide as the input, but have at least 64 units.
    """
    return Size(shape[1], COUPLINGS, max(shape[1], 64))


# --- what is checked ------------------------------------------------------------------------------


def check_flow(name: str, chain: Chain, channels: int) -> None:
    """Assert that a chain's inverse inverts it, and that its log-determinant is the Jacobian's.

    Half of the digits must be right: rounding takes fewer, and a wrong formula changes the first
    ones. The parameters are changed for good, because their initial values may hide a fault.
    """
    generator = torch.Generator().manual_seed(0)
    chain.module.double()
    x = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    chain.to_latent(x)  # the first batch initialises ActNorm
    with torch.no_grad():
        for p in chain.module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    z, log_det = chain.to_latent(x)
    jacobians = torch.autograd.functional.jacobian(lambda x: chain.to_latent(x)[0].sum(0), x)
    exact = torch.linalg.slogdet(jacobians.transpose(0, 1)).logabsdet
    with torch.no_grad():
        _assert_half_the_digits(f"{name}: inverse(forward(x))", chain.to_data(z), x)
    _assert_half_the_digits(f"{name}: log-determinant", log_det, exact)


def _assert_half_the_digits(what: str, actual: Tensor, expected: Tensor) -> None:
    allowed = torch.finfo(actual.dtype).eps ** 0.5 * expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    if not error <= allowed:  # nan is not
        raise AssertionError(f"{what} is off by {error:.2g}, allowed {allowed:.2g}")


def check_conditioners(name: str, chain: Chain, size: Size) -> None:
    """Assert that the conditioners have as many parameters as those of every other chain.

    Where a coupling has two conditioners, each may differ by half a hidden unit.
    """
    expected = size.parameters()
    actual = sum(p.numel() for net in chain.conditioners for p in net.parameters())
    networks = LIBRARIES[name].networks
    allowed = 0.0 if networks == 1 else size.couplings * networks * 0.5 * (size.channels + 1)
    if abs(actual - expected) > allowed:
        raise AssertionError(
            f"{name}: the conditioners have {actual} parameters, expected {expected}"
        )


# --- what is timed --------------------------------------------------------------------------------


def negative_log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    """Return the mean over the batch, in nats and without the constant."""
    return (0.5 * z.square().sum(1) - log_det).mean()


class TimedChain:
    """A chain and its inputs: a :class:`bench.timing.Timeable`."""

    def __init__(self, chain: Chain, x: Tensor, z: Tensor) -> None:
        self.chain, self.x, self.z = chain, x, z
        self.parameters = [p for p in chain.module.parameters() if p.requires_grad]

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]:
        return [self.train if mode == "train" else self.sample] * calls

    def train(self) -> None:
        for p in self.parameters:
            p.grad = None
        negative_log_likelihood(*self.chain.to_latent(self.x)).backward()

    def sample(self) -> Tensor:
        with torch.no_grad():
            return self.chain.to_data(self.z)


def build_all(size: Size) -> tuple[dict[str, Chain], dict[str, str]]:
    """Return the chains by library, and the libraries that are not installed with a message."""
    chains, absent = {}, {}
    for name, library in LIBRARIES.items():
        torch.manual_seed(0)
        try:
            chains[name] = library.build(size)
        except ImportError as error:
            absent[name] = f"{name} was not measured ({error}). Run: make libraries"
    return chains, absent


def measure(shape: tuple[int, int], seconds: float) -> list[Row]:
    """Return a row for every mode and every library that is installed.

    Args:
        shape: (B, C) of the input.
        seconds: Time limit of one mode, which holds once it has the least rounds.
    """
    size = size_of(shape)
    chains, _ = build_all(size)
    for name, chain in chains.items():
        check_conditioners(name, chain, size)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(shape, generator=generator) for _ in range(2))
    timed = {name: TimedChain(chain, x, z) for name, chain in chains.items()}
    rows = []
    for mode in MODES:
        times = time_in_turn(timed, mode, seconds)
        rows += [_row(shape, mode, name, times) for name in timed]
    return rows


def time_in_turn(
    timed: Mapping[str, timing.Timeable], mode: str, seconds: float
) -> dict[str, list[float]]:
    """Return the CPU seconds of a call, one entry per round. Another chain begins each round."""
    began, names = time.perf_counter(), list(timed)
    calls = {
        name: timing.calls_in_a_row(chain, mode, CPU, timing.MOST_CALLS, timing.SPAN["cpu"])
        for name, chain in timed.items()
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    least, most = ROUNDS
    for done in range(most):
        if done >= least and time.perf_counter() - began > seconds:
            break
        for name in names:
            ready = timed[name].ready(mode, calls[name])
            times[name].append(timing.time_calls(ready, CPU, time.process_time))
        names = [*names[1:], names[0]]
    return times


def _row(shape: tuple[int, int], mode: str, name: str, times: Mapping[str, list[float]]) -> Row:
    own, ours = times[name], times["ours"]
    p20, *_, p80 = statistics.quantiles(own, n=5)
    distribution = LIBRARIES[name].distribution
    return {
        "kind": "library",
        "workload": f"{COUPLINGS} couplings",
        "shape": list(shape),
        "mode": mode,
        "dtype": "float32",
        "provider": name,
        "class": f"{distribution} {version_of(distribution.replace('_', '-'))}",
        "clock": "process_time",
        "median_us": statistics.median(own) * 1e6,
        "p20_us": p20 * 1e6,
        "p80_us": p80 * 1e6,
        "repeats": len(own),
        "ratio": statistics.median(a / b for a, b in zip(own, ours, strict=True)),
    }


def in_words(rows: Sequence[Row]) -> str:
    """Describe the rows of one shape and mode in a line."""
    first = rows[0]
    parts = [
        f"{row['provider']} {row['median_us'] * 1e-3:.2f} ms ({row['ratio']:.2f})" for row in rows
    ]
    return f"{'x'.join(map(str, first['shape']))} {first['mode']}: {', '.join(parts)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.libraries",
        description="Our block against other flow libraries.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of one shape and mode")
    parser.add_argument("--record", action="store_true", help="append the rows under bench/results")
    options = parser.parse_args(arguments)
    set_up_torch(threads=1)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {line}", file=sys.stderr, flush=True)

    chains, absent = build_all(CHECKED)
    for name, chain in chains.items():
        check_flow(name, chain, CHECKED.channels)
    say(f"correct flows: {', '.join(chains)}")
    rows = []
    for shape in SHAPES:
        measured = measure(shape, options.seconds)
        for mode in MODES:
            say(in_words([row for row in measured if row["mode"] == mode]))
        rows += measured
    rows = [row | records.provenance(CPU) for row in rows]
    if options.record:
        records.append(rows, records.RESULTS)
        say(f"{len(rows)} rows appended under {records.RESULTS.relative_to(records.ROOT)}")
    print("\n".join([*library_tables(rows), *absent.values()]))


if __name__ == "__main__":
    main()
