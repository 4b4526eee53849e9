"""Train a real anomaly detector on real photographs, with anomalib's block and with ours.

Run ``python -m bench.demo`` (a minute or two on two CPU cores). With ``--short`` it takes seconds.

For each texture the same FastFlow is trained with each block, from the same weights and on the same
batches. The runs take one step each in turn, so that a busy machine slows both alike. A third run
uses the stock block again, with its input changed by one rounding error per value. It shows how far
rounding alone carries a training run, and so how far ours may differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.demo import training
from bench.demo.features import CHANNELS, STRIDE
from bench.demo.picture import save_picture
from bench.demo.results import Result, failures, summarise, table
from bench.machine import describe_machine
from tests.support.textures import CROP, DEFECTS, TEXTURES, load_photograph

INTRODUCTION = """\
FastFlow, an anomaly detector, trained on photographs: the stock block and ours side by side.
machine  {machine}
stock    anomalib 2.7.0's own AllInOneBlock
ours     fastflow_kernels.AllInOneBlock{chain}: same weights, same batches, one step of each in turn
data     photographs of {textures} from scikit-image; trained on clean crops, tested on
         held-out crops with painted defects
model    {blocks} flow steps on filter-bank features {channels} x {size} x {size}, float32
training {steps} steps per texture, batches of {batch}"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Train FastFlow on photographs, with anomalib's block and with ours.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--short", action="store_true", help="train 5 steps only, to see that it works"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="folder for the picture and the numbers",
    )
    parser.add_argument(
        "--steps", type=int, default=60, metavar="N", help="training steps per texture"
    )
    # One thread took 130 to 170 ms a step on 2 cores of an AMD EPYC. Two took 120 ms on idle cores,
    # and 600 to 1100 ms on shared ones, because threads wait for each other.
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    parser.add_argument(
        "--reversible",
        action="store_true",
        help="train ours as a reversible chain, which keeps no activations",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the weights, crops and defects"
    )
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("threads", 1), ("seed", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    options.steps = 5 if options.short else options.steps
    return options


def introduce(options: argparse.Namespace) -> None:
    """Print what is compared, on which data and how."""
    text = INTRODUCTION.format(
        machine=describe_machine(),
        chain=" in a reversible chain" if options.reversible else "",
        textures=", ".join(TEXTURES),
        blocks=training.FLOW_STEPS,
        channels=CHANNELS,
        size=CROP // STRIDE,
        steps=options.steps,
        batch=training.BATCH,
    )
    print(text, flush=True)


def train_all(options: argparse.Namespace) -> tuple[list[Result], dict[str, dict[str, int]]]:
    """Train on every texture.

    Returns:
        The result of each texture, and the bytes kept for backward, which all textures share.
    """
    photographs = {name: load_photograph(name) for name in TEXTURES}
    crops, per_kind = (16, 2) if options.short else (96, 4)
    results: list[Result] = []
    kept: dict[str, dict[str, int]] = {}
    # No bar where there is no terminal: a log would fill with carriage returns.
    with tqdm(
        total=len(TEXTURES) * options.steps,
        file=sys.stdout,
        disable=not sys.stdout.isatty(),
        unit="step",
        dynamic_ncols=True,
    ) as bar:
        for name in TEXTURES:
            bar.set_postfix_str(f"{name}: features")
            task = training.prepare(name, photographs, crops, per_kind, options.seed)
            runs = training.equal_runs(options.seed, options.reversible)
            kept = kept or training.kept_bytes(runs, task.train[: training.BATCH].clone())
            training.train(task, runs, options.steps, options.seed, bar)
            results.append(Result(task, runs, training.all_heat_maps(task, runs)))
            first, last = ({name: run.losses[i] for name, run in runs.items()} for i in (0, -1))
            losses = ", ".join(f"{first[k]:+.4f} -> {last[k]:+.4f} {k}" for k in ("stock", "ours"))
            bar.write(f"{name:8} loss {losses}", file=sys.stdout)
    return results, kept


def main(arguments: list[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: 1 if stock and ours disagree or the detector has not learnt.
    """
    options = parse_arguments(arguments)
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    introduce(options)
    try:
        results, kept = train_all(options)
    except (ImportError, FileNotFoundError) as missing:
        print(f"FAILED   {missing}", file=sys.stderr)
        return 1
    settings: dict[str, object] = {
        "steps": options.steps,
        "seed": options.seed,
        "stock": "anomalib",
        "reversible": options.reversible,
        "batch": training.BATCH,
        "test_crops": sum(len(r.task.examples) for r in results),
    }
    numbers = summarise(results, kept, settings)
    print(table(numbers))
    options.out.mkdir(parents=True, exist_ok=True)
    picture, figures = options.out / "texture_demo.png", options.out / "texture_demo.json"
    textures = [(r.task.name, r.task.examples, r.maps["stock"], r.maps["ours"]) for r in results]
    save_picture(picture, textures, numbers, DEFECTS)
    figures.write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\npicture  {picture.resolve()}\nnumbers  {figures.resolve()}")
    print(f"took     {time.perf_counter() - start:.0f} s")
    problems = failures(results, numbers["pixel_auroc"], options.short)
    for problem in problems:
        print(f"FAILED   {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
