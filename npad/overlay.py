"""A heat map over an image."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw_overlay"]

_COLORMAP = "inferno"
_STRENGTH = 0.75  # of the hottest colour over the image


def draw_overlay(image: NDArray[Any], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay colours over an image, the more the hotter.

    Parameters
    ----------
    image : (H, W, 3) uint8, or float32 in [0, 1]
    heat : (H, W) float32; 0 leaves the image as it is, values beyond 0 and 1 are clipped

    Returns
    -------
    (H, W, 3) uint8
    """
    if image.dtype != np.uint8:
        image = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    level = heat.clip(0, 1)
    strength = _STRENGTH * level[..., None]
    color = _color_table()[np.rint(255 * level).astype(np.uint8)]
    picture: NDArray[np.uint8] = np.rint(image + strength * (color - image)).astype(np.uint8)
    return picture


@cache
def _color_table() -> NDArray[np.float32]:
    import matplotlib as mpl  # noqa: PLC0415  (slow to import)

    table = np.asarray(mpl.colormaps[_COLORMAP](np.arange(256)), dtype=np.float32)
    return 255 * table[:, :3]
