"""A fixed multi-scale filter bank: image features that need no pretrained weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 4
ORIENTATIONS = 6
LEVELS = 4
# On finer levels the sign of a wave would alias, because the feature grid is too coarse for it.
SIGNED_LEVELS = (2, 3)
CHANNELS = ORIENTATIONS * (LEVELS + 2 * len(SIGNED_LEVELS)) + 4 * LEVELS
WAVELENGTH = 4.0  # pixels of the level, so 4, 8, 16 and 32 pixels of the image
# Smaller Gabor amplitudes are camera noise (grey values are in 0..1). The logarithm would amplify
# them.
AMPLITUDE_FLOOR = 0.01


def filter_bank(images: Tensor) -> Tensor:
    """Compute the features of grey images on a four-level image pyramid.

    The features are oriented energies, oriented waves, brightness and blob strength.

    Args:
        images: Grey images (B, H, W) with values in 0..1. H and W are divisible by 8.

    Returns:
        Features (B, CHANNELS, H / STRIDE, W / STRIDE), not standardised.
    """
    level = images[:, None]
    size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
    features = []
    for k in range(LEVELS):
        features += [_to_grid(f, size) for f in _level_features(level, signed=k in SIGNED_LEVELS)]
        level = F.avg_pool2d(_filter(level, _gaussian(1.0)), 2)
    return torch.cat(features, dim=1)


def standardise(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardise every channel by the mean and deviation of the training features."""
    return (features - mean[:, None, None]) / std[:, None, None]


def _level_features(level: Tensor, signed: bool) -> list[Tensor]:
    """Compute the features of one pyramid level at that level's resolution."""
    even, odd = _filter(level, _gabor(0.0)), _filter(level, _gabor(math.pi / 2))
    energy = torch.log((even.square() + odd.square()).sqrt() + AMPLITUDE_FLOOR)
    brightness = _filter(level, _gaussian(2.0))
    blob = _filter(level, _gaussian(0.7)) - _filter(level, _gaussian(1.4))
    contrast = torch.log(_filter(blob.square(), _gaussian(2.0)).sqrt() + AMPLITUDE_FLOOR)
    # The extremes nearby keep thin bright and thin dark lines, which an average would wash out.
    brightest, darkest = (F.max_pool2d(sign * blob, 3, stride=1, padding=1) for sign in (1, -1))
    return [energy, brightness, contrast, brightest, darkest] + ([even, odd] if signed else [])


def _to_grid(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a level to the feature grid: average a fine level, interpolate a coarse one."""
    if feature.shape[-1] >= size[1]:
        return F.avg_pool2d(feature, feature.shape[-1] // size[1])
    return F.interpolate(feature, size=size, mode="bilinear", align_corners=False)


def _filter(image: Tensor, kernels: Tensor) -> Tensor:
    """Correlate one-channel images with square kernels (N, K, K), mirrored at the border."""
    pad = kernels.shape[-1] // 2
    return F.conv2d(F.pad(image, (pad,) * 4, mode="reflect"), kernels[:, None])


def _grid(radius: int) -> tuple[Tensor, Tensor]:
    line = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x


def _gaussian(sigma: float) -> Tensor:
    y, x = _grid(math.ceil(3 * sigma))
    g = torch.exp(-(x * x + y * y) / (2 * sigma * sigma))
    return (g / g.sum())[None]


def _gabor(phase: float) -> Tensor:
    """Return Gabor kernels of all orientations that ignore constant brightness."""
    y, x = _grid(5)
    envelope = torch.exp(-(x * x + y * y) / (2 * (0.45 * WAVELENGTH) ** 2))
    kernels = []
    for i in range(ORIENTATIONS):
        theta = math.pi * i / ORIENTATIONS
        wave = torch.cos(
            2 * math.pi / WAVELENGTH * (x * math.cos(theta) + y * math.sin(theta)) - phase
        )
        kernel = envelope * (wave - (envelope * wave).sum() / envelope.sum())
        kernels.append(kernel / kernel.abs().sum())
    return torch.stack(kernels)
