"""The demo: a real anomaly detector trained on real photographs, with the stock maths and with this
package side by side.

Run ``python -m bench.texture_demo`` (a minute or two on two CPU cores) or ``python -m
bench.texture_demo --short`` (seconds). For each texture the same FastFlow is trained from the same
weights on the same batches with each block, one step of each in turn, so that a busy machine slows
both alike. A third run, stock again, gets its input changed by one rounding error per value: how
far it strays from the first is how far rounding alone carries a training run, and so the measure of
how far ours may stray.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastflow_kernels
import reference
from bench.fastflow import (
    ReversibleFlow,
    SequenceFlow,
    anomaly_map,
    fastflow,
    negative_log_likelihood,
)
from bench.features import CHANNELS, STRIDE, filter_bank, standardise
from bench.machine import describe_machine
from bench.memory import bytes_kept_for_backward
from bench.texture_picture import save_picture
from bench.textures import (
    CROP,
    DEFECTS,
    TEXTURES,
    Example,
    load_photograph,
    test_examples,
    training_crops,
)

FLOW_STEPS = 8
SHAPE = (CHANNELS, CROP // STRIDE, CROP // STRIDE)
BATCH = 4
LEARNING_RATE = 1e-3  # this and the weight decay as in anomalib's FastFlow
WEIGHT_DECAY = 1e-5
GRADIENT_NORM = 1.0
WARM_UP = 3  # first steps left out of the timing: they fill caches and allocate
CHANCE = 0.5
CLEARLY_ABOVE_CHANCE = 0.7

STOCK = {
    "reference": "reference.AllInOneBlock: anomalib's maths in plain PyTorch, but without its dense matrix product to permute",
    "anomalib": "anomalib 2.7.0's own AllInOneBlock",
}

EPS = torch.finfo(torch.float32).eps
# places where the two may round differently: exp(s), the coupling, the affine, the log-det, in each
# block
ROUNDINGS = 4 * FLOW_STEPS


@dataclass
class Run:
    """One training of the flow.

    Attributes:
        model: The flow.
        nudge: Relative size of a random error put on every input value; 0 for none.
        losses: Loss of each step, nats per dimension.
        seconds: Duration of each step: forward, backward and the optimizer's update.
    """

    model: SequenceFlow
    nudge: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    def step(self, batch: Tensor, signs: Tensor) -> None:
        """Train on one batch; ``signs`` are the random signs of the nudge."""
        if self.nudge:
            batch = batch * (1 + self.nudge * signs)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = negative_log_likelihood(*self.model(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


@dataclass
class Task:
    """The data of one texture: standardised features of the training crops, of the test crops, and
    the test crops themselves.
    """

    name: str
    train: Tensor
    test: Tensor
    examples: list[Example]

    @property
    def masks(self) -> Tensor:
        """Where the defects are, (B, CROP, CROP) bool."""
        return torch.from_numpy(np.stack([e.mask for e in self.examples]))


@dataclass
class Result:
    """What came out for one texture.

    Attributes:
        task: The texture's data.
        runs: The trained runs: ``"stock"``, ``"ours"`` and ``"nudged"``.
        maps: The test crops' heat maps (B, CROP, CROP) of ``"stock"``, ``"ours"`` and ``"same
            weights"`` (ours, with stock's weights).
    """

    task: Task
    runs: dict[str, Run]
    maps: dict[str, Tensor]

    def difference(self, name: str) -> list[float]:
        """Distance of a run's loss from stock's at every step."""
        return [
            abs(a - b)
            for a, b in zip(self.runs[name].losses, self.runs["stock"].losses, strict=True)
        ]

    def auroc(self, name: str) -> float:
        """Pixel AUROC of a run's heat maps."""
        return pixel_auroc(self.maps[name], self.task.masks)

    def map_difference(self, name: str) -> float:
        """Largest distance of a heat map from stock's."""
        return (self.maps[name] - self.maps["stock"]).abs().max().item()


def prepare(
    name: str, photographs: dict[str, np.ndarray], crops: int, per_kind: int, seed: int
) -> Task:
    """Cut and paint the crops of one texture and compute their features, standardised by the
    training crops' statistics.
    """
    rng = np.random.default_rng([seed, TEXTURES.index(name)])
    train = torch.cat(
        [filter_bank(batch) for batch in training_crops(photographs[name], crops, rng).split(16)]
    )
    mean, std = train.mean(dim=(0, 2, 3)), train.std(dim=(0, 2, 3))
    examples = test_examples(name, photographs, per_kind, rng)
    test = filter_bank(torch.from_numpy(np.stack([e.image for e in examples])))
    return Task(name, standardise(train, mean, std), standardise(test, mean, std), examples)


def stock_block(name: str) -> Callable[..., nn.Module]:
    """The block to compare with: ``"reference"``, or ``"anomalib"``, the real one, which has to be
    installed.

    Raises:
        bench.peers.PeerMissing: If anomalib or FrEIA, which it builds on, is not installed; it says
        how to.
    """
    if name == "anomalib":
        from bench import peers

        return peers.anomalib_block()
    return partial(reference.AllInOneBlock, dialect="anomalib")


def our_block() -> Callable[..., nn.Module]:
    """This package's block, with anomalib's formula."""
    return partial(fastflow_kernels.AllInOneBlock, dialect="anomalib")


def equal_runs(
    stock: Callable[..., nn.Module], seed: int, reversible: bool = False
) -> dict[str, Run]:
    """Build the three runs with equal weights: stock, ours (perhaps as a reversible chain), and
    stock with nudged inputs.
    """
    torch.manual_seed(seed)
    blocks = {"stock": stock, "ours": our_block(), "nudged": stock}
    flows = {"ours": ReversibleFlow} if reversible else {}
    runs = {
        name: Run(fastflow(block, SHAPE, FLOW_STEPS, flows.get(name, SequenceFlow)))
        for name, block in blocks.items()
    }
    for name in ("ours", "nudged"):
        runs[name].model.load_state_dict(runs["stock"].model.state_dict(), strict=True)
    runs["nudged"].nudge = EPS
    return runs


def train(task: Task, runs: dict[str, Run], steps: int, seed: int, bar: tqdm) -> None:
    """Train the runs in turns, each step on the same batch, each time starting with another run so
    that none always finds warm caches.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(runs)
    for i in range(steps):
        batch = task.train[torch.randperm(len(task.train), generator=generator)[:BATCH]]
        signs = torch.randint(0, 2, batch.shape, generator=generator) * 2.0 - 1
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runs[name].step(batch, signs)
        bar.set_postfix_str(
            f"{task.name}: loss stock {runs['stock'].losses[-1]:+.4f}, ours "
            f"{runs['ours'].losses[-1]:+.4f}"
        )
        bar.update()


@torch.no_grad()
def heat_maps(model: SequenceFlow, features: Tensor) -> Tensor:
    """Heat maps (B, CROP, CROP) of features, computed a few images at a time."""
    return torch.cat(
        [anomaly_map(model(batch)[0], (CROP, CROP)) for batch in features.split(BATCH)]
    )


def evaluate(task: Task, runs: dict[str, Run]) -> Result:
    """Compute the heat maps of the test crops: of both runs, and of our block with the weights that
    the stock block was trained to.
    """
    maps = {name: heat_maps(runs[name].model, task.test) for name in ("stock", "ours")}
    exchanged = fastflow(our_block(), SHAPE, FLOW_STEPS)
    exchanged.load_state_dict(runs["stock"].model.state_dict(), strict=True)
    maps["same weights"] = heat_maps(exchanged, task.test)
    return Result(task, runs, maps)


def pixel_auroc(scores: Tensor, masks: Tensor) -> float:
    """The chance that a pixel of a defect scores higher than one outside, ties counting half
    (Mann-Whitney), over all pixels given.
    """
    _, inverse, counts = scores.flatten().unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    defect = masks.flatten()
    positives = int(defect.sum())
    negatives = defect.numel() - positives
    rank_sum = mean_rank[inverse[defect]].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def kept_bytes(runs: dict[str, Run], batch: Tensor) -> dict[str, dict[str, int]]:
    """Bytes kept for backward by stock and ours: of the whole flow, and with the subnets' own left
    out.
    """
    kept = {}
    for name in ("stock", "ours"):
        model = runs[name].model

        def forward(model: SequenceFlow = model) -> Tensor:
            return negative_log_likelihood(*model(batch))

        kept[name] = {
            "whole": bytes_kept_for_backward(model, forward),
            "blocks": bytes_kept_for_backward(model, forward, leave_out=model.subnets()),
        }
    return kept


def loss_bound(result: Result) -> list[float]:
    """How far ours may be from stock after each step if nothing but rounding sets them apart.

    Training amplifies rounding errors, so no fixed number can be the bound; the nudged run measures
    the amplification. Its nudge is one rounding error per value and step. Two implementations
    differ by up to ROUNDINGS such errors per value and step, independent of each other, so
    sqrt(ROUNDINGS) times as much; three times that is allowed, on the largest distance that the
    nudged run has had so far. In the first steps the nudge may happen to cancel in the loss, hence
    the second term: ROUNDINGS errors of one eps, all of the same sign, of a loss whose two terms
    (0.5 * z^2, about 0.5, and the log-det, about 0.5 - loss) are about 1 + |loss| together.
    """
    bounds, strayed = [], 0.0
    for nudged, loss in zip(result.difference("nudged"), result.runs["stock"].losses, strict=True):
        strayed = max(strayed, nudged)
        bounds.append(3 * math.sqrt(ROUNDINGS) * strayed + ROUNDINGS * EPS * (1 + abs(loss)))
    return bounds


def failures(results: list[Result], overall: dict[str, float], short: bool) -> list[str]:
    """What is wrong with the results, in words for the user; empty if nothing is."""
    found = []
    for result in results:
        name = result.task.name
        if not all(math.isfinite(loss) for run in result.runs.values() for loss in run.losses):
            found.append(
                f"{name}: a loss is not finite. If only ours is not, this package is wrong here: "
                "run `make test`. "
                "If stock's is not either, the training is unstable: try another --seed."
            )
            continue
        for step, (difference, bound) in enumerate(
            zip(result.difference("ours"), loss_bound(result), strict=True), start=1
        ):
            if difference > bound:
                found.append(
                    f"{name}: at step {step} the losses differ by {difference:.1e}, but float32 "
                    f"rounding explains only {bound:.1e} "
                    "(by a stock run nudged by one rounding error). The blocks do not compute the "
                    "same: run `make test`, it says where."
                )
                break
    for name, auroc in overall.items():
        if not short and not auroc > CLEARLY_ABOVE_CHANCE:
            found.append(
                f"the pixel AUROC of {name} is {auroc:.3f}, not clearly above chance ({CHANCE}): "
                "the detector has not learnt. "
                "Train longer (--steps) or try another --seed; if only ours is low, run `make "
                "test`."
            )
    return found


def summarise(
    results: list[Result], kept: dict[str, dict[str, int]], settings: dict[str, object]
) -> dict[str, object]:
    """Gather the numbers of the whole demo, as they go into the JSON file."""
    warm = slice(min(WARM_UP, settings["steps"] // 2), None)
    seconds = {
        name: [s for r in results for s in r.runs[name].seconds[warm]] for name in ("stock", "ours")
    }
    masks = torch.cat([r.task.masks for r in results])
    return {
        "machine": describe_machine(),
        "settings": settings,
        "seconds_per_step": {name: statistics.median(times) for name, times in seconds.items()},
        "step_time_ratio": statistics.median(
            a / b for a, b in zip(seconds["stock"], seconds["ours"], strict=True)
        ),
        "bytes_kept_for_backward": kept,
        "pixel_auroc": {
            name: pixel_auroc(torch.cat([r.maps[name] for r in results]), masks)
            for name in ("stock", "ours")
        },
        "textures": {r.task.name: _summarise_texture(r) for r in results},
    }


def _summarise_texture(result: Result) -> dict[str, object]:
    difference, bound = result.difference("ours"), loss_bound(result)
    return {
        "loss": {
            name: {"first": run.losses[0], "last": run.losses[-1]}
            for name, run in result.runs.items()
        },
        "loss_difference": {"first": difference[0], "last": difference[-1], "max": max(difference)},
        "loss_difference_stock_nudged_by_one_rounding": max(result.difference("nudged")),
        "largest_share_of_bound": max(d / b for d, b in zip(difference, bound, strict=True)),
        "pixel_auroc": {name: result.auroc(name) for name in ("stock", "ours")},
        "heat_map_difference": {
            "trained_apart": result.map_difference("ours"),
            "same_weights": result.map_difference("same weights"),
        },
    }


def table(numbers: dict) -> str:
    """The table at the end."""
    textures = numbers["textures"]
    times, kept = numbers["seconds_per_step"], numbers["bytes_kept_for_backward"]
    lines = ["", f"{'':40}{'stock':>11}{'ours':>11}{'stock / ours':>15}"]
    lines.append(
        _cost_row(
            "time per training step, median",
            "ms",
            1e3,
            times["stock"],
            times["ours"],
            numbers["step_time_ratio"],
        )
    )
    for key, label in (
        ("whole", "kept for backward, whole model"),
        ("blocks", "kept for backward, subnets left out"),
    ):
        stock, ours = kept["stock"][key], kept["ours"][key]
        lines.append(_cost_row(label, "MB", 1e-6, stock, ours, stock / ours))
    for name, loss in [(name, t["loss"]) for name, t in textures.items()]:
        lines.append(
            f"{'loss at the end (nats per dim), ' + name:40}{loss['stock']['last']:>+11.5f}{loss['ours']['last']:>+11.5f}"
        )
    for name, auroc in [(name, t["pixel_auroc"]) for name, t in textures.items()] + [
        ("all test pixels", numbers["pixel_auroc"])
    ]:
        lines.append(f"{'pixel AUROC, ' + name:40}{auroc['stock']:>11.4f}{auroc['ours']:>11.4f}")
    lines += [
        "",
        f"{'differences between stock and ours':40}" + "".join(f"{name:>11}" for name in textures),
    ]
    rows = {
        "loss, first step": lambda t: t["loss_difference"]["first"],
        "loss, last step": lambda t: t["loss_difference"]["last"],
        "loss, largest of all steps": lambda t: t["loss_difference"]["max"],
        "  for scale: stock against itself (*)": lambda t: t[
            "loss_difference_stock_nudged_by_one_rounding"
        ],
        "heat map, largest, trained apart": lambda t: t["heat_map_difference"]["trained_apart"],
        "heat map, largest, same weights (**)": lambda t: t["heat_map_difference"]["same_weights"],
    }
    lines += [
        f"{label:40}" + "".join(f"{value(t):>11.1e}" for t in textures.values())
        for label, value in rows.items()
    ]
    lines += [
        " (*) the stock block trained twice, the second time with every input value off by one "
        "float32 rounding error",
        "(**) the weights trained with the stock block, loaded into ours; heat maps run from -1 to "
        "0",
    ]
    return "\n".join(lines)


def _cost_row(label: str, unit: str, factor: float, stock: float, ours: float, ratio: float) -> str:
    return f"{label:40}{stock * factor:>8.1f} {unit}{ours * factor:>8.1f} {unit}{ratio:>14.2f}x"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.texture_demo",
        description="Train FastFlow on photographs, with the stock maths and with fastflow_kernels.",
    )
    parser.add_argument(
        "--short", action="store_true", help="a few steps only: shows that it works, in seconds"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="folder for picture and numbers (default: out)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="training steps per texture (default: 60, or 5 with --short)",
    )
    parser.add_argument(
        "--stock",
        choices=STOCK,
        default="anomalib",
        help="the block to compare with (default: anomalib's own; it has to be installed)",
    )
    parser.add_argument(
        # On a machine with other work, OpenMP threads wait for the one that lost its core at every
        # operation: measured on 2 shared cores (AMD EPYC), a step took 120 ms with 2 threads while
        # they were idle and 600 to 1100 ms while they were not; 130 to 170 ms with 1.
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="torch threads (default: 1, which stays steady on a busy machine)",
    )
    parser.add_argument(
        "--reversible",
        action="store_true",
        help="train ours as a reversible chain, which keeps no activations",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the weights, crops and defects (default: 0)",
    )
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = 5 if options.short else 60
    for name, value, least in (
        ("steps", options.steps, 1),
        ("threads", options.threads, 1),
        ("seed", options.seed, 0),
    ):
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return options


def introduce(options: argparse.Namespace) -> None:
    """Say what is about to happen."""
    print(
        "FastFlow, an anomaly detector, trained on photographs: the stock maths and "
        "fastflow_kernels side by side.\n"
        f"machine  {describe_machine()}\n"
        f"stock    {STOCK[options.stock]}\n"
        "ours     "
        f"fastflow_kernels.AllInOneBlock{' in a reversible chain' if options.reversible else ''}: "
        "from the same weights, on the same batches, one step of each in turn\n"
        f"data     {', '.join(TEXTURES)} (in scikit-image); trained on clean crops, tested on "
        "held-out crops with painted defects\n"
        f"model    {FLOW_STEPS} flow steps on filter-bank features {CHANNELS} x {CROP // STRIDE} x "
        f"{CROP // STRIDE}, float32\n"
        f"training {options.steps} steps per texture, batches of {BATCH}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0, or 1 if stock and ours disagree or the detector has
    not learnt.
    """
    options = parse_arguments(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    try:
        stock = stock_block(options.stock)
        photographs = {name: load_photograph(name) for name in TEXTURES}
    except (ImportError, FileNotFoundError) as missing:
        print(f"FAILED   {missing}", file=sys.stderr)
        return 1
    introduce(options)
    results, kept = [], {}
    # elsewhere a bar is a mess of carriage returns; one line per texture is printed in any case
    terminal = sys.stdout.isatty()
    with tqdm(
        total=len(TEXTURES) * options.steps,
        file=sys.stdout,
        disable=not terminal,
        unit="step",
        dynamic_ncols=True,
    ) as bar:
        for name in TEXTURES:
            bar.set_postfix_str(f"{name}: features")
            task = prepare(
                name,
                photographs,
                crops=16 if options.short else 96,
                per_kind=2 if options.short else 4,
                seed=options.seed,
            )
            runs = equal_runs(stock, options.seed, options.reversible)
            # the same for every texture
            kept = kept or kept_bytes(runs, task.train[:BATCH].clone())
            train(task, runs, options.steps, options.seed, bar)
            results.append(evaluate(task, runs))
            first, last = ({name: run.losses[i] for name, run in runs.items()} for i in (0, -1))
            losses = ", ".join(f"{first[k]:+.4f} -> {last[k]:+.4f} {k}" for k in ("stock", "ours"))
            bar.write(f"{name:8} loss {losses}", file=sys.stdout)
    settings = {
        "steps": options.steps,
        "seed": options.seed,
        "stock": options.stock,
        "reversible": options.reversible,
        "batch": BATCH,
        "test_crops": sum(len(r.task.examples) for r in results),
    }
    numbers = summarise(results, kept, settings)
    print(table(numbers))
    options.out.mkdir(parents=True, exist_ok=True)
    picture, figures = options.out / "texture_demo.png", options.out / "texture_demo.json"
    save_picture(
        picture,
        [(r.task.name, r.task.examples, r.maps["stock"], r.maps["ours"]) for r in results],
        numbers,
        DEFECTS,
    )
    figures.write_text(json.dumps(numbers, indent=2) + "\n")
    print(
        f"\npicture  {picture.resolve()}\nnumbers  {figures.resolve()}\ntook     "
        f"{time.perf_counter() - started:.0f} s"
    )
    found = failures(results, numbers["pixel_auroc"], options.short)
    for failure in found:
        print(f"FAILED   {failure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
