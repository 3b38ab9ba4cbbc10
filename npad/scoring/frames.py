"""Anomaly maps of images that were registered to a template, back in the images' own frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from npad import devices
from npad.images.alignment import Motion

__all__ = ["in_own_frames"]


def in_own_frames(maps: Tensor, motions: Sequence[Motion | None]) -> Tensor:
    """Maps in the template's frame -> each in that of its image, bilinearly.

    What of an image lies outside the template's frame was not scored: the map goes on there as it is
    at the edge of the frame.

    Parameters
    ----------
    maps : (B, H, W) float32
    motions : of each image, from the template to the image; None where the image was left as it came

    Returns
    -------
    (B, H, W) float32; the maps of images that did not move are the same to the bit
    """
    moved = [i for i, motion in enumerate(motions) if motion is not None]
    if not moved:
        return maps
    with devices.plain(maps.device):
        places = _places([m for m in motions if m is not None], maps)
        back = F.grid_sample(
            maps[moved][:, None],
            places,
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        out = maps.clone()
        out[moved] = back[:, 0]
    return out


def _places(motions: Sequence[Motion], maps: Tensor) -> Tensor:
    """(n, H, W, 2): where in the template's frame, from -1 to 1, each pixel of an image lies."""
    backwards = [m.inverse for m in motions]
    rows = [[*m.turn.ravel().tolist(), 2 * m.dx, 2 * m.dy] for m in backwards]
    # Sums and products one by one: a GPU may shorten the numbers of a product of matrices.
    xx, xy, yx, yy, dx, dy = (
        torch.tensor(column, dtype=torch.float32, device="cpu")
        .to(maps.device, non_blocking=True)
        .reshape(-1, 1, 1)
        for column in zip(*rows, strict=True)
    )
    y, x = (
        (2 * torch.arange(n, dtype=torch.float32, device=maps.device) + 1) / n - 1
        for n in maps.shape[1:]
    )
    y = y[:, None]
    return torch.stack([xx * x + xy * y + dx, yx * x + yy * y + dy], dim=3)
