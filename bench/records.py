"""Store result rows: their provenance, and files with one JSON object per line.

Files are only appended to. Of the rows that measure the same thing, the newest counts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.machine import cpu_model, version_of
from bench.workloads import ALL_IN_ONE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
IDENTITY = ("device", "threads", "kind", "workload", "shape", "mode", "dtype", "provider")

Row = dict[str, Any]


def slug(name: str, kind: str) -> str:
    """Turn a device's name into the name of a folder.

    "AMD EPYC 7763 64-Core Processor" becomes cpu-amd-epyc-7763, and "NVIDIA H200" nvidia-h200.
    """
    name = re.sub(
        r"\(R\)|\(TM\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", name, flags=re.IGNORECASE
    )
    return "-".join(([] if kind == "cuda" else ["cpu"]) + re.findall(r"[a-z0-9]+", name.lower()))


def provenance(device: torch.device) -> Row:
    """Return the entries that say where and when the rows of a run were measured."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else cpu_model()
    return {
        "device": slug(name, device.type),
        "device_name": name,
        "driver": _driver() if gpu else None,
        "threads": None if gpu else torch.get_num_threads(),
        "tf32": gpu and torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout, or "unknown" if there is no repository.

    "-dirty" is appended if tracked files have changed. Result files do not count, because a run
    itself appends to them. For a copy without its repository, the environment variable
    FASTFLOW_KERNELS_COMMIT can name the commit.
    """
    if name := os.environ.get("FASTFLOW_KERNELS_COMMIT"):
        return name
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(
            root,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            ":(exclude)bench/results",
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(query, capture_output=True, text=True, check=True)
            .stdout.splitlines()[0]
            .strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def append(rows: Iterable[Row], target: Path) -> None:
    """Append rows to a ``.jsonl`` file, or to ``<device>/<kind>.jsonl`` within a folder."""
    for row in rows:
        path = (
            target if target.suffix == ".jsonl" else target / row["device"] / f"{row['kind']}.jsonl"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(paths: Iterable[Path]) -> list[Row]:
    """Return the rows of ``.jsonl`` files and of all such files below folders.

    The rows of one file keep their order.
    """
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
    ]
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


def is_of_couplings(row: Row) -> bool:
    """Return whether a row is about FrEIA's coupling blocks, not about AllInOneBlock."""
    return row.get("block", ALL_IN_ONE) != ALL_IN_ONE


def newest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row by date of each group of rows that measure the same thing."""
    latest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        latest[json.dumps([row[key] for key in IDENTITY])] = row
    return list(latest.values())
