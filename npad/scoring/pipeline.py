"""Scoring: from images to anomaly maps and scores, on one device and without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npad import devices, ops
from npad.features.backbone import Backbone
from npad.images.source import Batch, ImageError
from npad.scoring import fusion
from npad.scoring.fusion import Standardization

__all__ = ["Run", "Scorer", "distances", "embed", "started_ahead"]

T = TypeVar("T")
S = TypeVar("S")


def embed(network: Backbone, projection: Tensor | None, images: Tensor) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1] -> embeddings (B, h, w, C) float32, reduced if so fitted."""
    with torch.autocast(images.device.type, enabled=False):  # the program's; dtypes are the model's
        x: Tensor = network(images)
        return x if projection is None else x @ projection


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


@dataclass(frozen=True, eq=False)
class Scorer:
    """What a fitted model does with a batch of images. See ``NPad`` for the fields."""

    network: Backbone
    projection: Tensor | None
    mean: Tensor | None
    factor: Tensor | None
    centroids: Tensor | None
    index: Tensor | None  # of the centroids
    image_size: tuple[int, int]
    score_window: int
    fusion: str
    fusion_weight: float
    standardization: Standardization | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for scorers that do the same, by the same tensors."""
        values = [getattr(self, field.name) for field in fields(self)]
        return tuple(id(v) if isinstance(v, (Tensor, Backbone)) else v for v in values)

    def distances(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The maps of embeddings (N, h, w, C)."""
        return distances(
            x, self.mean, self.factor, self.centroids, self.score_window, index=self.index
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32 in [0, 1] -> scores (B,) and maps (B, H, W), float32."""
        maps = self.distances(embed(self.network, self.projection, images))
        terms = fusion.fusion_arguments(
            *maps, self.fusion, self.fusion_weight, self.standardization
        )
        sigma = fusion.smoothing_sigma(self.image_size)
        smooth, scores = ops.anomaly_map(*terms, self.image_size, sigma)
        return scores, smooth


@dataclass(frozen=True, eq=False)
class Flight:
    """A batch whose results are on their way."""

    batch: Batch
    scores: Tensor  # (B,) float32
    maps: Tensor  # of each image's own size, one after another
    landed: Any  # the event of a CUDA stream, or None

    def finish(self) -> tuple[NDArray[np.float64], list[NDArray[np.float32]]]:
        """Wait for the scores and the maps, each at its image's own size.

        Raises
        ------
        RuntimeError : a score that is not finite, which would pass below any threshold.
        """
        maps = self.maps
        if self.landed is not None:
            self.landed.synchronize()
            maps = maps.clone()  # page-locked memory is not for results, which the user may keep
        scores = self.scores.double().numpy()
        if not np.isfinite(scores).all():
            name = self.batch.names[int(np.argmin(np.isfinite(scores)))]
            raise RuntimeError(
                f"NPad.predict: the score of {name} is not finite: its features are larger than the "
                "backbone's precision holds; use backbone_dtype='float32'"
            )
        return scores, fusion.cut(maps, self.batch.sizes)


class Run:
    """Takes batches to a device, has them scored there, and brings the results back.

    Parameters
    ----------
    score : (B, 3, H, W) on the device -> scores (B,) and maps (B, H, W)
    device : torch device
    """

    def __init__(self, score: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device) -> None:
        self._score = devices.Halving(score, "NPad.predict")
        self._device = device
        # torch has 32 streams of a priority and then hands out the first again. One on which another
        # thread is recording a graph would take these copies into it; graphs are of priority 0.
        self._copies = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self, batch: Batch) -> Flight:
        """Queue everything that a batch needs; on a GPU, nothing waits."""
        scores, maps = self._score(self._take(batch.images))
        flat = ops.resize_maps(maps, batch.sizes)
        if self._copies is None:
            return Flight(batch, scores.cpu(), flat.cpu(), None)
        host = _to_host(scores), _to_host(flat)
        landed = torch.cuda.Event()
        landed.record(torch.cuda.current_stream(self._device))  # another GPU may be current
        return Flight(batch, *host, landed)

    def _take(self, images: Tensor) -> Tensor:
        if self._copies is None:
            return images.to(self._device)
        with torch.cuda.stream(self._copies):
            there = images.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        there.record_stream(current)
        return there


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def started_ahead(items: Iterable[T], start: Callable[[T], S], depth: int) -> Iterator[S]:
    """Start up to `depth` items before the first of them is taken.

    What has been started comes even if a later item is an image that cannot be read.
    """
    pending: deque[S] = deque()
    try:
        for item in items:
            pending.append(start(item))
            if len(pending) >= depth:
                yield pending.popleft()
    except ImageError:
        yield from pending
        raise
    yield from pending
