"""Call the kernels' launchers directly, without a module, autograd or a subnet."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads

# "reversible" is a chain's inverse and backward pass together.
PASSES = ("forward", "backward", "inverse", "reversible")


class Inputs(NamedTuple):
    """The arguments of the passes.

    Attributes:
        x: The input (B, C, *S), or the output if the pass inverts.
        a: The subnet's output.
        grads: Gradients of the output and of the log-determinant.
        coupling: The coupling.
    """

    x: Tensor
    a: Tensor
    grads: OutputGrads
    coupling: Coupling


def run_pass(name: str, inputs: Inputs) -> object:
    """Launch one of PASSES, with the parameters' gradients and the log-determinant."""
    from fastflow_kernels.engines.triton import engine

    x, a, grads, coupling = inputs
    if name == "forward":
        return engine.forward(x, a, coupling)
    if name == "backward":
        return engine.backward(x, a, grads, coupling, True)
    u = engine.invert_passive(x, coupling)
    if name == "inverse":
        return engine.invert_active(x, u, a, coupling)
    return engine.invert_and_backward(x, u, a, grads, coupling, True)


def spec_of(options: dict[str, Any]) -> CouplingSpec:
    """Return the constants of a block with these options."""
    return CouplingSpec.of(
        options.get("affine_clamping", 2.0),
        "anomalib",
        options.get("global_affine_type", "SOFTPLUS"),
        options.get("gin_block", False),
    )
