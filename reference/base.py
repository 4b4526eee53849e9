"""The interface of an invertible module of a flow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

Shape = tuple[int, ...]


class InvertibleModule(nn.Module):
    """A bijection with a tractable log-determinant.

    It has the interface of ``FrEIA.modules.InvertibleModule``. A subclass maps a tuple of tensors
    to a tuple of tensors, ``(z,), log_det = module((x,))``. ``module((z,), rev=True)`` is the
    inverse and returns ``(x,), -log_det``.

    Args:
        dims_in: Shape of each input without the batch dimension, such as ``[(64, 32, 32)]``.
        dims_c: Shape of each condition without the batch dimension. None or empty without
            conditions.

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
        """Map the inputs forward, or apply the inverse if ``rev``.

        Args:
            x_or_z: The inputs, each (B, *dims_in[i]).
            c: The conditions, each (B, *dims_c[i]).
            rev: Whether to apply the inverse.
            jac: Whether the log-determinant is needed.

        Returns:
            The outputs, and ``log |det J|`` of the direction that was evaluated, (B,), in nats per
            sample.

        Raises:
            NotImplementedError: Always, because a subclass defines it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x_or_z, c, rev, jac)")

    def log_jacobian(self, *args: object, **kwargs: object) -> None:
        """Refuse, because `forward` returns the log-determinant.

        Raises:
            DeprecationWarning: Always.
        """
        raise DeprecationWarning(
            "log_jacobian() was removed: call forward(..., jac=True), which returns (outputs, "
            "log-determinant)"
        )

    def output_dims(self, input_dims: list[Shape]) -> list[Shape]:
        """Return the output shapes that belong to ``input_dims``, without the batch dimension.

        Raises:
            NotImplementedError: Always, because a subclass defines it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define output_dims(input_dims)")
