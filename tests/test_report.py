"""The report: one file, nothing fetched, no script, pictures that a browser really shows."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_model import CalibratedModel, FakeModel, write_category
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binomtest

from npad.evaluation import measure, plots, report
from npad.evaluation.calibrated import Share
from npad.evaluation.datasets import find_categories
from npad.evaluation.metrics import PIXEL_METRICS
from npad.evaluation.results import NO_MASKS
from npad.images import ImageError, Reading
from npad.images.decoding import read_thumbnail

TESTS = [
    *(("good", f"{i:03}", 0, 1) for i in range(12)),
    *(("dent", f"{i:03}", 40, 1) for i in range(3)),
    *(("<b>odd & long type name<b>", f"{i:03}", 4 + i, 1) for i in range(7)),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    root = write_category(tmp_path_factory.mktemp("data") / "plate", TESTS)
    return measure.evaluate(FakeModel(), find_categories(root)[0])


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    report.write_report([result], path)
    return path


@pytest.fixture(scope="module")
def calibrated(result, tmp_path_factory):
    """Of a model whose threshold is the median of the defective images."""
    bad = sorted(image.score for image in result.images if image.is_anomalous)
    root = result.images[0].path.parents[2]
    good = [image.score for image in result.images if not image.is_anomalous]
    nominal = [*np.linspace(min(good), bad[4], 91), *[bad[4]] * 8]
    model = CalibratedModel(nominal, false_alarm_rate=0.05)
    return measure.evaluate(model, find_categories(root)[0])


@pytest.fixture(scope="module")
def calibrated_page(calibrated, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "calibrated.html"
    report.write_report([calibrated], path)
    return path


class Elements(HTMLParser):
    """All elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f" {data}"

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    if os.environ.get("NPAD_REQUIRE_CHROMIUM") == "1":
        pytest.fail("NPAD_REQUIRE_CHROMIUM is 1, but no chromium is on the PATH")
    return pytest.skip("no chromium on the PATH")


SCRIPT = """<script>
addEventListener("load", () => {
  const found = {
    images: [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight,
                                           i.clientWidth, i.clientHeight]),
    plots: [...document.querySelectorAll("svg")].map(s => {
      const box = s.getBoundingClientRect();
      return [box.width, box.height, s.querySelectorAll("path").length];
    }),
    overflow: document.documentElement.scrollWidth - innerWidth,
    fill: getComputedStyle(document.querySelector("svg path[style*='--good']")).fill,
    good: getComputedStyle(document.documentElement).getPropertyValue("--good").trim(),
  };
  document.body.setAttribute("data-found", JSON.stringify(found));
});
</script>"""


@pytest.mark.parametrize("width", [1280, 520])
@pytest.mark.parametrize(("which", "n_plots"), [("page", 4), ("calibrated_page", 5)])
def test_a_browser_shows_every_picture(which, n_plots, result, tmp_path, width, request):
    page = request.getfixturevalue(which)
    # The page forbids scripts; the copy under test has to allow the one that looks at it.
    text, n_policies = re.subn(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    assert n_policies == 1
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", SCRIPT + "</body>"), encoding="utf-8")
    profile = tmp_path / "profile"
    profile.mkdir()
    command = [browser(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},1000"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, timeout=120, check=True
    )
    (body,) = Elements(done.stdout.decode()).all("body")
    found = json.loads(body["data-found"])
    n_masks = sum(picture.image.is_anomalous for picture in result.pictures)
    assert len(found["images"]) == 3 * len(result.pictures) + n_masks + 1  # and the colour scale
    for complete, natural_width, natural_height, shown_width, shown_height in found["images"]:
        assert complete
        assert min(natural_width, natural_height, shown_width, shown_height) > 0
    for shown_width, _, *_ in (picture[3:] for picture in found["images"][1:]):
        assert shown_width > 80
    assert len(found["plots"]) == n_plots
    for plot_width, plot_height, n_paths in found["plots"]:
        assert plot_width > 150
        assert plot_height > 60
        assert n_paths > 5
    assert found["overflow"] <= 0  # nothing makes the whole page scroll sideways
    red, green, blue = (int(found["good"][i : i + 2], 16) for i in (1, 3, 5))
    assert found["fill"] == f"rgb({red}, {green}, {blue})"  # plots have the page's colours


def test_a_browser_draws_the_page_as_it_is(page, tmp_path):
    shot = tmp_path / "shot.png"
    (tmp_path / "profile").mkdir()
    command = [browser(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, "--window-size=1200,2400", f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == 1200
    assert pixels.std() > 10
    colourful = pixels.max(axis=2) - pixels.min(axis=2) > 60
    assert colourful.mean() > 0.001  # histograms and maps, not only text


def test_the_file_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert not elements.all("script")
    assert not elements.all("link")
    assert not elements.all("iframe")
    for image in elements.all("img"):
        assert image["src"].startswith("data:image/")
        assert image["alt"]
    for attributes in (attributes for _, attributes in elements.found):
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    (policy,) = [m for m in elements.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy["content"]


def test_links_lead_somewhere(page):
    elements = Elements(page.read_text(encoding="utf-8"))
    ids = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    for link in elements.all("a"):
        assert link["href"][1:] in ids


def test_pictures_are_image_map_overlay_and_mask(page, result):
    images = Elements(page.read_text(encoding="utf-8")).all("img")[1:]
    for picture in result.pictures:
        kinds = ["image", "anomaly map", "overlay", *(["mask"] * picture.image.is_anomalous)]
        row, images = images[: len(kinds)], images[len(kinds) :]
        assert [image["alt"].rsplit(", ", 1)[1] for image in row] == kinds
        decoded = [
            Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1]))) for image in row
        ]
        for image, attributes in zip(decoded, row, strict=True):
            assert image.size == (int(attributes["width"]), int(attributes["height"])) == (224, 168)
        assert all(np.asarray(mask).any() for mask in decoded[3:])
        photo, heat = (np.asarray(image.convert("RGB")).astype(int) for image in decoded[:2])
        assert np.ptp(photo.mean(axis=(0, 1))) < 2  # the grey photograph, not the map
        brightest = np.unravel_index(picture.levels.argmax(), picture.levels.shape)
        y, x = (int((b + 0.5) * 7) for b in brightest)  # 24 x 32 became 168 x 224
        assert heat[y, x].sum() > np.median(heat.sum(axis=2))


def test_words_and_figures(page, result):
    text = " ".join(Elements(page.read_text(encoding="utf-8")).text.split())
    for value in result.metrics.values():
        assert f"{value:.3f}" in text
    assert f"{result.n_false_alarms} of 12 good images" in text
    assert f"{result.n_missed} of 10 defective images" in text
    assert "8 shown, 4 left out." in text
    assert "8 shown, 2 left out." in text
    assert "<b>odd & long type name<b>" in text  # escaped in the source, plain to the reader
    assert "backbone <fake>" in text
    assert "mean_" in text
    assert "metric_size 24 x 32" in text
    assert f"numpy {np.__version__}" in text
    order = [text.index(heading) for heading in ("Good images,", "Defective images,")]
    assert order == sorted(order)


def words(path):
    return " ".join(Elements(path.read_text(encoding="utf-8")).text.split())


def said(count, of, what):
    low, high = 100 * np.array(binomtest(count, of).proportion_ci(0.95, method="exact"))
    low, high, rate = (f"{x:.{2 if x < 10 else 3}g}" for x in (low, high, 100 * count / of))
    return f"{count} of {of} {what} ({rate} %, 95 % interval {low} to {high} %)"


def test_what_the_calibrated_threshold_gave_is_said_first(calibrated, calibrated_page):
    text = words(calibrated_page)
    (threshold,) = calibrated.calibrated.thresholds
    good, bad = (
        np.array([i.score for i in calibrated.images if i.is_anomalous == is_bad])
        for is_bad in (False, True)
    )
    n_rejected, n_missed = int(np.sum(good > threshold)), int(np.sum(bad <= threshold))
    assert 0 < n_missed < 10
    first = f"At the threshold {threshold:#.4g}, chosen on 99 nominal images for a false-alarm rate"
    assert (
        f"{first} of 5 %: {said(n_rejected, 12, 'good images rejected')}, "
        f"{said(n_missed, 10, 'defective missed')}." in text
    )
    # Maps have half the threshold, and three quarters of the score as their largest value.
    n_marked, n_unmarked = (int(np.sum(s > threshold / 1.5)) for s in (good, bad))
    assert (
        f"{threshold / 2:#.4g}, chosen in the same way: "
        f"{said(n_marked, 12, 'good images have a marked pixel')}, "
        f"{said(10 - n_unmarked, 10, 'defective have none')}." in text
    )
    assert text.index(first) < text.index("At the threshold with the best F1")
    assert "<b>odd & long type name<b>, missed 7" in text


@pytest.mark.parametrize("which", ["false_alarms", "marked"])
@pytest.mark.parametrize(("count", "more"), [(2, False), (3, True)])
def test_a_rate_that_is_not_kept_is_said(calibrated, tmp_path, which, count, more):
    few = dataclasses.replace(calibrated.calibrated, false_alarms=Share(0, 12), marked=Share(0, 12))
    path = tmp_path / "report.html"
    report.write_report(
        [replaced(calibrated, dataclasses.replace(few, **{which: Share(count, 12)}))], path
    )
    assert (binomtest(count, 12).proportion_ci(0.95, method="exact").low > 0.05) == more
    assert ("More good images are rejected, or marked," in words(path)) == more


@pytest.mark.parametrize("at", [0.02, 0.6, 0.98])
@pytest.mark.parametrize("other", [0.05, 0.61, 0.95])
@pytest.mark.parametrize("log", [False, True])
def test_names_of_thresholds_are_crossed_by_no_line(at, other, log):
    figure = Figure(figsize=(9.6, 2), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(1, 101))
    x = [1 + 100 * at, 1 + 100 * other]
    if log:
        ax.set_xscale("log")
        x = [101**at, 101**other]
    plots._name_lines(ax, [(x[0], "calibrated", "k"), (x[1], "best F1", "k")])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without their lines
    for i, own in enumerate(boxes):
        assert own.x0 >= 0
        assert own.x1 <= figure.bbox.x1
        below = boxes[1 - i]
        x_of_line = ax.transData.transform((ax.texts[i].xy[0], 0))[0]
        if own.y0 > below.y0:
            assert not below.x0 + 1 < x_of_line < below.x1 - 1
            assert own.y0 + 1 > below.y1 or own.x0 > below.x1 or own.x1 < below.x0


def test_what_p_values_say(calibrated, tmp_path):
    path, found = tmp_path / "report.html", calibrated.calibrated
    sure = dataclasses.replace(found.flatness, noticed=0.2)
    for flatness, mean, words_of_it in [
        (dataclasses.replace(sure, noticed=0.41), 0.5, ["too few images to tell", "distance of 0.41"]),
        (dataclasses.replace(sure, p_value=0.05), 0.5, ["No difference is seen", "p = 0.05."]),
        (dataclasses.replace(sure, p_value=0.049), 0.4, ["They differ", "p = 0.049", "higher"]),
        (dataclasses.replace(sure, p_value=0.049), 0.6, ["They differ", "p = 0.049", "lower"]),
    ]:  # fmt: skip
        other = dataclasses.replace(found, flatness=flatness, p_values=np.full(12, mean))
        report.write_report([replaced(calibrated, other)], path)
        for expected in words_of_it:
            assert expected in words(path)


def test_groups_and_confidence_are_said(calibrated, tmp_path):
    path, found = tmp_path / "report.html", calibrated.calibrated
    (threshold,) = found.thresholds
    grouped = dataclasses.replace(
        found, n_groups=2, thresholds=(threshold, 2 * threshold), flatness=None, confidence=0.95
    )
    report.write_report([replaced(calibrated, grouped)], path)
    text = words(path)
    assert "At the thresholds of 2 groups, chosen on 99 nominal images" in text
    assert "for a false-alarm rate of 5 % with confidence 0.95: " in text
    assert "The model was calibrated in groups." in text
    assert "p-values of the good images of" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("anomalous", [False, True])
def test_calibrated_with_one_class(calibrated, anomalous, tmp_path):
    path = tmp_path / "report.html"
    only = [s for s in calibrated.images if s.is_anomalous == anomalous]
    model = CalibratedModel(range(99))
    (category,) = find_categories(only[0].path.parents[2])
    test = [s for s in category.test if s.is_anomalous == anomalous]
    result = measure.evaluate(model, dataclasses.replace(category, test=test))
    report.write_report([result], path)
    text = words(path)
    assert "nan" not in text.lower()
    assert ("good images rejected" in text) == (not anomalous)
    assert ("defective missed" in text) == anomalous
    assert "so nothing can be said about telling one from the other" in text
    assert "The dashed line" not in text


def test_a_summary_of_a_calibrated_category_and_another(calibrated, result, tmp_path):
    path = tmp_path / "report.html"
    report.write_report([calibrated, dataclasses.replace(result, name="bracket")], path)
    summary = words(path).partition("At the threshold")[0]
    found = f"{100 * (1 - calibrated.calibrated.missed.rate):.3g} %"
    assert "False alarms Found fitted" in summary
    assert summary.count(found) == 2  # of the one, and of the mean
    assert "– – 4 22" in summary


def replaced(result, calibrated):
    return dataclasses.replace(result, calibrated=calibrated, pictures=[])


def test_verdicts_are_those_of_the_calibrated_threshold(calibrated, calibrated_page, page):
    text = words(calibrated_page)
    assert "Found or missed, passed or false alarm: at the calibrated threshold." in text
    assert "calibrated" not in words(page)
    source = calibrated_page.read_text(encoding="utf-8")
    verdicts = re.findall(r'class="verdict[^>]*>([^<]+)<', source)
    names = {(True, True): "found", (True, False): "missed", (False, True): "false alarm"}
    (threshold,) = calibrated.calibrated.thresholds
    assert verdicts == [
        names.get((p.image.is_anomalous, p.image.score > threshold), "passed")
        for p in calibrated.pictures
    ]
    at_best_f1 = [
        names.get((p.image.is_anomalous, p.image.score >= calibrated.threshold), "passed")
        for p in calibrated.pictures
    ]
    assert verdicts != at_best_f1


def test_many_categories_begin_with_a_summary(result, tmp_path):
    other = dataclasses.replace(
        result, name="bracket", settings={**result.settings, "eps": 0.25}, pictures=[]
    )
    report.write_report([result, other], tmp_path / "report.html", title="Two <parts>")
    elements = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(elements.text.split())
    assert text.index("Summary") < text.index("mean") < text.index("At the threshold")
    assert "Two <parts>" in text
    assert text.count("Settings of this category eps") == 2
    assert [a["href"] for a in elements.all("a")].count("#category-2") == 1


def test_without_masks_it_says_so_and_leaves_pixels_out(result, tmp_path):
    bare = dataclasses.replace(
        result,
        has_masks=False,
        metrics={**result.metrics, **dict.fromkeys(PIXEL_METRICS, math.nan)},
        types={
            kind: {**values, **dict.fromkeys((*PIXEL_METRICS, "n_regions"), math.nan)}
            for kind, values in result.types.items()
        },
        curves={**result.curves, **dict.fromkeys(("pixel_roc", "pro"), (np.empty(0),) * 2)},
        pictures=[dataclasses.replace(picture, mask=None) for picture in result.pictures],
        notes=["No masks here."],
    )
    report.write_report([bare, dataclasses.replace(result, pictures=[])], tmp_path / "report.html")
    elements = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(elements.text.split())
    assert "nan" not in text
    # A row of the summary; the tiles; and the table of two types, with their regions and their sum.
    assert text.count(NO_MASKS) == 4 + 4 + 3 * 5 + 1  # and the glossary
    assert text.count("Pixel ROC") == text.count("Per-region overlap") == 1
    kinds = {image["alt"].rsplit(", ", 1)[-1] for image in elements.all("img")[1:]}
    assert kinds == {"image", "anomaly map", "overlay"}
    assert "defect outlined" not in text
    assert "No masks here." in text


def test_undefined_figures_and_left_out_images(result, tmp_path):
    good = [image for image in result.images if not image.is_anomalous]
    bare = dataclasses.replace(
        result,
        images=good,
        metrics=dict.fromkeys(result.metrics, math.nan),
        types={},
        threshold=math.nan,
        curves=dict.fromkeys(result.curves, (np.empty(0), np.empty(0))),
        fit_seconds=math.nan,
        skipped=[(f"part{i}.png", "cut short") for i in range(25)],
        notes=["A note."],
        pictures=[p for p in result.pictures if p.group == "good"],
    )
    report.write_report([bare], tmp_path / "report.html")
    text = " ".join(Elements((tmp_path / "report.html").read_text(encoding="utf-8")).text.split())
    assert "nan" not in text.lower().replace("nanosecond", "")
    assert "The test images are all good" in text
    assert "undefined: one class only" in text
    assert "part0.png: cut short" in text
    assert "and 5 more" in text
    assert "A note." in text


@pytest.mark.parametrize("scores", [[1.0, 1.0], [1e-3, 1e3], [-5.0, 1e6]])
def test_histogram_of_any_scores(result, tmp_path, scores):
    images = [
        dataclasses.replace(image, score=scores[image.is_anomalous]) for image in result.images
    ]
    odd = dataclasses.replace(result, images=images, threshold=scores[1])
    report.write_report([odd], tmp_path / "report.html")
    text = Elements((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert ("image score, logarithmic" in text) == (scores == [1e-3, 1e3])


def test_size_is_bounded(page, result):
    assert page.stat().st_size < 200_000 + 60_000 * len(result.pictures)


def test_a_failed_report_leaves_the_old_one(result, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("the old one")
    gone = dataclasses.replace(result.pictures[0].image, path=tmp_path / "gone.png")
    pictures = [dataclasses.replace(result.pictures[0], image=gone)]
    with pytest.raises((ImageError, OSError), match=r"gone\.png"):
        report.write_report([dataclasses.replace(result, pictures=pictures)], path)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="results is empty"):
        report.write_report([], tmp_path / "report.html")


def test_pictures_are_read_as_the_model_read_them(result, tmp_path, monkeypatch):
    seen = set()
    monkeypatch.setattr(
        report,
        "read_thumbnail",
        lambda path, side, reading: seen.add(reading) or read_thumbnail(path, side, reading),
    )
    twelve = dataclasses.replace(result, settings={**result.settings, "bit_depth": 12})
    report.write_report([twelve], tmp_path / "report.html")
    assert seen == {Reading(12, sys.maxsize)}
