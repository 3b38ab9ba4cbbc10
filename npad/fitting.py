"""Fitting: from defect-free images to what a model keeps of them, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Final

import torch
from torch import Tensor

from npad import devices, progress
from npad.images.depth import least_depth
from npad.images.fingerprints import fingerprints
from npad.images.source import ImageSource
from npad.learned import Expected, Learned, Standardization
from npad.member_fit import AXES_IMAGES, MemberFit, under
from npad.members import Member
from npad.scoring.fusion import joined
from npad.settings import OF_A_FIT, Settings

__all__ = ["AXES_IMAGES", "MIN_IMAGES", "Fit", "axes_sample", "fit_images"]

MIN_IMAGES: Final = 2

Embed = Callable[[Tensor], Sequence[Tensor]]


class Fit:
    """Statistics of nominal images, in memory that does not grow with their number.

    Parameters
    ----------
    settings : how to fit
    members : of the model

    Attributes
    ----------
    n_images : images so far
    darkest : the largest value, 0 to 1, that each of them reaches; of embeddings it is not known
    undeclared : how many of them have 16 bits and do not say how many of these the camera fills, and
        the largest value of these
    fingerprints : of each image, in their order; of embeddings there are none
    members : a `MemberFit` for each
    """

    def __init__(self, settings: Settings, members: Sequence[Member]) -> None:
        self.settings = settings
        self.n_images = 0
        self.darkest = 1.0
        self.fingerprints: list[str] = []
        self.undeclared = 0, 0
        self.members = [MemberFit(settings, member) for member in members]

    def update(
        self,
        embeddings: Sequence[Tensor],
        images: Tensor | None = None,
        undeclared: Collection[int] = (),
    ) -> Fit:
        """Add a batch.

        Parameters
        ----------
        embeddings : for each member, (B, h, w, D) float32, as the backbone gives them, on the device
            where the statistics are to be
        images : (B, 3, H, W) float32 in [0, 1], from which they are, if these are known
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
            self.darkest = min(self.darkest, 0.0 if images is None else _darkest(images))
        if images is not None:
            self.fingerprints += fingerprints(images)
        n_undeclared, largest = self.undeclared
        self.undeclared = n_undeclared + len(undeclared), max([largest, *undeclared])
        return self

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
        if [fit.member for fit in other.members] != [fit.member for fit in self.members]:
            raise ValueError("NPad.merge: the fits have different members; merge fits of the same")
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
        return self

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
        if self.n_images < MIN_IMAGES:
            raise ValueError(
                f"NPad.fit: {self.n_images} image(s) given; at least {MIN_IMAGES} defect-free images "
                "are needed, and some tens are recommended"
            )
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
            standardization=_standardization(held_out),
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
        there = all(tensor.device == device for tensor in self.state()[1].values())
        return self if there else self.copied(device)

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
            "members": [values for values, _ in states],
        }
        tensors = {
            f"{i}.{name}": x for i, (_, found) in enumerate(states) for name, x in found.items()
        }
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
        return {
            f"{i}.{name}": what
            for i, member in enumerate(values["members"])
            for name, what in MemberFit.expected(settings, member).items()
        }

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
        fit.n_images = int(values["n_images"])
        if fit.n_images < 0:
            raise ValueError(f"n_images is {fit.n_images}")
        fit.darkest = float(values["darkest"])
        fit.fingerprints = [*map(str, values["fingerprints"])]
        n, largest = map(int, values["undeclared"])
        fit.undeclared = n, largest
        fit.members = [
            MemberFit.from_state(fit.settings, member, under(str(i), tensors))
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
    fit: Fit,
    embed: Embed,
    images: ImageSource,
    start: int = 0,
    after: Callable[[Fit, int], None] | None = None,
    also: Callable[[Sequence[Tensor]], None] | None = None,
) -> None:
    """One pass over the images, and a look at some of them before, where axes are to be chosen.

    Parameters
    ----------
    fit : which gets them
    embed : images (B, 3, H, W) -> for each member, embeddings (B, h, w, D)
    images : where they come from
    start : position of the first that is not fitted yet
    after : called, once axes are chosen and after each batch, with the position of the next image
    also : gets the embeddings of each batch after the fit has
    """
    n_images = images.n_images if images.random_access else None
    if fit.needs_axes and n_images is not None:
        with closing(images.batches(axes_sample(n_images, fit.settings.seed))) as batches:
            fit.choose_axes(embed(batch.images) for batch in batches)
    if after is not None:
        after(fit, start)
    left = None if n_images is None else range(start, n_images)
    with (
        closing(images.batches(left)) as batches,
        progress.task(
            "fit: embeddings", images.n_images, fit.settings.progress, "images"
        ) as advance,
    ):
        advance(start)
        for batch in batches:
            undeclared = [images.undeclared[i] for i in batch.indices if i in images.undeclared]
            embeddings = embed(batch.images)
            fit.update(embeddings, batch.images, undeclared)
            if also is not None:
                also(embeddings)
            advance(len(batch.images))
            position = batch.indices[-1] + 1
            del batch, embeddings  # which may go before the next are there
            if after is not None:
                after(fit, position)


def _standardization(
    held_out: Sequence[tuple[Member, Mapping[str, Tensor]]],
) -> dict[str, Standardization] | None:
    """Of the distances of the images held out; all members have held out the same."""
    if not held_out:
        return None
    moments = {kind: Standardization.of(x) for kind, x in joined(held_out).items()}
    if not all(of_kind.std > 0 for of_kind in moments.values()):
        raise ValueError(
            "NPad.fit: fusion='sum' divides by the spread of both distances of the images held out, "
            "and there is none: the images are identical; fit images of different parts, or use "
            "fusion='product'"
        )
    return moments


def _darkest(images: Tensor) -> float:
    """The largest value of the image where it is least."""
    return float(images.flatten(1).amax(1).min())
