"""Stored permutations: both layouts of the stock blocks load into either dialect."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow_kernels.index_cache import hard_index
from fastflow_kernels.permutations import one_hot


class HeldPermutation(NamedTuple):
    """The form in which a block holds its permutation.

    Attributes:
        owner: Name of the block's class, for messages.
        names: Parameters in the state dict: ("w_perm", "w_perm_inv"), or ("w_0",).
        shape: Shape of a matrix: (C, C), or (C, C, 1, ...) with a one per spatial dimension.
        dtype: The matrix's dtype.
        is_index: Whether the block holds an int64 index (C,) instead of a matrix.
        warns_of_index: Whether to warn of a stored index, because it comes from a block with
            another clamp formula.
    """

    owner: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_index: bool
    warns_of_index: bool


def read_permutations(
    state_dict: Mapping[str, Any], prefix: str, held: HeldPermutation
) -> dict[str, Tensor]:
    """Return the stored permutations by name, in the form that the block holds.

    Args:
        state_dict: A module's state dict; names that it lacks are left out.
        prefix: The block's prefix in it.
        held: The form in which the block holds its permutation.

    Raises:
        RuntimeError: One is not a tensor, has another shape, or is not a permutation although the
            block holds an index. Nothing is loaded before, so that the subnet is not changed.

    Warns:
        UserWarning: The stored matrices are not each other's inverse, one is not a rotation, or an
            index was stored by a block with another clamp formula.
    """
    stored = {name: state_dict[prefix + name] for name in held.names if prefix + name in state_dict}
    for name, w in stored.items():
        if not isinstance(w, Tensor):
            raise RuntimeError(f"expected {prefix}{name} to be a tensor, got {type(w).__name__}")
    permutations = {name: _convert(prefix + name, w, held) for name, w in stored.items()}
    if len(permutations) == 2 and not _are_inverse(*permutations.values()):
        warnings.warn(
            f"{prefix}w_perm_inv is not the inverse of {prefix}w_perm: with rev=True the block "
            "will not invert its forward direction. Load both from one checkpoint.",
            stacklevel=3,
        )
    if held.warns_of_index and any(w.dim() == 1 for w in stored.values()):
        warnings.warn(
            f"{prefix}w_perm is stored as an index, as by FrEIA's main branch, which computes "
            "tanh(0.1 a / clamp). This block has dialect 'anomalib' and computes tanh(0.1 a). "
            "Build it with dialect='freia' to get the results of the block that was saved.",
            stacklevel=3,
        )
    return permutations


def inverse_of(w: Tensor) -> Tensor:
    """Return the inverse of an index (C,), or of a matrix (C, C, ...) from SO(C)."""
    return torch.argsort(w) if w.dim() == 1 else w.transpose(0, 1)


def _convert(key: str, w: Tensor, held: HeldPermutation) -> Tensor:
    """Convert a stored index or matrix to the form that the block holds."""
    channels = held.shape[0]
    if w.dim() == 1:
        if (
            w.numel() != channels
            or w.is_floating_point()
            or not torch.equal(w.sort().values, torch.arange(channels, device=w.device))
        ):
            shape = tuple(w.shape)
            raise _load_error(
                held, f"{key} of shape {shape} is not a permutation of {channels} channels"
            )
        return w.long() if held.is_index else one_hot(w.long(), held.dtype).view(held.shape)
    if w.numel() != channels**2 or w.shape[:2] != (channels, channels):
        expected = f"({channels},) or ({channels}, {channels})"
        raise _load_error(held, f"{key} has shape {tuple(w.shape)}, expected {expected}")
    if not w.is_floating_point():
        w = w.float() if held.is_index else w.to(held.dtype)  # copy_ would convert it later anyway
    matrix = w.reshape(channels, channels)
    index = hard_index(matrix)
    if held.is_index:
        if index is None:
            raise _load_error(
                held,
                f"{key} is not a permutation matrix",
                ". For a rotation build the block with permute_soft=True.",
            )
        return index
    if index is None:
        _warn_unless_rotation(key, matrix)
    return w.reshape(held.shape)


def _warn_unless_rotation(key: str, matrix: Tensor) -> None:
    """Warn of a matrix that is not a rotation. The stock blocks load any and multiply by it."""
    identity = torch.eye(matrix.shape[0], device=matrix.device)
    error = (matrix.float() @ matrix.float().T - identity).abs().max()
    if not error < 0.02:  # a rotation rounded to bfloat16 is orthogonal to about 2^-8
        warnings.warn(
            f"{key} is not a rotation: w w^T differs from the identity by {error:.2g}. The block "
            "multiplies by it and leaves it out of the log-determinant, as the stock block does.",
            stacklevel=5,
        )


def _load_error(held: HeldPermutation, reason: str, advice: str = "") -> RuntimeError:
    return RuntimeError(
        f"Error in loading state_dict for {held.owner}: {reason}; nothing was loaded into this "
        f"block{advice}"
    )


def _are_inverse(w: Tensor, w_inv: Tensor) -> bool:
    if w.dim() == 1:
        return torch.equal(torch.argsort(w), w_inv)
    return torch.allclose(w.transpose(0, 1).float(), w_inv.float(), atol=1e-5)
