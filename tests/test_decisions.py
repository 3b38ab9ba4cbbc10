"""Calibrated models: what follows from the scores of nominal images that were not fitted."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npad import NPad, Prediction
from npad.calibration import UnknownGroupError
from npad.model_file import ModelFileError, read_model, write_model
from npad.scoring.decisions import Decisions, NotCalibratedError
from npad.scoring.regions import Region, find_regions

SIZE = (24, 32)


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, *SIZE, 3), dtype=np.uint8)


FITTED, NOMINAL, NEW = images(15, 0), images(29, 1), images(40, 2)


def new(**arguments: object) -> NPad:
    small = {"image_size": SIZE, "n_centroids": 8, "false_alarm_rate": 0.1, "progress": False}
    return NPad("filterbank", **{**small, **arguments})


@pytest.fixture(scope="module")
def fitted() -> NPad:
    return new().fit(FITTED)


@pytest.fixture
def model(fitted: NPad) -> NPad:
    return copy.copy(fitted)


@pytest.fixture(scope="module")
def scores(fitted: NPad) -> dict[str, np.ndarray]:
    """Of the images above, by a model that was not calibrated."""
    return {"nominal": fitted.predict(NOMINAL).scores, "new": fitted.predict(NEW).scores}


def maxima(model: NPad, source: np.ndarray) -> np.ndarray:
    return np.array([m.max() for m in model.predict(source, map_size="model").maps], float)


def test_p_values_and_labels(model: NPad, scores: dict[str, np.ndarray]) -> None:
    assert model.calibrate(NOMINAL) is model
    found = model.predict(NEW)
    assert np.array_equal(found.scores, scores["new"])
    higher = (scores["nominal"][None] >= scores["new"][:, None]).sum(1)
    np.testing.assert_allclose(found.p_values, (1 + higher) / 30, rtol=1e-15)
    assert model.threshold_ == np.sort(scores["nominal"])[-3]
    assert np.array_equal(found.labels, found.p_values <= 0.1)
    assert np.array_equal(found.labels, scores["new"] > model.threshold_)
    assert 0 < found.labels.sum() < 20


def test_masks_of_a_nominal_image_are_empty_at_the_rate(model: NPad) -> None:
    model.calibrate(NOMINAL)
    of_nominal = maxima(model, NOMINAL)
    assert model.map_threshold_ == np.sort(of_nominal)[-3]
    for size in ("model", "image", (7, 11), (50, 100)):
        found = model.predict(NOMINAL, map_size=size)
        assert np.array_equal(found.map_maxima, of_nominal)
        marked = [mask.any() for mask in found.masks]
        assert [m.shape for m in found.masks] == [m.shape for m in found.maps]
        assert not np.any(marked & (of_nominal <= model.map_threshold_))
    assert sum(m.any() for m in model.predict(NOMINAL, map_size="model").masks) == 2


def test_with_confidence_the_threshold_is_a_higher_one(
    model: NPad, scores: dict[str, np.ndarray]
) -> None:
    model.calibrate(NOMINAL)
    model.confidence = 0.95
    # 1 - 0.9^29 = 0.953: of all, only the highest holds.
    assert model.threshold_ == scores["nominal"].max()
    assert not model.predict(NOMINAL).labels.any()
    model.confidence = 0.96
    with pytest.raises(ValueError, match="needs 31 nominal images"):
        model.predict(NEW)


def test_the_rate_can_change_afterwards(model: NPad, scores: dict[str, np.ndarray]) -> None:
    model.calibrate(NOMINAL)
    model.false_alarm_rate = 0.2
    assert model.threshold_ == np.sort(scores["nominal"])[-6]
    model.false_alarm_rate = 0.01
    with pytest.raises(ValueError, match=r"0\.01 needs 99 nominal images.* got 29"):
        model.predict(NEW)
    with pytest.raises(ValueError, match="false_alarm_rate must be a number"):
        model.set_params(false_alarm_rate=0).predict(NEW)


def test_groups_have_thresholds_of_their_own(model: NPad, scores: dict[str, np.ndarray]) -> None:
    groups = ["left"] * 15 + [7] * 14
    model.calibrate(NOMINAL, groups=groups)
    left, right = scores["nominal"][:15], scores["nominal"][15:]
    assert model.threshold_ == {"left": np.sort(left)[-1], 7: np.sort(right)[-1]}
    of_new = [("left", 7)[i % 2] for i in range(len(NEW))]
    found = model.predict(NEW, groups=of_new)
    for group, nominal in (("left", left), (7, right)):
        own = np.array(of_new, dtype=object) == group
        higher = (nominal[None] >= scores["new"][own][:, None]).sum(1)
        np.testing.assert_allclose(found.p_values[own], (1 + higher) / (len(nominal) + 1))
        assert np.array_equal(found.labels[own], scores["new"][own] > model.threshold_[group])
        alone = model.predict(NEW[own], groups=group)
        assert np.array_equal(alone.p_values, found.p_values[own])
    assert set(model.map_threshold_) == {"left", 7}
    stream = (batch for batch in np.split(NEW, 4))
    assert np.array_equal(
        model.predict(stream, groups=7).p_values, model.predict(NEW, groups=7).p_values
    )


def test_groups_follow_their_images_past_a_bad_file(model: NPad, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, NEW, strict=False):
        Image.fromarray(image).save(path)
    paths[1].write_bytes(b"no image")
    model.calibrate(NOMINAL, groups=["a"] * 15 + ["b"] * 14)
    groups = ["a", "a", "b", "a", "b", "b"]
    found = model.predict(paths, groups=groups, skip_bad=True)
    whole = model.predict(NEW[:6], groups=groups)
    assert np.array_equal(found.p_values, np.delete(whole.p_values, 1))
    assert np.array_equal(found.decisions.thresholds, np.delete(whole.decisions.thresholds, 1))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, r"calibrated in groups \('a', 'b'\); say with groups="),
        ("c", "there is no group 'c'"),
        (["a"] * 39 + ["c"], "there is no group 'c'"),
        (["a"], "groups has 1 entries for 40 images"),
        (3.5, "groups must be a text"),
        (True, "groups must be a text"),
        ("", "groups must be a text"),
        ([None] * 40, "groups must be a text"),
        ({"a": 1}, "groups must be a text"),
    ],
)
def test_groups_that_are_none(model: NPad, groups: object, message: str) -> None:
    model.calibrate(NOMINAL, groups=["a"] * 15 + ["b"] * 14)
    with pytest.raises(ValueError, match=message):
        model.predict(NEW, groups=groups)
    if isinstance(groups, list) and len(groups) > 1 and groups[0]:
        with pytest.raises(UnknownGroupError):
            model.predict(NEW, groups=groups)


def test_groups_where_there_are_none(model: NPad) -> None:
    with pytest.raises(ValueError, match="is not calibrated; leave them out"):
        model.predict(NEW, groups="a")
    model.calibrate(NOMINAL)
    with pytest.raises(ValueError, match="calibrated without groups; leave them out"):
        model.predict(NEW, groups="a")
    with pytest.raises(ValueError, match="how many images the source holds is not known"):
        model.calibrate((x for x in [NOMINAL]), groups=["a"] * 29)


def test_too_few_images_are_told_before_they_are_read(
    model: NPad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [tmp_path / f"{i}.png" for i in range(8)]
    for path in missing:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"false_alarm_rate=0\.1 needs 9 .* got 8; give more"):
        model.calibrate(missing)
    with pytest.raises(ValueError, match=r"needs 9 .*of each group, got 8 of group 'b'"):
        model.calibrate(NOMINAL[:20], groups=["a"] * 12 + ["b"] * 8)
    with pytest.raises(ValueError, match="got 8"):
        model.calibrate(batch for batch in [NOMINAL[:5], NOMINAL[5:8]])
    assert model.calibration_ is None


def test_skipped_images_do_not_count(model: NPad, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i:02}.png" for i in range(12)]
    for path, image in zip(paths, NOMINAL, strict=False):
        Image.fromarray(image).save(path)
    paths[3].write_bytes(b"")
    model.calibrate(paths, skip_bad=True)
    assert len(model.calibration_.scores) == 11
    for path in paths[:8]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="got 4"):
        model.calibrate(paths, skip_bad=True)
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="got 0"):
        model.calibrate(paths, skip_bad=True)
    with pytest.raises(ValueError, match="got 0 of group 'a'"):
        model.calibrate(paths, skip_bad=True, groups="a")
    assert len(model.calibration_.scores) == 11  # what it was


def test_images_that_were_fitted_are_named(model: NPad, tmp_path: Path) -> None:
    for i, image in enumerate([*NOMINAL, FITTED[4], FITTED[9]]):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    with pytest.warns(UserWarning, match=r"2 of 31 images were fitted \(.*29\.png, .*30\.png\)"):
        model.calibrate(tmp_path)


def test_a_model_that_is_not_calibrated(model: NPad) -> None:
    found = model.predict(NEW[:2])
    for name in ("p_values", "labels", "masks", "regions"):
        with pytest.raises(NotCalibratedError, match=r"call model\.calibrate"):
            getattr(found, name)
    for name in ("threshold_", "map_threshold_"):
        assert not hasattr(model, name)
        assert not hasattr(NPad("filterbank"), name)
        with pytest.raises(RuntimeError, match=r"is not calibrated; .* call calibrate"):
            getattr(model, name)
    with pytest.raises(RuntimeError, match="is not fitted"):
        NPad("filterbank").calibrate(NOMINAL)


@pytest.mark.parametrize(
    "changed", [{"fusion_weight": 0.5}, {"score_window": 3}, {"fusion": "mahalanobis"}]
)
def test_settings_that_give_other_scores(model: NPad, changed: dict[str, object]) -> None:
    model.calibrate(NOMINAL)
    before = model.threshold_
    (name,) = changed
    now = getattr(model, name)
    model.set_params(**changed)
    with pytest.raises(NotCalibratedError, match=f"calibrated with {name}=.*calibrate again"):
        model.predict(NEW)
    with pytest.raises(NotCalibratedError, match="calibrate again"):
        model.threshold_  # noqa: B018
    model.set_params(**{name: now})
    assert model.threshold_ == before


def test_another_fit_drops_the_calibration(model: NPad) -> None:
    model.calibrate(NOMINAL)
    model.fit(FITTED[:8])
    assert model.calibration_ is None


@pytest.mark.parametrize("groups", [None, ["a"] * 15 + [2] * 14])
def test_it_is_saved_bit_for_bit(model: NPad, groups: list[object] | None, tmp_path: Path) -> None:
    model.calibrate(NOMINAL, groups=groups)
    model.false_alarm_rate = 0.15
    model.save(tmp_path / "m.npad")
    of = None if groups is None else "a"
    expected = model.predict(NEW, groups=of)
    copies = NPad.load(tmp_path / "m.npad"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for other in copies:
        found = other.predict(NEW, groups=of)
        assert np.array_equal(found.p_values, expected.p_values)
        assert (other.threshold_, other.map_threshold_) == (
            model.threshold_,
            model.map_threshold_,
        )
        assert str(other.calibration_) == str(model.calibration_)


@pytest.mark.parametrize(
    "forged",
    [
        3,
        [],
        {"scores": []},
        {"scores": ["x"]},
        {"scores": [[1.0]]},
        {"scores": [1.0]},
        {"map_maxima": [None] * 29},
        {"groups": ["a"]},
        {"groups": [1.5] * 29},
        {"scoring": 3},
    ],
)
def test_a_calibration_that_is_none(model: NPad, forged: object, tmp_path: Path) -> None:
    """Under a checksum that is right: an error of the file."""
    path = tmp_path / "m.npad"
    model.calibrate(NOMINAL).save(path)
    header, tensors = read_model(path)
    whole = header["calibration"]
    header["calibration"] = whole | forged if isinstance(forged, dict) else forged
    write_model(path, header, tensors)
    with pytest.raises(ModelFileError, match="has a header that this npad cannot use"):
        NPad.load(path)


def test_parts_of_a_prediction(model: NPad) -> None:
    model.calibrate(NOMINAL)
    parts = list(model.predict_batches(NEW))
    assert len(parts) == 5
    whole = Prediction.joined(parts)
    assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))
    nothing = Prediction.joined([])
    assert nothing.decisions is None
    assert len(nothing.map_maxima) == 0


def test_only_bad_files(model: NPad, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    found = model.calibrate(NOMINAL).predict(tmp_path / "a.png", skip_bad=True)
    assert len(found.skipped) == 1
    assert found.labels.shape == (0,)


def test_regions_are_the_connected_parts() -> None:
    map_ = np.zeros((6, 8), np.float32)
    map_[0, 0] = 3
    map_[1, 1] = 2  # at a corner
    map_[4:6, 5:8] = 5
    map_[4, 6] = 9
    map_[3, 0] = np.nan
    assert find_regions(map_, 1.0, (6, 8)) == [
        Region(area=6, box=(5, 4, 3, 2), peak=9.0, peak_at=(6, 4)),
        Region(area=2, box=(0, 0, 2, 2), peak=3.0, peak_at=(0, 0)),
    ]
    assert find_regions(map_, 9.0, (6, 8)) == []  # as a score: above, and not at


def test_regions_in_pixels_of_a_larger_image() -> None:
    map_ = np.zeros((4, 4), np.float32)
    map_[1, 2:] = 1
    (region,) = find_regions(map_, 0.5, (10, 6))
    assert region.box == (3, 2, 3, 3)  # rows 2.5 to 5, columns 3 to 6
    assert region.area == round(2 * 2.5 * 1.5)
    assert region.peak_at == (3, 3)


def test_regions_of_a_prediction() -> None:
    map_ = np.zeros((4, 4), np.float32)
    map_[2, 3] = 7
    decisions = Decisions(np.ones(2), np.ones(2), np.array([5.0, 8.0]))
    found = Prediction(np.ones(2), [map_, map_], ["a", "b"], [(4, 4)] * 2, decisions=decisions)
    assert [len(regions) for regions in found.regions] == [1, 0]
    assert found.regions[0][0].to_json() == {
        "area": 1,
        "box": (3, 2, 1, 1),
        "peak": 7.0,
        "peak_at": (3, 2),
    }
