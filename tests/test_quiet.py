"""Pillow's remarks on damaged files: not printed, and nothing of the process changed for it."""

import io
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from image_files import save_image, smooth_pixels
from PIL import Image

from npad.images import quiet
from npad.images.decoding import ImageError, read_image
from npad.images.quiet import quiet_pillow


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """Files at which libtiff prints, Pillow logs, and Pillow, of a size that it doubts, warns."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4500)
    stream = io.BytesIO()
    Image.fromarray(smooth_pixels(64, 64)).save(stream, "TIFF", compression="tiff_lzw")
    data = bytearray(stream.getvalue())
    data[200:1200] = bytes(1000)
    (tmp_path / "libtiff.tif").write_bytes(data)
    samples = data.index((277).to_bytes(2, "little") + (3).to_bytes(2, "little")) + 8
    data[samples] = 9  # per pixel
    (tmp_path / "log.tif").write_bytes(data)
    save_image(tmp_path / "warning.png", smooth_pixels(70, 70))
    return [tmp_path / name for name in ("libtiff.tif", "log.tif", "warning.png")]


def read(path):
    try:
        return read_image(path).shape
    except ImageError as error:
        return error.reason


def state():
    """All that could have been changed."""
    logger = logging.getLogger("PIL.TiffImagePlugin")
    libtiff = quiet._set_libtiff_handler(None)
    quiet._set_libtiff_handler(libtiff)
    loggers = [logger, logger.parent, logging.getLogger()]
    return (
        id(warnings.filters),
        list(warnings.filters),
        warnings.showwarning,
        [(list(each.handlers), list(each.filters), each.level) for each in loggers],
        libtiff,
    )


def test_pillow_is_not_quiet_by_itself(damaged, capfd, caplog):
    """Else the next test would find silence where nothing is said."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for path in damaged:
            with suppress(OSError), Image.open(path) as image:
                image.load()
    assert "LZWDecode" in capfd.readouterr().err
    assert "More samples per pixel" in caplog.text
    assert "decompression bomb" in str(warned[0].message)


def test_threads_leave_everything_as_it_was(damaged, capfd, caplog):
    before = state()
    assert before[-1] is not None
    expected = [read(path) for path in damaged]
    assert expected[0].startswith("damaged or cut short")
    assert isinstance(expected[1], str)
    assert expected[2] == (70, 70, 3)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, damaged * 100)) == expected * 100
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def warn_as_pillow():
    warnings.warn_explicit("of Pillow", UserWarning, "Image.py", 1, module="PIL.Image")


def test_other_threads_are_heard():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet_pillow():
            warn_as_pillow()
            warnings.warn("not of Pillow", stacklevel=1)
            other = threading.Thread(target=warn_as_pillow)
            other.start()
            other.join()
        warn_as_pillow()
    assert [str(w.message) for w in heard] == ["not of Pillow", "of Pillow", "of Pillow"]


def test_errors_of_other_threads_are_logged(caplog):
    logger = logging.getLogger("PIL.TiffImagePlugin")
    with quiet_pillow():
        logger.error("here")
        other = threading.Thread(target=logger.error, args=["elsewhere"])
        other.start()
        other.join()
    assert caplog.messages == ["elsewhere"]


def test_catch_warnings_of_the_program_may_begin_and_end_meanwhile():
    before = list(warnings.filters)
    catching = warnings.catch_warnings()
    with quiet_pillow():
        catching.__enter__()  # with a copy of the filters, ours among them
    assert warnings.filters == before
    with quiet_pillow():
        catching.__exit__(None, None, None)
    assert warnings.filters == before
    with quiet_pillow():
        strict = ("error", None, UserWarning, None, 0)
        warnings.filters.insert(0, strict)  # in front of ours
        with quiet_pillow():
            warn_as_pillow()
        warnings.filters.remove(strict)
    assert warnings.filters == before
