"""How many principal components a layer's Gaussians keep: a share of the variance, at most so many.

    python bench/study_features.py DIR framed:DIR synthetic --network resnet18=FILE --out bench/results

Data sets as for study_defaults.py. The embeddings and the nominal set are those of all configurations;
differences are to Gaussians of all channels, with 95 % intervals over the test images. The results lie
in study_features_<network>.json. Prints a table, differences in thousandths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bootstrap
import numpy as np
import torch
from embedded import EmbeddedCategory
from markdown_table import markdown_table
from provenance import provenance
from study_defaults import Study, category_of, milliseconds, title_of

from npad.evaluation.datasets import find_categories
from npad.features.backbone import Backbone
from npad.settings import Settings

ALL = "all"
CONFIGURATIONS = {ALL: (float("inf"), 1 << 30)}  # share and number
CONFIGURATIONS |= {f"{n}": (0.999, n) for n in (512, 384, 256, 192, 128, 96)}
CONFIGURATIONS |= {f"share {share}": (share, 1 << 30) for share in (0.99, 0.98, 0.95)}


def study(
    data: str, network: Backbone, settings: Settings, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Configurations on one data set; those that keep the same as another are left out."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        (category,) = find_categories(category_of(data, Path(scratch)))
        embedded = EmbeddedCategory(category, [network], settings.size, Path(scratch))
        run = Study(embedded, [network], bootstrap.draws(embedded.labels))
        whole: dict[str, Any] = {}
        for name in names:
            share, most = CONFIGURATIONS[name]
            run.found = {key: part for key, part in run.found.items() if not key[0].gaussian}
            with (
                patch("npad.member_fit.KEPT_VARIANCE", share),
                patch("npad.member_fit.MOST_FEATURES", most),
            ):
                learned, scores, maps = run.run(settings)
            kept = [m.n_features or m.channels for m in learned.members if m.member.gaussian]
            if any(row["features"] == kept for row in rows.values()):
                continue
            figures = run.figures(scores, maps)
            whole = whole or figures
            rows[name] = {
                "features": kept,
                "metrics": {m: bootstrap.with_interval(x) for m, x in figures.items()},
                "differences": {
                    m: bootstrap.with_interval(x - whole[m]) for m, x in figures.items()
                },
                "megabytes": learned.nbytes / 1e6,
                "milliseconds": milliseconds([network], learned, settings),
            }
            print(data, name, rows[name], flush=True)
    return rows


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each configuration, a column for each data set."""
    lines = []
    for name in CONFIGURATIONS:
        rows = [of.get(name) for of in found.values()]
        if not any(rows):
            continue
        cells = [
            "/".join(_thousandths(x) for x, *_ in row["differences"].values()) if row else ""
            for row in rows
        ]
        by_metric: dict[str, list[float]] = {}
        for row in filter(None, rows):
            for metric, values in row["differences"].items():
                by_metric.setdefault(metric, []).append(values[0])
        mean = "/".join(_thousandths(float(np.mean(x))) for x in by_metric.values())
        first = next(row for row in rows if row)
        size, time_ = f"{first['megabytes']:.0f}", f"{first['milliseconds']:.0f}"
        lines.append([name, *cells, mean, size, time_])
    return markdown_table(["most", *found, "mean", "MB", "ms"], lines)


def _thousandths(value: float) -> str:
    return f"{1e3 * value:+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="as for study_defaults.py")
    parser.add_argument("--network", required=True, metavar="NAME[=FILE]")
    parser.add_argument("--only", help="names of configurations behind 'all', separated by ;")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name, _, file = args.network.partition("=")
    network = Backbone(name, weights=file or None, map_layers=None)
    settings = Settings(backbone=name, weights=file or None, image_size=256, progress=False)
    names = [ALL, *args.only.split(";")] if args.only else list(CONFIGURATIONS)
    report: dict[str, Any] = {"provenance": provenance(), "rows": {}}
    for data in args.data:
        report["rows"][title_of(data)] = study(data, network, settings, names)
        path = args.out / f"study_features_{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
