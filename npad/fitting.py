"""Fitting: from defect-free images to what a model keeps of them, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from npad import devices, ops, progress
from npad.features.projection import principal_axes
from npad.images.depth import least_depth
from npad.images.source import ImageSource
from npad.learned import Learned, Standardization
from npad.ops.axes import random_axes
from npad.scoring.scorer import distances, reduce
from npad.settings import Settings, uses_gaussians, uses_nominal_set
from npad.statistics.gaussian import NeighborhoodGaussian, SmallEpsError
from npad.statistics.holdout import Reservoir
from npad.statistics.nominal_set import NominalSet

__all__ = ["AXES_IMAGES", "MIN_IMAGES", "Fit", "axes_sample", "fit_images"]

MIN_IMAGES: Final = 2
AXES_IMAGES: Final = 64  # images whose embeddings choose the principal axes

Embed = Callable[[Tensor], Tensor]
S = TypeVar("S", NeighborhoodGaussian, NominalSet)


class Fit:
    """Statistics of nominal images, in memory that does not grow with their number.

    Parameters
    ----------
    settings : how to fit
    embed : images (B, 3, H, W) float32 in [0, 1] -> embeddings (B, h, w, D), whose device is that of
        all statistics; not needed where only embeddings are given

    Attributes
    ----------
    n_images : images so far
    darkest : the largest value, 0 to 1, that each of them reaches; of embeddings it is not known
    projection : (D, C) float32, to which embeddings are reduced; None before it is chosen, or where
        all features are kept

    Notes
    -----
    A share of the images is held out from the statistics until `finalize` has chosen eps and the
    standardisation on them; then they are fitted too. With principal axes, embeddings wait until there
    are `AXES_IMAGES` of them, unless `choose_axes` came before.
    """

    def __init__(self, settings: Settings, embed: Embed | None = None) -> None:
        self.settings = settings
        self.n_images = 0
        self.darkest = 1.0
        self.projection: Tensor | None = None
        self._embed = embed
        self._grid: tuple[int, int] | None = None
        self._n_channels = 0  # of the embeddings as they come
        self._waiting: list[Tensor] = []  # for axes
        self._held_out = Reservoir(settings.holdout, settings.seed)
        self._gaussian: NeighborhoodGaussian | None = None
        self._nominal: NominalSet | None = None
        if uses_nominal_set(settings.fusion):
            assert settings.nominal_set is not None
            self._nominal = NominalSet(
                settings.nominal_set, settings.n_centroids, seed=settings.seed
            )
        self._eps: float | None = None if settings.eps == "auto" else float(settings.eps)
        self._standardization: Standardization | None = None

    # ----------------------------------------------------------------------------------------------
    # Images.

    def update(self, images: Tensor | None = None, *, embeddings: Tensor | None = None) -> Fit:
        """Add a batch, as images or as embeddings.

        Parameters
        ----------
        images : (B, 3, H, W) float32 in [0, 1]
        embeddings : (B, h, w, D) float32, as the backbone gives them

        Returns
        -------
        self

        Raises
        ------
        TypeError
            Neither images nor embeddings, or both; images without a way to embed them.
        ValueError
            Embeddings that have not four axes, or another grid or other channels than before; more
            features asked for than there are channels; values that are not finite.
        MemoryError
            The statistics would not fit into memory.
        """
        x = self._embeddings(images, embeddings)
        self._begin(x)
        self.n_images += len(x)
        if len(x):
            self.darkest = min(self.darkest, 0.0 if images is None else _darkest(images))
        if self._needs_axes():
            self._waiting.append(x)
            if self.n_images >= AXES_IMAGES:
                self._end_waiting()
        else:
            self._take(x)
        return self

    def choose_axes(self, sample: Iterable[Tensor]) -> None:
        """Choose the principal axes now, by embeddings (B, h, w, D) that `update` gets as well.

        For a source that can be read twice: a random sample stands for it better than what comes
        first.
        """
        rest = iter(sample)
        first = next(rest, None)
        if first is not None:
            self._begin(first)
            if self._needs_axes():
                self._choose_axes(chain([first], rest))

    def _needs_axes(self) -> bool:
        return self.settings.n_features is not None and self.projection is None

    def _embeddings(self, images: Tensor | None, embeddings: Tensor | None) -> Tensor:
        if (images is None) == (embeddings is None):
            raise TypeError("Fit.update: give images or embeddings, one of them")
        if embeddings is not None:
            return embeddings
        if self._embed is None:
            raise TypeError("Fit.update: this fit was made without embed=; give embeddings=")
        assert images is not None
        return self._embed(images)

    def _begin(self, x: Tensor) -> None:
        """Look at embeddings as they come."""
        if x.ndim != 4:
            raise ValueError(
                f"Fit.update: embeddings must have shape (B, h, w, D), got {tuple(x.shape)}"
            )
        grid, channels = (x.shape[1], x.shape[2]), x.shape[3]
        if self._grid is not None:
            if (grid, channels) != (self._grid, self._n_channels):
                raise ValueError(
                    f"Fit.update: embeddings must be {self._grid} with {self._n_channels} channels as "
                    f"before, got {grid} with {channels}"
                )
            return
        n_features = self.settings.n_features
        if n_features is not None and n_features > channels:
            raise ValueError(
                f"NPad: n_features={n_features} is more than the {channels} channels of "
                f"{self.settings.backbone}; give at most that, or None"
            )
        self._grid, self._n_channels = grid, channels
        if n_features is not None and self.settings.reduction == "random":
            generator = torch.Generator().manual_seed(self.settings.seed)
            axes = random_axes(channels, n_features, generator)
            self.projection = axes.contiguous().to(x.device)  # as it is read from a file

    def _choose_axes(self, embeddings: Iterable[Tensor]) -> None:
        assert self.settings.n_features is not None
        self.projection = principal_axes(embeddings, self.settings.n_features)

    def _end_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and self._needs_axes():
            self._choose_axes(waiting)
        for x in waiting:
            self._take(x)

    def _take(self, x: Tensor) -> None:
        """Reduce, hold out a share, fit the rest."""
        with devices.plain(x.device):
            x = reduce(x, self.projection)
        if self._gaussian is None and uses_gaussians(self.settings.fusion):
            self._gaussian = self._new_gaussian(x)
        fitted = self._held_out.take(x)
        if len(fitted):
            self._add(fitted)

    def _add(self, x: Tensor) -> None:
        if self._gaussian is not None:
            self._gaussian.update(x)
        if self._nominal is not None:
            self._nominal.update(x)

    def _new_gaussian(self, x: Tensor) -> NeighborhoodGaussian:
        grid, channels = (x.shape[1], x.shape[2]), x.shape[3]
        positions, packed = grid[0] * grid[1], ops.packed_size(channels)
        devices.require(
            positions * packed * (4 + self._factor_dtype.itemsize),
            x.device,
            "NPad.fit",
            f"a Gaussian of {channels} channels at each of {positions} positions",
            "lower n_features or image_size, or choose fewer layers",
        )
        return NeighborhoodGaussian(grid, channels, window=self.settings.window, device=x.device)

    # ----------------------------------------------------------------------------------------------
    # Other fits.

    def merge(self, other: Fit) -> Fit:
        """Add what another fit of the same settings has seen; that one is used up.

        The Gaussians are those of one fit of all images, up to float32 rounding; the nominal sets are
        composed (see `npad.statistics.nominal_set.NominalSet`).

        Parameters
        ----------
        other : with principal axes, it has chosen none, or these same ones

        Returns
        -------
        self

        Raises
        ------
        ValueError
            This same fit, other settings, another grid or channels, or other axes.
        """
        if other is self:
            raise ValueError(
                "Fit.merge: a fit cannot be merged with itself: its images would count twice"
            )
        if other.settings.to_json() != self.settings.to_json():
            raise ValueError("Fit.merge: the fits have different settings; merge fits of the same")
        if other._grid is None:
            return self
        shapes = [(fit._grid, fit._n_channels) for fit in (self, other)]
        if self._grid is not None and shapes[0] != shapes[1]:
            raise ValueError(
                "Fit.merge: grid and channels are {} here and {} in other".format(*shapes)
            )
        axes = [fit.projection for fit in (self, other) if fit.projection is not None]
        if len(axes) == 2 and not torch.equal(*axes):
            raise ValueError(
                "Fit.merge: the fits have different axes; give the second the projection of the first"
            )
        self._grid, self._n_channels = shapes[1]
        self.projection = axes[0] if axes else None
        self._gaussian = _joined(self._gaussian, other._gaussian)
        self._nominal = _joined(self._nominal, other._nominal)
        self._held_out.merge(other._held_out, self._add)
        if self._eps is None:
            self._eps = other._eps
        self._standardization = self._standardization or other._standardization
        self.n_images += other.n_images
        self.darkest = min(self.darkest, other.darkest)
        self._waiting += other._waiting
        if not self._needs_axes() or self.n_images >= AXES_IMAGES:
            self._end_waiting()
        return self

    # ----------------------------------------------------------------------------------------------
    # The end.

    def finalize(self) -> Learned:
        """Choose eps on the images held out, fit them too, and make of it all what a model keeps.

        The fit can go on afterwards; until other images are held out, eps stays.

        Raises
        ------
        ValueError
            Too few images, identical ones, or a covariance that is not positive definite with this eps.
        MemoryError
            As for `update`.
        """
        if self.n_images < MIN_IMAGES:
            raise ValueError(
                f"NPad.fit: {self.n_images} image(s) given; at least {MIN_IMAGES} defect-free images "
                "are needed, and some tens are recommended"
            )
        self._end_waiting()
        standardization = self._end_holdout()
        if self._gaussian is not None and not self._gaussian.varies:
            raise ValueError(
                f"NPad.fit: the {self.n_images} images are identical, or differ by nothing but "
                "rounding, so that no spread can be learned; fit images of different parts"
            )
        mean, factor = self._gaussians()
        assert self._grid is not None
        return Learned(
            grid=self._grid,
            n_images=self.n_images,
            darkest=self.darkest,
            eps=self._eps,
            standardization=standardization,
            projection=self.projection,
            mean=mean,
            factor=factor,
            centroids=self._centroids(),
        )

    def _end_holdout(self) -> Standardization | None:
        """What is chosen on the images held out, which are then fitted."""
        if not self._held_out.kept:
            return self._standardization
        self._leave_enough()
        x = torch.stack(self._held_out.kept)
        if self._gaussian is not None and self.settings.chooses_eps:
            self._eps = self._gaussian.choose_eps(x)
        if self.settings.fusion == "sum":
            self._standardization = self._standardize(x)
        self._held_out.kept.clear()
        self._add(x)
        return self._standardization

    def _leave_enough(self) -> None:
        """Give back to the fit what it needs of a few images that have nearly all been held out."""
        chooses = self.settings.chooses_eps or self.settings.fusion == "sum"
        if self._gaussian is None or not chooses:
            return
        kept, needed = self._held_out.kept, self._gaussian.least_images
        while len(kept) > 1 and self.n_images - len(kept) < needed:
            self._add(kept.pop()[None])
        if self.n_images - len(kept) < needed:
            what = "eps='auto'" if self.settings.chooses_eps else "fusion='sum'"
            raise ValueError(
                f"NPad.fit: {self.n_images} images are too few for window=1 with {what}, which holds "
                f"one of them out; fit {needed + 1} or more, or use window=3"
            )

    def _standardize(self, held_out: Tensor) -> Standardization:
        """By the distances to what has been fitted so far, which is then let go."""
        mean, factor = self._gaussians()
        mahalanobis, euclidean = distances(
            held_out, mean, factor, self._centroids(), self.settings.score_window
        )
        assert mahalanobis is not None
        assert euclidean is not None
        found = Standardization.of(mahalanobis, euclidean)
        if not (found.mahalanobis_std > 0 and found.euclidean_std > 0):
            raise ValueError(
                "NPad.fit: fusion='sum' divides by the spread of both distances of the images held "
                "out, and there is none: the images are identical; fit images of different parts, or "
                "use fusion='product'"
            )
        return found

    def _gaussians(self) -> tuple[Tensor | None, Tensor | None]:
        """Means and factors."""
        if self._gaussian is None:
            return None, None
        positions = len(self._gaussian.count)
        while True:
            try:
                with self._task("fit: Gaussians", positions, "positions") as advance:
                    return self._gaussian.finalize(self._eps or 0.0, self._factor_dtype, advance)
            except SmallEpsError as error:
                if not self.settings.chooses_eps:
                    raise
                self._eps = error.enough  # it was chosen on a sample of positions

    def _centroids(self) -> Tensor | None:
        if self._nominal is None:
            return None
        n = self.settings.n_centroids
        with self._task("fit: nominal set", n if n >= 1 else None, "centroids") as advance:
            return self._nominal.finalize(advance).centroids_

    def _task(
        self, description: str, total: float | None, unit: str
    ) -> AbstractContextManager[progress.Advance]:
        return progress.task(description, total, self.settings.progress, unit)

    @property
    def _factor_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.settings.factor_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    # ----------------------------------------------------------------------------------------------
    # A fit that is written down and goes on later.

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the fit is, as JSON types and tensors; `npad.model_file.write_model` takes both.

        The tensors are the fit's own: write or copy them before the fit goes on.
        """
        values: dict[str, Any] = {
            "settings": self.settings.to_json(),
            "n_images": self.n_images,
            "darkest": self.darkest,
            "grid": self._grid,
            "n_channels": self._n_channels,
            "waiting": [len(x) for x in self._waiting],
            "eps": self._eps,
            "standardization": asdict(self._standardization) if self._standardization else None,
        }
        tensors: dict[str, Tensor] = {}
        if self.projection is not None:
            tensors["projection"] = self.projection
        if self._waiting:
            tensors["waiting"] = torch.cat(self._waiting)
        for name, part in self._parts().items():
            values[name], found = part.state()
            tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
        return values, tensors

    @classmethod
    def from_state(
        cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor], embed: Embed | None = None
    ) -> Fit:
        """Go on where `state` was taken: the result is that of a fit that never stopped.

        Parameters
        ----------
        values, tensors : from `state`; the statistics live where the tensors do
        embed : as for `Fit`

        Raises
        ------
        KeyError
            This is no state of a fit.
        ValueError
            Its settings are none.
        """
        fit = cls(Settings(**values["settings"]), embed)
        fit.n_images = int(values["n_images"])
        fit.darkest = float(values["darkest"])
        if values["grid"] is not None:
            height, width = values["grid"]
            fit._grid = int(height), int(width)
        fit._n_channels = int(values["n_channels"])
        fit._eps = values["eps"]
        if values["standardization"] is not None:
            fit._standardization = Standardization(**values["standardization"])
        fit.projection = tensors.get("projection")
        if "waiting" in tensors:
            fit._waiting = list(tensors["waiting"].split(values["waiting"]))
        if "gaussian" in values:
            fit._gaussian = NeighborhoodGaussian((1, 1), 1)
        for name, part in fit._parts().items():
            prefix = f"{name}."
            own = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
            part.restore(values[name], own)
        return fit

    def _parts(self) -> dict[str, Reservoir | NeighborhoodGaussian | NominalSet]:
        parts = {
            "held_out": self._held_out,
            "gaussian": self._gaussian,
            "nominal": self._nominal,
        }
        return {name: part for name, part in parts.items() if part is not None}


def axes_sample(n_images: int, seed: int) -> list[int]:
    """Indices, in order, of the images of a source that choose its axes."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(
        torch.randperm(n_images, generator=generator, device="cpu")[:AXES_IMAGES].tolist()
    )


def fit_images(
    settings: Settings, embed: Callable[[Tensor], Tensor], images: ImageSource
) -> Learned:
    """One pass over the images, and a look at some of them before, where axes are to be chosen."""
    fit = Fit(settings, embed)
    if settings.chooses_axes and images.random_access and images.n_images is not None:
        with closing(images.batches(axes_sample(images.n_images, settings.seed))) as batches:
            fit.choose_axes(embed(batch.images) for batch in batches)
    with (
        closing(images.batches()) as batches,
        progress.task("fit: embeddings", images.n_images, settings.progress, "images") as advance,
    ):
        for batch in batches:
            fit.update(batch.images)
            advance(len(batch.images))
    learned = fit.finalize()
    if settings.bit_depth is not None or len(images.undeclared) < learned.n_images:
        return learned
    return replace(learned, n_bits=least_depth(max(images.undeclared.values())))


def _darkest(images: Tensor) -> float:
    """The largest value of the image where it is least."""
    return float(images.flatten(1).amax(1).min())


def _joined(part: S | None, other: S | None) -> S | None:
    """Statistics of both; either may be None."""
    if part is None or other is None:
        return other if part is None else part
    part.merge(other)
    return part
