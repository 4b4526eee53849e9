"""The benchmarks' command line: ``python -m bench compare | report | record``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import commits, records, run
from bench.choice import Choice, names_among
from bench.machine import set_up_torch
from bench.providers import EAGER, PROVIDERS
from bench.subject import MODES
from bench.workloads import DTYPES, KINDS

COMPARE = """\
Time blocks and flows in turn: ours against the stock blocks, after their results were compared; or,
with COMMIT, ours as it is in the working tree against ours as it was in that commit."""


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("commit", nargs="?", metavar="COMMIT", help="a commit, branch or tag")
    choice = parser.add_argument_group("what is timed (names, separated by commas)")
    choice.add_argument(
        "--workloads",
        default="typical",
        help="those whose name is, or contains, one of these; typical (default); all",
    )
    for option, known, default in (
        ("kinds", KINDS, ("block",)),
        ("modes", MODES, None),
        ("dtypes", DTYPES, ("float32",)),
        ("providers", PROVIDERS, None),
    ):
        choice.add_argument(
            f"--{option}",
            type=names_among(known),
            default=default,
            help=f"of {', '.join(known)}" + (f" (default: {default[0]})" if default else ""),
        )
    how = parser.add_argument_group("how")
    how.add_argument("--seconds", type=float, help="of one row (default: 3; on a GPU 0.8)")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    alone = parser.add_argument_group("without COMMIT")
    alone.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    alone.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which nothing is begun"
    )
    alone.add_argument("--record", action="store_true", help="append the rows to bench/results")
    alone.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench"),
        help="folder or .jsonl file to append the rows to, without --record (default: out/bench)",
    )
    pair = parser.add_argument_group("with COMMIT")
    pair.add_argument(
        "--threshold",
        type=float,
        default=0.98,
        help="least time of COMMIT divided by the working tree's, of every row (default: 0.98)",
    )
    parser.set_defaults(call=compare)


def compare(options: argparse.Namespace) -> int:
    set_up_torch(options.threads)
    seconds = options.seconds or (3.0 if options.device == "cpu" else 0.8)
    choice = Choice(
        options.kinds,
        options.workloads.split(","),
        options.modes or (("forward", "inverse", "train") if options.commit else MODES),
        options.dtypes,
        options.providers or (["ours"] if options.commit else [p.name for p in EAGER]),
        torch.device(options.device),
    )
    if not choice.groups():
        raise SystemExit(f"--workloads: no workload is called {options.workloads}")
    if choice.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench compare: torch finds no GPU")
    if options.commit:
        return commits.compare(options.commit, choice, seconds, options.threshold)
    target = records.RESULTS if options.record else options.out
    return run.compare(choice, seconds, options.budget, target)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="*", type=Path, default=[records.RESULTS], help="files or folders of rows"
    )
    parser.add_argument("--out", type=Path, default=Path("out/report"), metavar="DIR")
    parser.set_defaults(call=report)


def report(options: argparse.Namespace) -> int:
    from bench.report import write_report  # Matplotlib is not installed everywhere

    rows = records.read(options.results)
    if not rows:
        raise SystemExit(f"no rows in {', '.join(map(str, options.results))}")
    print(write_report(rows, options.out).resolve())
    return 0


def add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.set_defaults(call=record)


def record(options: argparse.Namespace) -> int:
    rows = records.read(options.files)
    records.append(rows, records.RESULTS)
    print(f"{len(rows)} rows appended under {records.RESULTS}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_compare(commands.add_parser("compare", help="time in turn", description=COMPARE))
    add_report(commands.add_parser("report", help="draw tables and plots of result rows"))
    add_record(commands.add_parser("record", help="take over rows that were measured elsewhere"))
    options = parser.parse_args(arguments)
    return int(options.call(options))


if __name__ == "__main__":
    sys.exit(main())
