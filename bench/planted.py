"""A category whose defects are planted on good images: what can be known before a defect is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from npad.evaluation.datasets import find_categories

HELD_OUT: Final = 40  # good images at most, and no more than a third

Pixels = NDArray[np.float32]  # (H, W, 3) in [0, 255]
Weights = NDArray[np.float32]  # (H, W) in [0, 1], how much of a pixel is the defect's


def planted(category: Path, folder: Path, seed: int = 0) -> Path:
    """Write some of its good images aside from the others, as they are and with a defect each.

    Returns
    -------
    the folder, in the MVTec AD layout; its test images are good ones of the category's training
    """
    (found,) = find_categories(category)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found.train))
    held_out = min(HELD_OUT, len(order) // 3)
    for n, i in enumerate(order):
        image = Image.open(found.train[i]).convert("RGB")
        name = f"{i:04}.png"
        _save(image, folder / ("train" if n >= held_out else "test") / "good" / name)
        if n >= held_out:
            continue
        pixels = np.asarray(image, dtype=np.float32)
        for kind, plant in DEFECTS.items():
            weights = _shape(rng, pixels.shape[:2], plant is _scar)
            changed = pixels + weights[..., None] * (plant(pixels, rng) - pixels)
            _save(Image.fromarray(np.rint(changed).astype(np.uint8)), folder / "test" / kind / name)
            mask = Image.fromarray(np.where(weights > 0, 255, 0).astype(np.uint8))
            _save(mask, folder / "ground_truth" / kind / f"{i:04}_mask.png")
    return folder


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def _shape(rng: np.random.Generator, size: tuple[int, int], thin: bool) -> Weights:
    """A soft-edged ellipse of 2 to 8 % of the shorter side in radius; a thin one is a scar."""
    radius = rng.uniform(0.02, 0.08) * min(size)
    y, x = np.mgrid[: size[0], : size[1]]
    dy, dx = y - rng.uniform(0.1, 0.9) * size[0], x - rng.uniform(0.1, 0.9) * size[1]
    turn = rng.uniform(0, np.pi)
    along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    long, short = (
        (2 * radius, max(1.0, radius / 8)) if thin else (radius, radius * rng.uniform(0.5, 1))
    )
    inside = (1 - np.hypot(along / long, across / short)) * short
    return np.clip(inside + 0.5, 0, 1).astype(np.float32)


def _cut_paste(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """What lies elsewhere in the image, by a quarter of it at least."""
    shifts = (int(rng.uniform(0.25, 0.75) * side) for side in pixels.shape[:2])
    return np.roll(pixels, tuple(shifts), axis=(0, 1))


def _scar(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Another colour of the image."""
    colour = pixels[rng.integers(pixels.shape[0]), rng.integers(pixels.shape[1])]
    darker_or_lighter = colour + rng.choice([-1, 1]) * rng.uniform(20, 60)
    return np.broadcast_to(np.clip(darker_or_lighter, 0, 255), pixels.shape)


def _blur(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Out of focus."""
    sigma = rng.uniform(0.01, 0.02) * min(pixels.shape[:2])
    blurred: Pixels = ndimage.gaussian_filter(pixels, (sigma, sigma, 0))
    return blurred


def _stain(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Darker or lighter by a tenth to three tenths."""
    factor = 1 + rng.choice([-1, 1]) * rng.uniform(0.1, 0.3)
    return np.clip(pixels * factor, 0, 255)


DEFECTS: Final[dict[str, Callable[[Pixels, np.random.Generator], Pixels]]] = {
    "cut_paste": _cut_paste,
    "scar": _scar,
    "blur": _blur,
    "stain": _stain,
}
