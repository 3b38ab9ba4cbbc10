"""Bits that a camera fills of 16, as far as images show it."""

from __future__ import annotations

from npad.images.errors import ImageError

__all__ = ["check_bits", "check_depth", "least_depth"]

# Of cameras that write into 16 bits.
BIT_DEPTHS = (8, 10, 12, 14)


def check_depth(brightest: int, name: str, bit_depth: int | None, darkest: float) -> None:
    """Refuse an image of 16-bit values that belong to another bit depth than those of a model.

    It is far darker than all images fitted, and as bright as they are when read at another depth.

    Parameters
    ----------
    brightest : the image's largest value
    name : of the image
    bit_depth : of the model; None is 16
    darkest : as for `ImageSource`

    Raises
    ------
    ImageError
        The image is of another depth.
    """
    white = 2 ** (bit_depth or 16) - 1
    if 3 * brightest >= darkest * white:
        return
    for depth in BIT_DEPTHS:
        other = 2**depth - 1
        if other < white and darkest / 2 * other <= brightest <= other:
            raise ImageError(
                name,
                f"its largest value is {brightest}: it seems to hold {depth} bits, but is read as "
                f"{bit_depth or 16} bits, at which every image fitted reaches "
                f"{round(darkest * white)}; save it as those were, or fit with bit_depth={depth}",
            )


def check_bits(brightest: float, name: str, n_bits: int) -> None:
    """Refuse an image that no camera gives which gave those of a model.

    Parameters
    ----------
    brightest : the image's largest value, 0 to 1
    name : of the image
    n_bits : that the images of the model use of 16

    Raises
    ------
    ImageError
        The image is brighter.
    """
    if brightest * 65535 > 2**n_bits:
        raise ImageError(
            name,
            f"it is brighter than the images fitted can be, which use {n_bits} of the 16 bits as "
            f"which they are read: fit with bit_depth={n_bits}, or 16 if the camera fills them",
        )


def least_depth(brightest: int) -> int | None:
    """The least usual depth at which a camera gives this value; None where it fills all 16 bits."""
    return next((depth for depth in BIT_DEPTHS if brightest < 2**depth), None)
