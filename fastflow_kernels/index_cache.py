"""A cache for the index of a hard permutation, which the stock block holds as a one-hot matrix."""

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
    """A cache for the index of one block's hard permutation.

    A stock block holds a hard permutation as float matrices, and so does ours in dialect
    "anomalib". Code that averages, flattens or copies parameters can then treat both alike. The
    fused path needs the index.

    The cached index is used only if it is certain to be current. Each call checks that the matrices
    are the same objects with the same version. On a CPU it also checks their values, which can be
    written without a new version (through ``.data``). On a GPU that would cost a synchronisation.
    A recorded graph does not use the cache, but derives the index from the weights it runs with.

    Attributes:
        hard: Whether the matrices held a permutation when they were last read. A graph takes the
            form of its computation from that, not the values.
    """

    _captured: tuple[IndexPermutation, ...] = ()  # what CUDA graphs have captured
    checks_values = True  # on a CPU, in every call; the tests' mock of a GPU turns it off

    def __init__(self) -> None:
        self.hard = False
        # replaced as a whole, so that it is consistent for threads and replicas that share it
        self._cached: _Cached | None = None

    def __getstate__(self) -> dict[str, Any]:
        # copies read their own matrices
        return {"hard": self.hard, "_cached": None, "_captured": ()}

    def refresh(self, block: Any) -> None:
        """Read a block's matrices now, because its next call may be compiled and cannot."""
        self.permutation(block)

    def permutation(self, block: Any, rev: bool = False, x: Tensor | None = None) -> Permutation:
        """Return the permutation of a block for one direction, as an index if its matrix is one.

        Args:
            block: A block with the attributes ``w_perm`` and ``w_perm_inv``, or ``w_0`` and
                ``vk_householder``.
            rev: Whether it is for the inverse.
            x: The tensor to permute, (B, C, *S). If it is very small, matrices are used as they
                are. None never counts as small.
        """
        if block.householder:
            w_0 = parameter_of(block, "w_0")
            is_cheap = x is not None and _is_cheap_product(x, w_0)
            base = _as_matrices(w_0, None) if is_cheap else self._resolve(w_0, None, True, False)
            return HouseholderPermutation(base, parameter_of(block, "vk_householder"))
        w, w_inv = parameter_of(block, "w_perm"), parameter_of(block, "w_perm_inv")
        if x is not None and w.dim() > 1 and _is_cheap_product(x, w):
            return _as_matrices(w, w_inv)
        uses_both = block.reverse_pre_permute
        return self._resolve(w, w_inv, uses_both or not rev, uses_both or rev)

    def of_index(
        self, perm: Tensor, inverse: Tensor, rev: bool
    ) -> IndexPermutation | MatrixPermutation:
        """Return the permutation of a module that holds an index (C,) and its inverse.

        It is an index if they are a permutation and its inverse.
        """
        return self._resolve(perm, inverse, not rev, rev)

    def _resolve(
        self, w: Tensor, w_inv: Tensor | None, uses_w: bool, uses_inverse: bool
    ) -> IndexPermutation | MatrixPermutation:
        """Return the index of the matrices, or the matrices themselves if they have none."""
        if torch_private.is_recorded():
            constant = self._constant_index(w, w_inv) if torch_private.is_onnx_export() else None
            return _derive_in_graph(w, w_inv, self.hard) if constant is None else constant
        if not _are_fixed(w, w_inv):
            self._cached = None
            return _derive_in_graph(w, w_inv, False)
        # outside of dispatch modes, because the cache must not keep a tensor that a mode has made
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
            self._cached = cached = _read_matrices(key, w, w_inv)
            self.hard = cached.index is not None
            self._update_captured(cached.index)
        if predicates.is_capturing(w):
            self._keep_captured(cached.index)
        return cached

    def _keep_captured(self, index: IndexPermutation | None) -> None:
        """Keep an index in memory, because a CUDA graph knows it by its address."""
        if index is not None and all(index is not captured for captured in self._captured):
            self._captured = (*self._captured, index)

    def _update_captured(self, index: IndexPermutation | None) -> None:
        """Write an index to where CUDA graphs read it.

        So they follow when the matrices are loaded, or when a call finds them changed.

        Raises:
            RuntimeError: A graph was captured, and there is no index any more.
        """
        if not self._captured:
            return
        if index is None:
            raise RuntimeError(
                "a CUDA graph has captured a block with a hard permutation, but its weights are "
                "none any more: capture the graph again"
            )
        for captured in self._captured:
            for old, new in zip(captured, index, strict=True):
                old.copy_(new)  # a pending backward pass that has saved it then raises

    def _constant_index(self, w: Tensor, w_inv: Tensor | None) -> IndexPermutation | None:
        """Return the index as a constant for an ONNX file, or None if it is not known.

        Nobody loads other weights into such a file, and an index is smaller than its matrix.
        """
        # Dynamo cannot read values. Every load has refreshed the cache.
        if torch.compiler.is_dynamo_compiling():
            return None if self._cached is None else self._cached.index
        with torch_private.unrecorded():
            # The exporter may have replaced the weights by tensors without values. Then the cached
            # index counts, if it is current.
            cached = self._cached
            if _are_fixed(w, w_inv):
                cached = self._current(w, w_inv, True, True)
            elif cached is not None and not cached.is_current():
                cached = None
            if cached is None or cached.index is None:
                return None
            numbers = [t.tolist() for t in cached.index]
        return IndexPermutation(*(torch.tensor(n, device=w.device) for n in numbers))


# Multiplications up to which a product costs less than the index's check and a gather. FrEIA 0.2's
# time / ours by product, index: (64, 64) 1.01, 0.87; (256, 64) 0.99, 1.02 (bench/TUNING.md).
_CHEAP_PRODUCT = 1 << 19


def _is_cheap_product(x: Tensor, w: Tensor) -> bool:
    """Return whether a product with the matrix costs less than the check of its index and a gather.

    It must give the same result, so that dtypes must agree and autocast must be off.
    """
    if torch_private.is_recorded():  # first, because a graph must not depend on sizes
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
    """What was read from two matrices.

    Attributes:
        key: The state of the matrices when they were read.
        matrices: The matrices, so that no other tensor gets their ids.
        index: Their index, or None if they have none.
        ones: The ones of both, if they are matrices and not indices.
    """

    key: tuple[Any, ...]
    matrices: tuple[Tensor, Tensor | None]
    index: IndexPermutation | None
    ones: tuple[_Ones, _Ones] | None

    def is_current(self) -> bool:
        """Return whether the matrices are still in the state in which they were read."""
        return self.key == tuple(map(state_of, self.matrices)) and self.holds(*self.matrices)

    def holds(self, w: Tensor | None, w_inv: Tensor | None) -> bool:
        """Return whether the values are the same, by a check on a CPU only. None is not checked."""
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
    """The ones of a one-hot matrix.

    Attributes:
        places: Their positions in the flat matrix, int64 (C,).
        values: Their values (C,), which may carry rounding.
        checksum: The checksum of the whole matrix; 0 if it is not on a CPU.
        copy: A copy of a small matrix on a CPU, which is then compared instead.
    """

    places: Tensor
    values: Tensor
    checksum: int
    copy: Tensor | None

    def are_all_of(self, w: Tensor) -> bool:
        """Return whether w has these ones, and nothing else that the check notices."""
        if self.copy is not None:
            return torch.equal(w, self.copy)
        return torch.equal(w.take(self.places), self.values) and _checksum(w) == self.checksum


# Elements up to which a comparison with a copy is faster than ones and checksum. Microseconds of
# the two for (64, 64): 17, 63; (128, 128): 25, 65; (256, 256): 63, 77; (512, 512): 203, 117.
# Measured in float32 after other work, on one thread of an Intel Xeon.
_COMPARED = 1 << 16
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _checksum(w: Tensor) -> int:
    """Sum the bits of all elements, with wrap-around.

    That reads each element once. For 512 x 512 it takes 12 us, and a count of those above 0 63 us.
    """
    bits = w.detach().view(_BITS[w.dtype.itemsize])
    return int(bits.sum(dtype=bits.dtype if bits.dtype is not torch.int16 else torch.int32))


def _are_fixed(w: Tensor, w_inv: Tensor | None) -> bool:
    """Return whether the values of the matrices can be read, and do not train."""
    return _is_fixed(w) and (w_inv is None or _is_fixed(w_inv))


def _is_fixed(w: Tensor) -> bool:
    if w.requires_grad or w.is_meta or (type(w) is not Tensor and type(w) is not nn.Parameter):
        return False
    return not torch_private.is_wrapped(w)


def _read_matrices(key: tuple[Any, ...], w: Tensor, w_inv: Tensor | None) -> _Cached:
    """Read two matrices and look for their index.

    FSDP makes new matrices for every pass, so this runs few operations over all elements. They are
    argmax (of w only), a count of nonzeros and, on a CPU, the checksum.
    """
    with torch.inference_mode(False), torch.no_grad():
        perm = w.detach().clone() if w.dim() == 1 else w.detach().flatten(1).argmax(1)
        inv = torch.argsort(perm)
        rows = torch.arange(perm.numel(), device=w.device)
        index = IndexPermutation(perm, inv) if torch.equal(perm.take(inv), rows) else None
        if w.dim() == 1:
            return _Cached(
                key,
                (w, w_inv),
                index if w_inv is not None and torch.equal(w_inv, inv) else None,
                None,
            )
        if index is None:
            return _Cached(key, (w, w_inv), None, None)
        places = rows * perm.numel() + perm, perm * perm.numel() + rows
        ones = _find_ones(w, places[0])
        ones_of_inverse = ones if w_inv is None else _find_ones(w_inv, places[1])
        if ones is None or ones_of_inverse is None:
            return _Cached(key, (w, w_inv), None, None)
        return _Cached(key, (w, w_inv), index, (ones, ones_of_inverse))


def _find_ones(w: Tensor, places: Tensor) -> _Ones | None:
    """Return the ones of a matrix if they lie at ``places`` and all else is 0, otherwise None.

    The ones may carry up to 4 eps of rounding, as in a mean of checkpoints. The criterion of
    accuracy allows that in every result. By any other matrix the block multiplies.
    """
    w = w.detach()
    if w.numel() != places.numel() ** 2 or int(w.count_nonzero()) != places.numel():
        return None
    values = w.take(places)
    if not bool((values - 1.0).abs().amax() <= 4 * torch.finfo(w.dtype).eps):
        return None
    if w.device.type != "cpu":
        return _Ones(places, values, 0, None)
    return _Ones(places, values, _checksum(w), w.clone() if w.numel() <= _COMPARED else None)


def hard_index(w: Tensor) -> Tensor | None:
    """Return the index (C,) of a (C, C) matrix that is a permutation up to rounding, or None."""
    return None if (index := _read_matrices((), w, None).index) is None else index.perm


def _derive_in_graph(
    w: Tensor, w_inv: Tensor | None, hard: bool
) -> IndexPermutation | MatrixPermutation:
    """Derive the permutation from the weights, because a graph may get other weights later."""
    if w.dim() == 1 and w_inv is not None:
        return IndexPermutation(w, w_inv)
    if not hard or w.requires_grad or (w_inv is not None and w_inv.requires_grad):
        return _as_matrices(w, w_inv)
    return IndexPermutation(
        _index_in_graph(w), _index_in_graph(w.transpose(0, 1) if w_inv is None else w_inv)
    )


def _index_in_graph(w: Tensor) -> Tensor:
    """Compute the index of a one-hot matrix, out of range for any other matrix.

    A graph that was recorded with a permutation then raises an error if it gets a rotation.
    """
    w = w.flatten(1)
    values, index = w.max(1)
    is_one = (values - 1.0).abs() <= 4 * torch.finfo(w.dtype).eps
    is_alone = w.abs().sum(1) == values  # exact, because all other elements must be 0
    return torch.where(is_one & is_alone, index, w.shape[0])


def _as_matrices(w: Tensor, w_inv: Tensor | None) -> MatrixPermutation:
    """Return the matrices as a permutation, made anew in every call.

    A cached view would miss gradients and strides, and would forbid swapping parameters.
    """
    if w.dim() == 1 and w_inv is not None:  # an index with an inverse that does not match
        return MatrixPermutation(one_hot(w, torch.int64), one_hot(w_inv, torch.int64))
    return MatrixPermutation(w, w.T if w_inv is None else w_inv)
