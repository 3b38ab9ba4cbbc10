"""The neighbourhood Gaussian of a large grid, in several passes: no pass needs all its statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from npad import ops
from npad.statistics.choice import NO_VARIANCE
from npad.statistics.gaussian import NeighborhoodGaussian

__all__ = ["Overview", "Patches", "StripGaussians"]

_AT_ONCE = 1 << 22  # numbers of a batch that are worked on at a time


class Overview:
    """Mean and variance of the embeddings of each position: one number for all channels.

    Attributes
    ----------
    n_images : images so far
    """

    def __init__(self) -> None:
        self.n_images = 0
        self._mean: Tensor | None = None  # (P, C)
        self._squares: Tensor | None = None  # (P,) float64, of the deviations

    def update(self, x: Tensor) -> None:
        """Add embeddings (B, H, W, C), by Chan's formula."""
        x = x.flatten(1, 2)
        n_before, n_new = self.n_images, len(x)
        if n_new == 0:
            return
        if self._mean is None or self._squares is None:
            self._mean = x.new_zeros(x.shape[1:])
            self._squares = x.new_zeros(x.shape[1], dtype=torch.float64)
        self.n_images += n_new
        share = n_new / self.n_images
        step = max(1, _AT_ONCE // x[:, 0].numel())
        for start in range(0, x.shape[1], step):
            part = x[:, start : start + step]
            mean, squares = (t[start : start + step] for t in (self._mean, self._squares))
            own = part.mean(0)
            squares += (part - own).square().sum((0, 2), dtype=torch.float64)
            delta = own - mean
            squares += n_before * share * delta.square().sum(1, dtype=torch.float64)
            mean += share * delta

    @property
    def variance(self) -> Tensor:
        """(P,) float64 on the CPU, as `NeighborhoodGaussian.variance`."""
        assert self._squares is not None
        return (self._squares / max(1, self.n_images - 1)).cpu()

    @property
    def varies(self) -> bool:
        """Whether the images differ by more than rounding."""
        assert self._mean is not None
        assert self._squares is not None
        of_means = self._mean.square().sum(dtype=torch.float64)
        return bool(self._squares.sum() > NO_VARIANCE * self.n_images * of_means)


class Patches:
    """Statistics of the windows of some positions.

    Parameters
    ----------
    positions : (S,) int64, row by row
    grid : (H, W)
    window : odd side of the largest window
    dimensions : D
    device : where the statistics live

    Attributes
    ----------
    places : (K,) int64, the positions of all windows, one window after the other
    """

    def __init__(
        self,
        positions: Tensor,
        grid: tuple[int, int],
        window: int,
        dimensions: int,
        device: torch.device,
    ) -> None:
        self._shapes: list[tuple[int, int]] = []  # of windows, clipped to the grid
        self._middles: list[int] = []
        places = []
        for position in positions.tolist():
            (top, bottom, y), (left, right, x) = (
                (max(0, at - window // 2), min(side, at + window // 2 + 1), at)
                for at, side in zip(divmod(position, grid[1]), grid, strict=True)
            )
            rows = torch.arange(top, bottom)[:, None] * grid[1]
            places.append((rows + torch.arange(left, right)).flatten())
            self._shapes.append((bottom - top, right - left))
            self._middles.append((y - top) * (right - left) + x - left)
        self.places = torch.cat(places).to(device)
        self._gaussian = NeighborhoodGaussian((1, len(self.places)), dimensions, device=device)

    @property
    def middles(self) -> Tensor:
        """(S,) int64, which of the places are the positions themselves."""
        sizes = torch.tensor([0, *(h * w for h, w in self._shapes)]).cumsum(0)[:-1]
        return sizes + torch.tensor(self._middles)

    def update(self, x: Tensor) -> None:
        """Add embeddings (B, K, D) at the places."""
        self._gaussian.update(x[:, None].contiguous())

    def of_window(self, window: int) -> tuple[Tensor, Tensor]:
        """Mean (S, D) and covariance (S, D, D) of the positions over their windows of a side."""
        gaussian, start, found = self._gaussian, 0, []
        for shape, middle in zip(self._shapes, self._middles, strict=True):
            stop = start + shape[0] * shape[1]
            count, mean, scatter = (
                t[start:stop] for t in (gaussian.count, gaussian.mean, gaussian.scatter)
            )
            place = middle, middle + 1
            found.append(ops.window_covariance(count, mean, scatter, shape, window, *place))
            start = stop
        of_mean, of_covariance = zip(*found, strict=True)
        return torch.cat(of_mean), torch.cat(of_covariance)


class StripGaussians:
    """Means and factors of a grid, whose rows come in strips, each with all images.

    Of the statistics there are those of a strip, and of the last rows of the one before, whose windows
    reach into it.

    Parameters
    ----------
    grid : (H, W)
    window : odd side of the training window
    dimensions : D
    dtype : storage type of the factors
    device : where all this lives
    transposed : whether these rows are columns of the grid (W, H) of which the Gaussians are

    Attributes
    ----------
    mean : (P, D) float32
    factor : (P, stored) of ``dtype``; both are those of the rows that are done
    """

    def __init__(
        self,
        grid: tuple[int, int],
        window: int,
        dimensions: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        transposed: bool = False,
    ) -> None:
        self.grid = grid
        self.window = window
        self.dimensions = dimensions
        self.dtype = dtype
        self.device = device
        self.transposed = transposed
        positions, stored = grid[0] * grid[1], ops.stored_size(dimensions, dtype)
        self.mean = torch.empty(positions, dimensions, dtype=torch.float32, device=device)
        self.factor = torch.empty(positions, stored, dtype=dtype, device=device)
        self._strip: NeighborhoodGaussian | None = None
        self._new = 0  # first position of the strip that is new
        self._begin = 0  # row of the grid at which the strip begins
        self._done = 0  # rows

    def begin(self, n_rows: int) -> None:
        """Go on with so many rows."""
        kept = self._strip
        n_kept = 0 if kept is None else kept.grid[0]
        self._strip = self._gaussian(n_kept + n_rows)
        self._new = n_kept * self.grid[1]
        if kept is not None:
            for name in _STATISTICS:
                getattr(self._strip, name)[: self._new] = getattr(kept, name)

    def update(self, x: Tensor) -> None:
        """Add embeddings (B, n_rows, W, D) of images, of each once."""
        assert self._strip is not None
        new = (getattr(self._strip, name)[self._new :] for name in _STATISTICS)
        ops.neighborhood_moments(x.contiguous(), *new)

    def end(self, eps: float) -> None:
        """Factor what can be known now.

        Raises
        ------
        SmallEpsError
            As `NeighborhoodGaussian.finalize`.
        """
        assert self._strip is not None
        n_rows = self._strip.grid[0]
        ends = self._begin + n_rows == self.grid[0]  # else windows reach beyond the last rows
        done = max(self._done, self._begin + n_rows - (0 if ends else self.window // 2))
        found = self._strip.finalize(eps, self.dtype)
        of_strip = slice(self._done - self._begin, done - self._begin)
        for out, of_rows in zip((self.mean, self.factor), found, strict=True):
            new = of_rows.unflatten(0, self._strip.grid)[of_strip]
            if self.transposed:
                out.unflatten(0, self.grid[::-1])[:, self._done : done] = new.transpose(0, 1)
            else:
                out.unflatten(0, self.grid)[self._done : done] = new
        self._keep(0 if ends else self._begin + n_rows - max(0, done - self.window // 2))
        self._done = done

    def _keep(self, n_rows: int) -> None:
        """Let go of all rows but the last, which windows still need."""
        assert self._strip is not None
        last = self._gaussian(n_rows)
        first = (self._strip.grid[0] - n_rows) * self.grid[1]
        for name in _STATISTICS:
            getattr(last, name).copy_(getattr(self._strip, name)[first:])
        self._begin += self._strip.grid[0] - n_rows
        self._strip = last

    def _gaussian(self, n_rows: int) -> NeighborhoodGaussian:
        grid = n_rows, self.grid[1]
        return NeighborhoodGaussian(grid, self.dimensions, window=self.window, device=self.device)


_STATISTICS = ("count", "mean", "scatter")
