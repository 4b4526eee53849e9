"""The index of a block's hard permutation, which the stock block holds as a one-hot matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow_kernels import predicates, torch_private
from fastflow_kernels.permutations import (
    HouseholderPermutation,
    IndexPermutation,
    MatrixPermutation,
    Permutation,
    one_hot,
)
from fastflow_kernels.torch_private import parameter_of, state_of


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

    checks_values = True  # on a CPU, in every call; the mock driver's stand-in for a GPU does not

    def __init__(self) -> None:
        self.hard = False
        # replaced as a whole, so that threads and replicas that share this object stay consistent
        self._cached: _Cached | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"hard": self.hard, "_cached": None}  # copies read their own matrices

    def refresh(self, block: Any) -> None:
        """Look at a block's matrices now: its next call may be a compiled one, which cannot."""
        self.permutation(block)

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
            w_0 = parameter_of(block, "w_0")
            is_cheap = x is not None and _is_cheap_product(x, w_0)
            base = _as_matrices(w_0, None) if is_cheap else self._of(w_0, None, True, False)
            return HouseholderPermutation(base, parameter_of(block, "vk_householder"))
        w, w_inv = parameter_of(block, "w_perm"), parameter_of(block, "w_perm_inv")
        if x is not None and w.dim() > 1 and _is_cheap_product(x, w):
            return _as_matrices(w, w_inv)
        both = block.reverse_pre_permute
        return self._of(w, w_inv, both or not rev, both or rev)

    def _of(
        self, w: Tensor, w_inv: Tensor | None, uses_w: bool, uses_inverse: bool
    ) -> IndexPermutation | MatrixPermutation:
        if torch_private.is_recorded():
            baked = self._baked(w, w_inv) if torch_private.is_onnx_export() else None
            return _in_graph(w, w_inv, self.hard) if baked is None else baked
        if not _are_fixed(w, w_inv):
            self._cached = None
            return _in_graph(w, w_inv, False)
        # otherwise the cache would keep what a mode has made
        if torch_private.is_watched():
            with torch_private.unrecorded():
                cached = self._current(w, w_inv, uses_w, uses_inverse)
        else:
            cached = self._current(w, w_inv, uses_w, uses_inverse)
        return _as_matrices(w, w_inv) if cached.index is None else cached.index

    def _current(
        self, w: Tensor, w_inv: Tensor | None, uses_w: bool, uses_inverse: bool
    ) -> _Cached:
        cached, key = self._cached, (state_of(w), state_of(w_inv))
        if (
            cached is None
            or cached.key != key
            or (
                self.checks_values
                and not cached.holds(w if uses_w else None, w_inv if uses_inverse else None)
            )
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
        with torch_private.unrecorded():
            # The exporter may have put tensors without values in the weights' place: then what was
            # read before counts, if it is current.
            cached = self._cached
            if _are_fixed(w, w_inv):
                cached = self._current(w, w_inv, True, True)
            elif cached is not None and not cached.is_current():
                cached = None
            if cached is None or cached.index is None:
                return None
            numbers = [t.tolist() for t in cached.index]
        return IndexPermutation(*(torch.tensor(n, device=w.device) for n in numbers))


# Multiplications up to which a product costs less than looking whether an index is current and
# gathering by it. FrEIA 0.2's time divided by ours with a product / with an index, without
# gradients, a thread of an AMD EPYC: 1.01 / 0.84 for (128, 16), 1.01 / 0.87 for (64, 64), 0.99 /
# 1.02 for (256, 64), 0.95 / 1.39 for (64, 256).
_CHEAP_PRODUCT = 1 << 19


def _is_cheap_product(x: Tensor, w: Tensor) -> bool:
    """Whether a product with the matrix is cheaper than looking whether its index is current, and
    gives the same.
    """
    if torch_private.is_recorded():  # first, because a graph must not come to depend on sizes
        return False
    size = x.numel()
    if (
        size * w.shape[0] > _CHEAP_PRODUCT
        or size > predicates.SMALL
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
        return self.key == tuple(map(state_of, self.seen)) and self.holds(*self.seen)

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
    return not torch_private.is_wrapped(w)


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
        ones = _ones(w, places[0])
        ones_of_inverse = ones if w_inv is None else _ones(w_inv, places[1])
        if ones is None or ones_of_inverse is None:
            return _Cached(key, (w, w_inv), None, None)
        return _Cached(key, (w, w_inv), index, (ones, ones_of_inverse))


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
