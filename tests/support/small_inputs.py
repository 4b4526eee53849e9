"""Change which inputs are small: on a CPU, "auto" runs plain operations on small inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest

from fastflow_kernels import predicates

LIMIT = predicates.SMALL  # elements; the default for users

# Run a test on the path that users get for small inputs, and on the fused path. The fixture
# ``small`` is the limit.
plain_and_fused = pytest.mark.parametrize(
    "small", [LIMIT, 0], ids=["plain", "fused"], indirect=True
)


@contextlib.contextmanager
def small_up_to(elements: int) -> Iterator[None]:
    """Treat inputs of up to this many elements as small; with 0, no input is small."""
    with mock.patch.object(predicates, "SMALL", elements):
        yield
