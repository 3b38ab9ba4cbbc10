"""Fitting a member of a model: from embeddings to what it keeps of them, in one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor

from npad import devices, progress
from npad.features.projection import PrincipalAxes, leading_axes, principal_axes
from npad.learned import Expected, LearnedMember
from npad.members import Member
from npad.ops.axes import random_axes
from npad.roi import covered, is_known
from npad.scoring.scorer import distances, reduce
from npad.settings import KEPT_VARIANCE, MOST_FEATURES, Settings
from npad.statistics.gaussian import NeighborhoodGaussian, SmallEpsError, least_images
from npad.statistics.holdout import Reservoir
from npad.statistics.nominal_set import NominalSet

__all__ = ["AXES_IMAGES", "MemberFit", "holds_out", "under"]

AXES_IMAGES: Final = 64  # images whose embeddings choose the principal axes


class MemberFit:
    """Statistics of nominal embeddings, in memory that does not grow with their number.

    Parameters
    ----------
    settings : how to fit
    member : which statistics
    roi : (H, W) uint8, the region of interest, at the model's size; None: the whole image. With one,
        embeddings are NaN at positions where their image does not count.
    extent : pixels (height, width) that the grid covers; None: those of the region

    Attributes
    ----------
    n_images : images so far
    projection : (D, C) float32, to which embeddings are reduced as they come; None before it is
        chosen, and without a number of ``n_features`` below D

    Notes
    -----
    Where something is to be learned of images that are not fitted yet, a share is held out: from the
    Gaussians, to choose window and eps; with the fusion "sum" from the nominal set, too, to measure
    distances. `end` does that and fits these images, in a copy: a fit that goes on is the one that
    never stopped, but for the nominal set, whose bank `end` has composed.

    With a number of principal axes, embeddings wait until there are `AXES_IMAGES` of them, unless
    `look` came before. With ``n_features="auto"`` the statistics are those of all channels, and
    the axes are chosen from them at the end, so that no image is looked at twice.
    """

    def __init__(
        self,
        settings: Settings,
        member: Member,
        roi: Tensor | None = None,
        extent: tuple[int, int] | None = None,
    ) -> None:
        self.settings = settings
        self.member = member
        self.roi = roi
        self.extent = extent
        self.n_images = 0
        self.projection: Tensor | None = None
        self._grid: tuple[int, int] | None = None
        self._n_channels = 0  # of the embeddings as they come
        self._waiting: list[Tensor] = []  # for axes
        self._looked: PrincipalAxes | None = None
        held_out = settings.holdout if self._uses_held_out else 0.0
        self._held_out = Reservoir(held_out, settings.seed)
        self._gaussian: NeighborhoodGaussian | None = None
        self._nominal: NominalSet | None = None
        if member.nominal_set:
            assert settings.nominal_set is not None
            self._nominal = NominalSet(
                settings.nominal_set, settings.n_centroids, seed=settings.seed
            )
        self._like: LearnedMember | None = None  # which has chosen
        self._eps: float | None = None if settings.eps == "auto" else float(settings.eps)

    # ----------------------------------------------------------------------------------------------
    # Embeddings.

    def update(self, x: Tensor) -> MemberFit:
        """Add embeddings.

        Parameters
        ----------
        x : (B, h, w, D) float32, as the backbone gives them

        Returns
        -------
        self

        Raises
        ------
        ValueError
            Embeddings that have not four axes, or another grid or other channels than before; values
            that are not finite.
        MemoryError
            The statistics would not fit into memory.
        """
        self._begin(x)
        self.n_images += len(x)
        if self.needs_axes:
            self._waiting.append(x)
            if self.n_images >= AXES_IMAGES:
                self._end_waiting()
        else:
            self._take(x)
        return self

    def look(self, x: Tensor) -> None:
        """Take embeddings (B, h, w, D) that `update` gets as well into the choice of the axes.

        For a source that can be read twice: a random sample stands for it better than what comes
        first. `end_look` chooses.
        """
        self._begin(x)
        if self.needs_axes:
            self._looked = self._looked or PrincipalAxes()
            self._looked.update(self._counted(x))

    def end_look(self) -> None:
        """Choose the principal axes, if `look` has seen anything for them."""
        if self._looked is not None:
            self.projection = self._looked.leading(self._n_features)
            self._looked = None

    @property
    def needs_axes(self) -> bool:
        """Whether embeddings wait for axes."""
        return self._reduces and self.projection is None

    def _begin(self, x: Tensor) -> None:
        """Look at embeddings as they come."""
        if x.ndim != 4:
            raise ValueError(
                f"NPad.fit: embeddings must have shape (B, h, w, D), got {tuple(x.shape)}"
            )
        grid, channels = (x.shape[1], x.shape[2]), x.shape[3]
        if self._grid is not None:
            if (grid, channels) != (self._grid, self._n_channels):
                raise ValueError(
                    f"NPad.fit: embeddings must be {self._grid} with {self._n_channels} channels as "
                    f"before, got {grid} with {channels}"
                )
            return
        self._grid, self._n_channels = grid, channels
        if self._reduces and self.settings.reduction == "random":
            generator = torch.Generator().manual_seed(self.settings.seed)
            axes = random_axes(channels, self._n_features, generator)
            self.projection = axes.contiguous().to(x.device)  # as it is read from a file

    @property
    def _n_features(self) -> int:
        """Dimensions of the embeddings of which something is learned."""
        return min(self.settings.fixed_features or self._n_channels, self._n_channels)

    @property
    def _reduces(self) -> bool:
        """Whether embeddings are reduced as they come."""
        return self._n_features < self._n_channels

    def _counted(self, x: Tensor) -> Tensor:
        """Embeddings of what is looked at."""
        return x if self.roi is None else x[is_known(x)]

    def _end_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and self.needs_axes:
            self.projection = principal_axes(map(self._counted, waiting), self._n_features)
        for x in waiting:
            self._take(x)

    def _take(self, x: Tensor) -> None:
        """Reduce, hold out a share, fit the rest."""
        with devices.plain(x.device):
            x = reduce(x, self.projection)
        if self._gaussian is None and self.member.gaussian:
            self._gaussian = self._new_gaussian(x)
            self._set_region()
        if not self._judges_nominal:
            self._cover(x)
        fitted = self._held_out.take(x)
        if len(fitted):
            self._add(fitted)

    def _add(self, x: Tensor) -> None:
        """Fit what is held out no longer, or never was."""
        if self._gaussian is not None:
            self._gaussian.update(x, self._known(x))
        if self._judges_nominal:
            self._cover(x)

    def _cover(self, x: Tensor) -> None:
        if self._nominal is not None:
            known, nominal = self._known(x), x[..., : self.member.prefix]
            self._nominal.update(nominal if known is None else nominal[known])

    def _known(self, x: Tensor) -> Tensor | None:
        """(B, h, w) bool, where embeddings count; None: everywhere."""
        return None if self.roi is None else is_known(x)

    def _new_gaussian(self, x: Tensor) -> NeighborhoodGaussian:
        grid, channels = (x.shape[1], x.shape[2]), x.shape[3]
        window = self.settings.windows[-1]
        return NeighborhoodGaussian(grid, channels, window=window, device=x.device)

    def _set_region(self) -> None:
        """Tell the Gaussians where they can be known."""
        if self._gaussian is not None and self.roi is not None:
            extent = self.extent or (self.roi.shape[0], self.roi.shape[1])
            region = covered(self.roi[None] != 0, self._gaussian.grid, extent).flatten()
            self._gaussian.region = region.to(self._gaussian.mean.device)

    @property
    def _chooses(self) -> bool:
        """Whether the Gaussians are chosen on images held out."""
        return _chooses(self.settings, self.member)

    @property
    def _judges_nominal(self) -> bool:
        """Whether the nominal set is measured on images held out."""
        return self.settings.fusion == "sum"

    # ----------------------------------------------------------------------------------------------
    # Other fits.

    def merge(self, other: MemberFit) -> None:
        """Add what another fit of the same member and settings has seen; that one stays.

        The Gaussians are those of one fit of all images, up to float32 rounding; both nominal sets are
        composed (see `npad.statistics.nominal_set.NominalSet`).

        Raises
        ------
        ValueError
            Another grid or channels, or other axes; with principal axes, `other` must have chosen none,
            or these same ones.
        """
        if other._grid is None:
            return
        self.check_merge(other)
        if self._grid is None:
            vars(self).update(vars(other._copied()), settings=self.settings)
            return
        self.projection = other.projection if self.projection is None else self.projection
        if other._gaussian is not None:
            if self._gaussian is None:
                self._gaussian = other._gaussian.copy()
            else:
                self._gaussian.merge(other._gaussian)
        if self._nominal is not None and other._nominal is not None:
            self._nominal.merge(other._nominal)
        self._held_out.merge(other._held_out, self._add)
        self.n_images += other.n_images
        self._waiting += other._waiting
        if not self.needs_axes or self.n_images >= AXES_IMAGES:
            self._end_waiting()

    def follow(self, learned: LearnedMember) -> None:
        """Take over what another fit has chosen, window, eps and number of axes, and choose nothing.

        The unit of a distance depends on all three: only so do the distances of both compare.
        """
        self._like = learned

    def compose(self) -> None:
        """Let the nominal set choose from what it has."""
        self._end_waiting()
        if self._nominal is not None:
            self._nominal.compose()

    def check_merge(self, other: MemberFit) -> None:
        """Raise what `merge` does."""
        if self._grid is None or other._grid is None:
            return
        shapes = [(fit._grid, fit._n_channels) for fit in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "NPad.merge: grid and channels are {} here and {} in other".format(*shapes)
            )
        axes = [fit.projection for fit in (self, other) if fit.projection is not None]
        if len(axes) == 2 and not torch.equal(*axes):
            raise ValueError(
                "NPad.merge: the fits have chosen different principal axes; fit with n_features='auto' "
                "or None, or with reduction='random', whose axes are the same for all"
            )

    # ----------------------------------------------------------------------------------------------
    # The end.

    def end(self, *, last: bool = False) -> tuple[LearnedMember, dict[str, Tensor] | None]:
        """Make of it all what a model keeps. The fit can go on afterwards, unless this is the `last`.

        Parameters
        ----------
        last : whether the fit is used up; else a copy of the Gaussians takes the images held out

        Returns
        -------
        learned : what a model keeps
        distances : for the fusion "sum", those of the images held out to what was fitted before them,
            by their names, NaN where an image does not count; else None

        Raises
        ------
        ValueError
            Too few images, or identical ones; a covariance that is not positive definite with this eps.
        MemoryError
            As for `update`.
        """
        if not last:
            return self._for_the_end().end(last=True)
        found = self._end_holdout()
        return self._finalize(), found

    def _for_the_end(self) -> MemberFit:
        """What may be used up in the place of this fit; of a bank there is never a second."""
        if self._waiting:
            return self._copied()  # nothing is fitted yet
        if self._held_out.kept:
            self._leave_enough()
        if self._judges_nominal:
            self._centroids()
        end = copy.copy(self)
        end._held_out = self._held_out.copy()
        if end._held_out.kept and self._gaussian is not None:
            devices.require(
                self._gaussian.scatter.nbytes,
                self._gaussian.scatter.device,
                "NPad.fit",
                "a copy of the statistics of one layer, which stay as they are,",
                "fit all images at once with statistics=False, which needs none",
            )
            end._gaussian = self._gaussian.copy()
        if self._judges_nominal and self._nominal is not None:
            end._nominal = self._nominal.copy()
        return end

    def _copied(self) -> MemberFit:
        """One that goes on by itself."""
        other = copy.copy(self)
        other._waiting = list(self._waiting)
        for name, part in self._parts().items():
            setattr(other, f"_{name}", part.copy())
        return other

    def _finalize(self) -> LearnedMember:
        """Once `_end_holdout` has been called."""
        if self._gaussian is not None and not self._gaussian.varies:
            raise self._alike()
        self._choose_axes_at_the_end()
        mean, factor = self._gaussians()
        axes = self._axes
        centroids = self._centroids()
        assert self._grid is not None
        return LearnedMember(
            member=self.member,
            channels=self._n_channels,
            grid=self._grid,
            eps=self._eps if self._gaussian is not None else None,
            window=None if self._gaussian is None else self._gaussian.window,
            n_features=None if axes is None else axes.shape[1],
            radius=self._radius,
            borrowed=0 if self._gaussian is None else self._gaussian.borrowed,
            projection=axes,
            mean=mean,
            factor=factor,
            centroids=centroids,
        )

    def _alike(self) -> ValueError:
        return ValueError(
            f"NPad.fit: the {self.n_images} images are identical, or differ by nothing but "
            "rounding, so that no spread can be learned; fit images of different parts"
        )

    def _end_holdout(self) -> dict[str, Tensor] | None:
        """Choose window and eps on the images held out, which are then fitted; distances as `end`."""
        self._end_waiting()
        if not self._held_out.kept:
            return None
        self._leave_enough()
        x = torch.stack(self._held_out.kept)
        self._choose_axes_at_the_end()
        if self._gaussian is not None and self._like is not None:
            assert self._like.window is not None
            self._gaussian.window, self._eps = self._like.window, self._like.eps
        elif self._gaussian is not None and self._chooses:
            eps = None if self.settings.eps == "auto" else float(self.settings.eps)
            reduced = reduce(x, self._gaussian.axes)
            _, self._eps = self._gaussian.choose(reduced, self.settings.windows, eps)
        found = self._distances(x) if self._judges_nominal else None
        self._held_out.kept.clear()
        self._add(x)
        return found

    def _distances(self, x: Tensor) -> dict[str, Tensor]:
        """To what has been fitted so far."""
        mean, factor = self._gaussians()
        window, prefix = self.settings.score_window, self.member.prefix
        if self._gaussian is not None:
            x = reduce(x, self._gaussian.axes)
        if self.roi is None:
            return distances(x, mean, factor, self._centroids(), window, prefix)
        found = distances(x.nan_to_num(0.0), mean, factor, self._centroids(), window, prefix)
        return {kind: d.masked_fill(~is_known(x), torch.nan) for kind, d in found.items()}

    @property
    def _uses_held_out(self) -> bool:
        """Whether anything is learned of the images held out before they are fitted."""
        return holds_out(self.settings, self.member)

    def _leave_enough(self) -> None:
        """Give back to the fit what it needs of a few images that have nearly all been held out."""
        window = max(self.settings.windows)
        kept, needed = self._held_out.kept, least_images(window) if self.member.gaussian else 1
        while len(kept) > 1 and self.n_images - len(kept) < needed:
            self._add(kept.pop()[None])
        if self.n_images - len(kept) < needed:
            what = "eps='auto'" if self.settings.eps == "auto" else "fusion='sum'"
            raise ValueError(
                f"NPad.fit: {self.n_images} images are too few for window=1 with {what}, which holds "
                f"one of them out; fit {needed + 1} or more, or use window=3"
            )

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
                if self.settings.eps != "auto":
                    raise
                self._eps = error.enough  # it was chosen on a sample of positions

    @property
    def _reduces_at_the_end(self) -> bool:
        """Whether the Gaussians, who share the embedding with no one, may be given fewer dimensions."""
        return self.settings.reduces_gaussians and not self.member.nominal_set

    def _choose_axes_at_the_end(self) -> None:
        """Those of what the Gaussians have seen so far, for what they give."""
        if self._gaussian is not None and self._reduces_at_the_end:
            covariance = self._gaussian.covariance()
            if self._like is None:
                self._gaussian.axes = leading_axes(covariance, KEPT_VARIANCE, MOST_FEATURES)
            else:
                n = self._like.n_features
                self._gaussian.axes = None if n is None else leading_axes(covariance, 1.0, n)

    @property
    def _axes(self) -> Tensor | None:
        """To which a model reduces embeddings."""
        at_the_end = None if self._gaussian is None else self._gaussian.axes
        return self.projection if at_the_end is None else at_the_end

    def _centroids(self) -> Tensor | None:
        if self._nominal is None:
            return None
        n = self.settings.n_centroids
        with self._task("fit: nominal set", n if n >= 1 else None, "centroids") as advance:
            return self._nominal.finalize(advance).centroids_

    @property
    def _radius(self) -> float | None:
        """Of the centroids."""
        radius = math.nan if self._nominal is None else self._nominal.radius_
        return None if math.isnan(radius) else radius

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
        """As JSON types and tensors, which are the fit's own."""
        values: dict[str, Any] = {
            "member": self.member.to_json(),
            "n_images": self.n_images,
            "grid": self._grid,
            "n_channels": self._n_channels,
            "waiting": [len(x) for x in self._waiting],
            "projection": self.projection is not None,
        }
        tensors = {f"waiting.{i}": x for i, x in enumerate(self._waiting)}
        if self.projection is not None:
            tensors["projection"] = self.projection
        for name, part in self._parts().items():
            values[name], found = part.state()
            tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
        return values, tensors

    @classmethod
    def from_state(
        cls,
        settings: Settings,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        roi: Tensor | None = None,
        extent: tuple[int, int] | None = None,
    ) -> MemberFit:
        """What `state` was taken from, in a fit of this region; the tensors become its own."""
        fit = cls._of(settings, values, roi, extent)
        fit.projection = tensors.get("projection")
        fit._waiting = [tensors[f"waiting.{i}"] for i in range(len(values["waiting"]))]
        if "gaussian" in values:
            fit._gaussian = NeighborhoodGaussian(fit._grid or (0, 0), 0)
        for name, part in fit._parts().items():
            part.restore(values[name], under(name, tensors))
        fit._set_region()
        return fit

    @classmethod
    def _of(
        cls,
        settings: Settings,
        values: Mapping[str, Any],
        roi: Tensor | None = None,
        extent: tuple[int, int] | None = None,
    ) -> MemberFit:
        """One that has seen what these of a `state` say, without its statistics."""
        fit = cls(settings, Member.of(values["member"]), roi, extent)
        fit.n_images = int(values["n_images"])
        if values["grid"] is not None:
            height, width = values["grid"]
            fit._grid = int(height), int(width)
        fit._n_channels = int(values["n_channels"])
        return fit

    @classmethod
    def expected(cls, settings: Settings, values: Mapping[str, Any]) -> Expected:
        """Dtype and shape of each tensor of a `state`, by its values."""
        fit = cls._of(settings, values)
        grid, channels, reduced = fit._grid or (0, 0), fit._n_channels, fit._n_features
        found: Expected = {
            f"waiting.{i}": (torch.float32, (int(n), *grid, channels))
            for i, n in enumerate(values["waiting"])
        }
        if values["projection"]:
            found["projection"] = torch.float32, (channels, reduced)
        parts = {"held_out": Reservoir.expected(values["held_out"], (*grid, reduced))}
        if "gaussian" in values:
            parts["gaussian"] = NeighborhoodGaussian.expected(grid, reduced)
        if fit._nominal is not None:
            prefix = fit.member.prefix or reduced
            parts["nominal"] = NominalSet.expected(values["nominal"], prefix)
        for name, part in parts.items():
            found |= {f"{name}.{key}": what for key, what in part.items()}
        return found

    def _parts(self) -> dict[str, Reservoir | NeighborhoodGaussian | NominalSet]:
        parts = {
            "held_out": self._held_out,
            "gaussian": self._gaussian,
            "nominal": self._nominal,
        }
        return {name: part for name, part in parts.items() if part is not None}


def holds_out(settings: Settings, member: Member) -> bool:
    """Whether a member learns anything of images held out before they are fitted."""
    return settings.fusion == "sum" or _chooses(settings, member)


def _chooses(settings: Settings, member: Member) -> bool:
    return member.gaussian and (settings.eps == "auto" or len(settings.windows) > 1)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with a prefix and a dot, without both."""
    start = f"{prefix}."
    return {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}
