"""The channel permutations of a block: an index, a matrix, or one of them after reflections.

Index and matrix are fixed, the Householder reflections are learned. Each class has the methods
``permute`` and ``unpermute``. They are differentiable and act on dimension 1 of a (B, C, *S)
tensor. An index is free: the kernels apply it while loading and storing. The others are matrix
products on the coupling's output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.channels import (
    gather_channels,
    multiply_backward,
    multiply_channels,
    product,
    reflect,
)
from fastflow_kernels.dtypes import cast
from fastflow_kernels.predicates import is_autocast


class AfterCoupling(NamedTuple):
    """What remains of a permutation after the coupling, which applies an index itself.

    Attributes:
        inner, outer: Factors (K, C) of :func:`~fastflow_kernels.channels.reflect`, which comes
            first, in the coupling's autograd node; None without reflections.
        permutation: What comes last; None if nothing remains.
    """

    inner: Tensor | None = None
    outer: Tensor | None = None
    permutation: IndexPermutation | MatrixPermutation | HouseholderPermutation | None = None


_NOTHING = AfterCoupling()


class IndexPermutation(NamedTuple):
    """y[:, j] = v[:, perm[j]] ("hard").

    Attributes:
        perm: int64 (C,).
        inv: argsort(perm), int64 (C,).
    """

    perm: Tensor
    inv: Tensor

    def index_pair(self) -> tuple[Tensor, Tensor]:
        """Return the index and its inverse, which an engine applies."""
        return self.perm, self.inv

    def after_coupling(self) -> AfterCoupling:
        return _NOTHING

    def permute(self, v: Tensor) -> Tensor:
        return gather_channels(v, self.perm, self.inv)

    def unpermute(self, y: Tensor) -> Tensor:
        return gather_channels(y, self.inv, self.perm)

    def permute_backward(self, dy: Tensor, rev: bool) -> Tensor:
        """Return the gradient of v from that of permute(v), or with ``rev`` of unpermute(v)."""
        return self.permute(dy) if rev else self.unpermute(dy)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the one-hot (C, C) matrix w with w @ v = v[perm]."""
        return one_hot(self.perm, dtype)


class MatrixPermutation(NamedTuple):
    """y = w v ("soft": w from SO(C)).

    Attributes:
        w: (C, C), or (C, C, 1, ...) with as many ones as there are spatial dimensions.
        w_inv: Its inverse, likewise.
    """

    w: Tensor
    w_inv: Tensor

    def index_pair(self) -> tuple[None, None]:
        return None, None

    def after_coupling(self) -> AfterCoupling:
        return AfterCoupling(permutation=self)

    def permute(self, v: Tensor) -> Tensor:
        return multiply_channels(v, self.w)

    def unpermute(self, y: Tensor) -> Tensor:
        return multiply_channels(y, self.w_inv)

    def permute_backward(self, dy: Tensor, rev: bool) -> Tensor:
        """Return the gradient of v from that of permute(v), or with ``rev`` of unpermute(v)."""
        return multiply_backward(dy, self.w_inv if rev else self.w)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.w.flatten(1).to(dtype)

    def unpermute_affine(self, y: Tensor, scale: Tensor | None, offset: Tensor) -> Tensor:
        """Compute (w^-1 y - offset) / scale as one product with a bias, without gradients.

        Args:
            y: (B, C, *S).
            scale: C elements; None for 1.
            offset: C elements.
        """
        w, bias = self.w_inv.flatten(1), -offset.view(-1)
        if scale is not None:
            w, bias = w / scale.view(-1, 1), bias / scale.view(-1)
        return product(y, w.to(y.dtype), bias.to(y.dtype))


class HouseholderPermutation(NamedTuple):
    r"""y = w_0 H_1 ... H_K v with the reflections H_k = I - 2 v_k v_k^T / (v_k^T v_k).

    The product of the reflections is applied in its compact WY form I - V^T T V (Schreiber & Van
    Loan 1989). V is the (K, C) matrix of the vectors, and T^-1 is the upper triangle of V V^T with
    half of its diagonal. That takes two thin products instead of K products of C x C matrices.

    Attributes:
        base: w_0, an :class:`IndexPermutation` or :class:`MatrixPermutation`.
        vectors: V, (K, C).
        known_factors: The result of :meth:`factors`, if it was computed before.
    """

    base: IndexPermutation | MatrixPermutation
    vectors: Tensor
    known_factors: tuple[Tensor, Tensor] | None = None

    def index_pair(self) -> tuple[None, None]:
        return None, None

    def after_coupling(self) -> AfterCoupling:
        if self.is_dense():
            return AfterCoupling(permutation=self)
        inner, outer = self.factors()
        return AfterCoupling(inner, outer, self.base)

    def computed(self, as_matrix: bool) -> MatrixPermutation | HouseholderPermutation:
        """Return the same permutation with its matrix, or otherwise its factors, computed."""
        if not (as_matrix or self.is_dense()):
            return HouseholderPermutation(self.base, self.vectors, self.factors())
        w = self.matrix(self.vectors.dtype)
        return MatrixPermutation(w, w.T)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return T V and V, both (K, C), in full precision also under autocast."""
        if self.known_factors is not None:
            return self.known_factors
        if is_autocast(self.vectors.device):
            with torch.autocast(self.vectors.device.type, enabled=False):
                return self.factors()
        v = self._wide_vectors()
        dtype = self.vectors.dtype
        return cast(_solve(v), dtype), cast(v, dtype)

    def _wide_vectors(self) -> Tensor:
        """Return the vectors in float32 at least. Some devices do not have float64."""
        return self.vectors if self.vectors.dtype.itemsize > 2 else self.vectors.float()

    def permute(self, v: Tensor) -> Tensor:
        if self.is_dense():
            return multiply_channels(v, self.matrix(self.vectors.dtype))
        return self.base.permute(reflect(v, *self.factors()))

    def unpermute(self, y: Tensor) -> Tensor:
        if self.is_dense():
            return multiply_channels(y, self.matrix(self.vectors.dtype).T)
        solved, vectors = self.factors()
        # the transpose: I - V^T T^T V = I - (T V)^T V
        return reflect(self.base.unpermute(y), vectors, solved)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the (C, C) matrix w_0 H_1 ... H_K, in full precision also under autocast."""
        if is_autocast(self.vectors.device):
            with torch.autocast(self.vectors.device.type, enabled=False):
                return self.matrix(dtype)
        vectors = self._wide_vectors()
        w = self.base.matrix(vectors.dtype)
        if self.is_dense() or vectors.shape[0] == 1:
            for v in vectors:
                w = w - torch.outer(w @ v, v * (2.0 / v.dot(v)))
        else:
            w = w - (w @ vectors.T) @ _solve(vectors)
        return cast(w, dtype)

    def is_dense(self) -> bool:
        """Return whether one C x C product is less work than the thin ones.

        The thin ones also lose digits if V has more rows than columns.
        """
        count, channels = self.vectors.shape
        return 2 * count >= channels


def _solve(v: Tensor) -> Tensor:
    """Return T V of the compact WY form for the vectors V, (K, C)."""
    products = v @ v.T
    if torch_private.is_recorded():
        return _solve_by_rows(products, v)
    # twice T^-1 and twice V: fewer operations than to halve the diagonal
    doubled = products.triu() + products.triu(1)
    return torch.linalg.solve_triangular(doubled, 2.0 * v, upper=True)


def _solve_by_rows(products: Tensor, v: Tensor) -> Tensor:
    """Compute T V by substitution from the last row, because ONNX has no triangular solve."""
    rows: list[Tensor] = []
    for k in reversed(range(v.shape[0])):
        row = v[k : k + 1]
        if rows:
            row = row - products[k : k + 1, k + 1 :] @ torch.cat(rows)
        rows.insert(0, row * (2.0 / products[k, k]))
    return torch.cat(rows)


Permutation = IndexPermutation | MatrixPermutation | HouseholderPermutation


def one_hot(perm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (C, C) matrix w with w @ v = v[perm]."""
    channels = torch.arange(perm.shape[0], device=perm.device)
    return (perm.unsqueeze(1) == channels).to(dtype)  # F.one_hot reads values; a graph has none


def matched_in_graph(
    perm: Tensor, inv: Tensor, uses_perm: bool, uses_inv: bool
) -> tuple[Tensor, Tensor]:
    """Return an index and its inverse, certain to belong together when a graph runs.

    A graph derives each from another tensor, and the one that the stock block does not use may be
    outdated. It is computed anew. If the index is no permutation, the graph raises an error.
    Otherwise the kernels would write to memory that is not theirs.

    Args:
        perm: int64 (C,).
        inv: Its inverse, (C,).
        uses_perm, uses_inv: Which of them the stock block uses.
    """
    channels = torch.arange(perm.shape[0], device=perm.device)
    if not uses_inv:
        inv = torch.zeros_like(perm).scatter(0, perm, channels)
    elif not uses_perm:
        perm = torch.zeros_like(inv).scatter(0, inv, channels)
    # Inductor's gather also takes negative numbers, which the kernels do not.
    is_inverse = (perm.index_select(0, inv) == channels) & (inv >= 0)
    # A gather by an index that is out of range raises. Where a compiler leaves that check out, as
    # on AMD's GPUs, the kernels still stay in their memory.
    checked = channels.index_select(0, torch.where(is_inverse, perm, perm.shape[0]))
    last = perm.shape[0] - 1
    return checked.clamp(0, last), inv.clamp(0, last)


def random_rotation(channels: int) -> Tensor:
    """Draw a matrix uniformly (Haar measure) from SO(C), reproducible from torch's seed.

    A separate generator is seeded by torch's, which does not advance. The stock block draws its
    rotation from NumPy. What is drawn next, such as a subnet's weights, is therefore the same.

    Args:
        channels: C.

    Returns:
        (C, C) in the default dtype, orthogonal with determinant +1. Source: Mezzadri 2007, "How to
        generate random matrices from the classical compact groups".
    """
    peek = torch.Generator()
    peek.set_state(torch.get_rng_state())
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=peek, device="cpu")))
    q, r = torch.linalg.qr(
        torch.randn(channels, channels, generator=own, dtype=torch.float64, device="cpu")
    )
    q = q * torch.sign(torch.diagonal(r))
    q[:, 0] *= torch.linalg.det(q).sign()
    # get_default_device does not see `with torch.device(...)` in torch 2.7
    return q.to(torch.empty(0)).contiguous()
