"""The one decision: how a checked call is evaluated, and why."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow_kernels.backends import requested
from fastflow_kernels.call import BlockCall
from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import Engine, eager
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
    "torch.compile, export, tracing, torch.func, forward-mode AD, or fake tensors",
    "plain operations; a recorded graph derives the index from its weights",
)
SMALL_INPUT = Case(
    f"at most {SMALL} elements on a CPU, or {PRODUCT_COST * SMALL} in training with a soft "
    "permutation",
    'plain operations with backend "auto", because a fused call has more overhead',
)
EMPTY = Case("an input without elements", "plain operations")
INVERSE_WITH_GRADIENTS = Case(
    "the inverse while gradients are enabled",
    "plain operations, because the fused inverse has no gradient",
)
PIXEL_ROWS = Case(
    "channels-last input", "fused, pixel by pixel; results and gradients stay channels-last"
)
COPIED = Case(
    "on a GPU: samples neither contiguous nor channels-last, or GIN in channels-last",
    "fused, on a contiguous copy",
)
FUSED = Case(
    "everything else: any activation, GIN, conditions, rank 0 to 3, four dtypes",
    "fused: Triton kernels on a GPU, the eager engine elsewhere",
)
WHAT_RUNS_WHERE = (
    STOCK_STEPS,
    RECORDED,
    SMALL_INPUT,
    EMPTY,
    INVERSE_WITH_GRADIENTS,
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
        with_gradients: Whether gradients are enabled.
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
_INVERSE_WITH_GRADIENTS = Route(INVERSE_WITH_GRADIENTS)


def choose_route(call: BlockCall) -> Route:
    """Decide how a call is evaluated, without computing a tensor.

    Raises:
        RuntimeError: The backend is "triton" and cannot be used. The message says why.
    """
    x, backend = call.x, requested(call.backend)
    if needs_plain(x):  # first, because a graph must not depend on sizes
        if backend == "triton":
            raise _triton_error("the call is being traced, transformed or compiled")
        return _RECORDED
    with_gradients = torch.is_grad_enabled()
    if backend == "auto" and (is_small(x) or (with_gradients and _is_small_for_a_product(call))):
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
    return choose_engine(call, backend)


def choose_engine(call: BlockCall, backend: str) -> Route:
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
    # GIN's mean runs over all pixels of a sample, but a kernel treats each row by itself
    pixels_suit_triton = is_channels_last and not call.spec.gin
    is_wanted = wants_triton(x, backend, call.spec)
    reason = why_not_triton(x, pixels_suit_triton) if is_wanted else None
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
    engine: Engine = triton_engine() if is_triton else eager
    case = COPIED if is_copied else FUSED
    if as_pixels:
        case, engine = PIXEL_ROWS, ByPixels(engine)
    # by position, because keywords take 0.3 us more
    return Route(
        case, engine, layout, is_copied, unpermutes_inside, unpermutes_apart, folds_affine,
        with_gradients,
    )  # fmt: skip


def _is_small_for_a_product(call: BlockCall) -> bool:
    return isinstance(call.permutation, MatrixPermutation) and is_small(call.x, PRODUCT_COST)


def _folds_affine(call: BlockCall) -> bool:
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
    clamp = (spec.clamp, spec.tanh_scale)
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


@cache
def why_no_triton() -> str | None:
    """Return why Triton cannot be used in this process at all, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        triton_engine()
    except Exception as error:  # a broken or too old Triton must not break the eager engine
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


@cache
def triton_engine() -> Engine:
    """Return the Triton engine. The first call imports Triton."""
    from fastflow_kernels.engines.triton import engine

    return engine


def is_interpreted() -> bool:
    """Return whether Triton's interpreter is switched on.

    It runs kernels on CPU tensors, slowly, for tests.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not_triton(x: Tensor, as_pixels: bool = False) -> str | None:
    """Return why the Triton kernels do not take this input, or None if they do.

    Args:
        x: The block's input, (B, C, *S).
        as_pixels: Whether its pixels are passed as rows, (B * P, C).
    """
    if not x.is_cuda and not is_interpreted():
        return f"the input is on {x.device}, and Triton runs on a GPU"
    shape: Sequence[int] = x.shape
    if as_pixels:
        shape = x.numel() // shape[1], shape[1]
    return why_no_triton() or why_unsupported(shape, x.dtype)


def _triton_error(reason: str) -> RuntimeError:
    return RuntimeError(
        f"backend 'triton' cannot be used here: {reason}. Use backend='auto' to run what is "
        "available."
    )
