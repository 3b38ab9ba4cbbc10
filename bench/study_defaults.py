"""The study behind NPad's defaults: one factor at a time around them, on every data set and network.

    python bench/study_defaults.py DIR framed:DIR synthetic --networks resnet18=FILE \
        tf_efficientnet_lite0 --together resnet18,tf_efficientnet_lite0 --out bench/results

DIR is an MVTec AD category, with masks or without; "framed:DIR" has its images at 0.6 of their size on
a white ground that never changes; "planted:DIR" knows its good images alone, and scores some of them
with and without a defect that was planted; "synthetic" is aligned woven texture. The backbones run once
per image, and what two configurations share is fitted once: embeddings wait in files below TMPDIR (2 MB
an image with ResNet-18). Prints a table for each network, and for all of them together; those of
docs/method.md. All figures are kept: each metric with its 95 % interval over the test images (see
`bootstrap`), its difference to the defaults on the same draws, megabytes, and milliseconds for one
image, from its pixels to its map. Joint Gaussians beyond MOST_BYTES are left out. Each network has a
file of its own, study_defaults_<network>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bootstrap
import numpy as np
import torch
from embedded import METRICS, EmbeddedCategory, Rows
from framed import framed
from markdown_table import markdown_table
from numpy.typing import NDArray
from planted import planted
from provenance import provenance
from torch import Tensor

from npad import ops
from npad.evaluation.datasets import find_categories
from npad.evaluation.synthetic import make_dataset
from npad.features.backbone import Backbone
from npad.fitting import axes_sample
from npad.learned import Learned, LearnedMember, Standardization
from npad.member_fit import MemberFit
from npad.members import Member, members_of
from npad.scoring.fusion import joined, scores_and_maps
from npad.scoring.scorer import MemberScorer, Scorer
from npad.settings import Settings

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "joint": {"gaussians": "joint"},
    "joint, map of layers": {"gaussians": "joint", "map_layers": ()},
    "as in 0.1": {"gaussians": "joint", "map_layers": (), "map_weight": 0.4},
    "joint, 384 features": {"gaussians": "joint", "n_features": 384},
    "map of layers": {"map_layers": ()},
    "window 1": {"window": 1},
    "window 3": {"window": 3},
    "window 5": {"window": 5},
    "evaluation window 3": {"score_window": 3},
    "eps 0.0001": {"eps": 1e-4},
    "eps 0.001": {"eps": 1e-3},
    "eps 0.01": {"eps": 1e-2},
    "score 0.2": {"fusion_weight": 0.2},
    "score 0.3": {"fusion_weight": 0.3},
    "score 0.5": {"fusion_weight": 0.5},
    "score 0.6": {"fusion_weight": 0.6},
    "map 0.1": {"map_weight": 0.1},
    "map 0.2": {"map_weight": 0.2},
    "map 0.4": {"map_weight": 0.4},
    "map 0.5": {"map_weight": 0.5},
    "sum": {"fusion": "sum"},
    "Mahalanobis alone": {"nominal_set": None},
    "Euclidean alone": {"fusion": "euclidean"},
    "2048 centroids": {"n_centroids": 2048},
    "4096 centroids": {"n_centroids": 4096},
    "16384 centroids": {"n_centroids": 16384},
    "1024 k-means centroids": {"nominal_set": "kmeans", "n_centroids": 1024},
    "factors in float32": {"factor_dtype": "float32"},
    "factors in float16": {"factor_dtype": "float16"},
    "all features": {"n_features": None},
    "64 features": {"n_features": 64},
    "128 features": {"n_features": 128},
}
MADE_FROM: dict[str, Callable[[Path, Path], Path]] = {"framed": framed, "planted": planted}
MOST_BYTES = 4 << 30  # of statistics
RUNS = 15  # of which the median is told

Figures = dict[str, NDArray[np.float64]]  # of each metric, the value and that of every draw


@dataclass(frozen=True)
class Part:
    """A member that is fitted, and its distances."""

    learned: LearnedMember
    held_out: dict[str, Tensor] | None  # for the fusion "sum"
    test: dict[str, Tensor]


@dataclass
class Study:
    """Configurations of one list of networks on one data set; what they share is fitted once."""

    embedded: EmbeddedCategory
    networks: Sequence[Backbone]
    counts: NDArray[np.float64]  # of the draws
    found: dict[Any, Part] = field(default_factory=dict)

    def run(self, settings: Settings) -> tuple[Learned, Tensor, Tensor]:
        """What a fit leaves, and scores and maps of the test images."""
        parts = []
        for member in members_of(settings, [levels_of(n, settings) for n in self.networks]):
            for part in self._apart(member):
                parts.append((part, self.part(settings, part)))
        held_out = [(member, part.held_out) for member, part in parts if part.held_out is not None]
        learned = Learned(
            n_images=0,
            members=tuple(replace(part.learned, member=member) for member, part in parts),
            standardization={k: Standardization.of(x) for k, x in joined(held_out).items()} or None,
        )
        found = [(member, part.test) for member, part in parts]
        return learned, *scores_and_maps(found, settings, learned.standardization)

    def _apart(self, member: Member) -> Iterator[Member]:
        """Its Gaussians and its nominal set, which knows no channels of the map alone."""
        if member.gaussian:
            yield replace(member, nominal_set=False)
        if member.nominal_set:
            layers = self.networks[member.network].layers
            yield replace(member, gaussian=False, levels=layers, prefix=None)

    def part(self, settings: Settings, member: Member) -> Part:
        """A member, fitted when it is first asked for."""
        names = ["n_features", "reduction", "holdout", "seed"]
        names += ["window", "score_window", "eps", "factor_dtype"] if member.gaussian else []
        names += ["nominal_set", "n_centroids"] if member.nominal_set else []
        what = replace(member, in_score=True, in_map=True)
        key = what, settings.fusion == "sum", *(getattr(settings, name) for name in names)
        if key not in self.found:
            learned, held_out = fit(settings, what, self.embedded.train(what))
            test = measured(learned, settings, self.embedded.test(what))
            self.found[key] = Part(learned, held_out, test)
        return self.found[key]

    def figures(self, scores: Tensor, maps: Tensor) -> Figures:
        """Every metric that the truth allows, for the test images and for every draw of them."""
        found = {
            "auroc": bootstrap.auroc(self.embedded.labels, scores.double().numpy(), self.counts)
        }
        if self.embedded.masks:
            found |= bootstrap.pixel_metrics(self.embedded.masks, maps.numpy(), self.counts)
        for name, exact in self.embedded.measure(scores, maps).items():
            found[name][0] = exact
        return found


@dataclass(frozen=True)
class Wanted:
    """Levels of a network that has more; see `npad.members.Levels`."""

    layers: tuple[int, ...]
    map_layers: tuple[int, ...]
    level_channels: Mapping[int, int]


def levels_of(network: Backbone, settings: Settings) -> Wanted:
    """What the settings want of a network that was made with ``map_layers=None``."""
    wanted = settings.levels_of_maps
    of_map = network.map_layers if wanted is None else wanted or network.layers
    return Wanted(network.layers, of_map, network.level_channels)


def fit(
    settings: Settings, member: Member, train: Rows
) -> tuple[LearnedMember, dict[str, Tensor] | None]:
    """As `NPad.fit` does from the images of these embeddings; and the distances of those held out."""
    run = MemberFit(settings, member)
    if settings.chooses_axes:
        sample = train[axes_sample(len(train), settings.seed)]
        for x in sample.split(settings.batch_size):
            run.look(x)
        run.end_look()
    for x in train.split(settings.batch_size):
        run.update(x)
    return run.end(last=True)


def measured(learned: LearnedMember, settings: Settings, test: Rows) -> dict[str, Tensor]:
    """The distances of all test images."""
    scorer = MemberScorer(learned, settings.score_window)
    batches = [scorer(x) for x in test.split(settings.batch_size)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def milliseconds(networks: Sequence[Backbone], learned: Learned, settings: Settings) -> float:
    """Median time from the pixels of one image to its map."""
    scorer = Scorer(networks, learned, settings)
    images, times = torch.rand(1, 3, *settings.size), []
    for _ in range(RUNS + 3):
        start = time.perf_counter()
        scorer(images)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def too_large(settings: Settings, networks: Sequence[Backbone]) -> bool:
    """Whether its statistics are beyond what is tried here; or there are no features to leave out."""
    wanted = levels_of(networks[0], settings)
    channels = sum(wanted.level_channels[level] for level in wanted.map_layers)
    if settings.fixed_features is not None:
        return settings.fixed_features >= networks[0].channels
    if settings.gaussians != "joint":
        return False
    height, width = networks[0].grid(settings.size)
    return height * width * ops.packed_size(channels) * 6 > MOST_BYTES


def study(
    data: str, names: Sequence[str], files: Sequence[str | None], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Every configuration of some networks on one data set."""
    common: dict[str, Any] = {
        "backbone": list(names),
        "weights": list(files),
        "image_size": args.image_size,
        "seed": args.seed,
        "progress": False,
    }
    size = Settings(**common).size
    networks = [
        Backbone(name, weights=file, map_layers=None)
        for name, file in zip(names, files, strict=True)
    ]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        (category,) = find_categories(category_of(data, Path(scratch)))
        embedded = EmbeddedCategory(category, networks, size, Path(scratch))
        run = Study(embedded, networks, bootstrap.draws(embedded.labels))
        base: Figures = {}
        chosen = args.only.split(";") if args.only else VARIANTS
        for variant in chosen if len(names) == 1 else chosen[:1]:
            settings = Settings(**common, **VARIANTS[variant])
            if too_large(settings, networks):
                continue
            learned, scores, maps = run.run(settings)
            figures = run.figures(scores, maps)
            base = base or figures
            rows[variant] = {
                "draws": figures,
                "differences": {name: figures[name] - base[name] for name in figures},
                "eps": [m.eps for m in learned.members if m.eps is not None],
                "megabytes": learned.nbytes / 1e6,
                "milliseconds": milliseconds(networks, learned, settings),
            }
            value = "/".join(f"{figures[name][0]:.4f}" for name in figures)
            print(f"{title_of(data)}, {'+'.join(names)}, {variant}: {value}", flush=True)
    return rows


def category_of(data: str, scratch: Path) -> Path:
    """The folder of a data set that is named on the command line."""
    kind, _, rest = data.partition(":")
    if kind in MADE_FROM:
        return MADE_FROM[kind](category_of(rest, scratch), scratch / kind)
    return make_dataset(scratch / "woven", seed=0) if data == "synthetic" else Path(data)


def title_of(data: str) -> str:
    """Of the columns of a data set."""
    kind, _, rest = data.partition(":")
    return f"{kind} {title_of(rest)}" if kind in MADE_FROM else Path(data).name


@dataclass(frozen=True)
class Row:
    """A configuration on all data sets."""

    of: dict[str, dict[str, Any]]  # by data set

    def mean(self, kind: str, metric: str) -> NDArray[np.float64] | None:
        """Over the data sets that have the metric."""
        values = [row[kind][metric] for row in self.of.values() if metric in row[kind]]
        return np.mean(values, axis=0) if values else None

    def to_json(self) -> dict[str, Any]:
        """Values with their intervals."""
        report: dict[str, Any] = {}
        for data, row in self.of.items():
            report[data] = {key: row[key] for key in ("eps", "megabytes", "milliseconds")}
            for kind in ("draws", "differences"):
                name = "metrics" if kind == "draws" else kind
                report[data][name] = {k: bootstrap.with_interval(v) for k, v in row[kind].items()}
        means = {metric: self.mean("differences", metric) for metric in METRICS}
        report["mean_differences"] = {
            k: bootstrap.with_interval(v) for k, v in means.items() if v is not None
        }
        return report

    def cells(self) -> list[str]:
        """Of the table: each data set, the means, what they differ by, size and time."""
        each = [
            "/".join(f"{row['draws'][m][0]:.3f}"[1:] for m in METRICS if m in row["draws"])
            for row in self.of.values()
        ]
        means, changes = [], []
        for metric in METRICS:
            value, change = (self.mean(kind, metric) for kind in ("draws", "differences"))
            if value is None or change is None:
                continue
            low, high = bootstrap.interval(change)
            means.append(f"{value[0]:.3f}"[1:])
            changes.append(f"{1e3 * change[0]:+.0f} ({1e3 * low:+.0f}, {1e3 * high:+.0f})")
        first = next(iter(self.of.values()))
        size, time_ = f"{first['megabytes']:.0f}", f"{first['milliseconds']:.0f}"
        return [*each, "/".join(means), "; ".join(changes), size, time_]


def table(name: str, data: Sequence[str], rows: dict[str, Row]) -> str:
    """Of one network; differences to the first row in thousandths."""
    heads = [name, *data, "mean", "mean - base, 95 % interval, in thousandths", "MB", "ms"]
    return markdown_table(heads, ([variant, *row.cells()] for variant, row in rows.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="MVTec AD categories, KIND:DIR, or 'synthetic'")
    parser.add_argument("--networks", nargs="+", default=["filterbank"], metavar="NAME[=FILE]")
    parser.add_argument("--together", nargs="*", default=[], metavar="NAME,NAME")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of variants, separated by ;")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    given = (network.partition("=") for network in args.networks)
    files = {name: file or None for name, _, file in given}
    about: dict[str, Any] = {
        "provenance": provenance(),
        "settings": {"image_size": args.image_size, "seed": args.seed},
        "variants": VARIANTS,
    }
    tables = []
    for names in [[name] for name in files] + [text.split(",") for text in args.together]:
        found = {
            title_of(data): study(data, names, [files[name] for name in names], args)
            for data in args.data
        }
        variants = {variant for rows in found.values() for variant in rows}
        rows = {
            variant: Row({data: of[variant] for data, of in found.items() if variant in of})
            for variant in VARIANTS
            if variant in variants
        }
        title = " + ".join(names)
        report = about | {"rows": {variant: row.to_json() for variant, row in rows.items()}}
        file = args.out / f"study_defaults_{'_'.join(names)}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")
        tables.append(table(title, list(found), rows))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
