"""Time anomalib's FastFlow from PyPI, stock, accelerated, and its subnets alone.

    make ecosystem  # once: it makes the environment
    .venv-ecosystem/bin/python -m bench.ecosystem [--backbones resnet18] [--rounds 20] [--record]

The flow part of the model is timed on one CPU thread, with the features of an image as its input:

- stock: anomalib's chains.
- ours: a copy of them, accelerated.
- subnets: the subnets of the blocks, each on a contiguous half of the features. A chain whose
  blocks cost nothing but their subnets would take this time.

Inference is the forward pass without gradients. A training step is the forward pass, anomalib's
loss and the backward pass. For the subnets alone, stored gradients of their outputs replace the
loss. Results of ours and of stock are compared first, and nothing is timed if they disagree. Then
all take turns. Times are CPU times of the process, so that other work on the machine counts less.

Rows have the kind "ecosystem". Their speedup is stock's time divided by the row's own. "closed" is
the share of the distance from stock to the subnets alone: (stock - own) / (stock - subnets).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import records
from bench.cells import grouped, number, table
from bench.machine import set_up_torch, version_of
from bench.records import Row
from bench.timing import Timeable, time_calls
from tests.support import peers
from tests.support.anomalib_flows import CHANNELS, Flows, stock_and_ours
from tests.support.compare import assert_close

CPU = torch.device("cpu")
MODES = ("inference", "train")
# Rounding may flip so many ReLU gates of a subnet. See assert_same_gradients.
MOST_FLIPS = 4
BOUNDS = ("stock", "subnets")  # of the distance that "closed" is a share of

Results = tuple[list[Tensor], list[Tensor]]


def loss_of(results: Results) -> Tensor:
    """Return anomalib's loss of the outputs and log-determinants of all chains."""
    from anomalib.models.image.fastflow.loss import FastflowLoss

    return FastflowLoss()(*results)


# --- what is checked ------------------------------------------------------------------------------


def assert_same(
    stock: Flows, ours: Flows, features: Sequence[Tensor], truth: Results, mode: str
) -> None:
    """Assert that ours computes in float32 what stock computes.

    Args:
        stock: The stock model.
        ours: The accelerated copy.
        features: The inputs of the chains.
        truth: The results of the stock model in float64.
        mode: "inference", or "train" to compare the gradients as well.

    Raises:
        AssertionError: If a result of ours is further from the truth than rounding explains.
    """
    with torch.set_grad_enabled(mode == "train"):
        actual, expected = ours(*features), stock(*features)
    for k, x in enumerate(features):
        name = f"ours, {mode}, chain {k}"
        assert_close(actual[0][k], truth[0][k], expected[0][k], f"{name}: output")
        # A log-determinant is a sum with a term for each element, and the terms cancel.
        assert_close(
            actual[1][k],
            truth[1][k],
            expected[1][k],
            f"{name}: log-determinant",
            magnitude=float(x[0].numel()),
        )
    if mode == "train":
        for flows, results in ((stock, expected), (ours, actual)):
            flows.zero_grad(set_to_none=True)
            loss_of(results).backward()
        assert_same_gradients(stock, ours, features)


def assert_same_gradients(stock: Flows, ours: Flows, features: Sequence[Tensor]) -> None:
    """Assert that the parameters of both models have the same gradients, by their norms.

    Rounding flips single ReLU gates. A gradient is a sum over the gates of a hidden layer, with
    terms of both signs. One of N gates therefore changes it by about 1 / sqrt(N) of its norm.
    """
    for k, x in enumerate(features):
        gates = x.numel() // 2  # a hidden layer is as wide as half of the channels
        allowed = MOST_FLIPS / gates**0.5
        actual_by_name = dict(ours.flows[k].named_parameters())
        for name, parameter in stock.flows[k].named_parameters():
            expected, actual = parameter.grad, actual_by_name[name].grad
            if (actual is None) != (expected is None):
                raise AssertionError(f"ours, train, chain {k}: only one has a gradient of {name}")
            if expected is None or actual is None:
                continue
            error = (actual - expected).norm() / expected.norm()
            if not error <= allowed:  # nan is not
                raise AssertionError(
                    f"ours, train, chain {k}: the gradient of {name} differs from stock's by "
                    f"{error:.2g} of its norm, allowed {allowed:.2g}"
                )


# --- what is timed --------------------------------------------------------------------------------


class TimedFlows:
    """All chains of a model and their inputs: a :class:`bench.timing.Timeable`."""

    def __init__(self, flows: Flows, features: Sequence[Tensor]) -> None:
        self.flows, self.features = flows, features

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]:
        return [self.train if mode == "train" else self.infer] * calls

    def infer(self) -> None:
        with torch.no_grad():
            self.flows(*self.features)

    def train(self) -> None:
        self.flows.zero_grad(set_to_none=True)
        loss_of(self.flows(*self.features)).backward()


class TimedSubnets:
    """The subnets of all blocks, and halves of the features: a :class:`bench.timing.Timeable`.

    Inside a chain the input of a subnet requires a gradient, except for the first block's.
    """

    def __init__(self, flows: Flows, features: Sequence[Tensor]) -> None:
        self.flows = flows
        chains: Any = flows.flows
        self.subnets = [[block.subnet for block in chain.module_list] for chain in chains]
        self.halves = [x[:, : x.shape[1] // 2].contiguous() for x in features]
        self.output_gradients = [torch.randn_like(x) for x in features]

    def ready(self, mode: str, calls: int) -> list[Callable[[], Any]]:
        return [self.train if mode == "train" else self.infer] * calls

    def infer(self) -> None:
        with torch.no_grad():
            for chain, half in zip(self.subnets, self.halves, strict=True):
                for subnet in chain:
                    subnet(half)

    def train(self) -> None:
        self.flows.zero_grad(set_to_none=True)
        outputs, gradients = [], []
        inputs = zip(self.subnets, self.halves, self.output_gradients, strict=True)
        for chain, half, gradient in inputs:
            for k, subnet in enumerate(chain):
                outputs.append(subnet(half.detach().requires_grad_(k > 0)))
                gradients.append(gradient)
        torch.autograd.backward(outputs, gradients)


def time_in_turn(timed: Mapping[str, Timeable], mode: str, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of a call, one entry per round. Another subject begins each round."""
    for subject in timed.values():  # warm up
        time_calls(subject.ready(mode, 2), CPU)
    names = list(timed)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(time_calls(timed[name].ready(mode, 1), CPU, time.process_time))
        names = [*names[1:], names[0]]
    return times


def measure(
    backbone: str, modes: Sequence[str], rounds: int, batch: int = 1, image: int = 256
) -> list[Row]:
    """Compare the results of both models, then return a row for every mode and subject.

    Args:
        backbone: A key of :data:`tests.support.anomalib_flows.CHANNELS`.
        modes: Some of :data:`MODES`.
        rounds: How often each subject is timed, at least 2.
        batch: Number of images.
        image: Height and width of an image in pixels.

    Raises:
        AssertionError: If ours does not compute what stock does.
    """
    stock, ours = stock_and_ours(backbone, image)
    features = stock.features(batch)
    with torch.no_grad():
        truth = copy.deepcopy(stock).double()(*(x.double() for x in features))
    timed: dict[str, Timeable] = {
        "stock": TimedFlows(stock, features),
        "ours": TimedFlows(ours, features),
        "subnets": TimedSubnets(stock, features),
    }
    shared = {
        "kind": "ecosystem",
        "workload": f"anomalib FastFlow, {backbone}",
        "shape": [batch, 3, image, image],
        "dtype": "float32",
        "clock": "process_time",
        "anomalib": version_of("anomalib"),
        **records.provenance(CPU),
    }
    rows = []
    for mode in modes:
        assert_same(stock, ours, features, truth, mode)
        times = time_in_turn(timed, mode, rounds)
        rows += [shared | {"mode": mode} | _figures(name, times) for name in timed]
    return rows


def _figures(name: str, times: Mapping[str, list[float]]) -> Row:
    """Return a subject's times and what follows from them. Both are medians over the rounds."""
    own, medians = times[name], {key: statistics.median(times[key]) for key in (name, *BOUNDS)}
    speedups = [a / b for a, b in zip(times["stock"], own, strict=True)]
    stock, subnets = (medians[key] for key in BOUNDS)
    return {
        "provider": name,
        **_spread("{}_us", [1e6 * seconds for seconds in own]),
        **_spread("speedup_{}", speedups),
        "closed": None if name in BOUNDS else (stock - medians[name]) / (stock - subnets),
        "repeats": len(own),
    }


def _spread(form: str, values: Sequence[float]) -> dict[str, float]:
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    figures = {"median": statistics.median(values), "p20": p20, "p80": p80}
    return {form.format(name): value for name, value in figures.items()}


# --- what is shown --------------------------------------------------------------------------------


def ecosystem_tables(rows: Sequence[Row]) -> list[str]:
    """Return a line per backbone and mode, under a heading.

    Args:
        rows: The rows of one device and dtype. Those of other kinds are left out.

    Returns:
        Lines of Markdown, none if there is nothing to show.
    """
    rows = [row for row in rows if row["kind"] == "ecosystem"]
    if not rows:
        return []
    providers = dict.fromkeys(row["provider"] for row in rows)
    # The report has sorted the rows: stock goes first, and the subnets last.
    names = sorted(providers, key=lambda name: (name != "stock", name == "subnets"))
    heads = ["model", "input", "mode", *(f"{name}, ms" for name in names)]
    for name in names[1:]:
        heads += [f"stock / {name}", "p20", "p80"] + [f"closed by {name}"] * (name not in BOUNDS)
    lines = []
    for (workload, shape, mode), group in grouped(rows, _case):
        by_name = {row["provider"]: row for row in group}
        cells = [workload, shape, mode]
        cells += [number(by_name.get(name), "median_us", "{:,.1f}", 1e-3) for name in names]
        for name in names[1:]:
            row = by_name.get(name)
            cells += [number(row, f"speedup_{key}", "{:.3f}") for key in ("median", "p20", "p80")]
            cells += [number(row, "closed", "{:.0%}")] * (name not in BOUNDS)
        lines.append(cells)
    return [
        "### anomalib's FastFlow against its subnets alone",
        "",
        "CPU times of the flow part. A ratio is the median of the rounds, p20 and p80 are their "
        'percentiles. "closed" is (stock - ours) / (stock - subnets), of the medians.',
        "",
        *table(heads, lines, texts=3),
        "",
    ]


def _case(row: Row) -> tuple[str, str, str]:
    return row["workload"], "x".join(map(str, row["shape"])), row["mode"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ecosystem",
        description="Time anomalib's FastFlow: stock, accelerated, and its subnets alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, known in (("backbones", tuple(CHANNELS)), ("modes", MODES)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), help=f"{name} to time"
        )
    for name, default, meaning in (
        ("rounds", 20, "timed calls of each subject, at least 2"),
        ("batch", 1, "number of images"),
        ("image", 256, "height and width of an image in pixels"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=meaning)
    parser.add_argument("--record", action="store_true", help="append the rows under bench/results")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    peers.prepare_torchvision()
    set_up_torch(threads=1)
    rows: list[Row] = []
    for backbone in options.backbones:
        rows += measure(backbone, options.modes, options.rounds, options.batch, options.image)
    if options.record:
        records.append(rows, records.RESULTS)
    print("\n".join(ecosystem_tables(rows)))


if __name__ == "__main__":
    main()
