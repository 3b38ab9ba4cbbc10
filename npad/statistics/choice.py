"""The choice of window and eps: those that make held-out nominal embeddings likely.

With W the inverse Cholesky factor of Sigma + eps I, in float32,
log p(x) = sum_j log W_jj - 1/2 || W (x - mu) ||^2 + const, each x at its own position, summed over an
even sample of the positions that vary (see `VARIED`), fewer where there are more channels. An eps with
which one of them cannot be factored is not taken. Along each principal axis the likelihood is a smooth
function of log eps, so candidates half a decade apart show its peaks, of which there may be several,
and those around them settle the rest. Taken is the largest eps within one standard error of the best
(the rule of Breiman et al., *Classification and Regression Trees*, 1984): of choices that the data
cannot tell apart, the most regular. Of windows it is the smallest: each more lends a position images
that are not its own, which pays where it has few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt

import torch
from torch import Tensor

from npad import ops
from npad.ops.packed import diagonal

__all__ = ["NO_VARIANCE", "Moments", "choose", "n_sampled", "sampled", "varied"]

Moments = Callable[[int], tuple[Tensor, Tensor]]

# eps="auto" chooses among these multiples of the mean variance, from the largest down. Where samples
# are plenty the likelihood is flat below the least: which eps were taken there would be chance.
EPS_CANDIDATES = torch.logspace(1, -3, 33, dtype=torch.float64, device="cpu")
EPS_STEP = 4  # half a decade

# Of the typical variance. Positions that vary less have no part in the choice of eps: their density
# rises without end as eps falls, and would outvote all others.
VARIED = 0.1
# Of the mean square of the features. Less variance is the rounding of float32: all images are the same.
NO_VARIANCE = 1e-12


def varied(variance: Tensor) -> Tensor:
    """(P,) bool: where the variance (P,) is not far below that where most of the variance is."""
    # Weighted by itself, so that any number of positions where nothing varies changes nothing.
    typical = variance.square().sum() / variance.sum()
    return ~(variance < VARIED * typical)


def n_sampled(dimensions: int) -> int:
    """Positions, at most, on which window and eps are chosen."""
    return max(8, min(64, 2 * 10**9 // dimensions**3))


def sampled(counts: Tensor, dimensions: int) -> Tensor:
    """Some of the positions (P,) bool that count, evenly, in their order."""
    (places,) = counts.nonzero(as_tuple=True)
    steps = min(n_sampled(dimensions), len(places))
    chosen = torch.linspace(0, len(places) - 1, steps, dtype=torch.float32, device="cpu")
    return places[chosen.round().long().unique()]


def choose(
    of_window: Moments,
    x: Tensor,
    windows: Sequence[int],
    eps: float | None = None,
    known: Tensor | None = None,
) -> tuple[int, float]:
    """The window and eps to take.

    Parameters
    ----------
    of_window : window -> mean (S, D) and covariance (S, D, D) at some positions, without the images
        held out
    x : (M, S, D) float32, embeddings of the images held out at these positions
    windows : to choose from, in increasing order
    eps : if it is given, with the window alone to be chosen
    known : (M, S) bool, where x counts; None: everywhere

    Returns
    -------
    window : the smallest within one standard error, over the images held out, of the best
    eps : in squared units of the features
    """
    found = [_likely(*of_window(window), x, eps, known) for window in windows]
    best = max((values for values, _ in found), key=lambda values: float(values.mean()))
    good = [float((best - v).mean()) <= _standard_error(best - v) for v, _ in found]
    chosen = good.index(True) if any(good) else 0  # none can be factored: who factors it tells
    return windows[chosen], found[chosen][1]


def _likely(
    mean: Tensor, covariance: Tensor, x: Tensor, eps: float | None, known: Tensor | None
) -> tuple[Tensor, float]:
    """The likeliest log density of held-out embeddings with a window, and the eps to take."""
    n_positions, dimensions = mean.shape
    variances = covariance.diagonal(dim1=1, dim2=2)
    # Where nothing varies but by rounding, eps stays far above the squares that float32 can hold.
    least = sqrt(NO_VARIANCE) * float(mean.square().mean(dtype=torch.float64))
    scale = max(float(variances.mean(dtype=torch.float64)), least) or 1.0
    candidates = EPS_CANDIDATES * scale
    x = (x.nan_to_num(0.0) if known is not None else x)[:, None]
    n_images = len(x) if known is None else int(known.any(1).sum())
    on_diagonal = diagonal(dimensions).to(mean.device)

    def log_density(with_eps: float) -> Tensor:
        regular = covariance.clone()
        regular.diagonal(dim1=1, dim2=2).add_(with_eps)
        factor, info = ops.inverse_cholesky(regular, torch.float32)
        if bool(info.any()):
            return torch.full((n_images,), -torch.inf, dtype=torch.float64, device="cpu")
        distance = ops.mahalanobis(x, mean, factor, (1, n_positions), 1)[:, 0].double()
        log_det = factor[:, on_diagonal].double().log().sum(1)
        return _of_images(log_det - distance.square() / 2, known).cpu()

    if eps is not None:
        return log_density(eps), eps

    @cache
    def likelihood(i: int) -> Tensor:
        return log_density(float(candidates[i]))

    def mean_likelihood(i: int) -> float:
        return float(likelihood(i).mean())

    def around(i: int) -> range:
        """Up to the coarse neighbours."""
        return range(max(0, i - EPS_STEP + 1), min(len(candidates), i + EPS_STEP))

    seen = set(range(0, len(candidates), EPS_STEP))
    for i in sorted(seen):
        neighbors = seen & {i - EPS_STEP, i + EPS_STEP}
        if -torch.inf < mean_likelihood(i) >= max(map(mean_likelihood, neighbors)):
            seen |= set(around(i))
    values = likelihood(max(sorted(seen), key=mean_likelihood))
    good = float(values.mean()) - _standard_error(values)
    first = min(i for i in seen if mean_likelihood(i) >= good)
    chosen = min(i for i in around(first) if mean_likelihood(i) >= good)
    return values, float(candidates[chosen])


def _of_images(density: Tensor, known: Tensor | None) -> Tensor:
    """Log densities (M, S) of positions -> of images; what is not known of one counts like the rest."""
    if known is None:
        return density.sum(1)
    n = known.sum(1)
    total = density.masked_fill(~known, 0).sum(1) * (known.shape[1] / n.clamp(min=1))
    return total[n > 0]


def _standard_error(values: Tensor) -> float:
    """Of their mean."""
    return float(values.std(correction=min(1, len(values) - 1)) / len(values) ** 0.5)
