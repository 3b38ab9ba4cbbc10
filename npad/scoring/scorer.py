"""What a fitted model does with a batch of images, as one module of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from npad import devices, ops
from npad.features.backbone import Backbone
from npad.learned import TENSORS, Learned
from npad.scoring.fusion import fusion_arguments, smoothing_sigma
from npad.settings import Settings

__all__ = ["Scorer", "distances", "reduce"]


def reduce(x: Tensor, projection: Tensor | None) -> Tensor:
    """Embeddings (..., D) -> (..., C), where a fit has chosen axes."""
    if projection is None:
        return x
    with nullcontext() if torch.compiler.is_compiling() else devices.exact_products:
        return x @ projection


def distances(
    x: Tensor,
    mean: Tensor | None,
    factor: Tensor | None,
    centroids: Tensor | None,
    score_window: int,
    *,
    index: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Mahalanobis and Euclidean maps of embeddings, each (N, h, w), or None where not in use."""
    mahalanobis = euclidean = None
    if mean is not None and factor is not None:
        grid = x.shape[1], x.shape[2]
        mahalanobis = ops.mahalanobis(x, mean, factor, grid, score_window)
    if centroids is not None:
        distance, _ = ops.nearest_centroid(x.flatten(0, 2), centroids, index)
        euclidean = distance.reshape(x.shape[:3])
    return mahalanobis, euclidean


class Scorer(nn.Module):
    """From images to scores and anomaly maps: the backbone, and what a fit has learned.

    The learned tensors are buffers under the names of `npad.learned.Learned`. ``torch.export`` takes it
    with a dynamic batch.

    Parameters
    ----------
    network : the backbone, which may be other models' too: moving the scorer moves a copy of it
    learned : what the fit left
    settings : of the model
    """

    projection: Tensor | None
    mean: Tensor | None
    factor: Tensor | None
    centroids: Tensor | None
    index: Tensor | None  # of the centroids

    def __init__(self, network: Backbone, learned: Learned, settings: Settings) -> None:
        super().__init__()
        self.network = network
        for tensor in TENSORS:
            value = getattr(learned, tensor.name) if tensor.when(settings) else None
            self.register_buffer(tensor.name, value)
        self.register_buffer("index", None, persistent=False)
        self._make_index()
        self.standardization = learned.standardization
        self.image_size = settings.size
        self.score_window = settings.score_window
        self.fusion = settings.fusion
        self.fusion_weight = settings.fusion_weight

    def distances(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The maps of embeddings (N, h, w, C)."""
        return distances(
            x, self.mean, self.factor, self.centroids, self.score_window, index=self.index
        )

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, h, w, D) as the backbone gives them -> scores (B,) and maps (B, H, W)."""
        maps = self.distances(reduce(x, self.projection))
        terms = fusion_arguments(*maps, self.fusion, self.fusion_weight, self.standardization)
        sigma = smoothing_sigma(self.image_size)
        smooth, scores = ops.anomaly_map(*terms, self.image_size, sigma)
        return scores, smooth

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32 in [0, 1] -> scores (B,) and maps (B, H, W), float32."""
        if torch.compiler.is_compiling():
            return self.score(self.network(images))
        with devices.plain(images.device):
            return self.score(self.network(images))

    def _make_index(self) -> None:
        """Of the centroids that it has now; that of others would find wrong distances."""
        self.index = None if self.centroids is None else ops.centroid_index(self.centroids)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load: into a network and tensors of its own, as they may be in use elsewhere."""
        self.network = copy.deepcopy(self.network)
        for tensor in TENSORS:
            value = getattr(self, tensor.name)
            setattr(self, tensor.name, None if value is None else value.clone())
        super()._load_from_state_dict(*arguments)
        self._make_index()

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Scorer:
        """Move: a network of its own, since the one that it has may be in use elsewhere."""
        self.network = copy.deepcopy(self.network)
        super()._apply(fn, recurse)
        return self
