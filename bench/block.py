"""Time of one block without its subnet's cost, against the stock blocks, in one interleaved run.

    python -m bench.block [--modes forward train inverse] [--only fastflow] [--dtype float32] [--threads 1] [--repeats 25] [--out FILE.json]

The subnet hands over a stored tensor. The stock blocks overwrite what they are given, so each call gets a copy made beforehand. Every
repetition times every provider once, in turn; a ratio is the median over repetitions of peer / ours, and above 1 ours is faster. Results of
all providers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

import fastflow_kernels
import reference
from bench import peers
from bench.cases import WORKLOADS, Workload
from bench.machine import describe_machine
from bench.memory import bytes_kept_for_backward

MODES = ("forward", "train", "inverse")
SPAN = 10e-3  # seconds of calls in a row that one timing averages over: small inputs are measured as a loop runs them, not from cold


class _Handed(Function):
    """A copy whose gradient is handed through: no cost inside the timed region."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        return da


class StoredSubnet(nn.Module):
    """A subnet without cost: every call takes the next copy of one tensor."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a, self.copies = a, []

    def prepare(self, calls: int) -> None:
        self.copies = [_Handed.apply(self.a) if self.a.requires_grad else self.a.clone() for _ in range(calls)]

    def forward(self, x: Tensor) -> Tensor:
        return self.copies.pop()


def providers(workload: Workload) -> dict[str, Callable[..., nn.Module]]:
    """Name -> constructor of the block, ours first."""
    found: dict[str, Callable[..., nn.Module]] = {"ours": fastflow_kernels.AllInOneBlock}
    try:
        found["anomalib 2.7.0"] = peers.anomalib_block()
        found["FrEIA 0.2"] = peers.freia_block()
    except peers.PeerMissing as missing:
        print(
            f"without the real peers ({missing}); the reference in dialect 'anomalib' cannot stand in for their dense product",
            file=sys.stderr,
        )
    if not workload.options.get("learned_householder_permutation"):  # FrEIA's main branch has no Householder over a hard permutation
        found["FrEIA main (reference)"] = lambda *a, **k: reference.AllInOneBlock(*a, dialect="freia", **k)
        found["ours, freia"] = lambda *a, **k: fastflow_kernels.AllInOneBlock(*a, dialect="freia", **k)
    return found


class Runner:
    """One provider's block on one workload, ready to run in each mode."""

    def __init__(self, make: Callable[..., nn.Module], workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        batch, channels, *spatial = workload.shape
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.x, a = random(batch, channels, *spatial), random(batch, channels // 2 * 2, *spatial)
        self.c = [random(batch, width, *spatial) for width in workload.conditions]
        self.subnet = StoredSubnet(a)
        self.dy, self.dlogdet = random(batch, channels, *spatial), random(batch)
        dims_c = [(width, *spatial) for width in workload.conditions]
        torch.manual_seed(0)
        self.block = make([(channels, *spatial)], dims_c, lambda *_: self.subnet, **workload.options).to(device, dtype)
        with torch.no_grad():
            self.block.global_offset.normal_(generator=torch.Generator(device).manual_seed(1))

    def prepare(self, mode: str, calls: int) -> None:
        train = mode == "train"
        self.x.requires_grad_(train)
        self.subnet.a.requires_grad_(train)
        self.x.grad = self.subnet.a.grad = None
        self.block.zero_grad()
        self.subnet.prepare(calls)

    def run(self, mode: str) -> tuple[Tensor, ...]:
        if mode == "train":
            (y,), logdet = self.block([self.x], self.c)
            torch.autograd.backward([y, logdet], [self.dy, self.dlogdet.to(logdet.dtype)])
            return y, logdet
        with torch.no_grad():
            (y,), logdet = self.block([self.x], self.c, rev=mode == "inverse")
        return y, logdet


def measure(workload: Workload, mode: str, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Rows of one workload and mode: per provider the median time in microseconds and the paired ratio to ours."""
    runners = {name: Runner(make, workload, dtype, device) for name, make in providers(workload).items()}
    weights = runners["ours"].block.state_dict()
    for name, runner in runners.items():
        if name != "ours":  # 'freia' blocks take the same weights: theirs is another formula, not another checkpoint
            _load(runner.block, weights)
    _check(runners, mode)
    calls = 1
    while calls < 64 and _time(runners["ours"], mode, calls) * calls < SPAN:
        calls *= 2
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            times[name].append(_time(runner, mode, calls))
    rows = []
    for name, seconds in times.items():
        ours = times[_counterpart(name)]
        quantiles = statistics.quantiles(seconds, n=5)
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        rows.append(
            {
                "workload": workload.name,
                "shape": list(workload.shape),
                "mode": mode,
                "dtype": str(dtype).removeprefix("torch."),
                "provider": name,
                "median_us": statistics.median(seconds) * 1e6,
                "p20_us": quantiles[0] * 1e6,
                "p80_us": quantiles[3] * 1e6,
                "ratio": statistics.median(ratios),
                **({"kept_in_inputs": round(_kept(runners[name]), 2)} if mode == "train" else {}),
            }
        )
    return rows


def _kept(runner: Runner) -> float:
    """What stays allocated between forward and backward, the subnet's own left out, as a multiple of the input's size."""
    runner.prepare("train", 1)
    forward = functools.partial(runner.block, [runner.x], runner.c)
    return bytes_kept_for_backward(runner.block, forward, leave_out=[runner.subnet]) / runner.x.nbytes


def _counterpart(name: str) -> str:
    """Which of our providers computes the same formula."""
    return "ours, freia" if name in ("FrEIA main (reference)", "ours, freia") else "ours"


def _load(block: nn.Module, weights: dict[str, Tensor]) -> None:
    own = block.state_dict()
    converted = {}
    for key, value in weights.items():
        target = own[key]
        if target.dim() == 1 and value.dim() > 1:  # index layout
            value = value.flatten(1).argmax(1)
        converted[key] = value.reshape(target.shape)
    block.load_state_dict(converted)


def _check(runners: dict[str, Runner], mode: str) -> None:
    """Stop unless every provider computes the same as ours, to what the dtype can tell apart from another formula."""
    results = {}
    for name, runner in runners.items():
        runner.prepare(mode, 1)
        results[name] = [
            *runner.run(mode),
            *([runner.x.grad, runner.subnet.a.grad, runner.block.global_offset.grad] if mode == "train" else []),
        ]
    for name, values in results.items():
        for mine, theirs in zip(results[_counterpart(name)], values, strict=True):
            tolerance = 50 * torch.finfo(theirs.dtype).eps ** 0.75 * (1 + mine.abs().max().item())
            difference = (mine - theirs).abs().max().item()
            if not difference <= tolerance:
                raise RuntimeError(f"{name} disagrees with ours in mode {mode}: {difference:.3g} > {tolerance:.3g}")


def _time(runner: Runner, mode: str, calls: int) -> float:
    runner.prepare(mode, calls)
    if runner.x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            runner.run(mode)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        runner.run(mode)
    return (time.perf_counter() - begin) / calls


def table(rows: list[dict[str, Any]]) -> str:
    """One line per workload and mode: our time and every peer's ratio to it, as Markdown."""
    names = [name for name in dict.fromkeys(row["provider"] for row in rows) if not name.startswith("ours")]
    lines = ["| workload | shape | mode | ours | " + " | ".join(names) + " |", "|---|---|---|---:|" + "---:|" * len(names)]
    for key in dict.fromkeys((row["workload"], tuple(row["shape"]), row["mode"]) for row in rows):
        mine = {row["provider"]: row for row in rows if (row["workload"], tuple(row["shape"]), row["mode"]) == key}
        ratios = [f"{mine[name]['ratio']:.2f}x" if name in mine else "" for name in names]
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {mine['ours']['median_us']:,.0f} us | " + " | ".join(ratios) + " |")
    for key in dict.fromkeys((row["workload"], tuple(row["shape"])) for row in rows if "kept_in_inputs" in row):
        kept = {
            row["provider"]: row["kept_in_inputs"]
            for row in rows
            if (row["workload"], tuple(row["shape"])) == key and "kept_in_inputs" in row
        }
        cells = " | ".join(f"{kept[name]:.1f}" if name in kept else "" for name in names)
        lines.append(f"| {key[0]} | {key[1]} | kept for backward, in inputs | {kept['ours']:.1f} | {cells} |")
    means = []
    for name in names:
        found = [row["ratio"] for row in rows if row["provider"] == name]
        means.append(f"{statistics.geometric_mean(found):.2f}x")
    lines.append("| geometric mean | | | | " + " | ".join(means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (0: torch's default)")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(describe_machine())
    rows = []
    for workload in WORKLOADS:
        if options.only not in workload.name:
            continue
        workload = workload if device.type == "cuda" else workload.on_cpu()
        for mode in options.modes:
            found = measure(workload, mode, getattr(torch, options.dtype), device, options.repeats)
            ratios = ", ".join(f"{row['provider']} {row['ratio']:.2f}x" for row in found if not row["provider"].startswith("ours"))
            print(f"{workload.name} {workload.shape} {mode}: ours {found[0]['median_us']:,.0f} us; {ratios}", file=sys.stderr, flush=True)
            rows += found
    if not rows:
        raise SystemExit(f"no workload's name contains {options.only!r}")
    print(table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"machine": describe_machine(), "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
