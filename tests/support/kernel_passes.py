"""Call the kernels' launchers directly, without a module, autograd or a subnet."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow_kernels.coupling import ChainGrads, Coupling, CouplingSpec, Halves, OutputGrads

# "reversible" is a chain's inverse and backward pass together.
PASSES = ("forward", "backward", "inverse", "reversible")
# The passes of a block between two others of a chain, and the log-determinant of the chain.
PASSES_BETWEEN_HALVES = ("forward", "backward", "log_det")


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


class InputsInHalves(NamedTuple):
    """The arguments of the passes between halves. Every half is contiguous.

    Attributes:
        x: The input.
        a: The subnet's output.
        y: Where the output goes.
        grads: Gradients of the results.
        coupling: The coupling.
    """

    x: Halves
    a: Tensor
    y: Halves
    grads: ChainGrads
    coupling: Coupling


def empty_inputs_in_halves(
    shape: tuple[int, ...], dtype: torch.dtype, spec: CouplingSpec
) -> InputsInHalves:
    """Return inputs of this shape, (B, C, *S), without values."""
    batch, channels, *spatial = shape
    active = channels // 2

    def empty(channels: int) -> Tensor:
        return torch.empty(batch, channels, *spatial, dtype=dtype)

    x = Halves(empty(channels - active), empty(active))
    g, perm = torch.zeros(channels, dtype=dtype), torch.arange(channels)
    grads = ChainGrads(x, empty(channels - active), torch.zeros(batch))
    return InputsInHalves(x, empty(2 * active), x, grads, Coupling(g, g, spec, perm, perm))


def run_between_halves(name: str, inputs: InputsInHalves, blocks: int = 8) -> object:
    """Launch one of PASSES_BETWEEN_HALVES, the log-determinant for this many blocks."""
    from fastflow_kernels.engines.triton import engine

    x, a, y, grads, coupling = inputs
    if name == "forward":
        return engine.forward_in_chain(x, a, coupling, y)
    if name == "backward":
        return engine.backward_in_chain(x, a, grads, coupling, True)
    sums, pixels = torch.zeros(len(a), 32, device=a.device), a[0, 0].numel()
    return engine.log_det_of_chain([sums] * blocks, [coupling] * blocks, pixels)


def spec_of(options: dict[str, Any]) -> CouplingSpec:
    """Return the constants of a block with these options."""
    return CouplingSpec.of(
        options.get("affine_clamping", 2.0),
        "anomalib",
        options.get("global_affine_type", "SOFTPLUS"),
        options.get("gin_block", False),
    )
