"""Fitting: from defect-free images to what a model keeps of them, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor

from npad import devices, progress
from npad.images.alignment import Aligner
from npad.images.depth import least_depth
from npad.images.fingerprints import fingerprints
from npad.images.source import Batch, ImageSource
from npad.images.template import n_template_images, nominal_aligner
from npad.learned import Expected, Learned, Standardization
from npad.member_fit import AXES_IMAGES, MemberFit, under
from npad.members import Member
from npad.roi import blanked, covered, marked, mean_color, nearest_covered, spread
from npad.scoring.fusion import joined
from npad.settings import OF_A_FIT, Settings

__all__ = [
    "AXES_IMAGES",
    "MIN_IMAGES",
    "Embed",
    "Fit",
    "axes_sample",
    "fit_images",
    "tell_of_borrowed",
]

MIN_IMAGES: Final = 2

Embed = Callable[[Tensor], Sequence[Tensor]]


class Fit:
    """Statistics of nominal images, in memory that does not grow with their number.

    Parameters
    ----------
    settings : how to fit
    members : of the model
    roi : (H, W) uint8, the region of interest at the model's size, on the CPU; None: the whole image
    extent : pixels (height, width) that the grids cover; None: those of the region

    Attributes
    ----------
    n_images : images so far
    darkest : the largest value, 0 to 1, that each of them reaches; of embeddings it is not known
    undeclared : how many of them have 16 bits and do not say how many of these the camera fills, and
        the largest value of these
    fingerprints : of each image, in their order; of embeddings there are none
    template : (3, H, W) float32, to which ``align`` registers all images; None before it is made
    n_template : of how many images it is the median
    members : a `MemberFit` for each
    fill : (3,) float32, what the backbone sees outside of regions; None until `choose_fill`, or where
        there are none
    """

    def __init__(
        self,
        settings: Settings,
        members: Sequence[Member],
        roi: Tensor | None = None,
        extent: tuple[int, int] | None = None,
    ) -> None:
        self.settings = settings
        self.n_images = 0
        self.darkest = 1.0
        self.fingerprints: list[str] = []
        self.undeclared = 0, 0
        self.roi = roi
        self.extent = extent
        self.fill: Tensor | None = None
        self.template: Tensor | None = None
        self.n_template: int | None = None
        self.members = [MemberFit(settings, member, roi, extent) for member in members]

    def update(
        self,
        embeddings: Sequence[Tensor],
        images: Tensor | None = None,
        undeclared: Collection[int] = (),
    ) -> Fit:
        """Add a batch.

        Parameters
        ----------
        embeddings : for each member, (B, h, w, D) float32, as the backbone gives them, or as `embed`
            does where there is a region, on the device where the statistics are to be
        images : (B, 3, H, W) float32 in [0, 1], from which they are, if these are known; with a fourth
            channel as in `npad.images.Batch`
        undeclared : the largest value, as it is stored, of each image of 16 bits that does not say how
            many of them the camera fills

        Returns
        -------
        self

        Raises
        ------
        ValueError
            As `MemberFit.update`.
        MemoryError
            As `MemberFit.update`.
        """
        for member, x in zip(self.members, embeddings, strict=True):
            member.update(x)
        n = len(embeddings[0])
        self.n_images += n
        if n:
            self.darkest = min(self.darkest, 0.0 if images is None else _darkest(images[:, :3]))
        if images is not None:
            self.fingerprints += fingerprints(images[:, :3])
        n_undeclared, largest = self.undeclared
        self.undeclared = n_undeclared + len(undeclared), max([largest, *undeclared])
        return self

    def choose_fill(self, batches: Iterable[Tensor]) -> None:
        """Choose, by images that `update` gets as well, what the backbone sees outside of regions."""
        assert self.roi is not None
        self.fill = mean_color(batches, self.roi)

    def embed(self, embed: Embed, images: Tensor) -> Sequence[Tensor]:
        """Embeddings of images for each member, NaN at positions that their region does not cover.

        Parameters
        ----------
        embed : images (B, 3, H, W) -> for each member, embeddings (B, h, w, D)
        images : as for `update`; where no `choose_fill` came before, these choose
        """
        if self.roi is None:
            return embed(images)
        if self.fill is None:
            self.choose_fill([images])
        assert self.fill is not None
        images, inside = blanked(images, self.roi, self.fill)
        inside = self.roi[None] != 0 if inside is None else inside
        extent = self.extent or (self.roi.shape[0], self.roi.shape[1])
        return [
            marked(x, covered(inside, (x.shape[1], x.shape[2]), extent).to(x.device))
            for x in embed(images)
        ]

    def choose_axes(self, sample: Iterable[Sequence[Tensor]]) -> None:
        """Choose the principal axes now, by embeddings that `update` gets as well.

        For a source that can be read twice: a random sample stands for it better than what comes
        first.
        """
        for embeddings in sample:
            for member, x in zip(self.members, embeddings, strict=True):
                member.look(x)
        for member in self.members:
            member.end_look()

    def compose(self) -> None:
        """Let the nominal sets choose from what they have, once, and not whenever it is merged."""
        for member in self.members:
            member.compose()

    @property
    def needs_axes(self) -> bool:
        """Whether axes can still be chosen before the first image."""
        chosen = any(member.projection is not None for member in self.members)
        return self.settings.chooses_axes and self.n_images == 0 and not chosen

    @property
    def needs_fill(self) -> bool:
        """Whether what stands outside of regions is still to be chosen."""
        return self.roi is not None and self.fill is None

    def looks_where(self, other: Fit) -> bool:
        """Whether both have one region of interest, or none."""
        return _same(self.roi, other.roi)

    def merge(self, other: Fit) -> Fit:
        """Add what another fit of the same settings and members has seen; that one stays.

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
                "NPad.merge: a fit cannot be merged with itself: its images would count twice"
            )
        differences = self.settings.differences(other.settings, OF_A_FIT)
        if differences:
            raise ValueError(
                f"NPad.merge: the fits have different settings: {'; '.join(differences)}; merge fits "
                "of the same"
            )
        if not self.looks_where(other):
            raise ValueError(
                "NPad.merge: the fits have different regions of interest; merge fits of the same"
            )
        either = self.fill is None or other.fill is None  # has seen no image
        if not (either or _same(self.fill, other.fill)):
            raise ValueError(
                "NPad.merge: the fits see different colours outside of their region of interest, each "
                "the mean of its own images, so that their embeddings do not compare; add the other "
                "images with partial_fit, which keeps the colour"
            )
        if [fit.member for fit in other.members] != [fit.member for fit in self.members]:
            raise ValueError("NPad.merge: the fits have different members; merge fits of the same")
        if not _same(self.template, other.template):
            raise ValueError(
                "NPad.merge: the fits register images to templates of their own, so that a position is "
                "not the same place; fit one of them further with the images of the other"
            )
        pairs = list(zip(self.members, other.members, strict=True))
        for own, others in pairs:
            own.check_merge(others)
        for own, others in pairs:
            own.merge(others)
        self.n_images += other.n_images
        self.darkest = min(self.darkest, other.darkest)
        self.fingerprints += other.fingerprints
        (n, largest), (others_n, others_largest) = self.undeclared, other.undeclared
        self.undeclared = n + others_n, max(largest, others_largest)
        self.fill = other.fill if self.fill is None else self.fill
        return self

    def check_number(self) -> None:
        """Raise a ValueError if the images so far are too few for a model."""
        if self.n_images < MIN_IMAGES:
            raise ValueError(
                f"NPad.fit: {self.n_images} image(s) given; at least {MIN_IMAGES} defect-free images "
                "are needed, and some tens are recommended"
            )

    def finalize(self, *, last: bool = False) -> Learned:
        """Make of it all what a model keeps. The fit can go on afterwards, unless this is the `last`.

        Parameters
        ----------
        last : whether the fit is used up, so that no Gaussians are copied and each goes when it is done

        Raises
        ------
        ValueError
            Too few images, or as `MemberFit.end`.
        MemoryError
            As for `update`.
        """
        self.check_number()
        members, held_out = [], []
        left = self.members if last else [*self.members]
        while left:
            learned, distances = left.pop(0).end(last=last)
            members.append(learned)
            if distances is not None:
                held_out.append((learned.member, distances))
        return Learned(
            n_images=self.n_images,
            members=tuple(members),
            darkest=self.darkest,
            n_bits=self._n_bits,
            filled=True,
            fingerprints=tuple(self.fingerprints),
            n_template=self.n_template,
            template=self.template,
            standardization=_standardization(held_out, inside=self.roi is not None),
            roi_color=None if self.fill is None else _three(self.fill),
            roi=None if self.fill is None else self.roi,
        )

    @property
    def _n_bits(self) -> int | None:
        """Bits that the images use, where they are fewer than those that they are read as."""
        n, largest = self.undeclared
        known = self.settings.bit_depth is not None or n < self.n_images
        return None if known else least_depth(largest)

    def copied(self, device: torch.device, **changed: Any) -> Fit:
        """One that goes on by itself, on a device.

        Parameters
        ----------
        device : where its statistics live
        changed : as for `from_state`

        Raises
        ------
        MemoryError
            There is no place for two.
        """
        values, tensors = self.state()
        devices.require(
            sum(tensor.nbytes for tensor in tensors.values()),
            device,
            "NPad",
            "a copy of the statistics, so that an error leaves the model as it was,",
            "fit all images at once, which needs none",
        )
        own = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        return self.from_state(values, own, **changed)

    def to(self, device: torch.device) -> Fit:
        """Give this one, or a copy if its statistics live elsewhere."""
        found = (tensor for member in self.members for tensor in member.state()[1].values())
        return self if all(tensor.device == device for tensor in found) else self.copied(device)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the fit is, as JSON types and tensors; `npad.model_file.write_model` takes both.

        The tensors are the fit's own: write or copy them before the fit goes on.
        """
        states = [member.state() for member in self.members]
        values = {
            "settings": self.settings.to_json(),
            "n_images": self.n_images,
            "darkest": self.darkest,
            "fingerprints": [*self.fingerprints],
            "undeclared": [*self.undeclared],
            "roi": self.roi is not None,
            "extent": self.extent,
            "fill": None if self.fill is None else _three(self.fill),
            "n_template": self.n_template,
            "members": [values for values, _ in states],
        }
        tensors = {
            f"{i}.{name}": x for i, (_, found) in enumerate(states) for name, x in found.items()
        }
        if self.roi is not None:
            tensors["roi"] = self.roi
        if self.template is not None:
            tensors["template"] = self.template
        return values, tensors

    @classmethod
    def expected(cls, values: Mapping[str, Any]) -> Expected:
        """Dtype and shape of each tensor of a `state`, by its values.

        Raises
        ------
        KeyError
            These are not the values of a state.
        TypeError
            As KeyError.
        ValueError
            As KeyError.
        """
        settings = Settings(**values["settings"])
        found: Expected = {
            f"{i}.{name}": what
            for i, member in enumerate(values["members"])
            for name, what in MemberFit.expected(settings, member).items()
        }
        if values["roi"]:
            found["roi"] = torch.uint8, settings.size
        if values.get("n_template") is not None:
            found["template"] = torch.float32, (3, *settings.size)
        return found

    @classmethod
    def from_state(
        cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor], **changed: Any
    ) -> Fit:
        """Go on where `state` was taken: the result is that of a fit that never stopped.

        Parameters
        ----------
        values, tensors : from `state`; the tensors, which are those that are `expected`, become those
            of this fit, and its statistics live where they do
        changed : arguments of `Settings` in the place of those of the state, of which what was gathered
            does not depend

        Raises
        ------
        KeyError
            These are not the values of a state.
        TypeError
            As KeyError.
        ValueError
            As KeyError.
        """
        fit = cls(Settings(**{**values["settings"], **changed}), ())
        fit._take_region(values, tensors)
        fit.n_images = int(values["n_images"])
        if fit.n_images < 0:
            raise ValueError(f"n_images is {fit.n_images}")
        fit.darkest = float(values["darkest"])
        fit.fingerprints = [*map(str, values["fingerprints"])]
        n, largest = map(int, values["undeclared"])
        fit.undeclared = n, largest
        if fit.n_images and fit.needs_fill:
            raise ValueError("fill is None")
        if values.get("n_template") is not None:
            fit.n_template, fit.template = int(values["n_template"]), tensors["template"]
        fit.members = [
            MemberFit.from_state(fit.settings, member, under(str(i), tensors), fit.roi, fit.extent)
            for i, member in enumerate(values["members"])
        ]
        return fit

    def _take_region(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Look where the fit did whose state this is."""
        if not values["roi"]:
            return
        self.roi = tensors["roi"].cpu()
        if not bool(self.roi.any()):
            raise ValueError("roi is empty")
        if values["extent"] is not None:
            height, width = map(int, values["extent"])
            if height < self.roi.shape[0] or width < self.roi.shape[1]:
                raise ValueError(f"extent is {values['extent']!r}")
            self.extent = height, width
        if values["fill"] is not None:
            fill = torch.tensor(values["fill"], dtype=torch.float32, device="cpu")
            if fill.shape != (3,) or not bool(((fill >= 0) & (fill <= 1)).all()):
                raise ValueError(f"fill is {values['fill']!r}")
            self.fill = fill


def random_images(n_images: int, n: int, seed: int) -> list[int]:
    """Indices, in order, of at most n images of a source."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n_images, generator=generator, device="cpu")[:n].tolist())


def axes_sample(n_images: int, seed: int) -> list[int]:
    """Indices, in order, of the images of a source that choose its axes."""
    return random_images(n_images, AXES_IMAGES, seed)


def fit_images(
    fit: Fit,
    embed: Embed,
    images: ImageSource,
    start: int = 0,
    after: Callable[[Fit, int], None] | None = None,
    also: Callable[[Sequence[Tensor], Tensor], None] | None = None,
) -> None:
    """One pass over the images, and a look at some of them before, where something is to be chosen.

    Parameters
    ----------
    fit : which gets them
    embed : images (B, 3, H, W) -> for each member, embeddings (B, h, w, D)
    images : where they come from
    start : position of the first that is not fitted yet
    after : called, once all is chosen and after each batch, with the position of the next image
    also : gets each batch after the fit has: embeddings, as `Fit.embed` gives them, and images
    """
    n_images = images.n_images if images.random_access else None
    if fit.settings.align is not None:
        images.aligner = _aligner(fit, images, n_images)
    if n_images is not None:
        sample = axes_sample(n_images, fit.settings.seed)
        if fit.needs_fill:
            with closing(images.batches(sample)) as batches:
                fit.choose_fill(batch.images for batch in batches)
        if fit.needs_axes:
            with closing(images.batches(sample)) as batches:
                fit.choose_axes(fit.embed(embed, batch.images) for batch in batches)
    if after is not None:
        after(fit, start)
    left = None if n_images is None else range(start, n_images)
    with (
        closing(_batches(fit, images, left)) as batches,
        progress.task(
            "fit: embeddings", images.n_images, fit.settings.progress, "images"
        ) as advance,
    ):
        advance(start)
        for batch in batches:
            undeclared = [images.undeclared[i] for i in batch.indices if i in images.undeclared]
            embeddings = fit.embed(embed, batch.images)
            if fit.template is not None:  # where the statistics are
                fit.template = fit.template.to(embeddings[0].device)
            fit.update(embeddings, batch.images, undeclared)
            if also is not None:
                also(embeddings, batch.images)
            advance(len(batch.images))
            position = batch.indices[-1] + 1
            del batch, embeddings  # which may go before the next are there
            if after is not None:
                after(fit, position)


def tell_of_borrowed(learned: Learned, call: str) -> None:
    """Warn where positions have too few images of their own."""
    for member in learned.members:
        if member.borrowed:
            height, width = member.grid
            warnings.warn(
                f"{call}: at {member.borrowed} of {height * width} positions of the {height} x "
                f"{width} grid too few images are looked at for their own window: they have a wider "
                "one; give larger regions of interest, or more images that show these places",
                stacklevel=3,
            )


def _aligner(fit: Fit, images: ImageSource, n_images: int | None) -> Aligner | None:
    """For the template of a fit, which is made of a random sample; None for a stream without one."""
    assert fit.settings.align is not None
    if fit.template is not None:
        return Aligner(fit.template, fit.settings.align)
    if n_images is None:
        return None
    n = n_template_images(fit.settings.size)
    with closing(images.batches(random_images(n_images, n, fit.settings.seed))) as batches:
        return _new_aligner(fit, list(batches), images.workers)


def _new_aligner(fit: Fit, batches: Sequence[Batch], workers: int) -> Aligner:
    """Make the template of a fit."""
    assert fit.settings.align is not None
    samples = [pair for b in batches for pair in zip(b.images, b.sizes, strict=True)]
    if not samples:
        raise ValueError(
            "NPad.fit: none of the images for the template could be read; look at them"
        )
    aligner = nominal_aligner(samples, fit.settings.align, workers)
    fit.template, fit.n_template = torch.from_numpy(aligner.template), aligner.n_images
    return aligner


def _batches(fit: Fit, images: ImageSource, left: Sequence[int] | None) -> Generator[Batch]:
    """Of the images left; those of a stream are registered here, to a template of the first of them."""
    with closing(images.batches(left)) as batches:
        if fit.settings.align is None or images.aligner is not None:
            yield from batches
            return
        first: list[Batch] = []
        for batch in batches:
            first.append(batch)
            if sum(len(b.images) for b in first) >= n_template_images(fit.settings.size):
                break
        if first:  # the source itself, which has loaded ahead, has no aligner
            aligner = _new_aligner(fit, first, images.workers)
            for batch in chain(first, batches):
                yield images.registered(batch, aligner)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b.to(a.device))


def _standardization(
    held_out: Sequence[tuple[Member, Mapping[str, Tensor]]], *, inside: bool
) -> dict[str, Standardization] | None:
    """Of the distances of the images held out; all members have held out the same.

    Parameters
    ----------
    inside : whether there is a region, where the distances are NaN outside
    """
    if not held_out:
        return None
    if inside:
        moments = _moments_inside(held_out)
    else:
        moments = {kind: Standardization.of(x) for kind, x in joined(held_out).items()}
    if not all(of_kind.std > 0 for of_kind in moments.values()):
        raise ValueError(
            "NPad.fit: fusion='sum' divides by the spread of both distances of the images held out, "
            "and there is none: the images are identical; fit images of different parts, or use "
            "fusion='product'"
        )
    return moments


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


def _three(color: Tensor) -> tuple[float, float, float]:
    red, green, blue = color.tolist()
    return red, green, blue


def _darkest(images: Tensor) -> float:
    """The largest value of the image where it is least."""
    return float(images.flatten(1).amax(1).min())
