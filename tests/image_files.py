"""Makers of test images and of a small data set."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def smooth_pixels(height, width, channels=3, seed=0):
    """(height, width, channels) uint8 with structure at every scale, so that resizing shows."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(height, width, channels))
    walk = np.cumsum(np.cumsum(noise, 0), 1)
    low, high = walk.min(), walk.max()
    return np.uint8(np.round(255 * (walk - low) / (high - low)))


def save_image(path, pixels, **options):
    """Write (H, W) or (H, W, C) pixels; the suffix chooses the format, folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def encode(pixels, image_format, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def make_category(root, n_train=3, n_good=2, n_defects=2, size=(20, 24)):
    """A category in the MVTec AD layout with one defect type, "hole"."""
    root = Path(root)
    for i in range(n_train):
        save_image(root / f"train/good/{i:03}.png", smooth_pixels(*size, seed=i))
    for i in range(n_good):
        save_image(root / f"test/good/{i:03}.png", smooth_pixels(*size, seed=100 + i))
    for i in range(n_defects):
        pixels = smooth_pixels(*size, seed=200 + i)
        mask = np.zeros(size, np.uint8)
        mask[4:8, 5:10] = 255
        pixels[mask > 0] = 0
        save_image(root / f"test/hole/{i:03}.png", pixels)
        save_image(root / f"ground_truth/hole/{i:03}_mask.png", mask)
    return root
