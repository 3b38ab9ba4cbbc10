"""The plan: its bytes are those of the tensors, and what it advises fits."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL, fail, npad, succeed
from image_files import save_image, smooth_pixels
from torch import Tensor

from npad import NPad, devices
from npad.features.backbone import Backbone, BackboneError
from npad.features.live_bytes import LiveBytes
from npad.fitting import Fit
from npad.images import ImageSource
from npad.nominal_methods import METHODS
from npad.plan import Plan, alternatives, counting, hollow_networks, refuse
from npad.statistics import nominal_set
from npad.statistics.holdout import MAX_HELD_OUT

N = 14
TINY = {"backbone": "filterbank", "image_size": (48, 80), "n_centroids": 50, "progress": False}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (N, 40, 60, 3), dtype=np.uint8)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fit]:
    """Those that are made from now on, as they are before their end."""
    found: list[Fit] = []
    finalize = Fit.finalize

    def keep(fit: Fit, **given: Any) -> Any:
        found.append(copy.deepcopy(fit))
        return finalize(fit, **given)

    monkeypatch.setattr(Fit, "finalize", keep)
    return found


def nbytes(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


EXACT: list[dict[str, Any]] = [
    {"n_features": None},
    {"n_features": None, "factor_dtype": "float32"},
    {"n_features": None, "factor_dtype": "float16", "gaussians": "joint"},
    {"n_features": None, "factor_dtype": "bfloat16", "map_layers": (1, 2), "layers": (2, 3)},
    {"gaussians": "joint", "layers": (2, 3), "map_layers": (1, 2, 3)},
    {"gaussians": "joint", "layers": (2,), "map_layers": ()},
    {"n_features": 5},
    {"n_features": 8, "gaussians": "joint"},
    {"n_features": 7, "reduction": "random", "window": 3},
    {"n_features": None, "nominal_set": None, "window": 5, "eps": 0.01},
    {"n_features": None, "fusion": "euclidean", "n_centroids": 0.05},
    {"n_features": None, "fusion": "sum", "nominal_set": "kmeans"},
    {"n_features": None, "n_centroids": 10**6},
    {"n_features": None, "holdout": 0, "eps": 0.1, "batch_size": 3},
]


@pytest.mark.parametrize("given", EXACT, ids=str)
def test_sizes_are_those_of_the_tensors(
    given: dict[str, Any], images: np.ndarray, fits: list[Fit]
) -> None:
    model = NPad(**{**TINY, **given})
    plan = model.plan(N, source_size=(40, 60))
    model.fit(images)
    for planned, found, learned in zip(plan.members, fits[0].members, model.members_, strict=True):
        gaussian, nominal = found._gaussian, found._nominal
        assert planned.member == found.member
        assert (planned.grid, planned.channels) == (learned.grid, learned.channels)
        assert planned.n_features == learned.n_features
        statistics = gaussian and nbytes(gaussian.count, gaussian.mean, gaussian.scatter)
        assert planned.statistics == (statistics or 0)
        assert planned.learned == {name: x.nbytes for name, x in learned.tensors().items()}
        held_out = found._held_out.kept
        if held_out:  # as many as chance has it
            expected = planned.held_out / counting._held_out(plan.settings, planned.member, N)
            assert nbytes(*held_out) == len(held_out) * expected
        else:
            assert planned.held_out == 0
        if nominal is not None:
            waiting = len(held_out) * planned.bank // N if plan.settings.fusion == "sum" else 0
            assert nbytes(*nominal._bank) == planned.bank - waiting
    assert plan.model == model.nbytes
    assert plan.factor == sum(m.factor.nbytes for m in model.members_ if m.factor is not None)
    centroids = (m.centroids for m in model.members_)
    assert plan.nominal_set == sum(x.nbytes for x in centroids if x is not None)
    assert plan.statistics == sum(member.statistics for member in plan.members)


def test_with_auto_features_it_is_the_most(untrained_resnet18: Path, images: np.ndarray) -> None:
    for given in ({}, {"backbone": "resnet18", "weights": untrained_resnet18, "image_size": 64}):
        model = NPad(**{**TINY, **given}).fit(images)
        plan = model.plan(N)
        assert model.nbytes <= plan.model
        for planned, learned in zip(plan.members, model.members_, strict=True):
            assert sum(x.nbytes for x in learned.tensors().values()) <= planned.model
    assert "at most" in str(plan)
    assert "at most" not in str(NPad(**TINY, n_features=None).plan())


def test_two_backbones(untrained_resnet18: Path, images: np.ndarray) -> None:
    both = {"backbone": ["filterbank", "resnet18"], "weights": [None, untrained_resnet18]}
    model = NPad(**{**TINY, **both, "image_size": 64, "n_features": 16})
    plan = model.plan(N)
    model.fit(images)
    assert plan.model == model.nbytes
    networks = [Backbone("filterbank"), Backbone("resnet18", weights=untrained_resnet18)]
    assert plan.backbone == sum(network.nbytes for network in networks)
    assert "of backbone 1" in str(plan)


@pytest.mark.parametrize("name", ["filterbank", "resnet18", "vit_tiny_patch16_224"])
def test_a_hollow_backbone_is_the_size_of_a_real_one(name: str, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    weights = None
    if name != "filterbank":
        weights = tmp_path / "weights.safetensors"
        save_file(timm.create_model(name).state_dict(), weights)
    real = Backbone(name, weights=weights, map_layers=None)
    hollow = Backbone(name, map_layers=None, hollow=True)
    assert hollow.level_channels == real.level_channels
    assert hollow.default_size == real.default_size
    assert hollow.grid((96, 128)) == real.grid((96, 128))
    assert hollow.nbytes == real.nbytes > 0
    assert hollow.activation_bytes(2, (96, 128)) == real.activation_bytes(2, (96, 128))
    levels = real.levels(torch.rand(2, 3, 96, 128))
    assert real.activation_bytes(2, (96, 128))[1] == [x.nbytes for x in levels]
    assert all(x.device.type == "meta" for x in [*hollow.parameters(), *hollow.buffers()])


def test_live_bytes() -> None:
    made_before = torch.empty(1000, device="meta")
    with LiveBytes() as live:
        x = torch.empty(10, device="meta")  # 40 bytes
        y = x + 1  # 80
        view = y.view(2, 5)
        y += 1
        z = torch.cat([x, y])  # 160
        of_before = made_before[:500]
        del x, z  # 40
        assert (live.now, live.peak) == (40, 160)
        del y
        assert live.now == 40  # the view holds it
        del view
        assert live.now == 0
        parts = torch.empty(8, device="meta").split(4)  # 32: one storage
        assert live.now == 32
    assert live.peak == 160
    assert len(parts) + len(of_before) == 502


def test_it_grows_up_to_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "BANK_BYTES", 10 * 2**20)
    model = NPad(**TINY)
    peaks = [model.plan(n).fit_peak for n in (2, 20, 80)]
    assert peaks == sorted(peaks)
    full = model.plan()
    assert full.n_images >= MAX_HELD_OUT
    assert full.fit_peak == model.plan(10 * full.n_images).fit_peak >= peaks[-1]
    assert model.plan(full.n_images).to_json() | {"free": 0} == full.to_json() | {"free": 0}


def test_what_is_kept_takes_more() -> None:
    model = NPad(**{**TINY, "image_size": 256})
    kept, dropped = model.plan(200), model.plan(200, statistics=False)
    assert kept.model == dropped.model
    end, without = (plan.fit[-1].parts for plan in (kept, dropped))
    assert end["statistics"] == kept.statistics
    assert "statistics" not in without
    folds = NPad(**{**TINY, "image_size": 256, "calibration_folds": 5}).plan(200)
    assert folds.fit[0].parts["statistics"] == 6 * kept.statistics
    assert folds.fit_peak > kept.fit_peak >= dropped.fit_peak
    assert folds.predict_peak == kept.predict_peak


def test_large_images_take_more() -> None:
    model = NPad(**TINY)
    small, large = model.plan(N), model.plan(N, source_size=(4000, 3000))
    assert large.model == small.model
    for name in ("fit_peak", "predict_peak"):
        assert getattr(large, name) - getattr(small, name) > 4000 * 3000 * 4


def test_a_smaller_model_is_a_smaller_plan() -> None:
    def peaks(**given: Any) -> tuple[int, int, int]:
        plan = NPad(**{**TINY, "image_size": 256, **given}).plan(200)
        return plan.fit_peak, plan.predict_peak, plan.model

    whole = peaks()
    for given in (
        {"n_features": 8}, {"image_size": 128}, {"layers": (3,)}, {"nominal_set": None},
    ):  # fmt: skip
        assert all(a < b for a, b in zip(peaks(**given), whole, strict=True)), given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_images": 0}, r"^NPad\.plan: n_images must be an int of at least 1, or None, got 0$"),
        ({"n_images": -3}, "n_images must be"),
        ({"n_images": 2.0}, "n_images must be"),
        ({"n_images": True}, "n_images must be"),
        ({"n_images": "9"}, "n_images must be"),
        ({"source_size": 64}, r"source_size must be a positive \(height, width\), or None, got 64"),
        ({"source_size": (64, 0)}, "source_size must be"),
        ({"source_size": (64, 64, 3)}, "source_size must be"),
        ({"source_size": (64, 6.4)}, "source_size must be"),
        ({"source_size": "ab"}, "source_size must be"),
    ],
)
def test_what_a_plan_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPad(**TINY).plan(**arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": (2, 9)}, r"layers \[2, 9\]: backbone 'filterbank' has levels"),
        ({"n_features": 1000}, "n_features=1000 is more than the 51 channels of filterbank"),
        ({"image_size": 8}, "does not work with backbone"),
        ({"backbone": "resnet19"}, "is no model of timm"),
        ({"gaussians": "joint", "map_layers": (1, 2)}, "lacks"),
        ({"device": "nowhere"}, "device must be"),
    ],
)
def test_arguments_that_no_fit_would_take(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, BackboneError), match=message):
        NPad(**{**TINY, **given}).plan()


def test_it_needs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npad.features.backbone.load_weights", None)
    monkeypatch.setattr("npad.features.timm_models._check_download", None)
    plan = NPad(weights="nowhere.safetensors").plan()
    assert plan.backbone > 90e6


# --- what does not fit ---


def freeing(monkeypatch: pytest.MonkeyPatch, n_bytes: int | None) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda device: n_bytes)


def changed(arguments: dict[str, Any], changes: dict[str, Any], n_images: int) -> Plan:
    """The plan with what is advised."""
    given = dict(changes)
    statistics = given.pop("statistics", True)
    return NPad(**{**arguments, **given}).plan(n_images, statistics=statistics)


CASES: list[dict[str, Any]] = [
    {},
    {"gaussians": "joint", "factor_dtype": "float32"},
    {"n_centroids": 0.5},
    {"nominal_set": None},
    {"fusion": "euclidean"},
    {"layers": (2,), "batch_size": 1},
    {"calibration_folds": 4},
    {"backbone": ["filterbank", "resnet18"], "gaussians": "joint", "n_features": 40},
]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("given", CASES, ids=str)
def test_what_is_advised_fits(
    given: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**TINY, "image_size": (200, 264), **given}
    plan = NPad(**arguments).plan(300)
    base = counting.RUNTIME
    free = base + int(share * (max(plan.fit_peak, plan.predict_peak) - base))
    freeing(monkeypatch, free)
    plan = NPad(**arguments).plan(300)
    assert not plan.fits
    found = alternatives(plan)
    assert found
    for one in found:
        again = changed(arguments, one.changes, 300)
        assert again.fits, one
        assert again.to_json() == one.plan.to_json()
        assert max(again.fit_peak, again.predict_peak) <= free
    with pytest.raises(MemoryError) as caught:
        refuse(replace(plan, free=min(free, plan.fit_peak - 1)))
    assert "NPad.fit: " in str(caught.value)


def test_a_fit_is_refused_before_an_image_is_read(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**TINY, "image_size": 256}
    plan = NPad(**arguments).plan(N, source_size=(40, 60))
    need = plan.fit_peak
    free = counting.RUNTIME + int(0.7 * (need - counting.RUNTIME)) - plan.backbone
    freeing(monkeypatch, free)
    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "batches", None)
        with pytest.raises(MemoryError) as caught:
            NPad(**arguments).fit(images)
    told = str(caught.value)
    assert told.startswith(f"NPad.fit: {devices.shown_size(need)} are needed (")
    assert f"{devices.shown_size(free + plan.backbone)} are free on cpu; what fits: " in told
    found = alternatives(replace(plan, free=free + plan.backbone), predict=False)
    assert told.endswith("; ".join(map(str, found)))
    for one in found:
        given = dict(one.changes)
        statistics = given.pop("statistics", True)
        NPad(**{**arguments, **given}).fit(images, statistics=statistics)


def test_where_one_change_is_not_enough_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**TINY, "image_size": 256, "gaussians": "joint", "batch_size": 8}
    freeing(monkeypatch, counting.RUNTIME + 7 * 10**5)
    plan = NPad(**arguments).plan(40)
    (one,) = alternatives(plan)
    assert len(one.changes) > 1
    assert changed(arguments, one.changes, 40).fits


def test_where_nothing_helps_it_is_said(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeing(monkeypatch, 10**6)
    with pytest.raises(MemoryError, match=r"1 MB are free on cpu; no other arguments that npad"):
        NPad(**TINY).fit(images)


def test_where_free_memory_is_not_known_all_fits(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeing(monkeypatch, None)
    plan = NPad(**TINY).plan()
    assert plan.fits
    assert alternatives(plan) == []
    assert "free on cpu: not known: fits" in str(plan)
    NPad(**TINY).fit(images)


def test_a_stream_is_held_to_its_first_batch(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = NPad(**TINY).plan().fit_peak
    freeing(monkeypatch, NPad(**TINY).plan(8).fit_peak)
    assert NPad(**TINY).plan(8).fit_peak < whole
    NPad(**TINY).fit(x for x in images)


def test_the_plan_of_a_gpu_keeps_nothing_and_halves_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freeing(monkeypatch, 10**12)
    model = NPad(**{**TINY, "image_size": 256})
    on_cpu = model.plan(20)
    networks = hollow_networks(on_cpu.settings)
    gpu = torch.device("cuda:0")

    def plan(batch_size: int) -> Plan:
        settings = replace(on_cpu.settings, batch_size=batch_size)
        return counting.planned(settings, networks, gpu, n_images=20)

    found = plan(8)
    assert all(phase.n_bytes == sum(phase.parts.values()) for phase in (*found.fit, *found.predict))
    assert "libraries at work" not in found.fit[0].parts
    half = plan(4).fit_peak
    assert half < found.fit_peak
    refuse(replace(found, free=half))
    with pytest.raises(MemoryError, match=r"free on cuda:0; what fits: (.*; )?batch_size=2 \(fit"):
        refuse(replace(found, free=half - 1))


# --- the size of the first image ---


def test_the_size_of_the_first_image(tmp_path: Path, images: np.ndarray) -> None:
    from PIL import Image

    def size(source: object) -> tuple[int, int] | None:
        return ImageSource(source, image_size=(8, 8)).size_of_first()

    path = save_image(tmp_path / "a.png", smooth_pixels(30, 50))
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images[0]).save(turned, exif=exif)
    assert size(path) == (30, 50)
    assert size([path.read_bytes()]) == (30, 50)
    assert size(turned) == (60, 40)
    for suffix in ("jpg", "png", "tiff"):
        file = tmp_path / f"opened.{suffix}"
        Image.fromarray(images[0]).save(file, exif=exif)
        with Image.open(file) as opened:
            assert size(opened) == size(file) == (60, 40)
    assert size(images) == (40, 60)
    assert size(Image.fromarray(images[0])) == (40, 60)
    assert size(x for x in images) is None
    broken = tmp_path / "b.png"
    broken.write_bytes(b"no image")
    assert size(broken) is None


# --- the bank ---


def test_the_bank_holds_what_came_whatever_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 3)
    whole = nominal_set.NominalSet(n_centroids=7)
    whole.update(x)
    for rows in (1, 2, 9, 64):
        monkeypatch.setattr(nominal_set, "BLOCK_BYTES", rows * 4 * 3 + 1)
        found = nominal_set.NominalSet(n_centroids=7)
        for part in x.split([1, 8, 30, 61]):
            found.update(part)
        assert all(len(block) <= rows for block in found._bank)
        assert torch.equal(torch.cat(found._bank), x)
        restored = nominal_set.NominalSet(n_centroids=7)
        restored.restore(*found.state())
        restored.update(x[:5])
        assert torch.equal(torch.cat(restored._bank), torch.cat([x, x[:5]]))
        assert torch.equal(found.finalize().centroids_, whole.finalize().centroids_)


def test_methods_say_what_they_take() -> None:
    for method in METHODS.values():
        assert 0 < method.working_bytes(1000, 10, 50) <= method.working_bytes(2000, 10, 50)
    few, many = (METHODS["kmeans"].working_bytes(n, 2, 50) for n in (512, 513))
    assert many - few == 4 * 50 * 512  # a sample is a copy


# --- the command line ---


def test_the_command(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", smooth_pixels(60, 90))
    told = succeed("plan", tmp_path, *SMALL).out
    model = NPad("filterbank", image_size=64, n_centroids=50)
    plan = model.plan(3, source_size=(60, 90), statistics=False)
    assert told.split("free on")[0] == str(plan).split("free on")[0]
    assert told.rstrip().endswith(": fits")
    found = json.loads(succeed("plan", "--images", 40, "--json", *SMALL).out)
    plan = model.plan(40, statistics=False)
    assert (found["fit_peak"], found["predict_peak"]) == (plan.fit_peak, plan.predict_peak)
    assert found["fits"] is True
    assert found["alternatives"] == []
    assert found["model"] == sum(
        size
        for member in found["members"]
        for name, size in member.items()
        if name in ("projection", "mean", "factor", "centroids")
    )


def test_the_command_advises_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--backbone", "filterbank", "--image-size", "256x192", "--images", "200")
    peak = NPad("filterbank", image_size=(256, 192)).plan(200, statistics=False).fit_peak
    freeing(monkeypatch, int(0.7 * peak))
    outcome = npad("plan", *given)
    assert outcome.code == 1
    assert outcome.err.startswith("npad: error: the plan does not fit: ")
    assert outcome.err.count("\n") == 1
    table, _, advice = outcome.out.partition("\nwhat fits:\n")
    assert table.rstrip().endswith(": does not fit")
    lines = advice.splitlines()
    assert lines
    for line in lines:
        options = line.partition(" (fit")[0].replace(",  ", " ").replace("'", "")
        words = [word.rstrip(",") for word in options.split()]
        assert words[0].startswith("--")
        succeed("plan", *given, *words)
    as_json = npad("plan", "--json", *given)
    assert as_json.code == 1
    found = json.loads(as_json.out)
    assert found["fits"] is False
    assert len(found["alternatives"]) == len(lines)
    assert all(one["fit_peak"] <= 0.7 * peak for one in found["alternatives"])


def test_fit_refuses_in_the_words_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        save_image(tmp_path / f"{i}.png", smooth_pixels(60, 90, seed=i))
    model = NPad("filterbank", image_size=256)
    peak = model.plan(4, source_size=(60, 90), statistics=False).fit_peak
    freeing(monkeypatch, counting.RUNTIME + (peak - counting.RUNTIME) // 2)
    given = ("--backbone", "filterbank", "--image-size", "256")
    told = fail(1, "fit", tmp_path, "-o", tmp_path / "m.npad", *given, says=["what fits: --"]).err
    assert "image_size=" not in told
    assert not (tmp_path / "m.npad").exists()


def test_what_the_command_refuses(tmp_path: Path) -> None:
    fail(2, "plan", "--images", 0, *SMALL, says=["--images"])
    fail(2, "plan", "--images", "many", *SMALL, says=["--images"])
    fail(2, "plan", tmp_path, "--images", 3, *SMALL, says=["DIR and --images exclude each other"])
    fail(2, "plan", tmp_path / "nowhere", *SMALL, says=["nowhere"])
    fail(1, "plan", tmp_path, *SMALL, says=["no images"])
    fail(1, "plan", *SMALL, "--layers", "2,9", says=["--layers [2, 9]"])
    fail(2, "plan", *SMALL, "--n-features", "0", says=["--n-features must be"])
