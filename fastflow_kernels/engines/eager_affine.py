"""The global affine and the permutation of the eager engine.

See :mod:`~fastflow_kernels.engines.eager`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling
from fastflow_kernels.dtypes import cast
from fastflow_kernels.engines.plain import activated


def scale_and_offset(coupling: Coupling, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Return scale and offset as (1, C, 1). The scale is None for GIN."""
    g, offset = coupling.parameters
    offset = cast(offset, dtype).view(1, -1, 1)
    if coupling.spec.gin:
        return None, offset
    if coupling.scale is not None:
        return cast(coupling.scale, dtype).view(1, -1, 1), offset
    return activated(cast(g, dtype).view(1, -1, 1), coupling.spec.activation), offset


def rows_kept_together(coupling: Coupling) -> int:
    """Return how many rows must stay in one chunk: for GIN those that share a mean."""
    return coupling.rows_per_sample if coupling.spec.gin else 0


def store_permuted(v: Tensor, perm: Tensor | None, out: Tensor) -> None:
    """Write v[:, perm] to ``out``. The index may leave channels out."""
    if perm is not None and v.dtype is out.dtype:
        torch.index_select(v, 1, perm, out=out)
    else:
        out.copy_(v if perm is None else v.index_select(1, perm))


def gather(dy: Tensor, inv: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dy[:, inv] in ``dtype``, in ``out`` if that has this dtype, else in a new tensor."""
    if out.dtype is not dtype:
        return dy.to(dtype, copy=True) if inv is None else cast(dy, dtype).index_select(1, inv)
    if inv is not None and dy.dtype is dtype:
        return torch.index_select(dy, 1, inv, out=out)
    return out.copy_(dy if inv is None else dy.index_select(1, inv))
