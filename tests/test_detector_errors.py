"""Bad input, through the public API and through the command line.

Every error names the file or the argument and says what to do, and nothing that was there is lost.
"""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import SMALL, fail, succeed
from image_files import make_category, save_image, smooth_pixels
from PIL import Image

from npad import NPad, model_file, ops
from npad.evaluation.datasets import DatasetError, find_categories
from npad.evaluation.measure import evaluate
from npad.images import ImageError
from npad.model_file import ModelFileError


def small(**arguments):
    defaults = {"backbone": "filterbank", "image_size": 64, "n_centroids": 50, "progress": False}
    return NPad(**defaults | arguments)


def fit_nowhere(**arguments):
    """What is wrong with the arguments is told before the images are looked for."""
    small(**arguments).fit("nowhere")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """These images are too small for two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pixels():
    """(4, 64, 64, 3) uint8."""
    return np.stack([smooth_pixels(64, 64, seed=i) for i in range(4)])


@pytest.fixture(scope="module")
def fitted(pixels):
    return small().fit(pixels)


@pytest.fixture
def folder(pixels, tmp_path):
    for i, image in enumerate(pixels):
        save_image(tmp_path / f"images/{i}.png", image)
    return tmp_path / "images"


@pytest.fixture
def model(fitted, tmp_path):
    path = tmp_path / "model.npad"
    fitted.save(path)
    return path


# --- images ---


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def text(path):
    path.write_text("this is no image")


def empty(path):
    path.write_bytes(b"")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_empty_folder(fitted, model, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for use in (small().fit, fitted.predict):
        with pytest.raises(ImageError, match=r"nothing: the folder holds no images"):
            use(nothing)
    says = [nothing, "no images"]
    fail(1, "fit", nothing, "-o", tmp_path / "m", *SMALL, says=says)
    fail(1, "predict", model, nothing, "-o", tmp_path / "out", says=says)
    fail(1, "evaluate", nothing, "-o", tmp_path / "out", *SMALL, says=[nothing, "train/good"])
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [cut_short, text, empty, flipped])
def test_bad_image(damage, fitted, folder, model, tmp_path):
    bad = folder / "2.png"
    damage(bad)
    for use in (small().fit, fitted.predict):
        with pytest.raises(ImageError, match=r"2\.png: .*remove or replace it") as caught:
            use(folder)
        assert caught.value.path == str(bad)
    fail(1, "fit", folder, "-o", tmp_path / "m", *SMALL, says=[bad, "remove or replace it"])
    fail(1, "predict", model, folder, "-o", tmp_path / "out", says=[bad, "remove or replace it"])
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "out/scores.csv").exists()

    model = small().fit(folder, skip_bad=True)
    assert model.n_images_ == 3
    assert [path for path, _ in model.skipped_] == [str(bad)]
    prediction = fitted.predict(folder, skip_bad=True)
    assert prediction.paths == [str(folder / f"{i}.png") for i in (0, 1, 3)]
    assert [path for path, _ in prediction.skipped] == [str(bad)]


def test_rows_before_a_bad_image_are_kept(folder, model, tmp_path):
    text(folder / "3.png")
    out = tmp_path / "out"
    fail(1, "predict", model, folder, "-o", out, "--batch-size", "1", says=["3.png"])
    assert [
        line.split(",")[0] for line in (out / "scores.partial.csv").read_text().splitlines()
    ] == [
        "path",
        *(str(folder / f"{i}.png") for i in range(3)),
    ]
    succeed("predict", model, folder, "-o", out, "--skip-bad", "--no-overlays")
    assert sorted(path.name for path in out.iterdir()) == ["scores.csv", "scores.jsonl"]


def test_missing_file(fitted):
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        fitted.predict(["nowhere.png"])


def test_one_image(pixels, folder, tmp_path):
    with pytest.raises(ValueError, match=r"1 image.*at least 2"):
        small().fit(pixels[:1])
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    fail(1, "fit", folder, "-o", tmp_path / "m", *SMALL, says=["1 image", "at least 2"])


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("fusion", ["product", "sum", "mahalanobis"])
@pytest.mark.parametrize("eps", ["auto", 0.1])
def test_images_that_are_the_same(eps, fusion, window, pixels):
    with pytest.raises(ValueError, match=r"^NPad\.fit: .*images are identical"):
        small(fusion=fusion, window=window, eps=eps).fit(np.repeat(pixels[:1], 5, 0))


@pytest.mark.filterwarnings("ignore:.* every pixel is equal")
def test_images_without_any_structure():
    with pytest.raises(ValueError, match=r"^NPad\.fit: the 5 images are identical"):
        small().fit(np.zeros((5, 64, 64, 3), np.uint8))


def test_images_that_hardly_differ(pixels):
    images = np.repeat(pixels[:1], 5, 0)
    images[3, 5, 5] ^= 1
    for window in (1, 3):  # and no warning, which would be an error
        assert np.isfinite(small(window=window).fit(images).predict(pixels).scores).all()


def test_an_eps_that_is_too_small_says_which_is_not(pixels):
    for eps in (0.0, 1e-12):
        message = (
            rf"positive definite with eps={eps:g}; eps must be above about .* or use eps='auto'"
        )
        with pytest.raises(ValueError, match=message) as caught:
            small(eps=eps, gaussians="joint").fit(pixels)
        enough = float(str(caught.value).split("above about ")[1].split(",")[0])
        (member,) = small(eps=4 * enough, gaussians="joint").fit(pixels).members_
        assert member.eps == 4 * enough


@pytest.mark.parametrize("holdout", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_two_images_are_enough(holdout, seed, pixels):
    """Although one of them, and by its seed perhaps the other, is held out."""
    for fusion in ("product", "sum"):
        model = small(holdout=holdout, seed=seed, fusion=fusion).fit(pixels[:2])
        assert np.isfinite(model.predict(pixels).scores).all()
    assert small(window=1, holdout=holdout, seed=seed).fit(pixels[:3]).n_images_ == 3


def test_two_images_and_window_1(pixels):
    message = (
        r"2 images are too few for window=1 with {}, which holds one of them out; fit 3 or more"
    )
    with pytest.raises(ValueError, match=message.format("eps='auto'")):
        small(window=1).fit(pixels[:2])
    with pytest.raises(ValueError, match=message.format("fusion='sum'")):
        small(window=1, eps=0.1, fusion="sum").fit(pixels[:2])
    assert small(window=1, eps=0.1).fit(pixels[:2]).n_images_ == 2


@pytest.mark.parametrize("n_features", [None, 8])
def test_all_images_are_bad(n_features, folder, fitted):
    for path in folder.iterdir():
        text(path)
    with pytest.raises(ValueError, match=r"0 image.*at least 2"):
        small(n_features=n_features).fit(folder, skip_bad=True)
    with pytest.raises(ValueError, match=r"NPad\.embed: none of the images could be read"):
        fitted.embed(folder, skip_bad=True)


def test_two_image_sizes(pixels, folder, fitted):
    ragged = np.empty(2, dtype=object)
    ragged[:] = [pixels[0], pixels[1][:32]]
    with pytest.raises(TypeError, match=r"two image sizes .* pass a list"):
        small().fit(ragged)
    maps = fitted.predict([pixels[0], pixels[1][:32]]).maps  # which is what the message advises
    assert [map_.shape for map_ in maps] == [(64, 64), (32, 64)]
    save_image(folder / "half.png", pixels[0][:32])
    assert small().fit(folder).n_images_ == 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value, pixels, fitted):
    images = torch.from_numpy(pixels / np.float32(255))
    images[2, 5, 6, 1] = value
    for use in (small().fit, fitted.predict):
        with pytest.raises(ImageError, match=r"image\[2\].*NaN or Inf"):
            use(images)


def test_not_finite_file(pixels, folder, model, tmp_path):
    grey = pixels[0, :, :, 0] / np.float32(255)
    grey[3, 4] = np.nan
    Image.fromarray(grey).save(folder / "grey.tiff")
    says = [folder / "grey.tiff", "NaN or Inf"]
    fail(1, "predict", model, folder, "-o", tmp_path / "out", says=says)
    fail(1, "fit", folder, "-o", tmp_path / "m", *SMALL, says=says)


@pytest.mark.parametrize("scale", [255.0, 65535.0, -1.0])
def test_wrong_range(scale, pixels):
    with pytest.raises(ImageError, match=r"image\[0\].*must lie in \[0, 1\]"):
        small().fit(pixels / np.float32(255) * np.float32(scale))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_, np.complex64, np.uint32])
def test_unsupported_dtype(dtype, pixels, fitted):
    for use in (small().fit, fitted.predict):
        with pytest.raises(TypeError, match=f"dtype {np.dtype(dtype)} is not supported; convert"):
            use(pixels.astype(dtype))


@pytest.mark.parametrize("source", [5, None, [5], {"a": 1}.keys])
def test_no_source(source):
    with pytest.raises(TypeError, match="source"):
        small().fit(source)


# --- arguments ---


@pytest.mark.parametrize("name", ["window", "score_window"])
@pytest.mark.parametrize("value", [0, 2, -3])
def test_even_window(name, value, folder, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must be .*an odd .* got {value}"):
        small(**{name: value}).fit(folder)
    option = f"--{name.replace('_', '-')}"
    given = f"{option}={value}"
    fail(2, "fit", folder, "-o", tmp_path / "m", *SMALL, given, says=[option, "odd", value])


@pytest.mark.parametrize("device", ["nonsense", "cuda:x", "", None, 1.5])
def test_device_that_is_none(device, model):
    message = rf"device must be a torch device such as 'cpu' .*, got {device!r}$"
    for use in (fit_nowhere, lambda **arguments: NPad.load(model, **arguments)):
        with pytest.raises(ValueError, match=message):
            use(device=device)


def test_device_without_values(fitted):
    before = fitted.members_
    for use in (fit_nowhere, fitted.to):
        with pytest.raises(ValueError, match=r"device='meta' cannot be used here \(it holds no v"):
            use(device="meta")
    assert fitted.members_ is before


def test_device_that_is_not_there(model):
    message = r"device='cuda:99' cannot be used here \([^.]*\); give device='cpu', or one that"
    for use in (fit_nowhere, lambda **arguments: NPad.load(model, **arguments)):
        with pytest.raises(ValueError, match=message):
            use(device="cuda:99")


@pytest.mark.parametrize("size", [(64, 64, 3), "64", 64.0, (64.0, 64), (0, 64), []])
def test_image_size_that_is_none(size):
    with pytest.raises(ValueError, match=r"image_size must be a positive int or \(height, width\)"):
        fit_nowhere(image_size=size)


def test_window_larger_than_the_grid_is_one_gaussian(pixels, folder, tmp_path):
    model = small(window=101, fusion="mahalanobis", eps=1e-3, factor_dtype="float32").fit(pixels)
    for member in model.members_:
        for x in (member.mean, member.factor):
            torch.testing.assert_close(x, x[:1].expand_as(x), rtol=1e-3, atol=1e-3)
    scores = small(score_window=101).fit(pixels).predict(pixels).scores
    assert np.isfinite(scores).all()
    succeed("fit", folder, "-o", tmp_path / "m", *SMALL, "--window", "101")


def test_image_size_below_the_stride(pixels, folder, tmp_path):
    with pytest.raises(ValueError, match=r"image_size \(3, 64\) .*the least that works is \d+"):
        small(image_size=(3, 64)).fit(pixels)
    size = ("--image-size", "3x64")
    fail(1, "fit", folder, "-o", tmp_path / "m", *SMALL, *size, says=["image_size (3, 64)"])


def test_tiny_images_are_enlarged(pixels, folder, fitted, model, tmp_path):
    tiny = [image[:2, :3] for image in pixels]
    assert [map_.shape for map_ in fitted.predict(tiny).maps] == [(2, 3)] * 4
    assert small().fit(tiny).n_images_ == 4
    save_image(folder / "tiny.png", tiny[0])
    succeed("predict", model, folder, "-o", tmp_path / "out")
    with Image.open(tmp_path / "out/overlays/tiny.png.png") as image:
        assert image.size == (3, 2)


def test_backbone_that_is_none(folder, tmp_path):
    says = ["resnet19", "resnet18"]
    fail(1, "fit", folder, "-o", tmp_path / "m", *SMALL, "--backbone", "resnet19", says=says)


def test_weights_that_are_none(folder, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_text("no weights")
    args = ("fit", folder, "-o", tmp_path / "m", "--backbone", "resnet18", "--weights", weights)
    fail(1, *args, says=[weights])


# --- data sets ---


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("ground_truth/hole/001_mask.png", "a defect without its mask"),
        ("test/hole/001.png", "a mask without its image"),
    ],
)
def test_masks_and_images_that_miss_each_other(file, remedy, tmp_path):
    root = make_category(tmp_path / "part", size=(64, 64))
    (root / file).unlink()
    with pytest.raises(DatasetError, match=remedy) as caught:
        find_categories(root)
    assert caught.value.path.stem.startswith("001")
    fail(1, "evaluate", root, "-o", tmp_path / "out", *SMALL, says=[remedy, "hole/001"])
    assert not (tmp_path / "out").exists()


def test_mask_of_another_size(tmp_path):
    root = make_category(tmp_path / "part", size=(64, 64))
    mask = save_image(root / "ground_truth/hole/001_mask.png", np.full((32, 64), 255, np.uint8))
    (category,) = find_categories(root)
    with pytest.raises(ValueError, match=r"001_mask\.png is 32 x 64 .* must have the size"):
        evaluate(small(), category)
    fail(1, "evaluate", root, "-o", tmp_path / "out", *SMALL, says=[mask, "32 x 64"])


def test_damaged_mask(tmp_path):
    root = make_category(tmp_path / "part", size=(64, 64))
    mask = root / "ground_truth/hole/001_mask.png"
    text(mask)
    args = ("evaluate", root, "-o", tmp_path / "out", *SMALL, "--skip-bad")
    fail(1, *args, says=[mask])  # without its mask an image cannot be measured, even so


# --- model files ---


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_model_cut_short(keep, model, folder, tmp_path):
    data = model.read_bytes()
    model.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ModelFileError, match=r"model\.npad"):
        NPad.load(model)
    fail(1, "predict", model, folder, "-o", tmp_path / "out", says=[model])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("position", [0, 9, 150, 700, 0.3, 0.9, -1])
def test_model_with_a_flipped_bit(position, model, folder, tmp_path):
    data = bytearray(model.read_bytes())
    data[int(position * len(data)) if isinstance(position, float) else position] ^= 4
    model.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"model\.npad"):
        NPad.load(model)
    fail(1, "predict", model, folder, "-o", tmp_path / "out", says=[model])


def test_model_of_a_newer_version(fitted, folder, tmp_path, monkeypatch):
    newer = tmp_path / "newer.npad"
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "FORMAT_VERSION", model_file.STATISTICS_VERSION + 1)
        fitted.save(newer)
    version = str(model_file.STATISTICS_VERSION + 1)
    with pytest.raises(
        ModelFileError, match=rf"newer\.npad: .*newer npad, format {version}.*upgrade"
    ):
        NPad.load(newer)
    fail(1, "predict", newer, folder, "-o", tmp_path / "out", says=[newer, version])


def test_model_of_another_backbone(fitted, folder, model, tmp_path):
    header, tensors = model_file.read_model(model)
    header["backbones"][0]["weights_hash"] = "0" * 64
    model_file.write_model(model, header, tensors)
    with pytest.raises(ModelFileError, match=r"was fitted on filterbank with weights 000000000000"):
        NPad.load(model)
    fail(1, "predict", model, folder, "-o", tmp_path / "out", says=[model, "--weights"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header: header["members"][0].pop("grid"),
            r"\('grid' is missing\); fit and save the model again",
        ),
        (
            lambda header: header["settings"].update(window=2),
            r"\(NPad: window must be 'auto' or an odd int",
        ),
        (
            lambda header: header["members"][0].update(grid=[3, 4]),
            r"has grid \(3, 4\) with 51 channels, .* fit and save the model",
        ),
    ],
)
def test_model_whose_header_does_not_fit(change, message, tmp_path, pixels):
    path = tmp_path / "m.npad"
    small(fusion="euclidean").fit(pixels).save(path)
    header, tensors = model_file.read_model(path)
    change(header)
    model_file.write_model(path, header, tensors)
    with pytest.raises(ModelFileError, match=message):
        NPad.load(path)


def test_model_whose_bytes_have_no_scales(tmp_path, pixels):
    path = tmp_path / "m.npad"
    small(factor_dtype="int8", nominal_set=None).fit(pixels).save(path)
    header, tensors = model_file.read_model(path)
    size = ops.packed_size(tensors["0.mean"].shape[1])
    tensors["0.factor"] = tensors["0.factor"][:, :size]
    model_file.write_model(path, header, tensors)
    with pytest.raises(
        ModelFileError, match=r"m\.npad: tensor '0\.factor' must be .*int8 of shape"
    ):
        NPad.load(path)


def test_weights_for_the_filter_bank(model, folder, tmp_path):
    weights = tmp_path / "weights.safetensors"
    text(weights)
    args = ("predict", model, folder, "-o", tmp_path / "out", "--weights", weights)
    fail(1, *args, says=["filter bank"])


# --- nothing is lost ---


def test_failed_fit_leaves_the_old_model(folder, model, tmp_path):
    before = model.read_bytes()
    text(folder / "3.png")
    fail(1, "fit", folder, "-o", model, *SMALL, says=["3.png"])
    assert model.read_bytes() == before


KILLED_WHILE_SAVING = """
import os, signal, sys
import numpy as np
from npad import NPad
model = NPad.load(sys.argv[1])
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is renamed
model.save(sys.argv[1])
"""


def test_kill_while_saving(model, fitted):
    before = model.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, model], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert model.read_bytes() == before
    assert len(list(model.parent.iterdir())) == 2  # the other is what the killed one had written
    fitted.save(model)
    assert list(model.parent.iterdir()) == [model]
    NPad.load(model)


def test_save_into_a_folder_that_is_not_there(fitted, tmp_path):
    with pytest.raises(ModelFileError, match=r"none/m: cannot be written.*make the folder first"):
        fitted.save(tmp_path / "none/m")


@pytest.mark.parametrize(
    "n_features",
    [
        None,
        8,
    ],
)
def test_failed_refit_leaves_the_fitted_model(n_features, pixels):
    def camera():
        for i in range(9):  # past the sample that chooses the dimensions
            yield np.stack([smooth_pixels(64, 64, seed=100 + 8 * i + j) for j in range(8)])
        raise ConnectionError("unplugged")

    model = small(n_features=n_features).fit(pixels)
    before = model.predict(pixels).scores
    with pytest.raises(ConnectionError):
        model.fit(camera())
    np.testing.assert_array_equal(model.predict(pixels).scores, before)


def test_output_that_is_a_file(folder, model, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    fail(1, "predict", model, folder, "-o", out, says=[out, "exists"])
    root = make_category(tmp_path / "part", size=(64, 64))
    fail(1, "evaluate", root, "-o", out, *SMALL, says=[out, "exists"])
    assert out.read_text() == "mine"


def test_demo_does_not_overwrite(tmp_path):
    mine = tmp_path / "data-seed0/train/good"
    mine.mkdir(parents=True)
    shutil.copy(__file__, mine / "mine.png")
    fail(1, "demo", "-o", tmp_path, *SMALL)
    assert [*os.walk(tmp_path / "data-seed0")][-1][2] == ["mine.png"]
