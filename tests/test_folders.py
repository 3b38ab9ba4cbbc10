"""Folders as cameras and file servers leave them: what is an image, and what is said of the rest."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_files import save_image, smooth_pixels

from npad.images import ImageError, ImageSource, list_images
from npad.images.folders import OUTPUT_MARK, SUFFIXES, find_images, search


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root):
    return [path.relative_to(root).as_posix() for path in list_images(root)]


def collect(source):
    batches = list(ImageSource(source, image_size=(16, 16)).batches())
    return torch.cat([b.images for b in batches]), [name for b in batches for name in b.names]


def test_list_images(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "sub/c.tiff", "sub/.hidden.png", ".cache/d.png", "notes.txt")
    assert listed(tmp_path) == ["a.jpg", "b.PNG", "sub/c.tiff"]


def test_every_suffix_in_any_case(tmp_path):
    names = {f"x{i}{s.upper() if i % 2 else s}" for i, s in enumerate(sorted(SUFFIXES))}
    touch(tmp_path, *names)
    assert set(listed(tmp_path)) == names
    assert {".pgm", ".ppm", ".pbm", ".pnm", ".jfif"} <= SUFFIXES


def test_a_folder_that_is_named_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path, "a.png/b.png", "a.dng/c.png", "d.png")
    assert listed(tmp_path) == ["a.dng/c.png", "a.png/b.png", "d.png"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg",
            "@eaDir/x.jpg",
            "#recycle/x.png",
            "@Recycle/x.png",
        ),
        *("#snapshot/x.png", "~snapshot/x.png", ".@__thumb/x.png", ".Trash-1000/x.png"),
        *("__MACOSX/._a.png", "__MACOSX/x.png", "._a.png", ".thumbnails/x.png", ".git/x.png"),
        *("lost+found/x.png", "$RECYCLE.BIN/x.png", "System Volume Information/x.png"),
        *("Thumbs.db", ".DS_Store", "desktop.ini", "a.txt", "a.json", "labels.XML", "README"),
    ],
)
def test_what_systems_and_people_leave_beside_images_is_left_out_without_a_word(tmp_path, name):
    touch(tmp_path, "a.png", "sub/b.png", name, f"sub/{name}")
    assert listed(tmp_path) == ["a.png", "sub/b.png"]


CAMERAS = (
    ".dng .raw .cr2 .nef .arw .jp2 .j2k .heic .avif .jxl .gif .psd .exr .hdr .dcm .npy .mp4 .xyz"
)


@pytest.mark.parametrize("suffix", re.findall(r"\.\w+", CAMERAS))
def test_a_suffix_that_may_be_of_images_is_told(tmp_path, suffix):
    touch(tmp_path, "a.png", f"b{suffix}", f"sub/c{suffix.upper()}", "d.txt")
    with pytest.warns(UserWarning, match="left out") as told:
        assert listed(tmp_path) == ["a.png"]
    (warning,) = told
    text = str(warning.message)
    assert text.startswith(f"{tmp_path}: 2 files were left out, by suffix: 2 {suffix} (")
    assert warning.filename == __file__


def test_kinds_are_counted_and_the_rarest_summed_up(tmp_path):
    suffixes = {".dng": 10, ".jp2": 3, ".gif": 2, ".heic": 1, ".psd": 1, ".svg": 1, ".xcf": 1}
    touch(tmp_path, "a.png", *(f"{i}{s}" for s, n in suffixes.items() for i in range(n)))
    touch(tmp_path, "IMG_0001")
    with pytest.warns(UserWarning, match="20 files were left out") as told:
        list_images(tmp_path)
    counts = "10 .dng, 3 .jp2, 2 .gif, 1 .heic, 1 .psd, 1 .svg, 2 others ("
    assert counts in str(told[0].message)
    assert search(tmp_path).left_out == {**suffixes, "without suffix": 1}


def test_one_file_is_singular_and_told_by_a_source_too(tmp_path):
    save_image(tmp_path / "a.png", smooth_pixels(8, 8))
    touch(tmp_path, "b.dng")
    with pytest.warns(UserWarning, match="1 file was left out, by suffix: 1 .dng") as told:
        ImageSource(tmp_path, image_size=(8, 8))
    assert len(told) == 1


def test_a_folder_of_other_kinds_says_which(tmp_path):
    touch(tmp_path, "a.dng", "b.DNG", "sub/c.jp2", "notes.txt")
    with pytest.raises(
        ImageError, match=r"holds no images \(\.bmp.*, but 2 \.dng, 1 \.jp2, 1 \.txt"
    ):
        find_images(tmp_path)
    with pytest.raises(ImageError, match=r"but 2 \.dng"):  # and no warning before
        ImageSource(tmp_path, image_size=(8, 8))


# --- links ---


def test_linked_folders_are_followed_and_read_once(tmp_path):
    root, pool = tmp_path / "root", tmp_path / "pool"
    touch(pool, "x.png", "deep/y.png")
    touch(root, "own/a.png")
    for name in ("first", "second", "own/third"):
        (root / name).symlink_to(pool)
    (root / "again").symlink_to(root / "own")  # reached without a link, too
    assert listed(root) == ["first/deep/y.png", "first/x.png", "own/a.png"]
    assert listed(root / "first") == ["deep/y.png", "x.png"]


def test_circles_end(tmp_path):
    touch(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "sub/here").symlink_to(".")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.warns(UserWarning, match="3 linked to nothing"):
        assert listed(tmp_path) == ["a.png", "sub/b.png"]


def test_linked_files_are_images_of_their_own(tmp_path):
    save_image(tmp_path / "a.png", smooth_pixels(8, 8))
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "c.png").symlink_to("gone.png")
    assert listed(tmp_path) == ["a.png", "b.png", "c.png"]
    with pytest.raises(ImageError, match=r"c\.png: .*No such file"):
        collect(tmp_path)
    source = ImageSource(tmp_path, image_size=(8, 8), skip_bad=True)
    assert sum(len(batch.names) for batch in source.batches()) == 2
    (tmp_path / "nas").symlink_to("/gone/folder")  # a server that is not mounted
    with pytest.warns(UserWarning, match="1 linked to nothing"):
        list_images(tmp_path)


# --- what is no file ---


def test_pipes_sockets_and_devices_are_never_opened(tmp_path):
    save_image(tmp_path / "a.png", smooth_pixels(8, 8))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "linked.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            server.bind("s.png")
        finally:
            os.chdir(before)
        with pytest.warns(UserWarning, match="4 not regular"):
            _, names = collect(tmp_path)
    assert names == [str(tmp_path / "a.png")]


# --- npad's own output ---


def test_output_of_npad_is_no_input(tmp_path):
    touch(tmp_path, "a.png", f"out/overlays/{OUTPUT_MARK}", "out/overlays/a.png.png", "out/b.png")
    touch(tmp_path, "out/overlays/sub/c.png", f"out/maps/{OUTPUT_MARK}", "out/maps/a.png.tiff")
    assert listed(tmp_path) == ["a.png", "out/b.png"]
    for name in ("out/overlays", "out/overlays/sub"):
        with pytest.raises(ImageError, match=f"{name}: .*npad's own output"):
            list_images(tmp_path / name)
    (tmp_path / "out/b.png").unlink()
    with pytest.raises(ImageError, match="but 3 written by npad"):
        find_images(tmp_path / "out")


# --- errors, order ---


def test_folder_errors(tmp_path):
    with pytest.raises(ImageError, match="nowhere: no such file or folder"):
        ImageSource(tmp_path / "nowhere", image_size=(8, 8))
    with pytest.raises(ImageError, match="nowhere: the folder cannot be read"):
        list_images(tmp_path / "nowhere")
    assert list_images(tmp_path) == []
    with pytest.raises(ImageError, match=f"{tmp_path.name}: the folder holds no images"):
        ImageSource(tmp_path, image_size=(8, 8))
    with pytest.raises(ValueError, match="source holds no images"):
        ImageSource([], image_size=(8, 8))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_subfolder_that_cannot_be_read(tmp_path):
    touch(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(ImageError, match="locked: the folder cannot be read"):
            list_images(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_names_that_are_no_text(tmp_path):
    subprocess.run(["touch", os.fsencode(tmp_path) + b"/\xff.png"], check=True)
    subprocess.run(["touch", os.fsencode(tmp_path) + b"/a.\xff"], check=True)
    with pytest.warns(UserWarning, match="1 file was left out"):
        assert len(list_images(tmp_path)) == 1


def test_folder_list_and_single_file_agree(tmp_path):
    for i in range(11):
        save_image(tmp_path / f"{i:02}.png", smooth_pixels(20 + i, 30 - i, seed=i))
    files = list_images(tmp_path)
    images, names = collect(tmp_path)
    assert names == [str(p) for p in files]
    assert torch.equal(images, collect(files)[0])
    assert torch.equal(images, collect([str(p) for p in files])[0])
    assert torch.equal(images[3:4], collect(files[3])[0])
    mixed, _ = collect([files[2], tmp_path])
    assert torch.equal(mixed, torch.cat([images[2:3], images]))


def test_nothing_is_read_up_front(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    source = ImageSource(tmp_path, image_size=(8, 8))
    assert source.n_images == 3
    with pytest.raises(ImageError, match=r"0\.png"):
        next(source.batches())
