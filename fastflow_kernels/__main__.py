"""Command line: ``python -m fastflow_kernels info`` and ``python -m fastflow_kernels check
[--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from fastflow_kernels import __version__, backends, check, route


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
        help="accuracy and speed of the backends on this machine; exit status 1 if one is "
        "inaccurate",
    )
    check_parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    if options.command == "check":
        try:
            backends.default_backend()
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
    lines.append(("device", _devices()))
    for name, reason in check.backends().items():
        lines.append(
            (f"backend {name}", "available" if reason is None else f"not available: {reason}")
        )
    variable, names = backends.ENVIRONMENT_VARIABLE, " | ".join(backends.BACKENDS)
    value = os.environ.get(variable) or "(not set)"
    unknown = ""
    if value not in (*backends.BACKENDS, "(not set)"):
        unknown = "   UNKNOWN: every block with backend='auto' will raise; set it to"
    lines.append((variable, f"{value}{unknown}   {names}: what backend='auto' means"))
    interpret = os.environ.get("TRITON_INTERPRET") or "(not set)"
    lines.append(("TRITON_INTERPRET", f"{interpret}   1: run kernels on the CPU, for tests"))
    print("\n".join(_columns(lines)))
    print("\nwhat runs where: the first line that holds counts")
    print("\n".join(f"  {line}" for line in _columns(route.WHAT_RUNS_WHERE)))
    print("\nwhere the coupling is fused, a permutation is")
    print("\n".join(f"  {line}" for line in _columns(route.PERMUTATIONS)))
    return 1 if unknown else 0


def _devices() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {torch.get_num_threads()} thread(s), {capability}"


def _columns(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}}  {value}" for name, value in pairs]


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
