import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, fail
from image_files import make_category, save_image, smooth_pixels

from npad.evaluation.datasets import (
    DatasetError,
    Sample,
    find_bad,
    find_categories,
    find_good,
    refuse_masks,
)
from npad.evaluation.folder_names import looks_bad, looks_good
from npad.images import read_image
from npad.images.folders import list_images
from npad.images.masks import read_mask


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


# --- names of folders ---


def rename(root, **names):
    """Give folders other names: good="ok" wherever it is, train="Train" at the root."""
    for old, new in names.items():
        for place in (root, root / "train", root / "test", root / "ground_truth"):
            if (place / old).is_dir():
                (place / old).rename(place / "on the way")
                (place / "on the way").rename(place / new)
    return root


def kinds(category):
    return [sample.defect_type for sample in category.test]


@pytest.mark.parametrize("good", ["good", "Good", "GOOD"])
@pytest.mark.parametrize(
    ("train", "test", "truth"),
    [
        ("train", "test", "ground_truth"),
        ("Train", "TEST", "Ground Truth"),
        ("TRAIN", "Test", "GroundTruth"),
    ],
)
def test_any_case(root, good, train, test, truth):
    save_image(root / "ground_truth/good/000_mask.png", np.zeros((20, 24), np.uint8))
    rename(root, good=good)
    rename(root, train=train, test=test, ground_truth=truth)
    (category,) = find_categories(root)
    assert [path.parent for path in category.train] == [root / train / good] * 3
    assert kinds(category) == ["good", "good", "hole", "hole"]
    assert category.test[0].mask_path == root / truth / good / "000_mask.png"
    assert category.has_masks


@pytest.mark.parametrize(
    ("good", "bad"), [("ok", "ko"), ("OK", "NG"), ("Normal", "Anomaly"), ("fine stuff", "bad")]
)
def test_the_good_folder_may_be_named(root, good, bad):
    rename(root, good=good, hole=bad)
    for name in (good, good.lower(), good.upper()):
        (category,) = find_categories(root, good=name)
        assert sorted(kinds(category)) == sorted(["good", "good", bad, bad])
        assert [sample.is_anomalous for sample in category.test].count(True) == 2
        assert len(category.train) == 3


def test_a_name_of_the_good_folder_that_is_nowhere(root):
    with pytest.raises(DatasetError, match="no folder of good images is called okay"):
        find_categories(root, good="okay")


def test_good_in_one_part_and_another_name_in_the_other(root):
    (root / "test/good").rename(root / "test/ok")
    assert kinds(find_categories(root, good="ok")[0]) == ["hole", "hole", "good", "good"]


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", ["ok", "Normal", "no_defect"])
def test_a_folder_that_looks_good_is_asked_about(root, part, name):
    (root / part / "good").rename(root / part / name)
    with pytest.raises(DatasetError, match=f'good="{name}"') as caught:
        find_categories(root)
    assert caught.value.path == root / part / name
    with pytest.raises(DatasetError, match=f'good="{name}"'):
        find_categories(root, good="okey")


def test_a_folder_that_looks_good_beside_good(root):
    rename(root, hole="clean")
    with pytest.raises(DatasetError, match=r'are these the good images.*good="good"'):
        find_categories(root)
    assert kinds(find_categories(root, good="good")[0]) == ["clean", "clean", "good", "good"]
    with pytest.raises(DatasetError, match="holds good images, as does clean: put them in one"):
        find_categories(root, good="clean")


def test_without_a_good_folder_to_fit_the_others_are_named(root):
    (root / "train/good").rename(root / "train/muster")
    with pytest.raises(DatasetError, match=r"no such folder.*one of muster, .*good=NAME") as caught:
        find_categories(root)
    assert caught.value.path == root / "train/good"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "good",
            "Good",
            "GOOD",
            "good_2",
            "good-new",
            "goods",
            "ok",
            "OK",
            "Ok",
            "ok_images",
            "01_ok",
        ),
        *("OKImages", "okay", "normal", "0_normal", "Normals", "nominal", "PASS", "passed", "fine"),
        *(
            "clean",
            "no_defect",
            "no defects",
            "NoDefect",
            "defect-free",
            "defectFree",
            "defectless",
        ),
        *("non-defective", "not_defective", "without_anomaly", "undamaged", "flawless", "negative"),
        *("i.O.", "IO", "in_Ordnung", "Gutteile", "accepted", "正常"),
    ],
)
def test_looks_good(name):
    assert looks_good(name)


@pytest.mark.parametrize(
    "name",
    [
        *("NG", "ng", "ko", "KO", "bad", "anomaly", "anomalous", "abnormal", "defect", "defective"),
        *("not_ok", "not ok", "not_good", "no_good", "nio", "n.i.O.", "NOK", "reject", "failed"),
        *(
            "hole",
            "fine_scratch",
            "broken",
            "crack",
            "thread",
            "smoke",
            "token",
            "passivation",
            "000",
        ),
        *("normal_wear", "unclean", "imperfect", "positive", "damaged", "error", "test", "images"),
    ],
)
def test_does_not_look_good(name):
    assert not looks_good(name)


@pytest.mark.parametrize("kind", ["good", "hole"])
def test_a_test_set_of_one_kind_is_told(root, kind):
    shutil.rmtree(root / "test" / ("hole" if kind == "good" else "good"))
    if kind == "good":
        shutil.rmtree(root / "ground_truth")
    says = {"good": "no defective images", "hole": "no good images.*call it good: hole"}[kind]
    with pytest.warns(UserWarning, match=says):
        (category,) = find_categories(root)
    assert set(kinds(category)) == {kind}


def test_two_spellings_of_one_part(root):
    (root / "Train").mkdir()
    with pytest.raises(DatasetError, match="is there beside Train: keep one"):
        find_categories(root)


# --- what lies beside images ---


def test_litter_is_no_type(root):
    for name in ("@eaDir", ".cache", "__MACOSX", "#recycle"):
        save_image(root / "test" / name / "a.png", smooth_pixels(8, 8))
        save_image(root / "ground_truth" / name / "a.png", smooth_pixels(8, 8))
        save_image(root.parent / name / "test" / "good" / "a.png", smooth_pixels(8, 8))
    assert set(kinds(find_categories(root.parent)[0])) == {"good", "hole"}


def test_what_is_left_out_is_told_once(tmp_path):
    for name in ("wood", "tile"):
        root = make_category(tmp_path / name)
        for part in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
            (root / part / "x.dng").touch()
            (root / part / "notes.txt").touch()
    with pytest.warns(UserWarning, match="8 files were left out, by suffix: 8 .dng") as told:
        find_categories(tmp_path)
    assert len(told) == 1


def test_a_type_of_other_files_says_which(root):
    (root / "test/dent").mkdir()
    (root / "test/dent/a.jp2").touch()
    with pytest.raises(DatasetError, match=r"dent: the folder holds no images.*but 1 \.jp2"):
        find_categories(root)


def test_linked_types(root):
    (root / "test/hole").rename(root / "pool")
    (root / "test/hole").symlink_to(root / "pool")
    assert kinds(find_categories(root)[0]) == ["good", "good", "hole", "hole"]
    (root / "test/same").symlink_to(root / "pool")
    with pytest.raises(DatasetError, match="same: a link to a folder that is read already"):
        find_categories(root)


def test_a_link_in_a_circle(root):
    (root / "test/circle").symlink_to("circle")
    with pytest.warns(UserWarning, match="1 linked to nothing"):
        assert len(find_categories(root)[0].test) == 4


@pytest.mark.parametrize("ending", ["_mask", "_GT", "_label", "-gt", "_mask_1"])
@pytest.mark.parametrize("folder", ["train/good", "test/hole"])
def test_masks_among_the_images_are_asked_about(root, folder, ending):
    shutil.rmtree(root / "ground_truth")
    mask = root / folder / f"001{ending}.png"
    shutil.copy(root / folder / "001.png", mask)
    with pytest.raises(DatasetError, match="is this the mask of 001") as caught:
        find_categories(root)
    assert caught.value.path == mask


@pytest.mark.parametrize("name", ["masks", "GT", "labels", "segmentation", "ground_truths"])
def test_masks_in_another_folder_are_told(root, name):
    (root / "ground_truth").rename(root / name)
    with pytest.warns(UserWarning, match=f"{name}: not read; masks are looked for in ground_truth"):
        (category,) = find_categories(root)
    assert not category.has_masks


@pytest.mark.parametrize("empty", [False, True])
def test_no_masks(root, empty):
    shutil.rmtree(root / "ground_truth")
    if empty:
        (root / "ground_truth/hole").mkdir(parents=True)
    assert not find_categories(root)[0].has_masks


def test_masks_in_files_that_are_not_read_are_told(root):
    for mask in (root / "ground_truth/hole").iterdir():
        mask.rename(mask.with_suffix(".json"))
    with pytest.warns(UserWarning, match="no masks, since the folder holds no images .*2 .json"):
        (category,) = find_categories(root)
    assert not category.has_masks


def test_several_masks_of_one_image(root):
    several = root / "ground_truth/hole/001"
    several.mkdir()
    (root / "ground_truth/hole/001_mask.png").rename(several / "000.png")
    shutil.copy(several / "000.png", several / "001.png")
    (category,) = find_categories(root)
    assert category.test[3].mask_path == several
    second = save_image(root / "ground_truth/hole/001.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(DatasetError, match=r"a second mask of .*001\.png"):
        find_categories(root)
    second.rename(root / "ground_truth/hole/000_mask1.png")
    with pytest.raises(DatasetError, match="several masks of one image go into a folder") as caught:
        find_categories(root)
    assert caught.value.path == root / "ground_truth/hole/000_mask1.png"


def test_images_in_subfolders_of_a_type_have_their_masks_there(root):
    for part, suffix in (("test", ""), ("ground_truth", "_mask")):
        (root / part / "hole/000").mkdir()
        shutil.copy(
            root / part / f"hole/000{suffix}.png", root / part / f"hole/000/007{suffix}.png"
        )
    (category,) = find_categories(root)
    assert [sample.mask_path.name for sample in category.test[2:]] == [
        *("007_mask.png", "000_mask.png", "001_mask.png")
    ]


# --- what is not to be fitted ---


@pytest.mark.parametrize(
    ("folder", "good"),
    [
        ("", "train/good"),
        ("..", "train/good"),
        ("test", "test/good"),
        ("train", None),
        ("train/good", None),
        ("test/good", None),
    ],
)
@pytest.mark.parametrize("name", ["good", "OK", "normal"])
def test_find_good(root, folder, good, name):
    rename(root, good=name)
    place = (root / folder.replace("good", name)).resolve()
    found = find_good(place, list_images(place))
    assert found == (good and root / good.replace("good", name))


def test_find_good_without_one(root):
    rename(root, good="muster")
    assert find_good(root, list_images(root)) == root / "train"
    assert find_good(root / "test", list_images(root / "test")) is None  # nothing tells


def test_several_good_folders_may_be_fitted(root):
    shutil.copytree(root / "train/good", root / "train/good_2")
    (root / "train/notes").mkdir()
    assert find_good(root / "train", list_images(root / "train")) is None


def test_good_images_are_found_at_any_depth(tmp_path):
    for place in ("candle/Data/Images/Normal", "candle/Data/Images/Anomaly", "candle/Data/Masks"):
        save_image(tmp_path / "VisA" / place / "001.png", np.zeros((20, 24), np.uint8))
    good = tmp_path / "VisA/candle/Data/Images/Normal"
    for folder in (tmp_path, *good.parents[:4]):
        assert find_good(folder, list_images(folder)) == good
    assert find_good(good, list_images(good)) is None


@pytest.mark.parametrize(
    ("mask", "at_fault"),
    [
        ("001_label.bmp", "001_label.bmp"),
        ("masks/001.png", "masks"),
        ("part/Ground Truth/1/001.png", "part/Ground Truth"),
    ],
)
def test_masks_beside_images_to_fit_are_asked_about(root, mask, at_fault):
    folder = root / "train/good"
    save_image(folder / mask, np.zeros((20, 24), np.uint8))
    images = list_images(folder)
    with pytest.raises(DatasetError, match="go into ground_truth") as caught:
        refuse_masks(folder, images, images)
    assert caught.value.path == folder / at_fault
    with pytest.raises(DatasetError, match="go into ground_truth"):
        find_categories(root)
    masks = folder / mask
    refuse_masks(masks.parent, [masks], [masks])  # what is named itself is what is meant


# --- real data ---


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


@pytest.mark.parametrize(
    "name",
    ["NG", "ng", "KO", "NOK", "not_ok", "n.i.O.", "Bad", "bad_parts", "defects", "01_Defective"],
)
def test_folders_of_defects_are_not_fitted(root, name):
    """Good images lie loose, and the folder beside them."""
    assert looks_bad(name)
    place = root / "train/good" / name
    shutil.copytree(root / "test/hole", place)
    assert find_bad(root / "train/good", list_images(root / "train/good")) == place
    fail(2, "fit", root / "train/good", "-o", root / "m", *SMALL, says=[place, "defects", "move"])


@pytest.mark.parametrize(
    "name", ["no_defects", "non-defective", "lot7", "Bad Aibling", "scratch", "NG_2_OK"]
)
def test_other_folders_are(root, name):
    (root / "train/good").rename(root / "train" / name)
    assert find_bad(root / "train", list_images(root / "train")) is None
