"""Masks beside their images: what does not fit is met before anything is fitted, or is noted."""

import math

import numpy as np
import pytest
from fake_model import SIZE, FakeModel, save, write_category
from image_files import make_category, save_image, smooth_pixels
from mask_files import GREY, RGB, orientation, png
from PIL import Image, ImageFilter

from npad.evaluation import measure
from npad.evaluation.datasets import DatasetError, find_categories
from npad.evaluation.truth import check_masks, read_truth
from npad.images import Reading, masks, read_image

HEIGHT, WIDTH = SIZE
TESTS = [
    *(("good", f"{i:03}", 0, 1) for i in range(3)),
    *(("dent", f"{i:03}", 40, 1) for i in range(4)),
]


@pytest.fixture
def root(tmp_path):
    return write_category(tmp_path / "plate", TESTS)


def category(root):
    return find_categories(root)[0]


def refused(root, error, match):
    """The error, which `evaluate` meets before it fits."""
    model = FakeModel()
    with pytest.raises(error, match=match) as caught:
        measure.evaluate(model, category(root))
    assert model.fits == 0
    with pytest.raises(error, match=match):
        check_masks(category(root))
    return str(caught.value)


def notes(root, size=SIZE):
    return read_truth(category(root), size).notes


def test_what_fits_has_no_notes(root):
    save(np.zeros(SIZE), root / "ground_truth/good/001_mask.png")
    truth = read_truth(category(root), (12, 16))
    assert truth.notes == []
    assert [mask.shape for mask in truth.masks] == [(12, 16)] * 7
    assert [bool(mask.any()) for mask in truth.masks] == [True] * 4 + [False] * 3
    assert truth.own_sizes == dict.fromkeys([0, 1, 2, 3, 5], SIZE)
    check_masks(category(root))


def test_masks_are_read_by_the_limit_of_the_model_and_by_no_bit_depth(root, monkeypatch):
    seen = []
    monkeypatch.setattr(
        masks, "read_image", lambda path, reading: seen.append(reading) or read_image(path, reading)
    )
    model = FakeModel()
    model.max_pixels, model.bit_depth = 12345, 12
    measure.evaluate(model, category(root))
    assert seen == [Reading(None, 12345)] * 4


# --- good images ---


@pytest.mark.parametrize("defects_have_masks", [True, False])
def test_a_good_image_whose_mask_marks_a_defect(root, defects_have_masks):
    mask = save_image(root / "ground_truth/good/001_mask.png", np.eye(*SIZE, dtype=np.uint8))
    if not defects_have_masks:
        for path in (root / "ground_truth/dent").iterdir():
            path.unlink()
    text = refused(root, DatasetError, "a good image, but its mask .* marks a defect")
    assert str(mask) in text
    assert str(root / "test/good/001.png") in text


# --- sizes and orientations ---


def write_pair(root, value, mask_shape, *, exif_of_mask=None, late=False):
    """An image that is stored under an orientation, and a mask; both 0 but for the upper left."""
    height, width = (WIDTH, HEIGHT) if value > 4 else (HEIGHT, WIDTH)
    data = png(smooth_pixels(height, width), RGB, exif=orientation(value))
    if late:  # the chunk stands behind the pixels
        chunk = data[data.index(b"eXIf") - 4 : data.index(b"IDAT") - 4]
        data = data.replace(chunk, b"", 1)
        data = data[: data.index(b"IEND") - 4] + chunk + data[data.index(b"IEND") - 4 :]
    (root / "test/dent/001.png").write_bytes(data)
    mask = np.zeros((*mask_shape, 1), np.uint8)
    mask[:5, :7] = 255
    data = png(mask, GREY, exif=orientation(exif_of_mask) if exif_of_mask else None)
    (root / "ground_truth/dent/001_mask.png").write_bytes(data)


@pytest.mark.parametrize("value", [5, 6, 7, 8])
def test_a_mask_as_the_sensor_saw_it_beside_a_turned_image(root, value):
    write_pair(root, value, (WIDTH, HEIGHT))
    text = refused(root, ValueError, "turned by its EXIF orientation, the mask is not: save both")
    assert "001_mask.png is 32 x 24 pixels" in text


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", [5, 6, 7, 8])
def test_an_upright_mask_beside_a_turned_image(root, value, late):
    write_pair(root, value, SIZE, late=late)
    truth = read_truth(category(root), SIZE)
    assert truth.masks[1][:5, :7].all()
    assert truth.notes == []


@pytest.mark.parametrize("value", [2, 3, 4])
def test_a_turn_that_keeps_the_size_is_noted(root, value):
    write_pair(root, value, SIZE)
    (note,) = notes(root)
    assert note.startswith("1 image carried an EXIF orientation, the mask none")
    write_pair(root, value, SIZE, exif_of_mask=value)
    assert notes(root) == []


def test_a_mask_that_is_turned_as_its_image(root):
    write_pair(root, 6, (WIDTH, HEIGHT), exif_of_mask=6)
    truth = read_truth(category(root), SIZE)
    assert truth.masks[1][:7, -5:].all()
    assert truth.masks[1].sum() == 35
    assert truth.notes == []


def test_a_mask_on_its_side_without_exif(root):
    write_pair(root, 1, (WIDTH, HEIGHT))
    refused(root, ValueError, "one of them was turned, by its EXIF orientation or otherwise")


def test_a_mask_of_another_size(root):
    write_pair(root, 1, (10, 11))
    refused(root, ValueError, r"is 10 x 11 pixels but .* is 24 x 32 .* must have the size")


def test_a_bad_image_is_left_to_scoring(root):
    (root / "test/dent/001.png").write_bytes(b"no image")
    check_masks(category(root))


# --- notes ---


@pytest.mark.parametrize("n", [1, 3])
def test_smoothed_masks_are_counted(root, n):
    for path in sorted((root / "ground_truth/dent").iterdir())[:n]:
        Image.open(path).filter(ImageFilter.GaussianBlur(1)).save(path)
    (note,) = notes(root)
    assert note.startswith(f"{n} mask{'s' if n > 1 else ''} had grey values")
    assert f"half of {'their' if n > 1 else 'its'} maximum" in note
    assert note in measure.evaluate(FakeModel(), category(root)).notes


@pytest.mark.parametrize(("n", "noted"), [(2, False), (3, True), (4, True)])
def test_inverted_masks_are_noted(root, n, noted):
    for path in sorted((root / "ground_truth/dent").iterdir())[:n]:
        save(255 - np.asarray(Image.open(path)).astype(int), path)
    found = notes(root)
    assert len(found) == noted
    assert all(f"masks of {n} of 4 defective images" in note for note in found)


def test_empty_masks_and_those_that_the_size_loses_are_noted_apart(root):
    paths = sorted((root / "ground_truth/dent").iterdir())
    save(np.zeros(SIZE), paths[0])
    for path in paths[1:3]:
        speck = np.zeros(SIZE)
        speck[0, 0] = 255
        save(speck, path)
    result = measure.evaluate(FakeModel(), category(root), metric_size=(6, 8))
    assert result.notes == [
        "1 defective image has an empty mask: their pixels count as nominal.",
        "2 defective images have an empty mask at this size: their pixels count as nominal.",
    ]


def test_the_union_of_several_masks_is_measured(tmp_path):
    root = make_category(tmp_path / "part", size=SIZE)
    whole = root / "ground_truth/hole/000_mask.png"
    expected = measure.evaluate(FakeModel(), category(root)).metrics
    pixels = np.array(Image.open(whole))
    folder = root / "ground_truth/hole/000"
    for i, part in enumerate((np.arange(WIDTH) < 7, np.arange(WIDTH) >= 7)):
        save_image(folder / f"{i}.png", pixels * part)
    whole.unlink()
    found = measure.evaluate(FakeModel(), category(root)).metrics
    assert not math.isnan(found["aupro"])
    assert found == expected
