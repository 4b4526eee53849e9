"""One call of a block: its inputs, checked before any work, and the output of its subnet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.errors import InputTypeError, InputValueError
from fastflow_kernels.permutations import IndexPermutation, Permutation
from fastflow_kernels.torch_private import version_of


class BlockCall(NamedTuple):
    """A checked call of a block.

    Attributes:
        x: (B, C, *S), floating point. With ``rev`` it is an output of the forward direction.
        conditions: Tensors (B, C_k, *S).
        subnet: Maps cat(x1, *conditions), (B, C - C//2 + sum C_k, *S), to the coefficients
            (B, 2 * (C//2), *S).
        global_scale: C elements, before its activation.
        global_offset: C elements.
        permutation: See :mod:`fastflow_kernels.permutations`.
        spec: The coupling's constants.
        rev: Compute the inverse.
        reverse_permutation: Invert the permutation before the coupling (Putzky & Welling 2019).
        backend: "auto", "eager" or "triton".
        output_dtype: The dtype of the output. None for the promoted one.
    """

    x: Tensor
    conditions: Sequence[Tensor]
    subnet: Callable[[Tensor], Tensor]
    global_scale: Tensor
    global_offset: Tensor
    permutation: Permutation
    spec: CouplingSpec
    rev: bool = False
    reverse_permutation: bool = False
    backend: str = "auto"
    output_dtype: torch.dtype | None = None


class Side(NamedTuple):
    """One side of a coupling block: it transforms one part of the channels.

    Attributes:
        subnets: One that maps cat(passive part, *conditions) to the coefficients (a_s, a_t) of the
            active part, or two, one for each.
        active: Which part it transforms, an index into the call's ``sizes``.
        passive: Which part the subnet reads; None if it reads the conditions alone.
    """

    subnets: tuple[Callable[[Tensor], Tensor], ...]
    active: int
    passive: int | None


class SidesCall(NamedTuple):
    """A checked call of a coupling block, which has one or two sides and no global affine.

    Attributes:
        x: (B, C, *S). With ``rev`` it is an output of the forward direction.
        conditions: Tensors (B, C_k, *S).
        sides: In the order of the forward direction.
        sizes: Channels of each part.
        spec: The coupling's constants.
        rev: Compute the inverse.
        backend: "auto", "eager" or "triton".
        global_scale, global_offset, permutation, reverse_permutation: None and False. A
            :class:`BlockCall` has them.
    """

    x: Tensor
    conditions: Sequence[Tensor]
    sides: tuple[Side, ...]
    sizes: tuple[int, ...]
    spec: CouplingSpec
    rev: bool = False
    backend: str = "auto"

    global_scale: None = None
    global_offset: None = None
    permutation: None = None
    reverse_permutation: bool = False


# These are functions, because torch 2.7 cannot trace methods of a NamedTuple.


def ordered_sides(call: SidesCall) -> tuple[Side, ...]:
    """Return the sides in the order in which a call runs them."""
    return call.sides[::-1] if call.rev else call.sides


def side_coefficients(call: SidesCall, side: Side, passive: Tensor | None) -> tuple[Tensor, ...]:
    """Run a side's subnets and check their output: see :func:`run_subnet`.

    Returns:
        (a,), which is (B, 2 * active channels, *S), or the halves (a_s, a_t). An additive side has
        a_t alone.
    """
    x, channels, conditions = call.x, call.sizes[side.active], call.conditions
    if len(side.subnets) == 1:
        channels *= 1 if call.spec.function == "additive" else 2
        return (run_subnet(side.subnets[0], passive, conditions, x, channels),)
    if conditions and passive is not None:
        passive, conditions = torch.cat((passive, *conditions), 1), ()
    scale, shift = side.subnets
    return (
        run_subnet(scale, passive, conditions, x, channels),
        run_subnet(shift, passive, conditions, x, channels),
    )


class PermutationCall(NamedTuple):
    """A call of a module that only permutes channels.

    Attributes:
        x: (B, C, *S).
        permutation: An index.
        rev: Compute the inverse.
        conditions, global_scale, global_offset: Empty and None. A :class:`BlockCall` has them.
    """

    x: Tensor
    permutation: IndexPermutation
    rev: bool = False
    conditions: tuple[()] = ()
    global_scale: None = None
    global_offset: None = None


def single_input(
    x: Sequence[Tensor], channels: int, rank: int, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Check a block's input before any work and return its one tensor.

    Args:
        x: A list or tuple with one tensor (B, C, *S).
        channels: C.
        rank: Number of spatial dimensions, 0 to 3.
        shape: (C, *S) if the size is fixed, otherwise None.

    Raises:
        InputTypeError: It is not a list or tuple of tensors, or its dtype is not one of float32,
            float64, bfloat16, float16, the integers and bool.
        InputValueError: It is not exactly one tensor, or the tensor has another shape.
    """
    if not isinstance(x, (list, tuple)):
        if isinstance(x, Tensor):
            raise InputTypeError(
                f"expected a list with one tensor, got a tensor of shape {tuple(x.shape)}: call "
                "block([x])"
            )
        raise InputTypeError(f"expected a list with one tensor, got {type(x).__name__}")
    if len(x) != 1:
        raise InputValueError(f"expected exactly one input tensor, got {len(x)}")
    x = x[0]
    _check_dense(x, "the input")
    if x.dtype not in _DTYPES and x.dtype not in _INTEGERS:
        raise InputTypeError(
            f"expected the input in a floating-point dtype, got {x.dtype}; "
            f"{', '.join(map(str, _DTYPES))} are supported"
        )
    size = x.shape
    if len(size) != rank + 2 or size[1] != channels:
        spatial = "".join(f", S{i + 1}" for i in range(rank))
        raise InputValueError(
            f"expected an input of shape (B, {channels}{spatial}), got {tuple(size)}"
        )
    if shape is not None and size[1:] != shape:
        raise InputValueError(
            f"expected an input of shape (B, {', '.join(map(str, shape))}), got {tuple(size)}"
        )
    return x


def check_conditions(
    c: Sequence[Tensor] | None, dims_c: Sequence[Sequence[int]], x: Tensor
) -> Sequence[Tensor]:
    """Check a block's conditions before any work and return them.

    Args:
        c: A list of tensors (B, C_k, *S), or None. Any dtype is allowed, because concatenation with
            x promotes it (labels, masks). As in the stock blocks, their channels may be split
            differently than declared, and they are ignored if none are declared.
        dims_c: The declared shapes. Only their first number, C_k, counts.
        x: The block's input, (B, C, *S).

    Raises:
        InputTypeError: It is not a list or tuple of tensors.
        InputValueError: There are more or fewer conditions than declared, or one has another shape
            or device.
    """
    if not dims_c:
        return ()
    c = () if c is None else c
    if isinstance(c, Tensor) or not isinstance(c, (list, tuple)):
        raise InputTypeError(
            f"expected the conditions as a list of tensors, got {type(c).__name__}"
        )
    if len(c) != len(dims_c):
        dims_c = _resolve_split(c, dims_c)
    batch, _, *spatial = x.shape
    for k, condition in enumerate(c):
        _check_dense(condition, "condition", k)
        expected = (batch, dims_c[k][0], *spatial)
        if condition.shape != expected:
            if (
                condition.shape[1:2] != expected[1:2]
                and (actual := _resolve_split(c, dims_c)) is not dims_c
            ):
                return check_conditions(c, actual, x)
            raise InputValueError(
                f"expected condition {k} of shape {expected}, got {tuple(condition.shape)}"
            )
        if condition.device != x.device:
            raise InputValueError(
                f"expected condition {k} on {x.device}, where the input is; got {condition.device}"
            )
    return c


def _resolve_split(c: Sequence[Tensor], dims_c: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Return the actual shapes if the conditions have as many channels in all as declared.

    Otherwise return the declared shapes, so that the caller names the condition that differs.

    Raises:
        InputValueError: The number of conditions differs, and the number of channels too.
    """
    shapes = [tuple(t.shape[1:]) for t in c if isinstance(t, Tensor) and t.dim() > 1]
    channels = sum(shape[0] for shape in shapes)
    if len(shapes) == len(c) and channels == sum(dims[0] for dims in dims_c):
        return shapes
    if len(c) != len(dims_c):
        advice = "" if c else ": pass c=[...]"
        raise InputValueError(f"expected {len(dims_c)} condition(s), got {len(c)}{advice}")
    return dims_c


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# these promote in the first operation with a float
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _check_floating(t: Any, what: str) -> None:
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        _check_dense(t, what)
    if t.dtype not in _DTYPES:
        raise InputTypeError(
            f"expected {what} in a floating-point dtype, got {t.dtype}; "
            f"{', '.join(map(str, _DTYPES))} are supported"
        )


def _check_dense(t: Any, what: str, k: int | None = None) -> None:
    if isinstance(t, Tensor) and t.layout is torch.strided:
        return
    what = what if k is None else f"{what} {k}"
    if not isinstance(t, Tensor):
        raise InputTypeError(f"expected {what} to be a tensor, got {type(t).__name__}")
    raise InputTypeError(f"expected {what} as a dense tensor, got layout {t.layout}")


def coefficients(call: BlockCall, x1: Tensor) -> Tensor:
    """Run the subnet on the passive half and check its output: see :func:`run_subnet`.

    Args:
        call: The block's call.
        x1: The passive half, (B, C1, *S).

    Returns:
        (B, 2*C2, *S).
    """
    return run_subnet(call.subnet, x1, call.conditions, call.x, call.x.shape[1] // 2 * 2)


def run_subnet(
    subnet: Callable[[Tensor], Tensor],
    x1: Tensor | None,
    conditions: Sequence[Tensor],
    x: Tensor,
    channels: int,
) -> Tensor:
    """Run a subnet on passive channels and the conditions, and check its output.

    Args:
        subnet: The subnet.
        x1: The passive channels, (B, C1, *S), or None for the conditions alone.
        conditions: Tensors (B, C_k, *S).
        x: The block's input, (B, C, *S).
        channels: Channels that the subnet must return.

    Returns:
        (B, channels, *S).

    Raises:
        InputTypeError, InputValueError: The subnet's output has another shape or device, or is not
            a floating-point tensor.
        RuntimeError: The subnet writes to its input. In inference mode only writes to a copy of x
            are noticed. Writes to x itself act there as in the stock block.
    """
    version_before = None
    if x1 is None:
        a = subnet(torch.cat(tuple(conditions), 1) if len(conditions) > 1 else conditions[0])
    elif conditions:
        a = subnet(torch.cat((x1, *conditions), 1))
    else:
        version_before = None if torch.compiler.is_compiling() else version_of(x1)
        a = subnet(x1)
    _check_floating(a, "the subnet's output")
    size = x.shape
    if a.shape != size or size[1] != channels:
        expected = (size[0], channels, *size[2:])
        if a.shape != expected:
            raise InputValueError(
                f"expected the subnet to return shape {expected}, got {tuple(a.shape)}"
            )
    if a.device != x.device:
        raise InputValueError(
            f"expected the subnet's output on {x.device}, where the input is; got {a.device}"
        )
    if version_before is not None and x1 is not None and version_of(x1) != version_before:
        raise RuntimeError(
            "the subnet changed its input in place; use out-of-place operations at its start (such "
            "as ReLU(inplace=False))"
        )
    return a


def starts_in_place(subnet: Callable[[Tensor], Tensor]) -> bool:
    """Return whether the first layer of a module writes to its input."""
    while isinstance(subnet, torch.nn.Module) and subnet._modules:
        subnet = next(iter(subnet._modules.values()))
    return bool(getattr(subnet, "inplace", False))
