"""What one coupling computes, apart from its tensors: the few numbers and flags every layer below
the module needs.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

DIALECTS = ("anomalib", "freia")
ACTIVATIONS = ("SIGMOID", "SOFTPLUS", "EXP")


class CouplingSpec(NamedTuple):
    """The constants of a coupling.

    With ``a = subnet(x1)`` split into halves ``(a_s, a_t)``::

        s = clamp * tanh(tanh_scale * a_s)          (minus its mean per sample if gin)
        u = cat(x1, x2 * exp(s) + 0.1 * a_t)
        v = u * scale + offset                      scale = activation(global_scale); 1 if gin

    Attributes:
        clamp: Bound of ``|s|``; 0 makes the coupling additive.
        tanh_scale: Factor on ``a_s`` inside the tanh: 0.1 (dialect "anomalib") or 0.1 / clamp
            (dialect "freia").
        activation: ``"SIGMOID"`` (10 * sigmoid(g - 2)), ``"SOFTPLUS"`` (0.1 * softplus(g,
            beta=0.5)) or ``"EXP"``.
        gin: Volume-preserving coupling (GIN): the mean of ``s`` is removed and ``scale`` is 1.
        folded: scale and offset are part of the matrix product that follows: the eager functions
            then return u in place of v, and take the gradient of log(scale) * u, in place of that
            of v; the log-determinant is the same.
        reverse: The permutation is undone ahead of the coupling: the kernels then read x through
            its index, too (and write its gradient, or the inverse, so). The eager functions take x
            gathered; on a CPU that costs no more.
        gin_rows: Rows of x that make one sample of GIN's mean: the pixels of a sample where the
            eager functions are given pixels as rows.
    """

    clamp: float
    tanh_scale: float
    activation: str
    gin: bool
    folded: bool = False
    reverse: bool = False
    gin_rows: int = 1

    @classmethod
    def of(cls, clamp: Any, dialect: str, activation: str, gin: bool) -> CouplingSpec:
        """Build a spec from the block's options (already validated). The clamp is a number; plain
        operations also take a tensor.
        """
        if type(clamp) is not float and isinstance(clamp, Real):
            clamp = float(clamp)  # a number of NumPy's would keep its precision in the quotient
        return cls(clamp, 0.1 if dialect == "anomalib" else 0.1 / clamp, activation, bool(gin))
