"""The one decision: how a checked call is evaluated, and why."""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow_kernels import torch_private
from fastflow_kernels.backends import requested
from fastflow_kernels.call import BlockCall, SidesCall
from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import ChainEngine, Engine, available, eager, operators
from fastflow_kernels.engines.pixels import ByPixels
from fastflow_kernels.engines.triton.plan import why_unsupported
from fastflow_kernels.layouts import is_packed, memory_format
from fastflow_kernels.permutations import IndexPermutation, MatrixPermutation
from fastflow_kernels.predicates import SMALL, is_autocast, is_small
from fastflow_kernels.torch_private import needs_plain

# Factor on SMALL in training with a soft permutation, because its product dominates. Up to there a
# fused step takes 1.03 to 1.10 times as long (AMD EPYC, 1 thread; shapes in bench/TUNING.md).
PRODUCT_COST = 4


class Case(NamedTuple):
    """A kind of call, and what runs for it, in words."""

    call: str
    runs: str


# What runs where. The first case that applies counts; the block itself decides on STOCK_STEPS.
# `info` prints both tables, and the documentation shows them.
STOCK_STEPS = Case(
    "an overridden or replaced step, a clamp that is a tensor, or integer input",
    "the stock block's steps, one by one, in plain operations",
)
RECORDED = Case(
    "export, ONNX, tracing, torch.func, forward-mode AD, fake tensors, or torch.compile on a CPU "
    "or of a coupling block",
    "plain operations; a recorded graph derives the index from its weights",
)
SMALL_INPUT = Case(
    f"at most {SMALL} elements on a CPU; in training {PRODUCT_COST * SMALL} with a soft "
    f"permutation, and {2 * SMALL} in a coupling block, whose sides see a half each",
    'plain operations with backend "auto", because a fused call has more overhead',
)
ADDITIVE = Case(
    "an additive coupling (NICECouplingBlock)", "plain operations, because nothing can be fused"
)
EMPTY = Case("an input without elements", "plain operations")
INVERSE_WITH_GRADIENTS = Case(
    "the inverse while gradients are enabled",
    "plain operations, because the fused inverse has no gradient",
)
PIXEL_ROWS = Case(
    "channels-last input", "fused, pixel by pixel; results and gradients stay channels-last"
)
COMPILED = Case(
    "torch.compile of an AllInOneBlock on a GPU",
    "fused: the graph calls the Triton kernels as operators; it derives the index, too",
)
COPIED = Case(
    "on a GPU: samples neither contiguous nor channels-last, or an AllInOneBlock with GIN in "
    "channels-last",
    "fused, on a contiguous copy",
)
FUSED = Case(
    "everything else: any activation, GIN, conditions, rank 0 to 3, four dtypes",
    "fused: Triton kernels on a GPU, the eager engine elsewhere",
)
WHAT_RUNS_WHERE = (
    STOCK_STEPS,
    RECORDED,
    ADDITIVE,
    SMALL_INPUT,
    EMPTY,
    INVERSE_WITH_GRADIENTS,
    COMPILED,
    COPIED,
    PIXEL_ROWS,
    FUSED,
)
# How a fused block applies its permutation.
PERMUTATIONS = (
    Case("hard", "an index, applied inside the coupling"),
    Case(
        "soft",
        "one matrix product after the coupling; a CPU's inverse folds scale and offset into it",
    ),
    Case(
        "Householder",
        "two thin matrix products (compact WY form), or one C x C product for C / 2 reflections "
        "or more",
    ),
    Case(
        "reverse_permutation",
        "an index on a GPU: applied while the kernels read the input; otherwise one more pass",
    ),
)


class Route(NamedTuple):
    """The path of one call.

    Attributes:
        case: The reason, and what runs.
        engine: What computes the coupling; None for plain operations.
        layout: Memory format of the result.
        is_copied: Whether the engine gets a contiguous copy of the input.
        unpermutes_inside: Whether the engine inverts the permutation for ``reverse_permutation``,
            by reading x through the index.
        unpermutes_apart: Whether a separate pass does so ahead of the coupling. In the inverse the
            opposite pass comes last.
        folds_affine: Whether the inverse of scale, offset and permutation is one product with a
            bias.
        with_gradients: Whether the engine runs in an autograd node of this package, because
            gradients are enabled. Operators have their own nodes.
    """

    case: Case
    engine: Engine | None = None
    layout: torch.memory_format = torch.contiguous_format
    is_copied: bool = False
    unpermutes_inside: bool = False
    unpermutes_apart: bool = False
    folds_affine: bool = False
    with_gradients: bool = False


_RECORDED, _EMPTY, _SMALL = Route(RECORDED), Route(EMPTY), Route(SMALL_INPUT)
_INVERSE_WITH_GRADIENTS, _ADDITIVE = Route(INVERSE_WITH_GRADIENTS), Route(ADDITIVE)


def choose_route(call: BlockCall | SidesCall) -> Route:
    """Decide how a call is evaluated, without computing a tensor.

    Raises:
        RuntimeError: The backend is "triton" and cannot be used. The message says why.
    """
    x, backend = call.x, requested(call.backend)
    if call.spec.function == "additive":
        return _ADDITIVE
    is_recorded = needs_plain(x)
    if is_recorded and (reason := _why_no_operators(call, backend)) is not None:
        if backend == "triton":
            raise _triton_error(reason)
        return _RECORDED
    with_gradients = torch.is_grad_enabled()
    if not is_recorded:  # a graph must not depend on sizes
        if backend == "auto" and (is_small(x) or (with_gradients and _is_small_in_training(call))):
            return _SMALL
        if not x.numel():
            return _EMPTY
    if call.rev and with_gradients:
        if backend == "triton":
            raise RuntimeError(
                "backend 'triton' has no gradient of the inverse: call it under torch.no_grad(), "
                "or use backend='auto'"
            )
        return _INVERSE_WITH_GRADIENTS
    return _route_of_graph(call) if is_recorded else choose_engine(call, backend)


def choose_engine(call: BlockCall | SidesCall, backend: str) -> Route:
    """Choose the engine for a call that plain operations do not take, and return its route.

    Args:
        call: The call.
        backend: The requested one: "auto", "eager" or "triton".

    Raises:
        RuntimeError: The backend is "triton" and cannot be used. The message says why.
    """
    x = call.x
    layout = memory_format(x)
    is_channels_last = layout is not torch.contiguous_format
    # AllInOneBlock's GIN takes a mean over all pixels, but a kernel treats each row by itself
    pixels_suit_triton = is_channels_last and (not call.spec.gin or call.spec.mean_per_pixel)
    is_wanted = wants_triton(x, backend, call.spec)
    reason = available.why_not_triton(x, pixels_suit_triton) if is_wanted else None
    if reason is not None and backend == "triton":
        raise _triton_error(reason)
    is_triton = is_wanted and reason is None
    as_pixels = pixels_suit_triton if is_triton else is_channels_last
    is_copied = is_triton and not as_pixels and not is_packed(x)
    # One index_select of x takes 0.3 ns an element at rank 0, and 0.1 on planes. The eager engine
    # would gather piece by piece instead, and the passive half once more for the subnet.
    is_index = isinstance(call.permutation, IndexPermutation)
    unpermutes_inside = call.reverse_permutation and is_triton and is_index
    unpermutes_apart = call.reverse_permutation and not unpermutes_inside
    folds_affine = call.rev and not is_triton and _folds_affine(call)
    with_gradients = torch.is_grad_enabled()
    engine: Engine = available.triton_engine() if is_triton else eager
    case = COPIED if is_copied else FUSED
    if as_pixels:
        case, engine = PIXEL_ROWS, ByPixels(engine)
    # by position, because keywords take 0.3 us more
    return Route(
        case, engine, layout, is_copied, unpermutes_inside, unpermutes_apart, folds_affine,
        with_gradients,
    )  # fmt: skip


def choose_chain_engine(call: BlockCall, route: Route) -> ChainEngine | None:
    """Return the engine if it evaluates consecutive blocks together, otherwise None.

    Args:
        call: The first block's call.
        route: Its route.
    """
    runs_together = (
        route.case is FUSED
        and isinstance(call.permutation, IndexPermutation)
        and not (call.rev or call.reverse_permutation or call.spec.gin)
        and is_packed(call.x)
    )
    if not runs_together:
        return None
    return eager if route.engine is eager else available.triton_engine()


def _route_of_graph(call: BlockCall | SidesCall) -> Route:
    """Return the route of a call whose graph may call operators. It depends on no size."""
    x = call.x
    layout = memory_format(x)
    by_pixels = layout is not torch.contiguous_format and not call.spec.gin
    unpermutes_inside = call.reverse_permutation and isinstance(call.permutation, IndexPermutation)
    return Route(
        COMPILED,
        operators.PIXELS if by_pixels else operators.WHOLE_SAMPLES,
        layout,
        is_copied=not by_pixels and not is_packed(x),
        unpermutes_inside=unpermutes_inside,
        unpermutes_apart=call.reverse_permutation and not unpermutes_inside,
    )


def _is_small_in_training(call: BlockCall | SidesCall) -> bool:
    if isinstance(call, SidesCall):
        return is_small(call.x, len(call.sizes))
    return isinstance(call.permutation, MatrixPermutation) and is_small(call.x, PRODUCT_COST)


def _folds_affine(call: BlockCall | SidesCall) -> bool:
    """Return whether u = (w^-1 y - offset) / scale is computed as one product with a bias.

    That saves two passes. Without it an inverse takes 1.04 to 1.08 times as long, subnet included,
    at (4096, 64), (32, 64, 32, 32), (8, 256, 32, 32) and (8, 64, 64, 64). At (256, 512) it takes as
    long. This was measured on one thread of an AMD EPYC. The matrix must have at most half as many
    elements as y. The product must have the result's dtype, which excludes autocast, half precision
    and a wider global_scale.
    """
    permutation, y = call.permutation, call.x
    if not isinstance(permutation, MatrixPermutation):
        return False
    w = permutation.w_inv
    return (
        w.is_floating_point()
        and not w.requires_grad
        and y.numel() >= 2 * w.numel()
        and y.dtype is promoted(y, call.global_scale)
        and y.dtype is accumulator(y.dtype)
        and not is_autocast(y.device)
    )


# --- Triton ---------------------------------------------------------------------------------------

# Most clamps per process that kernels are compiled for. Each costs half a second a kernel, and its
# binaries stay. An annealed clamp, with a new value in every step, then runs the eager engine.
MOST_CLAMPS = 16
_clamps: set[tuple[float, float]] = set()


def wants_triton(x: Tensor, backend: str, spec: CouplingSpec) -> bool:
    """Return whether the Triton engine is wanted for x. On a GPU this counts the clamp."""
    if backend == "triton":
        return True
    if backend == "eager" or not x.is_cuda:
        return False
    return _may_compile((spec.clamp, spec.input_scale))


def _may_compile(clamp: tuple[float, float]) -> bool:
    """Return whether kernels are compiled for a clamp, and count it."""
    if clamp in _clamps:
        return True
    if len(_clamps) >= MOST_CLAMPS:
        _warn_of_annealing()
        return False
    _clamps.add(clamp)
    return True


@cache
def _warn_of_annealing() -> None:
    """Warn, once per process, that new clamps run the eager engine."""
    warnings.warn(
        f"Triton kernels are compiled for each clamp, and this process has used {MOST_CLAMPS}. "
        "Blocks with another clamp run the eager engine. Change the clamp in fewer, larger steps, "
        "or use backend='triton' to compile for every clamp.",
        stacklevel=2,
    )


def _why_no_operators(call: BlockCall | SidesCall, backend: str) -> str | None:
    """Return why a recorded call runs plain operations, or None if its graph calls operators."""
    x = call.x
    if call.global_scale is None:
        return "a coupling block that is compiled or traced has no operators"
    if not torch_private.is_compiled_here():
        return "the call is being traced, exported or transformed"
    for t in (x, call.global_scale, call.global_offset):
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return f"{type(t).__name__} is a subclass of tensors"
    # The clamp comes last, because operators make it a constant of the graph.
    return _why_no_kernels(x.is_cuda, x.dtype, backend) or _why_not_for_clamp(call.spec, backend)


@torch_private.constant_in_graphs
def _why_no_kernels(is_cuda: bool, dtype: torch.dtype, backend: str) -> str | None:
    """Return why a compiled graph cannot call the kernels, or None if it can."""
    if backend == "eager":
        return "backend 'eager' is requested"
    if not is_cuda and not (backend == "triton" and available.is_interpreted()):
        return "the input is not on a GPU"
    return available.why_no_triton() or why_unsupported((1, 1), dtype)


def _why_not_for_clamp(spec: CouplingSpec, backend: str) -> str | None:
    """Return why a compiled graph cannot call kernels for a clamp, or None if it can."""
    clamp, input_scale = spec.clamp, spec.input_scale
    if type(clamp) is not float or type(input_scale) is not float:
        return "the clamp is no Python number, and the compiler takes it as a tensor"
    if not (torch_private.is_constant(clamp) or torch_private.compiles_for_all_sizes()):
        return "the clamp is a variable of the graph, because it has changed"
    if backend == "triton":
        return None
    clamp, input_scale = torch_private.as_constant(clamp), torch_private.as_constant(input_scale)
    return _why_too_many_clamps(clamp, input_scale)


@torch_private.constant_in_graphs
def _why_too_many_clamps(clamp: float, input_scale: float) -> str | None:
    if _may_compile((clamp, input_scale)):
        return None
    return f"kernels were compiled for {MOST_CLAMPS} other clamps"


def _triton_error(reason: str) -> RuntimeError:
    return RuntimeError(
        f"backend 'triton' cannot be used here: {reason}. Use backend='auto' to run what is "
        "available."
    )
