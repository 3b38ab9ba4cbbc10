"""Other ways to score with what a fit leaves, beside the default: what was tried and is not in npad.

    python bench/study_ideas.py DIR framed:DIR synthetic --backbone resnet18 --weights FILE

Every idea changes one thing. Prints image AUROC, pixel AUROC and AUPRO of each on each data set, with
the difference to the default and its 95 % interval (see `bootstrap`) in thousandths.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bootstrap
import torch
import torch.nn.functional as F  # noqa: N812
from embedded import METRICS, EmbeddedCategory, Rows
from study_defaults import Figures, Study, category_of, fit, measured, title_of
from torch import Tensor

from npad import ops
from npad.evaluation.datasets import find_categories
from npad.features.backbone import Backbone
from npad.members import Member
from npad.scoring.fusion import EUCLIDEAN, MAHALANOBIS, fusion_arguments
from npad.settings import Settings, sigma_by_size
from npad.statistics.nominal_set import NominalSet

Idea = tuple[Tensor, Tensor]  # scores and maps

DEGREES = 5  # of freedom, of heavy tails


class Ideas:
    """The distances of the default model on a data set, and other things to do with them."""

    def __init__(self, study: Study, settings: Settings) -> None:
        self.study, self.settings = study, settings
        self.network = study.networks[0]
        self.grid = self.network.grid(settings.size)
        self.of_layer = {
            level: self._on_grid(study.part(settings, Member(0, (level,), True, True, False)).test)
            for level in self.network.map_layers
        }
        self.whole = Member(0, self.network.layers, gaussian=False)
        self.euclidean = study.part(settings, self.whole).test[EUCLIDEAN]

    def _on_grid(self, found: dict[str, Tensor]) -> Tensor:
        x = found[MAHALANOBIS][:, None]
        return F.interpolate(x, size=self.grid, mode="bilinear", align_corners=False)[:, 0]

    def fused(self, join: Callable[[Sequence[Tensor]], Tensor], euclidean: Tensor) -> Idea:
        """With the layers joined in a way."""
        score, shown = (
            self._fused(join([self.of_layer[i] for i in layers]), euclidean, weight)
            for layers, weight in (
                (self.network.layers, self.settings.fusion_weight),
                (self.network.map_layers, self.settings.map_weight),
            )
        )
        return score[1], shown[0]

    def _fused(
        self, mahalanobis: Tensor, euclidean: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        size = self.settings.size
        terms = fusion_arguments(mahalanobis, euclidean, "product", weight)
        return ops.anomaly_map(*terms, size, sigma_by_size(size))

    def all(self) -> Iterator[tuple[str, Idea]]:
        """The default, then every idea."""
        scores, maps = self.fused(geometric_mean, self.euclidean)
        yield "default", (scores, maps)
        score_map = self._fused(
            geometric_mean([self.of_layer[i] for i in self.network.layers]),
            self.euclidean,
            self.settings.fusion_weight,
        )[0]
        cells = F.adaptive_avg_pool2d(score_map[:, None], self.grid).flatten(1)
        for k in (5, 20, 50):
            yield f"score: mean of the {k} highest cells", (cells.topk(k, 1)[0].mean(1), maps)
        yield "layers as if independent", self.fused(independent, self.euclidean)
        channels = [self.network.level_channels[i] for i in self.network.map_layers]
        of = {
            id(self.of_layer[i]): n for i, n in zip(self.network.map_layers, channels, strict=True)
        }

        def largest(found: Sequence[Tensor]) -> Tensor:
            return torch.stack([x / of[id(x)] ** 0.5 for x in found]).amax(0)

        yield "largest of the layers", self.fused(largest, self.euclidean)

        def heavy(found: Sequence[Tensor]) -> Tensor:
            return geometric_mean([student_t(x, of[id(x)]) for x in found])

        yield f"Student's t, {DEGREES} degrees of freedom", self.fused(heavy, self.euclidean)
        yield "a second patch size", self._with_larger_patches()
        for strength in (1, 3):
            found = self.fused(geometric_mean, self._with_position(strength))
            yield f"E with the position, strength {strength}", found
        yield "E over the radius of the centroid", self.fused(geometric_mean, self._over_radius())

    def _with_larger_patches(self) -> Idea:
        """Gaussians and nominal set once more, of means over 3 x 3 embeddings."""
        both = {
            level: geometric_mean([x, self._on_grid(self._smooth((level,), nominal_set=False))])
            for level, x in self.of_layer.items()
        }
        smooth = self._smooth(self.whole.levels, nominal_set=True)[EUCLIDEAN]
        small = self.of_layer
        self.of_layer = both
        found = self.fused(geometric_mean, geometric_mean([self.euclidean, smooth]))
        self.of_layer = small
        return found

    def _smooth(self, levels: tuple[int, ...], nominal_set: bool) -> dict[str, Tensor]:
        member = Member(0, levels, not nominal_set, not nominal_set, nominal_set)
        embedded = self.study.embedded
        learned, _ = fit(self.settings, member, Smooth(embedded.train(member).parts))
        return measured(learned, self.settings, Smooth(embedded.test(member).parts))

    def _with_position(self, strength: float) -> Tensor:
        """Embeddings with their place behind them: an image is so many nominal distances wide."""
        train, test = (
            rows(self.whole) for rows in (self.study.embedded.train, self.study.embedded.test)
        )
        rest = train[list(range(0, len(train), 10))].flatten(0, 2)[::7]
        bank = train[list(range(5, len(train), 10))].flatten(0, 2)[::7]
        unit = strength * float(
            ops.nearest_centroid(rest.contiguous(), bank.contiguous())[0].median()
        )
        axes = [torch.linspace(0, unit, side) for side in self.grid]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

        def placed(x: Tensor) -> Tensor:
            return torch.cat([x, place.expand(len(x), *place.shape)], -1)

        nominal = NominalSet()
        for x in train.split(32):
            nominal.update(placed(x))
        nominal.finalize()
        return torch.cat([nominal.distance(placed(x)) for x in test.split(32)])

    def _over_radius(self) -> Tensor:
        """Divided by the mean distance of the nominal embeddings nearest to the centroid."""
        centroids = self.study.part(self.settings, self.whole).learned.centroids
        assert centroids is not None
        total, count = torch.zeros(len(centroids)), torch.zeros(len(centroids))
        for x in self.study.embedded.train(self.whole).split(32):
            distance, nearest = ops.nearest_centroid(x.flatten(0, 2), centroids)
            total.index_add_(0, nearest, distance)
            count.index_add_(0, nearest, torch.ones(len(nearest)))
        usual = total.sum() / count.sum()
        radius = (total + 5 * usual) / (count + 5)
        found = []
        for x in self.study.embedded.test(self.whole).split(32):
            distance, nearest = ops.nearest_centroid(x.flatten(0, 2), centroids)
            found.append((distance / radius[nearest]).view(x.shape[:3]))
        return torch.cat(found)


class Smooth(Rows):
    """Embeddings that are means over 3 x 3 of others."""

    def __getitem__(self, which: slice | list[int]) -> Tensor:
        x = super().__getitem__(which).permute(0, 3, 1, 2)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False).permute(0, 2, 3, 1)


def student_t(x: Tensor, channels: int) -> Tensor:
    """The root of -2 log(density / density at the mean) of Student's t of this scatter."""
    return ((DEGREES + channels) * (x.square() / DEGREES).log1p()).sqrt()


def geometric_mean(found: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.log() for x in found]).mean(0).exp()


def independent(found: Sequence[Tensor]) -> Tensor:
    """The Mahalanobis distance of all layers, were they not correlated."""
    return torch.stack([x.square() for x in found]).sum(0).sqrt()


def cell(name: str, figures: Figures, base: Figures) -> str:
    low, high = (1e3 * end for end in bootstrap.interval(figures[name] - base[name]))
    change = 1e3 * (figures[name][0] - base[name][0])
    return f"{figures[name][0]:.3f} {change:+.0f} ({low:+.0f}, {high:+.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="MVTec AD categories, framed:DIR, or 'synthetic'")
    parser.add_argument("--backbone", default="filterbank")
    parser.add_argument("--weights")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    common: dict[str, Any] = {
        "backbone": args.backbone,
        "weights": args.weights,
        "image_size": args.image_size,
        "progress": False,
    }
    settings = Settings(**common)
    network = Backbone(args.backbone, weights=args.weights, map_layers=None)
    for data in args.data:
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
            (category,) = find_categories(category_of(data, Path(scratch)))
            embedded = EmbeddedCategory(category, [network], settings.size, Path(scratch))
            study = Study(embedded, [network], bootstrap.draws(embedded.labels))
            base: Figures = {}
            for name, found in Ideas(study, settings).all():
                figures = study.figures(*found)
                base = base or figures
                cells = [cell(metric, figures, base) for metric in METRICS if metric in figures]
                print(f"| {title_of(data)} | {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
