"""A small deterministic detector, so that the evaluation and the report need no real one."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from npad.nominal_scores import NominalScores
from npad.scoring.decisions import Decider
from npad.scoring.fusion import resized
from npad.scoring.prediction import Prediction
from npad.settings import Settings

BACKGROUND = 100
SIZE = (24, 32)


class FakeModel:
    """Scores by the distance of a pixel's brightness from the mean of the training images."""

    def __init__(self, image_size=SIZE, batch_size=3):
        self.image_size = image_size
        self.batch_size = batch_size
        self.skipped_ = []
        self.fits = 0

    def settings(self):
        return {"image_size": list(self.image_size), "backbone": "<fake>", "eps": "auto"}

    def input_size(self, source=None, *, skip_bad=False):
        return self.image_size

    def fit(self, source, *, skip_bad=False, statistics=True):
        assert not statistics, "nobody goes on from a model that is measured"
        self.fits += 1
        self.skipped_ = [(str(p), "cut short") for p in source if skip_bad and "bad" in p.name]
        good = [p for p in source if "bad" not in p.name]
        self.mean_ = float(np.mean([np.asarray(Image.open(p), dtype=float).mean() for p in good]))
        return self

    def predict_batches(self, source, *, skip_bad=False, map_size="image"):
        for start in range(0, len(source), self.batch_size):
            scores, batch = [], Prediction(np.empty(0), [], [])
            for path in source[start : start + self.batch_size]:
                if skip_bad and "bad" in path.name:
                    batch.skipped.append((str(path), "cut short"))
                    continue
                pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float32)
                difference = np.abs(pixels - np.float32(self.mean_))
                sizes = {"image": difference.shape, "model": self.image_size}
                (map_,) = resized(
                    torch.from_numpy(difference)[None], [sizes.get(map_size, map_size)]
                )
                scores.append(float(difference.max()))
                batch.maps.append(map_)
                batch.paths.append(str(path))
                batch.sizes.append(difference.shape)
            batch.scores = np.array(scores)
            yield batch


class CalibratedModel(FakeModel):
    """A `FakeModel` that was calibrated with these scores, and half of them as maxima of maps.

    Parameters
    ----------
    nominal : scores of nominal images
    groups : their groups; images are in the group that their name ends in
    """

    def __init__(self, nominal, groups=None, **asked):
        super().__init__()
        self.asked = Settings(**asked)
        scores = np.array(nominal, float)
        groups = None if groups is None else tuple(groups)
        self.calibration_ = NominalScores(scores, scores / 2, groups, self.asked.scoring)

    def settings(self):
        asked = self.asked.false_alarm_rate, self.asked.confidence
        return super().settings() | dict(
            zip(("false_alarm_rate", "confidence"), asked, strict=True)
        )

    def predict_batches(self, source, **options):
        decider = Decider(self.calibration_, self.asked)
        for batch in super().predict_batches(source, **options):
            groups = [path.removesuffix(".png")[-1] for path in batch.paths]
            grouped = self.calibration_.groups is not None
            batch.decisions = decider.decide(batch.scores, groups if grouped else None)
            batch.map_maxima = batch.scores * 0.75
            yield batch


def write_category(root, tests, *, n_train=4, size=SIZE, grain=3, seed=0):
    """Write a category of grey images. `tests`: (type, name, brightness of the defect, scale)."""
    rng = np.random.default_rng(seed)
    for i in range(n_train):
        save(rng.normal(BACKGROUND, grain, size), root / f"train/good/{i:03}.png")
    for kind, name, brightness, scale in tests:
        height, width = size[0] * scale, size[1] * scale
        pixels = rng.normal(BACKGROUND, grain, (height, width))
        mask = np.zeros((height, width), dtype=bool)
        if kind != "good":
            mask[height // 3 : height // 2, width // 4 : width // 2] = True
            pixels[mask] += brightness
            save(mask * 255, root / f"ground_truth/{kind}/{name}_mask.png")
        save(pixels, root / f"test/{kind}/{name}.png")
    return root


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
