"""Regions of interest: nothing outside reaches what is inside, and inside all is as if taken alone."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import fail, succeed
from PIL import Image
from scipy import ndimage
from torch import Tensor

from npad import NPad
from npad.checkpoint import Checkpoint
from npad.evaluation import metrics
from npad.features.backbone import Backbone
from npad.features.backbone import filled as padded
from npad.fitting import Fit
from npad.images.errors import ImageError
from npad.images.roi import RegionsOfInterest, is_mask, region_of_model, without_masks
from npad.members import members_of
from npad.model_file import STATISTICS_VERSION, ModelFileError, read_model, write_model
from npad.ops import reference
from npad.roi import blanked, covered, mean_color, nearest_covered, seen
from npad.scoring.scorer import Scorer, embeddings
from npad.settings import Settings

SIZE = (37, 53)  # of the model
EXTENT = (48, 64)  # whole strides of the filter bank
SMALL: dict[str, Any] = {
    "backbone": "filterbank",
    "image_size": SIZE,
    "n_centroids": 16,
    "progress": False,
}
# Numbers for all that would be chosen, and nothing rounded: what plain PyTorch can repeat.
PLAIN: dict[str, Any] = {
    **SMALL,
    "nominal_set": None,
    "window": 3,
    "eps": 1e-3,
    "holdout": 0.0,
    "factor_dtype": "float32",
    "n_features": None,
}


def pictures(n: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Of one part under noise."""
    random = np.random.default_rng(seed)
    part = np.random.default_rng(7).integers(60, 200, (*size, 3))
    return np.clip(part + random.normal(0, 15, (n, *size, 3)), 0, 255).astype(np.uint8)


def rectangle(size: tuple[int, int], top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def steps(n: int, size: tuple[int, int]) -> list[np.ndarray]:
    """A region for each image: columns from another one on, so that few look at the left ones."""
    return [np.arange(size[1])[None].repeat(size[0], 0) >= 2 + 3 * i for i in range(n)]


@pytest.fixture(autouse=True)
def quiet_borrowing() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NPad[.][a-z_]+: at .* positions", UserWarning)
        yield


# --------------------------------------------------------------------------------------------------
# Tensors.


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (7, 3), (9, 13)])
def test_nearest_covered_is_at_the_distance_that_scipy_finds(grid: tuple[int, int]) -> None:
    known = torch.rand(6, *grid) < 0.2
    known.flatten(1)[~known.flatten(1).any(1), -1] = True
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    for one, nearest in zip(known, nearest_covered(known).numpy(), strict=True):
        there = np.divmod(nearest, grid[1])
        distance = np.hypot(there[0] - row, there[1] - column)
        np.testing.assert_allclose(distance, ndimage.distance_transform_edt(~one).ravel())
        assert one.flatten()[nearest].all()


def test_nearest_covered_takes_the_first_of_several() -> None:
    known = torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 0, 1]]]).bool()
    assert nearest_covered(known).tolist() == [[0, 0, 2, 0, 0, 2, 6, 6, 8]]


@pytest.mark.parametrize("beyond", [(0, 0), (3, 0), (1, 5)])
@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 2)), ((10, 17), (4, 6)), ((5, 3), (7, 4))])
def test_covered_is_at_least_half_of_a_cell(
    size: tuple[int, int], grid: tuple[int, int], beyond: tuple[int, int]
) -> None:
    image = torch.rand(5, *size) < 0.5
    size = size[0] + beyond[0], size[1] + beyond[1]
    inside = torch.from_numpy(
        np.pad(image.numpy(), [(0, 0), (0, beyond[0]), (0, beyond[1])], mode="edge")
    )
    fine = inside.repeat_interleave(grid[0], 1).repeat_interleave(grid[1], 2).long()
    cells = fine.unflatten(1, (grid[0], size[0])).unflatten(3, (grid[1], size[1])).sum((2, 4))
    assert torch.equal(covered(image, grid, size), 2 * cells >= size[0] * size[1])


def test_half_a_cell_is_enough() -> None:
    half = torch.zeros(1, 4, 4, dtype=torch.bool)
    half[0, :, 1:3] = True
    assert covered(half, (2, 2), (4, 4)).all()
    half[0, 0, 1] = False
    assert covered(half, (2, 2), (4, 4)).tolist() == [[[False, True], [True, True]]]


def test_seen_is_what_has_no_neighbour_outside() -> None:
    inside = torch.from_numpy(rectangle((6, 7), 0, 2, 4, 5))[None]
    assert torch.equal(seen(inside)[0], torch.from_numpy(rectangle((6, 7), 0, 3, 3, 4)))
    assert seen(torch.ones(2, 1, 1, dtype=torch.bool)).all()


@pytest.mark.parametrize("mask_size", [(37, 53), (10, 17), (50, 41), (200, 301), (1, 1)])
def test_a_pixel_of_the_model_is_inside_where_the_whole_of_it_is(
    mask_size: tuple[int, int], tmp_path: Path
) -> None:
    mask = np.random.default_rng(0).random(mask_size) < 0.995
    mask[0, 0] = True
    expected = np.empty(SIZE, bool)
    for i, j in np.ndindex(SIZE):
        rows, columns = (
            slice(k * own // n, -((k + 1) * -own // n))
            for k, own, n in zip((i, j), mask_size, SIZE, strict=True)
        )
        expected[i, j] = mask[rows, columns].all()
    for given in (mask, mask.astype(np.uint8) * 255, torch.from_numpy(mask)):
        region, drawn_at = region_of_model(Settings(roi=given).roi, SIZE)
        assert (region.numpy() == expected).all()
        assert drawn_at == mask_size
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    region, _ = region_of_model(str(tmp_path / "mask.png"), SIZE)
    assert (region.numpy() == expected).all()


def test_a_rectangle_holds_the_pixels_that_lie_in_it() -> None:
    region, drawn_at = region_of_model((0.1, 1 / 3, 0.7, 0.5), (10, 12))
    assert (region.numpy() == rectangle((10, 12), 1, 4, 7, 6)).all()
    assert drawn_at == (10, 12)
    region, _ = region_of_model((0.11, 0.34, 0.68, 0.49), (10, 12))
    assert (region.numpy() == rectangle((10, 12), 2, 5, 5, 4)).all()
    assert region_of_model(None, (3, 4))[0].all()


# --------------------------------------------------------------------------------------------------
# Nothing outside changes anything inside.

OUTSIDE = [
    ("bool", (37, 53)),  # as they are
    ("bool", (50, 70)),  # made smaller, by no whole number
    ("bool", (148, 159)),
    ("uint16", (61, 83)),  # resized as floating point, in bands
    ("float32", (111, 90)),
]


@pytest.mark.parametrize(("dtype", "size"), OUTSIDE)
@pytest.mark.parametrize("own", [False, True], ids=["of the model", "of each image"])
def test_a_pixel_outside_changes_nothing_bit_by_bit(
    own: bool, dtype: str, size: tuple[int, int]
) -> None:
    """Neither what a fit learns nor a score nor a map, though every pixel outside is another."""
    n = 8
    images = pictures(n, size)
    shown = [rectangle(size, size[0] // 9, size[1] // 5, size[0] // 2, size[1] // 2)] * n
    if own:
        shown = [np.roll(mask, i, axis=1) for i, mask in enumerate(shown)]
    other = np.random.default_rng(1).integers(0, 255, images.shape, dtype=np.uint8)
    other = np.where(np.stack(shown)[..., None], images, other)
    if dtype == "uint16":
        images, other = (x.astype(np.uint16) * 257 for x in (images, other))
    elif dtype == "float32":
        images, other = (x.astype(np.float32) / 255 for x in (images, other))
    found = []
    for source in (images, other):
        model = NPad(**SMALL, roi=None if own else shown[0])
        rois = shown if own else None
        found.append((model.fit(source, rois=rois), model.predict(source, rois=rois)))
    (a, of_a), (b, of_b) = found
    assert a.roi_color_ == b.roi_color_
    for x, y in zip(a.members_, b.members_, strict=True):
        assert x.tensors().keys() == y.tensors().keys()
        assert all(torch.equal(tensor, y.tensors()[k]) for k, tensor in x.tensors().items())
    np.testing.assert_array_equal(of_a.scores, of_b.scores)
    np.testing.assert_array_equal(of_a.maps, of_b.maps)
    assert torch.equal(a.embed(images[:1]), a.embed(other[:1])) or own


# --------------------------------------------------------------------------------------------------
# Independent truth.


def truth(
    images: np.ndarray, regions: Tensor, fill: Tensor, layer: int, window: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position: whether it is known, mean and covariance, in float64 by plain PyTorch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x, _ = blanked(torch.cat([x, regions[:, None].float()], 1), torch.ones(SIZE).byte(), fill)
    beyond = (0, EXTENT[1] - SIZE[1], 0, EXTENT[0] - SIZE[0])
    x = torch.nn.functional.pad(x, beyond, mode="replicate")
    regions = torch.nn.functional.pad(regions[:, None].float(), beyond, mode="replicate")[:, 0]
    network = Backbone("filterbank")
    embeddings = network.combined(network.levels(x), (layer,), own_grid=True).double()
    _, height, width, channels = embeddings.shape
    cells = torch.stack([
        torch.nn.functional.interpolate(
            r[None, None].double().repeat_interleave(height, 2).repeat_interleave(width, 3),
            (height, width), mode="area",
        )[0, 0] for r in regions
    ])  # fmt: skip
    known = cells >= 0.5 - 1e-9
    mean = torch.full((height, width, channels), torch.nan, dtype=torch.float64)
    covariance = mean[..., None].repeat(1, 1, 1, channels)
    r = window // 2
    for i, j in np.ndindex(height, width):
        part = slice(max(0, i - r), i + r + 1), slice(max(0, j - r), j + r + 1)
        samples = embeddings[:, part[0], part[1]][known[:, part[0], part[1]]]
        if len(samples) >= 2:
            mean[i, j] = samples.mean(0)
            covariance[i, j] = samples.T.cov() + eps * torch.eye(channels)
    return known, mean, covariance


@pytest.mark.parametrize("own", [False, True], ids=["of the model", "of each image"])
def test_statistics_are_those_of_the_positions_that_are_looked_at(own: bool) -> None:
    n, images = 9, pictures(9, SIZE)
    shown = steps(n, SIZE) if own else [rectangle(SIZE, 5, 9, 21, 30)] * n
    model = NPad(**PLAIN, roi=None if own else shown[0], batch_size=4)
    model.fit(images, rois=shown if own else None)
    regions = torch.from_numpy(np.stack(shown))
    assert model.roi_color_ is not None
    fill = torch.tensor(model.roi_color_)
    inside = seen(regions)
    pixels = torch.from_numpy(images)[inside].double() / 255
    torch.testing.assert_close(fill.double(), pixels.mean(0), rtol=0, atol=1e-7)
    for learned in model.members_:
        (layer,) = learned.member.levels
        known, mean, covariance = truth(images, regions, fill, layer, 3, 1e-3)
        where = known.any(0).flatten()
        assert learned.mean is not None
        assert learned.factor is not None
        assert 0 < where.sum() < len(where) or own
        enough = where & ~mean.flatten(0, 1)[:, 0].isnan()
        torch.testing.assert_close(
            learned.mean[enough].double(), mean.flatten(0, 1)[enough], rtol=1e-5, atol=1e-6
        )
        w = reference.unpack(learned.factor, learned.channels).double()[enough]
        white = w @ covariance.flatten(0, 1)[enough] @ w.mT
        error = (white - torch.eye(learned.channels, dtype=torch.float64)).abs().max()
        assert error < 2e-3


def test_the_nominal_set_holds_what_is_looked_at_alone() -> None:
    images = pictures(6, SIZE)
    model = NPad(**SMALL | {"n_centroids": 10**6}, roi=(0.2, 0.2, 0.5, 0.5)).fit(images)
    learned = model.members_[-1]
    assert learned.centroids is not None
    assert model.roi_ is not None
    known = covered(model.roi_[None] != 0, learned.grid, EXTENT)[0]
    assert len(learned.centroids) == 6 * known.sum()
    expected = model.embed(images)[:, known].flatten(0, 1)
    found = learned.centroids
    assert (found[:, None] == expected).all(2).any(1).all()


@pytest.mark.parametrize("fusion", ["product", "sum", "mahalanobis", "euclidean"])
def test_the_score_is_the_maximum_of_the_map_inside(fusion: str) -> None:
    images = pictures(12, SIZE)
    mask = rectangle(SIZE, 4, 4, 22, 31)
    known = {"map_weight": 0.4, "map_layers": (1, 2, 3)}
    model = NPad(**SMALL, **known, roi=mask, fusion=fusion).fit(images)
    found = model.predict(images)
    for score, one in zip(found.scores, found.maps, strict=True):
        assert (np.isnan(one) == ~mask).all()
        assert score == np.float64(np.nanmax(one))
    assert len(set(found.scores)) == 12


def test_the_border_of_a_region_is_no_darker_than_its_middle() -> None:
    """Nothing of what is outside is smoothed into it: of equal distances the map is constant."""
    images = pictures(12, SIZE)
    model = NPad(**SMALL, roi=(0.3, 0.3, 0.4, 0.4), nominal_set=None).fit(images)
    scorer = model.scorer()
    assert scorer.looking is not None
    embeddings = scorer.embeddings(scorer.levels(torch.rand(1, 3, *SIZE)))
    one = {
        member.grid: torch.where(covered(model.roi_[None] != 0, member.grid, EXTENT), 2.0, 1e9)
        for member in model.members_
    }  # type: ignore[index]
    for member in scorer.members:
        member.forward = lambda x: {"mahalanobis": one[x.shape[1], x.shape[2]]}  # type: ignore[method-assign]
    scores, maps = scorer.score(embeddings)
    assert scores == pytest.approx(2.0)
    np.testing.assert_allclose(maps[~maps.isnan()], 2.0, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# Where maps are NaN.


@pytest.mark.parametrize("size", [(37, 53), (50, 71), (112, 91), (20, 30)])
def test_maps_are_nan_outside_at_any_size(size: tuple[int, int]) -> None:
    images = pictures(6, size)
    model = NPad(**SMALL, roi=(0.25, 0.0, 0.5, 0.6)).fit(images)
    found = model.predict(images)
    own = model.predict(images, map_size="model")
    assert model.roi_ is not None
    assert all((np.isnan(one) == (model.roi_ == 0).numpy()).all() for one in own.maps)
    place = [(np.arange(n) + 0.5) * m / n for n, m in zip(size, SIZE, strict=True)]
    inside = model.roi_.numpy() != 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    # Of a rectangle: a pixel by where its centre lies.
    expected = (
        ((place[0] > rows[0]) & (place[0] < rows[-1] + 1))[:, None]
        & ((place[1] > columns[0]) & (place[1] < columns[-1] + 1))[None]
    )  # fmt: skip
    for one, small in zip(found.maps, own.maps, strict=True):
        differ = (np.isnan(one) == expected).sum()
        assert differ <= 4  # corners
        assert np.nanmin(one) >= np.nanmin(small) * (1 - 1e-6)
        assert np.nanmax(one) <= np.nanmax(small) * (1 + 1e-6)


def test_an_image_with_a_region_of_its_own_beside_one_without() -> None:
    images = pictures(6, SIZE)
    model = NPad(**SMALL, roi=(0, 0, 1, 1)).fit(images)
    mask = rectangle(SIZE, 3, 20, 30, 33)
    found = model.predict(images, rois=[mask, None, mask, None, None, mask])
    alone = model.predict(images)
    for i in range(6):
        assert (np.isnan(found.maps[i]) == (~mask if i in (0, 2, 5) else False)).all()
        if i in (1, 3, 4):
            assert found.scores[i] == alone.scores[i]
    joint = NPad(**SMALL, roi=rectangle(SIZE, 0, 0, 25, 40)).fit(images)
    (one,) = joint.predict(images[:1], rois=[mask]).maps
    assert (np.isnan(one) == ~(mask & rectangle(SIZE, 0, 0, 25, 40))).all()


def test_an_own_region_scores_as_one_of_the_model_does() -> None:
    """The same embeddings, distances and map, whichever way the region comes."""
    images = pictures(8, SIZE)
    mask = rectangle(SIZE, 6, 8, 25, 33)
    of_model = NPad(**SMALL, roi=mask).fit(images)
    own = of_model.predict(images, rois=[mask] * 8)
    np.testing.assert_array_equal(own.scores, of_model.predict(images).scores)
    np.testing.assert_array_equal(own.maps, of_model.predict(images).maps)
    of_images = NPad(**SMALL).fit(images, rois=[mask] * 8)
    assert of_images.roi_color_ == of_model.roi_color_
    scores = of_images.predict(images, rois=[mask] * 8).scores
    np.testing.assert_allclose(scores, of_model.predict(images).scores, rtol=1e-5)


def test_the_whole_image_is_the_same_as_no_region() -> None:
    images = pictures(8, SIZE)
    a, b = NPad(**PLAIN).fit(images), NPad(**PLAIN, roi=(0, 0, 1, 1)).fit(images)
    np.testing.assert_allclose(a.predict(images).scores, b.predict(images).scores, rtol=1e-4)
    assert (a.roi_, a.roi_color_) == (None, None)


# --------------------------------------------------------------------------------------------------
# Few images.


def test_positions_with_too_few_images_borrow_a_wider_window() -> None:
    n = 6
    images, shown = pictures(n, SIZE), steps(n, SIZE)
    with pytest.warns(UserWarning, match=r"NPad.fit: at \d+ of 192 positions of the 12 x 16 grid"):
        model = NPad(**PLAIN | {"window": 1}).fit(images, rois=shown)
    for learned in model.members_:
        counts = covered(torch.from_numpy(np.stack(shown)), learned.grid, EXTENT).sum(0)
        lacks = counts < 2
        assert learned.borrowed == lacks.sum()
        said = f"{learned.borrowed} of a wider window for want of images"
        assert (said in str(learned)) == bool(learned.borrowed)
        if not learned.borrowed:
            continue
        assert model.roi_color_ is not None
        (layer,) = learned.member.levels
        row, column = (int(k[0]) for k in lacks.nonzero(as_tuple=True))
        for window in range(3, 99, 2):  # the narrowest with two samples
            r = window // 2
            near = counts[max(0, row - r) : row + r + 1, max(0, column - r) : column + r + 1]
            if near.sum() >= 2:
                break
        _, mean, _ = truth(
            images,
            torch.from_numpy(np.stack(shown)),
            torch.tensor(model.roi_color_),
            layer,
            window,
            1e-3,
        )
        assert learned.mean is not None
        torch.testing.assert_close(
            learned.mean.unflatten(0, learned.grid)[row, column].double(), mean[row, column],
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip
    assert NPad(**PLAIN, roi=(0, 0, 1, 1)).fit(images).members_[0].borrowed == 0


def test_one_image_borrows_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2 defect-free images"):
        NPad(**PLAIN, roi=(0, 0, 1, 1)).fit(pictures(1, SIZE))


@pytest.mark.parametrize(
    "known", [{}, {"n_features": 6}, {"fusion": "sum"}, {"gaussians": "joint"}]
)
def test_all_that_is_chosen_is_chosen_inside(known: dict[str, Any]) -> None:
    """Windows, eps, axes and standardisation, of images that each show something else."""
    images, shown = pictures(12, SIZE), steps(12, SIZE)
    model = NPad(**SMALL, **known, roi=(0.1, 0.0, 0.8, 0.9)).fit(images, rois=shown)
    found = model.predict(images, rois=shown)
    assert np.isfinite(found.scores).all()
    garbage = np.where(np.stack(shown)[..., None], images, 255).astype(np.uint8)
    again = NPad(**SMALL, **known, roi=(0.1, 0.0, 0.8, 0.9)).fit(garbage, rois=shown)
    assert str(again.members_) == str(model.members_)
    assert again.standardization_ == model.standardization_


# --------------------------------------------------------------------------------------------------
# Fits that are merged, or go on.


PLAIN_NETWORK = Backbone("filterbank")
PLAIN_MEMBERS = members_of(Settings(**PLAIN), [PLAIN_NETWORK])


def fit_of(roi: Tensor | None) -> Fit:
    return Fit(Settings(**PLAIN), PLAIN_MEMBERS, roi, EXTENT)


def embed(x: Tensor) -> list[Tensor]:
    levels = PLAIN_NETWORK.levels(padded(x, EXTENT))
    return [PLAIN_NETWORK.combined(levels, m.levels, own_grid=m.own_grid) for m in PLAIN_MEMBERS]


def add(fit: Fit, batch: Tensor) -> Fit:
    return fit.update(fit.embed(embed, batch), batch)


def batch_of(images: np.ndarray, shown: list[np.ndarray]) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return torch.cat([x, torch.from_numpy(np.stack(shown))[:, None].float()], 1)


def test_parts_that_are_merged_or_taken_up_again_are_the_whole() -> None:
    n = 9
    batch = batch_of(pictures(n, SIZE), steps(n, SIZE))
    roi = region_of_model((0.1, 0.1, 0.8, 0.8), SIZE)[0]
    whole = add(fit_of(roi), batch)
    first, second = fit_of(roi), fit_of(roi)
    assert whole.fill is not None
    first.fill = second.fill = whole.fill
    add(first, batch[:4])
    add(second, batch[4:7])
    values, tensors = second.state()
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert Fit.expected(values) == kinds
    second = Fit.from_state(json.loads(json.dumps(values)), tensors)
    add(second, batch[7:])
    first.merge(second.copied(torch.device("cpu")))
    for a, b in zip(whole.finalize().members, first.finalize().members, strict=True):
        assert a.borrowed == b.borrowed
        assert a.mean is not None
        assert b.mean is not None
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-5, atol=1e-6)
        for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


def test_fits_of_other_regions_are_not_merged() -> None:
    batch = batch_of(pictures(4, SIZE), steps(4, SIZE))
    a, b = (region_of_model((0, 0, 1, x), SIZE)[0] for x in (1.0, 0.9))
    for first, second in ((a, b), (a, None), (None, a)):
        fits = [
            add(fit_of(roi), batch if roi is not None else batch[:, :3]) for roi in (first, second)
        ]
        with pytest.raises(ValueError, match="different regions of interest"):
            fits[0].merge(fits[1])
    fits = [add(fit_of(a), part) for part in (batch[:2], batch[2:])]
    with pytest.raises(ValueError, match=r"different colours outside .* with partial_fit"):
        fits[0].merge(fits[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fill", None), ("fill", [0.1, 0.2]), ("fill", [0.1, 0.2, 3.0]), ("fill", "red"),
        ("extent", [10, 10]), ("extent", [48]),
    ],
)  # fmt: skip
def test_a_state_of_no_region_is_refused(name: str, value: Any) -> None:
    batch = batch_of(pictures(4, SIZE), steps(4, SIZE))
    fit = add(fit_of(region_of_model((0.1, 0.1, 0.8, 0.8), SIZE)[0]), batch)
    values, tensors = fit.state()
    with pytest.raises((KeyError, TypeError, ValueError)):
        Fit.from_state(values | {name: value}, tensors)
    with pytest.raises(ValueError, match="roi is empty"):
        Fit.from_state(values, tensors | {"roi": torch.zeros(SIZE, dtype=torch.uint8)})


def test_a_file_whose_statistics_are_of_no_such_region_is_refused(tmp_path: Path) -> None:
    model = NPad(**SMALL, roi=(0.1, 0.1, 0.8, 0.8)).fit(pictures(4, SIZE))
    path = tmp_path / "m.npad"
    model.save(path, statistics=True)
    header, tensors = read_model(path)

    def refused(message: str, tensors: dict[str, Tensor] = tensors, **changed: Any) -> None:
        statistics = header["statistics"] | changed
        write_model(path, header | {"statistics": statistics}, tensors, version=STATISTICS_VERSION)
        with pytest.raises(ModelFileError, match=message):
            NPad.load(path)

    refused("statistics.*in another colour", fill=[0.1, 0.2, 0.3])
    refused("statistics.*fill is", fill=[0.1, 0.2, 3.0])
    refused("statistics.*extent is", extent=[10, 10])
    refused("statistics.roi", roi=False)
    refused("statistics.roi", {k: x for k, x in tensors.items() if k != "statistics.roi"})
    refused("statistics.roi", tensors | {"statistics.roi": tensors["roi"][1:].clone()})
    refused("statistics.*roi is empty", tensors | {"statistics.roi": 0 * tensors["roi"]})


# --------------------------------------------------------------------------------------------------
# Models that go on, are continued after a kill, or calibrate themselves.


def same(a: NPad, b: NPad) -> None:
    """Bit by bit."""
    assert a.roi_color_ == b.roi_color_
    for x, y in zip(a.members_, b.members_, strict=True):
        assert x.to_json() == y.to_json()
        assert all(torch.equal(tensor, y.tensors()[k]) for k, tensor in x.tensors().items())


@pytest.mark.parametrize("known", [{}, {"n_features": 5}, {"fusion": "sum", "holdout": 0.3}])
def test_a_model_with_a_region_goes_on(known: dict[str, Any], tmp_path: Path) -> None:
    """What is outside changes nothing, and the Gaussians are those of one fit with its colour."""
    first, more, shown = pictures(9, SIZE), pictures(7, SIZE, 1), steps(9, SIZE)
    arguments = {**SMALL, **known, "roi": (0.1, 0.0, 0.8, 0.9)}
    model = NPad(**arguments).fit(first, rois=shown)
    model.save(tmp_path / "m.npad", statistics=True)
    loaded = NPad.load(tmp_path / "m.npad")
    garbage = np.where(np.stack(shown[:7])[..., None], more, 255).astype(np.uint8)
    model.partial_fit(more, rois=shown[:7])
    loaded.partial_fit(garbage, rois=shown[:7])
    same(model, loaded)
    assert model.n_images_ == 16
    assert torch.equal(model.roi_, loaded.roi_)
    found = loaded.predict(more, rois=shown[:7])
    assert np.isfinite(found.scores).all()
    assert (np.isnan(found.maps[3]) >= ~shown[3]).all()
    model.shrink("float16" if not known else None)
    other = NPad(**arguments).fit(more, rois=shown[:7])
    with pytest.raises(ValueError, match=r"NPad\.merge: .* different colours"):
        loaded.merge(other)
    with pytest.raises(ValueError, match=r"NPad\.merge: .* different regions"):
        loaded.merge(NPad(**arguments | {"roi": None}).fit(first))


def test_partial_fit_is_one_fit_where_the_colour_is_the_same() -> None:
    """Of a stream, the first batch chooses it."""
    images, mask = pictures(16, SIZE), rectangle(SIZE, 5, 9, 21, 30)
    known = {**SMALL, "roi": mask, "nominal_set": None, "batch_size": 8}
    whole = NPad(**known).fit(images[i : i + 8] for i in (0, 8))
    parts = NPad(**known).fit(iter([images[:8]])).partial_fit(images[8:])
    same(whole, parts)


def test_partial_fit_tells_of_positions_with_too_few_images() -> None:
    images, shown = pictures(4, SIZE), steps(4, SIZE)
    model = NPad(**SMALL, roi=(0, 0, 1, 1), window=1, eps=0.01).fit(images, rois=shown)
    with pytest.warns(UserWarning, match=r"NPad\.partial_fit: at \d+ of \d+ positions") as caught:
        model.partial_fit(pictures(1, SIZE, 1), rois=[shown[3]])
    assert len(caught) == sum(member.borrowed > 0 for member in model.members_)
    assert all(one.filename == __file__ for one in caught)


class KilledError(Exception):
    """In the place of a kill."""


def stop(folder: Path, path: Path, **known: Any) -> None:
    """Fit until four images are written down."""

    def write(self: Checkpoint, fit: Fit, position: int) -> None:
        original(self, fit, position)
        if fit.n_images >= 4:
            raise KilledError

    original = Checkpoint.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write", write)
        with pytest.raises(KilledError):
            NPad(**SMALL, batch_size=2, **known).fit(folder, checkpoint=path, every=2)


@pytest.mark.parametrize("known", [{}, {"n_features": 5, "fusion": "sum"}])
def test_a_fit_with_regions_goes_on_where_it_was(
    known: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    known |= {"rois": "{}_roi.png", "roi": (0, 0, 0.9, 1)}
    path = tmp_path / "checkpoint"
    stop(folder, path, **known)
    model = NPad(**SMALL, batch_size=2, **known).fit(folder, checkpoint=path)
    expected = NPad(**SMALL, batch_size=2, **known).fit(folder)
    same(model, expected)
    assert model.fingerprints_ == expected.fingerprints_
    assert torch.equal(model.roi_, expected.roi_)
    before = path.read_bytes()
    for others, message in (
        ({"roi": None}, "is of a fit with another roi"),
        ({"roi": (0, 0, 0.8, 1)}, "is of a fit with another roi"),
        ({"rois": None}, "other settings: rois is None in one and '{}_roi.png' in the other"),
    ):
        with pytest.raises(ModelFileError, match=message):
            NPad(**SMALL, batch_size=2, **known | others).fit(
                [folder / f"{i}.png" for i in range(6)], checkpoint=path
            )
    with pytest.raises(ValueError, match=r"NPad\.fit: checkpoint needs the regions .* masks"):
        NPad(**SMALL).fit(folder, rois=[None] * 12, checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("own", [False, True], ids=["of the model", "of each image"])
@pytest.mark.parametrize("known", [{"n_features": None}, {"fusion": "sum", "holdout": 0.3}])
def test_folds_look_where_the_model_does(own: bool, known: dict[str, Any]) -> None:
    """Each image is scored by a model of the other folds, and what is outside counts nowhere."""
    images, mask = pictures(13, SIZE), rectangle(SIZE, 4, 4, 22, 31)
    shown = [np.roll(mask, i, axis=1) for i in range(13)] if own else [mask] * 13
    roi, rois = ((0, 0, 0.6, 1), shown) if own else (mask, None)
    arguments = {
        **SMALL, "window": 3, "eps": 0.01, "n_centroids": 10**6, "factor_dtype": "float32",
        "roi": roi, "false_alarm_rate": 0.2, **known,
    }  # fmt: skip
    folds = 4 if "fusion" in known else 13
    model = NPad(**arguments, calibration_folds=folds).fit(images, rois=rois)
    garbage = np.where(np.stack(shown)[..., None], images, 255).astype(np.uint8)
    again = NPad(**arguments, calibration_folds=folds).fit(garbage, rois=rois)
    found = model.calibration_
    assert found is not None
    assert again.calibration_ is not None
    np.testing.assert_array_equal(found.scores, again.calibration_.scores)
    np.testing.assert_array_equal(found.map_maxima, again.calibration_.map_maxima)
    same(model, NPad(**arguments).fit(images, rois=rois))
    for i in () if "fusion" in known else (0, 5, 12):
        others = [j for j in range(13) if j != i]
        of_others = Fit(model.settings_, [m.member for m in model.members_], model.roi_, EXTENT)
        assert model.roi_color_ is not None
        of_others.fill = torch.tensor(model.roi_color_)  # that of all images
        batch = batch_of(images[others], [shown[j] for j in others])
        fit_all(of_others, batch)
        scorer = Scorer([PLAIN_NETWORK], of_others.finalize(last=True), model.settings_)
        score, one = scorer(batch_of(images[i : i + 1], shown[i : i + 1]))
        np.testing.assert_allclose(found.scores[i], score[0], rtol=1e-4)
        np.testing.assert_allclose(found.map_maxima[i], np.nanmax(one.numpy()), rtol=1e-4)


def fit_all(fit: Fit, batch: Tensor) -> None:
    members = [part.member for part in fit.members]

    def embed(x: Tensor) -> list[Tensor]:
        return embeddings(members, [PLAIN_NETWORK], [PLAIN_NETWORK.levels(padded(x, EXTENT))])

    fit.update(fit.embed(embed, batch), batch)


# --------------------------------------------------------------------------------------------------
# Files, copies, export.


def test_a_model_file_holds_the_region(tmp_path: Path) -> None:
    images = pictures(6, SIZE)
    path = tmp_path / "mask.png"
    Image.fromarray(rectangle((74, 106), 10, 10, 40, 60)).save(path)
    model = NPad(**SMALL, roi=path).fit(images)
    path.unlink()
    expected = model.predict(images)
    model.save(tmp_path / "m.npad")
    loaded = NPad.load(tmp_path / "m.npad")
    assert torch.equal(loaded.roi_, model.roi_)
    assert loaded.settings() == model.settings()
    assert "roi" not in model.settings()
    for other in (
        loaded,
        pickle.loads(pickle.dumps(loaded)),
        NPad.load(tmp_path / "m.npad").fit(images),
    ):
        np.testing.assert_array_equal(other.predict(images).maps, expected.maps)
    assert model.nbytes == loaded.nbytes


def test_the_scorer_holds_the_region() -> None:
    images = pictures(8, SIZE)
    model = NPad(**SMALL, roi=(0.2, 0.2, 0.5, 0.6)).fit(images)
    scorer, batch = model.scorer(), torch.rand(3, 3, *SIZE)
    other = NPad(**SMALL, roi=(0.1, 0.1, 0.5, 0.5)).fit(images).scorer()
    expected = scorer(batch)
    assert not torch.equal(other(batch)[0], expected[0])
    if {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in scorer.state_dict().items()
    }:
        other.load_state_dict(scorer.state_dict())
        for a, b in zip(other(batch), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    exported = torch.export.export(
        scorer, (batch,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
    )
    for a, b in zip(exported.module()(batch[:2]), scorer(batch[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    scores, _ = model.score(batch)
    assert torch.equal(scores, expected[0])
    own = torch.cat([batch, torch.ones(3, 1, *SIZE)], 1)
    assert torch.equal(model.score(own)[0], scores)


def test_decisions_rest_on_what_is_inside(tmp_path: Path) -> None:
    images, others = pictures(8, SIZE), pictures(12, SIZE, 1)
    mask = rectangle(SIZE, 6, 8, 25, 33)
    model = NPad(**SMALL, roi=mask, false_alarm_rate=0.2).fit(images).calibrate(others)
    assert model.calibration_ is not None
    expected = [np.nanmax(one) for one in model.predict(others).maps]
    assert model.calibration_.map_maxima.tolist() == expected
    spoiled = pictures(3, SIZE, 2)
    spoiled[:, :4] = 255  # outside
    spoiled[1, 15:20, 20:25] = 255
    found = model.predict(spoiled)
    assert found.labels.tolist() == (found.scores > model.threshold_).tolist()
    assert found.labels[1]
    assert found.masks[1].any()
    assert not any(marked[~mask].any() for marked in found.masks)
    own = NPad(**SMALL, roi=(0, 0, 1, 1), false_alarm_rate=0.2).fit(images)
    own.calibrate(others, rois=[mask] * 12)
    assert own.predict(spoiled, rois=[mask] * 3).labels[1]
    with pytest.warns(UserWarning, match="8 of 12 images were fitted"):
        own.calibrate(np.concatenate([images, others[:4]]), rois=[mask] * 12)


# --------------------------------------------------------------------------------------------------
# Masks beside images, and the command line.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_parts(tmp_path / "parts", 0)


def save_parts(root: Path, seed: int) -> Path:
    (root / "masks").mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(pictures(6, SIZE, seed), steps(6, SIZE), strict=True)):
        Image.fromarray(image).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_roi.png")
    return root


def test_masks_beside_images_are_their_regions_and_no_images(folder: Path, tmp_path: Path) -> None:
    beside = NPad(**SMALL, rois="{}_roi.png").fit(folder)
    expected = NPad(**SMALL).fit(pictures(6, SIZE), rois=steps(6, SIZE))
    assert beside.n_images_ == 6
    found = beside.predict(folder)
    assert [Path(path).name for path in found.paths] == [f"{i}.png" for i in range(6)]
    np.testing.assert_array_equal(
        found.scores, expected.predict(pictures(6, SIZE), rois=steps(6, SIZE)).scores
    )
    beside.save(tmp_path / "m.npad")
    loaded = NPad.load(tmp_path / "m.npad")
    np.testing.assert_array_equal(loaded.predict(folder).maps, found.maps)
    assert torch.equal(loaded.embed(folder), loaded.embed([folder / f"{i}.png" for i in range(6)]))
    listed = loaded.predict(pictures(6, SIZE), rois=[folder / f"{i}_roi.png" for i in range(6)])
    np.testing.assert_array_equal(listed.scores, found.scores)
    for i in range(6):
        (folder / f"{i}_roi.png").rename(folder / "masks" / f"{i}.png")
    loaded.rois = "masks/{}.png"
    images = [folder / f"{i}.png" for i in range(6)]
    np.testing.assert_array_equal(loaded.predict(images).scores, found.scores)


def test_without_masks_leaves_images_alone() -> None:
    paths = [Path(name) for name in ("a.png", "a_roi.png", "b_roi.png", "c.jpg", "c_roi.png")]
    assert [p.name for p in without_masks(paths, "{}_roi.png")] == ["a.png", "b_roi.png", "c.jpg"]
    assert without_masks(paths, None) == paths


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    small = ("--backbone", "filterbank", "--image-size", "37x53", "--n-centroids", "16")
    model, out = tmp_path / "m.npad", tmp_path / "out"
    done = succeed("fit", folder, "-o", model, *small, "--rois", "{}_roi.png", "--roi", "0,0,0.8,1")
    assert "6 images" in done.out
    assert "of a wider window for want of images" in done.out
    succeed("predict", model, folder, "-o", out, "--maps")
    expected = NPad.load(model).predict(folder)
    assert len(list((out / "overlays").rglob("*.png"))) == 6
    for path, one in zip(expected.paths, expected.maps, strict=True):
        with Image.open(out / "maps" / f"{Path(path).name}.tiff") as written:
            np.testing.assert_array_equal(np.asarray(written), one)
    rate = ("--false-alarm-rate", "0.3", "--group-by-folder")
    learned = NPad.load(model).members_
    info = json.loads(succeed("info", model, "--json").out)
    assert info["members"] == [str(member) for member in learned]
    assert info["positions with too few images"] == sum(m.borrowed for m in learned) > 0
    assert info["share of the image that is looked at"] == round(29 / 37, 4)
    assert all(str(member) in succeed("info", model).out for member in learned)
    fail(1, "info", folder / "0.png", says=["0.png: is not an npad model file"])
    calibrated = tmp_path / "calibrated.npad"
    save_parts(tmp_path / "others", 1)
    done = succeed("calibrate", model, tmp_path / "others", "-o", calibrated, *rate)
    assert "6 nominal images" in done.out
    said = ("-o", out, "--masks", "--group-by-folder")
    succeed("predict", calibrated, tmp_path / "others", *said)
    assert len(list((out / "masks").rglob("*.png"))) == 6
    (folder / "3_roi.png").unlink()
    fail(
        1,
        "predict",
        model,
        folder,
        "-o",
        out,
        says=["3_roi.png: there is no such file, the region of"],
    )
    done = succeed("predict", model, folder, "-o", out, "--skip-bad")
    assert "3_roi.png" in done.err
    fail(2, "fit", folder, "-o", model, "--roi", "none.png", says=["there is no file none.png"])
    fail(2, "fit", folder, "-o", model, "--roi", "0,0,100,100", says=["--roi must be", "fractions"])
    fail(2, "fit", folder, "-o", model, "--rois", "roi", says=["--rois must be a pattern"])
    fail(
        1,
        "fit",
        folder,
        "-o",
        model,
        *small,
        "--roi",
        "0,0,0.001,1",
        says=["--roi must leave something"],
    )


@pytest.mark.parametrize("size", [(37, 53), (61, 90)])
def test_maps_in_files_are_those_of_the_model(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, image in enumerate(pictures(5, size)):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    model = NPad(**SMALL, roi=(0.1, 0.2, 0.6, 0.5)).fit(tmp_path / "in")
    model.save(tmp_path / "m.npad")
    succeed("predict", tmp_path / "m.npad", tmp_path / "in", "-o", tmp_path / "out", "--maps")
    found = model.predict(tmp_path / "in")
    for path, one in zip(found.paths, found.maps, strict=True):
        with Image.open(tmp_path / "out/maps" / f"{Path(path).name}.tiff") as written:
            np.testing.assert_array_equal(np.asarray(written), one)


def test_pixels_outside_are_not_measured() -> None:
    random = np.random.default_rng(0)
    maps = random.random((3, 8, 9))
    masks = random.random((3, 8, 9)) < 0.3
    known = rectangle((8, 9), 2, 0, 6, 9)
    found = metrics.pixel_metrics(masks, np.where(known, maps, np.nan))
    assert found == metrics.pixel_metrics(masks[:, 2:], maps[:, 2:])


# --------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    "roi",
    [
        "", 3, 0.5, True, b"m.png", [0.1, 0.2, 0.3], (0, 0, 100, 100), (0.5, 0, 0.6, 1), (0, 0, 0, 1),
        (-0.1, 0, 1, 1), (0, 0, float("nan"), 1), (0, 0, "1", 1), (0, 0, True, 1), {"top": 0},
        np.ones((4, 4)), np.ones((4, 4), np.int64), np.ones((4, 4, 3), bool), np.ones((0, 4), bool),
        np.ones(4, bool), torch.ones(4, 4), [[True, False]],
    ],
)  # fmt: skip
def test_what_is_no_region_is_refused(roi: Any) -> None:
    with pytest.raises(ValueError, match=r"NPad: roi must be the path .* in fractions of the"):
        NPad(roi=roi)


@pytest.mark.parametrize("rois", ["", "_roi.png", "{}{}.png", 3, ["{}.png"], ("a", "b"), b"{}.png"])
def test_what_is_no_pattern_is_refused(rois: Any) -> None:
    with pytest.raises(ValueError, match=r"NPad: rois must be a pattern such as '\{\}_roi.png'"):
        NPad(rois=rois)


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        (np.zeros(SIZE, bool), "NPad: roi must leave something"),
        ((0.5, 0.5, 0.001, 0.3), "NPad: roi must leave something: no pixel of an image of 37 x 53"),
        (
            rectangle(SIZE, 3, 3, 4, 40),
            r"roi must leave something: it covers .* of the 3 x 4 grid",
        ),
        (
            np.ones((53, 37), bool),
            r"a mask of 53 x 37 pixels, and image\[0\] has 74 x 106",
        ),
        (
            np.ones((20, 20), bool),
            "roi must have the aspect of all images: it is a mask of 20 x 20",
        ),
        ("no.png", "no.png: cannot be read: No such file"),
    ],
)
def test_a_region_that_does_not_work_is_named(roi: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPad(**SMALL, roi=roi).fit(pictures(4, (74, 106)))


def test_a_file_that_is_no_mask_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"mask\.png"):
        NPad(**SMALL, roi=path).fit(pictures(4, SIZE))


@pytest.mark.parametrize(
    ("rois", "message"),
    [
        ([None] * 3, "rois must be one for each of 4 images, got 3"),
        ([np.zeros(SIZE, bool)] * 4, r"rois\[0\]: this region leaves nothing of image\[0\]"),
        (
            [None, np.ones((53, 37), bool), None, None],
            r"rois\[1\]: a region of 53 x 37 pixels, of another",
        ),
        ([np.ones(SIZE)] * 4, r"rois\[0\]: a region must be .* got float64 of shape \(37, 53\)"),
        ([np.ones((*SIZE, 3), bool)] * 4, r"rois\[0\]: a region must be .* got bool of shape"),
        ([3, None, None, None], r"rois\[0\]: a region must be the path of a mask"),
        (["no.png", None, None, None], r"no.png: there is no such file, the region of image\[0\]"),
        (
            "{}_roi.png",
            r"image\[0\]: the model looks for a mask at \{\}_roi.png, beside each image",
        ),
    ],
)
def test_own_regions_that_do_not_work_are_named(rois: Any, message: str) -> None:
    images = pictures(4, SIZE)
    with pytest.raises(ValueError, match=message):
        NPad(**SMALL).fit(images, rois=rois)
    model = NPad(**SMALL, roi=(0, 0, 1, 1)).fit(images)
    with pytest.raises(ValueError, match=message):
        model.predict(images, rois=rois)


def test_an_image_that_is_its_own_mask_is_named(folder: Path) -> None:
    with pytest.raises(ImageError, match=r"rois=\{\}\.png makes the image its own mask"):
        NPad(**SMALL, rois="{}.png").fit([folder / "0.png", folder / "1.png"])


def test_a_bad_region_skips_its_image() -> None:
    images, rois = pictures(5, SIZE), [None, np.zeros(SIZE, bool), None, None, None]
    model = NPad(**SMALL, roi=(0, 0, 1, 1)).fit(images, rois=rois, skip_bad=True)
    assert model.n_images_ == 4
    ((name, reason),) = model.skipped_
    assert name == "rois[1]"
    assert "leaves nothing" in reason


def test_a_stream_has_no_list_of_regions() -> None:
    with pytest.raises(ValueError, match="a stream has none"):
        NPad(**SMALL).fit(iter([pictures(4, SIZE)]), rois=[None] * 4)
    batches = [pictures(4, SIZE), pictures(4, SIZE, 1)]
    model = NPad(**SMALL, roi=(0.1, 0.1, 0.8, 0.8)).fit(iter(batches))
    assert model.n_images_ == 8
    assert model.roi_ is not None
    first = torch.from_numpy(batches[0]).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(torch.tensor(model.roi_color_), mean_color([first], model.roi_))


def test_regions_of_images_need_a_model_of_regions() -> None:
    images = pictures(4, SIZE)
    model = NPad(**SMALL).fit(images)
    for known in ({"rois": [None] * 4}, {}):
        model.rois = None if known else "{}_roi.png"
        with pytest.raises(ValueError, match=r"NPad: rois must be left out .* roi=\(0, 0, 1, 1\)"):
            model.predict(images, **known)
    with pytest.raises(ValueError, match=r"\(B, 3, 37, 53\)"):
        model.score(torch.rand(1, 4, *SIZE))


def test_regions_are_checked_before_the_work() -> None:
    roi = torch.from_numpy(rectangle((8, 8), 3, 3, 2, 2).astype(np.uint8))
    with pytest.raises(ValueError, match="it covers half of no position of the 2 x 2 grid"):
        RegionsOfInterest(roi, grids=[(2, 2)], extent=(8, 8))


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("in/a_roi.png", "{}_roi.png", True),
        ("a_roi.png", "{}_roi.png", True),
        ("in/a.png", "{}_roi.png", False),
        ("in/_roi.png", "{}_roi.png", False),
        ("in/rois/a.png", "rois/{}.png", True),
        ("in/other/a.png", "rois/{}.png", False),
        ("in/a+roiXpng", "{}+roi.png", False),
    ],
)
def test_is_mask_goes_by_the_pattern_alone(path: str, pattern: str, expected: bool) -> None:
    assert is_mask(path, pattern) == expected
