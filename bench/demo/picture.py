"""Draw the demo's picture: crops, their defects, and the heat maps of both blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # only writes files, so that no screen is needed
from matplotlib import pyplot as plt
from matplotlib.figure import SubFigure
from matplotlib.image import AxesImage
from torch import Tensor

from tests.support.textures import Example

HEADLINE = "FastFlow trained twice from the same weights on the same batches: stock and ours"
COLUMNS = ("image", "true defect", "heat map\nstock", "heat map\nours")


def save_picture(
    path: Path,
    textures: Sequence[tuple[str, list[Example], Tensor, Tensor]],
    numbers: dict,
    kinds: Sequence[str],
) -> None:
    """Draw one example of each texture and kind of defect, with the heat maps of stock and ours.

    Args:
        path: The PNG to write.
        textures: Of each texture the name, the test examples, and the heat maps (B, H, W) of stock
            and of ours.
        numbers: The demo's summary, for the titles.
        kinds: The kinds of defect, in the order of the rows.
    """
    figure = plt.figure(figsize=(17, 7.6), dpi=110, facecolor="white")
    blocks = figure.subfigures(1, len(textures), wspace=0.0, squeeze=False)[0]
    figure.subplots_adjust(top=0.8)
    scale = _common_scale(textures)
    for block, texture in zip(blocks, textures, strict=True):
        heat = _draw_texture(block, texture, kinds, scale, numbers["textures"][texture[0]])
    bar = figure.add_axes((0.3, 0.055, 0.4, 0.016))
    figure.colorbar(heat, cax=bar, orientation="horizontal")
    bar.set_title(
        "anomaly score: 1 - likelihood of the features under the flow (same scale everywhere)",
        fontsize=9,
        pad=4,
    )
    bar.tick_params(labelsize=8)
    figure.text(0.5, 0.965, HEADLINE, ha="center", va="center", fontsize=14, weight="bold")
    figure.text(0.5, 0.928, _key_numbers(numbers), ha="center", va="center", fontsize=11)
    figure.text(
        0.5,
        0.9,
        f"stock: {numbers['settings']['stock']}   |   {numbers['machine']}",
        ha="center",
        va="center",
        fontsize=8,
        color="0.4",
    )
    figure.savefig(path)
    plt.close(figure)


def _draw_texture(
    block: SubFigure,
    texture: tuple,
    kinds: Sequence[str],
    scale: tuple[float, float],
    numbers: dict,
) -> AxesImage:
    """Draw the rows of one texture, and return the last heat map's image for the colour bar."""
    name, examples, stock, ours = texture
    margins = {
        "wspace": 0.04,
        "hspace": 0.04,
        "left": 0.07,
        "right": 0.985,
        "top": 0.8,
        "bottom": 0.115,
    }
    axes = block.subplots(len(kinds), len(COLUMNS), gridspec_kw=margins)
    auroc = numbers["pixel_auroc"]
    title = f"{name}: pixel AUROC {auroc['stock']:.3f} stock, {auroc['ours']:.3f} ours"
    block.text(0.53, 0.862, title, ha="center", fontsize=11, weight="bold")
    for row, kind in zip(axes, kinds, strict=True):
        # The last of its kind: the choice must not depend on the result.
        i = max(j for j, example in enumerate(examples) if example.kind == kind)
        row[0].imshow(examples[i].image, cmap="gray", vmin=0, vmax=1)
        row[1].imshow(examples[i].mask, cmap="gray", vmin=0, vmax=1)
        for axis, heat_map in ((row[2], stock[i]), (row[3], ours[i])):
            heat = axis.imshow(1 + heat_map, cmap="inferno", vmin=scale[0], vmax=scale[1])
        row[0].set_ylabel(kind, fontsize=10)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=9)
    return heat


def _common_scale(textures: Sequence[tuple]) -> tuple[float, float]:
    """Return the lowest and the highest score of all heat maps.

    With one scale for all, equal colours are equal scores.
    """
    scores = [1 + heat_map for _, _, stock, ours in textures for heat_map in (stock, ours)]
    return min(s.min().item() for s in scores), max(s.max().item() for s in scores)


def _key_numbers(numbers: dict) -> str:
    times, kept = numbers["seconds_per_step"], numbers["bytes_kept_for_backward"]
    auroc = numbers["pixel_auroc"]
    largest = max(t["loss_difference"]["max"] for t in numbers["textures"].values())
    return (
        f"largest difference of the losses {largest:.0e}   |   "
        f"step {times['stock'] * 1e3:.0f} ms stock, {times['ours'] * 1e3:.0f} ms ours   |   "
        f"kept for backward {kept['stock']['whole'] / 1e6:.0f} MB stock, "
        f"{kept['ours']['whole'] / 1e6:.0f} MB ours   |   "
        f"pixel AUROC {auroc['stock']:.3f} stock, {auroc['ours']:.3f} ours"
    )
