"""Fitting: from defect-free images to what a model keeps of them, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import tee
from typing import Any, Final

import torch
from torch import Tensor

from npad import progress
from npad.images.depth import least_depth
from npad.images.fingerprints import fingerprints
from npad.images.source import ImageSource
from npad.learned import Learned, Standardization
from npad.member_fit import AXES_IMAGES, MemberFit, under
from npad.members import Member
from npad.roi import blanked, covered, marked, mean_color, nearest_covered, spread
from npad.scoring.fusion import joined
from npad.settings import Settings

__all__ = ["AXES_IMAGES", "MIN_IMAGES", "Fit", "axes_sample", "fit_images"]

MIN_IMAGES: Final = 2

Embed = Callable[[Tensor], Sequence[Tensor]]


class Fit:
    """Statistics of nominal images, in memory that does not grow with their number.

    Parameters
    ----------
    settings : how to fit
    members : of the model
    embed : images (B, 3, H, W) float32 in [0, 1] -> for each member, embeddings (B, h, w, D), whose
        device is that of all statistics; not needed where only embeddings are given
    roi : (H, W) uint8, the region of interest at the model's size, on the CPU; None: the whole image
    extent : pixels (height, width) that the grids cover; None: those of the region

    Attributes
    ----------
    n_images : images so far
    darkest : the largest value, 0 to 1, that each of them reaches; of embeddings it is not known
    fingerprints : of each image, in their order; of embeddings there are none
    members : a `MemberFit` for each
    fill : (3,) float32, what the backbone sees outside of regions; None until `choose_fill`, or where
        there are none
    """

    def __init__(
        self,
        settings: Settings,
        members: Sequence[Member],
        embed: Embed | None = None,
        roi: Tensor | None = None,
        extent: tuple[int, int] | None = None,
    ) -> None:
        self.settings = settings
        self.n_images = 0
        self.darkest = 1.0
        self.fingerprints: list[str] = []
        self.roi = roi
        self.extent = extent
        self.fill: Tensor | None = None
        self.members = [MemberFit(settings, member, roi, extent) for member in members]
        self._embed = embed
        self._standardization: dict[str, Standardization] | None = None

    def update(
        self, images: Tensor | None = None, *, embeddings: Sequence[Tensor] | None = None
    ) -> Fit:
        """Add a batch, as images or as embeddings.

        Parameters
        ----------
        images : (B, 3, H, W) float32 in [0, 1]; with a fourth channel as in `npad.images.Batch`
        embeddings : for each member, (B, h, w, D) float32, as the backbone gives them, or as `embed`
            does where there is a region

        Returns
        -------
        self

        Raises
        ------
        TypeError
            Neither images nor embeddings, or both; images without a way to embed them.
        ValueError
            As `MemberFit.update`.
        MemoryError
            As `MemberFit.update`.
        """
        if (images is None) == (embeddings is None):
            raise TypeError("Fit.update: give images or embeddings, one of them")
        if embeddings is None:
            if self._embed is None:
                raise TypeError("Fit.update: this fit was made without embed=; give embeddings=")
            assert images is not None
            embeddings = self.embed(images)
        for member, x in zip(self.members, embeddings, strict=True):
            member.update(x)
        n = len(embeddings[0])
        self.n_images += n
        if n:
            self.darkest = min(self.darkest, 0.0 if images is None else _darkest(images[:, :3]))
        if images is not None:
            self.fingerprints += fingerprints(images[:, :3])
        return self

    def choose_fill(self, batches: Iterable[Tensor]) -> None:
        """Choose, by images that `update` gets as well, what the backbone sees outside of regions."""
        assert self.roi is not None
        self.fill = mean_color(batches, self.roi)

    def embed(self, images: Tensor) -> Sequence[Tensor]:
        """Embeddings of images for each member, NaN at positions that their region does not cover."""
        assert self._embed is not None
        if self.roi is None:
            return self._embed(images)
        if self.fill is None:
            self.choose_fill([images])
        assert self.fill is not None
        images, inside = blanked(images, self.roi, self.fill)
        inside = self.roi[None] != 0 if inside is None else inside
        extent = self.extent or (self.roi.shape[0], self.roi.shape[1])
        return [
            marked(x, covered(inside, (x.shape[1], x.shape[2]), extent).to(x.device))
            for x in self._embed(images)
        ]

    def choose_axes(self, sample: Iterable[Sequence[Tensor]]) -> None:
        """Choose the principal axes now, by embeddings that `update` gets as well.

        For a source that can be read twice: a random sample stands for it better than what comes
        first.
        """
        copies = tee(sample, len(self.members))
        for i, (member, copy) in enumerate(zip(self.members, copies, strict=True)):
            member.choose_axes(embeddings[i] for embeddings in copy)

    def merge(self, other: Fit) -> Fit:
        """Add what another fit of the same settings and members has seen; that one is used up.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            This same fit, other settings or members, or what `MemberFit.merge` refuses; nothing has
            changed then.
        """
        if other is self:
            raise ValueError(
                "Fit.merge: a fit cannot be merged with itself: its images would count twice"
            )
        if other.settings.to_json() != self.settings.to_json():
            raise ValueError("Fit.merge: the fits have different settings; merge fits of the same")
        either = self.fill is None or other.fill is None  # has seen no image
        if not _equal(self.roi, other.roi) or not (either or _equal(self.fill, other.fill)):
            raise ValueError(
                "Fit.merge: the fits have different regions of interest, or fill what is outside with "
                "different colours; give the second the roi and the fill of the first"
            )
        if [fit.member for fit in other.members] != [fit.member for fit in self.members]:
            raise ValueError("Fit.merge: the fits have different members; merge fits of the same")
        pairs = list(zip(self.members, other.members, strict=True))
        for own, others in pairs:
            own.check_merge(others)
        for own, others in pairs:
            own.merge(others)
        self.n_images += other.n_images
        self.darkest = min(self.darkest, other.darkest)
        self.fingerprints += other.fingerprints
        self._standardization = self._standardization or other._standardization
        self.fill = other.fill if self.fill is None else self.fill
        return self

    def finalize(self) -> Learned:
        """Make of it all what a model keeps. The fit can go on afterwards.

        Raises
        ------
        ValueError
            Too few images, or as `MemberFit.finalize`.
        MemoryError
            As for `update`.
        """
        if self.n_images < MIN_IMAGES:
            raise ValueError(
                f"NPad.fit: {self.n_images} image(s) given; at least {MIN_IMAGES} defect-free images "
                "are needed, and some tens are recommended"
            )
        self._end_holdout()
        return Learned(
            n_images=self.n_images,
            members=tuple(member.finalize() for member in self.members),
            darkest=self.darkest,
            filled=True,
            fingerprints=tuple(self.fingerprints),
            standardization=self._standardization,
            roi_color=None if self.fill is None else _three(self.fill),
            roi=None if self.fill is None else self.roi,
        )

    def _end_holdout(self) -> None:
        """Fit the images held out, once they have served; all Gaussians have held out the same."""
        found = [(member.member, member.end_holdout()) for member in self.members]
        known = [(member, distances) for member, distances in found if distances is not None]
        if not known:
            return
        if self.roi is None:
            moments = {kind: Standardization.of(x) for kind, x in joined(known).items()}
        else:
            moments = _moments_inside(known)
        if not all(of_kind.std > 0 for of_kind in moments.values()):
            raise ValueError(
                "NPad.fit: fusion='sum' divides by the spread of both distances of the images held "
                "out, and there is none: the images are identical; fit images of different parts, or "
                "use fusion='product'"
            )
        self._standardization = moments

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the fit is, as JSON types and tensors; `npad.model_file.write_model` takes both.

        The tensors are the fit's own: write or copy them before the fit goes on.
        """
        states = [member.state() for member in self.members]
        values = {
            "settings": self.settings.to_json(),
            "n_images": self.n_images,
            "darkest": self.darkest,
            "fingerprints": self.fingerprints,
            "fill": None if self.fill is None else _three(self.fill),
            "extent": self.extent,
            "standardization": Standardization.to_json(self._standardization),
            "members": [values for values, _ in states],
        }
        tensors = {
            f"{i}.{name}": x for i, (_, found) in enumerate(states) for name, x in found.items()
        }
        if self.roi is not None:
            tensors["roi"] = self.roi
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
        extent = None if values["extent"] is None else _two(values["extent"])
        fit = cls(Settings(**values["settings"]), (), embed, tensors.get("roi"), extent)
        if values["fill"] is not None:
            fit.fill = torch.tensor(values["fill"], dtype=torch.float32, device="cpu")
        fit.n_images = int(values["n_images"])
        fit.darkest = float(values["darkest"])
        fit.fingerprints = [*values["fingerprints"]]
        fit._standardization = Standardization.from_json(values["standardization"])
        fit.members = [
            MemberFit.from_state(fit.settings, member, under(str(i), tensors), fit.roi, extent)
            for i, member in enumerate(values["members"])
        ]
        return fit


def axes_sample(n_images: int, seed: int) -> list[int]:
    """Indices, in order, of the images of a source that choose its axes."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(
        torch.randperm(n_images, generator=generator, device="cpu")[:AXES_IMAGES].tolist()
    )


def fit_images(
    settings: Settings, members: Sequence[Member], embed: Embed, images: ImageSource
) -> Learned:
    """One pass over the images, and a look at some of them before, where something is to be chosen."""
    rois = images.regions
    fit = Fit(settings, members, embed, *((rois.roi, rois.extent) if rois else ()))
    if images.random_access and images.n_images is not None:
        sample = axes_sample(images.n_images, settings.seed)
        if fit.roi is not None:
            with closing(images.batches(sample)) as batches:
                fit.choose_fill(batch.images for batch in batches)
        if settings.chooses_axes:
            with closing(images.batches(sample)) as batches:
                fit.choose_axes(fit.embed(batch.images) for batch in batches)
    with (
        closing(images.batches()) as batches,
        progress.task("fit: embeddings", images.n_images, settings.progress, "images") as advance,
    ):
        for batch in batches:
            fit.update(batch.images)
            advance(len(batch.images))
    learned = fit.finalize()
    _tell_of_borrowed(learned)
    if settings.bit_depth is not None or len(images.undeclared) < learned.n_images:
        return learned
    return replace(learned, n_bits=least_depth(max(images.undeclared.values())))


def _tell_of_borrowed(learned: Learned) -> None:
    """Warn where positions have too few images of their own."""
    for member in learned.members:
        if member.borrowed:
            height, width = member.grid
            warnings.warn(
                f"NPad.fit: at {member.borrowed} of {height * width} positions of the {height} x "
                f"{width} grid too few images are looked at for their own window: they have a wider "
                "one; give larger regions of interest, or more images that show these places",
                stacklevel=4,
            )


def _moments_inside(
    found: Sequence[tuple[Member, Mapping[str, Tensor]]],
) -> dict[str, Standardization]:
    """Moments of distances that are NaN where an image does not count, as scoring joins them."""
    inside = {tuple(d.shape[1:]): ~d.isnan() for _, distances in found for d in distances.values()}
    whole = [
        (
            member,
            {
                kind: spread(d.nan_to_num(0.0), nearest_covered(~d.isnan()))
                for kind, d in distances.items()
            },
        )
        for member, distances in found
    ]
    return {
        kind: Standardization.of(x[inside[tuple(x.shape[1:])]]) for kind, x in joined(whole).items()
    }


def _two(sides: Sequence[int]) -> tuple[int, int]:
    height, width = map(int, sides)
    return height, width


def _three(color: Tensor) -> tuple[float, float, float]:
    red, green, blue = color.tolist()
    return red, green, blue


def _equal(own: Tensor | None, others: Tensor | None) -> bool:
    if own is None or others is None:
        return own is others
    return torch.equal(own, others)


def _darkest(images: Tensor) -> float:
    """The largest value of the image where it is least."""
    return float(images.flatten(1).amax(1).min())
