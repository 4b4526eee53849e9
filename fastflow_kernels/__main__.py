"""The command line, ``python -m fastflow_kernels info`` and ``check [--json]``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from fastflow_kernels import __version__, backends, check, route


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: What follows the program's name; None takes it from ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastflow_kernels", description="Fused AllInOneBlock for normalizing flows."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info",
        help="show versions, device, backends (or why one is not available), environment "
        "variables, and what runs where",
    )
    check_parser = commands.add_parser(
        "check",
        help="measure accuracy and speed of the backends on this machine; the exit status is 1 if "
        "one is inaccurate",
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
    is_unknown = value not in (*backends.BACKENDS, "(not set)")
    meaning = "what backend='auto' means"
    if is_unknown:
        meaning = "UNKNOWN value: set one of these, or blocks with backend='auto' raise"
    lines.append((variable, f"{value}   {names}: {meaning}"))
    interpret = os.environ.get("TRITON_INTERPRET") or "(not set)"
    lines.append(("TRITON_INTERPRET", f"{interpret}   1: run the kernels on the CPU, for tests"))
    print("\n".join(_columns(lines)))
    print("\nwhat runs where (the first line that applies counts):")
    print("\n".join(f"  {line}" for line in _columns(route.WHAT_RUNS_WHERE)))
    print("\nhow a fused block applies its permutation:")
    print("\n".join(f"  {line}" for line in _columns(route.PERMUTATIONS)))
    return int(is_unknown)


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
            "vs plain: the time of the same formula in plain PyTorch operations, divided by the "
            "backend's. Below 1 the plain"
        )
        print("operations are faster. The stock blocks are slower than those: see `make bench`.")
        if torch.cuda.is_available():
            print(
                "device: the GPU's own time, without Python and launches. of copy: the bandwidth "
                "that is reached, in percent of a large copy's."
            )
        print(
            "every backend is accurate"
            if not failed
            else f"{len(failed)} of {len(rows)} rows FAILED: please report this table, and what "
            "`info` prints"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # let `info | head` end without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
