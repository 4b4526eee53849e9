"""How far reconstructed activations are off, what is too much, and what follows from that."""

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
_WANTED = {torch.float32: 2.0**-17, torch.float64: 2.0**-33}  # above, passes to come keep more
_WARNED = 2.0**-11  # above this, the user is told
_REFUSED = 2.0**-6  # above this, the gradients are wrong
# As much may a block's second output differ from its first; in other dtypes as much as _WARNED.
_SAME = {torch.float64: 2.0**-33}
# An input that is smaller than this times the output is measured by the output.
_SMALL_INPUT = 2.0**-10
_SAFE_NORMS = (2.0**-40, 2.0**40)  # whose squares float32 certainly holds


@dataclass
class Segment:
    """A part of a chain in one forward pass.

    Its first block's input is kept, to compare with, and its last one's output, to start from.

    Attributes:
        first, last: The blocks' places.
        largest: The largest magnitude in that output, once the backward pass has begun: not finite
            only if the forward pass overflowed.
    """

    first: int
    last: int
    largest: Tensor | None = None


@dataclass
class Checkpoints:
    """How many blocks lie between two activations that a chain keeps.

    Attributes:
        every: As the user has set it; None for as many as the measured error allows.
        measured: What None stands for, at first all.
    """

    every: int | None = None
    measured: float = math.inf

    def spacing(self, dtype: torch.dtype) -> float:
        """Blocks from one kept activation to the next."""
        if self.every is not None:
            return self.every
        # half precision loses too much in a single block
        return 1 if dtype.itemsize == 2 else self.measured

    def heed(self, error: float, segment: Segment, dtype: torch.dtype) -> None:
        """Draw the conclusions from the error between the last and the first block of a segment.

        Raises:
            RuntimeError: The gradients are wrong.

        Warns:
            RuntimeWarning: They are off.
        """
        eps, wanted = torch.finfo(dtype).eps, _WANTED.get(dtype, _WARNED)
        if not error > wanted:  # nan: the forward pass has overflowed
            return
        blocks = segment.last - segment.first + 1
        remedy = "set a smaller checkpoint_every"
        if self.every is None:  # as if every block multiplied the error alike
            share = math.log(wanted / eps) / math.log(error / eps)
            self.measured = max(1, min(self.measured, int(blocks * share)))
            remedy = f"the passes to come keep an activation every {self.measured} blocks"
        message = (
            f"the input of block {segment.first} of the reversible chain, reconstructed from the "
            f"output of block {segment.last}, is off by {error:.2g} of its norm, and the gradients "
            f"are off accordingly: discard them; {remedy}. With debug=True, drift_report() names "
            "the block that amplifies most"
        )
        if error > _REFUSED:
            raise RuntimeError(message)
        if error > _WARNED:
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def error_of(reconstructed: Tensor, x: Tensor, y: Tensor, segment: Segment) -> float:
    """How far a block's reconstructed input is from the kept one, relative to its norm.

    Args:
        reconstructed: The input, computed from the output.
        x: The input that was kept.
        y: The output.
        segment: The block's.
    """
    # by halves: otherwise one that is small beside the other is lost first
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
        # the inverse has overflowed, not the forward pass, whose gradients would be nan in a plain
        # chain, too
        return math.inf
    return error


class Differences:
    """Blocks of a backward pass whose second output differs from the first, not looked at yet."""

    def __init__(self) -> None:
        self._errors: list[tuple[int, Tensor]] = []

    def note(self, place: int, again: Tensor, y: Tensor) -> None:
        """Compare a block's second output from the same input with the first.

        On a CPU, where the difference is known at once, refuse it at once.
        """
        if is_capturing(y):
            return
        # on a CPU most are the same, which is seen at once: (4, 64, 32, 32) in 0.12 ms, where
        # _difference takes 1.3, AMD EPYC
        if y.device.type != "cpu" or not torch.equal(again, y):
            self._errors.append((place, _difference(again.detach(), y)))
        if y.device.type == "cpu":
            self.refuse(y.dtype)

    def refuse(self, dtype: torch.dtype) -> None:
        """Raise RuntimeError if a second output was another one.

        Called at the end of a backward pass, so that a GPU is waited for once.
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
                    "NumPy, a state that is no buffer). Discard the gradients, and use a chain "
                    "that is not reversible"
                )


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference of a channel, relative to the channel's largest magnitude in y.

    A small channel may be the one that differs.
    """
    others = (0, *range(2, y.dim()))
    magnitude = torch.linalg.vector_norm(y, math.inf, dim=others)
    least = 64 * torch.finfo(y.dtype).eps * magnitude.amax()
    difference = torch.linalg.vector_norm(x - y, math.inf, dim=others)
    return (difference / torch.maximum(magnitude, least)).amax()


def _norms(*tensors: Tensor) -> list[float]:
    """Euclidean norms without float64, which not every device has, and without overflow."""
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
    """The maximum, nan if one of them is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else part * math.inf  # nan for 0 of 0
