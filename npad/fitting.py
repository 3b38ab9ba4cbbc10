"""Fitting: from defect-free images to what a model keeps of them, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npad import arguments, devices, ops, progress
from npad.features.backbone import Backbone
from npad.features.projection import principal_axes, random_axes
from npad.images.source import Batch, ImageSource
from npad.scoring.fusion import Standardization, uses_gaussians, uses_nominal_set
from npad.scoring.pipeline import distances
from npad.statistics.gaussian import NeighborhoodGaussian
from npad.statistics.holdout import Reservoir
from npad.statistics.nominal_set import NominalSet

if TYPE_CHECKING:
    from npad.detector import NPad

__all__ = ["Learned", "fit"]

MIN_IMAGES = 2
PCA_IMAGES = 64  # images whose embeddings choose the principal axes

Embed = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Learned:
    """What a fit has found. See the attributes of ``NPad``, which has them with a trailing ``_``."""

    grid: tuple[int, int]
    n_images: int
    eps: float | None
    projection: Tensor | None
    mean: Tensor | None
    factor: Tensor | None
    centroids: Tensor | None
    standardization: Standardization | None


def fit(model: NPad, network: Backbone, embed: Embed, images: ImageSource) -> Learned:
    """Fit the images with the settings of a model, which is not changed.

    Parameters
    ----------
    model : whose arguments say how
    network : what the embeddings come from
    embed : images (B, 3, H, W) on the CPU and a projection, or None -> embeddings (B, h, w, C)
    images : the defect-free images

    Raises
    ------
    ValueError, MemoryError : as ``NPad.fit``.
    """
    grid = network.grid(model.image_size)
    projection: Tensor | None = None
    embed_batch = devices.Halving(lambda x: (embed(x, projection),), "NPad.fit")
    projection, batches = _projection(model, network.channels, embed_batch, images)
    channels = network.channels if projection is None else projection.shape[1]
    gaussian = _new_gaussian(model, grid, channels) if uses_gaussians(model.fusion) else None
    nominal = (
        NominalSet(model.nominal_set, model.n_centroids, seed=model.seed)
        if model.nominal_set is not None and uses_nominal_set(model.fusion)
        else None
    )

    def add(x: Tensor) -> None:
        if gaussian is not None:
            gaussian.update(x)
        if nominal is not None:
            nominal.update(x)

    held_out = Reservoir(model.holdout, model.seed)
    n_images = 0
    with (
        closing(batches),
        progress.task("fit: embeddings", images.n_images, model.progress, "images") as advance,
    ):
        for batch in batches:
            (x,) = embed_batch(batch.images)
            fitted = held_out.take(x)
            if len(fitted):
                add(fitted)
            n_images += len(x)
            advance(len(x))
    if n_images < MIN_IMAGES:
        raise ValueError(
            f"NPad.fit: {n_images} image(s) given; at least {MIN_IMAGES} defect-free images are "
            "needed, and some tens are recommended"
        )

    eps = None if model.eps == "auto" else float(model.eps)
    standardization = None
    if held_out.kept:
        x = torch.stack(held_out.kept)
        if gaussian is not None and eps is None:
            eps = gaussian.choose_eps(x)
        if model.fusion == "sum":
            standardization = _standardization(model, gaussian, nominal, eps, x)
        add(x)
    return Learned(
        grid,
        n_images,
        eps,
        projection,
        *_gaussians(model, gaussian, eps),
        _centroids(model, nominal),
        standardization,
    )


def _projection(
    model: NPad, channels: int, embed_batch: devices.Halving, images: ImageSource
) -> tuple[Tensor | None, Generator[Batch]]:
    """Matrix that reduces the embeddings, and the batches to fit."""
    if model.n_features is None:
        return None, images.batches()
    if model.n_features > channels:
        raise ValueError(
            f"NPad: n_features={model.n_features} is more than the {channels} channels of "
            f"{model.backbone}; give at most that, or None"
        )
    generator = torch.Generator().manual_seed(model.seed)
    if model.reduction == "random":
        axes = random_axes(channels, model.n_features, generator)
        return axes.to(model.device), images.batches()

    # A random sample where the source can be read twice, else the images that come first.
    if images.random_access and images.n_images is not None:
        order = torch.randperm(images.n_images, generator=generator)[:PCA_IMAGES]
        sample, batches = list(images.batches(sorted(order.tolist()))), images.batches()
    else:
        rest = images.batches()
        sample = list(itertools.islice(rest, -(-PCA_IMAGES // model.batch_size)))
        batches = _joined(sample, rest)
    if not sample:
        return None, batches  # the fit says that there are too few images
    embeddings = (embed_batch(batch.images)[0] for batch in sample)
    return principal_axes(embeddings, model.n_features), batches


def _new_gaussian(model: NPad, grid: tuple[int, int], channels: int) -> NeighborhoodGaussian:
    positions, packed = grid[0] * grid[1], ops.packed_size(channels)
    devices.require(
        positions * packed * (4 + arguments.DTYPES[model.factor_dtype].itemsize),
        model.device,
        "NPad.fit",
        f"a Gaussian of {channels} channels at each of {positions} positions",
        "lower n_features or image_size, or choose fewer layers",
    )
    return NeighborhoodGaussian(grid, channels, window=model.window, device=model.device)


def _standardization(
    model: NPad,
    gaussian: NeighborhoodGaussian | None,
    nominal: NominalSet | None,
    eps: float | None,
    held_out: Tensor,
) -> Standardization | None:
    """Of the distances to what has been fitted so far, which is then let go."""
    learned = *_gaussians(model, gaussian, eps), _centroids(model, nominal)
    mahalanobis, euclidean = distances(held_out, *learned, model.score_window)
    if mahalanobis is None or euclidean is None:
        return None
    return Standardization.of(mahalanobis, euclidean)


def _gaussians(
    model: NPad, gaussian: NeighborhoodGaussian | None, eps: float | None
) -> tuple[Tensor | None, Tensor | None]:
    """Means and factors."""
    if gaussian is None:
        return None, None
    dtype, positions = arguments.DTYPES[model.factor_dtype], len(gaussian.count)
    with progress.task("fit: Gaussians", positions, model.progress, "positions") as advance:
        return gaussian.finalize(eps or 0.0, dtype, advance)


def _centroids(model: NPad, nominal: NominalSet | None) -> Tensor | None:
    if nominal is None:
        return None
    total = model.n_centroids if model.n_centroids >= 1 else None
    with progress.task("fit: nominal set", total, model.progress, "centroids") as advance:
        return nominal.finalize(advance).centroids_


def _joined(first: Iterable[Batch], rest: Generator[Batch]) -> Generator[Batch]:
    """One after the other; unlike a chain, closing it closes the rest."""
    yield from first
    yield from rest
