from collections.abc import Callable

class FactorType:
    float32: FactorType
    float16: FactorType
    bfloat16: FactorType

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def use_huge_pages(memory: int, n_bytes: int) -> None: ...
def packed_size(channels: int) -> int: ...
def embed(
    levels: list[tuple[int, ...]],
    level_type: FactorType,
    batch: int,
    height: int,
    width: int,
    embedding: int,
    threads: int,
) -> None: ...
def neighborhood_moments(
    x: int,
    batch: int,
    positions: int,
    channels: int,
    count: int,
    mean: int,
    scatter: int,
    threads: int,
) -> None: ...
def window_covariance(
    count: int,
    mean: int,
    scatter: int,
    height: int,
    width: int,
    channels: int,
    window: int,
    start: int,
    stop: int,
    window_mean: int,
    covariance: int,
    threads: int,
) -> None: ...
def pack_factor(factor: int, count: int, channels: int, packed: int, threads: int) -> None: ...
def inverse_cholesky(
    covariance: int, count: int, channels: int, packed: int, info: int, threads: int
) -> None: ...
def mahalanobis(
    x: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    mean: int,
    factor: int,
    factor_type: FactorType,
    window: int,
    distance: int,
    threads: int,
) -> None: ...
def centroid_index_axes(channels: int) -> int: ...
def centroid_index(
    centroids: int, k: int, channels: int, mean: int, axes: int, index: int, threads: int
) -> None: ...
def nearest_centroid(
    x: int,
    n: int,
    centroids: int,
    k: int,
    channels: int,
    index: int,
    distance: int,
    nearest: int,
    threads: int,
) -> None: ...
def farthest_first(
    points: int,
    n: int,
    dim: int,
    n_centroids: int,
    first: int,
    index: int,
    radius: int,
    threads: int,
    report: Callable[[int, int], None] | None,
) -> None: ...
def anomaly_map(
    mahalanobis: int,
    euclidean: int,
    product: bool,
    a: float,
    b: float,
    c: float,
    n: int,
    h: int,
    w: int,
    row_first: int,
    row_taps: int,
    row_width: int,
    column_first: int,
    column_taps: int,
    column_width: int,
    height: int,
    width: int,
    maps: int,
    scores: int,
    threads: int,
) -> None: ...
def resize_maps(
    maps: int,
    n: int,
    height: int,
    width: int,
    heights: list[int],
    widths: list[int],
    resized: int,
    threads: int,
) -> None: ...
