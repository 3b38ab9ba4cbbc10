"""Bits that a camera fills of 16, as far as images show it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from npad.images.errors import ImageError

__all__ = ["Range", "least_depth"]

# Of cameras that write into 16 bits.
BIT_DEPTHS = (8, 10, 12, 14)


@dataclass(frozen=True)
class Range:
    """How far the images of a model fill the values that they are read as.

    Attributes
    ----------
    darkest : float
        The largest value, 0 to 1, that every one of them reaches.
    n_bits : int, optional
        Bits that they use, where they are fewer than the 16 that they are read as.
    """

    darkest: float = 0.0
    n_bits: int | None = None

    def check_dark(self, brightest: int, name: str, bit_depth: int | None) -> None:
        """Refuse an image far darker than all of them, and as bright when read at another depth.

        Parameters
        ----------
        brightest : the image's largest value, of 16 bits of which the file does not say more
        name : of the image
        bit_depth : of the model; None is 16

        Raises
        ------
        ImageError
            The image is of another depth.
        """
        white = 2 ** (bit_depth or 16) - 1
        if 3 * brightest >= self.darkest * white:
            return
        for depth in BIT_DEPTHS:
            other = 2**depth - 1
            if other < white and self.darkest / 2 * other <= brightest <= other:
                raise ImageError(
                    name,
                    f"its largest value is {brightest}: it seems to hold {depth} bits, but is read "
                    f"as {bit_depth or 16} bits, at which every image fitted reaches "
                    f"{round(self.darkest * white)}; save it as those were, or fit with "
                    f"bit_depth={depth}",
                )

    def check_bright(self, image: Tensor, name: str) -> None:
        """Refuse an image brighter than what the camera can give that gave those.

        Parameters
        ----------
        image : values from 0 to 1
        name : of the image

        Raises
        ------
        ImageError
            The image is of another depth.
        """
        if self.n_bits is not None and float(image.max()) * 65535 > 2**self.n_bits:
            raise ImageError(
                name,
                f"it is brighter than the images fitted can be, which use {self.n_bits} of the 16 bits "
                f"as which they are read: fit with bit_depth={self.n_bits}, or 16 if the camera fills "
                "them",
            )


def least_depth(brightest: int) -> int | None:
    """The least usual depth at which a camera gives this value; None where it fills all 16 bits."""
    return next((depth for depth in BIT_DEPTHS if brightest < 2**depth), None)
