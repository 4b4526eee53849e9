"""Which inputs are small: "auto" runs plain operations on them, on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest

from fastflow_kernels import predicates

LIMIT = predicates.SMALL  # elements; what users get

# Small inputs as users get them, and on the fused path. The test takes ``small``, the limit.
plain_and_fused = pytest.mark.parametrize(
    "small", [LIMIT, 0], ids=["plain", "fused"], indirect=True
)


@contextlib.contextmanager
def small_up_to(elements: int) -> Iterator[None]:
    """A context in which inputs of at most so many elements are small; with 0 there are none."""
    with mock.patch.object(predicates, "SMALL", elements):
        yield
