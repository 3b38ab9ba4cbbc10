"""Masks as annotators save them. Every file shows the same defect, or is refused by name."""

import io
import struct

import numpy as np
import pytest
from image_files import save_image, smooth_pixels
from mask_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, orientation, png, tiff
from PIL import Image, ImageDraw, ImageFilter
from written_files import bmp, bmp_rows, chunk, pnm, xmp

from npad.images import ImageError
from npad.images.masks import load_mask, read_header, read_mask, resample_mask

SIZE = HEIGHT, WIDTH = 40, 64


def shape(scale=1):
    """A disc and a thin scratch, not the same under any turn."""
    image = Image.new("L", (WIDTH * scale, HEIGHT * scale))
    draw = ImageDraw.Draw(image)
    draw.ellipse([8 * scale, 6 * scale, 26 * scale - 1, 22 * scale - 1], fill=255)
    draw.line([40 * scale, 30 * scale, 60 * scale, 34 * scale], fill=255, width=2 * scale)
    return image


DEFECT = np.asarray(shape()) > 0


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def grey(value=255, background=0):
    return np.where(DEFECT, value, background)[..., None]


def colour(value, background=(0, 0, 0)):
    return np.where(DEFECT[..., None], value, background)


def joined(*channels):
    return np.concatenate([np.broadcast_to(c, (*SIZE, 1)) for c in channels], axis=2)


BLACK, WHITE, MAROON, VOID = (0, 0, 0), (255, 255, 255), (128, 0, 0), (224, 224, 192)
NOISE = np.random.default_rng(0).integers(1, 256, (*SIZE, 1))
KINDS = {
    "grey 255": png(grey(), GREY),
    "grey 1": png(grey(1), GREY),
    "grey 7": png(grey(7), GREY),
    "1 bit": png(grey(1), GREY, 1),
    "2 bits": png(grey(3), GREY, 2),
    "4 bits": png(grey(9), GREY, 4),
    "16 bits, 65535": png(grey(65535), GREY, 16),
    "16 bits, 4095": png(grey(4095), GREY, 16),
    "16 bits, 1": png(grey(1), GREY, 16),
    "background 1": png(grey(2, 1), GREY),
    "background 127": png(grey(255, 127), GREY),
    "white": png(colour(WHITE), RGB),
    "red": png(colour((255, 0, 0)), RGB),
    "faint blue": png(colour((0, 0, 1)), RGB),
    "red on dark blue": png(colour((255, 0, 0), (0, 0, 40)), RGB),
    "16-bit colour": png(colour((0, 65535, 0)), RGB, 16),
    "palette": png(grey(1), PALETTE, palette=[BLACK, MAROON]),
    "palette of 1 bit": png(grey(1), PALETTE, 1, palette=[BLACK, WHITE]),
    "palette that begins with white": png(grey(0, 1), PALETTE, 2, palette=[WHITE, BLACK, MAROON]),
    "palette, background transparent": png(
        grey(1), PALETTE, palette=[WHITE, WHITE], transparency=b"\0\xff"
    ),
    "palette, opaque": png(grey(1), PALETTE, palette=[BLACK, MAROON], transparency=b"\xff\xff"),
    "alpha over white": png(joined(255, grey()), GREY_ALPHA),
    "alpha over black": png(joined(0, grey()), GREY_ALPHA),
    "alpha over a picture": png(joined(NOISE, NOISE, NOISE, grey()), RGBA),
    "alpha of 16 bits": png(joined(65535, grey(65535)), GREY_ALPHA, 16),
    "red brush": png(joined(grey(), 0, 0, grey(90)), RGBA),
    "grey, all opaque": png(joined(grey(), 255), GREY_ALPHA),
    "colour, all opaque": png(joined(grey(), 0, 0, 255), RGBA),
    "colour, all transparent": png(joined(grey(), grey(), grey(), 0), RGBA),
    "one grey is transparent": png(grey(200, 3), GREY, transparency=b"\0\x03"),
    "one colour is transparent": png(
        colour(WHITE, (255, 0, 255)), RGB, transparency=struct.pack(">3H", 255, 0, 255)
    ),
    "one of 16 greys is transparent": png(grey(0, 15), GREY, 4, transparency=b"\0\x0f"),
    "one of 65536 greys is transparent": png(grey(0, 300), GREY, 16, transparency=b"\1\x2c"),
    "one deep colour is transparent": png(
        colour((0, 0, 0), (9, 0, 300)), RGB, 16, transparency=struct.pack(">3H", 9, 0, 300)
    ),
    "tiff 255": tiff(np.uint8(grey()[..., 0])),
    "tiff 1": tiff(np.uint8(grey(1)[..., 0]), compression="zlib"),
    "tiff of 1 bit": tiff(DEFECT, photometric="minisblack"),
    "tiff of 16 bits": tiff(np.uint16(grey(1)[..., 0]), byteorder=">"),
    "tiff, white is zero": tiff(255 - np.uint8(grey()[..., 0]), photometric="miniswhite"),
    "tiff of floats": tiff(np.float32(DEFECT)),
    "tiff, red": tiff(np.uint8(colour((255, 0, 0))), photometric="rgb"),
    "tiff with alpha": tiff(
        np.uint8(joined(255, 255, 255, grey())), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "tiff with alpha of 16 bits": tiff(
        np.uint16(257 * joined(255, 255, 255, grey())),
        photometric="rgb",
        planarconfig="contig",
        extrasamples=["unassalpha"],
    ),
    "bmp with alpha": bmp(
        bmp_rows(255 | grey()[..., 0].astype(np.uint32) << 24, 32),
        WIDTH,
        HEIGHT,
        32,
        compression=3,
        masks=struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        header=108,
    ),
    "bmp, one of two greys": bmp(
        bmp_rows(grey(1)[..., 0], 8), WIDTH, HEIGHT, 8, palette=b"\0\0\0\0\xff\xff\xff\0"
    ),
    "bmp of 1 bit": encoded(Image.fromarray(DEFECT), "BMP"),
    "webp with alpha": encoded(
        Image.fromarray(np.uint8(joined(255, 0, 0, grey()))), "WEBP", lossless=True, exact=True
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_defect_comes_out(tmp_path, kind):
    path = tmp_path / "mask.png"  # the suffix does not matter
    path.write_bytes(KINDS[kind])
    mask = load_mask(path)
    assert mask.marked.dtype == np.bool_
    np.testing.assert_array_equal(mask.marked, DEFECT)
    assert (mask.was_cut, mask.is_turned) == (False, False)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["png", "png with alpha", "tiff", "tiff of 16 bits", "tiff with alpha"]
)
def test_an_orientation_is_obeyed(tmp_path, kind, value):
    turned = {
        1: DEFECT, 2: DEFECT[:, ::-1], 3: DEFECT[::-1, ::-1], 4: DEFECT[::-1],
        5: DEFECT.T, 6: np.rot90(DEFECT), 7: DEFECT[::-1, ::-1].T, 8: np.rot90(DEFECT, -1),
    }[value]  # fmt: skip
    stored = np.uint8(255 * turned)
    alpha = np.stack([np.full_like(stored, 255)] * 3 + [stored], axis=2)
    tag = {"extratags": [(274, "H", 1, value, True)]}
    (tmp_path / "a.png").write_bytes(
        {
            "png": lambda: png(stored, GREY, exif=orientation(value)),
            "png with alpha": lambda: png(alpha, RGBA, exif=orientation(value)),
            "tiff": lambda: tiff(stored, compression="zlib", **tag),
            "tiff of 16 bits": lambda: tiff(np.uint16(stored), compression="zlib", **tag),
            "tiff with alpha": lambda: tiff(
                alpha, photometric="rgb", extrasamples=["unassalpha"], **tag
            ),
        }[kind]()
    )
    mask = load_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(mask.marked, DEFECT)
    assert mask.is_turned is (value > 1)
    header = read_header(tmp_path / "a.png")
    assert (header.upright_size, header.orientation) == (SIZE, value)


def test_an_orientation_in_xmp_turns_alpha_too(tmp_path):
    alpha = joined(255, 255, 255, grey())[::-1, ::-1]
    data = png(alpha, RGBA)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(3))
    at = data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + text + data[at:])
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), DEFECT)


# --- more than two values ---


def reduced(how):
    return shape(8).resize((WIDTH, HEIGHT), how)


def doubled(how):
    return shape().resize((2 * WIDTH, 2 * HEIGHT), how)


def again(image, **options):
    """After it was saved with loss, in a file without loss."""
    return Image.open(io.BytesIO(encoded(image, **options))).convert("L")


def red(image):
    return Image.merge("RGB", [image, *[Image.new("L", image.size)] * 2])


HOW = Image.Resampling
SMOOTHED = {
    "drawn": (shape(8).resize((2 * WIDTH, 2 * HEIGHT), HOW.NEAREST).reduce(2), "PNG", {}),
    "reduced, box": (reduced(HOW.BOX), "PNG", {}),
    "reduced, bilinear": (reduced(HOW.BILINEAR), "PNG", {}),
    "reduced, bicubic": (reduced(HOW.BICUBIC), "BMP", {}),
    "reduced, lanczos": (reduced(HOW.LANCZOS), "TIFF", {}),
    "doubled, bilinear": (doubled(HOW.BILINEAR), "PNG", {}),
    "doubled, lanczos": (doubled(HOW.LANCZOS), "PNG", {}),
    "blurred": (shape().filter(ImageFilter.GaussianBlur(1)), "PNG", {}),
    "jpeg 40": (shape(), "JPEG", {"quality": 40}),
    "jpeg 75": (shape(), "JPEG", {"quality": 75}),
    "jpeg 100": (shape(), "JPEG", {"quality": 100}),
    "jpeg in colour": (shape().convert("RGB"), "JPEG", {"quality": 85}),
    "webp": (shape(), "WEBP", {"quality": 80}),
    "drawn in red": (red(reduced(HOW.BOX)), "PNG", {}),
    "webp in red": (red(shape()), "WEBP", {"quality": 80}),
    "jpeg kept as png": (again(shape(), image_format="JPEG", quality=75), "PNG", {}),
    "webp kept as png": (again(shape(), image_format="WEBP", quality=75), "PNG", {}),
}


@pytest.mark.parametrize("kind", SMOOTHED)
def test_smoothed_edges_are_cut_at_half_of_the_maximum(tmp_path, kind):
    image, image_format, options = SMOOTHED[kind]
    (tmp_path / "mask").write_bytes(encoded(image, image_format, **options))
    mask = load_mask(tmp_path / "mask")
    assert mask.was_cut
    with Image.open(tmp_path / "mask") as saved:
        levels = np.asarray(saved.convert("RGB"), dtype=float).max(axis=2)
    np.testing.assert_array_equal(mask.marked, levels >= levels.max() / 2)
    at_edges = np.asarray(doubled(HOW.NEAREST) if levels.shape != SIZE else shape()) > 0
    assert np.mean(mask.marked != at_edges) < 0.02
    if "jpeg" in kind:
        np.testing.assert_array_equal(mask.marked, DEFECT)


LOSSES = [("WEBP", 10), ("WEBP", 80), ("JPEG", 20), ("JPEG", 50), ("JPEG", 75), ("JPEG", 95)]


@pytest.mark.parametrize(("image_format", "quality"), LOSSES)
@pytest.mark.parametrize("bright", [127, 255])
def test_what_loss_leaves_in_flat_places_is_no_class(tmp_path, image_format, quality, bright):
    large = Image.new("L", (1024, 1024))
    ImageDraw.Draw(large).rectangle((170, 170, 512, 341), fill=bright)
    image = again(large, image_format=image_format, quality=quality)
    mask = load_mask(save_image(tmp_path / "mask.png", np.asarray(image)))
    assert np.mean(mask.marked != (np.asarray(large) > 0)) < 0.001


def test_smoothed_alpha_and_floats_are_cut(tmp_path):
    soft = np.asarray(reduced(HOW.BOX))
    expected = soft >= soft.max() / 2
    for data in (png(joined(0, soft[..., None]), GREY_ALPHA), tiff(np.float32(soft) / 255)):
        (tmp_path / "mask").write_bytes(data)
        mask = load_mask(tmp_path / "mask")
        assert mask.was_cut
        np.testing.assert_array_equal(mask.marked, expected)


def classes(values, thin=False):
    """Regions of several values beside and across each other, and where any of them is."""
    image = Image.new("I;16" if max(values) > 255 else "L", (160, 120))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(1)
    for value in values:
        x, y = rng.uniform(5, 120), rng.uniform(5, 90)
        if thin:
            draw.line([x, y, x + 30, y + 12], fill=value)
        else:
            draw.rectangle([x, y, x + rng.uniform(2, 20), y + rng.uniform(2, 20)], fill=value)
    return np.asarray(image)


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize(
    "values", [(1, 2, 3), (255, 10), (85, 170, 255), (253, 254, 255), range(1, 41), (300, 9, 4000)]
)
def test_numbers_of_classes_are_all_defects(tmp_path, values, thin):
    labels = classes(values, thin)
    path = save_image(tmp_path / "mask.png", labels)
    mask = load_mask(path)
    assert not mask.was_cut
    np.testing.assert_array_equal(mask.marked, labels > 0)


def test_a_class_inside_another_is_no_smooth_edge(tmp_path):
    labels = np.zeros((30, 30), np.uint8)
    labels[5:20, 5:20], labels[6:19, 6:19] = 1, 2  # a rim of one pixel
    path = save_image(tmp_path / "mask.png", labels)
    np.testing.assert_array_equal(read_mask(path), labels > 0)


def test_classes_beside_what_is_void(tmp_path):
    labels = np.zeros((40, 40), np.uint8)
    for value, x in ((1, 4), (2, 16), (3, 28)):
        labels[5:15, x - 1 : x + 3], labels[6:14, x : x + 2] = 255, value
    path = save_image(tmp_path / "mask.png", labels)
    np.testing.assert_array_equal(read_mask(path), labels > 0)


def test_colours_of_classes_and_of_what_is_void(tmp_path):
    index = np.zeros(SIZE, np.uint8)
    index[4:20, 4:20], index[8:16, 8:16], index[25:30, 30:50] = 3, 1, 2
    path = tmp_path / "mask.png"
    path.write_bytes(png(index, PALETTE, palette=[BLACK, MAROON, (64, 0, 0), VOID]))
    np.testing.assert_array_equal(read_mask(path), index > 0)


# --- nothing, everything, nonsense ---


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", [0, 255])
def test_all_of_one_value(tmp_path, image_format, value):
    (tmp_path / "mask").write_bytes(encoded(Image.new("L", (32, 24), value), image_format))
    mask = load_mask(tmp_path / "mask")
    assert not mask.was_cut
    assert (mask.marked == bool(value)).all()


def test_several_masks_of_one_image(tmp_path):
    parts = [DEFECT & (np.arange(WIDTH) < 32), DEFECT & (np.arange(WIDTH) >= 32)]
    folder = tmp_path / "000"
    for i, part in enumerate(parts):
        save_image(folder / f"{i:03}.png", np.uint8(255 * part))
    np.testing.assert_array_equal(read_mask(folder), DEFECT)
    wrong = save_image(folder / "002.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(ImageError, match=r"002\.png: not of the size of .*000\.png") as caught:
        read_mask(folder)
    assert caught.value.path == str(wrong)


REFUSED = {
    "no image": (b"no mask", "mask"),
    "red on white": (png(colour((255, 0, 0), WHITE), RGB), "background that is not black"),
    "red on blue": (png(colour((255, 0, 0), (0, 0, 200)), RGB), "background that is not black"),
    "two pnm": (pnm(5, grey()[..., 0], 255) * 2, "2 pages: save one mask"),
    "two pages": (tiff(np.stack([np.uint8(grey()[..., 0])] * 2)), "2 pages: save one mask"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_is_refused(tmp_path, kind):
    data, reason = REFUSED[kind]
    path = tmp_path / "mask.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        read_mask(path)
    assert caught.value.path == str(path)


def test_a_header_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert read_header(tmp_path / "a.png") is None
    assert read_header(tmp_path / "none.png") is None


def test_a_header_is_read_without_decoding(tmp_path):
    data = png(smooth_pixels(16, 24), RGB, exif=orientation(6))
    (tmp_path / "a.png").write_bytes(data[: data.index(b"IDAT") + 4])
    assert read_header(tmp_path / "a.png").upright_size == (24, 16)


@pytest.mark.parametrize("size", [(6, 9), (3, 3), (4, 5), (17, 31), (1, 1)])
def test_resample_mask(size):
    mask = smooth_pixels(6, 9, 1)[..., 0] > 128
    out = resample_mask(mask, size)
    assert (out.shape, out.dtype) == (size, np.bool_)
    for y, x in np.ndindex(size):  # the pixel in which the centre lies
        assert out[y, x] == mask[(2 * y + 1) * 6 // (2 * size[0]), (2 * x + 1) * 9 // (2 * size[1])]
