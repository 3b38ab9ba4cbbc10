"""Weights from files as training programs, downloads and copies leave them."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import fail, succeed
from image_files import save_image, smooth_pixels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from npad import NPad
from npad.features.backbone import Backbone, BackboneError
from npad.features.weights import load_weights, weights_hash
from npad.model_file import ModelFileError, write_model

State = dict[str, Tensor]


class Part(nn.Module):
    """The part of a network that is in use; the rest of it is its classifier `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3))


WHOLE = [*Part().state_dict(), "fc.weight", "fc.bias"]


@pytest.fixture
def state() -> State:
    torch.manual_seed(7)
    return {**Part().state_dict(), "fc.weight": torch.zeros(2, 4), "fc.bias": torch.zeros(2)}


def load(path: Path) -> State:
    net = Part()
    load_weights(net, "part", path, lambda: WHOLE)
    return net.state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


FITTING: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    **{
        f"under {prefix}": lambda state, prefix=prefix: under(prefix, state)
        for prefix in (
            *("backbone.", "model.", "_orig_mod.", "module.", "net.", "encoder.", "0.1."),
            *("module._orig_mod.model.", "model.feature_extractor.feature_extractor."),
        )
    },
    **{
        f"in {wrapper}": lambda state, wrapper=wrapper: {wrapper: state, "epoch": 3, "best": 0.5}
        for wrapper in ("state_dict", "model", "state_dict_ema", "teacher", "network_weights")
    },
    "of Lightning": lambda state: {
        "epoch": 3,
        "state_dict": OrderedDict(
            under("model.feature_extractor.feature_extractor.", state)
            | {"model.memory_bank": torch.zeros(5, 4), "image_threshold.value": torch.zeros(1)}
        ),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": {"backbone": "part", "layers": ["layer1"]},
    },
    "of a detector": lambda state: (
        {k: v for k, v in under("backbone.", state).items() if "fc" not in k}
        | {"neck.conv1.weight": torch.zeros(4), "head.bias": torch.zeros(4)}
    ),
    "with another classifier": lambda state: (
        {k: v for k, v in state.items() if "fc" not in k}
        | {"fc.0.weight": torch.zeros(9), "fc.2.weight": torch.zeros(9)}
    ),
    "without counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "of two that are equal": lambda state: {"student": under("module.", state), "teacher": state},
    "of a smaller student": lambda state: {
        "student": {**state, "conv1.weight": torch.zeros(2, 3, 3, 3)},
        "teacher": state,
    },
    "as parameters": lambda state: {
        k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()
    },
    "with notes": lambda state: {**state, "version": "1.2", "date": None},
}


@pytest.mark.parametrize("case", FITTING)
def test_weights_are_found(case: str, state: State, tmp_path: Path) -> None:
    torch.save(FITTING[case](state), tmp_path / "file.pth")
    for key, value in load(tmp_path / "file.pth").items():
        if "num_batches" not in key:
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(given, tmp_path / "file.safetensors")
    for key, value in load(tmp_path / "file.safetensors").items():
        assert value.dtype == state[key].dtype
        if "num_batches" not in key:
            assert torch.equal(value, given[key].to(value.dtype)), key


UNFIT: dict[str, tuple[Callable[[State], Any], str]] = {
    "two": (
        lambda state: {"student": under("module.", state), "teacher": other(state)},
        r"'part' more than once, with other values, under 'teacher\.', 'student\.module\.'; save th",
    ),
    "an average": (
        lambda state: {"state_dict": state, "state_dict_ema": other(state)},
        r"more than once, .* under 'state_dict\.', 'state_dict_ema\.'",
    ),
    "an average in the same dict": (
        lambda state: {**state, **under("ema.", other(state))},
        r"more than once, .* under '', 'ema\.'",
    ),
    "names of another model": (
        lambda state: {"stem.weight": torch.zeros(3), "a.b": torch.zeros(3), "c": torch.zeros(3)},
        r"8 of 8 weights of 'part' are missing \(conv1\.weight, conv1\.bias, bn1\.weight, \.\.\.\); "
        r"the file holds stem\.weight, a\.b, c; is it",
    ),
    "fewer layers": (
        lambda state: {k: v for k, v in state.items() if not k.startswith("layer1")},
        r"2 of 8 weights of 'part' are missing \(layer1\.0\.weight, layer1\.0\.bias\)",
    ),
    "two prefixes that share them": (
        lambda state: {f"{'ab'[k.startswith('layer1')]}.{k}": v for k, v in state.items()},
        r"2 of 8 weights of 'part' are missing .* the file holds b\.layer1\.0\.weight, ",
    ),
    "more blocks": (
        lambda state: {**state, "layer1.1.weight": torch.zeros(4, 4, 3, 3)},
        r"1 weights have no place in 'part' \(layer1\.1\.weight\)",
    ),
    "another part": (
        lambda state: under("model.", {**state, "neck.weight": torch.zeros(3)}),
        r"1 weights have no place in 'part' \(neck\.weight\)",
    ),
    "another shape": (
        lambda state: {**state, "conv1.weight": torch.zeros(4, 1, 3, 3)},
        r"conv1\.weight is \(4, 1, 3, 3\), not \(4, 3, 3, 3\)",
    ),
    "integers": (
        lambda state: {**state, "conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int8)},
        r"no floating point \(conv1\.weight is torch\.int8\)",
    ),
    "no numbers": (
        lambda state: {**state, "bn1.bias": state["bn1.bias"] / 0},
        r"hold NaN or infinite values \(bn1\.bias\)",
    ),
    "no tensors": (lambda state: {"epoch": 3}, "holds no state dict"),
    "a list": (lambda state: list(state.values()), "holds no state dict"),
    "a tensor": (lambda state: state["conv1.weight"], "holds no state dict"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit(case: str, state: State, tmp_path: Path) -> None:
    make, says = UNFIT[case]
    torch.save(make(state), tmp_path / "file.pth")
    with pytest.raises(BackboneError, match=rf"file\.pth: .*{says}"):
        load(tmp_path / "file.pth")


# --------------------------------------------------------------------------------------------------
# What a file is, is seen from its content.


def test_the_suffix_says_nothing(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.safetensors", "c"):
        assert torch.equal(load(tmp_path / name)["conv1.weight"], state["conv1.weight"])


class Payload:
    """Pickled, it would run code when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("payload-ran",))


def halved(write: Callable[[State, Path], object]) -> Callable[[State, Path], object]:
    def make(state: State, path: Path) -> None:
        write(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return make


def archive(*names: str) -> Callable[[State, Path], object]:
    def make(state: State, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"content")

    return make


def written(content: bytes) -> Callable[[State, Path], object]:
    return lambda state, path: path.write_bytes(content)


OBJECTS = r"holds Python objects \(.*{}.*state dict alone.*torch\.save\(model\.state_dict\(\)"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 46807446\n"
FILES: dict[str, tuple[Callable[[State, Path], object], str]] = {
    "nothing": (lambda state, path: None, "there is no such file of weights"),
    "folder": (lambda state, path: path.mkdir(), "no file; give a file, such as the model.safet"),
    "empty": (written(b""), "the file is empty"),
    "text": (written(b"these are no weights"), "neither a safetensors file nor a torch file"),
    "safetensors cut short": (halved(save_file), r"cut short, \d+ of \d+ bytes"),
    "table cut short": (written(b'\xff\1\0\0\0\0\0\0{"a":'), r"cut short, 13 of 519 bytes"),
    "table damaged": (written(b'\5\0\0\0\0\0\0\0{"a":'), "the safetensors file is damaged"),
    "torch cut short": (halved(torch.save), "the torch file is cut short"),
    "old torch cut short": (
        halved(lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
        "the torch file is damaged or cut short",
    ),
    "LFS": (written(LFS), "pointer of Git LFS.*git lfs pull"),
    "page": (written(b"\n<!DOCTYPE html><html>"), "a web page"),
    "JSON": (written(b'{"metadata": {"total_size": 46807446}}'), "JSON"),
    "ONNX": (written(b"\x08\x07\x12\x07pytorch\x1a\x052.1.0"), "an ONNX model"),
    "TorchScript": (archive("a/data.pkl", "a/code/a.py", "a/constants.pkl"), "TorchScript"),
    "exported": (archive("a/archive_format", "a/models/model.json"), r"torch\.export"),
    "zip": (archive("a.npy"), "no torch file"),
    "gzip": (written(b"\x1f\x8b\x08\0\0\0\0\0"), "compressed"),
    "HDF5": (written(b"\x89HDF\r\n\x1a\n"), "HDF5"),
    "model of npad": (lambda state, path: write_model(path, {}, state), "this is a model of npad"),
    "pickle": (lambda state, path: path.write_bytes(pickle.dumps(state)), OBJECTS.format("")),
    "code": (lambda state, path: torch.save({"a": Payload()}, path), OBJECTS.format("mkdir")),
    "arguments": (
        lambda state, path: torch.save({"model": state, "args": argparse.Namespace()}, path),
        OBJECTS.format(r"argparse\.Namespace"),
    ),
    "old code": (
        lambda state, path: torch.save(
            {"a": Payload()}, path, _use_new_zipfile_serialization=False
        ),
        OBJECTS.format("mkdir"),
    ),
    "newer pickle": (
        lambda state, path: torch.save(state, path, pickle_protocol=4),
        OBJECTS.format("damaged"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_weights(
    case: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, says = FILES[case]
    for name in ("file.pth", "file.safetensors"):
        make(state, tmp_path / name)
        with pytest.raises(BackboneError, match=rf"(?s){name}: .*{says}") as caught:
            load(tmp_path / name)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "payload-ran").exists()


def test_hash_does_not_depend_on_the_file(tmp_path: Path) -> None:
    whole = timm.create_model("resnet18").state_dict()
    names = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)).state_dict()
    part = {key: whole[key] for key in names}
    old = {k: v for k, v in part.items() if not k.endswith("num_batches_tracked")}
    save_file(whole, tmp_path / "whole")
    torch.save(part, tmp_path / "part")
    torch.save({"epoch": torch.tensor(3), "state_dict": under("module.", part)}, tmp_path / "in")
    save_file(old, tmp_path / "old")
    expected = weights_hash(part)
    for file in ("whole", "part", "in", "old"):
        assert Backbone("resnet18", weights=tmp_path / file).weights_hash == expected
    part["conv1.weight"] = part["conv1.weight"] * 1.0001
    torch.save(part, tmp_path / "other")
    assert Backbone("resnet18", weights=tmp_path / "other").weights_hash != expected
    fewer = Backbone("resnet18", layers=[2], weights=tmp_path / "whole")
    assert fewer.weights_hash != expected


# --------------------------------------------------------------------------------------------------
# A model file and its weights, moved.


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        save_image(folder / f"{i}.png", smooth_pixels(64, 64, seed=i))
    return folder


@pytest.fixture(scope="module")
def project(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and in a folder beside it the weights that it was fitted on."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "weights").mkdir()
    torch.manual_seed(3)
    save_file(timm.create_model("resnet18").state_dict(), folder / "weights/r18.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small: dict[str, Any] = {"image_size": 64, "layers": (1, 2), "n_centroids": 9}
        model = NPad("resnet18", weights="weights/r18.safetensors", n_features=8, **small)
        model.progress = False
        model.fit(images).save("m.npad")
    return folder


def beside(folder: Path) -> None:
    shutil.move(folder / "weights/r18.safetensors", folder / "r18.safetensors")


def not_there(folder: Path) -> None:
    shutil.rmtree(folder / "weights")


def others(folder: Path) -> None:
    path = folder / "weights/r18.safetensors"
    save_file({k: v + 1 for k, v in load_file(path).items()}, path)


def wrong_in_the_current_folder(folder: Path) -> None:
    wrong = folder / "elsewhere/weights"
    shutil.copytree(folder / "weights", wrong)
    others(wrong.parent)


@pytest.mark.parametrize(
    "change",
    [lambda folder: None, beside, wrong_in_the_current_folder],
    ids=["under", "beside", ""],
)
def test_weights_are_looked_for_beside_the_model(
    change: Callable[[Path], object],
    project: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(project, tmp_path / "copy")
    (folder / "elsewhere").mkdir()
    shutil.rmtree(folder / "elsewhere")
    change(folder)
    (folder / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "elsewhere")
    for path in ("../m.npad", folder / "m.npad"):
        model = NPad.load(path)
        assert Path(str(model.weights)).is_file()
        assert model.predict(images).scores.shape == (4,)
    model.save("again.npad")
    NPad.load("again.npad")
    succeed("predict", "../m.npad", images, "-o", "out", "--no-overlays")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            not_there,
            BackboneError,
            r"weights/r18\.safetensors: there is no such file of weights in ",
        ),
        (others, ModelFileError, "was fitted on resnet18 with weights "),
    ],
)
def test_weights_that_are_not_found_are_asked_for(
    change: Callable[[Path], object],
    error: type[Exception],
    says: str,
    project: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(project, tmp_path / "copy")
    change(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=rf"^copy/m\.npad: .*{says}.*weights="):
        NPad.load("copy/m.npad")
    fail(1, "predict", "copy/m.npad", images, "-o", "out", says=["copy/m.npad", "--weights"])
    assert not (tmp_path / "out").exists()
    weights = project / "weights/r18.safetensors"
    assert NPad.load("copy/m.npad", weights=weights).weights == weights
    args = ("predict", "copy/m.npad", images, "-o", "out", "--no-overlays", "--weights", weights)
    succeed(*args)


def test_weights_that_are_given_are_the_only_ones(project: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(project, tmp_path / "copy")
    others(wrong)
    with pytest.raises(ModelFileError, match="was fitted on resnet18"):
        NPad.load(project / "m.npad", weights=wrong / "weights/r18.safetensors")


def test_another_folder_between_fit_and_predict(
    project: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    model = NPad.load("m.npad")
    expected = model.predict(images).scores
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(model.predict(images).scores, expected)
    model.save("m.npad")
    model.weights = project / "weights/r18.safetensors"
    np.testing.assert_array_equal(model.predict(images).scores, expected)
