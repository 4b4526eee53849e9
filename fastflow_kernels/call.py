"""One call of a block: what it is given, checked before any work, and what its subnet returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.errors import InputTypeError, InputValueError
from fastflow_kernels.permutations import Permutation
from fastflow_kernels.torch_private import version_of


class BlockCall(NamedTuple):
    """A checked call of a block.

    Attributes:
        x: (B, C, *S), floating point; the output of the forward direction if ``rev``.
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


def single_input(
    x: Sequence[Tensor], channels: int, rank: int, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Check a block's input before any work and return its one tensor.

    Args:
        x: A list or tuple with one tensor (B, C, *S).
        channels: C.
        rank: Number of spatial dimensions, 0 to 3.
        shape: (C, *S) if it is fixed, else None.

    Raises:
        InputTypeError: Not a list or tuple of tensors, or of a dtype that is neither floating,
            integer nor boolean.
        InputValueError: Not exactly one tensor, or one of another shape.
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
        c: A list of tensors (B, C_k, *S), or None; of any dtype, because they are joined to x,
            and promoted (labels, masks). As in the stock blocks, they may be split in another way
            than declared, and where none is declared they are ignored.
        dims_c: The declared shapes, of which the first number counts: C_k.
        x: The block's input, (B, C, *S).

    Raises:
        InputTypeError: Not a list or tuple of tensors.
        InputValueError: Another number of conditions than declared, or one of another shape.
    """
    if not dims_c:
        return ()
    c = () if c is None else c
    if isinstance(c, Tensor) or not isinstance(c, (list, tuple)):
        raise InputTypeError(
            f"expected the conditions as a list of tensors, got {type(c).__name__}"
        )
    if len(c) != len(dims_c):
        dims_c = _split_otherwise(c, dims_c)
    batch, _, *spatial = x.shape
    for k, condition in enumerate(c):
        _check_dense(condition, "condition", k)
        expected = (batch, dims_c[k][0], *spatial)
        if condition.shape != expected:
            if (
                condition.shape[1:2] != expected[1:2]
                and (split := _split_otherwise(c, dims_c)) is not dims_c
            ):
                return check_conditions(c, split, x)
            raise InputValueError(
                f"expected condition {k} of shape {expected}, got {tuple(condition.shape)}"
            )
        if condition.device != x.device:
            raise InputValueError(
                f"expected condition {k} on {x.device}, where the input is; got {condition.device}"
            )
    return c


def _split_otherwise(
    c: Sequence[Tensor], dims_c: Sequence[Sequence[int]]
) -> Sequence[Sequence[int]]:
    """The shapes of conditions that are split in another way than declared.

    Together they must have as many channels.
    """
    shapes = [tuple(t.shape[1:]) for t in c if isinstance(t, Tensor) and t.dim() > 1]
    channels = sum(shape[0] for shape in shapes)
    if len(shapes) == len(c) and channels == sum(dims[0] for dims in dims_c):
        return shapes
    if len(c) != len(dims_c):
        raise InputValueError(f"expected {len(dims_c)} condition(s), got {len(c)}")
    return dims_c


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# which promote as soon as they are computed with
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
    """Run the subnet on the passive half and the conditions, and check what comes back.

    Args:
        call: The block's call.
        x1: The passive half, (B, C1, *S).

    Returns:
        (B, 2*C2, *S).

    Raises:
        InputTypeError, InputValueError: The subnet returns another shape, or no floating-point
            tensor.
        RuntimeError: The subnet writes to its input. In inference mode only writes to a copy of x
            count: those to x itself have the effect that they have in the stock block.
    """
    subnet, conditions, x = call.subnet, call.conditions, call.x
    version = None
    if conditions:
        a = subnet(torch.cat((x1, *conditions), 1))
    else:
        version = None if torch.compiler.is_compiling() else version_of(x1)
        a = subnet(x1)
    _check_floating(a, "the subnet's output")
    size = x.shape
    if a.shape != size or size[1] % 2:  # an odd channel stays alone
        expected = (size[0], size[1] // 2 * 2, *size[2:])
        if a.shape != expected:
            raise InputValueError(
                f"expected the subnet to return shape {expected}, got {tuple(a.shape)}"
            )
    if a.device != x.device:
        raise InputValueError(
            f"expected the subnet's output on {x.device}, where the input is; got {a.device}"
        )
    if version is not None and version_of(x1) != version:
        raise RuntimeError(
            "the subnet changed its input in place; use out-of-place operations at its start (such "
            "as ReLU(inplace=False))"
        )
    return a


def starts_in_place(subnet: Callable[[Tensor], Tensor]) -> bool:
    """Whether the first layer of a module writes to its input."""
    while isinstance(subnet, torch.nn.Module) and subnet._modules:
        subnet = next(iter(subnet._modules.values()))
    return bool(getattr(subnet, "inplace", False))
