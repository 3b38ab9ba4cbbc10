"""Regions of interest as tensors: which pixels are looked at, and which positions of a grid they cover.

A region is kept at the model's size: one of its pixels is inside where the whole of it is. Nothing
outside reaches the backbone. An image that is made smaller mixes each pixel with those beside it, less
than one pixel of the result away (see `npad.images.scaling`). So a pixel beside one that is outside is
filled as well, see `seen`; it still belongs to the region, and has a place in the map.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = [
    "blanked",
    "covered",
    "is_known",
    "marked",
    "mean_color",
    "nearest_covered",
    "seen",
    "spread",
]

_AT_ONCE = 1 << 24  # numbers that are compared at a time


def seen(inside: Tensor) -> Tensor:
    """Pixels of an image of the model's size that are made of pixels of the region alone.

    Parameters
    ----------
    inside : (B, H, W) bool

    Returns
    -------
    (B, H, W) bool: a pixel and its eight neighbours, as far as there are such, are inside. Holds for
    images of at least the model's size: a smaller one reaches farther.
    """
    outside = (~inside)[:, None].float()
    return F.max_pool2d(outside, 3, stride=1, padding=1)[:, 0] == 0


def blanked(images: Tensor, roi: Tensor, fill: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images as the backbone sees them, and the own regions of those that have such.

    Parameters
    ----------
    images : (B, 3, H, W) float32; or (B, 4, H, W), the fourth channel 1 inside the image's own region
        and 0 outside
    roi : (H, W) uint8, the region of the model
    fill : (3,) float32, what the backbone sees in the place of every other pixel

    Returns
    -------
    images : (B, 3, H, W)
    inside : (B, H, W) bool, both regions; None where there is the model's alone
    """
    inside = _inside(images, roi)
    shown = torch.where(seen(inside)[:, None], images[:, :3], fill[:, None, None])
    return shown, inside if images.shape[1] == 4 else None


def _inside(images: Tensor, roi: Tensor) -> Tensor:
    """(B, H, W) bool, or (1, H, W) of images without regions of their own."""
    inside = roi[None] != 0
    return inside & (images[:, 3] != 0) if images.shape[1] == 4 else inside


def covered(inside: Tensor, grid: tuple[int, int], extent: tuple[int, int]) -> Tensor:
    """Positions of a grid at least half of whose cell lies in the region.

    Parameters
    ----------
    inside : (B, H, W) bool
    grid : (h, w)
    extent : pixels (height, width) that the cells of its positions divide evenly, at least (H, W):
        beyond the image its last row and column go on

    Returns
    -------
    (B, h, w) bool, exact for any size
    """
    share = _summed(inside.double(), grid[1], extent[1])
    share = _summed(share.mT, grid[0], extent[0]).mT  # whole numbers
    return 2 * share >= extent[0] * extent[1]


def _summed(x: Tensor, n: int, extent: int) -> Tensor:
    """Integrals over the n cells of rows (..., size) that go on up to `extent`, each times n.

    As each pixel is constant, the integral up to a cell's end is the sum of the whole pixels before it
    and a part of the one that it cuts.
    """
    ends = torch.arange(n + 1, device=x.device) * extent  # in n-ths of a pixel
    place = (ends // n).clamp(max=x.shape[-1] - 1)  # the last pixel goes on
    before = F.pad(x, (1, 0)).cumsum(-1)
    integral = n * before[..., place] + (ends - n * place) * x[..., place]
    return integral.diff(dim=-1)


def nearest_covered(covered: Tensor) -> Tensor:
    """Of each position, the nearest one that is covered; of several, the first in row order.

    Parameters
    ----------
    covered : (B, h, w) bool, one at least of each image

    Returns
    -------
    (B, P) int64, P = h * w, in row order
    """
    _, height, width = covered.shape
    row, column = (torch.arange(n, device=covered.device) for n in (height, width))
    far = height + width  # farther than any
    # In each row the nearest column, then the best of all rows: squares of distances are sums.
    before = torch.where(covered, column, -far).cummax(2).values
    after = torch.where(covered, column, width + far).flip(2).cummin(2).values.flip(2)
    place = torch.where(column - before <= after - column, before, after)
    squared = (column - place).abs().clamp(max=far).square()
    # By distance, then in row order.
    rank = squared * height * width + row[:, None] * width + place.clamp(0, width - 1)
    down = (row[:, None] - row).square() * height * width
    step = max(1, _AT_ONCE // (len(rank) * height**2))  # columns
    parts = [(some[:, :, None] + down).amin(3) for some in rank.mT.split(step, 1)]
    found = torch.cat(parts, 1).mT
    return (found % (height * width)).flatten(1)


def marked(x: Tensor, covered: Tensor) -> Tensor:
    """Embeddings (B, h, w, C), NaN where their image does not cover (B, h, w) the position.

    So they tell it wherever they go: into a reservoir, through a projection, into a file.

    Raises
    ------
    ValueError
        Some are NaN or infinite already.
    """
    if not bool(x.isfinite().all()):
        raise ValueError(
            "NPad.fit: the backbone gives values that are not finite; a backbone that overflows in "
            "float16 needs backbone_dtype='bfloat16' or 'float32'"
        )
    return x.masked_fill(~covered[..., None], torch.nan)


def is_known(x: Tensor) -> Tensor:
    """Of what `marked` gave, (..., C) -> (...): where the image covers the position."""
    return ~x[..., 0].isnan()


def spread(x: Tensor, nearest: Tensor) -> Tensor:
    """(B, h, w), each position with the value of the one that `nearest_covered` names for it."""
    return x.flatten(1).gather(1, nearest.expand(x.shape[0], -1)).reshape(x.shape)


def mean_color(batches: Iterable[Tensor], roi: Tensor) -> Tensor:
    """The mean of all pixels that are seen, which takes the place of the others.

    Parameters
    ----------
    batches : images as `blanked` takes them
    roi : (H, W) uint8, on the CPU

    Returns
    -------
    (3,) float32; grey where no pixel is seen
    """
    total, count = torch.zeros(3, dtype=torch.float64, device="cpu"), 0
    for images in batches:
        looked_at = seen(_inside(images, roi)).expand(len(images), -1, -1)
        pixels = images[:, :3].movedim(1, 3)[looked_at]
        total += pixels.sum(0, dtype=torch.float64)
        count += len(pixels)
    return (total / count).float() if count else torch.full((3,), 0.5, device="cpu")
