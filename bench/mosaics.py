"""Large images: mosaics of a category's real ones, of which at most one piece is defective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npad.evaluation.datasets import Category, Sample
from npad.images.masks import read_mask, resample_mask

__all__ = ["Layout", "Mosaic", "Mosaics", "drawn_mosaics"]

FITTED = 0.6  # of the good images, from which mosaics to fit are pasted; the others are scored
LEAST = 0.002  # of a piece, that a mask marks; 11 x 11 of 256 x 256 pixels

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Layout:
    """Rows and columns of square pieces of so many pixels; the borders of pieces never move."""

    rows: int
    columns: int
    piece: int

    @property
    def size(self) -> Size:
        """(height, width) of a mosaic."""
        return self.rows * self.piece, self.columns * self.piece

    def place(self, i: int) -> tuple[slice, slice]:
        """Rows and columns of pixels of piece `i`."""
        row, column = divmod(i, self.columns)
        return (
            slice(row * self.piece, (row + 1) * self.piece),
            slice(column * self.piece, (column + 1) * self.piece),
        )


@dataclass(frozen=True, eq=False)
class Mosaic:
    """One to score.

    Attributes
    ----------
    path : its file
    defective : which piece is; None: none
    marked : (piece, piece) bool, what the mask of that piece marks; None where there are no masks
    """

    path: Path
    defective: int | None = None
    marked: NDArray[np.bool_] | None = None

    def mask(self, layout: Layout) -> NDArray[np.bool_]:
        """(H, W) of the mosaic."""
        whole = np.zeros(layout.size, dtype=bool)
        if self.defective is not None and self.marked is not None:
            whole[layout.place(self.defective)] = self.marked
        return whole


@dataclass(frozen=True, eq=False)
class Mosaics:
    """Of one category."""

    layout: Layout
    train: list[Path]
    test: list[Mosaic]
    has_masks: bool


def drawn_mosaics(
    category: Category, layout: Layout, counts: Sequence[int], seed: int, folder: Path
) -> Mosaics:
    """Paste mosaics at random and write them as PNG files of the folder.

    Good pieces of mosaics that are scored are in none that is fitted. The defective pieces are those
    whose masks mark least, but for specks, as far as there are masks; each as often as any other.

    Parameters
    ----------
    category : with masks or without
    layout : of each mosaic
    counts : mosaics to fit, good ones and defective ones to score
    """
    n_train, n_good, n_bad = counts
    rng = np.random.default_rng(seed)
    good = [*category.train, *(s.path for s in category.test if not s.is_anomalous)]
    good = [good[i] for i in rng.permutation(len(good))]
    to_fit, to_score = np.split(np.array(good, object), [round(FITTED * len(good))])
    bad = _least_marked(category, layout.piece, n_bad, rng)

    def paste(paths: NDArray[np.object_], name: str, defective: Path | None = None) -> Mosaic:
        """With the defective piece anywhere."""
        n = layout.rows * layout.columns
        pieces = [*rng.choice(paths, n, replace=n > len(paths))]
        place = int(rng.integers(n))
        if defective is not None:
            pieces[place] = defective
        whole = np.empty((*layout.size, 3), np.uint8)
        for i, path in enumerate(pieces):
            piece = Image.open(path).convert("RGB").resize((layout.piece, layout.piece))
            whole[layout.place(i)] = piece
        Image.fromarray(whole).save(folder / name, compress_level=1)
        return Mosaic(folder / name, None if defective is None else place)

    train = [paste(to_fit, f"train_{i:04}.png").path for i in range(n_train)]
    test = [paste(to_score, f"good_{i:04}.png") for i in range(n_good)]
    for i in range(n_bad):
        sample, marked = bad[i % len(bad)]
        pasted = paste(to_score, f"defective_{i:04}.png", sample.path)
        test.append(Mosaic(pasted.path, pasted.defective, marked))
    return Mosaics(layout, train, test, category.has_masks)


def _least_marked(
    category: Category, piece: int, count: int, rng: np.random.Generator
) -> list[tuple[Sample, NDArray[np.bool_] | None]]:
    """So many defective images, with what their masks mark of a piece; without masks, at random."""
    bad = [sample for sample in category.test if sample.is_anomalous]
    if not category.has_masks:
        return [(bad[i], None) for i in rng.permutation(len(bad))[:count]]

    def marked() -> Iterator[tuple[Sample, NDArray[np.bool_]]]:
        for sample in bad:
            assert sample.mask_path is not None
            mask = resample_mask(read_mask(sample.mask_path), (piece, piece))
            if mask.mean() >= LEAST:
                yield sample, mask

    found: list[tuple[Sample, NDArray[np.bool_] | None]] = [*marked()]
    return sorted(found, key=lambda pair: int(np.sum(pair[1])))[:count]
