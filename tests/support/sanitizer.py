"""A memory checker for Triton kernels that run in the interpreter (TRITON_INTERPRET=1).

The interpreter itself lets kernels read and write anywhere, and write twice. :func:`sanitize`
checks every launch:

- Each lane's address must lie inside the span of one of the launch's tensors.
- No address may be stored to twice in one launch, in any order of the programs.
- The bytes that each tensor's loads and stores move are counted, without masked lanes.
- ``torch.empty`` and its kin return NaN (the least value for integers), so that a value that is
  read or returned unwritten shows.

If kernels run on a GPU, only the last point holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from tests.support.fresh_memory import filled
from tests.support.launches import Launch


class StrayAccess(AssertionError):
    """A kernel touched memory that it must not touch."""


@dataclass
class _Range:
    name: str
    first: int
    end: int
    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)
    itemsize: int = 1


class _Checker:
    """A proxy of the interpreter's C++ module, whose ``load`` and ``store`` see every address."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.ranges: list[_Range] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        size = np.dtype(dtype).itemsize
        for r, addresses in self._by_range(pointers, mask, size, "load"):
            r.loads.append(addresses)
            r.itemsize = size
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        size = np.asarray(value).dtype.itemsize
        for r, addresses in self._by_range(pointers, mask, size, "store"):
            r.stores.append(addresses)
            r.itemsize = size
        return self._real.store(pointers, value, mask)

    def _by_range(
        self, pointers: Any, mask: Any, size: int, kind: str
    ) -> Iterator[tuple[_Range, np.ndarray]]:
        addresses = (
            np.asarray(pointers).astype(np.uint64).ravel()[np.asarray(mask).ravel().astype(bool)]
        )
        remaining = addresses
        for r in self.ranges:
            inside = (remaining >= r.first) & (remaining + np.uint64(size) <= r.end)
            if inside.any():
                yield r, remaining[inside]
                remaining = remaining[~inside]
            if not remaining.size:
                return
        if remaining.size:
            raise StrayAccess(f"{kind} out of bounds: {remaining.size} of {addresses.size} lanes")

    def finish(self, kernel: str) -> Launch:
        launch = Launch(kernel)
        for r in self.ranges:
            loads, stores = (
                np.concatenate(parts or [np.empty(0, np.uint64)]) for parts in (r.loads, r.stores)
            )
            twice = stores.size - np.unique(stores).size
            if twice:
                raise StrayAccess(
                    f"{kernel}: {twice} addresses of {r.name} stored twice in one launch"
                )
            launch.count(r.name, loads, stores, r.itemsize)
        return launch


def _range_of(name: str, t: torch.Tensor) -> _Range:
    span = (
        sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
        if t.numel()
        else 0
    )
    return _Range(name, t.data_ptr(), t.data_ptr() + span * t.element_size())


def _poison(t: torch.Tensor) -> None:
    t.fill_(
        torch.nan
        if t.is_floating_point()
        else torch.iinfo(t.dtype).min
        if t.dtype is not torch.bool
        else True
    )


@contextlib.contextmanager
def sanitize() -> Iterator[list[Launch]]:
    """Check every kernel launch inside the block.

    Yields:
        The list of launches, which grows as they finish. On a GPU it stays empty.

    Raises:
        InterpreterError: At an access out of bounds, which the message names.
        StrayAccess: At the end of a launch that stored to an address twice.
    """
    checker = _Checker(interpreter._interpreter)
    launches: list[Launch] = []
    execute = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        checker.ranges = [
            _range_of(name, t) for name, t in named.items() if isinstance(t, torch.Tensor)
        ]
        execute(self, *args, **kwargs)
        launches.append(checker.finish(self.fn.__name__))

    with contextlib.ExitStack() as stack:
        stack.enter_context(filled(_poison))
        stack.enter_context(mock.patch.object(interpreter, "_interpreter", checker))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", checked))
        yield launches
