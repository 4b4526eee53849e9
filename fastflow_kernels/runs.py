"""The evaluation of consecutive blocks of a chain together, from their checked calls to the result.

Together they compute the same as one after the other, with less in between:

- Global scales and their logarithms are computed once for all blocks.
- Between two blocks that run on an engine, the activation travels as its two halves. The next
  subnet gets its half contiguous. In the backward pass the engine reads both of its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow_kernels import block
from fastflow_kernels.call import BlockCall, coefficients
from fastflow_kernels.coupling import Coupling
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import ChainEngine, eager, plain
from fastflow_kernels.halves import Step, couple, log_det_with_gradient, split_for_chain
from fastflow_kernels.layouts import packed
from fastflow_kernels.route import Route, choose_chain_engine, choose_route


def is_alike(call: BlockCall, first: BlockCall) -> bool:
    """Return whether a call is decided like another one on the same x, and computes alike."""
    return (
        call.spec == first.spec
        and call.reverse_permutation == first.reverse_permutation
        and call.backend == first.backend
        and call.output_dtype is first.output_dtype
        and type(call.permutation) is type(first.permutation)
        and call.global_scale.shape == first.global_scale.shape
        and call.global_scale.dtype is first.global_scale.dtype
    )


def evaluate_together(calls: Sequence[BlockCall]) -> tuple[Tensor, Tensor]:
    """Evaluate consecutive blocks of a chain.

    Args:
        calls: Calls that are alike, in the order in which they run. Each has the chain's input for
            its x, which has the shape of the block's input.

    Returns:
        The output of the last block, and the log-determinant of all blocks (B,) in nats. See
        :func:`fastflow_kernels.block.evaluate`.
    """
    route = choose_route(calls[0])
    if route.engine is None:
        return block.evaluate_plainly([block.compute_reflections(call, route) for call in calls])
    engine = choose_chain_engine(calls[0], route)
    if engine is not None:
        return _evaluate_in_halves(calls, route, engine)
    x, log_dets = calls[0].x, []
    for call in calls:
        x, log_det = block.evaluate(call._replace(x=x))
        log_dets.append(log_det)
    return x, torch.stack(log_dets).sum(0)


def _evaluate_in_halves(
    calls: Sequence[BlockCall], route: Route, engine: ChainEngine
) -> tuple[Tensor, Tensor]:
    """Evaluate consecutive blocks by an engine, which passes halves from block to block."""
    x, sums = calls[0].x, []
    couplings = [block.engine_coupling(call, route) for call in calls]
    if engine is eager:  # the Triton kernels compute the scale themselves
        couplings = with_scales(couplings, x)
    passive, halves = split_for_chain(x, route.with_gradients)
    for k, call in enumerate(calls):
        a = packed(coefficients(call, passive))
        couplings[k] = coupling = _fit(couplings[k], halves.passive, a)
        step = Step(coupling, engine, k == len(calls) - 1, call.output_dtype)
        passive, halves, sum_s = couple(halves, a, step, route.with_gradients)
        sums.append(sum_s)
        del a  # free memory ahead of the next subnet
    pixels = x.shape[2:].numel()
    if route.with_gradients:
        return passive, log_det_with_gradient(engine, couplings, pixels, sums)
    return passive, engine.log_det_of_chain(sums, couplings, pixels)


def with_scales(couplings: Sequence[Coupling], x: Tensor) -> list[Coupling]:
    """Return the couplings with their scales, computed for all of them at once."""
    parameters = [coupling.parameters[0].detach() for coupling in couplings]
    dtype = accumulator(promoted(x, parameters[0]))
    scales = plain.GlobalScales(parameters, couplings[0].spec).all(x.dim(), dtype)
    return [c._replace(scale=scale) for c, scale in zip(couplings, scales, strict=True)]


def _fit(coupling: Coupling, x: Tensor, a: Tensor) -> Coupling:
    """Return the coupling without its scale if the subnet has widened the dtype."""
    if a.dtype is x.dtype or coupling.scale is None:
        return coupling
    dtype = accumulator(promoted(x, a, coupling.global_scale))
    return coupling if coupling.scale.dtype is dtype else coupling._replace(scale=None)
