"""Command line: ``python -m fastflow_kernels info`` and ``python -m fastflow_kernels check
[--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata

import torch

from fastflow_kernels import __version__, check, dispatch

_COVERAGE = (
    (
        "hard permutation, channels first or rank 0",
        f"Triton on a GPU, eager elsewhere (plain operations up to {dispatch.SMALL} elements)",
    ),
    ("GIN, any activation, conditions, any floating dtype", "as above"),
    ("reverse_permutation", "as above; on a CPU with one gather of the input before"),
    (
        "soft and Householder permutations",
        "as above, then matrix products (soft: plain up to 2 times that, 4 times in training)",
    ),
    (
        "channels-last input",
        "as above, pixel by pixel; the format stays (GIN on a GPU: on a contiguous copy)",
    ),
    ("other strides of the input", "as above, on a contiguous copy"),
    ("every inverse while gradients are enabled", "plain operations"),
    (
        "empty input; compile, export, trace, torch.func, forward mode, fake tensors",
        "plain operations",
    ),
    (
        "a step overridden, a clamp that is a tensor, integer input",
        "the stock block's steps, in plain operations",
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastflow_kernels", description="Fused AllInOneBlock for normalizing flows."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="versions, device, backends and why one is not available, environment switches"
    )
    check_parser = commands.add_parser(
        "check",
        help="accuracy and speed of the backends on this machine; exit status 1 if one is not accurate",
    )
    check_parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    if options.command == "check":
        try:
            dispatch.default_backend()
        except ValueError as error:
            parser.error(str(error))
    return _info() if options.command == "info" else _check(options.json)


def _info() -> int:
    lines = [
        ("fastflow_kernels", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    lines += [(name, _version(name)) for name in ("triton", "FrEIA", "anomalib")]
    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    lines += [
        (
            "device",
            ", ".join(devices)
            or f"CPU, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}",
        )
    ]
    for name, reason in check.backends().items():
        lines.append(
            (f"backend {name}", "available" if reason is None else f"not available: {reason}")
        )
    variable = dispatch.ENVIRONMENT_VARIABLE
    value = os.environ.get(variable) or "(not set)"
    unknown = (
        ""
        if value in (*dispatch.BACKENDS, "(not set)")
        else "   UNKNOWN: every block with backend='auto' will raise; set it to"
    )
    lines.append(
        (variable, f"{value}{unknown}   {' | '.join(dispatch.BACKENDS)}: what backend='auto' means")
    )
    lines.append(
        (
            "TRITON_INTERPRET",
            f"{os.environ.get('TRITON_INTERPRET') or '(not set)'}   1: run kernels on the CPU, for "
            "tests",
        )
    )
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    print("\nwhat runs where")
    width = max(len(name) for name, _ in _COVERAGE)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in _COVERAGE))
    return 1 if unknown else 0


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check(as_json: bool) -> int:
    rows = check.check(progress=lambda line: print(f"checking {line}", file=sys.stderr))
    failed = [row for row in rows if not row.passed]
    if as_json:
        missing = {name: reason for name, reason in check.backends().items() if reason}
        print(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "passed": not failed,
                    "not available": missing,
                    "rows": check.as_json(rows),
                },
                indent=1,
            )
        )
    else:
        for name, reason in check.backends().items():
            if reason:
                print(f"backend {name} is not available: {reason}")
        print(check.table(rows))
        print(
            "vs plain: the same formula in plain PyTorch operations; below 1 those are faster "
            "here. The stock blocks are slower than"
        )
        print("those (`make bench` compares)")
        if torch.cuda.is_available():
            print(
                "device: the GPU's own time, without Python and launches; of copy: the bandwidth "
                "reached, in percent of a large copy's"
            )
        print(
            "every backend is accurate"
            if not failed
            else f"{len(failed)} of {len(rows)} rows FAILED: please report this table with `info`"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
