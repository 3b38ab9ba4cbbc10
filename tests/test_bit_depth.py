"""Cameras that write 8, 10, 12 or 14 bits into 16: what a model makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_files import smooth_pixels

from npad import NPad
from npad.images import ImageError

FRACTIONS = np.stack([smooth_pixels(32, 32, 1, seed=i)[..., 0] for i in range(4)]) / 255


def at(bits: int, fractions: np.ndarray = FRACTIONS) -> np.ndarray:
    """(N, 32, 32) uint16 of a camera of this depth."""
    return np.rint(fractions * (2**bits - 1)).astype(np.uint16)[:, None]


def small(**options: object) -> NPad:
    return NPad("filterbank", image_size=32, n_centroids=20, progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def eight_bits() -> NPad:
    return small().fit(np.rint(FRACTIONS * 255).astype(np.uint8)[:, None])


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_with_its_depth_a_camera_scores_as_at_16_bits(bits: int, tmp_path: Path) -> None:
    expected = small().fit(at(16)).predict(at(16)).scores
    model = small(bit_depth=bits).fit(at(bits))
    assert model.predict(at(bits)).scores == pytest.approx(expected, rel=0.02)
    model.save(tmp_path / "m")
    again = NPad.load(tmp_path / "m")
    assert again.bit_depth == bits
    assert np.array_equal(again.predict(at(bits)).scores, model.predict(at(bits)).scores)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_a_fit_that_never_uses_the_upper_bits_says_which_depth_fits(bits: int) -> None:
    with pytest.warns(UserWarning, match=rf"almost black.*fit with bit_depth={bits}$") as told:
        small().fit(at(bits))
    assert len(told) == 1


def test_a_fit_that_uses_them_in_half_of_its_images_says_nothing() -> None:
    mixed = at(12)
    mixed[2:] *= 16
    small().fit(mixed)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_one_image_does_not_hide_the_others(bits: int) -> None:
    """A broken pixel in it, or another depth."""
    hot, strayed = at(bits), at(bits)
    hot[2, 0, 5, 5] = 65535
    strayed[2] = at(16)[2]
    for images in (hot, strayed):
        says = rf"3 of 4 images do not use .*{2**bits - 1}: .*fit with bit_depth={bits}$"
        with pytest.warns(UserWarning, match=says) as told:
            model = small().fit(images)
        assert len(told) == 1
        assert model.n_bits_ is None


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("exposure", [0.6, 1.0])
def test_a_model_of_16_bits_refuses_fewer(bits: int, exposure: float) -> None:
    model = small().fit(at(16))
    with pytest.raises(
        ImageError, match=rf"^image\[0\]: .*{bits} bits, but is read as 16.*={bits}$"
    ):
        model.predict(at(bits, exposure * FRACTIONS))
    skipped = model.predict([at(16)[0, 0], at(bits)[1, 0]], skip_bad=True).skipped
    assert [name for name, _ in skipped] == ["image[1]"]


def test_a_model_that_was_fitted_almost_black_refuses_what_is_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="almost black"):
        small().fit(at(12)).save(tmp_path / "m")
    model = NPad.load(tmp_path / "m")
    assert model.n_bits_ == 12
    for other in (at(16), at(14), at(16) / 65535, (at(16) // 257).astype(np.uint8)):
        with pytest.raises(ImageError, match=r"^image\[0\]: .*use 12 of .*bit_depth=12, or 16"):
            model.predict(other)
    model.predict(at(12))
    model.predict(at(12, 0.5 * FRACTIONS))
    assert small(bit_depth=16).fit(at(12)).n_bits_ is None  # somebody has said so


def test_dim_images_of_8_bits_are_of_no_other_depth() -> None:
    dim = np.rint(FRACTIONS * 15).astype(np.uint8)[:, None]
    small().fit(dim).predict(np.concatenate([dim, 17 * dim]))


def test_a_model_of_8_bits_too(eight_bits: NPad) -> None:
    eight_bits.predict(at(16))
    with pytest.raises(ImageError, match="seems to hold 12 bits"):
        eight_bits.predict(at(12))


def test_a_model_of_12_bits_refuses_10_and_16() -> None:
    model = small(bit_depth=12).fit(at(12))
    with pytest.raises(ImageError, match="seems to hold 10 bits, but is read as 12"):
        model.predict(at(10))
    with pytest.raises(ImageError, match=r"4095.*bit_depth"):
        model.predict(at(16))


def test_a_dark_image_is_scored(eight_bits: NPad) -> None:
    """It may be the defect."""
    for part in (0.3, 0.02, 0.001):
        eight_bits.predict(at(16, part * FRACTIONS))


def test_what_the_file_says_comes_first(tmp_path: Path, eight_bits: NPad) -> None:
    for i, image in enumerate(at(12)):
        tag = (281, "H", 1, 4095, True)  # MaxSampleValue
        tifffile.imwrite(tmp_path / f"{i}.tif", image[0], extratags=[tag])
    expected = eight_bits.predict(at(16)).scores
    assert eight_bits.predict(tmp_path).scores == pytest.approx(expected, rel=0.02)
    model = small(bit_depth=10).fit(tmp_path)
    assert model.predict(tmp_path).scores == pytest.approx(
        small().fit(at(16)).predict(at(16)).scores, rel=0.02
    )


def test_embeddings_know_no_depth() -> None:
    from npad.fitting import Fit
    from npad.members import Member

    model = small(eps=0.1)
    embeddings = model.embed(at(16))
    fit = Fit(model._settings(), [Member(0, (1, 2, 3))])
    assert fit.update(embeddings=[embeddings]).finalize().darkest == 0
