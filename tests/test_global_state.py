"""What a program has set for itself changes no result of npad, and npad leaves it as it was."""

from __future__ import annotations

import decimal
import locale
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch
from image_files import save_image, smooth_pixels
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from npad import NPad
from npad.fitting import Fit
from npad.members import Member

SIZE = 32


@contextmanager
def setting(change: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def verbose_log() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.DEBUG)
    yield
    root.setLevel(before)


def precision(owner: Any, value: str) -> AbstractContextManager[None]:
    if not hasattr(owner, "fp32_precision"):
        pytest.skip("torch before 2.9")
    return setting(lambda x: setattr(owner, "fp32_precision", x), value, owner.fp32_precision)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "float16 by default": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16 by default": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "another device by default": lambda: setting(torch.set_default_device, "meta", None),
    "another device around": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "coarse products": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "coarse everything": lambda: precision(torch.backends, "bf16"),
    "flush denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "function mode": Watching,
    "dispatch mode": Counting,
    "numpy raises": lambda: np.errstate(all="raise"),
    "numpy prints": lambda: np.printoptions(precision=1, threshold=2, suppress=True),
    "decimals": lambda: decimal.localcontext(decimal.Context(prec=1, traps=[decimal.Inexact])),
    "warnings are errors": strict_warnings,
    "a log of everything": verbose_log,
    "little recursion": lambda: setting(sys.setrecursionlimit, 400, sys.getrecursionlimit()),
}


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def images(request: pytest.FixtureRequest) -> Tensor:
    if getattr(request.node, "callspec", None) and request.getfixturevalue("model") == "registered":
        rng = np.random.default_rng(0)
        poses = [parts.random_pose(rng, "euclidean", 0.05, 5) for _ in range(8)]
        pixels = np.stack([parts.part((SIZE, SIZE), pose, seed=i) for i, pose in enumerate(poses)])
    else:
        pixels = np.stack([smooth_pixels(SIZE, SIZE, seed=i) for i in range(8)])
    return torch.from_numpy(np.moveaxis(pixels, 3, 1) / np.float32(255))


MODELS: dict[str, dict[str, Any]] = {
    "sum, principal axes": {"fusion": "sum", "n_features": 8},
    "product, random axes": {"n_features": 8, "reduction": "random", "factor_dtype": "float32"},
    "k-means": {"fusion": "euclidean", "nominal_set": "kmeans", "n_centroids": 9},
    "network": {"backbone": "resnet18", "n_features": 8, "layers": (1, 2), "n_centroids": 9},
    "registered": {"align": "euclidean", "n_features": 8},
}


def results(
    arguments: dict[str, Any], images: Tensor, untrained_resnet18: Path, folder: Path
) -> list[Any]:
    """All that npad makes of these images, as bytes and texts."""
    known = {"backbone": "filterbank", "image_size": SIZE, "n_centroids": 50, "progress": False}
    if "backbone" in arguments:
        known["weights"] = untrained_resnet18
    model = NPad(**known | arguments)
    model.fit(images)
    path = folder / "model.npad"
    model.save(path)
    found: list[Any] = [model.settings(), model.backbones_, path.read_bytes()]
    again = NPad.load(path)
    for one in (model, again):
        prediction = one.predict(list(images))
        found += [prediction.scores.tobytes(), *(x.tobytes() for x in prediction.maps)]
    for x in (*again.score(images), *again.scorer()(images), again.embed(images)):
        found += [x.dtype, x.cpu().numpy().tobytes()]
    whole = Member(0, ()).used_by(model.settings_.fusion)
    assert whole is not None
    halves = [Fit(model.settings_, [whole]) for _ in range(2)]
    embeddings = NPad(**known | arguments).embed(images)
    for half, part in zip(halves, embeddings.chunk(2), strict=True):
        half.members[0].projection = model.members_[-1].projection
        half.update(embeddings=[part])
    learned = halves[0].merge(halves[1]).finalize()
    found += [x.cpu().numpy().tobytes() for x in learned.tensors().values()]
    return [*found, learned.to_json()]


PLAIN: dict[str, list[Any]] = {}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("model", MODELS)
def test_results_are_those_of_a_plain_program(
    model: str, state: str, images: Tensor, untrained_resnet18: Path, tmp_path: Path
) -> None:
    if model not in PLAIN:
        PLAIN[model] = results(MODELS[model], images, untrained_resnet18, tmp_path)
    with STATES[state]():
        before = everything()
        found = results(MODELS[model], images, untrained_resnet18, tmp_path)
        assert everything() == before
        loaded = NPad.load(tmp_path / "model.npad")
    assert found == PLAIN[model]
    assert not any(x.is_inference() for x in loaded.scorer().state_dict().values())


FIRST_USE = """
import hashlib, multiprocessing, os, random, sys
import numpy as np, torch
folder, foreign = sys.argv[1], sys.argv[2] == "foreign"
torch.set_num_threads(1)
if foreign:
    multiprocessing.set_start_method("spawn")
    np.seterr(all="raise")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
from npad import NPad
digest = hashlib.sha256()
for more in ({"fusion": "sum", "n_features": 8}, {"factor_dtype": "float32"}):
    model = NPad("filterbank", image_size=32, n_centroids=50, progress=False, **more)
    model.fit(folder).save("model.npad")
    prediction = NPad.load("model.npad").predict(folder)
    digest.update(open("model.npad", "rb").read())
    digest.update(prediction.scores.tobytes() + b"".join(x.tobytes() for x in prediction.maps))
print(digest.hexdigest())
"""


def test_results_of_a_first_use_are_those_of_a_plain_program(
    images: Tensor, tmp_path: Path
) -> None:
    """Of a process in which npad has nothing at hand from before; on a machine that hides its GPU."""
    for i, image in enumerate(images):
        save_image(tmp_path / f"images/{i}.png", (image.permute(1, 2, 0) * 255).byte().numpy())
    found = [
        subprocess.run(
            [sys.executable, "-c", FIRST_USE, tmp_path / "images", kind],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "" if kind == "foreign" else "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in ("plain", "foreign")
    ]
    assert found[0] == found[1] != ""


def everything() -> list[Any]:
    """What a program may have set."""
    backends: Any = torch.backends
    owners = backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul
    return [
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        [getattr(owner, "fp32_precision", None) for owner in owners],
        torch.get_num_threads(),
        torch.random.initial_seed(),
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        repr(np.random.get_state()),  # noqa: NPY002
        np.geterr(),
        np.get_printoptions(),
        repr(decimal.getcontext()),
        warnings.filters[:],
        logging.getLogger().level,
        sys.getrecursionlimit(),
        Path.cwd(),
        locale.setlocale(locale.LC_ALL),
        dict(os.environ),
        threading.active_count(),
    ]
