"""EfficientNet-Lite0 from its package, what can be used without a network, and files to carry over.

The package is made here, with random weights under the names that the real one has. Tests of the real
one are skipped where it is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from command_line import SMALL, fail, succeed
from image_files import save_image, smooth_pixels
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from npad import NPad
from npad.features import offline
from npad.features.backbone import Backbone, BackboneError

NAME = "tf_efficientnet_lite0"
State = dict[str, Tensor]


def names_in_the_package() -> Iterator[str]:
    """In the order of timm's, since both write layer after layer."""
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def pair(where: str, convolution: str, norm: str) -> Iterator[str]:
        yield f"{where}{convolution}.weight"
        yield from (f"{where}{norm}.{tensor}" for tensor in tensors)

    yield from pair("", "_conv_stem", "_bn0")
    for i in range(16):
        block = f"_blocks.{i}."
        if i:
            yield from pair(block, "_expand_conv", "_bn0")
        yield from pair(block, "_depthwise_conv", "_bn1")
        yield from pair(block, "_project_conv", "_bn2")
    yield from pair("", "_conv_head", "_bn1")
    yield from ("_fc.weight", "_fc.bias")


def timm_weights(name: str) -> State:
    torch.manual_seed(3)
    return timm.create_model(name).state_dict()


@pytest.fixture(scope="module")
def weights() -> State:
    state = timm_weights(NAME)
    for key, value in state.items():  # all different
        if "running" in key or "bn" in key:
            state[key] = value + torch.rand(value.shape) if value.is_floating_point() else value
    return state


@pytest.fixture(scope="module")
def packed(weights: State) -> State:
    return dict(zip(names_in_the_package(), weights.values(), strict=True))


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and an empty cache of the hub."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "PACKAGE", "npad-has-no-such-package")


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package that holds what is given, and let its hash be the one that is known."""

    def make(content: Any, known: bool = True) -> Path:
        site = tmp_path / "site"
        about = site / "npad_test_lite0-0.9.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: npad-test-lite0\nVersion: 0.9\n"
        )
        (about / "LICENSE").write_text("Apache, in its own words")
        file = site / offline._FILE
        file.parent.mkdir(parents=True)
        (file.parents[1] / "__init__.py").write_text("raise SystemExit('code of the package ran')")
        torch.save(content, file)
        if known:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            monkeypatch.setattr(offline, "_SHA256", digest)
        monkeypatch.setattr(offline, "PACKAGE", "npad-test-lite0")
        monkeypatch.syspath_prepend(site)
        return file

    return make


# --- the package ---


def test_every_weight_finds_its_place(install: Install, weights: State, packed: State) -> None:
    assert list(offline.timm_names(packed)) == list(weights)
    install(packed)
    network = Backbone(NAME)
    assert (network.layers, network.channels, network.grid((256, 256))) == ((2, 3), 152, (32, 32))
    assert network.mean.unique().tolist() == network.std.unique().tolist() == [0.5]
    whole = timm.create_model(NAME, features_only=True, out_indices=(2, 3)).eval()
    whole.load_state_dict({k: weights[k] for k in whole.state_dict()})
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = whole((image - 0.5) / 0.5)
    for level, of_timm in zip(network.levels(image), wanted, strict=True):
        assert torch.allclose(level, of_timm, rtol=1e-3, atol=1e-4 * float(of_timm.abs().max()))


def test_the_hash_is_that_of_the_weights_wherever_they_come_from(
    install: Install, weights: State, packed: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = install(packed)
    installed = Backbone(NAME).weights_hash
    save_file(weights, tmp_path / "of timm.safetensors")
    monkeypatch.setattr(offline, "PACKAGE", "npad-has-no-such-package")
    assert Backbone(NAME, weights=tmp_path / "of timm.safetensors").weights_hash == installed
    assert Backbone(NAME, weights=file).weights_hash == installed  # taken out of the package


def test_a_model_is_fitted_and_loaded_without_a_file_of_weights(
    install: Install, packed: State, tmp_path: Path
) -> None:
    install(packed)
    for i in range(3):
        save_image(tmp_path / f"images/{i}.png", smooth_pixels(32, 32, seed=i))
    small = {"image_size": 32, "n_centroids": 10, "progress": False}
    model = NPad(NAME, **small).fit(tmp_path / "images")
    model.save(tmp_path / "model.npad")
    again = NPad.load(tmp_path / "model.npad", progress=False)
    assert again.settings()["weights"] is None
    scores = model.predict(tmp_path / "images").scores
    assert again.predict(tmp_path / "images").scores.tolist() == scores.tolist()


def test_another_file_is_refused_before_it_is_opened(install: Install, packed: State) -> None:
    file = install(packed, known=False)
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BackboneError, match=r"lite0.*\.pth: .*SHA-256.*pip install --force-reinst"):
        Backbone(NAME)
    file.unlink()
    with pytest.raises(
        BackboneError, match=r"\.pth: it cannot be read .*pip install --force-reinst"
    ):
        Backbone(NAME)


class Trap:
    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_no_code_runs(install: Install, packed: State) -> None:
    install({**packed, "trap": Trap()})
    with pytest.raises(BackboneError, match="Python objects"):
        Backbone(NAME)
    assert offline._FILE.split("/", maxsplit=1)[0] not in sys.modules


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("_blocks.3._bn0.running_var"), r"1 of \d+ weights .* missing"),
        (lambda w: w.update({"_conv_stem.weight": torch.zeros(8, 3, 3, 3)}), "shape"),
        (lambda w: w.update({"_blocks.3._se_reduce.weight": torch.zeros(1)}), "no place.*_se_red"),
        (lambda w: w.update({"_blocks.16._bn0.weight": torch.zeros(1)}), "no place.*_blocks.16"),
        (lambda w: w.update({"_bn0.bias": torch.full((32,), torch.nan)}), "NaN"),
    ],
)
def test_loading_is_strict(
    change: Callable[[State], object], says: str, install: Install, packed: State
) -> None:
    content = dict(packed)
    change(content)
    install(content)
    with pytest.raises(BackboneError, match=says):
        Backbone(NAME)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", [NAME, f"{NAME}.in1k", "resnet18"])
def test_what_is_missing_is_named(name: str) -> None:
    says = r"the network is down.*weights=.*npad fetch.*pip install \"npad\[offline\]\".*filterbank"
    with pytest.raises(BackboneError, match=says):
        Backbone(name)


def test_what_is_installed_is_not_advised(install: Install) -> None:
    install({})
    with pytest.raises(BackboneError, match=rf"use backbone '{NAME}', whose weights are installed"):
        Backbone("resnet18")


def test_a_tag_means_the_file_of_timm(install: Install, packed: State) -> None:
    install(packed)
    with pytest.raises(BackboneError, match="the network is down"):
        Backbone(f"{NAME}.in1k")


# --- the real package ---


@pytest.fixture
def real() -> None:
    if offline.version() is None:
        pytest.skip(f"{offline.PACKAGE} is not installed")


@pytest.mark.usefixtures("real")
def test_real_weights_give_known_embeddings() -> None:
    """Numbers from another conversion: all entries in the order of timm's, and timm's own blocks."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([x / 63, y / 63, (x + y) % 16 / 15])[None]
    embeddings = Backbone(NAME)(image)[0]
    assert embeddings.shape == (8, 8, 152)
    known = {
        (0, 0, 0): 3.283039,
        (3, 4, 7): -9.225714,
        (5, 2, 39): 6.036065,
        (4, 4, 40): 10.828974,
        (2, 6, 100): -1.137541,
        (7, 7, 151): -2.520022,
    }
    found = {place: float(embeddings[place]) for place in known}
    assert found == pytest.approx(known, rel=1e-3, abs=1e-3)


# --- npad backbones ---


def put_into_the_cache(hub: Path, name: str) -> State:
    state = timm_weights(name)
    config = timm.get_pretrained_cfg(name)
    folder = hub / f"models--{config.hf_hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    return state


def test_backbones(install: Install, tmp_path: Path) -> None:
    install({})  # its weights are not read
    put_into_the_cache(tmp_path / "hub", "lcnet_050")
    lines = [line.split("\t") for line in succeed("backbones").out.splitlines()]
    assert lines == [
        ["name", "weights", "channels", "image_size", "grid"],
        ["filterbank", "none needed", "51", "256 x 256", "64 x 64"],
        [NAME, "npad-test-lite0 0.9", "152", "256 x 256", "32 x 32"],
        ["lcnet_050.ra2_in1k", "local cache", "192", "256 x 256", "32 x 32"],
        ["wide_resnet50_2", "download", "1536", "256 x 256", "32 x 32"],
    ]


@pytest.mark.usefixtures("missing")
def test_backbones_measured(tmp_path: Path) -> None:
    put_into_the_cache(tmp_path / "hub", "lcnet_050")
    rows = json.loads(succeed("backbones", "--measure", "--json", "--threads", 1).out)
    bank, lite0, lcnet, default = rows
    assert lite0["weights"] == "download, or npad[offline]"
    assert lite0["milliseconds"] is default["milliseconds"] is None
    assert bank["grid"] == [64, 64]
    assert min(bank["milliseconds"], lcnet["milliseconds"]) > 0


# --- npad fetch ---


def test_a_fetched_file_is_all_that_another_machine_needs(
    install: Install, weights: State, packed: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(packed)
    file = tmp_path / "lite0.safetensors"
    said = succeed("fetch", f"timm/{NAME}", "-o", file).out
    assert hashlib.sha256(file.read_bytes()).hexdigest() in said
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about == {
        "backbone": NAME,
        "source": "https://pypi.org/project/npad-test-lite0/0.9/",
        "license": "Apache, in its own words",
    }
    assert load_file(file).keys() == weights.keys()
    here = Backbone(NAME).weights_hash
    monkeypatch.setattr(offline, "PACKAGE", "npad-has-no-such-package")
    for i in range(3):
        save_image(tmp_path / f"images/{i}.png", smooth_pixels(32, 32, seed=i))
    options = (*SMALL[2:], "--backbone", NAME, "--weights", file)
    succeed("fit", tmp_path / "images", "-o", tmp_path / "model", *options)
    assert NPad.load(tmp_path / "model").backbones_[0]["weights_hash"] == here


def test_fetch_from_the_cache(tmp_path: Path) -> None:
    state = put_into_the_cache(tmp_path / "hub", "lcnet_050")
    succeed("fetch", "lcnet_050", "-o", tmp_path / "file.safetensors")
    written = load_file(tmp_path / "file.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())
    with safe_open(tmp_path / "file.safetensors", "pt") as opened:
        about = opened.metadata()
    assert about["source"] == "https://huggingface.co/timm/lcnet_050.ra2_in1k"
    assert about["license"] == "apache-2.0"


@pytest.mark.usefixtures("missing")
def test_what_cannot_be_fetched(tmp_path: Path) -> None:
    file = tmp_path / "file"
    fail(1, "fetch", NAME, "-o", file, says=["network is down", "npad[offline]", "where there is"])
    fail(1, "fetch", "resne18", "-o", file, says=["did you mean resnet18"])
    fail(2, "fetch", "filterbank", "-o", file, says=["needs no file"])
    fail(2, "fetch", NAME, "-o", tmp_path, says=["is a folder"])
    assert not file.exists()
