"""Global and shared memory, and the record of which threads touched it.

Every access is checked here. Each tensor has an address range of its own, 2^44 bytes apart, so that
no offset leads from one tensor into another.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch

from tests.support.executor.values import POISON, UNSIGNED, Fault, Unsupported, i8, u1, u4, u8

SPACE_BITS = 44


class Threads(NamedTuple):
    """Threads of a launch.

    Attributes:
        numbers: Counted over the whole grid.
        of_cta: Threads of a CTA.
    """

    numbers: np.ndarray
    of_cta: int

    def __getitem__(self, which: np.ndarray) -> Threads:
        return Threads(self.numbers[which], self.of_cta)

    def name(self, k: int) -> str:
        number = int(self.numbers[k])
        return f"program {number // self.of_cta}, thread {number % self.of_cta}"


class GlobalTensor:
    """A tensor in the kernel's address space, with the accesses of one launch.

    Args:
        number: Its number among the launch's tensors, from 1.
        name: The kernel's name for its pointer.
        tensor: CPU tensor. Only the elements of this view may be touched.
    """

    def __init__(self, number: int, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor, self.itemsize = name, tensor, tensor.element_size()
        sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
        span = sum((n - 1) * stride for n, stride in sizes) + 1 if tensor.numel() else 0
        # The middle of the range, so that offsets to either side stay within it.
        self.address = (number << SPACE_BITS) + (1 << SPACE_BITS - 1) + tensor.data_ptr() % 4096
        memory = (
            (ctypes.c_uint8 * (span * self.itemsize)).from_address(tensor.data_ptr())
            if span
            else b""
        )
        self.bytes = np.frombuffer(memory, u1)
        self.elements = self.bytes.view(UNSIGNED[self.itemsize])
        self.poison = POISON.get(tensor.dtype)
        self._sizes = sorted(((stride, n) for n, stride in sizes if n > 1 and stride), reverse=True)
        self._has_gaps = np.prod([n for _, n in self._sizes], dtype=int) != span
        self.loads: list[tuple[np.ndarray, np.ndarray]] = []  # elements, threads
        self.stores: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # elements, threads, bits

    def __str__(self) -> str:
        t = self.tensor
        return f"{self.name} {tuple(t.shape)} strides {t.stride()} {t.dtype}"

    @property
    def loaded(self) -> np.ndarray:
        """The elements that were loaded, repeated if loaded several times."""
        return np.concatenate([elements for elements, _ in self.loads] or [np.empty(0, i8)])

    @property
    def stored(self) -> np.ndarray:
        """The elements that were stored."""
        return np.concatenate([elements for elements, _, _ in self.stores] or [np.empty(0, i8)])

    def shares_memory_with(self, other: GlobalTensor) -> bool:
        """Return whether the memory overlaps on the CPU, where the tensors really are."""
        start, other_start = self.tensor.data_ptr(), other.tensor.data_ptr()
        return start < other_start + other.bytes.size and other_start < start + self.bytes.size

    def holds(self, offsets: np.ndarray) -> np.ndarray:
        """Return which offsets within the span, in elements, belong to the view."""
        if not self._has_gaps:
            return np.True_
        is_inside, remainder = np.True_, offsets
        for stride, n in self._sizes:
            is_inside, remainder = is_inside & (remainder // stride < n), remainder % stride
        return is_inside & (remainder == 0)

    def check_races(self, kernel: str, threads: int) -> None:
        """Raise Fault if two threads race for an element.

        That is one stored twice, or loaded by one thread and stored by another.
        """
        if not self.stores:
            return
        elements, who, bits = (np.concatenate(parts) for parts in zip(*self.stores, strict=True))
        order = np.argsort(elements, kind="stable")
        elements, who, bits = elements[order], Threads(who[order], threads), bits[order]
        twice = elements[1:] == elements[:-1]
        if twice.any():
            first = int(np.flatnonzero(twice)[0])
            different = int((bits[1:] != bits[:-1])[twice].sum())
            raise Fault(
                f"{kernel}: {self.name}: {twice.sum()} elements stored twice ({different} with "
                "different values), "
                f"first element {elements[first]}, by {who.name(first)} and {who.name(first + 1)}"
            )
        if self.loads:
            loaded, reader = (np.concatenate(parts) for parts in zip(*self.loads, strict=True))
            where = np.minimum(np.searchsorted(elements, loaded), elements.size - 1)
            bad = (elements[where] == loaded) & (who.numbers[where] != reader)
            if bad.any():
                raise Fault(
                    f"{kernel}: {self.name}: {bad.sum()} elements loaded by one thread and stored "
                    "by another in one launch"
                )


class Global:
    """The global memory of a launch: the tensors that it received."""

    def __init__(self, tensors: list[GlobalTensor]) -> None:
        self.tensors = tensors

    def load(self, address: np.ndarray, width: int, who: Threads, where: str) -> np.ndarray:
        """Load bytes, (threads, width), from these addresses."""
        out = np.empty((address.size, width), u1)
        for t, which, elements, itemsize in self._accesses(address, width, who, where):
            values = t.bytes.view(UNSIGNED[itemsize])[elements]
            if itemsize == t.itemsize:
                if t.poison is not None and (values == t.poison).any():
                    raise Fault(f"{where}: reads {t} where nothing was written")
                t.loads.append((elements.ravel(), np.repeat(who[which].numbers, elements.shape[1])))
            out[which] = values.view(u1).reshape(-1, width)
        return out

    def store(self, address: np.ndarray, values: np.ndarray, who: Threads, where: str) -> None:
        """Store bytes, (threads, width), to these addresses."""
        for t, which, elements, itemsize in self._accesses(address, values.shape[1], who, where):
            if itemsize != t.itemsize:
                raise Unsupported("a store of part of an element")
            bits = np.ascontiguousarray(values[which]).view(UNSIGNED[itemsize])
            t.elements[elements] = bits
            t.stores.append(
                (elements.ravel(), np.repeat(who[which].numbers, elements.shape[1]), bits.ravel())
            )

    def _accesses(self, address: np.ndarray, width: int, who: Threads, where: str):
        """Yield each tensor that is touched, and how.

        Yields:
            The tensor, a mask of the threads that touch it, the elements that they touch, and the
            bytes of an element (1 if the access is narrower than the tensor's own).

        Raises:
            Fault: If an access is misaligned or outside all tensors.
        """
        misaligned = (address & u8(width - 1)) != 0
        if misaligned.any():
            k = int(np.flatnonzero(misaligned)[0])
            raise Fault(
                f"{where}: misaligned: {width} bytes at {self._place(address[k])}, {who.name(k)}"
            )
        numbers = address >> u8(SPACE_BITS)
        for number in np.unique(numbers):
            which = numbers == number
            if not 0 < number <= len(self.tensors):
                raise Fault(
                    f"{where}: wild pointer {self._place(address[which][0])}, {who[which].name(0)}"
                )
            t = self.tensors[int(number) - 1]
            offset = (address[which] - u8(t.address)).view(i8)
            itemsize = t.itemsize if width >= t.itemsize else 1
            elements = (offset // itemsize)[:, None] + np.arange(width // itemsize)
            ok = (
                (offset >= 0)[:, None]
                & (elements < t.bytes.size // itemsize)
                & (offset % itemsize == 0)[:, None]
            )
            ok = ok & t.holds(elements) if itemsize == t.itemsize else ok
            if not ok.all():
                k = int(np.flatnonzero(~ok.all(1))[0])
                raise Fault(
                    f"{where}: {width} bytes out of bounds at {self._place(address[which][k])}, "
                    f"{who[which].name(k)}"
                )
            yield t, which, elements, itemsize

    def _place(self, address: np.uint64) -> str:
        number = int(address) >> SPACE_BITS
        if not 0 < number <= len(self.tensors):
            return hex(int(address))
        t = self.tensors[number - 1]
        element, remainder = divmod(int(address) - t.address, t.itemsize)
        return f"{t}, element {element} of {t.elements.size}" + (
            f" and {remainder} bytes" if remainder else ""
        )


class Shared:
    """The shared memory of some CTAs, with the last warp that read and wrote each byte.

    The record includes the interval between barriers. Threads of one warp may store to one address
    at once, because Triton stores every replica of a sum. A GPU keeps any of the values, so they
    must be equal.

    Args:
        ctas: Number of CTAs.
        size: Bytes of shared memory of each.
        threads: Threads of each.
    """

    _SEVERAL = 63  # the reader's number if several warps have read

    def __init__(self, ctas: int, size: int, threads: int) -> None:
        self.size = size
        self.bytes = np.zeros(ctas * size, u1)
        self.writer, self.reader = np.full((2, ctas * size), -1, i8)  # interval * 64 + warp
        self.cta, self.warp = (
            np.repeat(np.arange(ctas), threads),
            np.tile(np.arange(threads) // 32, ctas),
        )
        self.interval = np.zeros(ctas, i8)

    def load(self, address: np.ndarray, width: int, threads: np.ndarray, where: str) -> np.ndarray:
        """Load bytes, (threads, width), from these addresses."""
        offsets, visitor = self._offsets(address, width, threads, where), self._visitor(threads)
        writer = self.writer[offsets]
        if (writer < 0).any():
            raise Fault(f"{where}: shared memory read that nobody wrote")
        if self._is_other_warp(writer, visitor).any():
            raise Fault(
                f"{where}: shared memory read that another warp wrote without a barrier between"
            )
        for warp in np.unique(self.warp[threads]):
            is_of_warp = self.warp[threads] == warp
            seen = self.reader[offsets[is_of_warp]]
            self.reader[offsets[is_of_warp]] = np.where(
                self._is_other_warp(seen, visitor[is_of_warp]),
                visitor[is_of_warp] | self._SEVERAL,
                visitor[is_of_warp],
            )
        return self.bytes[offsets]

    def store(
        self, address: np.ndarray, values: np.ndarray, threads: np.ndarray, where: str
    ) -> None:
        """Store bytes, (threads, width), to these addresses."""
        offsets, visitor = (
            self._offsets(address, values.shape[1], threads, where),
            self._visitor(threads),
        )
        for last in (self.writer[offsets], self.reader[offsets]):
            is_touched = self._is_other_warp(last, visitor).any(1)
            if (
                is_touched.any()
                and _differ(self.bytes[offsets[is_touched]], values[is_touched]).any()
            ):
                raise Fault(
                    f"{where}: shared memory written that another warp touched without a barrier "
                    "between"
                )
        self.writer[offsets], self.bytes[offsets] = visitor, values
        is_lost = _differ(self.bytes[offsets], values)
        if (self.writer[offsets[is_lost]] != visitor[is_lost]).any():
            raise Fault(f"{where}: shared memory written by two warps at once")
        if is_lost.any():
            raise Fault(
                f"{where}: threads of one warp store different values to one shared address, "
                f"{int(is_lost.sum())} are lost"
            )

    def _offsets(
        self, address: np.ndarray, width: int, threads: np.ndarray, where: str
    ) -> np.ndarray:
        if (address % width).any():
            raise Fault(f"{where}: misaligned shared access of {width} bytes")
        if (address.astype(i8) + width > self.size).any():
            raise Fault(f"{where}: shared access beyond {self.size} bytes")
        return (address.astype(i8) + self.cta[threads] * self.size)[:, None] + np.arange(width)

    def _visitor(self, threads: np.ndarray) -> np.ndarray:
        """Return interval * 64 + warp of each thread, as a column."""
        return (self.interval[self.cta[threads]] * 64 + self.warp[threads])[:, None]

    @staticmethod
    def _is_other_warp(last: np.ndarray, visitor: np.ndarray) -> np.ndarray:
        """Return whether another warp was there in this interval."""
        return (last >= 0) & (last >> 6 == visitor >> 6) & (last != visitor)


# The NaNs that operations on x86 and torch.nan give.
_NANS = {u8: (0x7FF8000000000000, 0xFFF8000000000000), u4: (0x7FC00000, 0xFFC00000)}


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which rows of bytes differ.

    The sign of a plain NaN does not count, because a GPU makes one kind and a CPU two.
    """
    for dtype, (positive, negative) in _NANS.items():
        if a.shape[1] % dtype().itemsize == 0:
            a, b = (np.ascontiguousarray(x).view(dtype) for x in (a, b))
            a, b = (np.where(x == dtype(negative), dtype(positive), x).view(u1) for x in (a, b))
    return (a != b).any(1)
