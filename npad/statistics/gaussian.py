"""The neighbourhood Gaussian: statistics per position, and their inverse Cholesky factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from npad import devices, ops
from npad.learned import Expected
from npad.ops.packed import diagonal, is_finite, unpack
from npad.roi import is_known, nearest_covered
from npad.statistics.choice import NO_VARIANCE, choose, sampled, varied

# Of dense covariance that is factored at a time; below 32 MB the allocator hands the same pages out
# again, where above it every chunk would fault them in anew. A GPU, which wants thousands of matrices
# to be busy, takes a share of what is free, the rest being for what a chunk becomes.
CHUNK_BYTES = 16 << 20
CHUNK_SHARE = 1 / 6

NOT_FINITE = (
    "npad: a covariance is not finite: features must be finite and below 1e18; where the backbone "
    "overflows in float16, give backbone_dtype='bfloat16' or 'float32'"
)


class SmallEpsError(ValueError):
    """A covariance cannot be factored with this eps.

    Attributes
    ----------
    enough : float
        A larger eps, with which it can be tried again.
    """

    def __init__(self, message: str, enough: float) -> None:
        super().__init__(message)
        self.enough = enough


class NeighborhoodGaussian:
    """A Gaussian for every position of a grid over the embeddings of its window.

    Fitting keeps a count, a mean and a packed scatter matrix per position, so its memory is
    P * C (C + 1) / 2 floats however many images there are. ``finalize`` turns them into what
    ``npad.ops.mahalanobis`` scores with.

    Parameters
    ----------
    grid : (H, W)
    channels : C
    window : odd side of the training window; 1 is PaDiM's Gaussian, one that covers the grid is a
        single global Gaussian
    device : where the statistics live

    Attributes
    ----------
    axes : (C, D) float32, orthonormal columns to which `choose` and `finalize` reduce; None: they
        keep all C channels. The statistics are always those of all.
    region : (P,) bool, positions that can be known; None: all of them. Outside of it `finalize` gives
        a position the Gaussian of the nearest one inside.
    borrowed : positions whose own window had fewer than two samples, and which the last `finalize` gave
        the narrowest wider one that has

    Notes
    -----
    Jang, Hwang, Park, *N-Pad: Neighboring Pixel-Based Industrial Anomaly Detection*, CVPR Workshops
    2023. Statistics of windows by the law of total covariance (see ``npad.ops.window_covariance``).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        *,
        window: int = 3,
        device: torch.device | str = "cpu",
    ) -> None:
        positions = grid[0] * grid[1]
        self.grid = grid
        self.window = window
        self.axes: Tensor | None = None
        self.region: Tensor | None = None
        self.borrowed = 0
        self.count = torch.zeros(positions, dtype=torch.int64, device=device)
        float32: Any = {"dtype": torch.float32, "device": device}
        self.mean = torch.zeros(positions, channels, **float32)
        self.scatter = torch.zeros(positions, ops.packed_size(channels), **float32)

    @property
    def channels(self) -> int:
        """Channels C of an embedding."""
        return self.mean.shape[1]

    @property
    def dimensions(self) -> int:
        """D of what `finalize` gives."""
        return self.channels if self.axes is None else self.axes.shape[1]

    def covariance(self) -> Tensor:
        """(C, C) float64 of all embeddings, wherever they stand: within the positions and between.

        Raises
        ------
        ValueError
            Features that are not finite, or too large.
        """
        scatter = self.scatter.new_zeros(self.scatter.shape[1], dtype=torch.float64)
        rows = max(1, CHUNK_BYTES // scatter.nbytes)
        for part in self.scatter.split(rows):  # a CPU copies what it sums in another dtype
            scatter += part.sum(0, dtype=torch.float64)
        within = unpack(scatter, self.channels)
        within = within + within.tril(-1).mT
        mean, weight = self.mean.double(), self.count.double()[:, None]
        total = weight.sum()
        deviation = (mean - (weight * mean).sum(0) / total) * weight.sqrt()
        covariance = (within + deviation.mT @ deviation) / total
        if not bool(covariance.isfinite().all()):
            raise ValueError(NOT_FINITE)
        return covariance

    @property
    def varies(self) -> bool:
        """Whether the images differ by more than rounding."""
        spread = self.scatter[:, self._diagonal].sum(dtype=torch.float64)
        squares = (self.count[:, None] * self.mean.double().square()).sum()
        return bool(spread > NO_VARIANCE * squares)

    @property
    def variance(self) -> Tensor:
        """(P,) float64 on the CPU, of all channels together, at each position."""
        samples = (self.count - 1).clamp(min=1)
        scatter = self.scatter[:, self._diagonal]
        return (scatter.sum(1, dtype=torch.float64) / samples).cpu()

    @property
    def _diagonal(self) -> Tensor:
        """Places of the diagonal in a packed triangle."""
        return diagonal(self.channels).to(self.mean.device)

    def update(self, x: Tensor, known: Tensor | None = None) -> NeighborhoodGaussian:
        """Add a batch of embeddings.

        Parameters
        ----------
        x : (B, H, W, C)
        known : (B, H, W) bool, where they count; None: everywhere
        """
        if known is None:
            ops.neighborhood_moments(x, self.count, self.mean, self.scatter)
        else:
            self._update_where(x.flatten(1, 2), known.flatten(1))
        return self

    def _update_where(self, x: Tensor, known: Tensor) -> None:
        """As `update`, where each position has a number of images of its own; x (B, P, C)."""
        n = known.sum(0)
        x = x.masked_fill(~known[..., None], 0)
        mean = x.sum(0) / n.clamp(min=1)[:, None]
        deviation = (x - mean).masked_fill(~known[..., None], 0)
        self._join(n, mean, deviation)

    def _join(self, count: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Add samples by Chan's formula.

        Parameters
        ----------
        count, mean : (P,) and (P, C), of the samples at each position
        deviation : (B, P, C), of the samples from it; none of them where the caller adds their scatter

        Notes
        -----
        The rank-1 term is the scatter of two points, +-correction / sqrt(2), about their mean 0.
        """
        total = (self.count + count).clamp(min=1)
        share = count.float() / total
        delta = (mean - self.mean).masked_fill((count == 0)[:, None], 0)
        correction = (self.count * share).sqrt()[:, None] * delta * 0.5**0.5
        samples = torch.cat([deviation, torch.stack([correction, -correction])])
        zeros = torch.zeros_like(self.count), torch.zeros_like(self.mean)
        ops.neighborhood_moments(samples.unflatten(1, self.grid), *zeros, self.scatter)
        self.mean += share[:, None] * delta
        self.count += count

    def merge(self, other: NeighborhoodGaussian) -> NeighborhoodGaussian:
        """Add the statistics of another fit, as if its images had been fitted here (Chan's formula)."""
        if (other.grid, other.channels) != (self.grid, self.channels):
            raise ValueError(
                f"NeighborhoodGaussian.merge: other has grid {other.grid} and {other.channels} "
                f"channels, this one {self.grid} and {self.channels}"
            )
        self._join(other.count, other.mean, other.mean.new_empty(0, *other.mean.shape))
        self.scatter += other.scatter
        return self

    def copy(self) -> NeighborhoodGaussian:
        """One that goes on by itself."""
        other = copy.copy(self)
        other.count, other.mean, other.scatter = (
            tensor.clone() for tensor in (self.count, self.mean, self.scatter)
        )
        return other

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON types and tensors, all but the region."""
        tensors = {"count": self.count, "mean": self.mean, "scatter": self.scatter}
        return {"window": self.window}, tensors

    @staticmethod
    def expected(grid: tuple[int, int], channels: int) -> Expected:
        """Dtype and shape of each tensor of a `state`."""
        positions = grid[0] * grid[1]
        return {
            "count": (torch.int64, (positions,)),
            "mean": (torch.float32, (positions, channels)),
            "scatter": (torch.float32, (positions, ops.packed_size(channels))),
        }

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken from, of the same grid; the tensors become its own."""
        self.window = int(values["window"])
        self.count, self.mean, self.scatter = (
            tensors[name] for name in ("count", "mean", "scatter")
        )

    def choose(
        self, held_out: Tensor, windows: Sequence[int], eps: float | None = None
    ) -> tuple[int, float]:
        """Find a window and an eps that make held-out nominal embeddings likely; the window is taken.

        Parameters
        ----------
        held_out : (M, H, W, D) float32, embeddings, in the axes, of images that are not part of the
            statistics; NaN where an image does not count
        windows : to choose from, in increasing order
        eps : if it is given, with the window alone to be chosen

        Returns
        -------
        window : of these
        eps : in squared units of the features

        Notes
        -----
        See `npad.statistics.choice`.
        """
        places = held_out.flatten(1, 2)
        known, counts = None, varied(self.variance)
        if self.region is not None:
            known = is_known(places)
            counts &= self.region.cpu() & known.any(0).cpu()
            if not counts.any():
                raise ValueError(
                    "NPad.fit: the regions of the images held out show no position at which the others "
                    "vary, so that neither window nor eps can be chosen; fit more images, or give "
                    "numbers for window and eps"
                )
        sample = sampled(counts, self.dimensions)
        if self.count[sample.to(self.count.device)].min() < 2:
            windows = [window for window in windows if window > 1] or windows

        def of_window(window: int) -> tuple[Tensor, Tensor]:
            wider = self._wider(window)
            parts = [self._window(p, p + 1, window, wider) for p in sample.tolist()]
            mean, covariance = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            return mean, covariance

        at = sample.to(held_out.device)
        chosen = choose(
            of_window, places[:, at], windows, eps, None if known is None else known[:, at]
        )
        self.window = chosen[0]
        return chosen

    def finalize(
        self,
        eps: float,
        dtype: torch.dtype = torch.float32,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Factor covariance + eps I = L L^T of every position; the statistics are kept.

        Works in chunks of positions: peak memory is the packed scatter, the packed factor and a chunk.

        Parameters
        ----------
        eps : added to the diagonal, in squared units of the features
        dtype : storage type of the factor, float32 | float16 | bfloat16 | int8
        advance : called with the number of positions done since the last call

        Returns
        -------
        mean : (P, D) float32
        factor : (P, stored) of ``dtype``, W = L^-1 as ``npad.ops.pack_factor`` stores it

        Raises
        ------
        SmallEpsError
            A covariance is not positive definite with this eps, or float16 cannot hold its factor.
        ValueError
            A window with fewer than two samples; features that are too large.
        """
        positions, channels = len(self.mean), self.dimensions
        means = self.mean.new_empty(positions, channels)
        stored = ops.stored_size(channels, dtype)
        factors = self.scatter.new_empty(positions, stored, dtype=dtype)
        step = max(torch.get_num_threads(), self._chunk_bytes() // (4 * self.channels**2))
        wider = self._wider(self.window)
        self.borrowed = len(wider)
        for start in range(0, positions, step):
            stop = min(start + step, positions)
            means[start:stop], covariance = self._window(start, stop, self.window, wider)
            covariance.diagonal(dim1=1, dim2=2).add_(eps)
            factor, info = ops.inverse_cholesky(covariance, dtype)
            if bool(info.any()):
                failed = info.nonzero().flatten()
                factor[failed] = self._in_float64(covariance[failed], failed + start, eps, dtype)
            if not is_finite(factor, channels):
                enough = _least_eps(dtype)
                raise SmallEpsError(
                    f"npad: with eps={eps:g} the factor needs values larger than "
                    f"{str(dtype).removeprefix('torch.')} holds; use factor_dtype='bfloat16' or "
                    f"'float32', or an eps of {enough:.3g} or more",
                    max(2 * eps, enough),
                )
            factors[start:stop] = factor
            if advance is not None:
                advance(stop - start)
        if self.region is not None:
            nearest = nearest_covered(self.region.unflatten(0, self.grid)[None])[0]
            for outside in (~self.region).nonzero().flatten().split(step):
                means[outside] = means[nearest[outside]]
                factors[outside] = factors[nearest[outside]]
        return means, factors

    def _wider(self, window: int) -> dict[int, int]:
        """The window of each position of the region whose own has fewer than two samples."""
        lacks = self._samples(window) < 2
        if self.region is not None:
            lacks &= self.region
        found: dict[int, int] = {}
        # With no position that has enough, it is the images that are too few.
        enough = int(self.count.max()) >= least_images(window)
        while enough and bool(lacks.any()) and window < 2 * max(self.grid):
            window += 2
            served = lacks & (self._samples(window) >= 2)
            found |= dict.fromkeys(served.nonzero().flatten().tolist(), window)
            lacks &= ~served
        return found

    def _samples(self, window: int) -> Tensor:
        """(P,) int64, samples in the clipped window of each position."""
        table = F.pad(self.count.unflatten(0, self.grid).cumsum(0).cumsum(1), (1, 0, 1, 0))
        for axis, n in enumerate(self.grid):
            place = torch.arange(n, device=table.device)
            first = (place - window // 2).clamp(min=0)
            last = (place + window // 2 + 1).clamp(max=n)
            table = table.index_select(axis, last) - table.index_select(axis, first)
        return table.flatten()

    def _chunk_bytes(self) -> int:
        free = devices.free_bytes(self.mean.device) if self.mean.device.type == "cuda" else None
        return max(CHUNK_BYTES, int(CHUNK_SHARE * (free or 0)))

    def _window(
        self, start: int, stop: int, window: int, wider: Mapping[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in the axes; those that `wider` names over their own window."""

        def over(first: int, last: int, side: int) -> tuple[Tensor, Tensor]:
            return ops.window_covariance(
                self.count, self.mean, self.scatter, self.grid, side, first, last
            )

        mean, covariance = over(start, stop, window)
        for p in range(start, stop) if wider else ():
            if p in wider:
                (mean[p - start],), (covariance[p - start],) = over(p, p + 1, wider[p])
        if self.region is not None:
            outside = ~self.region[start:stop]
            mean[outside] = 0
            covariance[outside] = torch.eye(self.channels, device=mean.device)
        if not bool(covariance.diagonal(dim1=1, dim2=2).isfinite().all()):
            if int(self.count.max()) < least_images(window) or int(self.count.sum()) < 2:
                raise ValueError(
                    "npad: each window needs at least two samples; fit more images, or a wider window"
                )
            raise ValueError(NOT_FINITE)
        if self.axes is None:
            return mean, covariance
        with devices.exact_products:
            return mean @ self.axes, self.axes.mT @ (covariance @ self.axes)

    def _in_float64(
        self, covariance: Tensor, positions: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """Packed factors of covariances that float32 cannot factor."""
        lower, info = torch.linalg.cholesky_ex(covariance.double())
        if bool(info.any()):
            eigenvalues = torch.linalg.eigvalsh(covariance.double())[:, 0]
            row, column = divmod(int(positions[eigenvalues.argmin()]), self.grid[1])
            enough = max(eps - float(eigenvalues.min()), _least_eps(dtype))
            raise SmallEpsError(
                f"npad: the covariance at grid position ({row}, {column}) is not positive definite "
                f"with eps={eps:g}; eps must be above about {enough:.3g}, or use eps='auto'",
                2 * max(eps, enough),
            )
        identity = torch.eye(self.dimensions, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        return ops.pack_factor(inverse.float(), dtype)


def least_images(window: int) -> int:
    """Images that give every window two samples."""
    return 2 if window == 1 else 1


def _least_eps(dtype: torch.dtype) -> float:
    """That with which every factor can be stored: no element of one exceeds 1 / sqrt(eps)."""
    scales = torch.float32 if dtype == torch.int8 else dtype
    return 1.01 / torch.finfo(scales).max ** 2
