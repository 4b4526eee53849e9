"""The engines, which compute a coupling, and the functions that they share: :class:`Engine`.

Read :mod:`~fastflow_kernels.engines.plain` first. It is not an engine: it holds the formula as
differentiable operations, which autograd, ``torch.func``, ``torch.compile`` and exports see
through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastflow_kernels.coupling import (
    ChainCouplingGrads,
    ChainGrads,
    Coupling,
    CouplingGrads,
    Halves,
    OutputGrads,
)


class Engine(Protocol):
    """An engine: a coupling with its permutation, its inverse, and gradients derived by hand.

    The modules ``engines.eager`` and ``engines.triton.engine`` are engines, and so is
    :class:`~fastflow_kernels.engines.pixels.ByPixels`, which wraps one of them.

    x and y have shape (B, C, *S), a has shape (B, 2*C2, *S) with C2 = C // 2. For one side of a
    coupling block (``coupling.is_side``) x and y are the active half alone, C2 = C, and each may be
    a view of a larger tensor's channels. Any floating dtype is allowed; a result has the promoted
    dtype of its operands.

    Log-determinants have shape (B,) and are in nats, zero for GIN. They are float64 if x or a is,
    otherwise float32. If several rows of x make one sample (``coupling.rows_per_sample``), there is
    one for each row.
    """

    def forward(
        self, x: Tensor, a: Tensor, coupling: Coupling, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return y and the log-determinant.

        Args:
            x: The block's input, (B, C, *S).
            a: The coefficients: the subnet's output, (B, 2*C2, *S).
            coupling: What to compute, with its parameters and permutation.
            y: Where a side writes its result, (B, C, *S). None for a new tensor.
        """

    def backward(
        self,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
        dx: Tensor | None = None,
    ) -> CouplingGrads:
        """Return the gradients of :meth:`forward`. It computes tanh and exp again.

        Args:
            x, a, coupling: The arguments of :meth:`forward`.
            grads: The gradients of y and of the log-determinant.
            want_params: Whether the gradients of global_scale and global_offset are wanted.
            dx: Where a side writes the gradient of x, (B, C, *S). None for a new tensor.
        """

    def invert_passive(self, y: Tensor, coupling: Coupling) -> Tensor:
        """Return a new x whose passive channels are final, because the subnet needs them.

        :meth:`invert_active` or :meth:`invert_and_backward` then writes the active channels.
        """

    def invert_active(self, y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
        """Write the active channels of x in place and return the inverse's log-determinant.

        Args:
            y: The argument of :meth:`invert_passive`.
            x: What :meth:`invert_passive` returned. If the inverse affine is folded into a matrix
                product, x holds u in all channels. A side only writes to it.
            a: The subnet's output for the passive channels of x.
            coupling: The argument of :meth:`forward`.
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

        Reversible chains, which keep no activations, call it instead of :meth:`invert_active` and
        :meth:`backward`.
        """


class ChainEngine(Engine, Protocol):
    """An engine that also computes the couplings of consecutive blocks of a chain.

    The modules ``engines.eager`` and ``engines.triton.engine`` are such engines. No coupling is
    GIN or a side, none inverts its permutation ahead of it (``unpermutes_input``), and all have an
    index. Activations travel as :meth:`wants_halves` says; those of a chain's ends are whole. All
    have contiguous samples.
    """

    def wants_halves(self, x: Tensor) -> bool:
        """Return whether activations of the shape of x should travel in halves."""

    def forward_in_chain(
        self, x: Tensor | Halves, a: Tensor, coupling: Coupling, y: Tensor | Halves
    ) -> Tensor:
        """Write y, and return sums of s, (B, parts).

        Their sum over the parts is that of s for each sample, up to a factor that
        :meth:`log_det_of_chain` knows.

        Args:
            x: The block's input.
            a: The coefficients, (B, 2*C2, *S), with contiguous samples.
            coupling: What to compute, with its parameters and permutation.
            y: Where to write the result, in the promoted dtype of x, a and the parameters, or in
                another one.
        """

    def backward_in_chain(
        self,
        x: Tensor | Halves,
        a: Tensor,
        grads: ChainGrads,
        coupling: Coupling,
        want_params: bool,
    ) -> ChainCouplingGrads:
        """Return the gradients of :meth:`forward_in_chain` and of the log-determinant.

        The log-determinant is the one of :meth:`forward`, with the sum of log(scale).

        Args:
            x, a, coupling: The arguments of :meth:`forward_in_chain`.
            grads: The gradients of its results. If there is one from a subnet, that of y may be
                written to.
            want_params: Whether the gradients of global_scale and global_offset are wanted.
        """

    def log_det_of_chain(
        self, sums: Sequence[Tensor], couplings: Sequence[Coupling], pixels: int
    ) -> Tensor:
        """Return the log-determinant of consecutive blocks together, (B,), in nats.

        Args:
            sums: What :meth:`forward_in_chain` returned, for each block.
            couplings: The blocks' couplings, of one spec and one dtype of the parameters.
            pixels: Pixels of a sample, P.
        """
