"""The engines: who computes a coupling. Two are modules with the functions of :class:`Engine`.

:mod:`~fastflow_kernels.engines.plain` is not one: it has the formula as differentiable operations,
which autograd, ``torch.func``, ``torch.compile`` and exports see through. Read it first.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads


class Engine(Protocol):
    """A coupling with its permutation, hand-derived: the modules ``engines.eager`` and
    ``engines.triton.engine``, and :class:`~fastflow_kernels.engines.pixels.ByPixels` around one.

    Shapes: x, y (B, C, *S) and a (B, 2*C2, *S), C2 = C // 2, in any floating dtype. A result has
    the promoted dtype of its operands. Log-determinants are in nats, (B,), in float64 where x or a
    is float64, otherwise in float32; zeros for GIN. They are per row where several rows of x make
    one sample (``coupling.rows_per_sample``).
    """

    def forward(self, x: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
        """Return y and the log-determinant."""

    def backward(
        self, x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling, want_params: bool
    ) -> CouplingGrads:
        """Return the gradients of :meth:`forward`; tanh and exp are computed again.

        Args:
            x, a, coupling: As given to the forward.
            grads: Of y and the log-determinant.
            want_params: Whether the gradients of global_scale and global_offset are wanted.
        """

    def invert_passive(self, y: Tensor, coupling: Coupling) -> Tensor:
        """Return a new x of which the passive channels are final; the subnet needs those.

        The active channels are for :meth:`invert_active` or :meth:`invert_and_backward`.
        """

    def invert_active(self, y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
        """Write the active channels of x in place and return the inverse's log-determinant.

        Args:
            y: As given to :meth:`invert_passive`.
            x: What that returned, or all of u where an inverse was folded into a product.
            a: The subnet's output for the passive channels of x.
            coupling: As given to the forward.
        """

    def invert_and_backward(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
    ) -> CouplingGrads:
        """Write the active channels of x in place and return the gradients, in one pass.

        For chains that keep no activations: :meth:`invert_active` and :meth:`backward` together.
        """
