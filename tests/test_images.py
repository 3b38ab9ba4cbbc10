import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encode, save_image, smooth_pixels
from PIL import Image
from written_files import (
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    adobe,
    bmp,
    bmp_rows,
    chunk,
    jpeg,
    png,
    pnm,
)

from npad.images import ImageError, ImageSource, Reading, read_image
from npad.images import source as images_module

LOSSLESS = ["png", "bmp", "tif", "tiff", "webp"]


def collect(source, image_size=(16, 16), indices=None, **options):
    """All images of a source as one tensor, with their names."""
    batches = list(ImageSource(source, image_size=image_size, **options).batches(indices))
    return torch.cat([b.images for b in batches]), [name for b in batches for name in b.names]


def worker_threads():
    return [t for t in threading.enumerate() if t.name.startswith("npad-images")]


@pytest.fixture
def folder(tmp_path):
    """Eleven colour images of different sizes."""
    for i in range(11):
        save_image(tmp_path / f"{i:02}.png", smooth_pixels(20 + i, 30 - i, seed=i))
    return tmp_path


# --- reading one file


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_colour_is_read_exactly(tmp_path, suffix):
    pixels = smooth_pixels(13, 17)
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save_image(tmp_path / f"a.{suffix}", pixels, **options))
    assert image.dtype == np.uint8
    assert np.array_equal(image, pixels)


def test_jpeg_is_read_closely(tmp_path):
    pixels = np.uint8(np.linspace(0, 255, 32 * 32).reshape(32, 32)[..., None].repeat(3, 2))
    image = read_image(save_image(tmp_path / "a.jpg", pixels, quality=98))
    assert np.abs(image.astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_grey_has_three_equal_channels(tmp_path, suffix):
    grey = smooth_pixels(9, 7, 1)[..., 0]
    image = read_image(save_image(tmp_path / f"a.{suffix}", grey))
    assert np.array_equal(image, np.stack([grey] * 3, axis=2))


def test_one_bit_spans_the_range(tmp_path):
    Image.fromarray(np.eye(5) > 0).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 1], np.uint8(255 * np.eye(5)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_precision(tmp_path, suffix):
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    image = read_image(save_image(tmp_path / f"a.{suffix}", grey))
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.float32
    assert np.array_equal(image[..., 2], grey.astype(np.float32) / np.float32(65535))


def test_big_endian_16_bit_tiff(tmp_path):
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    tifffile.imwrite(tmp_path / "a.tif", grey, byteorder=">")
    np.testing.assert_allclose(read_image(tmp_path / "a.tif")[..., 0], grey / 65535, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colour(tmp_path, suffix):
    pixels = np.maximum(smooth_pixels(12, 10), 1) * np.uint16(257) - np.uint16(1)
    if suffix == "png":
        (tmp_path / "a.png").write_bytes(png(pixels, 16, RGB))
    else:
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    image = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(image, pixels.astype(np.float32) / np.float32(65535))


def test_float_tiff(tmp_path):
    grey = np.float32(smooth_pixels(12, 10, 1)[..., 0]) / 255
    tifffile.imwrite(tmp_path / "a.tif", grey)
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], grey)
    tifffile.imwrite(tmp_path / "b.tif", grey * 200)
    with pytest.raises(ImageError, match=r"b\.tif: .*\[0, 1\].*divide by 255"):
        read_image(tmp_path / "b.tif")


def test_signed_and_32_bit_tiff_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((8, 8), -3, np.int16))
    with pytest.raises(ImageError, match=r"a\.tif: "):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_alpha_is_dropped(tmp_path, suffix):
    pixels = smooth_pixels(9, 7, 4)
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image = read_image(save_image(tmp_path / f"a.{suffix}", pixels, **options))
    assert np.array_equal(image, pixels[..., :3])


def test_grey_with_alpha(tmp_path):
    pixels = smooth_pixels(9, 7, 2)
    image = read_image(save_image(tmp_path / "a.png", pixels))
    assert np.array_equal(image, pixels[..., [0, 0, 0]])


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette(tmp_path, transparency):
    colours = np.uint8([[10, 20, 30], [200, 100, 0], [0, 255, 7]])
    index = np.uint8(np.arange(35).reshape(5, 7) % 3)
    image = Image.fromarray(index).convert("P")
    image.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    assert np.array_equal(read_image(tmp_path / "a.png"), colours[index])


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(tmp_path, suffix):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 255  # cyan: no red
    Image.fromarray(ink, mode="CMYK").save(tmp_path / f"a.{suffix}")
    assert np.abs(read_image(tmp_path / f"a.{suffix}") - [0.0, 255, 255]).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path, suffix, orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.stack([stored] * 3, axis=2))
    path = save_image(tmp_path / f"a.{suffix}", stored, exif=exif)
    image = read_image(path)
    assert image.shape == (16, 32, 3)
    assert np.abs(image[..., 0].astype(int) - upright).max() <= 40  # JPEG and WebP lose a little
    (batch,) = ImageSource(path, image_size=(8, 8)).batches()
    assert batch.sizes == [(16, 32)]


def test_damaged_exif_does_not_matter(tmp_path):
    pixels = smooth_pixels(16, 16)
    path = save_image(tmp_path / "a.png", pixels, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(read_image(path), pixels)


def test_suffix_does_not_matter(tmp_path):
    pixels = smooth_pixels(8, 8)
    (tmp_path / "a.jpg").write_bytes(encode(pixels, "PNG"))
    assert np.array_equal(read_image(tmp_path / "a.jpg"), pixels)


# --- bad files


def png_of_size(width, height):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


BMP = encode(smooth_pixels(64, 64), "BMP")
BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello, this is no image at all", "text is not an image"),
    "unknown": (b"\1\2\3\4 and more", "not a PNG, JPEG"),
    "gif": (encode(smooth_pixels(8, 8), "GIF"), "a GIF image: not read; save it as PNG or TIFF"),
    "cut.png": (encode(smooth_pixels(64, 64), "PNG")[:3000], "cut short"),
    "cut.jpg": (encode(smooth_pixels(64, 64), "JPEG")[:900], "cut short"),
    "cut.bmp": (BMP[:900], "cut short"),
    "cut.tif": (encode(smooth_pixels(64, 64), "TIFF", compression="tiff_lzw")[:900], "cut short"),
    "cut.webp": (encode(smooth_pixels(64, 64), "WEBP", lossless=True)[:900], "cut short"),
    "bomb": (png_of_size(60_000, 60_000), "decompression bomb.*max_pixels=3600000000"),
    "none.png": (png_of_size(0, 5), "an image of 0 x 5 pixels"),
    "none.bmp": (BMP[:18] + bytes(4) + BMP[22:], "an image of 0 x 64 pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tmp_path, capfd, name):
    data, reason = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(ImageError, match=r"nothing\.png: cannot be read: No such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = save_image(tmp_path / "a.png", smooth_pixels(8, 8))
    path.chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(path)


@pytest.mark.parametrize("limit", [None, 5, 10**12])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "ppm", "tif"])
def test_pillows_limit_of_pixels_does_not_matter(tmp_path, monkeypatch, suffix, limit):
    path = save_image(tmp_path / f"a.{suffix}", smooth_pixels(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert read_image(path, Reading(max_pixels=400)).shape == (20, 20, 3)
    with pytest.raises(ImageError, match=r"20 x 20 pixels are more than 399.*max_pixels=400"):
        read_image(path, Reading(max_pixels=399))


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("a.png", "bad")))
    assert (str(error), error.path, error.reason) == ("a.png: bad", "a.png", "bad")


EXIF = Image.Exif()
EXIF[0x0112] = 6
EXIF[0x010E] = "a longer description"

GREY_PIXELS = smooth_pixels(24, 20, 1)[..., 0]
RUNS = bytes([5, 7, 0, 3, 1, 2, 3, 0, 0, 0, 0, 2, 1, 2, 0, 0] * 20)
SEEDS = [
    encode(smooth_pixels(24, 20), "JPEG", exif=EXIF),
    encode(smooth_pixels(24, 20), "PNG", exif=EXIF),
    encode(smooth_pixels(24, 20), "PNG"),
    encode(GREY_PIXELS, "PNG"),
    encode(np.arange(480, dtype=np.uint16).reshape(24, 20), "PNG"),
    encode(smooth_pixels(24, 20), "JPEG"),
    encode(smooth_pixels(24, 20), "JPEG", progressive=True),
    encode(smooth_pixels(24, 20), "BMP"),
    encode(smooth_pixels(24, 20), "TIFF"),
    encode(smooth_pixels(24, 20), "TIFF", compression="tiff_lzw"),
    encode(smooth_pixels(24, 20), "TIFF", compression="tiff_adobe_deflate"),
    encode(np.float32(GREY_PIXELS) / 255, "TIFF"),
    encode(smooth_pixels(24, 20), "WEBP"),
    encode(smooth_pixels(24, 20, 4), "WEBP", lossless=True),
    png(smooth_pixels(24, 20, 4).astype(int) * 257, 16, RGB_ALPHA, interlaced=True),
    png(
        smooth_pixels(24, 20, 2).astype(int) * 257,
        16,
        GREY_ALPHA,
        before=[chunk(b"sBIT", b"\x0c\x0c")],
    ),
    png(GREY_PIXELS // 64, 2, PALETTE, before=[chunk(b"PLTE", bytes(range(12)))]),
    jpeg(smooth_pixels(3, 2, 4), extra=adobe(2)),
    bmp(bmp_rows(GREY_PIXELS // 64, 2), 20, 24, 2, palette=bytes(range(16))),
    bmp(
        bmp_rows(GREY_PIXELS * 256.0, 16),
        20,
        -24,
        16,
        compression=3,
        masks=bytes([0, 0xF8, 0, 0] * 3),
    ),
    bmp(
        bytes([5, 7, 0, 3, 1, 2, 3, 0, 0, 2, 1, 9, 0, 0] * 20),
        20,
        24,
        8,
        compression=1,
        palette=bytes(range(256)) * 4,
    ),
    bmp(
        bytes([5, 7, 0, 3, 1, 2, 0, 0, 0, 2, 1, 9, 0, 0] * 20),
        20,
        24,
        4,
        compression=2,
        palette=bytes(range(64)),
    ),
    *(pnm(kind, GREY_PIXELS // 128, None if kind in (1, 4) else 4095) for kind in (1, 2, 4, 5)),
    pnm(6, smooth_pixels(24, 20), 255),
]


@st.composite
def damaged_files(draw):
    data = bytearray(draw(st.sampled_from(SEEDS)))
    # Headers decide most of what a decoder does: half of the flips go there.
    place = st.integers(0, 63) | st.integers(0, len(data) - 1)
    for position, value in draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=8)):
        data[position] = value
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


MAGIC = st.sampled_from(
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"BM" + bytes(12) + b"\x28\0\0\0",
        b"II*\0",
        b"MM\0*",
    ]
    + [b"P%d 3 2 " % kind for kind in range(1, 7)]
    + [b"RIFF0000WEBPVP8" + kind for kind in (b" ", b"L", b"X")]
)


@settings(max_examples=300, deadline=None)
@given(damaged_files() | st.builds(bytes.__add__, MAGIC, st.binary(max_size=200)))
def test_any_bytes_give_an_image_or_an_image_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        try:
            image = read_image(path)
        except ImageError:
            pass
        else:
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert image.dtype in (np.uint8, np.float32)
    assert leaked == []


# --- preprocessing


@pytest.mark.parametrize("image_size", [(16, 16), (7, 40), (64, 48)])
def test_result_does_not_depend_on_batch_size_or_workers(folder, image_size):
    expected, _ = collect(folder, image_size, batch_size=1, workers=1)
    assert expected.shape == (11, 3, *image_size)
    assert expected.dtype == torch.float32
    for options in [{"batch_size": 4, "workers": 3}, {"batch_size": 11, "workers": 8}]:
        assert torch.equal(collect(folder, image_size, **options)[0], expected)


def test_batches_have_sizes_names_and_indices(folder):
    source = ImageSource(folder, image_size=(16, 16), batch_size=4)
    batches = list(source.batches())
    assert [len(b.images) for b in batches] == [4, 4, 3]
    assert [i for b in batches for i in b.indices] == list(range(11))
    assert [s for b in batches for s in b.sizes] == [(20 + i, 30 - i) for i in range(11)]


def area_resize(pixels, size):
    """Bilinear with antialiasing in float64: a triangle filter as wide as the reduction."""

    def weights(n_in, n_out):
        scale = n_in / n_out
        support = max(scale, 1.0)
        centre = (np.arange(n_out)[:, None] + 0.5) * scale
        distance = np.abs(np.arange(n_in)[None] + 0.5 - centre) / support
        w = np.clip(1 - distance, 0, None)
        return w / w.sum(1, keepdims=True)

    rows, columns = weights(pixels.shape[0], size[0]), weights(pixels.shape[1], size[1])
    return np.einsum("ih,jw,hwc->cij", rows, columns, pixels)


@pytest.mark.parametrize("image_size", [(16, 16), (5, 61), (48, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_against_its_definition(tmp_path, image_size, channels):
    pixels = smooth_pixels(40, 50, channels)
    expected = np.broadcast_to(area_resize(pixels / 255, image_size), (3, *image_size))
    path = save_image(tmp_path / "a.png", pixels.squeeze())
    # 8 bits: two passes that each round to 1/255.
    np.testing.assert_allclose(collect(path, image_size)[0][0], expected, atol=1.01 / 255)
    np.testing.assert_allclose(collect(pixels, image_size)[0][0], expected, atol=1.01 / 255)
    np.testing.assert_allclose(collect(pixels / 255, image_size)[0][0], expected, atol=1e-6)
    grey16 = pixels.astype(np.uint16) * 257
    np.testing.assert_allclose(collect(grey16, image_size)[0][0], expected, atol=1e-6)


def test_16_bit_file_is_the_same_as_its_array(tmp_path):
    grey = np.uint16(smooth_pixels(40, 50, 1)[..., 0]) * 257
    path = save_image(tmp_path / "a.png", grey)
    assert torch.equal(collect(path)[0], collect(grey)[0])


def test_right_size_passes_through(tmp_path):
    pixels = smooth_pixels(16, 16)
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert torch.equal(collect(pixels)[0], exact)
    assert torch.equal(collect(save_image(tmp_path / "a.png", pixels))[0], exact)
    floats = torch.rand(2, 3, 16, 16)
    assert torch.equal(collect(floats)[0], floats)


# --- arrays


@pytest.mark.parametrize("as_tensor", [False, True])
def test_layouts_agree(as_tensor):
    pixels = np.stack([smooth_pixels(20, 24, 4, seed=i) for i in range(2)])
    convert = torch.from_numpy if as_tensor else np.asarray
    rgb = np.ascontiguousarray(pixels[..., :3])
    expected, names = collect(convert(rgb))
    assert names == ["image[0]", "image[1]"]
    for layout in [pixels, rgb.transpose(0, 3, 1, 2), pixels.transpose(0, 3, 1, 2)]:
        assert torch.equal(collect(convert(np.ascontiguousarray(layout)))[0], expected)
    for layout in [rgb[0], rgb[:1].transpose(0, 3, 1, 2)]:
        assert torch.equal(collect(convert(layout))[0], expected[:1])
    in_a_list = [convert(rgb[0].transpose(2, 0, 1))]  # where an array of three axes is one image
    assert torch.equal(collect(in_a_list)[0], expected[:1])
    grey = np.stack([rgb[..., 0]] * 3).reshape(6, 20, 24)
    expected = collect(convert(grey[:, None]))[0]
    assert expected.shape == (6, 3, 16, 16)
    assert torch.equal(collect(convert(grey))[0], expected)
    assert torch.equal(collect(convert(grey[..., None]))[0], expected)
    assert torch.equal(collect(convert(grey[0]))[0], expected[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_dtypes(dtype):
    images = torch.rand(2, 3, 16, 16).to(dtype)
    assert torch.equal(collect(images)[0], images.float())


def test_strides_gradients_and_byte_order():
    images = torch.rand(2, 3, 16, 32)
    assert torch.equal(collect(images[..., ::2].requires_grad_())[0], images[..., ::2].detach())
    swapped = np.arange(256, dtype=">u2").reshape(16, 16)
    assert torch.equal(collect(swapped)[0], collect(swapped.astype(np.uint16))[0])


def test_list_of_arrays_may_have_any_sizes():
    singles = [smooth_pixels(20, 24), smooth_pixels(30, 18, 1)[..., 0]]
    source = ImageSource([*singles, torch.rand(2, 3, 9, 9)], image_size=(16, 16))
    (batch,) = source.batches()
    assert source.n_images == 4
    assert batch.sizes == [(20, 24), (30, 18), (9, 9), (9, 9)]
    assert torch.equal(batch.images[:1], collect(singles[0])[0])


def test_rounding_above_one_is_no_error():
    images = np.full((1, 16, 16, 3), 1 + 1e-7)
    images[0, 0] = 0
    assert collect(images)[0].max() == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "NaN or Inf"),
        (float("inf"), "NaN or Inf"),
        (-float("inf"), "NaN or Inf"),
        (-0.5, "before normalisation"),
        (200, "divide by 255"),
        (4000, "divide by 65535"),
        (1e6, "divide by its maximum"),
    ],
)
def test_bad_values_name_the_image(value, reason):
    images = torch.rand(4, 3, 16, 16)
    images[2, 1, 5, 5] = value
    with pytest.raises(ImageError, match=reason) as caught:
        collect(images)
    assert caught.value.path == "image[2]"
    source = ImageSource(images, image_size=(16, 16), skip_bad=True)
    (batch,) = source.batches()
    assert batch.indices == [0, 1, 3]
    assert [name for name, _ in source.skipped] == ["image[2]"]


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_, np.complex64, np.uint32])
def test_dtypes_that_are_not_supported(dtype):
    with pytest.raises(TypeError, match=f"source: dtype {np.dtype(dtype)} is not supported"):
        ImageSource(np.zeros((2, 16, 16, 3), dtype), image_size=(16, 16))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((8,), "expected images"),
        ((2, 2, 8, 8), "expected images"),
        ((1, 2, 3, 8, 8), "expected images"),
        ((2, 0, 8, 3), "without pixels"),
        ((2, 3, 8, 0), "without pixels"),
        ((2, 3, 8, 3), "which axis"),
        ((0, 8, 8, 3), "holds no images"),
    ],
)
def test_shapes_that_are_not_supported(shape, reason):
    with pytest.raises(ValueError, match=reason):
        ImageSource(np.zeros(shape, np.uint8), image_size=(16, 16))


def test_two_sizes_in_one_array_or_batch():
    small, large = smooth_pixels(8, 8), smooth_pixels(9, 9)
    ragged = np.empty(2, object)
    ragged[:] = [small, large]
    with pytest.raises(TypeError, match="two image sizes cannot form one array"):
        ImageSource(ragged, image_size=(8, 8))
    for item in [[small, large], ([small, large], [0, 1]), {"image": [small, large]}]:
        with pytest.raises(ValueError, match=r"one size.*\(8, 8, 3\), \(9, 9, 3\)"):
            collect(iter([item]))


# --- iterables


def test_iterables_of_every_kind_of_batch():
    images = torch.rand(5, 3, 16, 16)
    labels = torch.arange(5)
    for item in [images, images.numpy(), (images, labels), [images, labels], {"image": images}]:
        batches = list(ImageSource(iter([item, item]), image_size=(16, 16), batch_size=4).batches())
        assert [len(b.images) for b in batches] == [4, 1, 4, 1]
        assert torch.equal(torch.cat([b.images for b in batches]), torch.cat([images, images]))
        assert [i for b in batches for i in b.indices] == list(range(10))
        assert batches[-1].names == ["image[9]"]


def test_data_loader():
    data = torch.utils.data.TensorDataset(torch.rand(10, 3, 16, 16), torch.arange(10))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    source = ImageSource(loader, image_size=(16, 16))
    assert (source.n_images, source.reiterable, source.random_access) == (10, True, False)
    for _ in range(2):
        assert torch.equal(torch.cat([b.images for b in source.batches()]), data.tensors[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 4}, 10),
        ({"batch_size": 4, "drop_last": True}, 8),
        ({"batch_size": 4, "shuffle": True}, 10),
        ({"sampler": torch.utils.data.SubsetRandomSampler([1, 2, 3])}, 3),
        ({"batch_sampler": [[0, 1], [2]]}, None),
        ({"batch_size": None}, None),
    ],
)
def test_length_of_a_data_loader(options, expected):
    data = torch.utils.data.TensorDataset(torch.rand(10, 3, 16, 16))
    loader = torch.utils.data.DataLoader(data, **options)
    source = ImageSource(loader, image_size=(16, 16))
    assert source.n_images == expected
    assert sum(len(b.names) for b in source.batches()) == (
        expected or {True: 3, False: 10}["batch_sampler" in options]
    )


def test_one_shot_iterator():
    source = ImageSource((torch.rand(1, 3, 16, 16) for _ in range(3)), image_size=(16, 16))
    assert (source.n_images, source.reiterable) == (None, False)
    assert sum(len(b.names) for b in source.batches()) == 3
    with pytest.raises(ValueError, match="used up"):
        source.batches()


def test_no_look_ahead_in_an_iterable():
    given_out = []

    def camera():
        for i in range(5):
            given_out.append(i)
            yield torch.rand(1, 3, 16, 16)

    batches = ImageSource(camera(), image_size=(16, 16)).batches()
    next(batches)
    assert given_out == [0]


@pytest.mark.parametrize(
    ("item", "error", "reason"),
    [
        ({"pixels": 1}, TypeError, 'must have the key "image"'),
        (7, TypeError, "expected an array, a tensor, a path, .* got int"),
        ((), ValueError, "a batch must be one array"),
        (np.zeros((5, 16, 16), np.uint8), ValueError, "expected images"),
    ],
)
def test_bad_items(item, error, reason):
    with pytest.raises(error, match=reason):
        collect(iter([smooth_pixels(16, 16)[None], item]))


def test_empty_iterable():
    with pytest.raises(ValueError, match="yielded no images"):
        collect(iter([]))


def test_sources_that_are_not_supported(tmp_path):
    with pytest.raises(TypeError, match="got int"):
        ImageSource(3, image_size=(8, 8))
    for name in ["batch_size", "workers"]:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ImageSource(np.zeros((8, 8), np.uint8), image_size=(8, 8), **{name: 0})
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        ImageSource(np.zeros((8, 8), np.uint8), image_size=(8, 0))


# --- subsets, bad images, threads


def test_indices(folder):
    everything, names = collect(folder)
    chosen = [7, 0, 7, 3]
    assert ImageSource(folder, image_size=(16, 16)).random_access
    images, chosen_names = collect(folder, indices=chosen, batch_size=3)
    assert torch.equal(images, everything[chosen])
    assert chosen_names == [names[i] for i in chosen]
    for bad in [11, -1]:
        with pytest.raises(IndexError, match=f"index {bad} is out of range: the source has 11"):
            collect(folder, indices=[bad])
    with pytest.raises(ValueError, match="indices need a source of paths or arrays"):
        collect(iter([everything]), indices=[0])


def test_bad_image_surfaces_at_its_place(folder):
    (folder / "06.png").write_bytes(b"no image")
    batches = ImageSource(folder, image_size=(16, 16), batch_size=2, workers=3).batches()
    assert [next(batches).indices for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ImageError, match=r"06\.png"):
        next(batches)
    assert worker_threads() == []


def test_skip_bad(folder):
    (folder / "00.png").write_bytes(b"no image")
    (folder / "06.png").unlink()
    paths = [folder / f"{i:02}.png" for i in range(11)]
    source = ImageSource(paths, image_size=(16, 16), batch_size=4, skip_bad=True)
    for _ in range(2):
        batches = list(source.batches())
        assert [b.indices for b in batches] == [[1, 2, 3, 4], [5, 7, 8, 9], [10]]
        assert [name for name, _ in source.skipped] == [str(paths[0]), str(paths[6])]
        assert "No such file" in source.skipped[1][1]
    assert source.n_images == 11


def test_look_ahead_is_bounded(folder, monkeypatch):
    loaded = []
    load = images_module.load

    def counting(image, name, **options):
        loaded.append(name)
        return load(image, name, **options)

    monkeypatch.setattr(images_module, "load", counting)
    source = ImageSource([folder] * 10, image_size=(16, 16), batch_size=4, workers=2)
    batches = source.batches()
    assert loaded == []
    next(batches)
    deadline = time.monotonic() + 10
    while len(loaded) < 4 + 4 + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(loaded) == 4 + 4 + 2  # the batch given out, the next one, one for each worker
    batches.close()
    assert worker_threads() == []
    assert len(loaded) == 4 + 4 + 2


def test_leaving_the_loop_ends_the_threads(folder):
    source = ImageSource([folder] * 10, image_size=(16, 16), batch_size=2, workers=4)
    for _ in source.batches():
        assert worker_threads()
        break
    assert worker_threads() == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c(folder):
    script = """
        import sys, time
        from npad.images.source import ImageSource
        source = ImageSource([sys.argv[1]] * 1000, image_size=(256, 256), workers=4)
        for batch in source.batches():
            print("going", flush=True)
            time.sleep(0.01)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert stderr.strip().endswith("KeyboardInterrupt")
