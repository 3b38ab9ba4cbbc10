"""The woven data set: layout, exact masks, the same bytes from the same seed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from npad.evaluation import synthetic
from npad.evaluation.datasets import find_categories
from npad.images.masks import read_mask


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_layout_is_a_category(tmp_path):
    root = synthetic.make_dataset(
        tmp_path / "cloth", image_size=(96, 128), n_train=3, n_test_good=2, n_defective=7
    )
    (category,) = find_categories(root)
    assert category.name == "cloth"
    assert len(category.train) == 3
    by_type = [sample.defect_type for sample in category.test]
    assert by_type.count("good") == 2
    assert set(by_type) == {"good", *synthetic.DEFECT_TYPES}
    assert len(by_type) == 9
    for sample in category.test:
        with Image.open(sample.path) as image:
            assert (image.mode, image.size) == ("RGB", (128, 96))
        if sample.is_anomalous:
            with Image.open(sample.mask_path) as mask:
                assert (mask.mode, mask.size) == ("L", (128, 96))
                assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_seed_decides_every_byte(tmp_path):
    size = {"image_size": (64, 64), "n_train": 2, "n_test_good": 1, "n_defective": 5}
    first = contents(synthetic.make_dataset(tmp_path / "a", 3, **size))
    assert contents(synthetic.make_dataset(tmp_path / "b", 3, **size)) == first
    other = contents(synthetic.make_dataset(tmp_path / "c", 4, **size))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if "ground_truth" not in name)
    images = [data for name, data in first.items() if "ground_truth" not in name]
    assert len(set(images)) == len(images)  # no image is there twice


@pytest.mark.parametrize("kind", synthetic.DEFECT_TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_mask_is_where_the_cloth_was_changed(kind, seed):
    size = (128, 128)
    clean = synthetic._Cloth(np.random.default_rng(seed), size).render()
    rng = np.random.default_rng(seed)
    changed, mask = synthetic.DEFECT_TYPES[kind](synthetic._Cloth(rng, size), rng)
    difference = np.abs(changed - clean).max(axis=2)
    near = ndimage.binary_dilation(mask, np.ones((5, 5)))  # the lens blurs the edge
    assert mask.any()
    assert mask.mean() < 0.2
    assert difference[~near].max() == 0
    assert difference[mask].max() > 0.03  # it can be seen


def test_cloth_is_a_texture_that_no_two_images_share():
    cloths = [synthetic._Cloth(np.random.default_rng(i), (128, 128)).render() for i in range(2)]
    for cloth in cloths:
        assert cloth.shape == (128, 128, 3)
        assert 0.02 < cloth.std() < 0.3
        spectrum = np.abs(np.fft.rfft2(cloth.mean(axis=2) - cloth.mean()))
        peak = np.unravel_index(spectrum.argmax(), spectrum.shape)
        period = 128 / np.hypot(min(peak[0], 128 - peak[0]), peak[1])
        assert 6 < period < 34  # of a thread (8 pixels) up to the twill's repeat (32)
    assert np.abs(cloths[0] - cloths[1]).mean() > 0.02


def test_default_set_is_made_in_seconds(tmp_path):
    start = time.process_time()
    root = synthetic.make_dataset(tmp_path / "cloth")
    assert time.process_time() - start < 10  # about 2.5 s on a quiet core
    (category,) = find_categories(root)
    assert (len(category.train), len(category.test)) == (60, 40)
    assert all(read_mask(s.mask_path).any() for s in category.test if s.is_anomalous)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        synthetic.make_dataset(tmp_path)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        synthetic.make_dataset(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (32, 256)}, "image_size must be at least 64 x 64"),
        ({"n_train": 0}, "n_train must be at least 1, got 0"),
        ({"n_defective": -1}, "n_defective must be at least 0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic.make_dataset(tmp_path / "cloth", **arguments)
    assert not (tmp_path / "cloth").exists()
