"""Fill fresh memory, to see where it is read or returned before it was written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def filled(fill: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Let ``fill`` write to every tensor that ``torch.empty`` and its kin return."""

    def filling(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = allocate(*args, **kwargs)
            fill(t)
            return t

        return empty

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filling(getattr(owner, name))))
        yield
