"""Public functional ops: checks and messages.

Each calls a ``torch.library`` op in the namespace ``npad``, so the device of the tensors picks the
kernel and ``torch.compile`` and ``torch.export`` see it. Where no kernel is registered for a device,
the definition in `npad.ops.reference` runs; so it does on a GPU on which the kernel has failed its
check, which the first op on a GPU makes and a RuntimeWarning tells of. Arguments are checked here and
nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from npad.ops import _cpu, _cuda  # noqa: F401  (whoever imports the ops gets the kernels)
from npad.ops._extension import VECTOR_BYTES, is_aligned
from npad.ops._progress import report_progress
from npad.ops.packed import packed_size, stored_size
from npad.ops.reference import centroid_index_size

__all__ = [
    "FACTOR_DTYPES",
    "FLOAT_DTYPES",
    "anomaly_map",
    "centroid_index",
    "embed",
    "farthest_first",
    "inverse_cholesky",
    "mahalanobis",
    "nearest_centroid",
    "neighborhood_moments",
    "pack_factor",
    "packed_size",
    "report_progress",
    "resize_maps",
    "stored_size",
    "window_covariance",
]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of embeddings and levels
FACTOR_DTYPES = (*FLOAT_DTYPES, torch.int8)
MAX_CHANNELS = 4096
MAX_POINTS = 2**32 - 2  # of farthest_first, which numbers them in 32 bits


# --------------------------------------------------------------------------------------------------
# Checks.


def _check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"npad.{op}: {name} must be {names}, got {found}")


def _check_shape(
    op: str, name: str, tensor: Tensor, symbols: str, expected: tuple[int, ...]
) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"npad.{op}: {name} must have shape ({symbols}) = {expected}, got {tuple(tensor.shape)}"
        )


def _check_devices(op: str, **tensors: Tensor) -> None:
    (first, reference_tensor), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference_tensor.device:
            raise ValueError(
                f"npad.{op}: {name} is on {tensor.device} but {first} is on "
                f"{reference_tensor.device}; move one with .to(device)"
            )


def _check_window(op: str, window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"npad.{op}: window must be odd and at least 1, got {window}")


def _check_channels(op: str, channels: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(
            f"npad.{op}: the number of channels must be 1 to {MAX_CHANNELS}, got {channels}; "
            "reduce it (n_features of NPad)"
        )


def _check_size(op: str, name: str, size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ValueError(f"npad.{op}: {name} must be at least (1, 1), got {tuple(size)}")


def _embeddings(op: str, x: Tensor) -> tuple[int, int]:
    """Check (N, H, W, C) embeddings; return (P, C)."""
    _check_dtype(op, "x", x, *FLOAT_DTYPES)
    if x.ndim != 4 or x.shape[1] * x.shape[2] == 0:
        raise ValueError(
            f"npad.{op}: x must have shape (N, H, W, C) with H, W >= 1, got {tuple(x.shape)}"
        )
    _check_channels(op, x.shape[3])
    return x.shape[1] * x.shape[2], x.shape[3]


def _statistics(op: str, count: Tensor, mean: Tensor, scatter: Tensor, p: int, c: int) -> None:
    _check_dtype(op, "count", count, torch.int64)
    _check_dtype(op, "mean", mean, torch.float32)
    _check_dtype(op, "scatter", scatter, torch.float32)
    _check_shape(op, "count", count, "P", (p,))
    _check_shape(op, "mean", mean, "P, C", (p, c))
    _check_shape(op, "scatter", scatter, "P, packed", (p, packed_size(c)))


def _check_matrices(op: str, name: str, matrices: Tensor, dtype: torch.dtype) -> None:
    _check_dtype(op, name, matrices, torch.float32)
    if dtype not in FACTOR_DTYPES:
        raise TypeError(f"npad.{op}: dtype must be float32, float16, bfloat16 or int8, got {dtype}")
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
        raise ValueError(
            f"npad.{op}: {name} must have shape (R, C, C), got {tuple(matrices.shape)}"
        )
    _check_channels(op, matrices.shape[1])


def _check_rows(op: str, name: str, rows: Tensor) -> None:
    _check_dtype(op, name, rows, torch.float32)
    if rows.ndim != 2:
        raise ValueError(f"npad.{op}: {name} must have two dimensions, got {tuple(rows.shape)}")


def _check_centroids(op: str, centroids: Tensor) -> None:
    _check_rows(op, "centroids", centroids)
    if centroids.numel() == 0:
        raise ValueError(f"npad.{op}: centroids must not be empty, got {tuple(centroids.shape)}")


def _check_maps(op: str, name: str, maps: Tensor, symbols: str) -> None:
    _check_dtype(op, name, maps, torch.float32)
    if maps.ndim != 3 or maps.shape[1] * maps.shape[2] == 0:
        raise ValueError(
            f"npad.{op}: {name} must have shape (N, {symbols}) with {symbols} >= 1, "
            f"got {tuple(maps.shape)}"
        )


# --------------------------------------------------------------------------------------------------
# Ops.


def embed(levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Embeddings on one grid from the feature levels of a network.

    Parameters
    ----------
    levels : each (N, C_l, H_l, W_l) float32 | float16 | bfloat16, any strides; one dtype for all.
        Fastest where the channels of a pixel are side by side (``torch.channels_last``).
    grid : (H, W), of any size

    Returns
    -------
    (N, H, W, C) float32, contiguous, C = sum C_l. NaN and infinity spread over the patch and to every
    cell that samples it, with weight zero too: an infinite feature may become NaN, as in PyTorch.

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Shapes that do not fit, different devices, no level, an empty grid.

    Notes
    -----
    Each level is averaged over a 3 x 3 patch, which is always divided by 9, zeros around the border
    counted, and sampled bilinearly (``align_corners=False``) where its size is not the grid's. Both
    are separable and linear, so one pass reads each level once and writes the embeddings once. An
    image gives the same bits alone and in a batch.
    """
    op = "embed"
    if not levels:
        raise ValueError(f"npad.{op}: levels must hold at least one level")
    _check_size(op, "grid", grid)
    named = {f"levels[{i}]": level for i, level in enumerate(levels)}
    for name, level in named.items():
        _check_dtype(op, name, level, *FLOAT_DTYPES)
        _check_dtype(op, name, level, levels[0].dtype)
        if level.ndim != 4 or level.shape[1] * level.shape[2] * level.shape[3] == 0:
            raise ValueError(
                f"npad.{op}: {name} must have shape (N, C, H, W) with C, H, W >= 1, "
                f"got {tuple(level.shape)}"
            )
        shape = (levels[0].shape[0], *level.shape[1:])
        _check_shape(op, name, level, "N, C, H, W", shape)
    _check_devices(op, **named)
    return torch.ops.npad.embed(list(levels), grid)


def neighborhood_moments(x: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
    """Update the count, mean and scatter of every position with a batch, in place.

    Parameters
    ----------
    x : (B, H, W, C) float32 | float16 | bfloat16, any strides
    count : (P,) int64, P = H * W, contiguous; updated
    mean : (P, C) float32, contiguous; updated
    scatter : (P, packed) float32, contiguous, at an address that is a multiple of 16, as that of
        every new tensor; updated. Sum of squared deviations, the lower triangle in the packed layout
        (``packed_size(C)`` elements per position).

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Shapes that do not fit, different devices, a non-contiguous statistic, a scatter at another
        address.

    Notes
    -----
    Chan, Golub, LeVeque, *Algorithms for computing the sample variance*, The American Statistician
    1983. Start from zeros. Batches may come in any order and size; the result is that of one batch
    up to float32 rounding. Cost: C^2 (B + 1) flops and one read and write of the scatter per position.
    """
    op = "neighborhood_moments"
    p, c = _embeddings(op, x)
    _statistics(op, count, mean, scatter, p, c)
    _check_devices(op, x=x, count=count, mean=mean, scatter=scatter)
    for name, tensor in (("count", count), ("mean", mean), ("scatter", scatter)):
        if not tensor.is_contiguous():
            raise ValueError(f"npad.{op}: {name} is updated in place and must be contiguous")
    # A program that is traced has no addresses.
    if not torch.compiler.is_compiling() and not is_aligned(scatter):
        raise ValueError(
            f"npad.{op}: scatter is updated in place and must start at a multiple of {VECTOR_BYTES} "
            f"bytes, got {scatter.data_ptr() % VECTOR_BYTES} bytes past one; give it memory of its "
            "own (scatter.clone())"
        )
    torch.ops.npad.neighborhood_moments(x, count, mean, scatter)


def window_covariance(
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
    grid: tuple[int, int],
    window: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of positions ``start`` to ``stop`` over their clipped windows.

    Parameters
    ----------
    count, mean, scatter : the statistics of ``neighborhood_moments``
    grid : (H, W), H * W = P
    window : odd side of the square window; may exceed the grid (one global Gaussian)
    start, stop : range of positions, row-major

    Returns
    -------
    mean : (stop - start, C) float32
    covariance : (stop - start, C, C) float32, symmetric, with ddof 1 and no regularisation.
        A window with fewer than two samples gives non-finite values.

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Shapes that do not fit, different devices, an even window, a range outside the grid.

    Notes
    -----
    n = sum n_q, mu = sum n_q m_q / n, covariance = sum [S_q + n_q (m_q - mu)(m_q - mu)^T] / (n - 1):
    the law of total covariance, exact. Source: the neighbourhood Gaussian of N-pad (Jang, Hwang,
    Park, CVPR Workshops 2023); the formula for its statistics is npad's.
    """
    op = "window_covariance"
    if mean.ndim != 2:
        raise ValueError(f"npad.{op}: mean must have shape (P, C), got {tuple(mean.shape)}")
    p, c = grid[0] * grid[1], mean.shape[1]
    _check_channels(op, c)
    _statistics(op, count, mean, scatter, p, c)
    _check_devices(op, mean=mean, count=count, scatter=scatter)
    _check_window(op, window)
    if not 0 <= start <= stop <= p:
        raise ValueError(
            f"npad.{op}: need 0 <= start <= stop <= {p}, got start={start}, stop={stop}"
        )
    return torch.ops.npad.window_covariance(count, mean, scatter, grid, window, start, stop)


def pack_factor(factor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pack lower-triangular factors for ``mahalanobis``.

    Parameters
    ----------
    factor : (R, C, C) float32; what lies above the diagonal is ignored
    dtype : float32 | float16 | bfloat16 | int8, the storage type

    Returns
    -------
    (R, stored) of ``dtype``, stored = ``stored_size(C, dtype)``: the packed triangle; of int8, bytes
    with a scale for every 256 of them (see `npad.ops.packed`)

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        A shape that does not fit.
    """
    _check_matrices("pack_factor", "factor", factor, dtype)
    return torch.ops.npad.pack_factor(factor, dtype)


def inverse_cholesky(
    covariance: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Factor covariances as ``mahalanobis`` takes them: Sigma = L L^T, W = L^-1, packed.

    Parameters
    ----------
    covariance : (R, C, C) float32, symmetric
    dtype : float32 | float16 | bfloat16 | int8, the storage type; all sums are float32

    Returns
    -------
    factor : (R, stored) of ``dtype``, as of ``pack_factor``; NaN where the factorisation failed
    info : (R,) int32; 0, or the order of the first leading minor that is not positive definite

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        A shape that does not fit.

    Notes
    -----
    ``torch.linalg.cholesky_ex`` and a triangular solve, which is the reference, spend most of their
    time on starting work for one small matrix after another; here one blocked kernel takes whole
    matrices, each by a thread of the CPU or by a block of the GPU, where nothing waits for ``info``
    and the call can be captured in a graph. Cost: 2 C^3 / 3 flops.
    """
    _check_matrices("inverse_cholesky", "covariance", covariance, dtype)
    return torch.ops.npad.inverse_cholesky(covariance, dtype)


def mahalanobis(
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    grid: tuple[int, int],
    window: int = 1,
    prefix: int | None = None,
) -> Tensor:
    """Distance of each embedding to the nearest Gaussian in its window.

    Parameters
    ----------
    x : (N, H, W, C) float32 | float16 | bfloat16, any strides
    mean : (P, C) float32, P = H * W
    factor : (P, stored) float32 | float16 | bfloat16 | int8: W = L^-1 of the covariance L L^T, stored
        by ``pack_factor``
    grid : (H, W)
    window : odd side of the evaluation window; 1 is the position itself
    prefix : 1 to C - 1, a number of channels whose own distances are wanted, too

    Returns
    -------
    (N, H, W) float32, in standard deviations; NaN propagates. With a prefix (2, N, H, W): the distance
    in the first ``prefix`` channels, and in all. On a GPU what is not finite behind the prefix may
    reach both; elsewhere the first is that of these channels alone.

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Shapes that do not fit, different devices, an even window.

    Notes
    -----
    distance[n, p] = min over q in window(p) of || W_q (x[n, p] - mean_q) ||. Each factor is read
    once, whatever the window and the prefix: W is lower triangular, so its first rows are the factor
    of the Gaussian of the first channels. Source: N-pad (Jang, Hwang, Park, CVPR Workshops 2023).
    """
    op = "mahalanobis"
    p, c = _embeddings(op, x)
    _check_shape(op, "x", x, "N, H, W, C", (x.shape[0], *grid, c))
    _check_dtype(op, "mean", mean, torch.float32)
    _check_dtype(op, "factor", factor, *FACTOR_DTYPES)
    _check_shape(op, "mean", mean, "P, C", (p, c))
    _check_shape(op, "factor", factor, "P, stored", (p, stored_size(c, factor.dtype)))
    _check_devices(op, x=x, mean=mean, factor=factor)
    _check_window(op, window)
    if prefix is not None and not 1 <= prefix < c:
        raise ValueError(f"npad.{op}: prefix must be 1 to {c - 1} of {c} channels, got {prefix}")
    return torch.ops.npad.mahalanobis(x, mean, factor, grid, window, prefix)


def centroid_index(centroids: Tensor) -> Tensor:
    """What ``nearest_centroid`` would otherwise work out about the centroids on every call.

    Parameters
    ----------
    centroids : (K, C) float32, K >= 1

    Returns
    -------
    (size,) int32 on the CPU, opaque, 140 bytes a centroid and up to 516 a channel; uint8 on a GPU, half
    the bytes of the centroids and some more. It belongs to these centroids with these values. Make it
    on the device that uses it: an index of another kind of device changes nothing, and its content
    differs between versions of npad.

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Not two dimensions, no centroid.

    Notes
    -----
    On the CPU it holds every centroid in bytes along up to 128 axes, in which the centroids vary most,
    and the norm of what that leaves out. x . c is at most the product of the bytes plus the product
    of these norms (Cauchy-Schwarz), which for embeddings rules out nearly all centroids at a
    fraction of the work. The bound by one axis and the norm across it is that of Hwang, Han, Ahn, *A
    fast nearest neighbor search algorithm by nonlinear embedding*, CVPR 2012; that it also takes up
    the rounding to bytes is npad's own.

    On a GPU it holds the centroids in float16, as matrix instructions take them, and their norms.
    """
    _check_centroids("centroid_index", centroids)
    return torch.ops.npad.centroid_index(centroids)


def nearest_centroid(
    x: Tensor, centroids: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest centroid, and which it is.

    Parameters
    ----------
    x : (N, C) float32, any strides
    centroids : (K, C) float32, K >= 1
    index : ``centroid_index`` of these same centroids: the same result, bit for bit, and sooner where
        the centroids are asked more than once

    Returns
    -------
    distance : (N,) float32; NaN where x has a NaN
    nearest : (N,) int64; of centroids equally near in float32, the first

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Shapes that do not fit, different devices, no centroid, an index of other sizes.

    Notes
    -----
    Memory is O(N + K C): no N x K matrix. The distance of the winner is computed from differences,
    so it is accurate also near zero.
    """
    op = "nearest_centroid"
    _check_rows(op, "x", x)
    _check_centroids(op, centroids)
    _check_shape(op, "x", x, "N, C", (x.shape[0], centroids.shape[1]))
    _check_devices(op, x=x, centroids=centroids)
    if index is not None:
        _check_dtype(op, "index", index, torch.int32, torch.uint8)
        k, channels = centroids.shape
        size = centroid_index_size(k, channels, index.dtype)
        _check_shape(op, "index", index, "size", (size,))
        _check_devices(op, x=x, index=index)
    return torch.ops.npad.nearest_centroid(x, centroids, index)


def farthest_first(points: Tensor, n_centroids: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Greedy k-center: each next centre is the point farthest from all centres before it.

    Parameters
    ----------
    points : (N, D) float32, finite; N at most 2^32 - 2
    n_centroids : 1 to N
    first : index of the first centre

    Returns
    -------
    index : (n_centroids,) int64, distinct
    radius : (n_centroids,) float32; radius[k] is the covering radius of the first k + 1 centres: the
        largest distance of a point to the nearest of them

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        Not two dimensions, a number out of range, NaN or infinite points.

    Notes
    -----
    Gonzalez, *Clustering to minimize the maximum intercluster distance*, 1985: the covering radius is
    at most twice the smallest possible. Exact on the points given; of equally far points the first is
    taken. Points that a bound on their distance rules out are skipped.
    """
    op = "farthest_first"
    _check_dtype(op, "points", points, torch.float32)
    if points.ndim != 2 or points.numel() == 0:
        raise ValueError(
            f"npad.{op}: points must have shape (N, D) with N, D >= 1, got {tuple(points.shape)}"
        )
    if len(points) > MAX_POINTS:
        raise ValueError(f"npad.{op}: at most {MAX_POINTS} points, got {len(points)}; sample them")
    if not 1 <= n_centroids <= len(points):
        raise ValueError(
            f"npad.{op}: n_centroids must be 1 to the number of points {len(points)}, got {n_centroids}"
        )
    if not 0 <= first < len(points):
        raise ValueError(f"npad.{op}: first must be 0 to {len(points) - 1}, got {first}")
    if not bool(points.sum().isfinite()) and not bool(points.isfinite().all()):
        raise ValueError(f"npad.{op}: points hold NaN or infinite values")
    return torch.ops.npad.farthest_first(points, n_centroids, first)


def anomaly_map(
    mahalanobis: Tensor | None,
    euclidean: Tensor | None,
    product: bool,
    coefficients: tuple[float, float, float],
    size: tuple[int, int],
    sigma: float,
) -> tuple[Tensor, Tensor]:
    """Fuse the maps M and E of both distances, upsample and smooth; the maximum is the score.

    Parameters
    ----------
    mahalanobis, euclidean : (N, h, w) float32, any strides; None leaves one of them out
    product : fuse by M^a E^b + c, otherwise by a M + b E + c
    coefficients : (a, b, c)
    size : (H, W) of the maps
    sigma : standard deviation of the Gaussian in pixels of the output; 0 does not smooth

    Returns
    -------
    maps : (N, H, W) float32
    scores : (N,) float32, the maximum of each map

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        No map, shapes that do not fit, different devices, coefficients that are not finite, a size
        below 1, sigma outside 0 to max(H, W).

    Notes
    -----
    Bilinear with half-pixel centres (``align_corners=False``), then a Gaussian cut at 4 sigma, the
    border mirrored (SciPy's "reflect"). A constant map stays exactly constant; the maps of a batch
    are bitwise those of the single images. One value that is NaN or infinite makes its whole map and
    its score NaN. Both linear steps together are a banded matrix per axis.
    """
    op = "anomaly_map"
    given = {
        name: x
        for name, x in (("mahalanobis", mahalanobis), ("euclidean", euclidean))
        if x is not None
    }
    if not given:
        raise ValueError(f"npad.{op}: mahalanobis and euclidean are both None")
    for name, x in given.items():
        _check_maps(op, name, x, "h, w")
    _check_devices(op, **given)
    if mahalanobis is not None and euclidean is not None:
        _check_shape(op, "euclidean", euclidean, "N, h, w", tuple(mahalanobis.shape))
    if not all(map(math.isfinite, coefficients)):
        raise ValueError(f"npad.{op}: coefficients must be finite, got {coefficients}")
    _check_size(op, "size", size)
    if not 0 <= sigma <= max(size):
        raise ValueError(f"npad.{op}: sigma must be 0 to {max(size)} pixels, got {sigma}")
    return torch.ops.npad.anomaly_map(mahalanobis, euclidean, product, coefficients, size, sigma)


def resize_maps(maps: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Bring each map to a size of its own, bilinearly.

    Parameters
    ----------
    maps : (N, H, W) float32, any strides
    sizes : (height, width) of each, as many as there are maps

    Returns
    -------
    (sum of height * width,) float32: one map after another, so that one copy moves them all;
    ``split([height * width for height, width in sizes])`` parts them.

    Raises
    ------
    TypeError
        A dtype other than those above.
    ValueError
        A shape that does not fit, not as many sizes as maps, a size below 1.

    Notes
    -----
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` of each map, but for the
    float32 positions of that: here only the weights are rounded.
    """
    op = "resize_maps"
    _check_maps(op, "maps", maps, "H, W")
    if len(sizes) != len(maps):
        raise ValueError(f"npad.{op}: sizes must be {len(maps)}, as many as maps, got {len(sizes)}")
    for i, size in enumerate(sizes):
        _check_size(op, f"sizes[{i}]", size)
    return torch.ops.npad.resize_maps(maps, [h for h, _ in sizes], [w for _, w in sizes])
