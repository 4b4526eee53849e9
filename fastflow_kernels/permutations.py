"""The channel permutations of a block: a fixed index, a fixed matrix, or a matrix followed by
learned Householder reflections.

Each has the same two methods, ``permute`` and ``unpermute``, differentiable and acting on dimension
1 of a (B, C, *S) tensor. An index is the case that the fused kernels take along for nothing; the
others are products on the coupling's output.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from fastflow_kernels import dispatch, modes
from fastflow_kernels.layouts import as_rows, from_rows, memory_format

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class IndexPermutation(NamedTuple):
    """y[:, j] = v[:, perm[j]] ("hard").

    Attributes:
        perm: int64 (C,).
        inv: argsort(perm), int64 (C,).
    """

    perm: Tensor
    inv: Tensor

    def permute(self, v: Tensor) -> Tensor:
        return gather_channels(v, self.perm, self.inv)

    def unpermute(self, y: Tensor) -> Tensor:
        return gather_channels(y, self.inv, self.perm)

    def unpermute_bwd(self, dv: Tensor) -> Tensor:
        """The gradient of y from that of unpermute(y)."""
        return self.permute(dv)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The one-hot (C, C) matrix w with w @ v = v[perm]."""
        return one_hot(self.perm, dtype)


class MatrixPermutation(NamedTuple):
    """y = w v ("soft": w from SO(C)).

    Attributes:
        w: (C, C), or (C, C, 1, ...) with as many ones as there are spatial dimensions.
        w_inv: Its inverse, likewise.
    """

    w: Tensor
    w_inv: Tensor

    def permute(self, v: Tensor) -> Tensor:
        return multiply_channels(v, self.w)

    def unpermute(self, y: Tensor) -> Tensor:
        return multiply_channels(y, self.w_inv)

    def permute_bwd(self, dy: Tensor) -> Tensor:
        """The gradient of v from that of permute(v)."""
        return multiply_channels(dy, self.w.flatten(1).T.to(dy.dtype))

    def unpermute_bwd(self, dv: Tensor) -> Tensor:
        """The gradient of y from that of unpermute(y)."""
        return multiply_channels(dv, self.w_inv.flatten(1).T.to(dv.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.w.flatten(1).to(dtype)

    def folds(self, x: Tensor) -> bool:
        """Whether scale and offset are better folded into the matrix than applied to x: it takes no
        gradient and is the smaller one.

        Two passes over x less. On one thread of an AMD EPYC the product hides them (a train step of
        (2048, 512) takes 1.01 times as long without), and one of (64, 512), with more matrix than
        input, takes 1.12 times as long folded.
        """
        return (
            not self.w.requires_grad
            and self.w.is_floating_point()
            and x.numel() >= 2 * self.w.numel()
        )

    def permute_affine(self, u: Tensor, scale: Tensor | None, offset: Tensor) -> Tensor:
        """w (u * scale + offset) as one product with a bias, without gradients; scale is None for
        1.
        """
        return _product(
            u,
            self._scaled(scale, u.dtype),
            (self.w.flatten(1) @ offset.view(-1).to(self.w.dtype)).to(u.dtype),
        )

    def permute_affine_bwd(self, dy: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gradient of u times scale, in ``dtype``: what
        :func:`~fastflow_kernels.engines.eager.coupling_bwd` takes where it is folded.
        """
        return _product(dy, self._scaled(scale, dy.dtype).T).to(dtype)

    def offset_bwd(self, dy: Tensor, offset: Tensor) -> Tensor:
        """The gradient of offset."""
        summed = dy.sum(
            (0, *range(2, dy.dim())), dtype=torch.promote_types(dy.dtype, torch.float32)
        )
        return (self.w.flatten(1).T.to(summed.dtype) @ summed).to(offset.dtype).view(offset.shape)

    def unpermute_affine(self, y: Tensor, scale: Tensor | None, offset: Tensor) -> Tensor:
        """(w^-1 y - offset) / scale as one product with a bias, without gradients."""
        w, bias = self.w_inv.flatten(1), -offset.view(-1)
        if scale is not None:
            w, bias = w / scale.view(-1, 1), bias / scale.view(-1)
        return _product(y, w.to(y.dtype), bias.to(y.dtype))

    def _scaled(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        w = self.w.flatten(1)
        return (w if scale is None else w * scale.view(1, -1)).to(dtype)


class HouseholderPermutation(NamedTuple):
    r"""y = w_0 H_1 ... H_K v with the reflections H_k = I - 2 v_k v_k^T / (v_k^T v_k).

    The product of the reflections is applied in its compact WY form I - V^T T V (Schreiber & Van
    Loan 1989), with V the (K, C) matrix of the vectors and T^-1 the upper triangle of V V^T with
    half of its diagonal: two thin products instead of K of C x C matrices.

    Attributes:
        base: w_0, an :class:`IndexPermutation` or :class:`MatrixPermutation`.
        vectors: V, (K, C).
    """

    base: IndexPermutation | MatrixPermutation
    vectors: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """T V and V, both (K, C), in full precision also under autocast."""
        if dispatch.is_autocast(self.vectors.device):
            with torch.autocast(self.vectors.device.type, enabled=False):
                return self.factors()
        dtype = self.vectors.dtype
        # not float64, which some devices do not have
        v = self.vectors if dtype.itemsize > 2 else self.vectors.float()
        products = v @ v.T
        if modes.is_recorded():
            solved = _solved_by_rows(products, v)
        else:
            triangle = torch.triu(products)
            solved = torch.linalg.solve_triangular(
                triangle - torch.diag_embed(0.5 * triangle.diagonal()), v, upper=True
            )
        return (solved, v) if v.dtype is dtype else (solved.to(dtype), v.to(dtype))

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
        """The (C, C) matrix w_0 H_1 ... H_K, by K updates of rank 1."""
        w = self.base.matrix(dtype)
        for v in self.vectors:
            w = w - torch.outer(w @ v, v * (2.0 / v.dot(v)))
        return w

    def is_dense(self) -> bool:
        """Whether the one product of C x C is the smaller work; also the thin ones lose digits
        where V has more rows than columns.
        """
        count, channels = self.vectors.shape
        return 2 * count >= channels


def _solved_by_rows(products: Tensor, v: Tensor) -> Tensor:
    """T V by substitution, last row first: ONNX has no triangular solve."""
    rows: list[Tensor] = []
    for k in reversed(range(v.shape[0])):
        row = v[k : k + 1]
        if rows:
            row = row - products[k : k + 1, k + 1 :] @ torch.cat(rows)
        rows.insert(0, row * (2.0 / products[k, k]))
    return torch.cat(rows)


Permutation = IndexPermutation | MatrixPermutation | HouseholderPermutation


def parameter(module: Any, name: str) -> Any:
    """A parameter, found at once where it is one and no subclass computes it: nn.Module's search
    for an attribute takes 0.4 us.
    """
    found = None if hasattr(type(module), name) else module._parameters.get(name)
    # it may be parametrized, or an attribute of a replica
    return getattr(module, name) if found is None else found


class IndexCache:
    """The index of a block's hard permutation, read once and kept while what it was read of stays.

    A stock block, and ours in dialect "anomalib", holds a hard permutation as float matrices, so
    that everything that averages, flattens or copies parameters treats it as it treats the stock
    block's. The fused path wants the index. It is kept only where it is certain to be current: each
    call looks whether the matrices are the same objects with the same version, and on a CPU at
    their values too, which can be written to without a new version (through ``.data``). Elsewhere
    that would cost a synchronisation. A graph that is being recorded takes the index from the
    weights that it will be run with.

    Attributes:
        hard: Whether the matrices held a permutation when they were last read: the form, not the
            values, of what a graph computes.
    """

    def __init__(self) -> None:
        self.hard = False
        # replaced as a whole, so that threads and replicas that share this object stay consistent
        self._cached: _Cached | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"hard": self.hard, "_cached": None}  # copies read their own matrices

    def permutation(self, block: Any, rev: bool = False, x: Tensor | None = None) -> Permutation:
        """The permutation of a block with the stock block's attributes, for one direction: an index
        wherever its matrix is one.

        Args:
            block: With ``w_perm`` and ``w_perm_inv``, or ``w_0`` and ``vk_householder``.
            rev: Whether it is for the inverse.
            x: What is to be permuted: where that is very little, the matrices are taken as they
                are.
        """
        if block.householder:
            w_0 = parameter(block, "w_0")
            is_cheap = x is not None and _is_cheap_product(x, w_0)
            base = _as_matrices(w_0, None) if is_cheap else self._of(w_0, None, True, False)
            return HouseholderPermutation(base, parameter(block, "vk_householder"))
        w, w_inv = parameter(block, "w_perm"), parameter(block, "w_perm_inv")
        if x is not None and w.dim() > 1 and _is_cheap_product(x, w):
            return _as_matrices(w, w_inv)
        both = block.reverse_pre_permute
        return self._of(w, w_inv, both or not rev, both or rev)

    def _of(
        self, w: Tensor, w_inv: Tensor | None, uses_w: bool, uses_inverse: bool
    ) -> IndexPermutation | MatrixPermutation:
        if modes.is_recorded():
            baked = self._baked(w, w_inv) if modes.is_onnx_export() else None
            return _in_graph(w, w_inv, self.hard) if baked is None else baked
        if not _are_fixed(w, w_inv):
            self._cached = None
            return _in_graph(w, w_inv, False)
        # otherwise the cache would keep what a mode has made
        with modes.unrecorded() if modes.is_watched() else nullcontext():
            cached = self._current(w, w_inv, uses_w, uses_inverse)
        return _as_matrices(w, w_inv) if cached.index is None else cached.index

    def _current(
        self, w: Tensor, w_inv: Tensor | None, uses_w: bool, uses_inverse: bool
    ) -> _Cached:
        cached, key = self._cached, (_state_of(w), _state_of(w_inv))
        if (
            cached is None
            or cached.key != key
            or not cached.holds(w if uses_w else None, w_inv if uses_inverse else None)
        ):
            self._cached = cached = _read(key, w, w_inv)
            self.hard = cached.index is not None
        return cached

    def _baked(self, w: Tensor, w_inv: Tensor | None) -> IndexPermutation | None:
        """The index itself, for an ONNX file: nothing is loaded into one later, and an index is
        smaller than the matrix it is read of.
        """
        # which cannot look; every load has refreshed what is kept
        if torch.compiler.is_dynamo_compiling():
            return None if self._cached is None else self._cached.index
        with modes.unrecorded():
            if _are_fixed(w, w_inv):
                cached: _Cached | None = self._current(w, w_inv, True, True)
            else:
                # what the exporter has put in the weights' place has no values; those that were
                # read have
                cached = (
                    self._cached if self._cached is not None and self._cached.is_current() else None
                )
            numbers = (
                None
                if cached is None or cached.index is None
                else [t.tolist() for t in cached.index]
            )
        return (
            None
            if numbers is None
            else IndexPermutation(*(torch.tensor(n, device=w.device) for n in numbers))
        )


# Multiplications up to which a product costs less than looking whether an index is current and
# gathering by it. FrEIA 0.2's time divided by ours with a product / with an index, without
# gradients, a thread of an AMD EPYC: 1.01 / 0.84 for (128, 16), 1.01 / 0.87 for (64, 64), 0.99 /
# 1.02 for (256, 64), 0.95 / 1.39 for (64, 256).
_CHEAP_PRODUCT = 1 << 19


def _is_cheap_product(x: Tensor, w: Tensor) -> bool:
    """Whether a product with the matrix is cheaper than looking whether its index is current, and
    gives the same.
    """
    if modes.is_recorded():  # first, because a graph must not come to depend on sizes
        return False
    size = x.numel()
    if (
        size * w.shape[0] > _CHEAP_PRODUCT
        or size > dispatch.SMALL
        or x.dtype is not w.dtype
        or not x.is_cpu
    ):
        return False
    return not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True, eq=False)
class _Cached:
    """What was read of the matrices that ``key`` names."""

    key: tuple[Any, ...]
    seen: tuple[Tensor, Tensor | None]  # the matrices themselves, so that their ids stay theirs
    index: IndexPermutation | None
    ones: tuple[_Ones, _Ones] | None  # of w and of its inverse, where they are matrices

    def is_current(self) -> bool:
        """Whether the matrices that were read are still what they were."""
        return self.key == tuple(map(_state_of, self.seen)) and self.holds(*self.seen)

    def holds(self, w: Tensor | None, w_inv: Tensor | None) -> bool:
        """Whether the values are still the same; asked on the CPU only. None is not looked at."""
        if self.index is None or self.index.perm.device.type != "cpu":
            return True
        if self.ones is None:
            return (w is None or torch.equal(w, self.index.perm)) and (
                w_inv is None or torch.equal(w_inv, self.index.inv)
            )
        return (w is None or self.ones[0].are_all_of(w)) and (
            w_inv is None or self.ones[1].are_all_of(w_inv)
        )


class _Ones(NamedTuple):
    """Where the ones of a one-hot matrix lie in memory, their values, and the sum over the whole
    matrix of the bits of its elements.
    """

    places: Tensor
    values: Tensor
    checksum: int

    def are_all_of(self, w: Tensor) -> bool:
        return torch.equal(w.take(self.places), self.values) and _checksum(w) == self.checksum


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _checksum(w: Tensor) -> int:
    """The sum of the elements' bits, without carry: one fast look at each (12 us for 512 x 512,
    where counting those above 0 takes 63).
    """
    bits = w.detach().view(_BITS[w.dtype.itemsize])
    return int(bits.sum(dtype=bits.dtype if bits.dtype is not torch.int16 else torch.int32))


def _are_fixed(w: Tensor, w_inv: Tensor | None) -> bool:
    """Whether the values can be asked for, and stay."""
    return _is_fixed(w) and (w_inv is None or _is_fixed(w_inv))


def _is_fixed(w: Tensor) -> bool:
    if w.requires_grad or w.is_meta or (type(w) is not Tensor and type(w) is not nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(w)


def _state_of(t: Tensor | None) -> tuple[Any, ...] | None:
    """What changes when a tensor is another one, lies elsewhere, or is written to."""
    return None if t is None else (id(t), t.data_ptr(), None if t.is_inference() else t._version)


def _read(key: tuple[Any, ...], w: Tensor, w_inv: Tensor | None) -> _Cached:
    """Look for the index. FSDP makes new matrices for every pass, so this looks at each element two
    times and no more.
    """
    with torch.inference_mode(False), torch.no_grad():
        perm = w.detach().clone() if w.dim() == 1 else w.detach().flatten(1).argmax(1)
        inv = torch.argsort(perm)
        each = torch.arange(perm.numel(), device=w.device)
        index = IndexPermutation(perm, inv) if torch.equal(perm.take(inv), each) else None
        if w.dim() == 1:
            return _Cached(
                key,
                (w, w_inv),
                index if w_inv is not None and torch.equal(w_inv, inv) else None,
                None,
            )
        if index is None:
            return _Cached(key, (w, w_inv), None, None)
        places = each * perm.numel() + perm, perm * perm.numel() + each
        found = [_ones(t, at) for t, at in zip((w, w_inv), places, strict=True) if t is not None]
        ones = [of for of in found if of is not None]
        hard = len(ones) == len(found)
        return _Cached(
            key, (w, w_inv), index if hard else None, (ones[0], ones[-1]) if hard else None
        )


def _ones(w: Tensor, places: Tensor) -> _Ones | None:
    """The ones of a matrix, if they lie there and nothing else does.

    They may carry rounding, as those of a mean of checkpoints do: up to 4 eps, which the criterion
    of accuracy leaves to every result. Any other matrix is multiplied by as it is.
    """
    w = w.detach()
    if w.numel() != places.numel() ** 2 or int(w.count_nonzero()) != places.numel():
        return None
    values = w.take(places)
    if not bool((values - 1.0).abs().amax() <= 4 * torch.finfo(w.dtype).eps):
        return None
    return _Ones(places, values, _checksum(w) if w.device.type == "cpu" else 0)


def hard_index(w: Tensor) -> Tensor | None:
    """The index of a (C, C) matrix that is a permutation's but for rounding; None for another
    one.
    """
    return None if (index := _read((), w, None).index) is None else index.perm


def _in_graph(w: Tensor, w_inv: Tensor | None, hard: bool) -> IndexPermutation | MatrixPermutation:
    """The permutation as operations on the weights, for graphs into which other weights may be
    loaded.
    """
    if w.dim() == 1 and w_inv is not None:
        return IndexPermutation(w, w_inv)
    if not hard or w.requires_grad or (w_inv is not None and w_inv.requires_grad):
        return _as_matrices(w, w_inv)
    return IndexPermutation(
        _index_in_graph(w), _index_in_graph(w.transpose(0, 1) if w_inv is None else w_inv)
    )


def _index_in_graph(w: Tensor) -> Tensor:
    """The index of a one-hot matrix, out of range where it is none: a graph recorded with a
    permutation raises if given a rotation.
    """
    values, index = w.flatten(1).max(1)
    return torch.where((values - 1.0).abs() <= 4 * torch.finfo(w.dtype).eps, index, w.shape[0])


def _as_matrices(w: Tensor, w_inv: Tensor | None) -> MatrixPermutation:
    """As they are, in every call anew: a view that is kept would miss gradients and strides, and
    forbid that parameters are swapped.
    """
    if w.dim() == 1 and w_inv is not None:  # an index whose inverse is not its own
        return MatrixPermutation(one_hot(w, torch.int64), one_hot(w_inv, torch.int64))
    return MatrixPermutation(w, w.T if w_inv is None else w_inv)


def one_hot(perm: Tensor, dtype: torch.dtype) -> Tensor:
    """The (C, C) matrix w with w @ v = v[perm]."""
    each = torch.arange(perm.shape[0], device=perm.device)
    return (perm.unsqueeze(1) == each).to(dtype)  # F.one_hot asks for values, which a graph has not


def random_rotation(channels: int) -> Tensor:
    """A matrix drawn uniformly (Haar measure) from SO(C), float32, reproducible from torch's seed.

    It is drawn from a generator of its own, seeded by torch's but without advancing it: whatever is
    drawn next, a subnet's weights for one, is what the stock block would draw, which takes its
    rotation from NumPy.

    Args:
        channels: C.

    Returns:
        (C, C), orthogonal with determinant +1. Source: Mezzadri 2007, "How to generate random
        matrices from the classical compact groups".
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


def gather_channels(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x[:, index], with a gather for its gradient too (index_select's own scatters with additions).

    Args:
        x: (B, C, *S).
        index: int64 (C,), a permutation.
        inverse: argsort(index).

    Returns:
        A new (B, C, *S).
    """
    # in this order: a graph that is being compiled must not come to depend on what is small
    if dispatch.needs_composite(x):
        return x.index_select(1, index)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return take_channels(x, index)
    if dispatch.is_small(x):
        return x.index_select(1, index)
    return _Gather.apply(x, index, inverse)


def take_channels(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] in the memory format of x, without gradients; index_select by itself would make
    it contiguous, many times slower.
    """
    if memory_format(x) is torch.contiguous_format:
        return x.index_select(1, index)
    return from_rows(as_rows(x).index_select(1, index), x)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return take_channels(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return gather_channels(dy, inverse, index), None, None


def multiply_channels(x: Tensor, w: Tensor) -> Tensor:
    """w applied to dimension 1 of x, by the same operation as the stock block's (so TF32 and
    autocast treat it alike).

    Args:
        x: (B, C, *S) of rank 0 to 3.
        w: (C, C) or (C, C, 1, ...); of integers, where it stands for an index.

    Returns:
        (B, C, *S).
    """
    if not w.is_floating_point():
        w = w.to(x.dtype)
    if (
        not (x.requires_grad and torch.is_grad_enabled())
        or w.requires_grad
        or dispatch.needs_composite(x)
        or dispatch.is_small(x)
    ):
        return _product(x, w)
    return _Multiply.apply(x, w)


def _product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.dim() - 2
    if rank == 0:
        return F.linear(x, w, bias)
    return _CONVOLUTIONS[rank](x, w if w.dim() > 2 else w.view(*w.shape, *[1] * rank), bias)


class _Multiply(Function):
    """A product with a fixed matrix: unlike a convolution it does not keep its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        ctx.dtype = x.dtype
        return _product(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return multiply_channels(dy, w.flatten(1).T.to(dy.dtype)).to(ctx.dtype), None


def reflect(v: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """v - outer^T (inner v) on dimension 1, in full precision also under autocast.

    Args:
        v: (B, C, *S).
        inner, outer: (K, C).

    Returns:
        (B, C, *S) in the promoted dtype.
    """
    if dispatch.is_autocast(v.device):
        with torch.autocast(v.device.type, enabled=False):
            return reflect(v, inner, outer)
    if not torch.is_grad_enabled():
        # else matmul, which looks at what takes a gradient, copies v
        inner, outer = inner.detach(), outer.detach()
        if not dispatch.needs_composite(v) and memory_format(v) is not torch.contiguous_format:
            return from_rows(reflect(as_rows(v), inner, outer), v)
    dtype = torch.promote_types(v.dtype, inner.dtype)
    v, inner, outer = (t.to(dtype) for t in (v, inner, outer))
    if v.dim() == 2:
        return torch.addmm(v, v @ inner.T, outer, alpha=-1.0)
    # without products of sizes, which Inductor of torch 2.13 cannot compare with each other
    if modes.is_recorded():
        return v - torch.einsum("kc,bk...->bc...", outer, torch.einsum("kc,bc...->bk...", inner, v))
    flat = v.flatten(2)
    return torch.baddbmm(flat, outer.T.expand(v.shape[0], -1, -1), inner @ flat, alpha=-1.0).view(
        v.shape
    )


def reflect_bwd(
    dz: Tensor, v: Tensor, inner: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`reflect` to v, inner and outer, all in the dtype of its result."""
    v, inner, outer = (t.detach().to(dz.dtype) for t in (v, inner, outer))  # detached: see reflect
    if v.dim() == 2:
        dq = dz @ outer.T
        return torch.addmm(dz, dq, inner, alpha=-1.0), -(dq.T @ v), -((v @ inner.T).T @ dz)
    flat, dz_flat = v.flatten(2), dz.flatten(2)
    dq = outer @ dz_flat
    dinner = -(dq @ flat.transpose(1, 2)).sum(0)
    douter = -((inner @ flat) @ dz_flat.transpose(1, 2)).sum(0)
    return (
        torch.baddbmm(dz_flat, inner.T.expand(v.shape[0], -1, -1), dq, alpha=-1.0).view(v.shape),
        dinner,
        douter,
    )
