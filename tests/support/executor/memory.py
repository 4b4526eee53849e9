"""Global and shared memory, and who touched it: what makes an access a fault.

Every tensor has an address range of its own, 2^44 bytes apart, so that no offset leads from one
into another.
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
        tensor: On the CPU. Only the elements of this view may be touched.
    """

    def __init__(self, number: int, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor, self.itemsize = name, tensor, tensor.element_size()
        sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
        span = sum((n - 1) * stride for n, stride in sizes) + 1 if tensor.numel() else 0
        # in the middle of its range
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
        """The elements that were loaded, once for each time."""
        return np.concatenate([at for at, _ in self.loads] or [np.empty(0, i8)])

    @property
    def stored(self) -> np.ndarray:
        """The elements that were stored."""
        return np.concatenate([at for at, _, _ in self.stores] or [np.empty(0, i8)])

    def shares_memory_with(self, other: GlobalTensor) -> bool:
        """Whether the spans overlap, although they have address ranges of their own here."""
        mine, theirs = self.tensor.data_ptr(), other.tensor.data_ptr()
        return mine < theirs + other.bytes.size and theirs < mine + self.bytes.size

    def holds(self, at: np.ndarray) -> np.ndarray:
        """Which offsets within the span, in elements, belong to the view."""
        if not self._has_gaps:
            return np.True_
        ok, rest = np.True_, at
        for stride, n in self._sizes:
            ok, rest = ok & (rest // stride < n), rest % stride
        return ok & (rest == 0)

    def check_races(self, kernel: str, threads: int) -> None:
        """Raise Fault if an element was stored twice, or loaded by one thread and stored by
        another.
        """
        if not self.stores:
            return
        at, who, bits = (np.concatenate(parts) for parts in zip(*self.stores, strict=True))
        order = np.argsort(at, kind="stable")
        at, who, bits = at[order], Threads(who[order], threads), bits[order]
        twice = at[1:] == at[:-1]
        if twice.any():
            first = int(np.flatnonzero(twice)[0])
            different = int((bits[1:] != bits[:-1])[twice].sum())
            raise Fault(
                f"{kernel}: {self.name}: {twice.sum()} elements stored twice ({different} with "
                "different values), "
                f"first element {at[first]}, by {who.name(first)} and {who.name(first + 1)}"
            )
        if self.loads:
            loaded, reader = (np.concatenate(parts) for parts in zip(*self.loads, strict=True))
            where = np.minimum(np.searchsorted(at, loaded), at.size - 1)
            bad = (at[where] == loaded) & (who.numbers[where] != reader)
            if bad.any():
                raise Fault(
                    f"{kernel}: {self.name}: {bad.sum()} elements loaded by one thread and stored "
                    "by another in one launch"
                )


class Global:
    """The tensors that a launch was given."""

    def __init__(self, tensors: list[GlobalTensor]) -> None:
        self.tensors = tensors

    def load(self, address: np.ndarray, width: int, who: Threads, where: str) -> np.ndarray:
        """Bytes (threads, width) at these addresses."""
        out = np.empty((address.size, width), u1)
        for t, which, at, itemsize in self._accesses(address, width, who, where):
            values = t.bytes.view(UNSIGNED[itemsize])[at]
            if itemsize == t.itemsize:
                if t.poison is not None and (values == t.poison).any():
                    raise Fault(f"{where}: reads {t} where nothing was written")
                t.loads.append((at.ravel(), np.repeat(who[which].numbers, at.shape[1])))
            out[which] = values.view(u1).reshape(-1, width)
        return out

    def store(self, address: np.ndarray, values: np.ndarray, who: Threads, where: str) -> None:
        """Write bytes (threads, width)."""
        for t, which, at, itemsize in self._accesses(address, values.shape[1], who, where):
            if itemsize != t.itemsize:
                raise Unsupported("a store of part of an element")
            bits = np.ascontiguousarray(values[which]).view(UNSIGNED[itemsize])
            t.elements[at] = bits
            t.stores.append((at.ravel(), np.repeat(who[which].numbers, at.shape[1]), bits.ravel()))

    def _accesses(self, address: np.ndarray, width: int, who: Threads, where: str):
        """(tensor, which threads, elements they touch, bytes of those) for each tensor that is
        touched; Fault if one is not there.
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
            at = (offset // itemsize)[:, None] + np.arange(width // itemsize)
            ok = (
                (offset >= 0)[:, None]
                & (at < t.bytes.size // itemsize)
                & (offset % itemsize == 0)[:, None]
            )
            ok = ok & t.holds(at) if itemsize == t.itemsize else ok
            if not ok.all():
                k = int(np.flatnonzero(~ok.all(1))[0])
                raise Fault(
                    f"{where}: {width} bytes out of bounds at {self._place(address[which][k])}, "
                    f"{who[which].name(k)}"
                )
            yield t, which, at, itemsize

    def _place(self, address: np.uint64) -> str:
        number = int(address) >> SPACE_BITS
        if not 0 < number <= len(self.tensors):
            return hex(int(address))
        t = self.tensors[number - 1]
        element, rest = divmod(int(address) - t.address, t.itemsize)
        return f"{t}, element {element} of {t.elements.size}" + (
            f" and {rest} bytes" if rest else ""
        )


class Shared:
    """The shared memory of some CTAs, with who touched each byte last and in which interval between
    barriers.

    Threads of one warp may store to one address at once. A GPU keeps one of the values and does not
    say which, so they must be equal: Triton stores every replica of a sum.

    Args:
        ctas: How many.
        size: Bytes of each.
        threads: Of each.
    """

    _SEVERAL = 63  # stands for the reader where several warps have read

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
        """Bytes (threads, width) at these addresses."""
        at, me = self._at(address, width, threads, where), self._me(threads)
        writer = self.writer[at]
        if (writer < 0).any():
            raise Fault(f"{where}: shared memory read that nobody wrote")
        if self._is_other_warp(writer, me).any():
            raise Fault(
                f"{where}: shared memory read that another warp wrote without a barrier between"
            )
        for warp in np.unique(self.warp[threads]):
            mine = self.warp[threads] == warp
            seen = self.reader[at[mine]]
            self.reader[at[mine]] = np.where(
                self._is_other_warp(seen, me[mine]), me[mine] | self._SEVERAL, me[mine]
            )
        return self.bytes[at]

    def store(
        self, address: np.ndarray, values: np.ndarray, threads: np.ndarray, where: str
    ) -> None:
        """Write bytes (threads, width)."""
        at, me = self._at(address, values.shape[1], threads, where), self._me(threads)
        for last in (self.writer[at], self.reader[at]):
            other = self._is_other_warp(last, me).any(1)
            if other.any() and _differ(self.bytes[at[other]], values[other]).any():
                raise Fault(
                    f"{where}: shared memory written that another warp touched without a barrier "
                    "between"
                )
        self.writer[at], self.bytes[at] = me, values
        lost = _differ(self.bytes[at], values)
        if (self.writer[at[lost]] != me[lost]).any():
            raise Fault(f"{where}: shared memory written by two warps at once")
        if lost.any():
            raise Fault(
                f"{where}: threads of one warp store different values to one shared address, "
                f"{int(lost.sum())} are lost"
            )

    def _at(self, address: np.ndarray, width: int, threads: np.ndarray, where: str) -> np.ndarray:
        if (address % width).any():
            raise Fault(f"{where}: misaligned shared access of {width} bytes")
        if (address.astype(i8) + width > self.size).any():
            raise Fault(f"{where}: shared access beyond {self.size} bytes")
        return (address.astype(i8) + self.cta[threads] * self.size)[:, None] + np.arange(width)

    def _me(self, threads: np.ndarray) -> np.ndarray:
        return (self.interval[self.cta[threads]] * 64 + self.warp[threads])[:, None]

    @staticmethod
    def _is_other_warp(last: np.ndarray, me: np.ndarray) -> np.ndarray:
        """Whether another warp was there in this interval."""
        return (last >= 0) & (last >> 6 == me >> 6) & (last != me)


# what operations on x86 and torch.nan give
_NANS = {u8: (0x7FF8000000000000, 0xFFF8000000000000), u4: (0x7FC00000, 0xFFC00000)}


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows of bytes differ, other than in the sign of a plain NaN: a GPU makes one kind, a
    CPU two.
    """
    for dtype, (positive, negative) in _NANS.items():
        if a.shape[1] % dtype().itemsize == 0:
            a, b = (np.ascontiguousarray(x).view(dtype) for x in (a, b))
            a, b = (np.where(x == dtype(negative), dtype(positive), x).view(u1) for x in (a, b))
    return (a != b).any(1)
