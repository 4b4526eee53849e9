"""The command line of the benchmarks: ``python -m bench compare | report | record``."""

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

README_PICTURE = records.RESULTS / "cpu-amd-epyc" / "speedup-block.png"
COMPARE = """\
Time blocks and whole flows, taking turns. Without COMMIT, ours is timed against the stock blocks. A
provider is timed only if its results agree with a float64 reference. With COMMIT, ours in the
working tree is timed against ours in that commit."""


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("commit", nargs="?", metavar="COMMIT", help="a commit, branch or tag")
    choice = parser.add_argument_group("what to time (NAMES are separated by commas)")
    choice.add_argument(
        "--workloads",
        metavar="NAMES",
        default="typical",
        help="workloads (bench/workloads.py) by name or part of a name; 'typical' selects a few, "
        "'all' all of them (default: typical)",
    )
    for option, known, default, default_in_words in (
        ("kinds", KINDS, ("block",), "block"),
        ("modes", MODES, None, "all; with COMMIT all but backward"),
        ("dtypes", DTYPES, ("float32",), "float32"),
        ("providers", PROVIDERS, None, "all that run eagerly; with COMMIT ours"),
    ):
        choice.add_argument(
            f"--{option}",
            metavar="NAMES",
            type=names_among(known),
            default=default,
            help=f"choose from {', '.join(known)} (default: {default_in_words})",
        )
    how = parser.add_argument_group("how to time it")
    how.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="seconds after which one measurement ends, once it has its minimum of repetitions "
        "(default: 3; on a GPU 0.8)",
    )
    how.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device (default: %(default)s)",
    )
    alone = parser.add_argument_group("without COMMIT")
    alone.add_argument(
        "--threads", type=int, metavar="N", default=1, help="CPU threads (default: 1)"
    )
    alone.add_argument(
        "--budget",
        type=float,
        metavar="S",
        default=float("inf"),
        help="start no new measurement after so many seconds (default: no limit)",
    )
    alone.add_argument(
        "--record", action="store_true", help="append the rows to bench/results, not to --out"
    )
    alone.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        default=Path("out/bench"),
        help="folder or .jsonl file to append the rows to (default: out/bench)",
    )
    pair = parser.add_argument_group("with COMMIT")
    pair.add_argument(
        "--threshold",
        type=float,
        metavar="RATIO",
        default=0.98,
        help="exit with status 1 if a row's time in COMMIT, divided by its time in the working "
        "tree, is below this (default: 0.98)",
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
        raise SystemExit(
            f"--workloads: no workload is called {options.workloads}; bench/workloads.py has the "
            "names"
        )
    if choice.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench compare: torch finds no GPU; use --device cpu")
    if options.commit:
        return commits.compare(options.commit, choice, seconds, options.threshold)
    target = records.RESULTS if options.record else options.out
    return run.compare(choice, seconds, options.budget, target)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        default=[records.RESULTS],
        help="files or folders with rows (default: bench/results)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/report"),
        metavar="DIR",
        help="folder for report.md and its plots (default: out/report)",
    )
    parser.add_argument(
        "--readme", action="store_true", help="also draw the README's picture, in bench/results"
    )
    parser.set_defaults(call=report)


def report(options: argparse.Namespace) -> int:
    # here, because Matplotlib is not installed everywhere
    from bench.report import save_readme_picture, write_report

    rows = records.read(options.results)
    if not rows:
        raise SystemExit(
            f"bench report: no rows in {', '.join(map(str, options.results))}; measure some with "
            "python -m bench compare"
        )
    print(write_report(rows, options.out).resolve())
    if options.readme:
        save_readme_picture(rows, README_PICTURE)
        print(README_PICTURE)
    return 0


def add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE.jsonl",
        help="rows of another machine, for instance OUTDIR/rows.jsonl of ci/gpu.sh",
    )
    parser.set_defaults(call=record)


def record(options: argparse.Namespace) -> int:
    rows = records.read(options.files)
    records.append(rows, records.RESULTS)
    print(f"{len(rows)} rows appended to {records.RESULTS}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure blocks and flows, and report the results."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_compare(
        commands.add_parser(
            "compare",
            help="time ours against the stock blocks, or against ours in a commit",
            description=COMPARE,
        )
    )
    add_report(
        commands.add_parser(
            "report",
            help="write tables and plots of recorded rows",
            description="Write tables and plots of recorded rows, and print the report's path.",
        )
    )
    add_record(
        commands.add_parser(
            "record",
            help="append rows from another machine to bench/results",
            description="Append rows from another machine to bench/results.",
        )
    )
    options = parser.parse_args(arguments)
    return int(options.call(options))


if __name__ == "__main__":
    sys.exit(main())
