"""What a fit settles before its first image, and tells after its last."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from npad.features.backbone import Backbone
from npad.features.tiling import Core, Tiling, with_overlap
from npad.fitting import Embed
from npad.images import ImageSource, Reading
from npad.images.alignment import Aligner
from npad.images.depth import Range, least_depth
from npad.images.roi import RegionsOfInterest, region_of_model
from npad.members import Member
from npad.networks import grid_of
from npad.scoring.pipeline import embedder
from npad.scoring.scorer import embeddings
from npad.settings import NATIVE, Settings

__all__ = [
    "check_features",
    "embed_members",
    "native",
    "open_images",
    "regions_to_fit",
    "sized",
    "tell_of_depth",
    "tell_of_sizes",
    "tell_of_tiles",
]

_HIGH_COST: Final = 8  # of tiles: how often the networks see a pixel


def native(
    settings: Settings,
    source: Any,
    call: str,
    *,
    skip_bad: bool = False,
    masks: str | None = None,
) -> Settings:
    """These, with the size of the first image of a source, where they ask for it.

    Parameters
    ----------
    masks : pattern of the names of masks among the images
    """
    if settings.image_size != NATIVE:
        return settings
    images = None
    if source is not None:
        reading = Reading(settings.bit_depth, settings.max_pixels)
        images = ImageSource(
            source, image_size=(1, 1), skip_bad=skip_bad, reading=reading, masks=masks
        )
    size = None if images is None else images.size_of_first()
    if size is None:
        of_stream = images is None or not images.random_access
        reason = "that of a stream is not known before" if of_stream else "it cannot be read"
        raise ValueError(
            f"{call}: image_size='native' is the size of the first image, but {reason}; give "
            "(height, width)"
        )
    return replace(settings, image_size=size)


def sized(settings: Settings, networks: Sequence[Backbone]) -> Settings:
    """These, with the networks' own size of images where none is given."""
    if settings.image_size is not None:
        return with_overlap(settings, networks)
    sizes = {network.name: network.default_size for network in networks}
    if len(set(sizes.values())) > 1:
        own = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
        raise ValueError(
            f"NPad: by default the backbones see images of different sizes ({own}); give one "
            "image_size that all of them take"
        )
    return with_overlap(replace(settings, image_size=sizes[networks[0].name]), networks)


def check_features(settings: Settings, networks: Sequence[Backbone]) -> None:
    """Raise a ValueError where more features are asked for than a network gives."""
    n = settings.fixed_features
    for network in networks:
        if n is not None and n > network.channels:
            raise ValueError(
                f"NPad: n_features={n} is more than the {network.channels} channels of "
                f"{network.name}; give at most that, or None"
            )


def embed_members(
    networks: Sequence[Backbone],
    tiling: Tiling,
    device: torch.device,
    members: Sequence[Member],
    cores: Sequence[Core] | None = None,
) -> Embed:
    """What members of a fit are given of images, or of some cores of them."""
    combine = partial(embeddings, members, networks)
    return embedder(networks, tiling, combine, device, "NPad.fit", cores)


def open_images(
    source: Any,
    settings: Settings,
    device: torch.device,
    skip_bad: bool,
    *,
    fitted: Range | None = None,
    keep_pixels: bool = False,
    regions: RegionsOfInterest | None = None,
    aligner: Aligner | None = None,
) -> ImageSource:
    """A source as a model of these settings takes it; arguments as those of `ImageSource`."""
    return ImageSource(
        source,
        image_size=settings.size,
        batch_size=settings.images_at_once,
        skip_bad=skip_bad,
        page_locked=device.type == "cuda",
        reading=Reading(settings.bit_depth, settings.max_pixels),
        fitted=fitted,
        keep_pixels=keep_pixels,
        regions=regions,
        aligner=aligner,
    )


def regions_to_fit(
    settings: Settings,
    members: Sequence[Member],
    networks: Sequence[Backbone],
    tiling: Tiling,
    rois: Sequence[Any] | None,
) -> RegionsOfInterest | None:
    """The regions of a fit, where there are such."""
    own = settings.rois if rois is None else rois
    if own is None and settings.roi is None:
        return None
    if settings.align is not None:
        raise ValueError(
            "NPad.fit: align and a region of interest exclude each other: a region is that of an image "
            "as it comes; leave out align, or rois"
        )
    region, drawn_at = region_of_model(settings.roi, settings.size, settings.max_pixels)
    grids = [grid_of(member, networks[member.network], tiling) for member in members]
    return RegionsOfInterest(
        region,
        own,
        grids=grids,
        extent=tiling.extent,
        drawn_at=drawn_at,
        max_pixels=settings.max_pixels,
    )


def tell_of_sizes(call: str, images: ImageSource, n_images: int) -> None:
    """Warn where images are resized that were thought to keep their size."""
    if images.other_sizes:
        name, (height, width) = images.other_sizes[min(images.other_sizes)]
        own = "{} x {}".format(*images.image_size)
        warnings.warn(
            f"{call}: {len(images.other_sizes)} of {n_images} images have another size than the "
            f"first, {own}, and were resized to it: {name} has {height} x {width}; fit images of one "
            "size, or give image_size",
            stacklevel=3,
        )


def tell_of_tiles(tiling: Tiling, asked: tuple[int, int] | None, used: Settings) -> None:
    """Warn where tiles are larger than asked for, or most of the work is done again and again."""
    if asked != used.tile:
        warnings.warn(
            f"NPad.fit: tiles of {asked} are too small for what the backbone sees, so they are "
            f"{used.tile} and overlap by {used.overlap} pixels; give a smaller overlap to have smaller "
            "ones, with which maps depend on where a tile ends",
            stacklevel=3,
        )
    if tiling.cost > _HIGH_COST:
        warnings.warn(
            f"NPad.fit: tiles of {tiling.tile} that overlap by {tiling.overlap} pixels go over a pixel "
            f"{tiling.cost:.0f} times: give a larger tile; or a smaller overlap, with which maps "
            "depend on where a tile ends",
            stacklevel=3,
        )


def tell_of_depth(images: ImageSource, settings: Settings) -> None:
    """Warn where most images do not use the upper of 16 bits, and nobody has said why."""
    deep = sorted(images.undeclared.values())
    if settings.bit_depth is not None or not deep:
        return
    largest = deep[len(deep) // 2]  # in a few a pixel may be broken, or a file strayed
    depth = least_depth(largest)
    if depth is None:
        return
    usual = [value for value in deep if value < 2**depth]
    who = "no image uses" if usual == deep else f"{len(usual)} of {len(deep)} images do not use"
    warnings.warn(
        f"NPad.fit: {who} the upper of its 16 bits, the largest value is {usual[-1]}: read as "
        f"fractions of 65535 they are almost black; if the camera fills {depth} bits, fit with "
        f"bit_depth={depth}",
        stacklevel=3,
    )
