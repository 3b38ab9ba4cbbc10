"""Gaussians fitted a strip of the grid at a time: as if all statistics had been there at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_tiling import SIZE, SMALL, TILED, textures

from npad import NPad, detector, devices
from npad.features.tiling import Tiling
from npad.settings import Settings
from npad.statistics.gaussian import NeighborhoodGaussian, SmallEpsError
from npad.statistics.strips import Overview, Patches, StripGaussians

GRID = (13, 7)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """(9, 13, 7, 5)"""
    torch.manual_seed(0)
    return torch.randn(9, *GRID, 5) * torch.rand(*GRID, 1) + torch.rand(*GRID, 5)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return textures(14)


def test_an_overview_has_the_variance_of_all_statistics(x: torch.Tensor) -> None:
    overview, gaussian = Overview(), NeighborhoodGaussian(GRID, 5)
    for part in x.split([2, 1, 0, 6]):
        overview.update(part)
        gaussian.update(part)
    torch.testing.assert_close(overview.variance, gaussian.variance, rtol=1e-5, atol=0)
    assert overview.varies
    same = Overview()
    for _ in range(3):
        same.update(x[:1])
    assert not same.varies


@pytest.mark.parametrize("window", [1, 3, 5])
def test_patches_are_windows(x: torch.Tensor, window: int) -> None:
    gaussian = NeighborhoodGaussian(GRID, 5).update(x)
    positions = torch.tensor([0, 6, 7, 45, 84, 90])  # corners, borders, the middle
    patches = Patches(positions, GRID, 5, 5, x.device)
    flat = x.flatten(1, 2)
    for part in flat[:, patches.places].split([4, 5]):
        patches.update(part)
    torch.testing.assert_close(flat[:, patches.places[patches.middles]], flat[:, positions])
    found = patches.of_window(window)
    for i, p in enumerate(positions.tolist()):
        mean, covariance = gaussian._window(p, p + 1, window, {})
        torch.testing.assert_close(found[0][i], mean[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1][i], covariance[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("strips", [(13,), (6, 7), (1, 1, 1, 10), (2,) * 6 + (1,), (1,) * 13])
@pytest.mark.parametrize("transposed", [False, True])
def test_strips_make_the_gaussians_of_the_whole(
    x: torch.Tensor, window: int, strips: tuple[int, ...], transposed: bool
) -> None:
    whole = x.transpose(1, 2) if transposed else x
    grid = GRID[::-1] if transposed else GRID
    gaussian = NeighborhoodGaussian(grid, 5, window=window).update(whole.contiguous())
    mean, factor = gaussian.finalize(0.01)
    found = StripGaussians(GRID, window, 5, torch.float32, x.device, transposed=transposed)
    row = 0
    for n in strips:
        found.begin(n)
        for part in x.split([4, 5]):
            found.update(part[:, row : row + n])
        found.end(0.01)
        row += n
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.factor, factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (7, 3), (1, 4), (5, 5)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_strips_of_tiles_lie_across_the_longer_side(rows: int, columns: int, n: int) -> None:
    tiling = Tiling((rows * 4, columns * 4), (4, 4), 0, 1)
    axis = tiling.long_axis
    assert tiling.most_strips == max(rows, columns)
    assert (rows, columns)[axis] == max(rows, columns)
    strips = tiling.strips(n)
    assert len(strips) == n
    ends = [0]
    for cores in strips:
        first, last = cores[0].first, cores[-1].last
        assert first[axis] == ends[-1]
        assert (first[1 - axis], last[1 - axis]) == (0, tiling.extent[1 - axis])
        area = sum((b - a) * (d - c) for (a, c), (b, d) in ((e.first, e.last) for e in cores))
        assert area == (last[0] - first[0]) * (last[1] - first[1])  # a rectangle
        ends.append(last[axis])
    assert ends[-1] == tiling.extent[axis]


# --------------------------------------------------------------------------------------------------
# Models.


def in_strips(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Have the next fits go in so many strips, as if there were no room for all."""
    planned = detector.planned
    monkeypatch.setattr(
        detector, "planned", lambda *args, **known: replace(planned(*args, **known), n_strips=n)
    )


@pytest.mark.parametrize("size", [SIZE, SIZE[::-1]], ids=["wide", "high"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eps": 0.01, "window": 3},
        {"window": 5, "eps": "auto"},
        {"n_features": 8, "reduction": "random"},
        {"nominal_set": None, "holdout": 0.3},
        {"fusion": "mahalanobis", "eps": 0.02, "holdout": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [2, 5])
def test_a_model_fitted_in_strips_is_that_of_one_pass(
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    size: tuple[int, int],
    n: int,
) -> None:
    all_images = images if size == SIZE else np.ascontiguousarray(images.transpose(0, 2, 1, 3))
    known = SMALL | TILED | {"factor_dtype": "float32", "image_size": size} | arguments
    whole = NPad("filterbank", **known).fit(all_images[:12], statistics=False)
    in_strips(monkeypatch, n)
    found = NPad("filterbank", **known).fit(all_images[:12], statistics=False)
    assert not found.has_statistics
    assert found.n_images_ == whole.n_images_
    assert found.fingerprints_ == whole.fingerprints_
    for a, b in zip(found.members_, whole.members_, strict=True):
        assert (a.window, a.n_features, a.grid, a.member) == (
            b.window,
            b.n_features,
            b.grid,
            b.member,
        )
        assert a.eps == (b.eps and pytest.approx(b.eps, rel=1e-4))
        assert a.centroids is None or torch.equal(a.centroids, b.centroids)
    new, wanted = (model.predict(all_images[12:]) for model in (found, whole))
    np.testing.assert_allclose(new.scores, wanted.scores, rtol=1e-4)
    for a, b in zip(new.maps, wanted.maps, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * b.max())


def test_axes_chosen_in_strips_are_those_of_one_pass(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer with more channels than vary."""
    known = (
        SMALL | TILED | {"layers": (2,), "map_layers": (), "factor_dtype": "float32", "eps": 1e-3}
    )
    monkeypatch.setattr("npad.member_fit.KEPT_VARIANCE", 0.9)
    monkeypatch.setattr("npad.strip_fit.KEPT_VARIANCE", 0.9)
    whole = NPad("filterbank", **known).fit(images, statistics=False)
    in_strips(monkeypatch, 2)
    found = NPad("filterbank", **known).fit(images, statistics=False)
    assert found.members_[0].n_features == whole.members_[0].n_features == 8
    a, b = (model.predict(images[:2]).scores for model in (found, whole))
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_an_eps_that_is_too_small_for_a_strip_begins_again(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_strips(monkeypatch, 2)
    end, failed = StripGaussians.end, []

    def too_small(strips: StripGaussians, eps: float, *rest: Any) -> None:
        if strips._done and not failed:
            failed.append(eps)
            raise SmallEpsError("eps is too small", 7 * eps)
        end(strips, eps, *rest)

    monkeypatch.setattr(StripGaussians, "end", too_small)
    known = SMALL | TILED | {"layers": (2,), "map_layers": ()}
    model = NPad("filterbank", **known).fit(images, statistics=False)
    assert model.members_[0].eps == pytest.approx(7 * failed[0])
    same = NPad("filterbank", **known, eps=model.members_[0].eps, window=model.members_[0].window)
    same.fit(images, statistics=False)
    np.testing.assert_array_equal(model.predict(images[:2]).scores, same.predict(images[:2]).scores)
    failed.clear()
    with pytest.raises(SmallEpsError, match="eps is too small"):
        NPad("filterbank", **known, eps=1e-3).fit(images, statistics=False)


def test_two_images_in_strips(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one is held out."""
    known = SMALL | TILED | {"factor_dtype": "float32"}
    whole = NPad("filterbank", **known).fit(images[:2], statistics=False)
    in_strips(monkeypatch, 2)
    found = NPad("filterbank", **known).fit(images[:2], statistics=False)
    a, b = (model.predict(images[2:4]).scores for model in (found, whole))
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_the_bad_images_of_strips(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    in_strips(monkeypatch, 2)
    with pytest.raises(ValueError, match="images are identical"):
        NPad("filterbank", **SMALL | TILED).fit(images[[0] * 5], statistics=False)
    with pytest.raises(ValueError, match="at least 2 defect-free images"):
        NPad("filterbank", **SMALL | TILED).fit(images[:1], statistics=False)


@pytest.mark.parametrize(
    ("arguments", "may"),
    [
        ({}, True),
        ({"tile": None}, False),
        ({"fusion": "sum"}, False),
        ({"gaussians": "joint"}, False),
        ({"calibration_folds": 3}, False),
        ({"roi": (0, 0, 0.5, 0.5)}, False),
        ({"rois": "{}_roi.png"}, False),
    ],
    ids=str,
)
def test_what_may_be_in_strips(arguments: dict[str, Any], may: bool) -> None:
    settings = Settings(**{"tile": 128, "image_size": 512} | arguments)
    assert settings.may_be_in_strips == may


def test_a_fit_goes_in_as_many_strips_as_memory_asks_for(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in none, where all statistics are to be kept: it is refused then, and told how."""
    known: dict[str, Any] = {"image_size": (2048, 512), "tile": 512, "progress": False}
    model = NPad("resnet18", **known)
    of_all = model.plan(20, statistics=False)
    assert of_all.n_strips == 1
    for share in (0.75, 0.6):
        free = int(share * of_all.fit_peak)
        monkeypatch.setattr(devices, "free_bytes", lambda _, free=free: free)
        plan = model.plan(20, statistics=False)
        assert plan.n_strips > 1
        assert plan.fit_peak <= free
        assert plan.to_json()["n_strips"] == plan.n_strips
        assert f"in {plan.n_strips} strips" in str(plan)
        kept = model.plan(20)
        assert (kept.n_strips, kept.fits) == (1, False)
