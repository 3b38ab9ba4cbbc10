import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import make_category, save_image, smooth_pixels

from npad.evaluation.datasets import (
    DatasetError,
    Sample,
    find_categories,
)
from npad.evaluation.masks import read_mask
from npad.images import read_image


@pytest.fixture
def root(tmp_path):
    return make_category(tmp_path / "tile")


def test_one_category(root):
    (category,) = find_categories(root)
    assert category.name == "tile"
    assert category.train == [root / f"train/good/{i:03}.png" for i in range(3)]
    hole = [root / f"ground_truth/hole/{i:03}_mask.png" for i in range(2)]
    assert category.test == [
        Sample(root / "test/good/000.png", "good", None),
        Sample(root / "test/good/001.png", "good", None),
        Sample(root / "test/hole/000.png", "hole", hole[0]),
        Sample(root / "test/hole/001.png", "hole", hole[1]),
    ]
    assert [sample.is_anomalous for sample in category.test] == [False, False, True, True]


def test_name_of_a_relative_root(root, monkeypatch):
    monkeypatch.chdir(root)
    assert find_categories(".")[0].name == "tile"


def test_many_categories(tmp_path):
    for name in ["wood", "bottle"]:
        make_category(tmp_path / name)
    (tmp_path / "docs").mkdir()
    (tmp_path / "licence.txt").touch()
    assert [c.name for c in find_categories(tmp_path)] == ["bottle", "wood"]
    shutil.rmtree(tmp_path / "wood/train")  # one bad category is not passed over
    with pytest.raises(DatasetError, match="no such folder") as caught:
        find_categories(tmp_path)
    assert caught.value.path == tmp_path / "wood/train/good"


def test_mask_may_have_the_name_of_its_image_and_another_suffix(root):
    old = root / "ground_truth/hole/000_mask.png"
    new = save_image(root / "ground_truth/hole/000.bmp", np.uint8(255 * read_mask(old)))
    old.unlink()
    (category,) = find_categories(root)
    assert category.test[2].mask_path == new


def test_image_whose_name_ends_in_mask(root):
    shutil.copy(root / "test/hole/000.png", root / "test/hole/000_mask.png")
    shutil.copy(
        root / "ground_truth/hole/000_mask.png", root / "ground_truth/hole/000_mask_mask.png"
    )
    (category,) = find_categories(root)
    masks = {s.path.stem: s.mask_path.stem for s in category.test if s.mask_path}
    assert masks == {"000": "000_mask", "000_mask": "000_mask_mask", "001": "001_mask"}


def test_good_image_may_have_a_mask(root):
    mask = save_image(root / "ground_truth/good/001_mask.png", np.zeros((20, 24), np.uint8))
    assert find_categories(root)[0].test[1].mask_path == mask


def damage_no_train(root):
    shutil.rmtree(root / "train")
    return root / "train/good", "no such folder"


def damage_empty_train(root):
    for path in (root / "train/good").iterdir():
        path.unlink()
    return root / "train/good", "holds no images"


def damage_no_test(root):
    shutil.rmtree(root / "test")
    return root / "test", "no such folder"


def damage_empty_type(root):
    (root / "test/scratch").mkdir()
    return root / "test/scratch", "holds no images"


def damage_loose_image(root):
    path = save_image(root / "test/a.png", smooth_pixels(8, 8))
    return path, "put it in a folder that names its type"


def damage_no_mask(root):
    (root / "ground_truth/hole/001_mask.png").unlink()
    return root / "test/hole/001.png", (
        r"a defect without its mask: 1 of 2 defective images have none; add them, here "
        r"ground_truth/hole/001_mask\.png"
    )


def damage_misnamed_masks(root):
    for path in (root / "ground_truth/hole").iterdir():
        path.rename(path.with_stem(path.stem + "s"))
    return (
        root / "ground_truth/hole/000_masks.png",
        "without its image in test: name it as its image",
    )


def damage_no_image(root):
    (root / "test/hole/001.png").unlink()
    return root / "ground_truth/hole/001_mask.png", "a mask without its image"


def damage_no_type(root):
    shutil.rmtree(root / "test/hole")
    return root / "ground_truth/hole/000_mask.png", "a mask without its image"


def damage_two_masks(root):
    mask = root / "ground_truth/hole/001_mask.png"
    return Path(shutil.copy(mask, mask.with_name("001.png"))), "a second mask"


def damage_two_images(root):
    image = root / "test/hole/001.png"
    save_image(image.with_suffix(".bmp"), smooth_pixels(8, 8))
    return image, "shares its mask"


@pytest.mark.parametrize(
    "damage",
    [
        damage_no_train,
        damage_empty_train,
        damage_no_test,
        damage_empty_type,
        damage_loose_image,
        damage_no_mask,
        damage_misnamed_masks,
        damage_no_image,
        damage_no_type,
        damage_two_masks,
        damage_two_images,
    ],
)
def test_damaged_layout_names_the_culprit(root, damage):
    path, reason = damage(root)
    with pytest.raises(DatasetError, match=reason) as caught:
        find_categories(root)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


def test_masks_may_be_missing_altogether(root):
    assert find_categories(root)[0].has_masks
    shutil.rmtree(root / "ground_truth")
    (category,) = find_categories(root)
    assert not category.has_masks
    assert [sample.mask_path for sample in category.test] == [None] * 4
    save_image(root / "ground_truth/good/000_mask.png", np.zeros((20, 24), np.uint8))
    assert not find_categories(root)[0].has_masks
    only_good = dataclasses.replace(category, test=category.test[:2])
    assert only_good.has_masks  # none is missing


@pytest.mark.parametrize(("missing", "named", "more"), [(1, 0, ""), (4, 3, ""), (6, 3, "2 more")])
def test_images_whose_masks_are_missing_are_named(tmp_path, missing, named, more):
    root = make_category(tmp_path / "tile", n_defects=7)
    paths = [root / f"test/hole/{i:03}.png" for i in range(missing)]
    for i in range(missing):
        (root / f"ground_truth/hole/{i:03}_mask.png").unlink()
    with pytest.raises(DatasetError) as caught:
        find_categories(root)
    text = str(caught.value)
    assert text.startswith(f"{paths[0]}: a defect without its mask")
    assert all(str(path) in text for path in paths[: 1 + named])
    assert not any(str(path) in text for path in paths[1 + named :])
    assert f"{missing} of 7 defective images have none" in text
    assert ("more" in text) is bool(more)
    assert more in text


def test_no_data_set(tmp_path):
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        find_categories(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no data set here"):
        find_categories(tmp_path)


@pytest.mark.skipif("NPAD_DATA" not in os.environ, reason="NPAD_DATA is not set")
def test_solar_cells_have_no_masks():
    (category,) = find_categories(Path(os.environ["NPAD_DATA"], "elpv_mono"))
    assert not category.has_masks
    assert len(category.train) > 100
    assert {sample.defect_type for sample in category.test} == {"good", "defective"}


@pytest.mark.skipif("NPAD_DATA" not in os.environ, reason="NPAD_DATA is not set")
def test_magnetic_tiles():
    (category,) = find_categories(Path(os.environ["NPAD_DATA"], "mtd"))
    defects = [sample for sample in category.test if sample.is_anomalous]
    assert (len(category.train), len(category.test), len(defects)) == (762, 582, 392)
    masks = [read_mask(sample.mask_path) for sample in defects]
    assert sum(not mask.any() for mask in masks) == 4
    for sample, mask in list(zip(defects, masks, strict=True))[::20]:
        assert read_image(sample.path).shape[:2] == mask.shape
