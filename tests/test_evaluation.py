"""Evaluating a category: figures against direct computation, bounded pictures, JSON, bad input."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from fake_model import SIZE, FakeModel, save, write_category
from PIL import Image
from sklearn import metrics as sk

from npad import NPad
from npad.evaluation import measure, metrics, results
from npad.evaluation.datasets import (
    Category,
    DatasetError,
    Sample,
    find_categories,
)
from npad.images.masks import read_mask, resample_mask

TESTS = [
    *(("good", f"{i:03}", 0, 1) for i in range(5)),
    *(("dent", f"{i:03}", 40, 1) for i in range(3)),
    *(("scratch", f"{i:03}", 6 + i, 1) for i in range(4)),
]


@pytest.fixture
def category(tmp_path):
    return find_categories(write_category(tmp_path / "plate", TESTS))[0]


@pytest.fixture
def result(category):
    return measure.evaluate(FakeModel(), category)


def direct(category, kinds):
    """Labels, scores, masks and maps of images of some types, without the measure."""
    train = np.mean([np.asarray(Image.open(p), dtype=float).mean() for p in category.train])
    chosen = [s for s in category.test if s.defect_type in kinds]
    maps = [np.abs(np.asarray(Image.open(s.path), np.float32) - np.float32(train)) for s in chosen]
    masks = [
        np.asarray(Image.open(s.mask_path)) > 0 if s.mask_path else np.zeros(SIZE, bool)
        for s in chosen
    ]
    return [s.is_anomalous for s in chosen], [float(m.max()) for m in maps], masks, maps


def test_each_category_is_measured_at_its_own_size(tmp_path):
    """By one model, fitted again: its size is that of the category, not of the one before."""
    model = NPad("filterbank", image_size="native", n_centroids=20, progress=False)
    for name, size in (("a", (64, 80)), ("b", (96, 48))):
        rng = np.random.default_rng(0)
        for i in range(4):
            for kind in ("train/good", "test/good", "test/bad"):
                save(
                    rng.integers(0, 256, size, dtype=np.uint8), tmp_path / name / kind / f"{i}.png"
                )
    for category, size in zip(find_categories(tmp_path), ((64, 80), (96, 48)), strict=True):
        category.train[0].write_bytes(b"no image")
        found = measure.evaluate(model, category, skip_bad=True, progress=False)
        assert found.metric_size == model.settings_.image_size == size
        assert found.settings["image_size"] == list(size)
        assert measure.score(model, category, progress=False).metric_size == size
    with pytest.raises(ValueError, match=r"image_size='native' .* cannot be read"):
        measure.evaluate(model, category, progress=False)


def test_figures_are_those_of_the_metrics(category, result):
    labels, scores, masks, maps = direct(category, {"good", "dent", "scratch"})
    expected = {**metrics.image_metrics(labels, scores), **metrics.pixel_metrics(masks, maps)}
    assert result.metrics == pytest.approx(expected, abs=1e-6)
    assert tuple(result.metrics) == results.METRICS
    assert [image.score for image in result.images] == pytest.approx(scores)
    assert [image.path for image in result.images] == [s.path for s in category.test]
    assert result.name == "plate"
    assert (result.n_train, result.metric_size) == (4, SIZE)


@pytest.mark.parametrize(("kind", "count"), [("dent", 3), ("scratch", 4)])
def test_a_type_is_measured_against_the_good_images(category, result, kind, count):
    labels, scores, masks, maps = direct(category, {"good", kind})
    expected = {**metrics.image_metrics(labels, scores), **metrics.pixel_metrics(masks, maps)}
    values = dict(result.types[kind])
    assert (values.pop("n_images"), values.pop("n_regions")) == (count, count)
    values.pop("n_missed")
    assert values == pytest.approx(expected, abs=1e-6)


def test_threshold_and_counts(result):
    labels = [image.is_anomalous for image in result.images]
    alarms = [image.score >= result.threshold for image in result.images]
    assert sk.f1_score(labels, alarms) == pytest.approx(result.metrics["f1_max"])
    wrong = [(label, alarm) for label, alarm in zip(labels, alarms, strict=True)]
    assert result.n_missed == wrong.count((True, False))
    assert result.n_false_alarms == wrong.count((False, True))
    assert sum(values["n_missed"] for values in result.types.values()) == result.n_missed


def test_curves_keep_their_ends_and_their_area(result):
    for name, metric in (("roc", "auroc"), ("pixel_roc", "pixel_auroc")):
        x, y = result.curves[name]
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        assert len(x) <= 200
        assert sk.auc(x, y) == pytest.approx(result.metrics[metric], abs=0.01)
    x, y = result.curves["pro"]
    assert x[-1] == results.PRO_LIMIT
    assert sk.auc(x, y) / results.PRO_LIMIT == pytest.approx(result.metrics["aupro"], abs=0.01)


def test_pictures_are_the_worst_first_and_bounded(tmp_path):
    tests = [("good", f"{i:03}", 0, 1) for i in range(30)]
    tests += [(f"type{k}", f"{i:03}", 8 * k, 1) for k in range(11) for i in range(3)]
    result = measure.evaluate(
        FakeModel(), find_categories(write_category(tmp_path / "many", tests))[0]
    )
    groups = {g: [p for p in result.pictures if p.group == g] for g in ("good", "defective")}
    good = sorted((i.score for i in result.images if not i.is_anomalous), reverse=True)
    bad = sorted(i.score for i in result.images if i.is_anomalous)
    assert [p.image.score for p in groups["good"]] == good[:8]
    assert [p.image.score for p in groups["defective"]] == bad[:8]
    assert len(result.pictures) <= 24
    assert len({p.image.path for p in result.pictures}) == len(result.pictures)
    for picture in result.pictures:
        assert (picture.levels.dtype, picture.levels.shape) == (np.uint8, SIZE)
        assert picture.mask.any() == picture.image.is_anomalous
    assert max(p.levels.max() for p in result.pictures) > 200


def test_maps_and_masks_are_brought_to_the_metric_size(tmp_path):
    tests = [("good", "000", 0, 2), ("good", "001", 0, 1), ("dent", "000", 90, 4)]
    category = find_categories(write_category(tmp_path / "plate", tests))[0]
    at_model_size = measure.evaluate(FakeModel(), category)
    assert at_model_size.metric_size == SIZE
    assert at_model_size.types["dent"]["n_regions"] == 1
    assert at_model_size.metrics["pixel_auroc"] > 0.999
    smaller = measure.evaluate(FakeModel(), category, metric_size=(12, 16))
    assert smaller.metric_size == (12, 16)
    assert smaller.pictures[0].mask.shape == (12, 16)
    mask = next(p.mask for p in smaller.pictures if p.image.is_anomalous)
    expected = np.zeros((12, 16), dtype=bool)
    expected[4:6, 4:8] = True
    np.testing.assert_array_equal(mask, expected)
    with pytest.raises(ValueError, match="metric_size must be positive, got 0 x 16"):
        measure.evaluate(FakeModel(), category, metric_size=(0, 16))


@pytest.mark.parametrize("metric_size", [None, (12, 16), (50, 31)])
def test_maps_are_resized_once_at_most(category, metric_size):
    """Not to the images' size and back, which moves values by up to 0.8 % of their range."""
    model = NPad("filterbank", image_size=(32, 64), n_centroids=50, progress=False)
    result = measure.evaluate(model, category, metric_size=metric_size)
    paths = [s.path for s in category.test]
    expected = model.predict(paths, map_size=metric_size or "model")
    size = metric_size or (32, 64)
    masks = [
        np.zeros(size, bool) if s.mask_path is None else resample_mask(read_mask(s.mask_path), size)
        for s in category.test
    ]
    assert result.metric_size == size
    pixels = metrics.pixel_metrics(masks, expected.maps)
    assert {name: result.metrics[name] for name in pixels} == pixels
    assert [image.score for image in result.images] == expected.scores.tolist()


def without_masks(category):
    return dataclasses.replace(
        category, test=[dataclasses.replace(s, mask_path=None) for s in category.test]
    )


def test_without_masks_images_are_measured_all_the_same(category, result):
    bare = measure.evaluate(FakeModel(), without_masks(category))
    assert result.has_masks
    assert not bare.has_masks
    assert bare.images == result.images
    assert bare.threshold == result.threshold
    for with_masks, without in [(result.metrics, bare.metrics), *zip(
        result.types.values(), bare.types.values(), strict=True
    )]:  # fmt: skip
        assert {n: without[n] for n in metrics.IMAGE_METRICS} == {
            n: with_masks[n] for n in metrics.IMAGE_METRICS
        }
        assert all(math.isnan(without[name]) for name in metrics.PIXEL_METRICS)
        assert without.keys() == with_masks.keys()
    assert len(bare.curves["roc"][0]) > 2
    assert len(bare.curves["pixel_roc"][0]) == len(bare.curves["pro"][0]) == 0
    assert all(picture.mask is None for picture in bare.pictures)
    assert len(bare.notes) == 1
    assert "no masks" in bare.notes[0]
    plain = json.loads(json.dumps(results.to_json([bare]), allow_nan=False))["categories"][0]
    assert not plain["has_masks"]
    assert [plain["metrics"][name] for name in metrics.PIXEL_METRICS] == [None] * 4
    assert plain["types"]["dent"]["n_regions"] is None
    assert plain["notes"] == bare.notes


def test_a_mean_over_categories_with_and_without_masks(category, result):
    bare = measure.evaluate(FakeModel(), without_masks(category))
    *_, mean = results.summarize([result, bare])
    assert mean["has_masks"]
    assert mean["aupro"] == result.metrics["aupro"]
    assert not results.summarize([bare, bare])[-1]["has_masks"]


def test_a_category_with_a_mask_for_some_defects_only(category):
    first, *others = (s for s in category.test if s.is_anomalous)
    with pytest.raises(DatasetError, match="1 of 7 defective images have none"):
        dataclasses.replace(category, test=[Sample(first.path, "dent", None), *others])


def test_score_does_not_fit(category):
    model = FakeModel()
    fitted = measure.evaluate(model, category)
    scored = measure.score(model, category)
    assert model.fits == 1
    assert math.isnan(scored.fit_seconds)
    assert fitted.fit_seconds > 0
    assert scored.metrics == fitted.metrics
    assert scored.images_per_second == len(TESTS) / scored.predict_seconds


def test_settings_and_what_was_learned(result):
    assert result.settings == {"image_size": list(SIZE), "backbone": "<fake>", "eps": "auto"}
    assert list(result.fitted) == ["mean_"]
    assert result.model_bytes is None


def test_empty_masks_are_nominal_and_noted(category):
    masks = [s.mask_path for s in category.test if s.defect_type == "scratch"]
    for path in masks:
        save(np.zeros(SIZE), path)
    result = measure.evaluate(FakeModel(), category)
    assert result.types["scratch"]["n_regions"] == 0
    assert math.isnan(result.types["scratch"]["aupro"])
    assert result.types["scratch"]["auroc"] > 0
    assert result.metrics["aupro"] > 0.9
    assert result.notes == ["4 defective images have an empty mask: their pixels count as nominal."]


@pytest.mark.parametrize("kind", ["good", "dent"])
def test_one_class_is_nan_and_null(category, kind):
    only = dataclasses.replace(category, test=[s for s in category.test if s.defect_type == kind])
    result = measure.evaluate(FakeModel(), only)
    assert math.isnan(result.metrics["auroc"])
    assert math.isnan(result.threshold)
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["metrics"]["auroc"] is None
    assert plain["threshold"] is None
    assert (result.n_missed, result.n_false_alarms) == (0, 0)


def test_bad_images_are_listed(category):
    good = next(s for s in category.test if s.defect_type == "good")
    for path in (category.train[0], good.path):
        path.rename(path.with_name("bad.png"))
    root = category.train[0].parents[2]
    (again,) = find_categories(root)
    result = measure.evaluate(FakeModel(), again, skip_bad=True)
    assert len(result.skipped) == 2
    assert all(
        path.endswith("bad.png") and reason == "cut short" for path, reason in result.skipped
    )
    assert (result.n_train, len(result.images)) == (3, len(TESTS) - 1)


def test_json_and_summary(category, result):
    other = dataclasses.replace(result, name="other", fit_seconds=math.nan, metrics={
        **result.metrics, "auroc": 0.5, "aupro": math.nan
    })  # fmt: skip
    rows = results.summarize([result, other])
    assert [row["category"] for row in rows] == ["plate", "other", "mean"]
    assert rows[-1]["auroc"] == pytest.approx((result.metrics["auroc"] + 0.5) / 2)
    assert rows[-1]["aupro"] == result.metrics["aupro"]
    assert rows[-1]["fit_seconds"] == result.fit_seconds
    assert results.summarize([]) == []
    plain = json.loads(json.dumps(results.to_json([result, other]), allow_nan=False))
    assert plain["summary"][1]["aupro"] is None
    assert plain["versions"]["numpy"] == np.__version__
    first = plain["categories"][0]
    assert first["metrics"] == pytest.approx(result.metrics)
    assert first["images"][0] == {
        "path": str(category.test[0].path),
        "defect_type": category.test[0].defect_type,
        "score": result.images[0].score,
    }
    assert first["types"]["dent"]["n_images"] == 3
    assert len(first["curves"]["pro"]["x"]) == len(first["curves"]["pro"]["y"])


def test_mask_of_another_size_names_both(category):
    sample = next(s for s in category.test if s.is_anomalous)
    save(np.ones((10, 11)) * 255, sample.mask_path)
    with pytest.raises(ValueError, match=r"is 10 x 11 pixels but .* is 24 x 32") as error:
        measure.evaluate(FakeModel(), category)
    assert str(sample.mask_path) in str(error.value)
    assert str(sample.path) in str(error.value)


def test_a_bad_mask_is_met_before_fitting(category):
    sample = next(s for s in category.test if s.is_anomalous)
    sample.mask_path.write_bytes(b"no image")
    model = FakeModel()
    with pytest.raises(ValueError, match=sample.mask_path.name):
        measure.evaluate(model, category)
    assert model.fits == 0


def test_nothing_scored(category):
    path = category.test[0].path
    path = path.rename(path.with_name("bad.png"))
    lost = Category("plate", category.train, [Sample(path, "good", None)])
    with pytest.raises(ValueError, match="plate: none of its test images could be scored"):
        measure.evaluate(FakeModel(), lost, skip_bad=True)
