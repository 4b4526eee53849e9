"""Accuracy and speed of the backends on this machine.

The eager engine in float64 is the truth. Speed is compared with the formula in plain operations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels.block import evaluate, evaluate_plainly
from fastflow_kernels.call import BlockCall
from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.engines import available
from fastflow_kernels.permutations import IndexPermutation

# Blocks of published models, and one odd shape. The batches of images are smaller on a CPU, so that
# a laptop needs only seconds.
CPU_SHAPES = {
    "FastFlow wide-resnet50, stage 3": (4, 1024, 16, 16),
    "FastFlow resnet18, stage 1": (4, 64, 64, 64),
    "CFlow": (64, 512),
    "odd": (3, 33, 7, 9),
}
GPU_SHAPES = {
    "FastFlow wide-resnet50, stage 1": (32, 256, 64, 64),
    "FastFlow wide-resnet50, stage 3": (32, 1024, 16, 16),
    "FastFlow resnet18, stage 1": (32, 64, 64, 64),
    "CFlow": (64, 512),
    "odd": (3, 33, 7, 9),
}
# The bytes that a training step must move, in inputs. Forward: read x, a, write y. Backward: read
# dy, x, a, write dx, da.
MINIMAL_BYTES = 8

Run = Callable[[dict[str, Tensor], bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """The result of one backend on one shape.

    Attributes:
        backend: "eager" or "triton".
        workload: Name in :func:`shapes`.
        shape: (B, C, *S).
        dtype: Dtype of the data.
        worst: Name of the quantity nearest to its limit.
        fraction: Its error as a fraction of that limit.
        passed: Whether every quantity keeps err <= 2 * err(plain operations in this dtype) + 4 eps
            * max, by maximum and by RMS.
        milliseconds: Median time of a call, forward and backward.
        speedup: Time of the formula in plain operations (indexing, tanh, exp) divided by the
            backend's, in the same interleaved run. Stock blocks are slower than plain operations;
            `make bench` compares with them.
        device_milliseconds: The GPU's own time, without Python and launches; None on a CPU.
        share: Bandwidth of the bytes that must be moved, as a share of a large copy's. None on a
            CPU, and if the L2 cache holds half of them or more, because it is faster than memory.
    """

    backend: str
    workload: str
    shape: tuple[int, ...]
    dtype: str
    worst: str
    fraction: float
    passed: bool
    milliseconds: float
    speedup: float
    device_milliseconds: float | None
    share: float | None


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes to run on this machine's device, by name."""
    return GPU_SHAPES if _device().type == "cuda" else CPU_SHAPES


def backends() -> dict[str, str | None]:
    """Return every backend with the reason why it is not available on this machine, or None."""
    if not torch.cuda.is_available() and not available.is_interpreted():
        return {"eager": None, "triton": "torch finds no GPU on this machine"}
    return {
        "eager": None,
        "triton": available.why_not_triton(torch.empty(1, 2, 1, device=_device())),
    }


def check(repeats: int = 7, progress: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Run every available backend on a few real shapes.

    Args:
        repeats: Timed repetitions.
        progress: Called with a line per shape.

    Returns:
        One row per shape, dtype and backend.
    """
    rows = []
    available = [name for name, reason in backends().items() if reason is None]
    device = _Device() if _device().type == "cuda" else None
    for workload, shape in shapes().items():
        for dtype in (torch.float32, torch.bfloat16):
            progress(f"{workload} {shape} {_name(dtype)}")
            tensors = _tensors(shape, dtype)
            truth = _evaluate(_backend("eager"), {key: _double(t) for key, t in tensors.items()})
            plain = _evaluate(_plain, tensors)
            for backend in available:
                worst, fraction = _worst(_evaluate(_backend(backend), tensors), plain, truth, dtype)
                seconds, speedup = _time(_backend(backend), tensors, repeats)
                on_device = (
                    device.seconds(_step(_backend(backend), tensors), seconds) if device else None
                )
                share = (
                    device.share(MINIMAL_BYTES * tensors["x"].nbytes, on_device)
                    if device and on_device
                    else None
                )
                rows.append(
                    Row(
                        backend=backend,
                        workload=workload,
                        shape=shape,
                        dtype=_name(dtype),
                        worst=worst,
                        fraction=round(fraction, 3),
                        passed=fraction <= 1.0,
                        milliseconds=1e3 * seconds,
                        speedup=round(speedup, 2),
                        device_milliseconds=on_device and 1e3 * on_device,
                        share=share and round(share, 3),
                    )
                )
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a table of text."""
    of_copy = (
        f" {'device':>11} {'of copy':>8}" if any(row.device_milliseconds for row in rows) else ""
    )
    head = (
        f"{'backend':<8} {'workload':<32} {'shape':<20} {'dtype':<9} {'error / allowed':<26} "
        f"{'fwd + bwd':>11} {'vs plain':>9}"
    )
    lines = [head + of_copy]
    for row in rows:
        error = f"{row.fraction:.2f} ({row.worst}) {'ok' if row.passed else 'FAILED'}"
        lines.append(
            f"{row.backend:<8} {row.workload:<32} {row.shape!s:<20} {row.dtype:<9} {error:<26} "
            f"{row.milliseconds:>8.3f} ms {row.speedup:>8.2f}x"
            + (
                f" {row.device_milliseconds:>8.3f} ms"
                if row.device_milliseconds is not None
                else ""
            )
            + (f" {row.share:>8.0%}" if row.share is not None else "")
        )
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the rows as dictionaries for JSON."""
    return [asdict(row) for row in rows]


_SPEC = CouplingSpec.of(1.9, "anomalib", "SOFTPLUS", gin=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _tensors(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels, *spatial = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(_device(), dtype)

    return {
        "x": random(*shape),
        "a": 5 * random(batch, channels // 2 * 2, *spatial),
        "scale": 9 + random(channels),
        "offset": random(channels),
        "perm": torch.randperm(channels, generator=generator).to(_device()),
        "dy": random(*shape),
        "dlogdet": random(batch),
    }


def _backend(name: str) -> Run:
    def run(t: dict[str, Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        return evaluate(_call(t, rev, name))

    return run


def _plain(t: dict[str, Tensor], rev: bool) -> tuple[Tensor, Tensor]:
    return evaluate_plainly(_call(t, rev, "auto"))


def _call(t: dict[str, Tensor], rev: bool, backend: str) -> BlockCall:
    permutation = IndexPermutation(t["perm"], torch.argsort(t["perm"]))
    return BlockCall(
        t["x"],
        (),
        lambda _: t["a"],
        t["scale"],
        t["offset"],
        permutation,
        _SPEC,
        rev,
        backend=backend,
    )


def _evaluate(run: Run, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {key: tensors[key].detach().requires_grad_() for key in ("x", "a", "scale", "offset")}
    y, logdet = run({**tensors, **leaves}, False)
    torch.autograd.backward(
        [y, logdet], [tensors["dy"].to(y.dtype), tensors["dlogdet"].to(logdet.dtype)]
    )
    with torch.no_grad():
        inverse, inverse_logdet = run(tensors, True)
    gradients = {f"d{key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {
        "output": y,
        "log-det": logdet,
        "inverse": inverse,
        "inverse log-det": inverse_logdet,
        **gradients,
    }


def _worst(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
) -> tuple[str, float]:
    """Return the quantity nearest to its limit, and its error as a fraction of that limit."""
    fractions = {}
    for key, exact in truth.items():
        error, baseline = (actual[key].double() - exact).abs(), (plain[key].double() - exact).abs()
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
        by_maximum = error.max() / (2 * baseline.max() + floor)
        by_rms = error.square().mean().sqrt() / (2 * baseline.square().mean().sqrt() + floor)
        fractions[key] = torch.maximum(by_maximum, by_rms).nan_to_num(nan=torch.inf).item()
    return max(fractions.items(), key=lambda item: item[1])


def _step(run: Run, tensors: dict[str, Tensor]) -> Callable[[], object]:
    """Return a function that runs forward and backward once."""
    leaves = {key: tensors[key].detach().requires_grad_() for key in ("x", "a", "scale", "offset")}

    def step() -> object:
        y, logdet = run({**tensors, **leaves}, False)
        return torch.autograd.grad(
            [y, logdet],
            list(leaves.values()),
            [tensors["dy"].to(y.dtype), tensors["dlogdet"].to(logdet.dtype)],
        )

    return step


def _time(run: Run, tensors: dict[str, Tensor], repeats: int) -> tuple[float, float]:
    """Measure forward and backward, interleaved with plain operations.

    Returns:
        The median in seconds, and the median ratio of the plain operations' time to it.
    """
    fused, plain = _step(run, tensors), _step(_plain, tensors)
    _seconds(fused), _seconds(plain)
    pairs = [(_seconds(fused), _seconds(plain)) for _ in range(repeats)]
    seconds = statistics.median(of_fused for of_fused, _ in pairs)
    return seconds, statistics.median(of_plain / of_fused for of_fused, of_plain in pairs)


def _seconds(call: Callable[[], object]) -> float:
    """Measure the seconds of a call until the device is done; on a GPU the mean of five."""
    wait, calls = (torch.cuda.synchronize, 5) if _device().type == "cuda" else (lambda: None, 1)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


class _Device:
    """A timer for the GPU's own time of a call.

    Calls are queued behind copies that take longer than the queueing, so that the GPU never waits
    for a launch.
    """

    CALLS, REPEATS = 5, 3

    def __init__(self) -> None:
        self.source = torch.ones(1 << 28, dtype=torch.uint8, device=_device())
        self.target = torch.empty_like(self.source)
        self._copy()
        self.copy_seconds = statistics.median(
            self._timed(self._copy, copies=10) for _ in range(self.REPEATS)
        )

    def bandwidth(self) -> float:
        """Return the bytes per second of a large copy, read and written together."""
        return 2 * self.source.nbytes / self.copy_seconds

    def share(self, moved: int, seconds: float) -> float | None:
        """Return the bytes moved per second as a share of a large copy's.

        Args:
            moved: Bytes that a call must move.
            seconds: Time of the call.

        Returns:
            The share, or None if the L2 cache could serve the bytes.
        """
        cache = torch.cuda.get_device_properties(self.source.device).L2_cache_size
        return moved / seconds / self.bandwidth() if moved > 2 * cache else None

    def seconds(self, call: Callable[[], object], as_called: float) -> float:
        """Return the median seconds of a call on the GPU.

        Args:
            call: The function to time.
            as_called: Its seconds with Python and launches, which say how many copies to queue.
        """
        copies = math.ceil(2 * self.CALLS * as_called / self.copy_seconds)
        return statistics.median(self._timed(call, copies) for _ in range(self.REPEATS))

    def _copy(self) -> object:
        return self.target.copy_(self.source)

    def _timed(self, call: Callable[[], object], copies: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        for _ in range(copies):
            self._copy()
        begin.record()
        for _ in range(self.CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.CALLS
