"""Cross-conformal calibration: each nominal image is scored by a model of the others."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from npad import progress
from npad.atomic_file import naming
from npad.checkpoint import Checkpoint
from npad.features.backbone import Backbone
from npad.fitting import Fit
from npad.images.source import ImageSource
from npad.learned import Learned
from npad.nominal_scores import NominalScores
from npad.scoring.nominal import check_number
from npad.scoring.scorer import Scorer
from npad.settings import Settings

__all__ = ["CrossCalibration", "check_folds"]

_CALL = "NPad.fit"
_BATCH = 8  # images scored together


class CrossCalibration:
    """Scores the images of a fit, each by a model that was fitted on the other folds.

    Each image belongs to one of ``calibration_folds`` folds, drawn so that folds differ by at most one
    image. The statistics of a fold are gathered once; those of all others are merged for the model that
    scores it, which has axes and a nominal set of its own; window, eps and the number of axes, on which
    the unit of a score depends, are those of the model of all. Embeddings wait in temporary files, so
    that no image goes through the backbone twice.

    Parameters
    ----------
    whole : the fit of all images, before it sees any; its principal axes, where it has a number of
        ``n_features``, are used by all, and so is what it fills outside of its region
    networks : the backbones

    Notes
    -----
    A new image is judged by the model of all images, which has seen a fold more than those that scored
    the others. So no theorem states the rate exactly, as one does for images that were set aside;
    docs/thresholds.md has what was measured. Sources: Vovk, *Cross-conformal predictors*, Annals of
    Mathematics and Artificial Intelligence 74 (2015); Barber, Candès, Ramdas, Tibshirani, *Predictive
    inference with the jackknife+*, Annals of Statistics 49 (2021).
    """

    def __init__(self, whole: Fit, networks: Sequence[Backbone]) -> None:
        settings = whole.settings
        assert settings.calibration_folds is not None
        self._whole = whole
        self._networks = networks
        self._settings = settings
        members = [fit.member for fit in whole.members]
        n = settings.calibration_folds
        self._n_members = len(members)
        self._fits = [Fit(settings, members, whole.roi, whole.extent) for _ in range(n)]
        self._positions: list[list[int]] = [[] for _ in range(n)]  # of the images of each fold
        self._random = random.Random(settings.seed)
        self._drawn: list[int] = []  # folds of the images to come
        self._n_images = 0

    def __enter__(self) -> CrossCalibration:
        with ExitStack() as stack:
            self._spools = [stack.enter_context(_Spool()) for _ in self._fits]
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def update(self, embeddings: Sequence[Tensor], images: Tensor | None = None) -> None:
        """Add a batch that the whole fit has just seen.

        Parameters
        ----------
        embeddings : for each member, (B, h, w, D), as `Fit.embed` gives them
        images : (B, 3, H, W), from which they are, if these are known; of (B, 4, H, W) the fourth
            channel is 1 inside the image's own region
        """
        own = [] if images is None or images.shape[1] == 3 else [images[:, 3]]
        rows: dict[int, list[int]] = {}
        for i in range(len(embeddings[0])):
            fold = self._draw()
            rows.setdefault(fold, []).append(i)
            self._positions[fold].append(self._n_images + i)
        self._n_images += len(embeddings[0])
        for fold, places in rows.items():
            fit = self._fits[fold]
            if not fit.n_images:
                fit.fill = self._whole.fill
                for member, whole in zip(fit.members, self._whole.members, strict=True):
                    member.projection = whole.projection
            parts = [x[places] for x in embeddings]
            fit.update(parts)
            self._spools[fold].put([*parts, *(x[places] for x in own)])

    def _draw(self) -> int:
        if not self._drawn:
            self._drawn = self._random.sample(range(len(self._fits)), len(self._fits))
        return self._drawn.pop()

    def finish(self, whole: Learned) -> NominalScores:
        """Score all images.

        Parameters
        ----------
        whole : what the fit of all images has left

        Raises
        ------
        ValueError
            Too few images in the folds to fit a model without one of them; as `Fit.finalize`.
        MemoryError
            As `Fit.finalize`.
        """
        check_number(_CALL, self._settings, self._n_images)
        for fit in self._fits:
            fit.compose()  # once, and not in every copy
        scores, maxima = np.empty(self._n_images), np.empty(self._n_images)
        with progress.task(
            "fit: calibration", self._n_images, self._settings.progress, "images"
        ) as advance:
            for fold, (positions, spool) in enumerate(
                zip(self._positions, self._spools, strict=True)
            ):
                if not positions:
                    continue
                scorer = self._without(fold, whole, spool.device)
                done = 0
                for parts in spool:
                    found, maps = self._scored(parts, scorer)
                    at = positions[done : done + len(found)]
                    scores[at] = found.double().cpu().numpy()
                    maxima[at] = maps.amax((1, 2)).double().cpu().numpy()
                    done += len(at)
                    advance(len(at))
        return NominalScores(scores, maxima, None, self._settings.scoring)

    def _scored(self, parts: Sequence[Tensor], scorer: Scorer) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, H, W), minus infinity outside, of what a spool gives."""
        roi, n_members = self._whole.roi, self._n_members
        if roi is None:
            return scorer.score(parts)
        of_images = parts[n_members:]
        own = (of_images[0] != 0) & (roi != 0).to(of_images[0].device) if of_images else None
        found, maps = scorer.score([x.nan_to_num(0.0) for x in parts[:n_members]], own)
        return found, maps.masked_fill(maps.isnan(), -torch.inf)

    def _without(self, fold: int, whole: Learned, device: torch.device) -> Scorer:
        """What scores images as a model of all other folds."""
        first, *rest = (fit for i, fit in enumerate(self._fits) if i != fold and fit.n_images)
        others = first.copied(device, progress=False)
        for fit in rest:
            others.merge(fit)
        for member, learned in zip(others.members, whole.members, strict=True):
            member.follow(learned)
        found = others.finalize(last=True).to(device)  # its region, too
        return Scorer(self._networks, found, self._settings)


def check_folds(settings: Settings, images: ImageSource, checkpoint: Checkpoint | None) -> None:
    """Refuse what cannot be, before the work.

    Raises
    ------
    ValueError
        Fewer images than folds, or than ``false_alarm_rate`` needs; a checkpoint; principal axes of a
        stream, which would be others in each fold.
    """
    n = settings.calibration_folds
    if checkpoint is not None:
        raise ValueError(
            f"{_CALL}: checkpoint and calibration_folds={n} exclude each other: leave out one; "
            "calibrate afterwards with images that were not fitted"
        )
    if settings.chooses_axes and not images.random_access:
        raise ValueError(
            f"{_CALL}: calibration_folds={n} with n_features={settings.n_features} needs images that "
            "can be read twice, to choose axes for all folds; give a folder, a list or an array, or "
            "use n_features='auto'"
        )
    if images.n_images is not None:
        if n is not None and images.n_images < n:
            raise ValueError(
                f"{_CALL}: calibration_folds={n} is more than {images.n_images} images"
            )
        check_number(_CALL, settings, images.n_images)


class _Spool:
    """Embeddings on the disk, in a file without a name; iterating gives them back some at a time."""

    def __init__(self) -> None:
        self._n_images = 0
        self.device = torch.device("cpu")

    def __enter__(self) -> _Spool:
        with naming(tempfile.gettempdir()):
            self._file: IO[bytes] = tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, parts: Sequence[Tensor]) -> None:
        """Keep a batch: float32 tensors (B, ...), the first of them on the device of all."""
        self._shapes = [x.shape[1:] for x in parts]
        self.device = parts[0].device
        with naming(tempfile.gettempdir()):
            for image in zip(*parts, strict=True):
                for x in image:
                    self._file.write(x.contiguous().cpu().numpy().data)
        self._n_images += len(parts[0])

    def __iter__(self) -> Iterator[list[Tensor]]:
        with naming(tempfile.gettempdir()):
            self._file.seek(0)
        for start in range(0, self._n_images, _BATCH):
            images = [self._take() for _ in range(min(_BATCH, self._n_images - start))]
            yield [
                torch.stack(of_member).to(self.device) for of_member in zip(*images, strict=True)
            ]

    def _take(self) -> list[Tensor]:
        found = []
        for shape in self._shapes:
            x = torch.empty(shape)
            buffer: Any = x.numpy()
            self._file.readinto(buffer)  # type: ignore[attr-defined]
            found.append(x)
        return found
