"""NeighborhoodGaussian: fit, merge, choice of eps, factors."""

import math

import numpy as np
import pytest
import torch
from fitted import SINGULAR, singular
from image_files import smooth_pixels
from torch import Tensor

from npad import NPad, ops
from npad.ops import reference
from npad.statistics.gaussian import NeighborhoodGaussian

GRID = (4, 5)


def fit(x: Tensor, window: int = 3) -> NeighborhoodGaussian:
    gaussian = NeighborhoodGaussian(GRID, x.shape[-1], window=window)
    for batch in x.split(7):
        gaussian.update(batch)
    return gaussian


def test_window_1_is_padims_gaussian() -> None:
    """Scores equal those of numpy's covariance and inverse, position by position."""
    x, new = torch.randn(60, *GRID, 8), torch.randn(2, *GRID, 8)
    mean, factor = fit(x, window=1).finalize(0.01)
    actual = ops.mahalanobis(new, mean, factor, GRID)
    samples = x.flatten(1, 2).double().numpy()
    for p in range(20):
        covariance = np.cov(samples[:, p], rowvar=False) + 0.01 * np.eye(8)
        z = new.flatten(1, 2)[:, p].double().numpy() - samples[:, p].mean(0)
        squared = np.einsum("ni,ij,nj->n", z, np.linalg.inv(covariance), z)
        np.testing.assert_allclose(actual.flatten(1)[:, p], np.sqrt(squared), rtol=1e-4)


def test_merging_halves_is_fitting_the_whole() -> None:
    x = torch.randn(30, *GRID, 9) * 2 + 3
    whole, merged = fit(x), fit(x[:11]).merge(fit(x[11:]))
    assert torch.equal(merged.count, whole.count)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-4, atol=1e-4)


def test_merging_with_nothing_changes_nothing() -> None:
    whole = fit(torch.randn(9, *GRID, 5))
    mean, scatter = whole.mean.clone(), whole.scatter.clone()
    whole.merge(NeighborhoodGaussian(GRID, 5))
    assert torch.equal(whole.mean, mean)
    assert torch.equal(whole.scatter, scatter)
    fresh = NeighborhoodGaussian(GRID, 5).merge(whole)
    torch.testing.assert_close(fresh.scatter, scatter)


def test_the_covariance_of_all_embeddings() -> None:
    x = torch.randn(20, *GRID, 9) @ torch.randn(9, 9) + 5 * torch.randn(*GRID, 9)
    expected = np.cov(x.double().reshape(-1, 9).numpy(), rowvar=False, ddof=0)
    np.testing.assert_allclose(fit(x).covariance(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 3])
def test_in_axes_it_is_the_gaussian_of_reduced_embeddings(window: int) -> None:
    axes, _ = torch.linalg.qr(torch.randn(9, 4))
    x = torch.randn(25, *GRID, 9) + torch.randn(*GRID, 9)
    held_out = torch.randn(8, *GRID, 9)
    whole, reduced = fit(x, window), fit(x @ axes, window)
    whole.axes = axes
    chosen, expected = (
        g.choose(h, [window]) for g, h in ((whole, held_out @ axes), (reduced, held_out @ axes))
    )
    assert chosen == pytest.approx(expected, rel=1e-4)
    for found, same in zip(whole.finalize(0.01), reduced.finalize(0.01), strict=True):
        torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-4)
    assert whole.scatter.shape[1] > reduced.scatter.shape[1]  # the statistics are of all


def test_merge_rejects_another_grid() -> None:
    with pytest.raises(ValueError, match=r"other has grid \(2, 2\) and 5 channels"):
        fit(torch.randn(3, *GRID, 5)).merge(NeighborhoodGaussian((2, 2), 5))


def test_chosen_eps_is_the_largest_within_one_standard_error() -> None:
    """Against a plain evaluation of the density at every candidate."""
    scale = torch.logspace(-1, 0.5, 6)
    x = torch.randn(12, *GRID, 6) * scale
    held_out = torch.randn(15, *GRID, 6) * scale
    gaussian = fit(x, window=1)
    _, eps = gaussian.choose(held_out, [1])

    mean, covariance = reference.window_covariance(
        gaussian.count, gaussian.mean.double(), gaussian.scatter.double(), GRID, 1, 0, 20
    )

    def likelihood(value: float) -> Tensor:
        """Of each held-out image."""
        total = torch.zeros(15).double()
        for p in range(20):
            normal = torch.distributions.MultivariateNormal(
                mean[p], covariance[p] + value * torch.eye(6).double()
            )
            total += normal.log_prob(held_out.flatten(1, 2)[:, p].double())
        return 2 * total  # -2 log p differs from the sum that is compared by a constant

    ratio = 10 ** (7 / 56)  # between candidates
    values = [likelihood(eps * ratio**i) for i in range(-24, 25)]
    best = max(values, key=lambda v: float(v.mean()))
    least = best.mean() - best.std() / 15**0.5
    assert likelihood(eps).mean() >= least
    assert likelihood(eps * ratio).mean() < least


DEAD_CHANNELS = [(20, 10, 12, 0), (30, 20, 24, 0), (20, 11, 13, 1)]


@pytest.mark.parametrize(("dead", "live", "n", "seed"), DEAD_CHANNELS)
def test_chosen_eps_with_nearly_dead_channels(dead: int, live: int, n: int, seed: int) -> None:
    """The likelihood then has two peaks, orders of magnitude apart; it is the higher that counts."""
    torch.manual_seed(seed)
    scale = torch.cat([torch.full((dead,), 1e-3), torch.ones(live)])
    x, held_out = (torch.randn(m, 1, 1, dead + live) * scale for m in (n, 4))
    gaussian = NeighborhoodGaussian((1, 1), dead + live, window=1).update(x)
    mean, covariance = (a[0].double() for a in gaussian._window(0, 1, 1, {}))
    candidates = covariance.diagonal().mean() * torch.logspace(1, -3, 33, dtype=torch.float64)
    normals = (
        torch.distributions.MultivariateNormal(mean, covariance + eps * torch.eye(dead + live))
        for eps in candidates
    )
    values = torch.stack([normal.log_prob(held_out[:, 0, 0].double()) for normal in normals])
    best = values[values.mean(1).argmax()]
    expected = candidates[values.mean(1) >= best.mean() - best.std() / 2].max()
    assert gaussian.choose(held_out, [1])[1] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("n_images", [3, 6, 80])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_chosen_window_is_the_smallest_within_one_standard_error(
    n_images: int, spread: float
) -> None:
    """Against the density of each held-out image in float64, at every position.

    With few images or none of their own to tell positions apart, a wider window pays.
    """
    place = spread * torch.randn(1, *GRID, 6)
    x, held_out = (torch.randn(n, *GRID, 6) + place for n in (n_images, 12))
    windows, eps = [1, 3, 5], 0.05
    gaussian = fit(x)
    densities = []
    for window in windows:
        mean, covariance = reference.window_covariance(
            gaussian.count, gaussian.mean.double(), gaussian.scatter.double(), GRID, window, 0, 20
        )
        normal = torch.distributions.MultivariateNormal(mean, covariance + eps * torch.eye(6))
        densities.append(normal.log_prob(held_out.flatten(1, 2).double()).sum(1))
    best = max(densities, key=lambda values: values.mean())
    expected = next(
        window
        for window, values in zip(windows, densities, strict=True)
        if (best - values).mean() <= (best - values).std() / len(values) ** 0.5
    )
    assert gaussian.choose(held_out, windows, eps) == (expected, eps)
    assert gaussian.window == expected
    assert expected == {(80, 3.0): 1, (3, 0.0): 5}.get((n_images, spread), expected)


def test_chosen_eps_follows_the_scale_of_the_features() -> None:
    x, held_out = torch.randn(12, *GRID, 6), torch.randn(8, *GRID, 6)
    window, eps = fit(x).choose(held_out, [1, 3])
    larger = fit(100 * x).choose(100 * held_out, [1, 3])
    assert larger == (window, pytest.approx(1e4 * eps, rel=1e-2))


def test_chosen_eps_makes_nominal_distances_about_one_per_channel() -> None:
    torch.manual_seed(1)
    mix = torch.randn(24, 24) / 5
    x, held_out, new = (torch.randn(n, *GRID, 24) @ mix for n in (10, 8, 50))
    gaussian = fit(x)
    mean, factor = gaussian.finalize(gaussian.choose(held_out, [3])[1])
    squared = ops.mahalanobis(new, mean, factor, GRID).square().mean() / 24
    assert 0.5 < squared < 2


@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
def test_chunks_do_not_change_the_factors(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaussian = fit(torch.randn(20, *GRID, 12))
    whole = gaussian.finalize(0.1, dtype)
    monkeypatch.setattr("npad.statistics.gaussian.CHUNK_BYTES", 4 * 12**2 * 3)
    done: list[int] = []
    chunked = gaussian.finalize(0.1, dtype, done.append)
    assert torch.equal(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=1e-5, atol=1e-6)
    assert whole[1].dtype == dtype
    assert sum(done) == 20


@pytest.mark.parametrize("case", SINGULAR)
@pytest.mark.parametrize("dtype", ops.FACTOR_DTYPES)
def test_singular_covariances_give_finite_scores(case: str, dtype: torch.dtype) -> None:
    x = singular(case, (12, *GRID, 10))
    gaussian = fit(x)
    _, eps = gaussian.choose(x[:3] * 1.01, [3])
    mean, factor = gaussian.finalize(eps, dtype)
    assert ops.mahalanobis(x, mean, factor, GRID).isfinite().all()


@pytest.mark.parametrize("case", ["constant channels", "dead position"])  # rounding or not
def test_singular_covariances_without_eps_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"grid position \(\d, \d\) is not positive definite"):
        fit(singular(case, (12, *GRID, 10))).finalize(0.0)


def test_positions_that_float32_cannot_factor_are_factored_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gaussian = fit(torch.randn(12, *GRID, 9))
    _, expected = gaussian.finalize(0.1)
    factor_in_float32 = ops.inverse_cholesky

    def fails_at_two(covariance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        factor, info = factor_in_float32(covariance, dtype)
        factor[[3, 7]], info[[3, 7]] = torch.nan, 9
        return factor, info

    monkeypatch.setattr(ops, "inverse_cholesky", fails_at_two)
    _, factor = gaussian.finalize(0.1)
    torch.testing.assert_close(factor, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(factor[3], expected[3])


def test_covariance_that_cannot_be_factored_names_the_position_and_the_eps() -> None:
    x = torch.randn(12, *GRID, 4) * 1e4
    x[..., 3] = x[..., :3].sum(-1)
    with pytest.raises(ValueError, match=r"grid position \(\d, \d\).*eps must be above about"):
        fit(x).finalize(0.0)


def test_float16_overflow_names_the_remedy() -> None:
    gaussian = fit(torch.zeros(3, *GRID, 4))
    with pytest.raises(ValueError, match="factor_dtype='bfloat16' or 'float32'"):
        gaussian.finalize(1e-12, torch.float16)
    gaussian.finalize(1e-12, torch.bfloat16)


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="each window needs at least two samples"):
        fit(torch.randn(1, *GRID, 4), window=1).finalize(0.1)


@pytest.mark.parametrize("n_images", [10, 30, 300])
@pytest.mark.parametrize("n_constant", [2, 8, 36])
def test_positions_where_nothing_varies_do_not_choose_eps(n_images: int, n_constant: int) -> None:
    """A third to nine tenths of the grid: a background that is saturated, or holds a little noise."""
    torch.manual_seed(0)
    mix = torch.randn(12, 12) / 3
    varied = torch.randn(n_images + 8, 4, 1, 12) @ mix
    for noise in (0.0, 1e-4, 1e-2):
        rest = 1 + noise * torch.randn(n_images + 8, n_constant, 1, 12)
        chosen = []
        for x in (varied, torch.cat([rest, varied], 1)):
            gaussian = NeighborhoodGaussian((x.shape[1], 1), 12, window=1).update(x[:n_images])
            chosen.append(gaussian.choose(x[n_images:], [1])[1])
        assert abs(math.log10(chosen[1] / chosen[0])) < 0.01


@pytest.mark.parametrize("fraction", [1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_border_moves_eps_by_less_than_half_a_decade(
    fraction: float, value: int
) -> None:
    """As an object does that does not fill the image, whose size is the same on the grid."""
    side = 96
    outer = round(side / math.sqrt(1 - fraction) / 2) * 2
    images = np.stack([smooth_pixels(side, side, seed=i) for i in range(20)])
    edge = (outer - side) // 2
    framed = np.full((20, outer, outer, 3), value, np.uint8)
    framed[:, edge : edge + side, edge : edge + side] = images
    inside, around = (
        NPad("filterbank", image_size=x.shape[1], n_centroids=16, progress=False).fit(x)
        for x in (images, framed)
    )
    for a, b in zip(inside.members_[:3], around.members_[:3], strict=True):
        assert abs(math.log10(b.eps / a.eps)) < 0.5
