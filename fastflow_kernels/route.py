"""Chooses the path of a checked call, and says why."""

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

# How much larger an input may be and still count as small where gradients are taken and a soft
# permutation's product dominates. A train step takes 1.03 to 1.10 times as long fused, subnet
# included: (1024, 64), (128, 512), (256, 256), (2, 96, 16, 16), (4, 64, 16, 16), one thread of an
# AMD EPYC. Without gradients fused is the faster one.
PRODUCT_COST = 4


class Case(NamedTuple):
    """A kind of call, and what runs then, in words."""

    call: str
    runs: str


# What runs where, in the order in which it is decided: the first case that holds counts. The first
# is decided by the block, whose steps they are (`why_not_fused`). `info` prints these tables, and
# README.md holds them (tests/test_docs.py).
STOCK_STEPS = Case(
    "a step overridden or exchanged; a clamp that is a tensor; integer input",
    "the stock block's steps, one by one, in plain operations",
)
RECORDED = Case(
    "torch.compile, export, tracing, torch.func, forward mode, fake tensors",
    "plain operations; a graph derives the index from its weights",
)
SMALL_INPUT = Case(
    f"up to {SMALL} elements on a CPU; in training with a soft permutation {PRODUCT_COST * SMALL}",
    "plain operations, which cost less than a Python autograd node",
)
EMPTY = Case("an empty batch", "plain operations")
INVERSE_WITH_GRADIENTS = Case("an inverse while gradients are enabled", "plain operations")
PIXEL_ROWS = Case(
    "channels-last input", "fused, pixel by pixel; output, inverse and gradients stay channels-last"
)
COPIED = Case(
    "on a GPU, other strides within a sample, and channels-last with GIN",
    "fused, on a contiguous copy",
)
FUSED = Case(
    "everything else: any activation, GIN, conditions, rank 0 to 3, four dtypes",
    "fused: Triton on a GPU, eager elsewhere",
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
# What becomes of the permutation where the coupling is fused.
PERMUTATIONS = (
    Case("hard", "an index inside the coupling"),
    Case("soft", "one matrix product after it; a CPU's inverse folds scale and offset into it"),
    Case("Householder", "two thin products (compact WY form); one dense if many, 2K >= C"),
    Case("reverse_permutation", "hard, on a GPU: read through the index; otherwise a pass before"),
)


class Route(NamedTuple):
    """The path of one call.

    Attributes:
        case: Why, and what runs.
        engine: Computes the coupling; None for plain operations.
        layout: Memory format of the result.
        is_copied: The engine is given a contiguous copy of the input.
        unpermutes_inside: With ``reverse_permutation`` the engine inverts the permutation, by
            reading x through the index.
        unpermutes_apart: A pass of its own does, ahead of the coupling; in the inverse the
            opposite one comes last.
        folds_affine: The inverse of scale, offset and permutation is one product with a bias.
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
    """Decide how a call is evaluated; no tensor is computed.

    Raises:
        RuntimeError: The backend is "triton" and cannot be honoured; the message says why.
    """
    x, backend = call.x, requested(call.backend)
    if needs_plain(x):  # first, because a graph must not come to depend on sizes
        if backend == "triton":
            raise _not_triton("the call is being traced, transformed or compiled")
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
    """The route of a call that plain operations do not take.

    Args:
        call: The call.
        backend: "auto", "eager" or "triton": the one that is requested.

    Raises:
        RuntimeError: The backend is "triton" and cannot be honoured.
    """
    x = call.x
    layout = memory_format(x)
    is_channels_last = layout is not torch.contiguous_format
    # GIN's mean runs over all pixels of a sample, and a kernel's rows know nothing of each other
    pixels_suit_triton = is_channels_last and not call.spec.gin
    is_wanted = wants_triton(x, backend, call.spec)
    reason = why_not_triton(x, pixels_suit_triton) if is_wanted else None
    if reason is not None and backend == "triton":
        raise _not_triton(reason)
    is_triton = is_wanted and reason is None
    as_pixels = pixels_suit_triton if is_triton else is_channels_last
    is_copied = is_triton and not as_pixels and not is_packed(x)
    # The eager engine would gather piece by piece what one index_select takes at once (0.3 ns an
    # element at rank 0, 0.1 on planes), and the passive half, for the subnet, once more.
    is_index = isinstance(call.permutation, IndexPermutation)
    unpermutes_inside = call.reverse_permutation and is_triton and is_index
    unpermutes_apart = call.reverse_permutation and not unpermutes_inside
    folds_affine = call.rev and not is_triton and _folds_affine(call)
    with_gradients = torch.is_grad_enabled()
    engine: Engine = triton_engine() if is_triton else eager
    case = COPIED if is_copied else FUSED
    if as_pixels:
        case, engine = PIXEL_ROWS, ByPixels(engine)
    # by position: by name it takes 0.3 us more
    return Route(
        case, engine, layout, is_copied, unpermutes_inside, unpermutes_apart, folds_affine,
        with_gradients,
    )  # fmt: skip


def _is_small_for_a_product(call: BlockCall) -> bool:
    return isinstance(call.permutation, MatrixPermutation) and is_small(call.x, PRODUCT_COST)


def _folds_affine(call: BlockCall) -> bool:
    """Whether u = (w^-1 y - offset) / scale is one product with a bias.

    Saves two passes. Without it an inverse takes 1.04 to 1.08 times as long, subnet included, at
    (4096, 64), (32, 64, 32, 32), (8, 256, 32, 32) and (8, 64, 64, 64), and as long at (256, 512):
    one thread of an AMD EPYC. The matrix must be the smaller one, and the product must have the
    result's dtype: not so under autocast, in half precision, or where global_scale is wider.
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

# Clamps that kernels are compiled for in a process. Each costs half a second a kernel, and its
# binaries stay: a clamp that is annealed, with a new value in every step, runs the eager engine
# from here on.
MOST_CLAMPS = 16
_clamps: set[tuple[float, float]] = set()


def wants_triton(x: Tensor, backend: str, spec: CouplingSpec) -> bool:
    """Whether the Triton engine is wanted for x; on a GPU this counts the clamp."""
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
    """Warn once in a process."""
    warnings.warn(
        f"a kernel is compiled for every clamp, and {MOST_CLAMPS} have been: blocks with yet "
        "another one run the eager functions. Change the clamp in steps, or ask for "
        "backend='triton'",
        stacklevel=2,
    )


@cache
def triton_missing() -> str | None:
    """Why Triton cannot be used in this process at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        triton_engine()
    except Exception as error:  # a broken or too old Triton must not break the eager path
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


@cache
def triton_engine() -> Engine:
    """The Triton engine; importing it imports Triton."""
    from fastflow_kernels.engines.triton import engine

    return engine


def is_interpreted() -> bool:
    """Whether Triton's interpreter is switched on.

    It runs kernels on CPU tensors, slowly, for tests.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not_triton(x: Tensor, as_pixels: bool = False) -> str | None:
    """Why the Triton kernels do not take this input, in words, or None if they do.

    Args:
        x: The block's input, (B, C, *S).
        as_pixels: Whether its pixels are given as rows, (B * P, C).
    """
    if not x.is_cuda and not is_interpreted():
        return f"the input is on {x.device}, and Triton runs on a GPU"
    shape: Sequence[int] = x.shape
    if as_pixels:
        shape = x.numel() // shape[1], shape[1]
    return triton_missing() or why_unsupported(shape, x.dtype)


def _not_triton(reason: str) -> RuntimeError:
    return RuntimeError(
        f"backend 'triton' cannot be used here: {reason}. Use backend='auto' to run what is "
        "available."
    )
