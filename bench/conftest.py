"""Set torch up for the pytest-benchmark files of this folder."""

from __future__ import annotations

import pytest

from bench.machine import set_up_torch


def pytest_configure(config: pytest.Config) -> None:
    set_up_torch(threads=1)
