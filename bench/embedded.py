"""A category whose images go through the backbones once, for studies that fit it in many ways."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npad.evaluation.datasets import Category
from npad.evaluation.metrics import image_metrics, pixel_metrics
from npad.features.backbone import Backbone, levels_in_parts
from npad.images import ImageSource
from npad.images.masks import read_mask, resample_mask
from npad.members import Member

METRICS = ("auroc", "pixel_auroc", "aupro")
BATCH = 8

Place = tuple[int, int, bool]  # network, level, on its own grid


@dataclass(frozen=True)
class Rows:
    """Embeddings (N, h, w, D) whose channels lie in several tensors; joined where they are read."""

    parts: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)"""
        return self.parts[0].shape[1], self.parts[0].shape[2]

    def __getitem__(self, which: slice | list[int]) -> Tensor:
        return torch.cat([part[which] for part in self.parts], dim=3)

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of up to this many."""
        return (self[i : i + size] for i in range(0, len(self), size))


class EmbeddedCategory:
    """Embeddings of all images, in files of a folder that are mapped into memory, and the truth.

    Parameters
    ----------
    category : from `npad.evaluation.datasets.find_categories`
    networks : whose levels are kept
    size : (height, width) of the images
    folder : holds the files for as long as this is in use

    Attributes
    ----------
    layers : of the first network
    labels : (N,) whether a test image is defective
    masks : of the test images, at `size`; empty where there are none
    """

    def __init__(
        self,
        category: Category,
        networks: Sequence[Backbone],
        size: tuple[int, int],
        folder: Path,
    ) -> None:
        self.size = size
        self.labels = np.array([sample.is_anomalous for sample in category.test])
        masked = category.test if category.has_masks else []
        self.masks = [self._mask(sample.mask_path) for sample in masked]
        self._networks = networks
        self.layers = networks[0].layers
        self._train = self._embedded(category.train, folder / "train")
        self._test = self._embedded([sample.path for sample in category.test], folder / "test")

    def train(self, member: Member) -> Rows:
        """What a member learns from."""
        return self._rows(self._train, member)

    def test(self, member: Member) -> Rows:
        """What a member scores, in the order of the category."""
        return self._rows(self._test, member)

    def _rows(self, found: dict[Place, Tensor], member: Member) -> Rows:
        return Rows([found[member.network, level, member.own_grid] for level in member.levels])

    def measure(self, scores: Tensor, maps: Tensor) -> dict[str, float]:
        """`METRICS` of scores (N,) and maps (N, H, W) of the test images, as far as there are masks."""
        found = image_metrics(self.labels, scores.double().numpy())
        if self.masks:
            found |= pixel_metrics(self.masks, maps.numpy())
        return {name: found[name] for name in METRICS if name in found}

    def _mask(self, path: Path | None) -> NDArray[np.bool_]:
        if path is None:
            return np.zeros(self.size, dtype=bool)
        return resample_mask(read_mask(path), self.size)

    def _embedded(self, paths: Sequence[Path], folder: Path) -> dict[Place, Tensor]:
        folder.mkdir()
        images = ImageSource(paths, image_size=self.size, batch_size=BATCH)
        found: dict[Place, Tensor] = {}
        done = 0
        for batch in images.batches():
            for place, x in self._parts(batch.images):
                if place not in found:
                    found[place] = _file(folder, place, len(paths), x)
                found[place][done : done + len(x)] = x
            done += len(batch.images)
        return {(i, level, True): x for (i, level, _), x in found.items()} | found

    def _parts(self, images: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Each level on the grid of all, and on its own where that is another."""
        for i, network in enumerate(self._networks):
            features = levels_in_parts(network, images)
            for level in network.level_channels:
                yield (i, level, False), network.combined(features, (level,))
                if network.grid(self.size, level) != network.grid(self.size):
                    yield (i, level, True), network.combined(features, (level,), own_grid=True)


def _file(folder: Path, place: Place, n_images: int, x: Tensor) -> Tensor:
    """Room for the embeddings of all images, like those of a batch."""
    shape = n_images, *x.shape[1:]
    name = "-".join(map(str, map(int, place)))
    return torch.from_file(str(folder / name), shared=True, size=math.prod(shape)).view(shape)
