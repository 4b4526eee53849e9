"""The constants of an operator as a string.

They are one argument, because every argument takes time, and plain text, because a graph may be
stored and run by another process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.coupling import Coupling, CouplingSpec
from fastflow_kernels.layouts import channels_last_of


class Constants(NamedTuple):
    """What an operator is told beside its tensors.

    Attributes:
        spec: The constants of the coupling.
        unpermutes_input: See :class:`~fastflow_kernels.coupling.Coupling`.
        by_pixels: Whether x, y and their gradients are channels-last and every pixel is a row. All
            results have this layout, whatever the strides are at run time. Otherwise they are
            contiguous.
    """

    spec: CouplingSpec
    unpermutes_input: bool
    by_pixels: bool

    def like(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a new tensor of the shape of ``t`` in the layout of the results."""
        layout = channels_last_of(t) if self.by_pixels else torch.contiguous_format
        return torch.empty_like(t, dtype=dtype, memory_format=layout)


# Change it with what an operator computes or takes. Torch stores graphs on disk, and finds them by
# the constants. A graph that another version of this package has stored must not be found.
FORMAT = "1"


def encoded(coupling: Coupling, by_pixels: bool) -> str:
    """Return the constants of a coupling as a string, by operations that Dynamo can compute."""
    spec = coupling.spec
    clamp, scale = (
        torch_private.as_constant(spec.clamp),
        torch_private.as_constant(spec.input_scale),
    )
    numbers, flags = f"{clamp!r} {scale!r}", f"{spec.gin} {coupling.unpermutes_input} {by_pixels}"
    return f"{FORMAT} {numbers} {spec.activation} {flags}"


@lru_cache(maxsize=1024)
def decoded(constants: str) -> Constants:
    """Return the constants that :func:`encoded` has written.

    Raises:
        RuntimeError: Another version of this package has written them.
    """
    version, *rest = constants.split()
    if version != FORMAT:
        raise RuntimeError(
            "another version of fastflow_kernels has made this compiled graph: compile it again"
        )
    clamp, input_scale, activation, gin, unpermutes_input, by_pixels = rest
    spec = CouplingSpec(float(clamp), float(input_scale), activation, gin == "True")
    return Constants(spec, unpermutes_input == "True", by_pixels == "True")
