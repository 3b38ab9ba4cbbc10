"""A map lies on its image: what is hot is where the defect is, whatever the sizes and aspects."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fail, succeed
from image_files import save_image
from PIL import Image

from npad import NPad, preparation
from npad.features.backbone import Backbone, filled, whole_strides
from npad.images import ImageSource


def noise(n: int, size: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(110, 10, (n, *size)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("model_size", "size"),
    [
        ((64, 64), (64, 64)),
        ((96, 160), (96, 160)),
        ((160, 96), (240, 144)),
        ((96, 128), (301, 403)),
        ((128, 64), (64, 200)),
        ((75, 101), (150, 202)),  # no whole number of any stride
        ((100, 140), (51, 200)),
    ],
)
def test_the_map_peaks_on_a_bright_spot(model_size: tuple[int, int], size: tuple[int, int]) -> None:
    """To half a pixel of the model, by the centre of what is above 0.7 of the peak."""
    model = NPad("filterbank", image_size=model_size, n_centroids=128, progress=False)
    model.fit(noise(12, size, 0)[..., None])
    images = noise(6, size, 1).astype(np.float64)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    scale = np.array(size) / model_size
    spots = np.random.default_rng(2).uniform(0.25, 0.75, (6, 2)) * size
    for i, (y, x) in enumerate(spots):
        distance = ((rows - y) / scale[0]) ** 2 + ((columns - x) / scale[1]) ** 2
        images[i] += 130 * np.exp(-distance / 8)
    maps = model.predict(images.clip(0, 255).astype(np.uint8)[..., None]).maps
    errors = []
    for map_, spot in zip(maps, spots, strict=True):
        assert map_.shape == size
        top = (map_ - map_.min()) / np.ptp(map_)
        top = np.where(top > 0.7, top - 0.7, 0)
        centre = np.array([(top * rows).sum(), (top * columns).sum()]) / top.sum()
        errors.append((centre - spot) / scale)
    print(np.round(errors, 2), np.round(spots / scale, 0))
    assert np.abs(errors).max() < 0.5
    assert np.abs(np.mean(errors, axis=0)).max() < 0.25


def test_images_are_filled_up_to_whole_strides() -> None:
    x = torch.rand(2, 3, 5, 7)
    found = filled(x, (8, 8))
    assert torch.equal(found[:, :, :5, :7], x)
    assert torch.equal(found[:, :, 5:, :7], x[:, :, 4:].expand(2, 3, 3, 7))
    assert torch.equal(found[..., 7], found[..., 6])
    assert filled(x, (5, 7)) is x
    bank = Backbone("filterbank", (1, 2))
    assert whole_strides([bank], (64, 65)) == (64, 72)
    assert whole_strides([bank, Backbone("filterbank", (4,))], (64, 65)) == (64, 96)


def test_an_older_model_is_not_filled() -> None:
    """Its map covers the image with cells of which the last are not whole, as when it was fitted."""
    images = noise(12, (50, 60), 0)[..., None]
    model = NPad("filterbank", image_size=(50, 60), n_centroids=16, progress=False).fit(images)
    assert model.members_[0].grid == (16, 16)
    old = NPad.load(Path(__file__).parent / "data" / "version_0_1.npad.bin")
    assert (model.filled_, old.filled_) == (True, False)
    assert old.members_[0].grid == (3, 4)  # of 24 x 32 pixels at stride 8


# --------------------------------------------------------------------------------------------------
# Images that keep their size.

NATIVE = {"image_size": "native", "n_centroids": 60, "progress": False}


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (160, 96)])
def test_images_keep_their_size(size: tuple[int, int], tmp_path: Path) -> None:
    """Nothing is resized: the model is that of this size, and maps peak where something is."""
    images = noise(9, size, 0)[..., None]
    model = NPad("filterbank", **NATIVE).fit(images)
    assert model.settings_.image_size == model.input_size() == size
    assert (model.image_size, model.settings()["image_size"]) == ("native", list(size))
    same = NPad("filterbank", **NATIVE | {"image_size": size}).fit(images)
    new = noise(2, size, 1)
    new[1, 30:33, 40:43] = 255
    scores = model.predict(new[..., None]).scores
    np.testing.assert_array_equal(scores, same.predict(new[..., None]).scores)
    assert scores[1] > 2 * scores[0]
    (map_,) = model.predict(new[1:, ..., None]).maps
    assert np.abs(np.array(np.unravel_index(map_.argmax(), size)) - (31, 41)).max() <= 4
    model.save(tmp_path / "model.npad")
    assert NPad.load(tmp_path / "model.npad").settings_.image_size == size
    model.merge(NPad("filterbank", **NATIVE).fit(noise(5, size, 3)[..., None]))
    assert model.n_images_ == 14


def test_each_model_has_the_size_of_its_images() -> None:
    model = NPad("filterbank", **NATIVE)
    for size in ((64, 80), (96, 48)):
        assert model.fit(noise(4, size, 0)[..., None]).settings_.image_size == size
    other = NPad("filterbank", **NATIVE).fit(noise(4, (64, 80), 0)[..., None])
    with pytest.raises(ValueError, match=r"image_size is \(96, 48\) in one and \(64, 80\)"):
        model.merge(other)


def test_images_of_another_size_than_the_first_are_told(tmp_path: Path) -> None:
    images = [*noise(3, (64, 80), 0), *noise(2, (70, 80), 1)]
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    told = r"2 of 5 images have another size than the first, 64 x 80, .*3.png has 70 x 80"
    with pytest.warns(UserWarning, match=told):
        model = NPad("filterbank", **NATIVE).fit(tmp_path)
    assert [x.shape for x in model.predict(tmp_path).maps] == [(64, 80)] * 3 + [(70, 80)] * 2
    model.set_params(image_size=(64, 80)).fit(tmp_path)  # where nobody thinks that they are kept


def test_images_added_of_another_size_are_told() -> None:
    model = NPad("filterbank", **NATIVE).fit(noise(4, (64, 80), 0)[..., None])
    with pytest.warns(UserWarning, match=r"^NPad.partial_fit: 3 of 3 images .* 70 x 80"):
        model.partial_fit(noise(3, (70, 80), 1)[..., None])
    assert (model.n_images_, model.settings_.image_size) == (7, (64, 80))


def test_a_mask_is_not_the_first_image(tmp_path: Path) -> None:
    """Nor is it one of the images that a plan counts."""
    for i, pixels in enumerate(noise(4, (64, 80), 0)):
        save_image(tmp_path / f"{i}.png", pixels)
        save_image(tmp_path / f"!{i}.png", np.full((32, 40), 255, np.uint8))  # sorted before
    model = NPad("filterbank", **NATIVE, rois="!{}.png")
    assert model.input_size(tmp_path) == (64, 80)
    assert model.fit(tmp_path).settings_.image_size == (64, 80)
    known = ["--backbone", "filterbank", "--image-size", "native", "--rois", "!{}.png"]
    found = json.loads(succeed("plan", tmp_path, *known, "--json").out)
    assert (found["settings"]["image_size"], found["n_images"]) == ([64, 80], 4)


def test_the_size_is_that_of_an_image_as_it_is_displayed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for i, pixels in enumerate(noise(3, (64, 80), 0)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", exif=exif)
    in_memory = [Image.open(path) for path in sorted(tmp_path.iterdir())]
    for source in (tmp_path, in_memory):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = NPad("filterbank", **NATIVE).fit(source)
        assert model.settings_.image_size == (80, 64)


def test_scoring_a_stream_keeps_nothing_of_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera's never ends."""
    model = NPad("filterbank", **NATIVE).fit(noise(4, (64, 80), 0)[..., None])
    sources: list[ImageSource] = []
    opened = preparation.ImageSource

    def remembered(*args: object, **known: object) -> ImageSource:
        sources.append(opened(*args, **known))
        return sources[-1]

    monkeypatch.setattr(preparation, "ImageSource", remembered)
    for _ in model.predict_batches(noise(2, (32, 40), i)[..., None] for i in range(3)):
        pass
    assert [len(source.other_sizes) for source in sources] == [0]


def test_native_needs_an_image_to_look_at(tmp_path: Path) -> None:
    model = NPad("filterbank", **NATIVE)
    batches = (x for x in [noise(4, (64, 64), 0)[..., None]])
    with pytest.raises(ValueError, match=r"^NPad.fit: image_size='native' .* that of a stream is"):
        model.fit(batches)
    assert len(list(batches)) == 1  # nothing is lost
    with pytest.raises(ValueError, match=r"^NPad.input_size: .* give \(height, width\)"):
        model.input_size()
    with pytest.raises(ValueError, match=r"^NPad.plan: .* give source_size, or a"):
        model.plan(10)
    assert model.plan(10, source_size=(90, 70)).settings.image_size == (90, 70)
    (tmp_path / "0.png").write_bytes(b"no image")
    for i, pixels in enumerate(noise(4, (64, 80), 0)):
        Image.fromarray(pixels).save(tmp_path / f"{i + 1}.png")
    with pytest.raises(ValueError, match=r"^NPad.fit: .* it cannot be read"):
        model.fit(tmp_path)
    assert model.fit(tmp_path, skip_bad=True).settings_.image_size == (64, 80)
    embedded = NPad("filterbank", **NATIVE).embed(noise(1, (64, 80), 0)[..., None])
    assert embedded.shape[1:3] == (16, 20)
    for wrong in ("Native", "", "256"):
        with pytest.raises(ValueError, match=r"^NPad: image_size must be .*, or 'native', got"):
            NPad("filterbank", image_size=wrong)
    with pytest.raises(ValueError, match=r"tile=\(128, 128\) is larger than the images"):
        NPad("filterbank", **NATIVE, tile=128).fit(noise(4, (64, 80), 0)[..., None])


def test_native_on_the_command_line(tmp_path: Path) -> None:
    for i, pixels in enumerate(noise(8, (64, 80), 0)):
        save_image(tmp_path / "train/good" / f"{i}.png", pixels)
        save_image(tmp_path / "test" / ("good" if i % 2 else "bad") / f"{i}.png", pixels // (i + 1))
    known = ["--backbone", "filterbank", "--n-centroids", "50", "--image-size", "native"]
    succeed("fit", tmp_path / "train/good", "-o", tmp_path / "a.npad", *known)
    assert json.loads(succeed("info", tmp_path / "a.npad", "--json").out)["image_size"] == [64, 80]
    report = json.loads(succeed("plan", tmp_path / "train/good", *known, "--json").out)
    assert report["settings"]["image_size"] == [64, 80]
    fail(1, "plan", *known, says=["--image-size", "give a folder of them"])
    succeed("evaluate", tmp_path, *known, "-o", tmp_path / "report")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.png").write_bytes(b"no image")
    fail(1, "plan", tmp_path / "bad", *known, says=["--image-size", "cannot be read: give a size"])
