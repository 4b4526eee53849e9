"""The kernels' passes, called by their launchers: no module, no autograd, no subnet."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastflow_kernels.coupling import CouplingSpec

# "reversible": the inverse and the backward of a chain, in one
PASSES = ("forward", "backward", "inverse", "reversible")


class Inputs(NamedTuple):
    """What the passes take.

    Attributes:
        x: The input (B, C, *S); the output, where a pass inverts.
        a: The subnet's output.
        dy: The gradient of the output.
        dlogdet: The gradient of the log-determinant (B,).
        constants: The global scale and offset, the index and its inverse, and the spec.
    """

    x: Tensor
    a: Tensor
    dy: Tensor
    dlogdet: Tensor
    constants: tuple[Tensor, Tensor, Tensor, Tensor, CouplingSpec]


def run_pass(name: str, inputs: Inputs) -> object:
    """Launch one of PASSES, with the gradients of the parameters and the log-determinant."""
    from fastflow_kernels.engines.triton import coupling

    x, a, dy, dlogdet, constants = inputs
    if name == "forward":
        return coupling.coupling_fwd(x, a, *constants, True)
    if name == "backward":
        return coupling.coupling_bwd(dy, dlogdet, x, a, *constants, True)
    u = coupling.coupling_inv_passive(x, *constants)
    if name == "inverse":
        return coupling.coupling_inv_active(x, u, a, *constants, True)
    return coupling.coupling_inv_bwd(x, u, dy, dlogdet, a, *constants, True)


def spec_of(options: dict[str, Any]) -> CouplingSpec:
    """The constants of a block with these options."""
    return CouplingSpec.of(
        options.get("affine_clamping", 2.0),
        "anomalib",
        options.get("global_affine_type", "SOFTPLUS"),
        options.get("gin_block", False),
    )
