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
from fastflow_kernels.coupling import Coupling, Halves
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
    scales = plain.GlobalScales([call.global_scale.detach() for call in calls], calls[0].spec)
    couplings = [block.engine_coupling(call, route) for call in calls]
    passive, halves = split_for_chain(x, route.with_gradients)
    for k, call in enumerate(calls):
        a = packed(coefficients(call, passive))
        if engine is eager:  # the Triton kernels compute the scale themselves
            couplings[k] = _with_scale(couplings[k], scales, k, a, halves)
        step = Step(couplings[k], engine, k == len(calls) - 1)
        passive, halves, sum_s = couple(halves, a, step, route.with_gradients)
        sums.append(sum_s)
    pixels = x.shape[2:].numel()
    if route.with_gradients:
        return passive, log_det_with_gradient(engine, couplings, pixels, sums)
    return passive, engine.log_det_of_chain(sums, couplings, pixels)


def _with_scale(
    coupling: Coupling, scales: plain.GlobalScales, k: int, a: Tensor, x: Halves
) -> Coupling:
    with torch.no_grad():
        scale = scales.affine(k, coupling.parameters[1], x.passive, a).scale
    return coupling._replace(scale=scale)
