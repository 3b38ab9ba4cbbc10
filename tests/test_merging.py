"""Adding images, merging models, forgetting statistics: through NPad, files and the command line."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fail, succeed
from image_files import save_image, smooth_pixels

from npad import NPad
from npad.learned import Learned
from npad.model_file import (
    FORMAT_VERSION,
    STATISTICS_VERSION,
    ModelFileError,
    read_model,
    write_model,
)
from npad.ops.reference import unpack

SMALL = {"image_size": 32, "n_centroids": 40, "batch_size": 4, "progress": False}
FIXED = {"eps": 0.01, "window": 3, "factor_dtype": "float32"}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """(40, 32, 32, 3) uint8."""
    return np.stack([smooth_pixels(32, 32, seed=i) for i in range(40)])


def new(**arguments: object) -> NPad:
    return NPad("filterbank", **SMALL | arguments)


@pytest.fixture(scope="module")
def parts(images: np.ndarray) -> list[NPad]:
    """Models of 9, 20 and 11 of them."""
    return [new(**FIXED).fit(part) for part in np.split(images, [9, 29])]


@pytest.fixture(scope="module")
def part_files(parts: Sequence[NPad], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    paths = [folder / f"{name}.npad" for name in "abc"]
    for model, path in zip(parts, paths, strict=True):
        model.save(path, statistics=True)
    return paths


def contents(model: NPad, path: Path) -> bytes:
    """All that a file of it holds."""
    model.save(path, statistics=True)
    return path.read_bytes()


def gaussians(model: NPad) -> list[torch.Tensor]:
    return [x for m in model.members_ if m.member.gaussian for x in (m.mean, m.factor)]


def farthest(model: NPad, images: np.ndarray) -> float:
    """From the nominal set, by double precision."""
    (member,) = [m for m in model.members_ if m.centroids is not None]
    x = model.embed(images).flatten(0, 2).double()
    return float(torch.cdist(x, member.centroids.double()).min(1).values.max())


def radius(model: NPad) -> float:
    (found,) = [m.radius for m in model.members_ if m.radius is not None]
    return found


# --- adding ---


@pytest.mark.parametrize(
    "arguments",
    [{}, {"fusion": "sum"}, FIXED, {"gaussians": "joint"}, {"fusion": "mahalanobis"}],
    ids=["default", "sum", "fixed", "joint", "mahalanobis"],
)
def test_images_that_come_in_parts_have_the_gaussians_of_one_fit(
    arguments: dict[str, object], images: np.ndarray
) -> None:
    """Bit for bit; so are eps, window and what else there is but for the nominal set."""
    one = new(**arguments).fit(images)
    parts = new(**arguments)
    for part in np.split(images, [16, 20, 32]):
        assert parts.partial_fit(part) is parts
        assert np.isfinite(parts.predict(images[:2]).scores).all()
    assert all(map(torch.equal, gaussians(parts), gaussians(one)))
    for own, other in zip(parts.members_, one.members_, strict=True):
        assert own.to_json() | {"radius": None} == other.to_json() | {"radius": None}
    assert (parts.n_images_, parts.fingerprints_) == (40, one.fingerprints_)
    assert parts.darkest_ == one.darkest_


@pytest.mark.parametrize("arguments", [{}, {"fusion": "sum"}, {"n_features": 5}])
def test_a_fit_that_keeps_nothing_finds_the_same(
    arguments: dict[str, object], images: np.ndarray, tmp_path: Path
) -> None:
    for statistics in (False, True):
        new(**arguments).fit(images, statistics=statistics).save(tmp_path / str(statistics))
    assert (tmp_path / "False").read_bytes() == (tmp_path / "True").read_bytes()


def test_a_number_of_features_keeps_the_first_axes(images: np.ndarray) -> None:
    model = new(n_features=5).partial_fit(images[:20])
    axes = model.members_[-1].projection
    assert torch.equal(model.partial_fit(images[20:]).members_[-1].projection, axes)
    one = new(n_features=5).fit(images)
    assert not torch.equal(one.members_[-1].projection, axes)


def test_a_nominal_set_of_parts_covers_within_its_radius(images: np.ndarray) -> None:
    """Which is at most two k-centers', each within twice the best radius of 40 balls."""
    one = new().fit(images)
    assert farthest(one, images) == pytest.approx(radius(one), rel=1e-5)
    two = new().fit(images[:25]).partial_fit(images[25:])
    merged = new().fit(images[:25]).merge(new().fit(images[25:]))
    for model in (two, merged):
        assert farthest(model, images) <= radius(model) * (1 + 1e-5)
        # The best radius is at most what k-center reaches on all.
        assert radius(model) <= 4 * radius(one)
        assert f"40 centroids within {radius(model):.3g} of all" in str(model.members_[-1])


def test_k_means_knows_no_radius(images: np.ndarray) -> None:
    model = (
        new(nominal_set="kmeans").fit(images[:20]).merge(new(nominal_set="kmeans").fit(images[20:]))
    )
    assert [m.radius for m in model.members_] == [None] * 4
    assert str(model.members_[-1]).endswith("40 centroids")


def test_partial_fit_of_a_model_that_was_loaded(images: np.ndarray, tmp_path: Path) -> None:
    in_memory = new().fit(images[:20])
    in_memory.save(tmp_path / "m", statistics=True)
    loaded = NPad.load(tmp_path / "m", progress=False).partial_fit(images[20:])
    in_memory.partial_fit(images[20:])
    assert contents(loaded, tmp_path / "a") == contents(in_memory, tmp_path / "b")


def test_arguments_that_a_fitted_model_heeds(images: np.ndarray) -> None:
    model = new().fit(images[:20]).set_params(batch_size=7, map_weight=0.9, window=1)
    model.partial_fit(images[20:])
    assert model.settings()["map_weight"] == 0.9
    assert model.settings()["window"] == "auto"
    other = new().fit(np.stack([smooth_pixels(32, 32, seed=i) for i in (90, 91)]))
    model.set_params(fusion="mahalanobis").merge(other)
    assert model.n_images_ == 42
    assert model.members_[-1].centroids is not None


def test_an_image_that_was_fitted_before_is_told(images: np.ndarray) -> None:
    model = new().fit(images[:10])
    with pytest.warns(UserWarning, match="NPad.partial_fit: 2 of 6 images had been fitted before"):
        model.partial_fit(images[8:14])
    with pytest.warns(UserWarning, match="NPad.merge: 4 of 8 images had been fitted before"):
        model.merge(new().fit(images[10:18]))


def test_a_bad_image_changes_nothing(images: np.ndarray, tmp_path: Path) -> None:
    for i, image in enumerate(images[:12]):
        save_image(tmp_path / f"images/{i:02}.png", image)
    model = new().fit(images[20:])
    before = contents(model, tmp_path / "before")
    (tmp_path / "images/09.png").write_text("no image")
    with pytest.raises(ValueError, match=r"09\.png"):
        model.partial_fit(tmp_path / "images")
    assert contents(model, tmp_path / "after") == before
    model.partial_fit(tmp_path / "images", skip_bad=True)
    assert model.n_images_ == 31
    assert [Path(path).name for path, _ in model.skipped_] == ["09.png"]
    assert new().fit(images[12:20]).merge(model).skipped_ == model.skipped_


def test_one_image_at_a_time(images: np.ndarray) -> None:
    model = new()
    with pytest.raises(ValueError, match="at least 2"):
        model.partial_fit(images[:1])
    with pytest.raises(RuntimeError, match="not fitted"):
        model.predict(images[:1])
    model.partial_fit(images[:2])
    for i in range(2, 8):
        model.partial_fit(images[i])
    assert model.n_images_ == 8
    expected = new().fit(x for x in [images[:2], *images[2:8, None]])  # in the same batches
    for own, other in zip(gaussians(model.shrink()), gaussians(expected), strict=True):
        assert torch.equal(own, other)


def test_bits_of_parts_come_together() -> None:
    rng = np.random.default_rng(0)
    twelve, ten, eight = (
        rng.integers(0, top, (6, 32, 32, 3)).astype(kind)
        for top, kind in ((4096, np.uint16), (1024, np.uint16), (256, np.uint8))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which is tested elsewhere
        model = new().fit(ten)
        assert model.n_bits_ == 10
        assert model.partial_fit(twelve).n_bits_ == 12
        assert new().fit(ten).merge(new().fit(twelve)).n_bits_ == 12
        assert model.partial_fit(eight).n_bits_ is None
        assert model.darkest_ < 0.1


# --- merging ---


@pytest.mark.parametrize("n_parts", [2, 3, 5])
def test_merged_models_have_the_gaussians_of_one_fit(n_parts: int, images: np.ndarray) -> None:
    """To 1e-5, in any order: means, covariances by way of factors, and distances."""
    known = {**FIXED, "n_features": None}
    one = new(**known).fit(images)
    models = [new(**known).fit(part) for part in np.array_split(images, n_parts)]
    for order in list(permutations(range(n_parts)))[:: max(1, n_parts - 2) ** 2 * 2]:
        first, *others = (models[i] for i in order)
        merged = copy.copy(first).merge(others)
        assert merged.n_images_ == 40
        assert sorted(merged.fingerprints_) == sorted(one.fingerprints_)
        for own, other in zip(merged.members_, one.members_, strict=True):
            if own.factor is not None:
                for a, b in (
                    (own.mean, other.mean),
                    (covariance(own.factor, own.channels), covariance(other.factor, own.channels)),
                ):
                    assert float((a - b).norm() / b.norm()) < 1e-5
        assert first.n_images_ < 40


def covariance(factor: torch.Tensor, channels: int) -> torch.Tensor:
    """Of which W is the inverse Cholesky factor."""
    inverse = torch.linalg.inv(unpack(factor.double(), channels))
    return inverse @ inverse.mT


def test_one_after_the_other_or_all_together(parts: Sequence[NPad]) -> None:
    together = copy.copy(parts[0]).merge(iter(parts[1:]))
    apart = copy.copy(parts[0]).merge(parts[1]).merge(parts[2])
    for a, b in zip(gaussians(together), gaussians(apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert radius(apart) <= 6 * radius(together)


def test_one_model_at_a_time_is_in_memory(part_files: Sequence[Path]) -> None:
    alive: list[weakref.ref[NPad]] = []

    def loaded() -> Iterator[NPad]:
        for path in part_files[1:]:
            gc.collect()
            assert [model for model in alive if model() is not None] == []
            model = NPad.load(path, progress=False)
            alive.append(weakref.ref(model))
            yield model
            del model

    assert NPad.load(part_files[0], progress=False).merge(loaded()).n_images_ == 40


def test_what_is_merged_stays_what_it_is(parts: Sequence[NPad], tmp_path: Path) -> None:
    """Twice into others, and the other way round."""
    before = [contents(part, tmp_path / "before") for part in parts]
    once, again = (copy.copy(parts[0]).merge(parts[1]) for _ in range(2))
    assert contents(once, tmp_path / "a") == contents(again, tmp_path / "b")
    copy.deepcopy(parts[1]).merge([parts[0], parts[2]])
    assert [contents(part, tmp_path / "after") for part in parts] == before


@pytest.mark.parametrize(
    "arguments", [{}, {"fusion": "sum", "holdout": 0.3, "window": 3}, {"window": 1}]
)
def test_what_is_chosen_is_chosen_anew(arguments: dict[str, object]) -> None:
    """On noise, of which every part says the same."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), dtype=np.uint8)
    known = {**arguments, "n_features": None}
    a, b = (new(**known).fit(part) for part in (noise[:25], noise[25:]))
    merged, one = copy.copy(a).merge(b), new(**known).fit(noise)
    for own, other in zip(merged.members_, one.members_, strict=True):
        if own.eps is not None:
            assert own.window == other.window
            assert 1 / 4 < own.eps / other.eps < 4
            torch.testing.assert_close(own.mean, other.mean, rtol=1e-4, atol=1e-5)
    for kind, moments in (merged.standardization_ or {}).items():
        assert moments.mean == pytest.approx(one.standardization_[kind].mean, rel=0.1)


def test_random_axes_merge_and_principal_ones_do_not(images: np.ndarray) -> None:
    for reduction in ("random", "pca"):
        a, b = (new(n_features=5, reduction=reduction).fit(x) for x in (images[:20], images[20:]))
        if reduction == "random":
            assert a.merge(b).n_images_ == 40
        else:
            with pytest.raises(ValueError, match=r"different principal axes.*reduction='random'"):
                a.merge(b)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_size": 48}, r"image_size is \(32, 32\) in one and \(48, 48\) in the other"),
        ({"eps": "auto"}, "eps is 0.01 in one and 'auto' in the other"),
        ({"eps": 0.02}, "eps is 0.01 in one and 0.02 in the other"),
        ({"window": 1}, "window is 3 in one and 1 in the other"),
        ({"layers": (1, 2)}, r"layers is None in one and \(1, 2\)"),
        ({"map_layers": (1, 2)}, "map_layers is None"),
        ({"gaussians": "joint"}, "gaussians is 'per_layer' in one and 'joint'"),
        ({"nominal_set": None}, "nominal_set is 'kcenter' in one and None"),
        ({"n_centroids": 41}, "n_centroids is 40 in one and 41"),
        ({"fusion": "sum"}, "fusion is 'product' in one and 'sum'"),
        ({"n_features": None}, "n_features is 'auto' in one and None"),
        ({"holdout": 0.2}, "holdout is 0.1 in one and 0.2"),
        ({"seed": 1}, "seed is 0 in one and 1"),
        ({"bit_depth": 12}, "bit_depth is None in one and 12"),
        ({"factor_dtype": "int8"}, "factor_dtype is 'float32' in one and 'int8'"),
        ({"seed": 1, "n_centroids": 0.5}, "n_centroids is 40 in one and 0.5 in the other; seed is"),
    ],
)
def test_models_of_other_settings_do_not_merge(
    arguments: dict[str, object],
    match: str,
    parts: Sequence[NPad],
    images: np.ndarray,
    tmp_path: Path,
) -> None:
    before = contents(parts[0], tmp_path / "before")
    other = new(**FIXED | arguments).fit(images[10:20])
    with pytest.raises(ValueError, match=f"NPad.merge: .*different settings: .*{match}"):
        parts[0].merge([parts[1], other])
    assert contents(parts[0], tmp_path / "after") == before


def test_settings_that_may_differ(parts: Sequence[NPad], images: np.ndarray) -> None:
    other = new(**FIXED, map_weight=0.9, score_window=3, false_alarm_rate=0.1).fit(images[9:29])
    merged = copy.copy(parts[0]).merge(other)
    assert all(map(torch.equal, gaussians(merged), gaussians(copy.copy(parts[0]).merge(parts[1]))))
    assert merged.settings()["map_weight"] == 0.3


def test_models_of_other_backbones_do_not_merge(
    parts: Sequence[NPad],
    untrained_resnet18: Path,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = NPad("resnet18", weights=untrained_resnet18, **SMALL | FIXED).fit(images[:3])
    with pytest.raises(
        ValueError,
        match=r"different backbones: filterbank with weights .* and resnet18 with weights [0-9a-f]{12}",
    ):
        parts[0].merge(other)
    known = parts[1].backbones_
    twin = copy.copy(parts[1])
    twin.backbones_ = [{**known[0], "weights_hash": "f" * 64}]
    with pytest.raises(ValueError, match="filterbank with weights ffffffffffff in the other"):
        parts[0].merge(twin)


def test_what_is_no_model(parts: Sequence[NPad], images: np.ndarray) -> None:
    model = parts[0]
    for other in (3, None, "a.npad", Path("a.npad"), [parts[1], 3]):
        with pytest.raises(TypeError, match="other must be an NPad or several, got"):
            model.merge(other)
    with pytest.raises(ValueError, match="other holds no model"):
        model.merge([])
    with pytest.raises(RuntimeError, match="not fitted"):
        model.merge(new(**FIXED))
    with pytest.raises(RuntimeError, match="not fitted"):
        new().merge(model)
    for other in (model, copy.copy(model), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="merged with itself"):
            model.merge(other)
    assert model.n_images_ == 9


def without_statistics(model: NPad, folder: Path) -> list[NPad]:
    """In every way in which they are lost."""
    model.save(folder / "plain")
    return [
        NPad.load(folder / "plain", progress=False),
        pickle.loads(pickle.dumps(model)),
        copy.copy(model).shrink(),
    ]


def test_models_without_statistics(
    parts: Sequence[NPad], images: np.ndarray, tmp_path: Path
) -> None:
    never = new(**FIXED).fit(images[:5], statistics=False)
    for model in (never, *without_statistics(parts[0], tmp_path)):
        remedy = (
            "needs the statistics of the images.*give statistics=True when it is fitted and when"
        )
        for call in (
            lambda m=model: m.partial_fit(images[:2]),
            lambda m=model: m.merge(parts[1]),
            lambda m=model: parts[1].merge(m),
            lambda m=model: m.save(tmp_path / "x", statistics=True),
        ):
            with pytest.raises(ValueError, match=remedy):
                call()
        assert np.isfinite(model.predict(images[:2]).scores).all()
    assert not (tmp_path / "x").exists()


def test_a_change_drops_the_calibration(images: np.ndarray) -> None:
    def calibrated() -> NPad:
        return new(false_alarm_rate=0.3).fit(images[:10]).calibrate(images[10:16])

    other = new(false_alarm_rate=0.3).fit(images[20:30])
    again = copy.copy(other).calibrate(images[30:36])

    def drops(numbers: str, change: Callable[[], NPad]) -> bool:
        with pytest.warns(UserWarning, match=rf"nominal images of before \({numbers}\)"):
            return change().calibration_ is None

    assert drops("6", lambda: calibrated().partial_fit(images[20:30]))
    assert drops("6", lambda: calibrated().merge(other))
    assert drops("6 and 6", lambda: calibrated().merge(again))
    assert calibrated().shrink("bfloat16").calibration_ is None
    model = calibrated().shrink()
    assert model.calibration_ is not None
    assert drops("6", lambda: other.merge(calibrated()))


# --- files ---


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fusion": "sum", "gaussians": "joint"},
        {"n_features": 5},
        {"nominal_set": "kmeans", "n_centroids": 0.1},
        {"fusion": "euclidean"},
        {"nominal_set": None},
    ],
)
def test_save_load_and_merge(
    arguments: dict[str, object], images: np.ndarray, tmp_path: Path
) -> None:
    model = new(**arguments).fit(images[:20])
    model.save(tmp_path / "m", statistics=True)
    loaded = NPad.load(tmp_path / "m", progress=False)
    assert contents(loaded, tmp_path / "again") == (tmp_path / "m").read_bytes()
    for f in fields(Learned):
        if f.name not in ("members", "calibration"):
            assert getattr(loaded, f"{f.name}_") == getattr(model, f"{f.name}_")
    if "n_features" not in arguments:
        others = [new(**arguments).fit(images[20:]) for _ in range(2)]
        a, b = (m.merge(o) for m, o in zip((model, loaded), others, strict=True))
        assert contents(a, tmp_path / "a") == contents(b, tmp_path / "b")


def test_files_without_statistics_are_as_they_were(parts: Sequence[NPad], tmp_path: Path) -> None:
    """And those with them are refused, by the number of their format, by npads that know none."""
    parts[0].save(tmp_path / "plain")
    parts[0].save(tmp_path / "full", statistics=True)
    plain, full = (read_model(tmp_path / name) for name in ("plain", "full"))
    assert "statistics" not in plain[0]
    assert not [name for name in plain[1] if name.startswith("statistics")]
    assert {k: v for k, v in full[0].items() if k != "statistics"} == plain[0]
    for name, version in (("plain", FORMAT_VERSION), ("full", STATISTICS_VERSION)):
        table = (tmp_path / name).read_bytes()[:300].decode(errors="replace")
        assert f'format_version\\":{version},' in table
    assert FORMAT_VERSION < STATISTICS_VERSION


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("members", None),
        ("members", 3),
        ("members.0.gaussian", None),
        ("members.0.gaussian", {}),
        ("members.0.n_channels", -1),
        ("members.0.n_channels", 10**9),
        ("members.0.grid", [1]),
        ("members.0.member", {}),
        ("members.0.held_out.kept", 5),
        ("members.0.held_out.candidates", "many"),
        ("members.0.waiting", [4]),
        ("members.0.projection", True),
        ("members.3.nominal", None),
        ("members.3.nominal.composed", [3, 3]),
        ("members.3.nominal.radii", ["wide"]),
        ("settings", None),
        ("settings.eps", -1),
        ("n_images", 8),
        ("n_images", None),
        ("fingerprints", None),
        ("darkest", "dark"),
        ("undeclared", [1, 2, 3]),
    ],
)
def test_statistics_that_are_no_such_are_an_error_of_the_file(
    path: str, value: object, part_files: Sequence[Path], tmp_path: Path
) -> None:
    header, tensors = read_model(part_files[0])
    *way, last = path.split(".")
    at = header["statistics"]
    for step in way:
        at = at[int(step) if step.isdigit() else step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    write_model(tmp_path / "forged.npad", header, tensors)
    with pytest.raises(ModelFileError, match=r"forged\.npad: .*fit and save the model again"):
        NPad.load(tmp_path / "forged.npad")


def test_tensors_of_statistics_are_checked(part_files: Sequence[Path], tmp_path: Path) -> None:
    header, tensors = read_model(part_files[0])
    name = "statistics.0.gaussian.scatter"
    for wrong in (tensors[name][:, 1:], tensors[name].double(), None):
        forged = {key: x for key, x in tensors.items() if key != name}
        write_model(tmp_path / "m", header, forged if wrong is None else {**forged, name: wrong})
        with pytest.raises(ModelFileError, match=rf"tensor '{name}' (must be|is missing)"):
            NPad.load(tmp_path / "m")
    write_model(tmp_path / "m", header, {**tensors, "statistics.9.x": torch.zeros(2)})
    with pytest.raises(ModelFileError, match=r"'statistics\.9\.x' is no part of the model"):
        NPad.load(tmp_path / "m")


# --- forgetting ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("before", ["float32", "float16", "int8"])
def test_shrink_is_a_fit_of_that_dtype(
    before: str, dtype: str, images: np.ndarray, tmp_path: Path
) -> None:
    """Bit for bit, with statistics whatever the factors were, and without from those of float32."""
    known = {"eps": 0.1, "window": 3}  # which float16 holds
    model = new(factor_dtype=before, **known).fit(images)
    fresh = new(factor_dtype=dtype, **known).fit(images)
    model.save(tmp_path / "full", statistics=True)
    model.save(tmp_path / "plain")
    shrunk = NPad.load(tmp_path / "full", progress=False).shrink(dtype)
    shrunk.save(tmp_path / "shrunk")
    fresh.save(tmp_path / "fresh")
    assert (tmp_path / "shrunk").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert shrunk.get_params()["factor_dtype"] == dtype
    rounded = NPad.load(tmp_path / "plain", progress=False)
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
    if dtype != before and size[dtype] >= size[before]:
        with pytest.raises(ValueError, match=f"factors of {before} become neither smaller nor"):
            rounded.shrink(dtype)
        assert rounded.settings()["factor_dtype"] == before
        return
    rounded.shrink(dtype)
    if before == "float32":
        assert all(map(torch.equal, gaussians(rounded), gaussians(fresh)))
    exact = new(factor_dtype="float32", **known).fit(images).predict(images).scores
    errors = [abs(m.predict(images).scores / exact - 1).max() for m in (rounded, fresh)]
    assert errors[0] <= 2 * errors[1] + 1e-6


def test_shrink_of_what_is_chosen(images: np.ndarray, tmp_path: Path) -> None:
    """With eps and window that were chosen, and what images held out had shown."""
    model = new(fusion="sum", factor_dtype="float32").fit(images)
    fresh = new(fusion="sum").fit(images)
    model.shrink("int8").save(tmp_path / "a")
    fresh.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_float16_that_does_not_hold_the_factors(images: np.ndarray, tmp_path: Path) -> None:
    dark = np.float32(images) * np.float32(1e-5 / 255)
    model = new(eps=1e-13, window=3, factor_dtype="float32").fit(dark[:20])
    model.save(tmp_path / "plain")
    for one in (model, NPad.load(tmp_path / "plain")):
        with pytest.raises(ValueError, match=r"float16.*factor_dtype='bfloat16'"):
            one.shrink("float16")
        assert one.settings()["factor_dtype"] == "float32"
    assert model.partial_fit(dark[20:]).n_images_ == 40  # the statistics are whole


@pytest.mark.parametrize("dtype", ["float64", "int4", 8, True, torch.int8])
def test_a_dtype_that_is_none(dtype: object, parts: Sequence[NPad]) -> None:
    with pytest.raises(ValueError, match="factor_dtype must be one of"):
        copy.copy(parts[0]).shrink(dtype)
    with pytest.raises(RuntimeError, match="not fitted"):
        new().shrink("int8")


# --- the command line ---


def test_command_line(images: np.ndarray, tmp_path: Path) -> None:
    folders = []
    for i, part in enumerate(np.split(images, [12, 25])):
        folders.append(tmp_path / f"line{i}")
        for j, image in enumerate(part):
            save_image(folders[-1] / f"{j:02}.png", image)
    options = ("--backbone", "filterbank", "--image-size", 32, "--n-centroids", 40)
    options += ("--eps", "0.01", "--window", 3, "--factor-dtype", "float32", "--threads", 1)
    files = [tmp_path / f"{folder.name}.npad" for folder in folders]
    for folder, file in zip(folders, files, strict=True):
        succeed("fit", folder, "-o", file, *options, "--statistics")
    said = succeed("merge", *files, "-o", tmp_path / "all.npad", "--statistics")
    assert "40 images" in said.out
    assert "within" in said.out
    merged = NPad.load(tmp_path / "all.npad")
    for own, other in zip(gaussians(merged), gaussians(new(**FIXED).fit(images)), strict=True):
        assert float((own - other).norm() / other.norm()) < 1e-4
    for i in range(4):
        save_image(tmp_path / f"more/{i}.png", smooth_pixels(32, 32, seed=90 + i))
    more = ("--false-alarm-rate", 0.5, "--threads", 1)
    succeed("calibrate", tmp_path / "all.npad", tmp_path / "more", "-o", tmp_path / "c", *more)
    calibrated = NPad.load(tmp_path / "c")
    assert calibrated.has_statistics
    assert calibrated.calibration_ is not None
    said = succeed("shrink", tmp_path / "all.npad", "-o", tmp_path / "small.npad", "--threads", 1)
    assert "40 images" in said.out
    merged.save(tmp_path / "expected")
    assert (tmp_path / "small.npad").read_bytes() == (tmp_path / "expected").read_bytes()
    small = tmp_path / "small.npad"
    assert not succeed("shrink", small, "-o", small, "--factor-dtype", "int8", "-q").out
    assert NPad.load(small).settings()["factor_dtype"] == "int8"
    assert small.stat().st_size < (tmp_path / "expected").stat().st_size / 2


def test_what_the_command_line_refuses(
    part_files: Sequence[Path], parts: Sequence[NPad], images: np.ndarray, tmp_path: Path
) -> None:
    a, b, _ = part_files
    out = tmp_path / "out"
    plain, other = tmp_path / "plain.npad", tmp_path / "other.npad"
    parts[1].save(plain)
    new(**FIXED | {"eps": 0.5}).fit(images[:4]).save(other, statistics=True)
    fail(2, "merge", a, "-o", out, says=["two or more"])
    fail(2, "merge", a, tmp_path / "none", "-o", out, says=["none"])
    fail(2, "merge", a, b, "-o", tmp_path, says=["is a folder"])
    fail(1, "merge", a, b, plain, "-o", out, says=[plain, "--statistics"])
    fail(1, "merge", plain, a, "-o", out, says=[plain, "--statistics"])
    fail(1, "merge", a, b, other, "-o", out, says=[other, "eps is 0.01 in one and 0.5"])
    fail(1, "shrink", save_image(tmp_path / "x.png", images[0]), "-o", out, says=["x.png"])
    fail(2, "shrink", a, "-o", out, "--factor-dtype", "int4", says=["--factor-dtype"])
    assert not out.exists()
