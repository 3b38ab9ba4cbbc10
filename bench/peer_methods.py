"""The methods that bench_peers.py sets side by side, behind one face: fit, save, load, predict.

anomalib's own torch modules are driven by a plain loop instead of its Engine, so its model code,
its fit and its scoring are what is timed, without the trainer around them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Each method imports what it needs where it needs it, so that one does not pay for another.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIZE = 256
BATCH = 8
CORESET_RATIO = 0.01
SETTINGS: dict[str, dict[str, Any]] = {
    "padim": {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"], "n_features": 100},
    "patchcore": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "num_neighbors": 9},
    "npad": {"backbone": "resnet18", "layers": (2, 3)},
}


class Clock:
    """Wall seconds and CPU seconds (all threads, and children waited for) of named phases."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        yield
        self.phases[name] = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": sum(os.times()[:4]) - cpu,
        }


def anomalib_batches(paths: list[Path], batch: int = BATCH) -> Iterator[Tensor]:
    """(B, 3, SIZE, SIZE) float32 as anomalib's own pre-processor makes them, without a crop."""
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((SIZE, SIZE), antialias=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    for i in range(0, len(paths), batch):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[i : i + batch]]
        yield torch.stack(images).as_subclass(torch.Tensor)


class Anomalib:
    """One of anomalib's torch models in a plain loop, its backbone filled with our weights."""

    def __init__(self, method: str, weights: Path, seed: int, raw: Path) -> None:
        try:
            from anomalib.models.image.padim.torch_model import PadimModel
            from anomalib.models.image.patchcore import torch_model as patchcore
        except ImportError as error:
            sys.exit(f"bench_peers: {method} needs anomalib ({error}): pip install 'npad[bench]'")
        import numpy as np
        import torch
        from safetensors.torch import load_file

        torch.manual_seed(seed)  # PaDiM's channels, PatchCore's first centre
        # scikit-learn's global generator chooses the columns of PatchCore's random projection.
        np.random.seed(seed)  # noqa: NPY002
        self.settings = dict(SETTINGS[method])
        self.model: Any
        if method == "padim":
            self.model = PadimModel(pre_trained=False, **self.settings)
        else:
            setattr(patchcore, "KCenterGreedy", recording_sampler(raw))  # noqa: B010
            self.model = patchcore.PatchcoreModel(pre_trained=False, **self.settings)
            self.settings["coreset_sampling_ratio"] = CORESET_RATIO
        backbone = self.model.feature_extractor.feature_extractor
        backbone.load_state_dict(load_file(weights), strict=True)

    def fit(self, paths: list[Path], clock: Clock) -> None:
        self.model.train()
        with clock.phase("features"):
            for images in anomalib_batches(paths):
                self.model(images)
        if "coreset_sampling_ratio" in self.settings:
            with clock.phase("coreset"):
                self.model.subsample_embedding(CORESET_RATIO)
        else:
            with clock.phase("statistics"):
                self.model.fit()

    def save(self, path: Path) -> None:
        import torch

        torch.save(self.model.state_dict(), path)

    def load(self, path: Path) -> None:
        import torch

        self.model.load_state_dict(torch.load(path, weights_only=True))
        self.model.eval()

    def predict(self, paths: list[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Scores (N,) and maps, each (SIZE, SIZE)."""
        import torch

        scores, maps = [], []
        with torch.inference_mode():
            for images in anomalib_batches(paths):
                result = self.model(images)
                scores.append(result.pred_score.reshape(-1))
                maps.extend(result.anomaly_map[:, 0].numpy())
        return torch.cat(scores).numpy(), maps


def recording_sampler(raw: Path) -> type:
    """Make anomalib's coreset sampler, unchanged but for the selected indices left in a file."""
    import numpy as np
    from anomalib.models.components.sampling import KCenterGreedy

    class RecordingSampler(KCenterGreedy):
        def select_coreset_idxs(self) -> list[int]:
            indices = super().select_coreset_idxs()
            np.save(raw / "patchcore_coreset.npy", np.asarray(indices))
            return indices

    return RecordingSampler


class Npad:
    """npad itself; its fit is one phase, because backbone and statistics run as one stream."""

    def __init__(self, weights: Path, seed: int) -> None:
        from npad import NPad

        self.weights = weights
        self.model = NPad(
            **SETTINGS["npad"], weights=weights, image_size=SIZE, seed=seed, batch_size=BATCH
        )

    @property
    def settings(self) -> dict[str, Any]:
        return self.model.settings() | {"weights": self.weights.name}

    def fit(self, paths: list[Path], clock: Clock) -> None:
        with clock.phase("fit"):
            self.model.fit(paths)

    def save(self, path: Path) -> None:
        self.model.save(path)

    def load(self, path: Path) -> None:
        from npad import NPad

        self.model = NPad.load(path, weights=self.weights)

    def predict(self, paths: list[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Scores (N,) and maps, each (SIZE, SIZE), as the peers make them."""
        prediction = self.model.predict(paths, map_size="model")
        return prediction.scores, prediction.maps
