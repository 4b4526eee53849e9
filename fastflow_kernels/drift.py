"""How far reconstructed activations are off, how much is too much, and what follows from that."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow_kernels.engines import plain
from fastflow_kernels.predicates import is_capturing

# Errors of a reconstructed activation relative to its norm. FastFlow on photographs, 32 blocks,
# float32: the reconstruction is off by 3e-7 and the gradients of a plain chain by 1e-5.
_WANTED = {torch.float32: 2.0**-17, torch.float64: 2.0**-33}  # Above, later passes keep more.
_WARNED = 2.0**-11  # Above, the user is warned.
_REFUSED = 2.0**-6  # Above, the gradients are wrong.
# How much a block's second output may differ from its first; in other dtypes _WARNED.
_SAME = {torch.float64: 2.0**-33}
# An input that is smaller than this times the output is measured by the output.
_SMALL_INPUT = 2.0**-10
_SAFE_NORMS = (2.0**-40, 2.0**40)  # Their squares certainly fit float32.


@dataclass
class Segment:
    """A part of a chain in one forward pass.

    Its first block's input is kept, to compare with, and its last block's output, to start from.

    Attributes:
        first, last: Indices of these two blocks.
        largest: The largest magnitude in that output, once the backward pass has begun. It is not
            finite only if the forward pass overflowed.
    """

    first: int
    last: int
    largest: Tensor | None = None


@dataclass
class Checkpoints:
    """How many blocks lie between two activations that a chain keeps.

    Attributes:
        every: The number that the user has set; None for as many as the measured error allows.
        measured: The number that None stands for, at first infinite.
    """

    every: int | None = None
    measured: float = math.inf

    def spacing(self, dtype: torch.dtype) -> float:
        """Return the number of blocks from one kept activation to the next."""
        if self.every is not None:
            return self.every
        # Half precision loses too much in a single block.
        return 1 if dtype.itemsize == 2 else self.measured

    def act_on(self, error: float, segment: Segment, dtype: torch.dtype) -> None:
        """Act on a segment's error: keep more activations, warn or raise.

        Args:
            error: That of the first block's input, reconstructed from the last block's output.
            segment: The segment.
            dtype: Of the activations.

        Raises:
            RuntimeError: The gradients are wrong.

        Warns:
            RuntimeWarning: The gradients are inaccurate.
        """
        eps, wanted = torch.finfo(dtype).eps, _WANTED.get(dtype, _WARNED)
        if not error > wanted:  # also for NaN, when the forward pass has overflowed
            return
        blocks = segment.last - segment.first + 1
        remedy = "set a smaller checkpoint_every"
        if self.every is None:  # assume that every block multiplies the error alike
            share = math.log(wanted / eps) / math.log(error / eps)
            self.measured = max(1, min(self.measured, int(blocks * share)))
            remedy = f"later passes keep an activation every {self.measured} blocks"
        message = (
            f"the input of block {segment.first} of the reversible chain, reconstructed from the "
            f"output of block {segment.last}, is off by {error:.2g} of its norm, and so are the "
            f"gradients. Discard them; {remedy}. With debug=True, drift_report() names the block "
            "that amplifies most"
        )
        if error > _REFUSED:
            raise RuntimeError(message)
        if error > _WARNED:
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def error_of(reconstructed: Tensor, x: Tensor, y: Tensor, segment: Segment) -> float:
    """Return how far a block's reconstructed input is from the kept one, relative to its norm.

    Args:
        reconstructed: The input (B, C, *S), computed from the output.
        x: The input that was kept.
        y: The output.
        segment: The block's segment.
    """
    # Measure each half by its own norm. A half that is small beside the other loses digits first,
    # which a common norm would hide.
    norms = _norms(x, y, *plain.split(x), *plain.split(reconstructed - x))
    of_input, of_output, *of_halves = norms
    least = 64 * torch.finfo(x.dtype).eps * _largest(of_input, of_output * _SMALL_INPUT)
    error = _largest(
        *(
            _ratio(difference, _largest(half, least))
            for half, difference in zip(of_halves[:2], of_halves[2:], strict=True)
        )
    )
    if math.isnan(error) and segment.largest is not None and segment.largest.isfinite():
        # The inverse has overflowed. Had the forward pass done so, the gradients of a plain chain
        # would be NaN, too.
        return math.inf
    return error


class Differences:
    """Differences between blocks' first and second outputs in a backward pass, not checked yet."""

    def __init__(self) -> None:
        self._errors: list[tuple[int, Tensor]] = []

    def record(self, place: int, again: Tensor, y: Tensor) -> None:
        """Compare a block's second output from the same input with the first.

        On a CPU, where the difference is known at once, it is checked at once.

        Args:
            place: Index of the block.
            again: The second output.
            y: The first output.

        Raises:
            RuntimeError: See :meth:`check`.
        """
        if is_capturing(y):
            return
        # Most are equal, which a CPU sees at once: for (4, 64, 32, 32) in 0.12 ms, where
        # _difference takes 1.3 ms (AMD EPYC).
        if y.device.type != "cpu" or not torch.equal(again, y):
            self._errors.append((place, _difference(again.detach(), y)))
        if y.device.type == "cpu":
            self.check(y.dtype)

    def check(self, dtype: torch.dtype) -> None:
        """Check that no second output differs from the first by more than rounding.

        This is called at the end of a backward pass, so that it waits for a GPU once.

        Raises:
            RuntimeError: A second output differs.
        """
        if not self._errors:
            return
        places, errors = zip(*self._errors, strict=True)
        self._errors.clear()
        allowed = max(_SAME.get(dtype, _WARNED), torch.finfo(dtype).eps)
        for place, error in zip(places, torch.stack(errors).tolist(), strict=True):
            if error > allowed:
                raise RuntimeError(
                    f"block {place} of the reversible chain returned something else when it ran "
                    f"again for its gradients, off by {error:.2g}: its subnet depends on what is "
                    "not replayed (a random generator of its own, random numbers of Python or "
                    "NumPy, a state that is not a buffer). Discard the gradients, and use a chain "
                    "that is not reversible"
                )


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """Return the largest difference of a channel, relative to its largest magnitude in y.

    Each channel has its own measure, because a small one may be the one that differs.
    """
    dims = (0, *range(2, y.dim()))
    magnitude = torch.linalg.vector_norm(y, math.inf, dim=dims)
    least = 64 * torch.finfo(y.dtype).eps * magnitude.amax()
    difference = torch.linalg.vector_norm(x - y, math.inf, dim=dims)
    return (difference / torch.maximum(magnitude, least)).amax()


def _norms(*tensors: Tensor) -> list[float]:
    """Return Euclidean norms, without overflow and without float64, which some devices lack."""
    norms: list[float] = torch.stack(
        [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors]
    ).tolist()
    low, high = _SAFE_NORMS
    return [
        n if n == 0 or low < n < high else _scaled_norm(t)
        for n, t in zip(norms, tensors, strict=True)
    ]


def _scaled_norm(x: Tensor) -> float:
    largest = torch.linalg.vector_norm(x, math.inf).item()
    if not 0 < largest < math.inf:
        return largest
    return largest * torch.linalg.vector_norm(x / largest, dtype=_wide(x)).item()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _largest(*values: float) -> float:
    """Return the maximum, or NaN if a value is NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else part * math.inf  # NaN for 0 of 0
