"""Registration: motions that are known are found, maps come back, and what fails is named."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from command_line import SMALL as SMALL_WORDS
from command_line import fail, succeed
from image_files import save_image
from parts import Pose, part, random_pose
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from npad import NPad
from npad.evaluation.datasets import Category, Sample
from npad.evaluation.measure import evaluate
from npad.fitting import Fit
from npad.images import ImageSource
from npad.images.alignment import Aligner, Motion, UnalignedError
from npad.images.template import nominal_aligner
from npad.model_file import ModelFileError, read_model, write_model
from npad.scoring.frames import in_own_frames

KINDS = ("translation", "euclidean")
# Of the images, and of the model: square, 1:2, 2:1 on a square, both of no simple aspect.
SIZES = [
    ((96, 96), (64, 64)),
    ((150, 75), (128, 64)),
    ((80, 160), (64, 64)),
    ((210, 149), (67, 103)),
]


def loaded(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """As a source brings them to the model's size."""
    (batch,) = ImageSource(pixels, image_size=size).batches()
    return batch.images[0]


def far_apart(a: Pose, b: Motion, size: tuple[int, int], model: tuple[int, int]) -> float:
    """The largest distance in the model's pixels between where both see a place of the part."""
    image_sides, model_sides = np.array(size[::-1]), np.array(model[::-1])
    found = Pose(b.dx, b.dy, b.angle)
    places = [np.array([u, v]) for u in (-0.4, 0.4) for v in (-0.4, 0.4)]
    apart = [(a.place(at, size) - found.place(at, size)) / image_sides for at in places]
    return max(float(np.hypot(*(model_sides * d))) for d in apart)


# ------------------------------------------------------------------------------------ the motion


@pytest.mark.parametrize(("size", "model"), SIZES)
def test_a_matrix_is_the_turn_of_the_part_seen_through_the_resizing(
    size: tuple[int, int], model: tuple[int, int]
) -> None:
    """A place of the part, by way of pixels of the image that came, and by way of the matrix."""
    pose = Pose(0.07, -0.04, 11.0)
    matrix = Motion(*pose, aspect=size[0] / size[1]).matrix(model)
    scale = np.array(model[::-1]) / size[::-1]
    for at in ((0.1, 0.3), (-0.4, 0.2)):
        rest = (Pose().place(at, size) + 0.5) * scale - 0.5
        seen = (pose.place(at, size) + 0.5) * scale - 0.5
        np.testing.assert_allclose(matrix @ [*rest, 1], seen, atol=1e-9)


def test_motions_are_put_together_as_their_matrices_are() -> None:
    a, b = Motion(0.1, -0.2, 20, 0.5), Motion(-0.03, 0.07, -8, 0.5)
    square = [np.vstack([m.matrix((64, 96)), [0, 0, 1]]) for m in (a, b, a.after(b), a.inverse)]
    np.testing.assert_allclose(square[2] @ square[1], square[0], atol=1e-9)
    np.testing.assert_allclose(square[3] @ square[0], np.eye(3), atol=1e-9)


def test_a_matrix_is_read_as_it_was_written() -> None:
    motion = Motion(0.1, -0.2, -31.0, 0.5)
    found = Motion.of(motion.matrix((60, 120)), (60, 120), 0.5)
    assert (found.dx, found.dy, found.angle) == pytest.approx((0.1, -0.2, -31.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "model"), SIZES)
def test_a_motion_is_found_within_half_a_pixel(
    size: tuple[int, int], model: tuple[int, int], kind: str
) -> None:
    """Up to 15 % of each side and 15 degrees, in another light."""
    rng = np.random.default_rng(0)
    aligner = Aligner(loaded(part(size, seed=1), model), kind)
    for i in range(8):
        pose = random_pose(rng, kind, 0.15, 15)
        image = part(size, pose, seed=2 + i, light=rng.uniform(0.5, 1.1))
        motion, correlation = aligner.motion(loaded(image, model).numpy(), size)
        assert far_apart(pose, motion, size, model) < 0.5
        assert abs(motion.angle - pose.angle) < 0.25
        assert correlation > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_an_aligned_image_is_the_template(kind: str) -> None:
    """Also where the image shows nothing: there it is the template itself, in the image's light."""
    size = (128, 128)
    template = loaded(part(size), size)
    pose = Pose(0.12, -0.07, 9.0 if kind == "euclidean" else 0.0)
    found = Aligner(template, kind)(loaded(part(size, pose), size), size)
    assert found.reason is None
    assert float((found.image - template).abs().mean()) < 0.005
    torch.testing.assert_close(found.image[..., -2:], template[..., -2:], atol=0.005, rtol=0)
    dark = Aligner(template, kind)(0.5 * loaded(part(size, pose), size), size)
    torch.testing.assert_close(dark.image[..., -2:], template[..., -2:] / 2, atol=0.005, rtol=0)
    assert found.image.dtype == torch.float32
    assert found.image.is_contiguous()


def test_an_image_that_is_in_place_stays() -> None:
    size = (96, 96)
    template = loaded(part(size), size)
    found = Aligner(template, "euclidean")(template.clone(), size)
    assert found.reason is None
    torch.testing.assert_close(found.image, template, atol=0.01, rtol=0)


# ------------------------------------------------------------------------------- what cannot be


def noise(seed: int, size: tuple[int, int] = (96, 96)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


HOPELESS = {
    "constant": (torch.full((3, 64, 64), 0.3), "it has no contrast"),
    "black": (torch.zeros(3, 64, 64), "it has no contrast"),
    "noise": (loaded(noise(0), (64, 64)), "correlation|converge|would take"),
    "negative": (1 - loaded(part((96, 96)), (64, 64)), "correlation|converge|would take"),
    "far": (loaded(part((96, 96), Pose(0.33, 0.0)), (64, 64)), "take a shift of .* 25% of a side"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", HOPELESS)
def test_an_image_that_cannot_be_registered_is_left_and_told(what: str, kind: str) -> None:
    image, reason = HOPELESS[what]
    aligner = Aligner(loaded(part((96, 96)), (64, 64)), kind)
    before = image.clone()
    found = aligner(image, (96, 96))
    assert found.image is image
    assert torch.equal(image, before)
    assert found.motion is None
    with pytest.raises(UnalignedError, match=reason):
        aligner.motion(image.numpy(), (96, 96))
    assert found.reason


def test_a_turn_past_the_limit_is_refused() -> None:
    aligner = Aligner(loaded(part((96, 96)), (64, 64)), "euclidean")
    image = loaded(part((96, 96), Pose(angle=35)), (64, 64)).numpy()
    with pytest.raises(UnalignedError, match=r"a turn of 3\d\.\d degrees, more .* or 30 degrees"):
        aligner.motion(image, (96, 96))


@pytest.mark.parametrize("side", [1, 2, 5, 9])
def test_tiny_models(side: int) -> None:
    """Nothing can be found, or something is; neither fails otherwise."""
    image = loaded(part((40, 40)), (side, side))
    found = Aligner(image, "euclidean")(image.clone(), (40, 40))
    assert found.image.shape == (3, side, side)


# --------------------------------------------------------------------------------- the template


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_in_the_middle_and_without_strays(kind: str) -> None:
    """The first image, and some more, show something else."""
    rng, size = np.random.default_rng(0), (96, 96)
    poses = [random_pose(rng, kind, 0.1, 10) for _ in range(15)]
    images = [noise(1), *(part(size, pose, seed=i) for i, pose in enumerate(poses)), noise(2)]
    samples = [(loaded(image, (64, 64)), size) for image in images]
    aligner = nominal_aligner(samples, kind, workers=2)
    assert aligner.n_images == len(poses)
    middle = Pose(*np.median(poses, axis=0))
    expected = loaded(part(size, middle), (64, 64))
    assert float((torch.from_numpy(aligner.template) - expected).abs().mean()) < 0.02


def test_one_image_is_its_own_template() -> None:
    image = loaded(part((64, 64), Pose(0.1, 0.0)), (64, 64))
    aligner = nominal_aligner([(image, (64, 64))], "translation")
    assert aligner.n_images == 1
    np.testing.assert_allclose(aligner.template, image.numpy(), atol=0.02)


def test_images_without_anything_in_common_still_give_a_template() -> None:
    samples = [(loaded(noise(i), (32, 32)), (96, 96)) for i in range(4)]
    assert nominal_aligner(samples, "euclidean").template.shape == (3, 32, 32)


# -------------------------------------------------------------------------------- the maps' way


def bump(model: tuple[int, int], at: Any) -> Tensor:
    """A map (H, W) whose peak is at a pixel (x, y)."""
    y, x = np.mgrid[: model[0], : model[1]]
    return torch.from_numpy(np.exp(-(np.hypot(x - at[0], y - at[1]) ** 2) / 18)).float()


def peak(map_: Any) -> Any:
    """(x, y) of a map's peak, between pixels."""
    values = np.asarray(map_, np.float64)
    top = np.maximum(values - 0.5 * values.max(), 0)
    y, x = np.mgrid[: values.shape[0], : values.shape[1]]
    return np.array([(x * top).sum(), (y * top).sum()]) / top.sum()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("size", "model"), SIZES)
def test_a_map_comes_back_to_where_the_part_is(
    size: tuple[int, int], model: tuple[int, int], device: str
) -> None:
    at, scale = (0.12, -0.08), np.array(model[::-1]) / size[::-1]
    poses = [Pose(0.1, -0.06, 12.0), Pose(), Pose(-0.08, 0.1, -7.0)]
    motions = [Motion(*pose, aspect=size[0] / size[1]) for pose in poses]
    rest = bump(model, (Pose().place(at, size) + 0.5) * scale - 0.5)
    maps = rest.expand(4, *model).contiguous().to(device)
    found = in_own_frames(maps, [motions[0], None, motions[1], motions[2]]).cpu()
    assert torch.equal(found[1], rest)
    torch.testing.assert_close(found[2], rest, atol=1e-4, rtol=0)
    for row, pose in ((0, poses[0]), (3, poses[2])):
        expected = (pose.place(at, size) + 0.5) * scale - 0.5
        np.testing.assert_allclose(peak(found[row]), expected, atol=0.25)
    assert torch.isfinite(found).all()


def test_maps_that_did_not_move_are_not_touched() -> None:
    maps = torch.rand(2, 5, 7)
    assert in_own_frames(maps, [None, None]) is maps
    assert in_own_frames(maps, []) is maps


# -------------------------------------------------------------------------------------- the model

SMALL_OPTIONS = (*SMALL_WORDS, "--align", "translation")
SMALL: dict[str, Any] = {"backbone": "filterbank", "n_centroids": 200, "progress": False}


def nominal(
    size: tuple[int, int],
    kind: str,
    n: int = 16,
    seed: int = 0,
    limits: tuple[float, float] = (0.08, 8),
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [part(size, random_pose(rng, kind, *limits), seed=1000 * seed + i) for i in range(n)]


@pytest.fixture(scope="module")
def model() -> NPad:
    return NPad(**SMALL, image_size=64, align="euclidean").fit(nominal((96, 96), "euclidean"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "model_size"), SIZES)
def test_the_peak_of_a_map_lies_on_the_defect(
    size: tuple[int, int], model_size: tuple[int, int], kind: str
) -> None:
    """To half a pixel of the model from where the map of the part at rest has it."""
    model = NPad(**SMALL, image_size=model_size, align=kind).fit(nominal(size, kind))
    scale, at = np.array(model_size[::-1]) / size[::-1], (0.02, 0.1)
    at_rest = model.predict(part(size, defect=at, seed=7)).maps[0]
    off = peak(at_rest) - Pose().place(at, size)
    rng = np.random.default_rng(5)
    for i in range(4):
        pose = random_pose(rng, kind, 0.1, 10)
        prediction = model.predict(part(size, pose, defect=at, seed=50 + i))
        assert prediction.unaligned == []
        assert prediction.maps[0].shape == size
        error = (peak(prediction.maps[0]) - pose.place(at, size) - off) * scale
        assert np.abs(error).max() < 0.5
        at_model_size = model.predict(part(size, pose, defect=at, seed=50 + i), map_size="model")
        expected = (pose.place(at, size) + off + 0.5) * scale - 0.5
        assert np.abs(peak(at_model_size.maps[0]) - expected).max() < 0.5


def test_it_tells_defects_from_shifts_and_turns(model: NPad) -> None:
    plain = NPad(**SMALL, image_size=64).fit(nominal((96, 96), "euclidean"))
    rng = np.random.default_rng(3)
    poses = [random_pose(rng, "euclidean", 0.1, 10) for _ in range(8)]
    good = [part((96, 96), pose, seed=300 + i) for i, pose in enumerate(poses)]
    bad = [part((96, 96), pose, defect=(0.0, 0.12), seed=i) for i, pose in enumerate(poses)]

    def gap(one: NPad) -> float:
        return float(one.predict(bad).scores.min() / one.predict(good).scores.max())

    assert gap(model) > 2
    assert gap(model) > 1.5 * gap(plain)


def test_what_comes_into_view_raises_no_alarm(model: NPad) -> None:
    """Fitted within 8 %, scored at 14 %: the rim is filled, and stays below the part's own scores."""
    moved = model.predict(nominal((96, 96), "euclidean", 8, seed=4, limits=(0.14, 10)))
    still = model.predict(nominal((96, 96), "euclidean", 8, seed=5))
    assert moved.unaligned == []
    assert moved.scores.max() < 1.5 * still.scores.max()


def test_images_that_cannot_be_registered_are_scored_as_they_came(model: NPad) -> None:
    good, bad = part((96, 96), Pose(0.05, 0.02, 4.0)), noise(9)
    prediction = model.predict([good, bad, np.full((96, 96, 3), 9, np.uint8)][:2])
    assert [name for name, _ in prediction.unaligned] == ["image[1]"]
    score, _ = model.score(loaded(bad, (64, 64))[None])
    assert prediction.scores[1] == pytest.approx(float(score[0]), rel=1e-4)
    assert model.predict(good).unaligned == []
    with pytest.warns(
        UserWarning, match=r"^NPad.embed: 1 of 2 images .* embedded as .*image\[1\]: "
    ):
        model.embed([good, bad])


def test_a_calibration_says_what_it_could_not_register(model: NPad) -> None:
    twin = copy.copy(model).set_params(false_alarm_rate=0.2)
    images = [*nominal((96, 96), "euclidean", 5, seed=3), noise(9)]
    with pytest.warns(
        UserWarning, match=r"^NPad.calibrate: 1 of 6 images .* scored as .*image\[5\]: "
    ):
        twin.calibrate(images)
    with pytest.warns(
        UserWarning, match="1 of 6 images were fitted"
    ):  # told by what was registered
        twin.calibrate([*images[:5], nominal((96, 96), "euclidean")[0]])
    maxima = twin.predict(images, map_size="model").map_maxima
    tops = [float(map_.max()) for map_ in twin.predict(images, map_size="model").maps]
    np.testing.assert_array_equal(maxima, tops)


def test_a_fit_names_what_it_could_not_register() -> None:
    images = [*nominal((96, 96), "euclidean"), *(noise(i) for i in range(5))]
    model = NPad(**SMALL, image_size=64, align="euclidean")
    with pytest.warns(UserWarning, match=r"5 of 21 images could not be registered .*image\[16\]: "):
        model.fit(images)
    assert [name for name, _ in model.unaligned_] == [f"image[{i}]" for i in range(16, 21)]
    assert model.n_images_ == 21
    assert model.n_template_ == 16


SOURCES = {
    "generator": iter,
    "batches": lambda images: iter([np.stack(images[:3]), np.stack(images[3:])]),
    "loader": lambda images: DataLoader(list(np.moveaxis(np.stack(images), 3, 1)), batch_size=5),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_stream_gives_what_a_list_gives(kind: str, model: NPad) -> None:
    """While it has no more images than a template is made of; it is read once."""
    twin = NPad(**SMALL, image_size=64, align="euclidean")
    twin.fit(SOURCES[kind](nominal((96, 96), "euclidean")))
    assert twin.template_ is not None
    assert model.template_ is not None
    assert torch.equal(twin.template_, model.template_)
    test = nominal((96, 96), "euclidean", 3, seed=8)
    expected = model.predict(test)
    for source in (test, SOURCES[kind]([*test, *test])):
        found = twin.predict(source)
        np.testing.assert_allclose(found.scores[:3], expected.scores, rtol=1e-3)


def test_a_stream_longer_than_its_template() -> None:
    """The images past the first are registered, too, and those that fail are named once."""
    images = nominal((48, 48), "translation", 40)
    images[2], images[37] = noise(2, (48, 48)), noise(37, (48, 48))
    model = NPad(**SMALL, image_size=32, align="translation", n_features=20)
    with pytest.warns(UserWarning, match="2 of 40 images could not be registered"):
        model.fit(iter(images))
    assert [name for name, _ in model.unaligned_] == ["image[2]", "image[37]"]
    assert model.n_template_ == 31


def test_principal_axes_and_bad_files(tmp_path: Path) -> None:
    """Two looks at the images before the pass: each finds the bad file, which is named once."""
    paths = [
        save_image(tmp_path / f"{i}.png", x) for i, x in enumerate(nominal((48, 48), "euclidean"))
    ]
    paths[0].write_bytes(b"no image")
    save_image(paths[1], noise(0, (48, 48)))
    model = NPad(**SMALL, image_size=32, align="euclidean", n_features=20)
    with pytest.warns(UserWarning, match="1 of 15 images could not be registered"):
        model.fit(tmp_path, skip_bad=True)
    assert [Path(path).name for path, _ in model.skipped_] == ["0.png"]
    assert [Path(path).name for path, _ in model.unaligned_] == ["1.png"]


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the images for the template could be read"):
        NPad(**SMALL, image_size=32, align="translation").fit(paths, skip_bad=True)


def test_batches_and_threads_change_nothing(model: NPad) -> None:
    images = nominal((96, 96), "euclidean", 6, seed=6)
    assert model.template_ is not None
    aligner = Aligner(model.template_, "euclidean")
    found = [
        torch.cat([b.images for b in source.batches()])
        for size, workers in ((1, 1), (4, 2), (6, 4))
        for source in [
            ImageSource(
                images, image_size=(64, 64), batch_size=size, workers=workers, aligner=aligner
            )
        ]
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    expected = model.predict(images)
    with ThreadPoolExecutor(3) as pool:
        for again in pool.map(model.predict, [images] * 3):
            np.testing.assert_array_equal(again.scores, expected.scores)
            for a, b in zip(again.maps, expected.maps, strict=True):
                np.testing.assert_array_equal(a, b)


def test_copies_and_files(model: NPad, tmp_path: Path) -> None:
    images = nominal((96, 96), "euclidean", 3, seed=6)
    expected = model.predict(images)
    model.save(tmp_path / "m")
    for twin in (
        NPad.load(tmp_path / "m"),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert twin.align == "euclidean"
        assert twin.n_template_ == 16
        assert torch.equal(twin.template_, model.template_)
        np.testing.assert_array_equal(twin.predict(images).scores, expected.scores)
        assert torch.equal(twin.embed(images), model.embed(images))
    plain = NPad(**SMALL, image_size=64).fit(images)
    assert (plain.template_, plain.n_template_, plain.unaligned_) == (None, None, [])
    assert (
        model.nbytes - sum(m.nbytes for m in model.members_[0].tensors().values())
        >= 3 * 64 * 64 * 4
    )


def changed(path: Path, change: Any) -> Path:
    header, tensors = read_model(path)
    change(header, tensors)
    write_model(path, header, tensors)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, _: h.pop("n_template"), "align is euclidean, but n_template is None"),
        (lambda h, _: h["settings"].update(align=None), "align is None, but n_template is 16"),
        (lambda h, _: h["settings"].update(align="affine"), "align must be one of"),
        (lambda h, _: h.update(n_template="many"), "header that this npad cannot use"),
        (lambda _, t: t.pop("template"), "template"),
        (lambda _, t: t.update(template=torch.zeros(64, 64)), "template"),
    ],
)
def test_a_file_whose_template_is_not_right(
    change: Any, message: str, model: NPad, tmp_path: Path
) -> None:
    model.save(tmp_path / "m")
    with pytest.raises(ModelFileError, match=message):
        NPad.load(changed(tmp_path / "m", change))


def test_a_fit_goes_on_with_its_template(model: NPad) -> None:
    images = nominal((96, 96), "euclidean", 24)
    twin = NPad(**SMALL, image_size=64, align="euclidean").fit(images[:16])
    template = twin.template_
    assert template is not None
    with pytest.warns(
        UserWarning, match="^NPad.partial_fit: 1 of 9 images could not be registered"
    ):
        twin.partial_fit([*images[16:], noise(4)])
    assert twin.template_ is not None
    assert torch.equal(twin.template_, template)
    assert [name for name, _ in twin.unaligned_] == ["image[8]"]
    assert (twin.n_images_, twin.n_template_) == (25, 16)
    prediction = twin.predict(images[:2])
    assert prediction.unaligned == []
    other = NPad(**SMALL, image_size=64, align="euclidean").fit(images[8:])
    with pytest.raises(ValueError, match=r"templates of their own.* fit one of them further"):
        twin.merge(other)
    with pytest.raises(ValueError, match="align"):
        twin.merge(NPad(**SMALL, image_size=64).fit(images))


def test_statistics_of_the_same_template_are_merged(tmp_path: Path) -> None:
    images = nominal((48, 48), "translation", 12)
    one = NPad(**SMALL, image_size=32, align="translation").fit(images[:6])
    one.save(tmp_path / "m", statistics=True)
    other = NPad.load(tmp_path / "m").partial_fit(images[6:])
    with pytest.warns(UserWarning, match="6 of 12 images had been fitted before"):
        one.merge(other)
    assert one.n_images_ == 18
    assert one.template_ is not None
    assert other.template_ is not None
    assert torch.equal(one.template_, other.template_)


def test_a_fit_that_was_stopped_goes_on_with_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*nominal((48, 48), "translation", 11), noise(3, (48, 48))]
    paths = [save_image(tmp_path / f"{i:02}.png", image) for i, image in enumerate(images)]
    arguments: dict[str, Any] = {**SMALL, "image_size": 32, "align": "translation", "batch_size": 3}
    with pytest.warns(UserWarning, match="1 of 12 images could not be registered"):
        whole = NPad(**arguments).fit(paths)
    update, calls = Fit.update, []

    def stopping(fit: Fit, *more: Any) -> Fit:
        calls.append(fit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(fit, *more)

    monkeypatch.setattr(Fit, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        NPad(**arguments).fit(paths, checkpoint=tmp_path / "c", every=1)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="1 of 12 images could not be registered"):
        again = NPad(**arguments).fit(paths, checkpoint=tmp_path / "c", every=1)
    assert again.unaligned_ == whole.unaligned_
    whole.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_regions_of_images_are_refused() -> None:
    images = nominal((48, 48), "translation", 6)
    model = NPad(**SMALL, image_size=32, align="translation")
    masks = [np.ones((48, 48), bool)] * 6
    with pytest.raises(ValueError, match="align and a region of interest exclude each other"):
        model.fit(images, rois=masks)
    model.fit(images)
    for call in (model.partial_fit, model.predict, model.calibrate):
        with pytest.raises(ValueError, match=r"rois must be left out|exclude each other"):
            call(images, rois=masks)


def test_evaluate_says_how_many_were_left(model: NPad, tmp_path: Path) -> None:
    size = (96, 96)
    train = [
        save_image(tmp_path / f"t{i}.png", x) for i, x in enumerate(nominal(size, "euclidean", 8))
    ]
    test = [
        Sample(save_image(tmp_path / "a.png", part(size, Pose(0.05, 0, 3), seed=1)), "good", None),
        Sample(save_image(tmp_path / "b.png", noise(3)), "scratch", None),
    ]
    fresh = NPad(**SMALL, image_size=64, align="euclidean")
    result = evaluate(fresh, Category("parts", train, test), progress=False)
    assert any("1 of 2 test images could not be registered" in note for note in result.notes)


# ------------------------------------------------------------------------------ the command line


def test_predict_says_what_it_could_not_register(tmp_path: Path) -> None:
    for i, image in enumerate(nominal((96, 96), "translation", 8)):
        save_image(tmp_path / f"train/{i}.png", image)
    save_image(tmp_path / "new/moved.png", part((96, 96), Pose(0.07, -0.05), defect=(0.02, 0.1)))
    save_image(tmp_path / "new/noise.png", noise(5))
    fitted = succeed("fit", tmp_path / "train", "-o", tmp_path / "m", *SMALL_OPTIONS)
    assert fitted.err == ""
    assert NPad.load(tmp_path / "m").align == "translation"
    said = succeed("predict", tmp_path / "m", tmp_path / "new", "-o", tmp_path / "out", "--maps")
    assert "1 of 2 images could not be registered to the template" in said.err
    lines = (tmp_path / "out/scores.jsonl").read_text().splitlines()
    moved, failed = map(json.loads, lines)
    assert "unaligned" not in moved
    assert failed["unaligned"] == NPad.load(tmp_path / "m").predict(noise(5)).unaligned[0][1]
    expected = NPad.load(tmp_path / "m").predict(tmp_path / "new")
    with Image.open(tmp_path / "out" / moved["map"]) as map_:
        np.testing.assert_array_equal(np.asarray(map_), expected.maps[0])
    plain = succeed(
        "fit", tmp_path / "train", "-o", tmp_path / "p", *SMALL_OPTIONS, "--align", "none"
    )
    assert plain.err == ""
    assert NPad.load(tmp_path / "p").align is None


def test_a_missing_package_is_told_as_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    save_image(tmp_path / "train/0.png", part((96, 96)))
    fail(
        2, "fit", tmp_path / "train", "-o", tmp_path / "m", *SMALL_OPTIONS,
        says=["--align 'translation' needs OpenCV", "npad[align]"],
    )  # fmt: skip
    assert not (tmp_path / "m").exists()


# --------------------------------------------------------------------------- what is not installed


class Untouched:
    def __iter__(self) -> Iterator[np.ndarray]:
        raise AssertionError("read before the check")


def test_a_missing_package_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, model: NPad
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # import raises ImportError
    says = r"align='euclidean' needs OpenCV.*pip install \"npad\[align\]\""
    with pytest.raises(ImportError, match=says):
        NPad("resnet50", weights="/no/such", align="euclidean").fit(Untouched())
    for call in (model.predict, model.predict_batches, model.embed):
        with pytest.raises(ImportError, match=says):
            call(Untouched())
    NPad(**SMALL, image_size=32).fit(np.stack(nominal((32, 32), "translation", 4)))


def test_the_environment_is_left_as_it_was() -> None:
    """OpenCV's import changes LD_LIBRARY_PATH for the processes that are started later."""
    text = (
        "import os; before = dict(os.environ); import npad.images.alignment as a;"
        "import sys; assert 'cv2' not in sys.modules;"
        "a.load_opencv('translation'); assert dict(os.environ) == before"
    )
    for more in ({}, {"LD_LIBRARY_PATH": "/somewhere"}):
        bare = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
        subprocess.run([sys.executable, "-c", text], env={**bare, **more}, check=True)


def test_opencv_is_left_as_it_was(model: NPad) -> None:
    before = cv2.getNumThreads(), cv2.useOptimized()
    model.predict(nominal((96, 96), "euclidean", 2))
    assert (cv2.getNumThreads(), cv2.useOptimized()) == before


def test_nothing_is_said_where_all_goes_well(
    capfd: pytest.CaptureFixture[str], model: NPad
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict([noise(1), part((96, 96), Pose(0.33, 0.0))])
    assert capfd.readouterr() == ("", "")


def test_a_16_bit_image() -> None:
    """Dark, as 12 bits in 16 that nobody declared: its contrast is enough."""
    pixels = part((96, 96), Pose(0.05, 0.0, 5.0))[..., 0].astype(np.uint16) * 8
    dark = loaded(part((96, 96)), (64, 64)) / 32
    motion, _ = Aligner(dark, "euclidean").motion(loaded(pixels, (64, 64)).numpy(), (96, 96))
    assert abs(motion.angle - 5) < 0.25
