"""The backbone as it is used, in one piece, compiled, in half precision, and with batch norm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npad.features.backbone import Backbone, levels_in_parts

NAME, LAYERS = "resnet18", (2, 3)


class Case(NamedTuple):
    batch: int


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights from NPAD_WEIGHTS, or random ones."""
    if os.environ.get("NPAD_WEIGHTS"):
        return Path(os.environ["NPAD_WEIGHTS"]) / "resnet18_layers123.safetensors"
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


@pytest.mark.cases(cpu=[Case(1), Case(16)], cuda=[Case(1), Case(32)])
@pytest.mark.benchmark(group="backbone")
def bench_backbone(device: torch.device, case: Case, file: Path, race: Any) -> None:
    images = torch.rand(case.batch, 3, 256, 256, device=device)
    backbones = {
        "npad": Backbone(NAME, LAYERS, file),
        "compiled": Backbone(NAME, LAYERS, file, compile=True),
        "float16": Backbone(NAME, LAYERS, file, torch.float16),
        "bfloat16": Backbone(NAME, LAYERS, file, torch.bfloat16),
    }
    for backbone in backbones.values():
        backbone.to(device)
    whole = timm.create_model(NAME, features_only=True, out_indices=LAYERS).eval().to(device)
    state = load_file(file)
    whole.load_state_dict({key: state[key] for key in whole.state_dict()})
    whole.to(memory_format=torch.channels_last)
    normalised = images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def with_batch_norm() -> list[Tensor]:
        return list(whole(normalised))

    def in_one_piece() -> Tensor:
        return backbones["npad"](images)

    def embedded(backbone: Backbone) -> Tensor:
        return backbone.combined(levels_in_parts(backbone, images), backbone.layers)

    expected = in_one_piece()
    for name, rtol in (("npad", 1e-5), ("compiled", 1e-4), ("float16", 2e-2), ("bfloat16", 1e-1)):
        x = embedded(backbones[name])
        assert (x - expected).norm() < rtol * expected.norm()
    contenders = {name: lambda b=b: embedded(b) for name, b in backbones.items()}
    others = {"in one piece": in_one_piece, "timm, features alone": with_batch_norm}
    race({**contenders, **others}, rounds=9)
