"""Batches on their way: to a device, through the scorer there, and back, without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from npad import devices, ops, progress
from npad.features.backbone import Backbone, filled, levels_in_parts
from npad.features.tiling import Core, Tiling
from npad.images.errors import ImageError
from npad.images.source import Batch, ImageSource
from npad.scoring.decisions import Decide
from npad.scoring.frames import in_own_frames
from npad.scoring.fusion import cut, inside_alone, with_shares
from npad.scoring.prediction import Prediction
from npad.scoring.scorer import Scorer

__all__ = [
    "MapSize",
    "Run",
    "embedder",
    "predictions",
    "score_in_parts",
    "started_ahead",
]

MapSize: TypeAlias = 'Literal["image", "model"] | tuple[int, int]'
T = TypeVar("T")
S = TypeVar("S")


def checked_map_size(map_size: Any) -> MapSize:
    """As given.

    Raises
    ------
    ValueError
        No size that a map can have.
    """
    match map_size:
        case str("image" | "model"):  # a str: an array would be compared element by element
            return map_size
        case (height, width) if all(
            isinstance(side, Integral) and not isinstance(side, bool) and int(side) >= 1
            for side in (height, width)
        ):
            return int(height), int(width)
    raise ValueError(
        f"NPad: map_size must be 'image', 'model' or a positive (height, width), got {map_size!r}"
    )


def score_in_parts(scorer: Scorer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images -> scores (B,) and maps (B, H, W): the network sees a part of a batch at a time."""
    with devices.plain(images.device):
        images, own = scorer.look(images)
        return scorer.fused(scorer.distances(scorer.filled(images), levels_in_parts), own)


@dataclass(frozen=True, eq=False)
class Flight:
    """A batch whose results are on their way."""

    batch: Batch
    scores: Tensor  # (2, B) float32: scores, and the largest values of the maps
    maps: Tensor  # one after another
    sizes: list[tuple[int, int]]  # of the maps
    landed: Any  # the event of a CUDA stream, or None

    def finish(self) -> Prediction:
        """Wait for the scores and the maps.

        Raises
        ------
        RuntimeError
            A score that is not finite, which would pass below any threshold.
        """
        maps = self.maps
        if self.landed is not None:
            self.landed.synchronize()
            maps = maps.clone()  # page-locked memory is not for results, which the user may keep
        scores, maxima = self.scores.double().numpy()
        batch = self.batch
        if not np.isfinite(scores).all():
            name = batch.names[int(np.argmin(np.isfinite(scores)))]
            raise RuntimeError(
                f"NPad.predict: the score of {name} is not finite: its features are larger than the "
                "backbone's precision holds; use backbone_dtype='float32', or, if that is in use, "
                "a larger eps"
            )
        return Prediction(
            scores,
            cut(maps, self.sizes),
            batch.names,
            batch.sizes,
            images=batch.pixels,
            map_maxima=maxima,
            unaligned=batch.unaligned,
        )


class Run:
    """Takes batches to a device, has them scored there, and brings the results back.

    Parameters
    ----------
    score : (B, 3, H, W) on the device -> scores (B,) and maps (B, H, W)
    device : torch device
    map_size : "image", "model" or (height, width): the size of the maps
    in_part : whether maps are NaN outside of a region of interest
    """

    def __init__(
        self,
        score: Callable[[Tensor], tuple[Tensor, ...]],
        device: torch.device,
        map_size: MapSize = "image",
        *,
        in_part: bool = False,
    ) -> None:
        self._score = devices.Halving(score, "NPad.predict")
        self.device = device
        self._map_size = checked_map_size(map_size)
        self._in_part = in_part
        # torch has 32 streams of a priority and then hands out the first again. One on which another
        # thread is recording a graph would take these copies into it; graphs are of priority 0.
        self._copies = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self, batch: Batch) -> Flight:
        """Queue everything that a batch needs; on a GPU, nothing waits."""
        scores, maps = self._score(self._take(batch.images))
        maps = in_own_frames(maps, batch.motions)
        inside = maps.masked_fill(maps.isnan(), -torch.inf) if self._in_part else maps
        scores = torch.stack([scores, inside.flatten(1).amax(1)])
        own = maps.shape[1], maps.shape[2]
        sizes = self._map_sizes(batch, own)
        flat = maps.flatten() if set(sizes) <= {own} else self._resized(maps, sizes)
        if self._copies is None:
            return Flight(batch, scores.cpu(), flat.cpu(), sizes, None)
        host = _to_host(scores), _to_host(flat)
        landed = torch.cuda.Event()
        landed.record(torch.cuda.current_stream(self.device))  # another GPU may be current
        return Flight(batch, *host, sizes, landed)

    def _resized(self, maps: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        if not self._in_part:
            return ops.resize_maps(maps, sizes)
        return inside_alone(*(ops.resize_maps(x, sizes) for x in with_shares(maps)))

    def _map_sizes(self, batch: Batch, own: tuple[int, int]) -> list[tuple[int, int]]:
        if self._map_size == "image":
            return batch.sizes
        return [own if self._map_size == "model" else self._map_size] * len(batch.sizes)

    def _take(self, images: Tensor) -> Tensor:
        if self._copies is None:
            return images.to(self.device)
        with torch.cuda.stream(self._copies):
            there = images.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        there.record_stream(current)
        return there


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(
        x, non_blocking=True
    )


def started_ahead(items: Iterable[T], start: Callable[[T], S], depth: int) -> Iterator[S]:
    """Start up to `depth` items before the first of them is taken.

    What has been started comes even if a later item is an image that cannot be read.
    """
    pending: deque[S] = deque()
    try:
        for item in items:
            pending.append(start(item))
            del item  # a batch, whose images may go before the next are there
            if len(pending) >= depth:
                yield pending.popleft()
    except ImageError:
        yield from pending
        raise
    yield from pending


def embedder(
    networks: Sequence[Backbone],
    tiling: Tiling,
    combine: Callable[[list[list[Tensor]]], Sequence[Tensor]],
    device: torch.device,
    call: str,
    cores: Sequence[Core] | None = None,
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Of images from the CPU: embeddings (B, h, w, D), a batch halved where memory is short.

    `combine` makes them of the levels of each network, which see tiles of the images filled up: all,
    or those of some `cores`.
    """

    def embed_tiles(images: Tensor) -> Sequence[Tensor]:
        return combine([levels_in_parts(network, images) for network in networks])

    def embed(images: Tensor) -> tuple[Tensor, ...]:
        with devices.plain(device):
            there = filled(images.to(device, non_blocking=True), tiling.extent)
            return tiling.stitched(there, embed_tiles, cores)

    return devices.Halving(embed, call)


def predictions(
    run: Run,
    images: ImageSource,
    bars: bool | None,
    decide: Decide | None = None,
    look: Callable[[Batch], None] | None = None,
) -> Iterator[Prediction]:
    """Predictions of a source, batch by batch.

    Parameters
    ----------
    run, images : how, and of what
    bars : as `enabled` of `npad.progress.task`
    decide : by the scores of images and their positions in the source
    look : at each batch that has been scored
    """
    device = run.device
    depth = 2 if device.type == "cuda" and images.n_images is not None else 1
    told = 0
    with (
        closing(images.batches()) as batches,
        progress.task("predict", images.n_images, bars, "images") as advance,
        devices.explained("NPad.predict", device),
    ):
        for flight in started_ahead(batches, run.start, depth):
            prediction = flight.finish()
            prediction.skipped, told = images.skipped[told:], len(images.skipped)
            if decide is not None:
                prediction.decisions = decide(prediction.scores, flight.batch.indices)
            if look is not None:
                look(flight.batch)
            del flight  # as in `started_ahead`
            yield prediction
            advance(len(prediction.scores))
    if images.skipped[told:]:
        decisions = None if decide is None else decide(np.empty(0), [])
        yield Prediction(np.empty(0), [], [], skipped=images.skipped[told:], decisions=decisions)
