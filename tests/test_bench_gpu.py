"""Tests of the programs for a run on a GPU, as far as they can run without one."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import warm
from bench.providers import PROVIDERS
from bench.workloads import Workload, workloads

ROOT = Path(__file__).resolve().parent.parent
SMALL = Workload("small", (3, 6, 4, 4), {"affine_clamping": 1.9}, (2,))


def test_what_is_warmed_is_what_the_benchmarks_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    todo = warm.jobs()
    assert len(todo) == len(set(map(repr, todo)))
    assert [w for w, dtype, name in todo if (dtype, name) == ("bfloat16", "ours")] == workloads(
        "block", False
    )
    assert {name for _, _, name in todo} == {"ours", "ours-freia", "ours-accelerated"}
    calls, compiled = warm.calls_to_warm("cuda"), warm.compiled_jobs()
    others = 2 * len(warm.every_kernel.SHAPES) + len(warm.check.GPU_SHAPES)
    assert len(calls) == len(compiled) + len(todo) + others
    assert all(map(pickle.dumps, calls.values()))  # because other processes run them
    modes = []
    monkeypatch.setattr(
        warm.Subject,
        "results",
        lambda self, mode: modes.append((self.provider.name, self.samples[0].x.dtype, mode)),
    )
    warm.run((SMALL, "bfloat16", "ours-freia"), "cpu")
    warm.run((SMALL, "float32", "ours-compiled"), "cpu")
    assert modes == [
        *(("ours-freia", torch.bfloat16, mode) for mode in ("train", "inverse")),
        ("ours-compiled", torch.float32, "train"),
    ]


def test_what_is_compiled_ahead_is_what_a_gpu_run_measures() -> None:
    """The providers of the part `graphs` that Inductor compiles, on the same workloads."""
    script = (ROOT / "ci/gpu.sh").read_text()
    names = ",".join(re.findall(r"graphs\+?=,?([\w,-]+)", script)).split(",")
    measured = {
        name
        for name in names
        if PROVIDERS[name].execution != "eager"
        and not (PROVIDERS[name].is_ours and PROVIDERS[name].execution == "graphs")
    }
    assert measured == set(warm.COMPILED)
    (chosen,) = re.findall(r"--workloads (\S+) --modes train .*\n *--providers", script)
    assert chosen == ",".join(warm.COMPILED_WORKLOADS)


# A program that compiles in other processes, as `python -m bench.gpu.warm` does.
MAIN_PROGRAM = """
import pickle
import torch
from bench.gpu import warm

def key():
    return pickle.dumps(torch.contiguous_format)

if __name__ == "__main__":
    with warm.pool(1) as pool:
        assert pool.submit(key).result() == key()
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_has_the_keys_of_the_benchmarks(tmp_path: Path) -> None:
    """Inductor's keys hold the format of each tensor, whose pickle names a module."""
    (tmp_path / "program.py").write_text(MAIN_PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, check=True)


def gpu_run(
    *arguments: str, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "ci/gpu.sh", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )


# A stand-in for Python. It pretends that there is a GPU, and collects tests instead of running
# them. Other programs run until they miss the GPU.
REHEARSING = """#!/usr/bin/env bash
case "$*" in
*is_available*) ;;
-c*) exit 1 ;;
"-m pytest "*) exec {python} "$@" --collect-only ;;
*) {python} "$@" 2>&1 | grep -E "torch finds no GPU|^torch " ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["first", "second"])
def test_a_gpu_run_rehearsed(mode: str, tmp_path: Path) -> None:
    """Every step runs until it needs a GPU: its options are valid, its tests and workloads exist.

    The limits of the steps add up to at most the limit of the run.
    """
    python = tmp_path / "python"
    python.write_text(REHEARSING.format(python=sys.executable))
    python.chmod(0o755)
    done = gpu_run(str(tmp_path / "out"), mode, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(
        r"^== .* \(at most (\d+) s; \d+ s of at most (\d+) are gone\)$", done.stdout, re.M
    )
    skipped = (
        []
        if shutil.which("compute-sanitizer")
        else re.findall(r"^\w+check: SKIPPED", done.stdout, re.M)
    )
    (total,) = {int(total) for _, total in steps}
    assert (
        sum(int(limit) for limit, _ in steps)
        <= total
        <= sum(int(limit) for limit, _ in steps) + 40 * len(skipped)
    )
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("exit 0") == len(steps)
    collected = re.findall(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.M)
    assert len(collected) == 1
    assert int(collected[0]) > 0


def test_a_gpu_run_explains_itself() -> None:
    """Its help lists every part with its limit."""
    with_help, without_arguments = gpu_run("--help"), gpu_run()
    assert (with_help.returncode, without_arguments.returncode) == (0, 2)
    assert with_help.stdout == without_arguments.stdout
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", (ROOT / "ci/gpu.sh").read_text()))
    assert dict(re.findall(r"^  (\w+) +(\d+) s  ", with_help.stdout, re.M)) == limits
    assert sum(map(int, limits.values())) <= 77 * 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests:90", "everything"], "no part is called everything; parts: "),
        (["goals:soon"], "expected PART:SECONDS, got goals:soon"),
        pytest.param(
            ["smallest"],
            "torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_gpu_run_refuses_before_any_work(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = gpu_run(str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "minutes"), [("first", 6.5), ("second", 5.5)])
def test_first_and_second_end_in_time(mode: str, minutes: float) -> None:
    """The limits of all steps add up to at most the documented minutes."""
    (line,) = (
        line
        for line in (ROOT / "ci/gpu.sh").read_text().splitlines()
        if line.startswith(f"{mode}) parts=")
    )
    assert sum(map(int, re.findall(r":(\d+)", line))) <= 60 * minutes
