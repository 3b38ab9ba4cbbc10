"""What `npad plan` does and shows."""

from __future__ import annotations

import json
from pathlib import Path

from npad.cli.program import with_options
from npad.detector import NPad
from npad.devices import shown_size
from npad.images import ImageSource
from npad.images.folders import find_images
from npad.plan import Plan, alternatives
from npad.settings import NATIVE

__all__ = ["plan_of", "print_json", "print_plan", "short_of"]


def plan_of(model: NPad, folder: Path | None, n_images: int | None, statistics: bool) -> Plan:
    """The plan of a fit of a folder's images, or of a number of them, or of any number.

    Raises
    ------
    ImageError
        The folder holds no images.
    ValueError
        Arguments that do not go together.
    BackboneError
        An unknown backbone.
    """
    if folder is None:
        if model.image_size == NATIVE:
            raise ValueError("image_size='native' is the size of the images; give a folder of them")
        return model.plan(n_images, statistics=statistics)
    images = find_images(folder)
    # Nothing is read but a header.
    source = ImageSource(images, image_size=(1, 1), masks=model.rois)
    size = source.size_of_first()
    if size is None and model.image_size == NATIVE:
        raise ValueError(
            "image_size='native' is that of the first image, which cannot be read: give a size"
        )
    return model.plan(source.n_images, source_size=size, statistics=statistics)


def print_plan(plan: Plan) -> None:
    """Print tables for people, and what fits instead where this does not."""
    print(plan)
    if not plan.fits:
        found = [with_options(str(one)) for one in alternatives(plan)]
        print(
            "\n".join(["", "what fits:", *found]) if found else "\nnothing that npad knows of fits"
        )


def print_json(plan: Plan) -> None:
    """Print all that is known of it, in bytes."""
    found = [] if plan.fits else [one.to_json() for one in alternatives(plan)]
    print(json.dumps(plan.to_json() | {"alternatives": found}, indent=1))


def short_of(plan: Plan) -> None:
    """Raise where it does not fit.

    Raises
    ------
    MemoryError
        What is needed and what is free.
    """
    if not plan.fits and plan.free is not None:
        needed = max(plan.fit_peak, plan.predict_peak)
        raise MemoryError(
            f"the plan does not fit: {shown_size(needed)} are needed, {shown_size(plan.free)} are free "
            f"on {plan.device}"
        )
