"""Run the scripts of docs/examples as a reader does: in a process and a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"


def run_example(
    name: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = (), seconds: float = 300
) -> str:
    """Run a script on one thread.

    Args:
        name: The script's file name.
        folder: Folder where it runs, and writes.
        arguments: The script's arguments.
        launcher: Arguments of Python before the script: ``-m`` or ``-c`` and what follows.
        seconds: Time after which the script counts as hanging.

    Returns:
        What the script printed to its standard output.
    """
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def printed_values(pattern: str, text: str) -> list[float]:
    """Return the numbers in a printed line, in order.

    Args:
        pattern: The line as a regular expression, with ``#`` where a number stands.
        text: What was printed; exactly one line must match.
    """
    number = r"([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)"
    matches = re.findall(f"^{pattern.replace('#', number)}$", text, re.MULTILINE)
    assert len(matches) == 1, f"expected one line {pattern!r} in:\n{text}"
    values = matches[0] if isinstance(matches[0], tuple) else (matches[0],)
    return [float(value) for value in values]
