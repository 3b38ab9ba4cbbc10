"""The MVTec AD layout of a data set.

    <category>/train/good/*                            defect-free images to fit
    <category>/test/good/*, test/<type>/*              images to score
    <category>/ground_truth/<type>/<name>_mask.png     where the defects are (or <name>.png)

A category may have no masks at all; then only whole images can be measured.

Source: Bergmann, Fauser, Sattlegger, Steger, *MVTec AD*, CVPR 2019.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npad.file_names import shown
from npad.images.decoding import read_image
from npad.images.folders import list_images

__all__ = ["Category", "DatasetError", "Sample", "find_categories", "read_mask", "resample_mask"]

GOOD = "good"
PARTS = ("train", "test", "ground_truth")
_NAMED = 3  # of the images without a mask that an error lists


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
        return f"{shown(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes
    ----------
    path : Path
    defect_type : str
        ``"good"``, or the name of its folder below ``test``.
    mask_path : Path or None
        Where the defect is. A good image needs none.
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
    """One kind of object or texture: what to fit and what to score, both sorted by path.

    Raises
    ------
    DatasetError
        Some defective images have a mask and others have none.
    """

    name: str
    train: list[Path]
    test: list[Sample]

    def __post_init__(self) -> None:
        defects = [sample for sample in self.test if sample.is_anomalous]
        missing = [sample for sample in defects if sample.mask_path is None]
        if not 0 < len(missing) < len(defects):
            return
        first, *others = missing
        named = [str(sample.path) for sample in others[:_NAMED]]
        named += [f"{len(others) - _NAMED} more"] if len(others) > _NAMED else []
        raise DatasetError(
            first.path,
            f"a defect without its mask{', as are ' if named else ''}{', '.join(named)}:"
            f" {len(missing)} of {len(defects)} defective images have none; add them, here"
            f" ground_truth/{first.defect_type}/{first.path.stem}_mask.png, or remove all masks to"
            " measure whole images only",
        )

    @property
    def has_masks(self) -> bool:
        """Whether it is known where the defects are, so that pixels can be measured."""
        return all(sample.mask_path for sample in self.test if sample.is_anomalous)


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
        its image, masks for some of the defects only, or two of one name.
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


def resample_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Bring a mask to another size: each pixel takes the value that lies at its centre.

    Parameters
    ----------
    mask : (H, W) bool
    size : (height, width)

    Returns
    -------
    (height, width) bool
    """
    rows, columns = (
        ((np.arange(n) + 0.5) * own / n).astype(np.intp)
        for n, own in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


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
            test += [Sample(path, folder.name, found[0] if found else None) for path in paths]
    category = Category(root.resolve().name, train, test)
    for orphans in masks.values():
        raise DatasetError(
            orphans[0],
            "a mask without its image in test: name it as its image, with _mask at the end or without,"
            " add the image, or remove the mask",
        )
    return category


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
