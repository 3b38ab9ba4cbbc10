"""A category whose images go through the backbone once, for studies that fit it in many ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npad import NPad
from npad.evaluation.datasets import Category
from npad.evaluation.masks import read_mask, resample_mask
from npad.evaluation.metrics import image_metrics, pixel_metrics

METRICS = ("auroc", "pixel_auroc", "aupro")


class EmbeddedCategory:
    """Embeddings of all images, in files of a folder that are mapped into memory, and the truth.

    Parameters
    ----------
    category : from `npad.evaluation.datasets.find_categories`
    model : not fitted; its backbone and image size are used
    folder : holds the files for as long as this is in use

    Attributes
    ----------
    train, test : (N, h, w, D) float32, in the order of the category
    size : (height, width) of the maps that `measure` takes
    """

    def __init__(self, category: Category, model: NPad, folder: Path) -> None:
        self.size = model.input_size()
        self.labels = np.array([sample.is_anomalous for sample in category.test])
        masked = category.test if category.has_masks else []
        self.masks = [self._mask(sample.mask_path) for sample in masked]
        self.train = _embedded(model, category.train, folder / "train.float32")
        paths = [sample.path for sample in category.test]
        self.test = _embedded(model, paths, folder / "test.float32")

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


def _embedded(model: NPad, paths: Sequence[Path], file: Path) -> Tensor:
    found: Tensor | None = None
    done = 0
    for x in model.embed_batches(paths):
        if found is None:
            shape = len(paths), *x.shape[1:]
            found = torch.from_file(str(file), shared=True, size=math.prod(shape)).view(shape)
        found[done : done + len(x)] = x
        done += len(x)
    assert found is not None
    return found
