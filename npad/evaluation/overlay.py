"""Colours of an anomaly map, by itself and over its image."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["color_map", "draw_overlay", "eight_bit"]

_COLORMAP = "inferno"
_OVER_IMAGE = 0.3, 0.9  # part of the colour map that is seen on dark images and on light ones
_OPAQUE = 0.5  # heat at which the colours are laid on in full
_STRENGTH = 0.8  # of a colour that is laid on in full; the rest is the image


def color_map(heat: NDArray[Any]) -> NDArray[np.uint8]:
    """Colour an anomaly map.

    Parameters
    ----------
    heat : (H, W) float; values beyond 0 and 1 are clipped

    Returns
    -------
    (H, W, 3) uint8, from black over purple and orange to light yellow
    """
    return _color_table()[np.rint(255 * heat.clip(0, 1)).astype(np.uint8)]


def draw_overlay(image: NDArray[Any], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay colours over an image: nothing of them where it is cold, so that a defect stays in sight.

    Parameters
    ----------
    image : (H, W, 3) uint8, or float32 in [0, 1]
    heat : (H, W) float32; 0 leaves the image as it is, values beyond 0 and 1 are clipped

    Returns
    -------
    (H, W, 3) uint8
    """
    image = eight_bit(image)
    level = heat.clip(0, 1)
    rise = (level / _OPAQUE).clip(0, 1)
    # Slow at first: half of all nominal pixels are a little warm, and would tint the whole image.
    strength = _STRENGTH * (rise * rise * (3 - 2 * rise))[..., None]
    low, high = _OVER_IMAGE
    color = color_map(low + (high - low) * level)
    picture: NDArray[np.uint8] = np.rint(image + strength * (color - image.astype(np.float32)))
    return picture.astype(np.uint8)


def eight_bit(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Make uint8 of an image that is uint8 already or float in [0, 1]."""
    if image.dtype == np.uint8:
        return image
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


@cache
def _color_table() -> NDArray[np.uint8]:
    import matplotlib as mpl  # noqa: PLC0415  (slow to import)

    table: NDArray[np.uint8] = mpl.colormaps[_COLORMAP](np.arange(256), bytes=True)
    return table[:, :3]
