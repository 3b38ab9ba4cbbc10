"""A fit that is killed at any moment goes on to the same model, and never to another."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import disk_of, fail, succeed
from image_files import save_image, smooth_pixels

from npad import NPad
from npad.checkpoint import Checkpoint
from npad.images import ImageSource
from npad.model_file import ModelFileError, read_model, write_model

SIZE = 32
SMALL = {"image_size": SIZE, "n_centroids": 40, "batch_size": 4, "progress": False}
OPTIONS = ("--backbone", "filterbank", "--image-size", SIZE, "--n-centroids", 40, "--batch-size", 4)

# Forks a child for each attempt, so that PyTorch is imported once, and kills it at a random moment.
# A fit that ends before that is compared with one that nobody disturbed, and begun again.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy, torch
import npad.cli.commands, npad.detector

torch.set_num_threads(1)  # none that a child would miss
noise = numpy.random.default_rng(0).random((4, 32, 32, 3), dtype="float32")
npad.NPad("filterbank", image_size=32).fit(noise)  # what is imported and made at first use
n_kills, folder, args = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
checkpoint, expected = folder / "checkpoint", None

def start():
    child = os.fork()
    if child == 0:
        sys.argv[1:] = args
        try:
            npad.cli.commands.main()
        except SystemExit as end:
            os._exit(end.code or 0)
    return child

def ended(child):
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, status
    return True

begin = time.monotonic()
assert ended(start())
longest = time.monotonic() - begin
expected = (folder / "model").read_bytes()
random.seed(int(os.environ.get("NPAD_SEED", "0")))
killed = resumed = 0

def enough():  # on a busy machine many are killed before they have written anything
    return killed >= n_kills and (resumed > n_kills // 2 or killed >= 10 * n_kills)

while not enough() or checkpoint.exists():
    (folder / "model").unlink(missing_ok=True)
    resumed += checkpoint.exists()
    child = start()
    if not enough():
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    if ended(child):
        assert (folder / "model").read_bytes() == expected, "another model"
        assert sorted(os.listdir(folder)) == ["model"], os.listdir(folder)
    else:
        killed += 1
        assert not (folder / "model").exists() or (folder / "model").read_bytes() == expected
print(killed, resumed)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(60):
        save_image(folder / f"{i:02}.png", smooth_pixels(40, 40, seed=i))
    for i in (7, 41):
        (folder / f"{i:02}.png").write_text("no image")
    return folder


@pytest.mark.parametrize(
    "options",
    [(), ("--n-features", "5", "--fusion", "sum", "--factor-dtype", "float32")],
    ids=["default", "axes"],
)
def test_a_fit_that_is_killed_again_and_again(
    options: tuple[str, ...], images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    n_kills = os.environ.get("NPAD_KILLS", "200" if request.config.getoption("--slow") else "8")
    args = ["fit", images, "-o", tmp_path / "model", *OPTIONS, *options, "--skip-bad", "--quiet"]
    args += ["--checkpoint", tmp_path / "checkpoint", "--every", 6, "--threads", 1]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, n_kills, tmp_path, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed >= int(n_kills)
    assert resumed > int(n_kills) // 2


class KilledError(Exception):
    """In the place of a kill, where the moment matters."""


def stop_at(n: int, source: object, path: Path, every: int = 6, **arguments: object) -> None:
    """Fit until so many images were fitted."""

    def write(self: Checkpoint, fit: object, position: int) -> None:
        original(self, fit, position)
        if fit.n_images >= n:
            raise KilledError

    original = Checkpoint.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write", write)
        with pytest.raises(KilledError):
            NPad("filterbank", **SMALL | arguments).fit(source, checkpoint=path, every=every)


@pytest.fixture
def good(images: Path) -> list[Path]:
    return [path for path in sorted(images.iterdir()) if path.stem not in ("07", "41")]


@pytest.fixture
def begun(good: list[Path], tmp_path: Path) -> Path:
    """A checkpoint of 24 of 58 images."""
    stop_at(26, good, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refuse(source: object, checkpoint: Path, match: str, **arguments: object) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ModelFileError, match=match):
        NPad("filterbank", **SMALL | arguments).fit(source, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def test_it_goes_on_where_it_was(good: list[Path], begun: Path, tmp_path: Path) -> None:
    assert read_model(begun)[0]["checkpoint"]["next"] == 24
    NPad("filterbank", **SMALL).fit(good).save(tmp_path / "expected", statistics=True)
    read = []
    with pytest.MonkeyPatch.context() as patch:
        batches = ImageSource.batches
        patch.setattr(ImageSource, "batches", lambda self, i: read.append(i) or batches(self, i))
        model = NPad("filterbank", **SMALL).fit(good, checkpoint=begun)
    assert read == [range(24, 58)]
    model.save(tmp_path / "model", statistics=True)
    assert (tmp_path / "model").read_bytes() == (tmp_path / "expected").read_bytes()
    assert begun.exists()


def test_it_is_written_as_often_as_asked(
    good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(path: Path, header: dict, tensors: dict, **more: object) -> None:
        written.append(header["statistics"]["n_images"])

    monkeypatch.setattr("npad.checkpoint.write_model", write)
    NPad("filterbank", **SMALL).fit(good, checkpoint=tmp_path / "c", every=10)
    assert written == [0, 12, 24, 36, 48, 58]  # batches of four


def test_a_bad_image_can_be_skipped_after_all(images: Path, tmp_path: Path) -> None:
    """What was fitted before it is not lost."""
    model = NPad("filterbank", **SMALL)
    with pytest.raises(ValueError, match=r"41\.png"):
        model.set_params(batch_size=1).fit(
            sorted(images.iterdir())[10:], checkpoint=tmp_path / "c", every=1
        )
    assert read_model(tmp_path / "c")[0]["checkpoint"]["next"] == 31
    source = sorted(images.iterdir())[10:]
    model.fit(source, skip_bad=True, checkpoint=tmp_path / "c")
    expected = NPad("filterbank", **SMALL | {"batch_size": 1}).fit(source, skip_bad=True)
    assert model.skipped_ == expected.skipped_ != []
    assert model.fingerprints_ == expected.fingerprints_


def test_what_the_images_say_of_their_depth_is_not_forgotten(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 4096 if i < 6 else 1024, (40, 40), dtype=np.uint16)
        save_image(tmp_path / f"images/{i:02}.png", pixels)
    stop_at(8, tmp_path / "images", tmp_path / "c", every=1)
    with pytest.warns(UserWarning, match="no image uses the upper of its 16 bits") as caught:
        model = NPad("filterbank", **SMALL).fit(tmp_path / "images", checkpoint=tmp_path / "c")
    assert model.n_bits_ == 12
    with pytest.warns(UserWarning, match="16 bits") as expected:
        NPad("filterbank", **SMALL).fit(tmp_path / "images")
    assert [str(w.message) for w in caught] == [str(w.message) for w in expected]


def test_what_other_sizes_the_images_have_is_not_forgotten(tmp_path: Path) -> None:
    native = SMALL | {"image_size": "native"}
    for i in range(12):
        save_image(tmp_path / f"images/{i:02}.png", smooth_pixels(40 if i < 6 else 48, 40, seed=i))
    stop_at(8, tmp_path / "images", tmp_path / "c", every=1, **native)
    told = "6 of 12 images have another size than the first, 40 x 40, .*06.png has 48 x 40"
    with pytest.warns(UserWarning, match=told):
        model = NPad("filterbank", **native).fit(tmp_path / "images", checkpoint=tmp_path / "c")
    with pytest.warns(UserWarning, match=told):
        whole = NPad("filterbank", **native).fit(tmp_path / "images")
    assert model.settings_.image_size == (40, 40)
    assert torch.equal(model.members_[0].mean, whole.members_[0].mean)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seed": 1}, "other settings: seed is 1 in one and 0 in the other"),
        ({"image_size": 48}, r"image_size is \(48, 48\) in one and \(32, 32\)"),
        ({"batch_size": 2}, "batch_size is 2"),
        ({"layers": (2, 3)}, r"layers is \(2, 3\)"),
        ({"eps": 0.01, "window": 3}, "window is 3 .*; eps is 0.01 in one and 'auto' in the other"),
    ],
)
def test_other_settings(
    arguments: dict[str, object], match: str, good: list[Path], begun: Path
) -> None:
    refuse(good, begun, f"{match}.*remove this file, and the fit begins anew", **arguments)


def test_settings_that_no_statistics_depend_on(good: list[Path], begun: Path) -> None:
    changed = {"map_weight": 0.9, "false_alarm_rate": 0.05, "progress": None, "max_pixels": 10**6}
    model = NPad("filterbank", **SMALL | changed).fit(good, checkpoint=begun)
    assert model.settings_.map_weight == 0.9
    assert model.fingerprints_ == NPad("filterbank", **SMALL).fit(good).fingerprints_


def test_other_images(good: list[Path], begun: Path, tmp_path: Path) -> None:
    refuse(good[:-1], begun, r"of other images: 1 gone, such as 59\.png")
    refuse(good[::-1], begun, "of other images: their order")
    new = save_image(good[0].parent / "new.png", smooth_pixels(40, 40, seed=99))
    try:
        refuse([*good, new], begun, r"1 new, such as new\.png")
    finally:
        new.unlink()
    moved = []
    for path in good:
        moved.append(tmp_path / "moved" / path.name)
        moved[-1].parent.mkdir(exist_ok=True)
        moved[-1].write_bytes(path.read_bytes())
    save_image(moved[50], smooth_pixels(41, 41, seed=3))
    refuse(moved, begun, r"1 changed, such as 52\.png")
    moved[50].write_bytes(good[50].read_bytes())
    assert NPad("filterbank", **SMALL).fit(moved, checkpoint=begun).n_images_ == 58


def test_another_backbone_or_version(good: list[Path], begun: Path) -> None:
    header, tensors = read_model(begun)
    forged = {**header, "npad_version": "0.0.7"}
    write_model(begun, forged, tensors)
    refuse(good, begun, r"written by npad 0\.0\.7")
    forged = {**header, "backbones": [{**header["backbones"][0], "weights_hash": "0" * 64}]}
    write_model(begun, forged, tensors)
    refuse(good, begun, "on another backbone: filterbank with weights .* and .* 000000000000")


def test_what_is_no_checkpoint(good: list[Path], begun: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    NPad("filterbank", **SMALL).fit(good[:8]).save(model, statistics=True)
    refuse(good, model, "is no checkpoint, but a model; give another file")
    with pytest.raises(
        ModelFileError, match=r"checkpoint: .*checkpoint of a fit that has not ended"
    ):
        NPad.load(begun)
    refuse(good, good[0], "is not an npad model file.*give another checkpoint")
    content = bytearray(begun.read_bytes())
    content[-9] ^= 1
    begun.write_bytes(content)
    refuse(good, begun, "damaged.*remove this one to begin anew")


def change(header: dict, path: str, value: object) -> None:
    *way, last = path.split(".")
    for step in way:
        header = header[int(step) if step.isdigit() else step]
    if value is None:
        del header[last]
    else:
        header[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("checkpoint.next", "x"),
        ("checkpoint.next", 60),
        ("checkpoint.next", -1),
        ("checkpoint.skipped", [1]),
        ("checkpoint.undeclared", [[1]]),
        ("checkpoint.other_sizes", [[1, "a.png", [3]]]),
        ("statistics.members", None),
        ("statistics.members.0.held_out.random", [3, [1, 2], None]),
        ("statistics.members.0.held_out.random", [3, [-1] * 625, None]),
        ("statistics.members.0.held_out.kept", 90),
        ("statistics.members.0.grid", [4, 5]),
        ("statistics.members.0.n_channels", 7),
        ("statistics.members.3.nominal.radii", [1.0]),
        ("statistics.members.3.nominal.chosen", True),
        ("statistics.n_images", -3),
        ("statistics.undeclared", [1]),
    ],
)
def test_a_forged_checkpoint(path: str, value: object, good: list[Path], begun: Path) -> None:
    header, tensors = read_model(begun)
    change(header, path, value)
    write_model(begun, header, tensors)
    refuse(good, begun, "checkpoint: ")


@pytest.mark.parametrize("every", [0, -1, True, 2.5, "3", None])
def test_every(every: object) -> None:
    with pytest.raises(ValueError, match="every must be an int of at least 1, got"):
        NPad("filterbank").fit("nowhere", checkpoint="c", every=every)


@pytest.mark.parametrize("checkpoint", [3, True, b"c", ["c"]])
def test_a_checkpoint_that_is_no_path(checkpoint: object) -> None:
    with pytest.raises(ValueError, match="checkpoint must be the path of a file, got"):
        NPad("filterbank").fit("nowhere", checkpoint=checkpoint)


def test_images_that_are_no_files(good: list[Path], tmp_path: Path) -> None:
    pixels = np.stack([smooth_pixels(32, 32, seed=i) for i in range(4)])
    for source in (pixels, list(pixels), iter([pixels]), [good[0], pixels[0]]):
        with pytest.raises(ValueError, match="checkpoint needs images in files"):
            NPad("filterbank", **SMALL).fit(source, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    good: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match="make the folder first"):
        NPad("filterbank", **SMALL).fit(good, checkpoint=tmp_path / "nowhere/c", every=10**6)
    with pytest.raises(ModelFileError, match="is not a file"):
        NPad("filterbank", **SMALL).fit(good, checkpoint=tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(good: list[Path], tmp_path: Path) -> None:
    stop_at(8, good, tmp_path / "c", every=1)
    before = (tmp_path / "c").read_bytes()
    with disk_of(len(before) + 100), pytest.raises(ModelFileError, match="cannot be written"):
        NPad("filterbank", **SMALL).fit(good, checkpoint=tmp_path / "c", every=1)
    assert len((tmp_path / "c").read_bytes()) >= len(before)
    assert NPad("filterbank", **SMALL).fit(good, checkpoint=tmp_path / "c").n_images_ == 58


# --- the command line ---


def test_command_line(images: Path, begun: Path, good: list[Path], tmp_path: Path) -> None:
    """What Python has begun, the command line ends."""
    args = ("fit", good[0].parent, "-o", tmp_path / "m", *OPTIONS, "--threads", 1)
    fail(1, *args, "--checkpoint", begun, says=[begun, "2 new, such as 07.png"])
    fail(2, *args, "--every", 3, says=["--every", "--checkpoint"])
    fail(2, *args, "--checkpoint", tmp_path / "m", says=["--checkpoint and --output"])
    fail(2, *args, "--checkpoint", tmp_path / "no/c", says=[tmp_path / "no"])
    begun.unlink()
    with warnings.catch_warnings():
        said = succeed(*args, "--skip-bad", "--checkpoint", begun, "--every", 3)
    assert "58 images" in said.out
    assert not begun.exists()
