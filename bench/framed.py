"""A category as if its parts lay before a saturated background, most of which never changes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from PIL import Image

from npad.evaluation.datasets import find_categories
from npad.images.masks import read_mask

SIDE: Final = 0.6  # of the images, where 1 is the size they had


def framed(category: Path, folder: Path) -> Path:
    """Write its images, and their masks, at a share of their size in the middle of white ones.

    Returns
    -------
    the folder, in the MVTec AD layout
    """
    (found,) = find_categories(category)
    for i, path in enumerate(found.train):
        _write(Image.open(path).convert("RGB"), folder / "train" / "good" / f"{i:04}.png", 255)
    for i, sample in enumerate(found.test):
        image = Image.open(sample.path).convert("RGB")
        _write(image, folder / "test" / sample.defect_type / f"{i:04}.png", 255)
        if sample.mask_path is not None:
            mask = Image.fromarray(read_mask(sample.mask_path)).convert("L")
            name = f"{i:04}_mask.png"
            _write(mask, folder / "ground_truth" / sample.defect_type / name, 0)
    return folder


def _write(image: Image.Image, path: Path, ground: int) -> None:
    width, height = image.size
    resample = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.BILINEAR
    small = image.resize((round(SIDE * width), round(SIDE * height)), resample)
    whole = Image.new(image.mode, image.size, ground if image.mode == "L" else (ground,) * 3)
    whole.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)
