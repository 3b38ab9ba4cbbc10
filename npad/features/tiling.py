"""Large images, tile by tile: what the networks see at once, and where on the grids it belongs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from npad.features.backbone import Backbone, whole_strides
from npad.learned import Learned
from npad.settings import Settings

__all__ = ["Core", "Tiling", "least_overlap", "tiling_of", "with_overlap"]

Size = tuple[int, int]  # (height, width)
Embed = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Core:
    """The part of images for which a tile stands, and no other does.

    Attributes
    ----------
    start : pixel (row, column) at which the tile begins
    first, last : pixels (row, column) at which the core begins, and before which it ends
    """

    start: Size
    first: Size
    last: Size

    def on_grid(self, stride: Size, begin: Size = (0, 0), margin: int = 0) -> tuple[slice, slice]:
        """Rows and columns on a grid that begins at a pixel, and so many more around them."""
        rows, columns = (
            slice(max(0, (a - zero) // step - margin), (b - zero) // step + margin)
            for a, b, zero, step in zip(self.first, self.last, begin, stride, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size, which overlap and together cover images; or one, which is the image.

    Embeddings near the border of a tile lack what is beside it. So a tile gives those of its core
    alone, which ends in the middle of what two tiles share, or at the border of the image.

    Attributes
    ----------
    extent : (height, width) of the images
    tile : (height, width) of each tile
    overlap : pixels, at least, that neighbours share
    cell : pixels, of which all these are multiples, the overlap an even one, so that a core is whole
        positions of every grid
    at_once : tiles that go through the networks together
    """

    extent: Size
    tile: Size
    overlap: int
    cell: int
    at_once: int = 1

    @cached_property
    def cores(self) -> list[list[Core]]:
        """Of all tiles, row by row."""
        rows, columns = (
            _cuts(length, tile, self.overlap, self.cell)
            for length, tile in zip(self.extent, self.tile, strict=True)
        )
        return [
            [Core((y, x), (top, left), (bottom, right)) for x, left, right in columns]
            for y, top, bottom in rows
        ]

    @property
    def is_whole(self) -> bool:
        """Whether the networks see images whole."""
        return self.tile == self.extent

    @property
    def n_tiles(self) -> int:
        """Of an image."""
        return len(self.cores) * len(self.cores[0])

    @property
    def cost(self) -> float:
        """How often the networks see a pixel, on average."""
        return self.n_tiles * math.prod(self.tile) / math.prod(self.extent)

    @property
    def long_axis(self) -> int:
        """0 where there are more rows of tiles than columns, else 1."""
        return 0 if len(self.cores) > len(self.cores[0]) else 1

    @property
    def most_strips(self) -> int:
        """Of a tile across."""
        return max(len(self.cores), len(self.cores[0]))

    def strips(self, n: int) -> list[list[Core]]:
        """The cores of so many strips, one after the other along the long axis."""
        lines = (
            self.cores if self.long_axis == 0 else [list(c) for c in zip(*self.cores, strict=True)]
        )
        bounds = pairwise(i * len(lines) // n for i in range(n + 1))
        strips = (lines[a:b] for a, b in bounds)
        if self.long_axis == 1:  # row by row, as all rectangles
            strips = ([list(c) for c in zip(*strip, strict=True)] for strip in strips)
        return [[core for line in strip for core in line] for strip in strips]

    def at_a_time(self, n_images: int) -> int:
        """Tiles of so many images that go through the networks together."""
        return min(self.n_tiles, self._step(n_images)) * n_images

    def _step(self, n_images: int) -> int:
        """As `at_a_time`, of each of the images, if it has so many."""
        return max(1, self.at_once // max(1, n_images))

    def grid(self, network: Backbone, own_of: int | None = None) -> Size:
        """As `Backbone.grid`, of whole images."""
        grid = network.grid(self.tile, own_of)
        height, width = (
            side * n // tile for side, n, tile in zip(self.extent, grid, self.tile, strict=True)
        )
        return height, width

    def stride_of(self, grid: Size) -> Size:
        """Pixels of a position of a grid of whole images."""
        return self.extent[0] // grid[0], self.extent[1] // grid[1]

    def embedded(
        self, images: Tensor, embed: Embed, cores: Sequence[Core] | None = None
    ) -> Iterator[tuple[Core, list[Tensor]]]:
        """The embeddings of one core after the other, (B, h, w, D), as many as `embed` gives.

        Parameters
        ----------
        images : (B, 3, H, W) of the size `extent`
        embed : tiles (N, 3, h, w) -> embeddings (N, h', w', D)
        cores : which; None: all
        """
        n_images = len(images)
        cores = self._some(cores)
        step = self._step(n_images)
        for i in range(0, len(cores), step):
            group = cores[i : i + step]
            found = embed(torch.cat([self._tile(images, core) for core in group]))
            for n, core in enumerate(group):
                of_core = slice(n * n_images, (n + 1) * n_images)
                yield core, [self._cut(x[of_core], core) for x in found]
            del found  # before the next are there

    def stitched(
        self, images: Tensor, embed: Embed, cores: Sequence[Core] | None = None
    ) -> tuple[Tensor, ...]:
        """Embeddings (B, h, w, D) of whole images, or of the rectangle that some cores make.

        Takes what `embedded` does.
        """
        if self.is_whole:
            return tuple(embed(images))
        cores = self._some(cores)
        begin, end = cores[0].first, cores[-1].last
        whole: dict[int, Tensor] = {}
        for core, parts in self.embedded(images, embed, cores):
            sides = [b - a for a, b in zip(core.first, core.last, strict=True)]
            for i, x in enumerate(parts):
                stride = sides[0] // x.shape[1], sides[1] // x.shape[2]
                if i not in whole:
                    size = [(b - a) // s for a, b, s in zip(begin, end, stride, strict=True)]
                    whole[i] = x.new_empty(len(x), *size, x.shape[3])
                rows, columns = core.on_grid(stride, begin)
                whole[i][:, rows, columns] = x
        return tuple(whole.values())

    def _some(self, cores: Sequence[Core] | None) -> Sequence[Core]:
        return [core for row in self.cores for core in row] if cores is None else cores

    def _tile(self, images: Tensor, core: Core) -> Tensor:
        (top, left), (height, width) = core.start, self.tile
        return images[..., top : top + height, left : left + width]

    def _cut(self, x: Tensor, core: Core) -> Tensor:
        """Embeddings (B, h, w, D) of a tile without those that other tiles give."""
        stride = self.tile[0] // x.shape[1], self.tile[1] // x.shape[2]
        rows, columns = core.on_grid(stride, core.start)
        return x[:, rows, columns]


def tiling_of(
    networks: Sequence[Backbone], settings: Settings, learned: Learned | None = None
) -> Tiling:
    """How the networks of a model, which is fitted or is to be, see its images.

    Raises
    ------
    ValueError
        A tile that a network does not take, or that the overlap fills.
    """
    if settings.tile is None:
        fills = learned is None or learned.filled
        extent = whole_strides(networks, settings.size) if fills else settings.size
        return Tiling(extent, extent, 0, 1)
    extent = whole_strides(networks, settings.size, tiled=True)
    tile, cell = _whole_tile(networks, settings.tile)
    assert settings.overlap is not None
    overlap = -(-settings.overlap // (2 * cell)) * 2 * cell
    if any(overlap >= side < whole for side, whole in zip(tile, extent, strict=True)):
        raise ValueError(
            f"NPad: overlap={settings.overlap} leaves nothing of tile={settings.tile}: in steps of "
            f"{2 * cell} pixels it is {overlap}; give a larger tile or a smaller overlap"
        )
    return Tiling(extent, tile, overlap, cell, settings.batch_size)


def with_overlap(settings: Settings, networks: Sequence[Backbone]) -> Settings:
    """These, with an overlap of tiles where none is given: `least_overlap`.

    A side of a tile that it would fill becomes twice as long as it, or the image's, if that is shorter.
    """
    if settings.tile is None or settings.overlap is not None:
        return settings
    overlap = least_overlap(networks, settings.tile)
    height, width = (
        min(2 * overlap, side) if tile <= overlap else tile
        for tile, side in zip(settings.tile, settings.size, strict=True)
    )
    return replace(settings, tile=(height, width), overlap=overlap)


def least_overlap(networks: Sequence[Backbone], tile: Size) -> int:
    """Pixels that neighbouring tiles must share for the embeddings to be those of whole images.

    Where a network sees everything from everywhere, it is a quarter of the tile's shorter side.
    """
    tile, cell = _whole_tile(networks, tile)
    reaches = [network.reach(tile) for network in networks]
    seen = [2 * -(-reach // cell) * cell for reach in reaches if reach is not None]
    return max(seen) if len(seen) == len(reaches) else min(tile) // 4 // (2 * cell) * 2 * cell


def _whole_tile(networks: Sequence[Backbone], tile: Size) -> tuple[Size, int]:
    """A tile in whole strides of all networks, and the cell of all of them."""
    whole = whole_strides(networks, tile)
    for network in networks:
        network.grid(whole, before=tile, argument="tile")
    cell = math.lcm(*(network.cell for network in networks))
    if any(side % cell for side in whole):
        raise ValueError(f"NPad: tile must be a multiple of {cell}, got {tile}")
    return whole, cell


def _cuts(length: int, tile: int, overlap: int, cell: int) -> list[tuple[int, int, int]]:
    """Along an axis: where each tile begins, where its core does, and where that ends."""
    step = tile - overlap
    n = 1 + max(0, -(-(length - tile) // step))
    starts = [min(i * step, length - tile) for i in range(n)]
    middles = [(before + tile + after) // 2 // cell * cell for before, after in pairwise(starts)]
    bounds = pairwise([0, *middles, length])
    return [(start, *core) for start, core in zip(starts, bounds, strict=True)]
