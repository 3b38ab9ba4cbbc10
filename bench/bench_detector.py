"""The whole of predict and fit: npad beside anomalib's PaDiM and PatchCore.

On the CPU with real images and weights (NPAD_DATA, NPAD_WEIGHTS): what is skipped, and so what is
timed, depends on them. On a GPU nothing does but the nominal set's choice, so weights and images are
random there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from npad import NPad
from npad.features.backbone import levels_in_parts
from npad.images.source import ImageSource
from npad.scoring.cuda_graphs import Graphs
from npad.scoring.pipeline import score_in_parts
from npad.scoring.scorer import reduce

SIZE = 256
N_IMAGES = 256  # of a fit on a GPU


class Predict(NamedTuple):
    batch: int
    source: str


class Gpu(NamedTuple):
    batch: int
    n_features: str | None


class Fit(NamedTuple):
    N: int


@lru_cache(maxsize=1)
def on_cpu() -> tuple[dict[str, Any], list[Path]]:
    """npad, its compiled form, PaDiM and PatchCore, fitted on one data set; and images to score."""
    pytest.importorskip("anomalib")
    from anomalib.models.image.patchcore import torch_model
    from peer_methods import Anomalib, Clock, Npad

    from npad.evaluation.datasets import find_categories

    if not (os.environ.get("NPAD_DATA") and os.environ.get("NPAD_WEIGHTS")):
        pytest.skip("NPAD_DATA and NPAD_WEIGHTS are not set")
    (category,) = find_categories(Path(os.environ["NPAD_DATA"]) / "mtd")
    weights = Path(os.environ["NPAD_WEIGHTS"]) / "resnet18_layers123.safetensors"

    class AnySubset:
        """In place of an hour of PatchCore's coreset: as many embeddings, at random."""

        def __init__(self, embedding: Tensor, sampling_ratio: float) -> None:
            self.embedding, self.size = embedding, int(sampling_ratio * len(embedding))

        def sample_coreset(self) -> Tensor:
            return self.embedding[torch.randperm(len(self.embedding))[: self.size]]

    models: dict[str, Any] = {"npad": Npad(weights, 0)}
    for method in ("padim", "patchcore"):
        models[method] = Anomalib(method, weights, 0, Path())
    torch_model.KCenterGreedy = AnySubset  # type: ignore[misc]
    for model in models.values():
        model.fit(category.train, Clock())
    models["npad"] = models["npad"].model
    for method in ("padim", "patchcore"):
        models[method].model.eval()
    return models, [sample.path for sample in category.test[::9]]


@pytest.mark.cases(
    cpu=[Predict(batch, source) for batch in (1, 16) for source in ("tensors", "files")]
)
@pytest.mark.benchmark(group="predict")
def bench_predict_cpu(device: torch.device, case: Predict, race: Any) -> None:
    """64 images: from tensors of the model's size to scores and maps, and from their files."""
    models, paths = on_cpu()
    from peer_methods import anomalib_batches

    batch, source = case
    paths = paths[: 16 if batch == 1 else 64]
    images = [
        b.images for b in ImageSource(paths, image_size=(SIZE, SIZE), batch_size=batch).batches()
    ]
    normalised = list(anomalib_batches(paths, batch))
    model = models["npad"]

    def npad() -> list[object]:
        model.batch_size = batch
        return [model.score(x) for x in images] if source == "tensors" else [model.predict(paths)]

    def peer(name: str) -> Callable[[], list[object]]:
        def run() -> list[object]:
            batches = normalised if source == "tensors" else anomalib_batches(paths, batch)
            with torch.inference_mode():
                return [models[name].model(x) for x in batches]

        return run

    race({"npad": npad, "padim": peer("padim"), "patchcore": peer("patchcore")}, rounds=5)


@lru_cache(maxsize=1)
def random_weights(folder: Path) -> Path:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model("wide_resnet50_2", features_only=True, out_indices=(2, 3))
    path = folder / "wide_resnet50_2.safetensors"
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    return path


def random_images(n: int) -> np.ndarray:
    """Smooth at several scales, as photographs are: (n, SIZE, SIZE, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(n, 3, SIZE, SIZE)
    for side in (4, 16, 64):
        noise = torch.rand(n, 3, side, side, generator=generator)
        image += torch.nn.functional.interpolate(noise, size=SIZE, mode="bilinear") / 3
    return (255 * image).byte().permute(0, 2, 3, 1).numpy()


@lru_cache(maxsize=1)
def on_gpu(folder: Path, n_features: str | None) -> NPad:
    model = NPad(
        weights=random_weights(folder), n_features=n_features, device="cuda", progress=False
    )
    return model.fit(random_images(N_IMAGES))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detector")


@pytest.mark.cases(cuda=[Gpu(batch, n) for n in (None, "auto") for batch in (1, 32)])
@pytest.mark.benchmark(group="predict")
def bench_predict_gpu(
    device: torch.device, case: Gpu, folder: Path, race: Any, benchmark: Any
) -> None:
    """From a tensor on the GPU to scores and maps there; the backbone alone beside it."""
    model = on_gpu(folder, case.n_features)
    images = torch.rand(case.batch, 3, SIZE, SIZE, device=device)
    scorer = model.scorer()

    backbone = Graphs(
        lambda images: tuple(
            reduce(x, member.projection)
            for member, x in zip(
                scorer.members,
                scorer.embeddings([levels_in_parts(n, images) for n in scorer.networks]),
                strict=True,
            )
        )
    )

    def eager() -> object:
        return score_in_parts(scorer, images)

    def npad() -> object:
        return model.score(images)

    for a, b in zip(npad(), eager(), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(a, b)
    race(
        {
            "npad": npad,
            "without a graph": eager,
            "embedding alone": lambda: backbone(images),
        },
        rounds=15,
    )
    # Of both or of neither: the two stand beside each other in the report.
    graphs = model._graphs
    recorded = backbone.n_recorded > 0
    assert recorded == (graphs is not None and graphs[1].n_recorded > 0)
    benchmark.extra_info["path"] = "CUDA graph" if recorded else "kernel by kernel"


@pytest.mark.cases(cuda=[Fit(N_IMAGES)])
@pytest.mark.benchmark(group="fit")
def bench_fit_gpu(device: torch.device, case: Fit, folder: Path, race: Any) -> None:
    """WideResNet-50, layers 2 and 3, all 1536 channels, 8192 centroids, images from memory."""
    images = random_images(case.N)
    model = NPad(weights=random_weights(folder), device=device, batch_size=32, progress=False)
    race({"npad": lambda: model.fit(images)}, rounds=2)


@pytest.mark.cases(cuda=[Gpu(32, None)])
@pytest.mark.benchmark(group="predict files")
def bench_predict_files(
    device: torch.device, case: Gpu, folder: Path, race: Any, benchmark: Any
) -> None:
    """From JPEG files; beside it decoding alone, and predicting alone."""
    model = on_gpu(folder, case.n_features)
    model.batch_size = case.batch
    images = random_images(16 * case.batch)
    for i, image in enumerate(images):
        Image.fromarray(image).resize((640, 480)).save(folder / f"{i:04}.jpg", quality=92)

    def decode() -> None:
        for _ in ImageSource(folder, image_size=(SIZE, SIZE), batch_size=case.batch).batches():
            pass

    medians = race(
        {
            "npad": lambda: model.predict(folder),
            "decoding alone": decode,
            "predict alone": lambda: model.predict(images),
        },
        rounds=3,
    )
    slower = max(medians["decoding alone"], medians["predict alone"])
    benchmark.extra_info["ratios"]["slower of the two"] = slower / medians["npad"]
