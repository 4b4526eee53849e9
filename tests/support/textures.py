"""Photographs of textures: clean crops for training, and held-out crops with painted defects.

The photographs (brick, grass, gravel) are part of scikit-image's wheel, so nothing is downloaded.
Training crops come from the left part of a photograph and test crops from the right part, so that
no pixel is in both.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import skimage.io
import torch
from scipy import ndimage
from torch import Tensor

TEXTURES = ("brick", "grass", "gravel")
DEFECTS = ("clean", "scratch", "blot", "patch")
CROP = 192
TRAIN_COLUMNS = 320  # of 512; the last 192 are for the test
ALPHA_OF_A_DEFECT = 0.5  # a pixel belongs to the defect if at least half of its colour does


class Example(NamedTuple):
    """A test crop.

    Attributes:
        kind: One of DEFECTS.
        image: Grey values in 0..1, (CROP, CROP) float32.
        mask: The defect's pixels, (CROP, CROP) bool; all False for ``"clean"``.
    """

    kind: str
    image: np.ndarray
    mask: np.ndarray


def load_photograph(name: str) -> np.ndarray:
    """Load one of TEXTURES from the installed scikit-image as grey values in 0..1.

    Raises:
        FileNotFoundError: If this scikit-image does not ship the photograph.
    """
    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    if not path.exists():
        raise FileNotFoundError(
            f"scikit-image {metadata.version('scikit-image')} ships no {path.name} "
            f"(looked in {path.parent}); install scikit-image 0.26"
        )
    return skimage.io.imread(path).astype(np.float32) / 255


def training_crops(photograph: np.ndarray, count: int, rng: np.random.Generator) -> Tensor:
    """Cut clean crops at random places of the training part, half of them mirrored.

    Returns:
        (count, CROP, CROP) float32.
    """
    height = photograph.shape[0]
    crops = []
    for _ in range(count):
        top, left = rng.integers(height - CROP + 1), rng.integers(TRAIN_COLUMNS - CROP + 1)
        crop = photograph[top : top + CROP, left : left + CROP]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return torch.from_numpy(np.stack(crops))


def held_out_examples(
    name: str, photographs: dict[str, np.ndarray], per_kind: int, rng: np.random.Generator
) -> list[Example]:
    """Cut held-out crops of a photograph, and paint defects on them.

    Returns:
        ``per_kind`` examples of each of DEFECTS, spread over the test part.
    """
    photograph = photographs[name]
    foreign = [photographs[key] for key in photographs if key != name]
    examples = []
    for i, top in enumerate(np.linspace(0, photograph.shape[0] - CROP, per_kind).astype(int)):
        clean = photograph[top : top + CROP, TRAIN_COLUMNS : TRAIN_COLUMNS + CROP]
        examples += [_paint(kind, clean, foreign[i % len(foreign)], rng) for kind in DEFECTS]
    return examples


def _paint(kind: str, clean: np.ndarray, foreign: np.ndarray, rng: np.random.Generator) -> Example:
    """Paint a defect of one kind over a copy of ``clean``; a patch shows the foreign photograph."""
    if kind == "clean":
        return Example(kind, clean, np.zeros(clean.shape, bool))
    if kind == "scratch":
        alpha = _scratch(rng)
        colour = np.full_like(clean, rng.choice([0.1, 0.9]))
    elif kind == "blot":
        alpha = _blob(rng)
        colour = 0.45 * clean  # a stain lets the texture through
    else:
        alpha = _blob(rng)
        colour = _like(foreign[:CROP, TRAIN_COLUMNS : TRAIN_COLUMNS + CROP], clean)
    image = (clean + alpha * (colour - clean)).clip(0, 1).astype(np.float32)
    return Example(kind, image, alpha >= ALPHA_OF_A_DEFECT)


def _like(texture: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Give a texture the brightness and contrast of another, so that only its structure differs."""
    return (texture - texture.mean()) / texture.std() * target.std() + target.mean()


def _scratch(rng: np.random.Generator) -> np.ndarray:
    """Draw the opacity of a bent line, 2 to 4 pixels wide and 60 to 120 long, at random."""
    length, angle = rng.uniform(60, 120), rng.uniform(0, np.pi)
    along = np.array([np.sin(angle), np.cos(angle)])
    across = np.array([along[1], -along[0]])
    centre = rng.uniform(65, CROP - 65, size=2)
    bend = rng.uniform(-12, 12)
    t = np.linspace(-1, 1, 400)[:, None]
    curve = centre + along * t * length / 2 + across * bend * (1 - t * t)
    canvas = np.ones((CROP, CROP), bool)
    rows, columns = curve.round().astype(int).T
    canvas[rows, columns] = False
    distance = ndimage.distance_transform_edt(canvas)
    return (rng.uniform(1.0, 2.0) + 0.5 - distance).clip(0, 1)


def _blob(rng: np.random.Generator) -> np.ndarray:
    """Draw the opacity of an irregular spot, 15 to 30 pixels in radius, with a soft edge."""
    radius = rng.uniform(15, 30)
    row, column = rng.uniform(40, CROP - 40, size=2)
    y, x = np.mgrid[:CROP, :CROP]
    ripple = ndimage.gaussian_filter(rng.standard_normal((CROP, CROP)), 8)
    edge = radius * (1 + 0.25 * ripple / ripple.std()) - np.hypot(y - row, x - column)
    return (0.5 + edge / 3).clip(0, 1)
