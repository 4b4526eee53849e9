"""The options of a block, which are checked before anything is drawn or built."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS


def check_dims(
    dims_in: Sequence[Sequence[int]], dims_c: Sequence[Sequence[int]] | None
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Check the declared shapes of the input and the conditions, and return them as tuples.

    Args:
        dims_in: ``[(C, *S)]`` with C >= 1 and 0 to 3 spatial dimensions.
        dims_c: ``[(C_k, *S), ...]``, or None for no conditions.

    Raises:
        TypeError, ValueError: They are not lists of such shapes.
    """
    dims_in = _parse_shapes("dims_in", dims_in)
    dims_c = _parse_shapes("dims_c", dims_c if dims_c is not None else [])
    if len(dims_in) != 1:
        raise ValueError(f"expected dims_in with one shape (C, *S), got {len(dims_in)}: {dims_in}")
    if len(dims_in[0]) > 4:
        raise ValueError(
            "expected data of rank 0 to 3 (1 to 4 dimensions without the batch), got dims_in "
            f"{dims_in}"
        )
    if dims_in[0][0] < 1 or min(dims_in[0]) < 0:
        raise ValueError(
            f"expected at least one channel and no negative size, got dims_in {dims_in}"
        )
    for shape in dims_c:
        if shape[1:] != dims_in[0][1:]:
            raise ValueError(
                f"expected conditions of the input's spatial shape {dims_in[0][1:]}, got dims_c "
                f"{dims_c}"
            )
    return dims_in, dims_c


def _parse_shapes(name: str, value: Any) -> list[tuple[int, ...]]:
    message = f"expected {name} as a list of shapes such as [(64, 32, 32)], got {value!r}"
    if name == "dims_c" and isinstance(value, list) and any(shape is None for shape in value):
        # SequenceINN.append makes such a list of cond without cond_shape
        message += ": append(block, cond=0, cond_shape=(8,)) needs both"
    try:
        shapes = [tuple(operator.index(n) for n in shape) for shape in value]
    except TypeError:
        raise TypeError(message) from None
    if any(not shape for shape in shapes):
        raise ValueError(message)
    return shapes


def check_constructor(subnet_constructor: Any) -> Callable[[int, int], nn.Module]:
    """Check that the subnet's constructor is callable and not a module, and return it.

    Raises:
        TypeError, ValueError: It is not.
    """
    if subnet_constructor is None:
        raise ValueError(
            "expected a subnet_constructor, called as f(channels_in, channels_out); got None"
        )
    if not callable(subnet_constructor) or isinstance(subnet_constructor, nn.Module):
        raise TypeError(
            "expected subnet_constructor to be callable, as f(channels_in, channels_out); got "
            f"{type(subnet_constructor).__name__}"
        )
    return subnet_constructor


def check_subnet(subnet: Any) -> Any:
    """Check that a subnet is callable, and return it.

    Raises:
        TypeError: It is not.
    """
    if not callable(subnet):
        raise TypeError(
            f"expected subnet_constructor to return a module, got {type(subnet).__name__}"
        )
    return subnet


def check_options(clamp: Any, householder: Any, dialect: Any) -> None:
    """Check the clamp, the number of reflections and the dialect.

    Raises:
        TypeError, ValueError: One of them is not valid.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"expected dialect to be one of {', '.join(DIALECTS)}; got {dialect!r}")
    check_clamp("affine_clamping", clamp)
    if clamp == 0 and dialect == "freia":
        raise ValueError(
            "affine_clamping=0 divides by zero in dialect 'freia'. Use dialect='anomalib', where "
            "it makes an additive coupling"
        )
    try:
        negative = operator.index(householder) < 0
        if isinstance(householder, bool):
            raise TypeError
    except TypeError:
        raise TypeError(
            f"expected learned_householder_permutation to be an integer, got {householder!r}"
        ) from None
    if negative:
        raise ValueError(
            "expected learned_householder_permutation, a number of reflections, to be 0 or more; "
            f"got {householder!r}"
        )


def check_clamp(name: str, clamp: Any) -> None:
    """Check that a clamp is a finite number.

    Raises:
        TypeError, ValueError: It is not.
    """
    if not math.isfinite(_to_float(name, clamp)):
        raise ValueError(f"expected a finite {name}, got {clamp}")


def check_split(split_len: Any, channels: int) -> int:
    """Return the number of channels of a coupling block's first part.

    Args:
        split_len: That number, or as a float its share of the channels.
        channels: C.

    Raises:
        TypeError, ValueError: It is not between 0 and C, or as a float between 0 and 1.
    """
    is_share = isinstance(split_len, float)
    if not 0 <= _to_float("split_len", split_len) <= (1 if is_share else channels):
        raise ValueError(
            f"expected split_len in [0, 1] as a float or in [0, {channels}] as an integer; got "
            f"{split_len}"
        )
    return round(channels * split_len) if is_share else operator.index(split_len)


def _to_float(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    return float(value)


def initial_global_scale(activation: str, init: float, dialect: str) -> float:
    """Return the g with activation(g) = init.

    It is computed in the stock block's precision, so that both blocks start with the same bits.

    Args:
        activation: ``"SIGMOID"``, ``"SOFTPLUS"`` or ``"EXP"``.
        init: The initial global scale, in the activation's range.
        dialect: ``"anomalib"`` or ``"freia"``.

    Raises:
        TypeError, ValueError: The activation is unknown, or init is outside of its range.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expected global_affine_type to be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    init = _to_float("global_affine_init", init)
    upper = 10.0 if activation == "SIGMOID" else math.inf
    if not 0.0 < init < upper:
        raise ValueError(
            f"expected global_affine_init in (0, {upper:g}), the range of {activation}; got {init}"
        )
    dtype = torch.get_default_dtype() if dialect == "anomalib" else torch.float64
    if activation == "SIGMOID":
        start = 10.0 / init - 1.0
        rounded, exact = 2.0 - _to_tensor(start, dtype).log(), 2.0 - math.log(start)
    elif activation == "SOFTPLUS":
        start = 5.0 * init
        rounded, exact = (
            2.0 * (_to_tensor(start, dtype).exp() - 1).log(),
            2.0 * (start + math.log(-math.expm1(-start))),
        )
    else:
        assert activation == "EXP"
        rounded, exact = _to_tensor(init, dtype).log(), math.log(init)
    g = rounded.item()
    # not finite where init leaves that precision's range, or a step rounds to 0
    return g if math.isfinite(g) else exact


def _to_tensor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")
