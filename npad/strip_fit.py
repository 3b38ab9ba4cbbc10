"""Fitting large images strip by strip, where the statistics of all positions do not fit into memory.

The images are gone over several times. First the nominal set is filled as ever; of all embeddings the
axes are learned, and of each position its variance. Then the statistics of a sample of positions, on
which window and eps are chosen. Then, in these axes, those of one strip of the grid after the other, of
which the Gaussians are made before the next is begun. Strips follow each other along the longer side.

The choices are those of a fit that has all statistics at once, and so is the model, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from npad import devices, progress
from npad.features.projection import leading_axes
from npad.features.tiling import Core, Tiling
from npad.fitting import Embed, Fit, fit_images
from npad.images.source import ImageSource
from npad.learned import LearnedMember
from npad.member_fit import MemberFit, holds_out
from npad.members import Member
from npad.scoring.scorer import reduce
from npad.settings import KEPT_VARIANCE, MOST_FEATURES, Settings
from npad.statistics.choice import choose, sampled, varied
from npad.statistics.gaussian import NeighborhoodGaussian, SmallEpsError, least_images
from npad.statistics.holdout import Reservoir
from npad.statistics.strips import Overview, Patches, StripGaussians

__all__ = ["fit_in_strips"]

EmbedMembers = Callable[[Sequence[Member], Sequence[Core] | None], Embed]


def fit_in_strips(
    fit: Fit, embed: EmbedMembers, images: ImageSource, tiling: Tiling, n_strips: int
) -> None:
    """Fit images, so that `Fit.finalize` makes a model of them; it can only be the last.

    Parameters
    ----------
    fit : which has seen none, with settings that `may_be_in_strips`
    embed : members, and the cores of tiles or None for all -> what embeds images for these
    images : with random access
    tiling : how the networks see them
    n_strips : at most `Tiling.most_strips`

    Raises
    ------
    ValueError
        Images that are other ones when they are read again; as `fit_images` and `MemberFit.end`.
    """
    assert images.n_images is not None
    members = [one.member for one in fit.members]
    fits = [StripFit(fit.settings, m, images.n_images, tiling) for m in members if m.gaussian]
    in_strips = iter(fits)
    fit.members = [next(in_strips) if m.member.gaussian else m for m in fit.members]
    fit_images(fit, embed(members, None), images)
    fit.check_number()
    fit.compose()  # so that the bank makes room
    for one in fits:
        one.end_overview()
    choosing = [one for one in fits if one.chooses]
    if choosing:
        embed_choosing = embed([one.member for one in choosing], None)
        _go_over(images, fit, embed_choosing, [one.sample for one in choosing], "window and eps")
        for one in choosing:
            one.choose()
    strips = tiling.strips(n_strips)
    embeds = [embed([one.member for one in fits], cores) for cores in strips]
    while True:
        try:
            for i, (cores, of_strip) in enumerate(zip(strips, embeds, strict=True), 1):
                for one in fits:
                    one.begin_strip(cores)
                what = f"strip {i} of {n_strips}"
                _go_over(images, fit, of_strip, [one.add for one in fits], what)
                for one in fits:
                    one.end_strip()
            return
        except SmallEpsError:  # eps was chosen on a sample of positions
            if fit.settings.eps != "auto":
                raise
            for one in fits:
                one.begin_again()


def _go_over(
    images: ImageSource,
    fit: Fit,
    embed: Embed,
    take: Sequence[Callable[[Tensor, int], None]],
    what: str,
) -> None:
    """Give each member its embeddings of all images, and how many images were before."""
    done = 0
    with (
        closing(images.batches()) as batches,
        progress.task(f"fit: {what}", fit.n_images, fit.settings.progress, "images") as advance,
    ):
        for batch in batches:
            for take_member, x in zip(take, embed(batch.images), strict=True):
                take_member(x, done)
            done += len(batch.images)
            advance(len(batch.images))
    if done != fit.n_images:
        raise ValueError(
            f"NPad.fit: of {fit.n_images} images {done} can be read by now: leave them as they are "
            "while a fit goes over them"
        )


class StripFit(MemberFit):
    """Statistics of a member that has Gaussians alone, of a strip at a time.

    Parameters
    ----------
    settings, member : as for `MemberFit`
    n_images : images to come, if all can be read
    tiling : how the networks see them
    """

    def __init__(self, settings: Settings, member: Member, n_images: int, tiling: Tiling) -> None:
        super().__init__(settings, member)
        self._tiling = tiling
        self._held_places = _held_places(settings, member, n_images)
        self._overview = Overview()
        self._moments: tuple[NeighborhoodGaussian, ...] = ()  # of images fitted, and held out
        self._first_axes: Tensor | None = None  # without the images held out
        self._last_axes: Tensor | None = None
        self._patches: Patches | None = None
        self._x: list[Tensor] = []  # (M, S, D), of those held out
        self._window = settings.windows[-1]
        self._device = torch.device("cpu")
        self._strips: StripGaussians | None = None

    # ----------------------------------------------------------------------------------------------
    # An overview.

    def _take(self, x: Tensor) -> None:
        with devices.plain(x.device):
            x = reduce(x, self.projection)
        self._device = x.device
        held = self._is_held(len(x), self.n_images - len(x)).to(x.device)
        self._overview.update(x[~held])
        if self.settings.reduces_gaussians:
            everywhere = [x[~held], x[held]]
            if not self._moments:
                one = (1, 1), x.shape[3]
                self._moments = tuple(
                    NeighborhoodGaussian(*one, device=x.device) for _ in everywhere
                )
            for moments, part in zip(self._moments, everywhere, strict=True):
                if len(part):
                    moments.update(part.reshape(-1, 1, 1, x.shape[3]))

    def end_overview(self) -> None:
        """Choose axes, and the positions on which window and eps are chosen."""
        if self._overview.n_images > 1 and not self._overview.varies:
            raise self._alike()
        if self.settings.reduces_gaussians:
            fitted, held_out = self._moments
            self._first_axes = _axes(fitted)
            self._last_axes = _axes(fitted.merge(held_out))
        if self.chooses:
            assert self._grid is not None
            n = self._dimensions(self._first_axes)
            places = sampled(varied(self._overview.variance), n)
            most = max(self.settings.windows)
            self._patches = Patches(places, self._grid, most, n, self._device)
        self._overview = Overview()  # whose means are as large as an image's embeddings

    def _dimensions(self, axes: Tensor | None) -> int:
        return self._n_features if axes is None else axes.shape[1]

    def _is_held(self, n: int, first: int) -> Tensor:
        """(n,) bool, which of the images from the first are held out."""
        return torch.tensor([first + i in self._held_places for i in range(n)], device="cpu")

    # ----------------------------------------------------------------------------------------------
    # A sample.

    @property
    def chooses(self) -> bool:
        """Whether window or eps are to be chosen."""
        return self._chooses

    def sample(self, x: Tensor, first: int) -> None:
        """Take embeddings (B, h, w, D) of the images from the first into the choice."""
        assert self._patches is not None
        with devices.plain(x.device):
            x = reduce(x.flatten(1, 2)[:, self._patches.places], self.projection)
            x = reduce(x, self._first_axes)
        held = self._is_held(len(x), first).to(x.device)
        if not bool(held.all()):
            self._patches.update(x[~held])
        self._x.append(x[held][:, self._patches.middles.to(x.device)])

    def choose(self) -> None:
        """Choose window and eps, by what `sample` has taken."""
        assert self._patches is not None
        windows = self.settings.windows
        if self.n_images - len(self._held_places) < 2:
            windows = tuple(window for window in windows if window > 1) or windows
        eps = None if self.settings.eps == "auto" else float(self.settings.eps)
        x = torch.cat(self._x)
        self._window, self._eps = choose(self._patches.of_window, x, windows, eps)
        self._patches, self._x = None, []

    # ----------------------------------------------------------------------------------------------
    # Strips.

    def begin_strip(self, cores: Sequence[Core]) -> None:
        """Go on with what these cores cover."""
        assert self._grid is not None
        axis = self._tiling.long_axis
        if self._strips is None:
            grid = self._grid if axis == 0 else (self._grid[1], self._grid[0])
            self._strips = StripGaussians(
                grid,
                self._window,
                self._dimensions(self._last_axes),
                self._factor_dtype,
                self._device,
                transposed=axis == 1,
            )
        stride = self._tiling.stride_of(self._grid)[axis]
        self._strips.begin((cores[-1].last[axis] - cores[0].first[axis]) // stride)

    def add(self, x: Tensor, first: int) -> None:
        """Add embeddings (B, h, w, D) of the strip; every image counts."""
        assert self._strips is not None
        with devices.plain(x.device):
            x = reduce(reduce(x, self.projection), self._last_axes)
        self._strips.update(x if self._tiling.long_axis == 0 else x.transpose(1, 2))

    def end_strip(self) -> None:
        """Make the Gaussians of the strip.

        Raises
        ------
        SmallEpsError
            One cannot be factored with this eps; `begin_again` then takes a larger one.
        """
        assert self._strips is not None
        try:
            self._strips.end(self._eps or 0.0)
        except SmallEpsError as error:
            self._eps = error.enough
            raise

    def begin_again(self) -> None:
        """Forget all strips."""
        self._strips = None

    def end(self, *, last: bool = False) -> tuple[LearnedMember, None]:
        """As `MemberFit.end`; it can only be the last."""
        assert last
        assert self._strips is not None
        assert self._grid is not None
        axes = self.projection if self._last_axes is None else self._last_axes
        learned = LearnedMember(
            member=self.member,
            channels=self._n_channels,
            grid=self._grid,
            eps=self._eps,
            window=self._window,
            n_features=None if axes is None else axes.shape[1],
            projection=axes,
            mean=self._strips.mean,
            factor=self._strips.factor,
        )
        return learned, None


def _axes(moments: NeighborhoodGaussian) -> Tensor | None:
    return leading_axes(moments.covariance(), KEPT_VARIANCE, MOST_FEATURES)


def _held_places(settings: Settings, member: Member, n_images: int) -> frozenset[int]:
    """Which images a `MemberFit` would hold out."""
    if not holds_out(settings, member):
        return frozenset()
    reservoir = Reservoir(settings.holdout, settings.seed)
    reservoir.take(torch.arange(n_images, device="cpu")[:, None])
    needed = least_images(max(settings.windows))
    return frozenset(int(place) for place in reservoir.kept[: max(1, n_images - needed)])
