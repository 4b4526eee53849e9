"""Evaluate the demo: the differences and their bound, the summary, the table, and the failures."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.demo.training import FLOW_STEPS, Run, Task
from bench.machine import describe_machine

WARM_UP = 3  # first steps, not timed because they fill caches and allocate
CHANCE = 0.5
CLEARLY_ABOVE_CHANCE = 0.7
EPS = torch.finfo(torch.float32).eps
# In each block the two may round differently in four places: exp(s), the coupling, the global
# affine map and the log-determinant.
ROUNDINGS = 4 * FLOW_STEPS


@dataclass
class Result:
    """The result for one texture.

    Attributes:
        task: The texture's data.
        runs: The trained runs: ``"stock"``, ``"ours"`` and ``"nudged"``.
        maps: Heat maps (B, CROP, CROP) of the test crops, by ``"stock"``, ``"ours"`` and ``"same
            weights"`` (ours with stock's weights).
    """

    task: Task
    runs: dict[str, Run]
    maps: dict[str, Tensor]

    def difference(self, name: str) -> list[float]:
        """Return the distance of a run's loss from stock's at every step."""
        return [
            abs(a - b)
            for a, b in zip(self.runs[name].losses, self.runs["stock"].losses, strict=True)
        ]

    def auroc(self, name: str) -> float:
        """Return the pixel AUROC of a run's heat maps."""
        return pixel_auroc(self.maps[name], self.task.masks)

    def map_difference(self, name: str) -> float:
        """Return the largest distance of a run's heat maps from stock's."""
        return (self.maps[name] - self.maps["stock"]).abs().max().item()


def pixel_auroc(scores: Tensor, masks: Tensor) -> float:
    """Compute the pixel AUROC (Mann-Whitney).

    It is the probability that a pixel inside a defect scores higher than one outside. Ties count
    half.

    Args:
        scores: Anomaly scores of any shape.
        masks: Whether each pixel is inside a defect: bool, of the same shape.
    """
    _, inverse, counts = scores.flatten().unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    defect = masks.flatten()
    positives = int(defect.sum())
    negatives = defect.numel() - positives
    rank_sum = mean_rank[inverse[defect]].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def loss_bound(result: Result) -> list[float]:
    """Return how far ours may be from stock after each step, if they differ only by rounding.

    Training amplifies rounding errors, so the bound cannot be a fixed number. The nudged run
    measures the amplification: its nudge is one rounding error per value and step. Two
    implementations differ by up to ROUNDINGS such errors per value and step. These are independent,
    so together they are sqrt(ROUNDINGS) times as large. The first term of the bound is three times
    that, times the largest distance of the nudged run so far.

    In the first steps the nudge may happen to cancel in the loss. The second term allows for that:
    ROUNDINGS errors of one eps, all of the same sign, in a loss of two terms. These are 0.5 * z^2,
    about 0.5, and the log-determinant, about 0.5 - loss. Together they are about 1 + |loss|.
    """
    bounds, largest = [], 0.0
    for nudged, loss in zip(result.difference("nudged"), result.runs["stock"].losses, strict=True):
        largest = max(largest, nudged)
        bounds.append(3 * math.sqrt(ROUNDINGS) * largest + ROUNDINGS * EPS * (1 + abs(loss)))
    return bounds


def failures(results: list[Result], overall: dict[str, float], short: bool) -> list[str]:
    """Return what is wrong with the results, in words for the user.

    Args:
        results: One for each texture.
        overall: The pixel AUROC over all textures, by block.
        short: Whether the detector was trained too briefly to have learnt.
    """
    problems = []
    for result in results:
        name = result.task.name
        if not all(math.isfinite(loss) for run in result.runs.values() for loss in run.losses):
            problems.append(
                f"{name}: a loss is not finite. If only the loss of ours is not, this package has "
                "a fault: run `make test`. If stock's loss is not finite either, the training is "
                "unstable: try another --seed."
            )
            continue
        for step, (difference, bound) in enumerate(
            zip(result.difference("ours"), loss_bound(result), strict=True), start=1
        ):
            if difference > bound:
                problems.append(
                    f"{name}: at step {step} the losses differ by {difference:.1e}, but float32 "
                    f"rounding explains only {bound:.1e} (measured with a stock run whose input "
                    "is off by one rounding error). The blocks compute different results: run "
                    "`make test` to see where."
                )
                break
    for name, auroc in overall.items():
        if not short and not auroc > CLEARLY_ABOVE_CHANCE:
            problems.append(
                f"the detector of {name} has not learnt: its pixel AUROC is {auroc:.3f}, expected "
                f"more than {CLEARLY_ABOVE_CHANCE} (chance is {CHANCE}). Train longer (--steps) or "
                "try another --seed. If only that of ours is low, run `make test`."
            )
    return problems


def summarise(
    results: list[Result], kept: dict[str, dict[str, int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Gather the numbers of the whole demo for the JSON file."""
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


def table(numbers: dict[str, Any]) -> str:
    """Format the table that the demo prints at its end."""
    textures, times = numbers["textures"], numbers["seconds_per_step"]
    lines = ["", f"{'':40}{'stock':>11}{'ours':>11}{'stock / ours':>15}"]
    in_ms = {name: f"{1e3 * seconds:.1f} ms" for name, seconds in times.items()}
    lines.append(_line("time per training step, median", in_ms, numbers["step_time_ratio"]))
    for key, label in (("whole", "whole model"), ("blocks", "without subnets")):
        kept = {name: sizes[key] for name, sizes in numbers["bytes_kept_for_backward"].items()}
        in_mb = {name: f"{size * 1e-6:.1f} MB" for name, size in kept.items()}
        lines.append(_line(f"kept for backward, {label}", in_mb, kept["stock"] / kept["ours"]))
    for name, texture in textures.items():
        losses = {k: f"{texture['loss'][k]['last']:+.5f}" for k in ("stock", "ours")}
        lines.append(_line(f"last loss, nats per dimension, {name}", losses))
    aurocs = {name: texture["pixel_auroc"] for name, texture in textures.items()}
    for name, auroc in (aurocs | {"all test pixels": numbers["pixel_auroc"]}).items():
        lines.append(_line(f"pixel AUROC, {name}", {k: f"{v:.4f}" for k, v in auroc.items()}))
    names = "".join(f"{name:>11}" for name in textures)
    lines += ["", f"{'differences between stock and ours':40}{names}"]
    for label, *path in DIFFERENCES:
        values = (functools.reduce(operator.getitem, path, t) for t in textures.values())
        lines.append(f"{label:40}" + "".join(f"{value:>11.1e}" for value in values))
    return "\n".join([*lines, *FOOTNOTES])


DIFFERENCES = (  # a label, and the keys of the number in a texture's summary
    ("loss, first step", "loss_difference", "first"),
    ("loss, last step", "loss_difference", "last"),
    ("loss, largest of all steps", "loss_difference", "max"),
    ("  for scale: stock against itself (*)", "loss_difference_stock_nudged_by_one_rounding"),
    ("heat map, largest, each as trained", "heat_map_difference", "trained_apart"),
    ("heat map, largest, same weights (**)", "heat_map_difference", "same_weights"),
)
FOOTNOTES = (
    " (*) stock trained twice, the second time with every input off by one float32 rounding error",
    "(**) stock's weights loaded into ours; heat maps are between -1 and 0",
)


def _line(label: str, cells: dict[str, str], ratio: float | None = None) -> str:
    end = "" if ratio is None else f"{ratio:>14.2f}x"
    return f"{label:40}{cells['stock']:>11}{cells['ours']:>11}{end}"
