"""The values that a block and an engine exchange: constants, operands and gradients."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

DIALECTS = ("anomalib", "freia")
ACTIVATIONS = ("SIGMOID", "SOFTPLUS", "EXP")


class CouplingSpec(NamedTuple):
    """The constants of a coupling.

    With ``a = subnet(x1)`` split into halves ``(a_s, a_t)``::

        s = clamp * f(input_scale * a_s)            (minus its mean if gin)
        u = cat(x1, x2 * exp(s) + shift_scale * a_t)
        v = u * scale + offset                      scale = activation(global_scale); 1 if gin

    Attributes:
        clamp: Factor of f; 0 makes the coupling additive.
        input_scale: Factor on ``a_s`` inside f: 0.1 (dialect "anomalib"), 0.1 / clamp (dialect
            "freia"), or 1 and 0.5 (FrEIA's coupling blocks).
        activation: ``"SIGMOID"`` (10 * sigmoid(g - 2)), ``"SOFTPLUS"`` (0.1 * softplus(g,
            beta=0.5)) or ``"EXP"``. None without a global affine.
        gin: Volume-preserving coupling (GIN): the mean of ``s`` is removed and ``scale`` is 1.
        function: The clamp function f, ``"tanh"`` or ``"atan"``. ``"sigmoid"`` is tanh by a
            sigmoid, in a tenth of its time on a CPU. With the input scale 0.5 it is FrEIA's
            2 * sigmoid(a_s) - 1, and as accurate: where a_s is small, s is off by up to 4 * 2**-24
            of the clamp in float32. ``"additive"`` stands for s = 0 and a = a_t (NICE), which the
            plain operations alone compute.
        shift_scale: Factor on ``a_t``.
        mean_per_pixel: Whether GIN's mean runs over the channels of a pixel. Otherwise it runs over
            a whole sample.
    """

    clamp: float
    input_scale: float
    activation: str | None
    gin: bool
    function: str = "tanh"
    shift_scale: float = 0.1
    mean_per_pixel: bool = False

    @classmethod
    def of(cls, clamp: Any, dialect: str, activation: str, gin: bool) -> CouplingSpec:
        """Build a spec from the block's options, which are validated already.

        Args:
            clamp: A number; the plain operations also take a tensor.
            dialect: "anomalib" or "freia".
            activation: See the class.
            gin: See the class.
        """
        if type(clamp) is not float and isinstance(clamp, Real):
            clamp = float(clamp)  # a NumPy scalar would keep its precision in 0.1 / clamp
        return cls(clamp, 0.1 if dialect == "anomalib" else 0.1 / clamp, activation, bool(gin))


class Coupling(NamedTuple):
    """The operands of an engine beside x (B, C, *S) and the coefficients a (B, 2*C2, *S).

    Attributes:
        global_scale: C elements, before the activation. None for one side of a coupling block: it
            has no global affine and no permutation, and x is the active half alone, so that C2 = C.
        global_offset: C elements, or None.
        spec: The constants.
        perm: int64 (C,): y[:, j] = v[:, perm[j]]; None for the identity.
        inv: argsort(perm), or None.
        unpermutes_input: Whether the engine inverts the permutation ahead of the coupling. It then
            reads x through ``inv``, and writes the gradient of x, or the inverse, in the same way.
            Triton only.
        rows_per_sample: Number of rows of x per sample, where the pixels of a channels-last image
            are passed as rows. GIN's mean and the gradient of the log-determinant are per sample.
        exp: exp(s) of a side, (B, C, *S). The forward pass of the eager engine writes it, if it is
            there, and the backward pass reads it. On a CPU to compute s again would take longest.
        shift: a_t of a side, (B, C, *S), if another subnet than that of a_s returns it. Then a is
            a_s alone. The gradient of a_t is that of y.
        scale: activation(global_scale), C elements in the dtype of the computation, if a chain has
            computed it for all of its blocks. The Triton kernels compute it themselves.
    """

    global_scale: Tensor | None
    global_offset: Tensor | None
    spec: CouplingSpec
    perm: Tensor | None = None
    inv: Tensor | None = None
    unpermutes_input: bool = False
    rows_per_sample: int = 1
    exp: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """The global scale, before its activation, and the offset. A side has none."""
        assert self.global_scale is not None
        assert self.global_offset is not None
        return self.global_scale, self.global_offset

    @property
    def is_side(self) -> bool:
        """Whether x is the active half alone: see ``global_scale``."""
        return self.global_scale is None


class OutputGrads(NamedTuple):
    """Gradients of a coupling's two results.

    Attributes:
        y: (B, C, *S).
        log_det: (samples,), or None for zero.
    """

    y: Tensor
    log_det: Tensor | None


class CouplingGrads(NamedTuple):
    """Gradients of a coupling's operands, each in the shape and dtype of its tensor.

    Attributes:
        x: (B, C, *S).
        a: (B, 2*C2, *S).
        global_scale: C elements; None unless wanted, and for GIN.
        global_offset: C elements; None unless wanted.
    """

    x: Tensor
    a: Tensor
    global_scale: Tensor | None
    global_offset: Tensor | None


class Halves(NamedTuple):
    """A tensor (B, C, *S) between two blocks of a chain, as its two halves, each contiguous.

    Attributes:
        passive: The channels that the next subnet reads, (B, C - C//2, *S).
        active: The channels that the next coupling transforms, (B, C//2, *S).
    """

    passive: Tensor
    active: Tensor


class ChainGrads(NamedTuple):
    """Gradients of the results of a coupling in a chain.

    Attributes:
        y: (B, C, *S), from the next coupling. It is in halves if y is.
        from_subnet: That of y's passive half from the next subnet, (B, C - C//2, *S). It is to be
            added. None for zero.
        log_det: (B,), or None for zero.
    """

    y: Tensor | Halves
    from_subnet: Tensor | None
    log_det: Tensor | None


class ChainCouplingGrads(NamedTuple):
    """Gradients of the operands of a coupling in a chain: see :class:`CouplingGrads`.

    Attributes:
        x: (B, C, *S), in halves if x is. The part of the subnet is not in it.
        a, global_scale, global_offset: See :class:`CouplingGrads`.
    """

    x: Tensor | Halves
    a: Tensor
    global_scale: Tensor | None
    global_offset: Tensor | None
