"""Test that cached launches always run the binary that Triton would choose.

Each test draws thousands of argument sets. Nothing is compiled: the executor compares the arguments
that a launch was prepared for with those that it gets. A launcher's key might lack a dtype, an
alignment, or which tensors are None, and nothing else would notice.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS, Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines.triton import engine
from tests.support.executor import gpu, watched

pytestmark = pytest.mark.kernels

# The values from which each part of an argument set is drawn.
LAYOUTS = (
    "contiguous",
    "contiguous",
    "misaligned",
    "every other",
    "wider",
    "wider by 16",
    "repeated",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHOICES: dict[str, Sequence[Any]] = {
    "shape": (
        (1, 2),
        (2, 5),
        (16, 33),
        (16, 64),
        (32, 16),
        (1, 4, 16),
        (2, 7, 15),
        (2, 8, 4, 4),
        (16, 16, 16),
        (2, 8, 1),
        (4, 1, 4),
    ),
    "x": LAYOUTS,
    "a": LAYOUTS,
    "dy": LAYOUTS,
    **{
        name: (*["contiguous"] * 9, "misaligned")
        for name in ("g", "offset", "perm", "inv", "dlogdet")
    },
    # Of a side alone: where its results go, if not to new tensors.
    "side": (False, False, True),
    "y": (None, *LAYOUTS[1:-1]),
    "dx": (None, *LAYOUTS[1:-1]),
    "y dtype": DTYPES,
    "function": ("tanh", "atan"),
    "shift scale": (0.1, 1.0),
    "mean per pixel": (False, True),
    "has index": (True, True, True, False),
    "dlogdet stride": (None, 0, 1, 2, 16),
    "rows of a sample": (1, 2),
    "x dtype": DTYPES,
    "a dtype": DTYPES,
    "g dtype": DTYPES,
    "offset dtype": DTYPES,
    "dlogdet dtype": (torch.float32, torch.float64),
    "clamp": (1.9, 2.0),
    "dialect": DIALECTS,
    "activation": ACTIVATIONS,
    "gin": (False, False, True),
    "unpermutes input": (False, True),
    "want params": (False, True),
}


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Return a tensor in a layout that the kernels take."""
    batch, channels, *spatial = shape
    if layout == "misaligned":
        return torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    if layout == "every other":
        return torch.zeros(2 * batch, *shape[1:], dtype=dtype)[::2]
    if layout.startswith("wider"):
        return torch.zeros(batch, channels + (16 if "16" in layout else 1), *spatial, dtype=dtype)[
            :, :channels
        ]
    return (
        torch.zeros(1, *shape[1:], dtype=dtype).expand(shape)
        if layout == "repeated"
        else torch.zeros(shape, dtype=dtype)
    )


def call_all(arguments: dict[str, Any]) -> None:
    """Call every launcher with these arguments."""
    shape = arguments["shape"]
    batch, channels, *spatial = shape
    x = tensor(shape, arguments["x dtype"], arguments["x"])
    a = tensor((batch, channels // 2 * 2, *spatial), arguments["a dtype"], arguments["a"])
    coupling = coupling_of(arguments, channels)
    log_det = None
    if arguments["dlogdet stride"] is not None:
        if batch % 2 == 0 and not coupling.spec.gin:
            coupling = coupling._replace(rows_per_sample=arguments["rows of a sample"])
        samples = batch // coupling.rows_per_sample
        memory = tensor((1, 16 * batch + 1), arguments["dlogdet dtype"], arguments["dlogdet"])
        log_det = memory.as_strided(
            (samples,), (arguments["dlogdet stride"],), memory.storage_offset()
        )
    if arguments["side"]:
        call_side(x, arguments, log_det, coupling)
        return
    y, _ = engine.forward(x, a, coupling)
    grads = OutputGrads(tensor(shape, y.dtype, arguments["dy"]), log_det)
    engine.backward(x, a, grads, coupling, arguments["want params"])
    back = engine.invert_passive(x, coupling)
    engine.invert_active(x, back, a, coupling)
    engine.invert_and_backward(x, back, a, grads, coupling, arguments["want params"])


def call_side(
    x: Tensor, arguments: dict[str, Any], log_det: Tensor | None, coupling: Coupling
) -> None:
    """Call the launchers of a side, whose x is the active half alone."""
    batch, channels, *spatial = shape = arguments["shape"]
    a = tensor((batch, 2 * channels, *spatial), arguments["a dtype"], arguments["a"])
    spec = coupling.spec._replace(
        activation=None,
        function=arguments["function"],
        shift_scale=arguments["shift scale"],
        mean_per_pixel=coupling.spec.gin and arguments["mean per pixel"],
    )
    coupling = Coupling(None, None, spec, rows_per_sample=coupling.rows_per_sample)
    y, dx = (
        None if arguments[name] is None else tensor(shape, dtype, arguments[name])
        for name, dtype in (("y", arguments["y dtype"]), ("dx", x.dtype))
    )
    y, _ = engine.forward(x, a, coupling, y)
    grads = OutputGrads(tensor(shape, y.dtype, arguments["dy"]), log_det)
    engine.backward(x, a, grads, coupling, False, dx)
    engine.invert_active(x, y, a, coupling)
    engine.invert_and_backward(x, y, a, grads, coupling, False)


def coupling_of(arguments: dict[str, Any], channels: int) -> Coupling:
    g, offset = (
        tensor((1, channels), arguments[f"{name} dtype"], arguments[name]).view(-1)
        for name in ("g", "offset")
    )
    perm, inv = (
        tensor((1, channels), torch.int64, arguments[name]).view(-1)
        if arguments["has index"]
        else None
        for name in ("perm", "inv")
    )
    spec = CouplingSpec.of(
        arguments["clamp"], arguments["dialect"], arguments["activation"], arguments["gin"]
    )
    return Coupling(g, offset, spec, perm, inv, arguments["unpermutes input"])


@pytest.mark.parametrize("seed", range(3))
def test_the_binary_that_runs_is_the_one_that_triton_would_choose(seed: int) -> None:
    """Each set of arguments differs from the one before in one part.

    Each is called twice; the second call goes straight to the binary.
    """
    rng = random.Random(seed)
    with gpu(is_compiling=False), watched() as launches:
        for _ in range(50):
            drawn = {name: rng.choice(values) for name, values in CHOICES.items()}
            for name in rng.sample(sorted(CHOICES), len(CHOICES)):
                drawn[name] = rng.choice(CHOICES[name])
                call_all(drawn)
                call_all(drawn)
    assert len(launches) > 10_000
