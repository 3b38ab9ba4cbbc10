"""The MVTec AD layout of a data set.

    <category>/train/good/*                            defect-free images to fit
    <category>/test/good/*, test/<type>/*              images to score
    <category>/ground_truth/<type>/<name>_mask.png     where the defects are (or <name>.png)

Source: Bergmann, Fauser, Sattlegger, Steger, *MVTec AD*, CVPR 2019.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npad.images.decoding import list_images, read_image

__all__ = ["Category", "DatasetError", "Sample", "find_categories", "read_mask"]

GOOD = "good"
PARTS = ("train", "test", "ground_truth")


class DatasetError(ValueError):
    """A data set that does not follow the layout.

    Attributes
    ----------
    path : Path
        The file or folder at fault.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes
    ----------
    path : Path
    defect_type : str
        ``"good"``, or the name of its folder below ``test``.
    mask_path : Path or None
        Always there for a defect.
    """

    path: Path
    defect_type: str
    mask_path: Path | None

    @property
    def is_anomalous(self) -> bool:
        """Whether the image shows a defect."""
        return self.defect_type != GOOD


@dataclass(frozen=True)
class Category:
    """One kind of object or texture: what to fit and what to score, both sorted by path."""

    name: str
    train: list[Path]
    test: list[Sample]


def find_categories(root: str | os.PathLike[str]) -> list[Category]:
    """Find the categories of a data set.

    Only file names are read. Folders beside the categories that hold neither ``train`` nor
    ``test`` nor ``ground_truth`` are ignored.

    Parameters
    ----------
    root : one category, or a folder of many

    Returns
    -------
    list of Category, sorted by name

    Raises
    ------
    DatasetError
        No category is there; no ``train/good`` or ``test``, or no images in them; a mask without
        its image, a defect without its mask, or two of one name.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(root, "no such folder")
    if _looks_like_category(root):
        return [_read_category(root)]
    folders = [folder for folder in _folders(root) if _looks_like_category(folder)]
    if not folders:
        raise DatasetError(
            root, "no data set here: expected train/good and test, in it or in its subfolders"
        )
    return [_read_category(folder) for folder in folders]


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.bool_]:
    """Read a ground-truth mask: every pixel above 0, in any channel, is defect.

    Save masks without loss: JPEG leaves faint pixels around a defect.

    Returns
    -------
    (H, W) bool

    Raises
    ------
    ImageError
        As `npad.images.read_image`.
    """
    return np.asarray(read_image(path).any(axis=2))


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _looks_like_category(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in PARTS)


def _read_category(root: Path) -> Category:
    train = _images(root / "train" / GOOD)
    test_root = root / "test"
    loose = [path for path in _images(test_root) if path.parent == test_root]
    if loose:
        raise DatasetError(loose[0], "put it in a folder that names its type, such as test/good")
    truth_root = root / "ground_truth"
    masks = _by_stem(list_images(truth_root) if truth_root.is_dir() else [], truth_root)
    test: list[Sample] = []
    for folder in _folders(test_root):
        for stem, paths in _by_stem(_images(folder), test_root).items():
            found = masks.pop(f"{stem}_mask", []) + masks.pop(stem, [])
            if len(found) > 1:
                raise DatasetError(found[1], f"a second mask of {paths[0]}: keep one")
            if found and len(paths) > 1:
                raise DatasetError(paths[1], f"shares its mask with {paths[0]}: rename one")
            if not found and folder.name != GOOD:
                expected = truth_root / f"{stem}_mask.png"
                raise DatasetError(paths[0], f"a defect without its mask: expected {expected}")
            test += [Sample(path, folder.name, found[0] if found else None) for path in paths]
    for orphans in masks.values():
        raise DatasetError(
            orphans[0], "a mask without its image in test: add the image or remove the mask"
        )
    return Category(root.resolve().name, train, test)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DatasetError(folder, "no such folder: the MVTec AD layout needs it")
    images = list_images(folder)
    if not images:
        raise DatasetError(folder, "the folder holds no images")
    return images


def _by_stem(paths: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by their path below root, without the suffix."""
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        stems[str(path.relative_to(root).with_suffix(""))].append(path)
    return stems
