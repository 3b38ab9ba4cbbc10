"""An image in an open file, before it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from npad.images.orientation import TURNS_AXES
from npad.images.samples import Array, Samples

__all__ = ["Stored"]


@dataclass(frozen=True, eq=False)
class Stored:
    """What the header of a file says, and how to get at the pixels while the file is open.

    Attributes
    ----------
    size : (height, width), as it is stored
    decode : gives the samples as they are stored: not turned
    orientation : 1 to 8, as in EXIF
    n_pages : images in the file, of which this is the first
    alpha : gives what the samples lack of alpha, (height, width) uint8; None where there is none
    reduced : as `decode`, at a fraction of the size that is twice the given (height, width) or more;
        None where the format cannot
    is_jpeg : values are near those that were saved, even where the image is flat
    """

    size: tuple[int, int]
    decode: Callable[[], Samples]
    orientation: int = 1
    n_pages: int = 1
    alpha: Callable[[], Array] | None = None
    reduced: Callable[[tuple[int, int]], Samples] | None = None
    is_jpeg: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the image as it is meant to be seen."""
        return self.size[::-1] if self.orientation in TURNS_AXES else self.size
