"""Train the demo's detector: data of a texture, the same flow with each block, heat maps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastflow_kernels
from bench.demo.features import CHANNELS, STRIDE, filter_bank, standardise
from bench.fastflow import (
    ReversibleFlow,
    SequenceFlow,
    anomaly_map,
    fastflow,
    negative_log_likelihood,
)
from tests.support.memory import bytes_kept_for_backward
from tests.support.peers import anomalib_block
from tests.support.textures import CROP, TEXTURES, Example, held_out_examples, training_crops

FLOW_STEPS = 8
SHAPE = (CHANNELS, CROP // STRIDE, CROP // STRIDE)
BATCH = 4
LEARNING_RATE = 1e-3  # as in anomalib's FastFlow
WEIGHT_DECAY = 1e-5  # likewise
GRADIENT_NORM = 1.0
EPS = torch.finfo(torch.float32).eps


@dataclass
class Run:
    """One training of the flow.

    Attributes:
        model: The flow.
        nudge: Relative size of a random error added to every input value. 0 adds none.
        losses: Loss of each step, in nats per dimension.
        seconds: Duration of each step: forward, backward and optimizer step.
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
        """Train on one batch. ``signs`` holds the random signs (1 or -1) of the nudge."""
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
    """The data of one texture.

    Attributes:
        name: One of :data:`tests.support.textures.TEXTURES`.
        train: Standardised features of the training crops, (N, *SHAPE).
        test: Standardised features of the test crops, (B, *SHAPE).
        examples: The test crops.
    """

    name: str
    train: Tensor
    test: Tensor
    examples: list[Example]

    @property
    def masks(self) -> Tensor:
        """The masks of the defects in the test crops, (B, CROP, CROP) bool."""
        return torch.from_numpy(np.stack([e.mask for e in self.examples]))


def prepare(
    name: str, photographs: dict[str, np.ndarray], crops: int, per_kind: int, seed: int
) -> Task:
    """Cut and paint the crops of one texture, and compute their features.

    The features are standardised by the statistics of the training crops.

    Args:
        name: The texture.
        photographs: The photographs of all textures, by name.
        crops: Number of training crops.
        per_kind: Number of test crops of each kind of defect.
        seed: Seed of the places and defects.
    """
    rng = np.random.default_rng([seed, TEXTURES.index(name)])
    train = torch.cat(
        [filter_bank(batch) for batch in training_crops(photographs[name], crops, rng).split(16)]
    )
    mean, std = train.mean(dim=(0, 2, 3)), train.std(dim=(0, 2, 3))
    examples = held_out_examples(name, photographs, per_kind, rng)
    test = filter_bank(torch.from_numpy(np.stack([e.image for e in examples])))
    return Task(name, standardise(train, mean, std), standardise(test, mean, std), examples)


def our_block() -> Callable[..., nn.Module]:
    """Return the constructor of this package's block with anomalib's formula."""
    return partial(fastflow_kernels.AllInOneBlock, dialect="anomalib")


def equal_runs(seed: int, reversible: bool = False) -> dict[str, Run]:
    """Build the three runs with equal weights: stock, ours, and stock with nudged inputs.

    Args:
        seed: Seed of the weights.
        reversible: Whether ours is a reversible chain.

    Returns:
        The runs ``"stock"``, ``"ours"`` and ``"nudged"``.

    Raises:
        tests.support.peers.PeerMissing: If anomalib or FrEIA is not installed.
    """
    torch.manual_seed(seed)
    stock = anomalib_block()
    blocks: dict[str, Callable[..., nn.Module]] = {
        "stock": stock,
        "ours": our_block(),
        "nudged": stock,
    }
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
    """Train the runs in turn, each step on the same batch.

    Each step starts with another run, so that none always finds warm caches.
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
    """Compute the heat maps (B, CROP, CROP) of features, a few images at a time."""
    return torch.cat(
        [anomaly_map(model(batch)[0], (CROP, CROP)) for batch in features.split(BATCH)]
    )


def all_heat_maps(task: Task, runs: dict[str, Run]) -> dict[str, Tensor]:
    """Compute the heat maps of the test crops.

    Returns:
        Those of ``"stock"``, of ``"ours"``, and as ``"same weights"`` those of ours with the
        trained weights of stock.
    """
    maps = {name: heat_maps(runs[name].model, task.test) for name in ("stock", "ours")}
    our_model = fastflow(our_block(), SHAPE, FLOW_STEPS)
    our_model.load_state_dict(runs["stock"].model.state_dict(), strict=True)
    return maps | {"same weights": heat_maps(our_model, task.test)}


def kept_bytes(runs: dict[str, Run], batch: Tensor) -> dict[str, dict[str, int]]:
    """Measure the bytes that stock and ours keep for backward.

    Returns:
        By run: ``"whole"``, of the whole flow, and ``"blocks"``, without the subnets' own.
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
