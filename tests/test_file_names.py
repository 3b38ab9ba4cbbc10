"""Names of files that are no text, or hardly any: every output writes every one of them."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from command_line import SMALL, fail, npad, succeed
from image_files import make_category, save_image, smooth_pixels

from npad import NPad
from npad.cli.prediction_files import find_inputs
from npad.file_names import shown
from npad.images import ImageError
from npad.images.folders import OUTPUT_MARK
from npad.progress import task

NAMES = {  # as bytes, and how a person sees them
    b"plain": "plain",
    b"\xff\xfe": r"\xff\xfe",
    "köln".encode("latin-1"): r"k\xf6ln",
    "köln".encode(): "köln",
    "ko\u0308ln".encode(): "ko\u0308ln",
    "日本\u3000語".encode(): "日本\u3000語",
    b"KOELN": "KOELN",
    b"Koeln": "Koeln",
    b"new\nline\r": r"new\nline\r",
    b"tab\t": r"tab\t",
    b'quote",comma;': 'quote",comma;',
    b"<b>&amp;": "<b>&amp;",
    b"{{ 7 * 7 }}": "{{ 7 * 7 }}",
    b"$x$ $\\bad{": "$x$ $\\bad{",
    b"\x1b[31mred": r"\x1b[31mred",
    b"\x07": r"\x07",
    "\u202egnp".encode(): r"\u202egnp",
    b"\xed\xa0\x80": r"\xed\xa0\x80",  # half of a pair of UTF-16
    b"-dash": "-dash",
    b" two  spaces ": " two  spaces ",
    b"seed=3": "seed=3",
    b"[bold]": "[bold]",
    b"%s %(x)s": "%s %(x)s",
}
FOLDER = os.fsdecode(b"part\xff\x1b[31m <b>$_$")
LONG = "x" * 251 + ".png"


@pytest.mark.parametrize(("name", "text"), NAMES.items())
def test_shown(name: bytes, text: str) -> None:
    assert shown(os.fsdecode(name)) == text
    assert shown(text) == text
    assert shown(Path(os.fsdecode(name))) == text
    text.encode()
    assert text.isprintable() or "\u3000" in text


@pytest.fixture(scope="module")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and defective images of all names; folders of odd names, too."""
    root = make_category(tmp_path_factory.mktemp("data") / FOLDER, n_train=3, size=(32, 32))
    kind = os.fsdecode(b"kind\xff$_$\n")
    for part, suffix in (("test", ""), ("ground_truth", "_mask")):
        (root / part / "hole").rename(root / part / kind)
        file = root / part / kind / f"000{suffix}.png"
        for name in NAMES:
            shutil.copy(file, file.with_name(os.fsdecode(name) + f"{suffix}.png"))
    for i, name in enumerate(NAMES):
        save_image(root / "test/good" / f"{os.fsdecode(name)}.png", smooth_pixels(32, 32, seed=i))
    save_image(root / "test/good" / LONG, smooth_pixels(32, 32))
    for name in (b"bad\xff\n\x1b[31m", b"bad  3"):
        (root / "test/good" / f"{os.fsdecode(name)}.png").write_bytes(b"no image")
    return root


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "\n", page))


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_evaluate(environment: dict[str, str], category: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"out\xff\n")
    run = subprocess.run(
        [sys.executable, "-m", "npad", "evaluate", category, "-o", out, *SMALL, "--skip-bad"],
        capture_output=True,
        check=False,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr
    said, err = run.stdout.decode(), run.stderr.decode()
    skipped = [f"{category}/test/good/bad\\xff\\n\\x1b[31m.png: ", "/test/good/bad  3.png: "]
    assert len(err.splitlines()) == 2
    assert all(part in err for part in (shown(skipped[0]), skipped[1]))
    table = list(csv.reader(said.splitlines()[:-1], delimiter="\t"))
    assert [row[0] for row in table] == [
        *("category", r"part\xff\x1b[31m <b>$_$", r"  kind\xff$_$\n")
    ]
    assert said.splitlines()[-1] == f"{tmp_path}/out\\xff\\n/report.html"

    results = json.loads((out / "results.json").read_bytes())["categories"][0]
    found = {Path(image["path"]).name for image in results["images"]}
    if "PYTHONUTF8" not in environment:  # else the bytes of UTF-8 are no text to the process
        assert results["category"] == category.name
        assert found == {f"{os.fsdecode(name)}.png" for name in NAMES} | {
            *("000.png", "001.png", LONG)
        }
        assert {os.fsencode(Path(item["path"]).name) for item in results["skipped"]} == {
            *(b"bad\xff\n\x1b[31m.png", b"bad  3.png")
        }
    page = (out / "report.html").read_text("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", page)
    assert "<b>$" not in page
    assert r"part\xff\x1b[31m <b>$_$" in text_of(page)
    assert r"kind\xff$_$\n" in text_of(page)
    assert r"bad\xff\n\x1b[31m.png: " in text_of(page)
    assert {path.name for path in out.iterdir()} == {"report.html", "results.json"}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_with_any_name(name: bytes, tmp_path: Path) -> None:
    """As that of the category, of a type and of images."""
    text = os.fsdecode(name)
    root = make_category(tmp_path / text, n_train=2, size=(16, 16), n_good=1, n_defects=1)
    for part in ("test", "ground_truth"):
        (root / part / "hole").rename(root / part / text)
    (root / "test/good/000.png").rename(root / f"test/good/{text}.png")
    succeed("evaluate", root, "-o", tmp_path / "out", *SMALL, "--image-size", "32", "--layers", "1")
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert (
        page.count(html.escape(f"good/{NAMES[name]}.png", quote=False).replace('"', "&#34;")) >= 2
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", page)


def test_predict(category: Path, tmp_path: Path) -> None:
    model, out = tmp_path / os.fsdecode(b"m\xff\x1b"), tmp_path / os.fsdecode(b"\xfe")
    fitted = succeed("fit", category / "train/good", "-o", model, *SMALL)
    assert fitted.out.startswith(f"{tmp_path}/m\\xff\\x1b: ")
    outcome = succeed("predict", model, category / "test", "-o", out, "--maps", "--skip-bad")
    assert outcome.out.splitlines()[0].startswith(f"{tmp_path}/\\xfe/scores.csv: ")
    assert len(outcome.err.splitlines()) == 2

    tests = category.glob("test/*/*.png")
    expected = {os.fsencode(path) for path in tests if not path.name.startswith("bad")}
    with (out / "scores.csv").open(errors="surrogateescape", newline="") as file:
        assert {os.fsencode(row["path"]) for row in csv.DictReader(file)} == expected
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_bytes().splitlines()]
    assert {os.fsencode(row["path"]) for row in rows} == expected
    for row in rows:
        assert tifffile.imread(out / row["map"]).shape == tuple(row["size"])
        assert (out / row["overlay"]).is_file()
    assert len({row["overlay"].casefold() for row in rows}) == len(expected)


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "A.png", "a.PNG"],
        ["x/a.png", "X/a.png"],
        ["k\u00f6ln.png", "ko\u0308ln.png"],
        ["stra\u00dfe.png", "strasse.png", "STRASSE.png"],
        [LONG, "x" * 250 + "y.png", LONG.upper()],
        ["ö" * 124 + ".png", "ö" * 124 + "x.png"],  # that no letter is cut in two
        [os.fsdecode(b"\xff" * 250 + b".png"), os.fsdecode(b"\xff" * 249 + b"\xfe.png")],
    ],
)
def test_pictures_whose_names_a_disk_may_not_tell_apart_or_take(
    names: list[str], tmp_path: Path
) -> None:
    paths = [save_image(tmp_path / "in" / name, smooth_pixels(4, 4)) for name in names]
    found = find_inputs([tmp_path / "in"], tmp_path / "out")
    assert len({str(p).casefold() for p in found.values()}) == len(names) == len(found)
    assert set(found) == set(map(str, paths))
    for name, picture in zip(sorted(names), found.values(), strict=True):
        assert len(os.fsencode(picture.name)) <= 250
        assert picture == Path(name) or re.search("~[0-9a-f]{8}$", picture.name)
    again = find_inputs(list(reversed(paths)), tmp_path / "out")
    assert again == found  # names do not depend on the order


def test_a_path_of_a_picture_that_no_system_takes(tmp_path: Path) -> None:
    image = save_image(tmp_path / "in" / ("x" * 200 + ".png"), smooth_pixels(4, 4))
    folder = Path(*["y" * 250] * 16)
    with pytest.raises(ImageError, match="give a shorter --output"):
        find_inputs([image], folder)


def test_messages_hold_the_name_as_it_is(category: Path, tmp_path: Path) -> None:
    """Neither the spaces of a name are changed, nor what looks like an argument in it."""
    for name in ("two  spaces.png", "seed=3.png", "skip_bad=True.png"):
        path = tmp_path / name
        path.write_text("no image")
        fail(1, "fit", tmp_path, "-o", tmp_path / "m", *SMALL, says=[f"npad: error: {path}: "])
        path.unlink()
    nowhere = tmp_path / os.fsdecode(b"no\xff\n")
    fail(2, "fit", nowhere, "-o", tmp_path / "m", says=["does not exist"])
    train = category / "train/good"
    fail(2, "fit", train, "-o", nowhere / "m", says=[rf"{tmp_path}/no\xff\n is"])
    fail(2, "fit", train, "-o", "m", "--weights", nowhere, says=[rf"no file {tmp_path}/no\xff\n ("])
    fail(2, nowhere.name, says=[r"'no\xff\n'"])  # as Python quotes it
    root = tmp_path / "with good=1"  # in an error of usage, too
    root.symlink_to(category)
    fail(2, "fit", root, "-o", tmp_path / "m", says=[f"{root} seems", f"give {root}/train/good,"])


def test_names_of_weights_stand_in_the_model_file(category: Path, tmp_path: Path) -> None:
    weights = tmp_path / os.fsdecode(b"\xff\n.pt")
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "w")
    (tmp_path / "w").rename(weights)
    model = tmp_path / "m"
    options = (*SMALL, "--backbone", "resnet18", "--weights", weights)
    succeed("fit", category / "train/good", "-o", model, *options)
    assert NPad.load(model).settings()["weights"] == str(weights)
    succeed("evaluate", category, "-o", tmp_path / "out", *options, "--skip-bad", "-q")
    results = json.loads((tmp_path / "out/results.json").read_bytes())["categories"][0]
    assert results["settings"]["weights"] == str(weights)
    assert r"\xff\n.pt" in (tmp_path / "out/report.html").read_text("utf-8")
    weights.unlink()
    outcome = npad("predict", model, category / "train", "-o", tmp_path / "scores")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert r"\xff" in outcome.err


def test_a_bar_with_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(file, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr("npad.progress.DELAY", 0)
    with task(os.fsdecode(b"\xff\n: metrics"), 2) as advance:
        advance()
    file.flush()
    assert rb"\xff\n: metrics" in file.buffer.getvalue()


def test_own_pictures_are_no_images(category: Path, tmp_path: Path) -> None:
    """In whatever folder they lie."""
    images = shutil.copytree(category / "train/good", tmp_path / "images")
    model = tmp_path / "m"
    succeed("fit", images, "-o", model, *SMALL)
    before = succeed("predict", model, images, "-o", images / "out", "--maps").out
    for part in ("overlays", "maps"):
        assert (images / "out" / part / OUTPUT_MARK).is_file()
    (images / "out").rename(images / "moved")
    again = succeed("predict", model, images, "-o", images / "out").out
    assert again.splitlines()[0] == before.splitlines()[0]
    assert len(np.unique([p.name for p in (images / "out/overlays").glob("*.png")])) == 3
