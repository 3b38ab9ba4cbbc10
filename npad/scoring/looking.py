"""Where a model looks: its region of interest, as the scorer applies it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from npad.roi import blanked, covered, nearest_covered, spread

__all__ = ["Looking"]


class Looking(nn.Module):
    """What a region of interest does to images before a backbone, and to distances after it.

    Parameters
    ----------
    roi : (H, W) uint8
    fill : R, G, B that stand outside
    grids : (h, w) of the distances
    extent : pixels (height, width) that these cover
    """

    roi: Tensor
    fill: Tensor

    def __init__(
        self,
        roi: Tensor,
        fill: tuple[float, float, float],
        grids: Iterable[tuple[int, int]],
        extent: tuple[int, int],
    ) -> None:
        super().__init__()
        self.grids = sorted(set(grids))
        self.extent = extent
        self.register_buffer("roi", roi)
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.float32, device=roi.device))
        self._find_nearest()

    def _find_nearest(self) -> None:
        """Of the region that it has now."""
        for grid in self.grids:
            nearest = nearest_covered(covered(self.roi[None] != 0, grid, self.extent))
            self.register_buffer(_name(grid), nearest, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images as the backbone sees them, and the own regions of those that have such.

        Takes and gives what `npad.roi.blanked` does.
        """
        return blanked(images, self.roi, self.fill)

    def inside(self, own: Tensor | None) -> Tensor:
        """(B, H, W) bool, or (1, H, W) where images have no regions of their own."""
        return self.roi[None] != 0 if own is None else own

    def spread(self, distance: Tensor, own: Tensor | None) -> Tensor:
        """Distances (B, h, w), outside those of the nearest covered position.

        So no smoothing mixes what is outside into what is inside, nor darkens its border.
        """
        grid = distance.shape[1], distance.shape[2]
        if own is None:
            return spread(distance, getattr(self, _name(grid)))
        return spread(distance, nearest_covered(covered(own, grid, self.extent)))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load into tensors of its own, as they may be in use elsewhere."""
        self.roi, self.fill = self.roi.clone(), self.fill.clone()
        super()._load_from_state_dict(*arguments)
        self._find_nearest()


def _name(grid: tuple[int, int]) -> str:
    return "nearest_{}_{}".format(*grid)
