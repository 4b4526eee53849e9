"""The evaluation of consecutive blocks of a chain together, from their checked calls to the result.

Together they compute the same as one after the other, with less in between:

- Global scales and their logarithms are computed once for all blocks.
- On a GPU activations travel from block to block in halves where a subnet would copy its half.
- In the backward pass the Triton kernels add the two gradients of the passive half themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow_kernels import block
from fastflow_kernels.call import BlockCall, coefficients
from fastflow_kernels.chain_steps import Step, couple, log_det_with_gradient
from fastflow_kernels.coupling import Coupling, CouplingSpec, Halves
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import ChainEngine, eager, plain
from fastflow_kernels.fork import fork
from fastflow_kernels.layouts import packed
from fastflow_kernels.permutations import HouseholderPermutation
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
        return _evaluate_plainly([_with_reflections(call, route) for call in calls])
    engine = choose_chain_engine(calls[0], route)
    if engine is not None:
        return _evaluate_by_engine(calls, route, engine)
    x, log_dets = calls[0].x, []
    for call in calls:
        x, log_det = block.evaluate(call._replace(x=x))
        log_dets.append(log_det)
    return x, torch.stack(log_dets).sum(0)


def _evaluate_plainly(calls: Sequence[BlockCall]) -> tuple[Tensor, Tensor]:
    """Evaluate consecutive blocks by ordinary differentiable operations."""
    x, sums, used = calls[0].x, [], []
    stacked, scales = _scales_of([call.global_scale for call in calls], calls[0].spec, x)
    for call, known in zip(calls, scales, strict=True):
        x, sum_s, scale = block.transform_plainly(call, x, known)
        sums.append(sum_s)
        used.append(scale)
    if any(scale is not known for scale, known in zip(used, scales, strict=True)):
        stacked = torch.stack([t for t in used if t is not None])  # a subnet has widened the dtype
    pixels = plain.count_pixels(x)
    sum_s = torch.stack(sums).sum(0)
    return x, plain.add_log_scale(sum_s, stacked, -pixels if calls[0].rev else pixels)


def _scales_of(
    parameters: Sequence[Tensor], spec: CouplingSpec, x: Tensor
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """Return the global scales of blocks, (K, 1, C, 1, ...), and each by itself. None for GIN.

    They have the dtype of the computation with an input x.
    """
    dim = x.dim()
    dtype = accumulator(promoted(x, parameters[0]))
    stacked = torch.stack([plain.per_channel(g, dim, dtype) for g in parameters])
    scale = plain.scale_of(stacked, spec, dim, dtype)
    return scale, [None] * len(parameters) if scale is None else scale.unbind()


def _evaluate_by_engine(
    calls: Sequence[BlockCall], route: Route, engine: ChainEngine
) -> tuple[Tensor, Tensor]:
    """Evaluate consecutive blocks by an engine that takes them together."""
    x, sums = calls[0].x, []
    couplings = [block.engine_coupling(call, route) for call in calls]
    if engine is eager:  # the Triton kernels compute the scale themselves
        couplings = with_scales(couplings, x)
    wants_halves = engine.wants_halves(x)
    values: Tensor | Halves
    passive, values = fork(x, couplings[0], route.with_gradients)
    if wants_halves:  # a convolution would copy a view twice, for itself and for its weight
        passive = passive.contiguous()
    for k, call in enumerate(calls):
        a = packed(coefficients(call, passive))
        couplings[k] = coupling = _fit(couplings[k], passive, a)
        halves = wants_halves and k < len(calls) - 1
        step = Step(coupling, engine, halves, call.output_dtype)
        passive, values, sum_s = couple(values, a, step, route.with_gradients)
        sums.append(sum_s)
        del a  # free memory ahead of the next subnet
    assert isinstance(values, Tensor)  # the last one is whole
    pixels = x.shape[2:].numel()
    if route.with_gradients:
        return values, log_det_with_gradient(engine, couplings, pixels, sums)
    return values, engine.log_det_of_chain(sums, couplings, pixels)


def _with_reflections(call: BlockCall, route: Route) -> BlockCall:
    if isinstance(call.permutation, HouseholderPermutation):
        return block.compute_reflections(call, call.permutation, route)
    return call


def with_scales(couplings: Sequence[Coupling], x: Tensor) -> list[Coupling]:
    """Return the couplings with their scales, computed for all of them at once."""
    parameters = [coupling.parameters[0].detach() for coupling in couplings]
    _, scales = _scales_of(parameters, couplings[0].spec, x)
    return [c._replace(scale=scale) for c, scale in zip(couplings, scales, strict=True)]


def _fit(coupling: Coupling, x: Tensor, a: Tensor) -> Coupling:
    """Return the coupling without its scale if the subnet has widened the dtype."""
    scale = coupling.scale
    if scale is None or scale.dtype is accumulator(promoted(x, a, coupling.global_scale)):
        return coupling
    return coupling._replace(scale=None)
