"""The interface that every invertible module of a flow has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

Shape = tuple[int, ...]


class InvertibleModule(nn.Module):
    """A bijection with a tractable log-determinant; the interface of
    ``FrEIA.modules.InvertibleModule``.

    A subclass maps a tuple of tensors to a tuple of tensors, ``(z,), log_det = module((x,))``, and
    back, ``(x,), -log_det = module((z,), rev=True)``.

    Args:
        dims_in: Shape of each input without the batch dimension, such as ``[(64, 32, 32)]``.
        dims_c: Shape of each condition without the batch dimension; None or empty for none.

    Attributes:
        dims_in: The input shapes, a list of tuples.
        dims_c: The condition shapes, a list of tuples.
    """

    def __init__(
        self, dims_in: Iterable[Sequence[int]], dims_c: Iterable[Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        self.dims_in: list[Shape] = [tuple(dims) for dims in dims_in]
        self.dims_c: list[Shape] = [tuple(dims) for dims in dims_c or ()]

    def forward(
        self,
        x_or_z: Sequence[torch.Tensor],
        c: Sequence[torch.Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Map forward, or back if ``rev``.

        Args:
            x_or_z: The inputs, each (B, *dims_in[i]).
            c: The conditions, each (B, *dims_c[i]).
            rev: Apply the inverse.
            jac: Whether the log-determinant is needed.

        Returns:
            The outputs, and ``log |det J|`` of the direction that was evaluated, (B,), in nats per
            sample.

        Raises:
            NotImplementedError: Always; a subclass defines it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x_or_z, c, rev, jac)")

    def log_jacobian(self, *args: object, **kwargs: object) -> None:
        """Removed long ago; `forward` returns the log-determinant.

        Raises:
            DeprecationWarning: Always.
        """
        raise DeprecationWarning(
            "log_jacobian() is gone: forward(..., jac=True) returns (outputs, log-determinant)"
        )

    def output_dims(self, input_dims: list[Shape]) -> list[Shape]:
        """The output shapes that belong to ``input_dims``, both without the batch dimension.

        Raises:
            NotImplementedError: Always; a subclass defines it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define output_dims(input_dims)")
