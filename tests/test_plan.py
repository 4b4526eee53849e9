"""Test which inputs the kernels take, and how their work is split into tiles, without Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastflow_kernels import layouts
from fastflow_kernels.engines.triton import plan


def test_why_unsupported_names_the_reason() -> None:
    x = torch.randn(2, 4, 3, 3)
    for supported in (x, x[:, :3], x[:1].expand(2, 4, 3, 3), x.transpose(2, 3)):
        assert plan.why_unsupported(supported.shape, supported.dtype) is None
    assert "dtype" in plan.why_unsupported(x.shape, torch.complex64)
    assert "dimensions" in plan.why_unsupported(x.view(-1).shape, x.dtype)
    assert "32-bit" in plan.why_unsupported((2, 2**16, 2**15), x.dtype)
    assert "a batch of 2147483648 samples" in plan.why_unsupported((2**31, 2, 2), x.dtype)
    # A tile holds several rows, so more of them fit.
    assert plan.why_unsupported((2**31, 2), x.dtype) is None


def test_samples_are_packed_whatever_lies_between_them() -> None:
    x = torch.randn(2, 4, 3, 3)
    one_pixel = torch.empty(2, 4, 1, 1).to(memory_format=torch.channels_last)
    for packed in (x, x[:, :3], x[:1].expand(2, 4, 3, 3), x[::2], one_pixel):
        assert layouts.is_packed(packed)
    channels_last = x.to(memory_format=torch.channels_last)
    for strided in (channels_last, x.transpose(2, 3), x[:, :, :, ::2], x[:, ::2]):
        assert not layouts.is_packed(strided)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    "rows",
    [None, plan.FORWARD_ROWS, plan.BACKWARD_ROWS],
    ids=["planes", "forward rows", "backward rows"],
)
@pytest.mark.parametrize("batch", [1, 7, 4096, 100_000])
def test_plan_covers_everything_once(batch: int, rows: plan.RowTiles | None, itemsize: int) -> None:
    for channels in (1, 2, 33, 512):
        for pixels in (1,) if rows else (1, 2, 49, 196, 784, 4096, 12_345):
            for columns in (1, 64):
                tiles = plan.make_plan(channels, batch, pixels, itemsize, rows, columns)
                assert covers(tiles.channel_tiles, tiles.block_channels, channels)
                assert covers(tiles.groups, tiles.tiles_per_program, tiles.column_tiles)
                if rows:
                    assert tiles.channel_tiles == 1
                    assert covers(tiles.column_tiles, tiles.block_columns, batch)
                else:
                    assert tiles.column_tiles % batch == 0
                    assert covers(tiles.column_tiles // batch, tiles.block_columns, pixels)
                sizes = (tiles.block_channels, tiles.block_columns, tiles.tiles_per_program)
                for size in (*sizes, tiles.warps):
                    assert size & (size - 1) == 0


def covers(count: int, size: int, whole: int) -> bool:
    """Return whether exactly this many pieces of a size cover the whole."""
    return count * size >= whole > (count - 1) * size


def test_alignment_is_the_common_power_of_two() -> None:
    assert plan.alignment(196, 0) == 4
    assert plan.alignment(4096, 64 * 4096) == 16
    assert plan.alignment(7, 4096) == 1


def test_planning_imports_no_triton() -> None:
    code = "import sys, fastflow_kernels.engines.triton.plan; assert 'triton' not in sys.modules"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
