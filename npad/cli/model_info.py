"""What a model file says of itself, without its backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from npad.learned import Learned
from npad.model_file import ModelFileError, read_model
from npad.old_models import upgraded
from npad.settings import Settings

__all__ = ["model_info"]


def model_info(path: Path) -> dict[str, Any]:
    """Facts about a model, as JSON types.

    Raises
    ------
    ModelFileError
        The file cannot be read, or is no model.
    """
    try:
        header, tensors = upgraded(*read_model(path, progress=False))
        settings = Settings(**header["settings"])
        learned = Learned.of(header).having(tensors)
        backbones = [str(one["name"]) for one in header["backbones"]]
    except (KeyError, TypeError) as error:
        raise ModelFileError(
            path, f"has a header that this npad cannot use ({error}); fit and save the model again"
        ) from error
    calibration = None if learned.calibration is None else str(learned.calibration)
    inside = None if learned.roi is None else round(float(learned.roi.float().mean()), 4)
    return {
        "npad_version": header["npad_version"],
        "backbones": backbones,
        "image_size": list(settings.size),
        "tile": None if settings.tile is None else list(settings.tile),
        "overlap": settings.overlap,
        "n_images": learned.n_images,
        "bytes": learned.nbytes,
        "calibration": calibration,
        "share of the image that is looked at": inside,
        "rois": settings.rois,
        "members": [str(member) for member in learned.members],
        "positions with too few images": sum(member.borrowed for member in learned.members),
    }
