"""What `npad evaluate` leaves in its folder and shows: results, report, table."""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from npad.atomic_file import replacing
from npad.evaluation.datasets import Category
from npad.evaluation.measure import Model, evaluate
from npad.evaluation.metrics import PIXEL_METRICS
from npad.evaluation.report import write_report
from npad.evaluation.results import CALIBRATED, NO_MASKS, CategoryResult, summarize, to_json
from npad.file_names import shown

__all__ = ["REPORT", "evaluate_all", "print_table"]

REPORT, RESULTS, PARTIAL = "report.html", "results.json", "results.partial.json"
COLUMNS = {
    "auroc": "image\nAUROC",
    "ap": "image\nAP",
    "f1_max": "image\nF1-max",
    "pixel_auroc": "pixel\nAUROC",
    "pixel_ap": "pixel\nAP",
    "pixel_f1_max": "pixel\nF1-max",
    "aupro": "AUPRO\n0.3",
    "calibrated_false_alarms": "false\nalarms",
    "calibrated_found": "\nfound",
    "fit_seconds": "fit\ns",
    "images_per_second": "images\n/s",
}
TIMES = ("fit_seconds", "images_per_second")

Row = dict[str, Any]


def evaluate_all(
    categories: Sequence[Category],
    makers: Sequence[Callable[[], Model]],
    folder: Path,
    *,
    skip_bad: bool = False,
    progress: bool | None = None,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Evaluate on each category with each model, one model in memory at a time.

    Writes results.json and report.html into ``folder``, each whole. Until then the categories that
    are finished stand in results.partial.json, which stays if the work ends early.

    Parameters
    ----------
    categories : from `npad.evaluation.datasets.find_categories`
    makers : of models that differ in their seed alone
    folder : made if it is not there
    skip_bad, progress : as for `npad.evaluation.measure.evaluate`

    Returns
    -------
    rows : for `print_table`: a category each, or the types of a single one, their mean, and the
        standard deviation over seeds
    skipped : (path, reason), each once
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: list[list[CategoryResult]] = [[] for _ in makers]  # of each seed
    for category in categories:
        for make, of_seed in zip(makers, results, strict=True):
            of_seed.append(evaluate(make(), category, skip_bad=skip_bad, progress=progress))
        _write_json(folder / PARTIAL, to_json(_named(results)))
    named = _named(results)
    means, deviations = _over_seeds([summarize(of_seed) for of_seed in results])
    over_seeds = {"mean": means, "standard_deviation": deviations} if deviations else {}
    write_report(named, folder / REPORT)
    _write_json(folder / RESULTS, to_json(named) | over_seeds)
    (folder / PARTIAL).unlink()
    skipped = dict.fromkeys(item for result in named for item in result.skipped)
    return _rows(means, deviations, results[0]), list(skipped)


def _named(results: Sequence[Sequence[CategoryResult]]) -> list[CategoryResult]:
    """All results, category by category, with the seed in their name where there are several."""
    return [
        replace(result, name=f"{result.name}, seed {result.settings['seed']}")
        if len(results) > 1
        else result
        for of_category in zip(*results, strict=True)
        for result in of_category
    ]


def _over_seeds(summaries: Sequence[Sequence[Row]]) -> tuple[list[Row], list[Row]]:
    """Mean and sample standard deviation over seeds of each row; one seed has no deviation."""
    means, deviations = [], []
    for of_seeds in zip(*summaries, strict=True):
        about = {key: of_seeds[0][key] for key in ("category", "has_masks")}
        values = {key: [row[key] for row in of_seeds] for key in of_seeds[0] if key not in about}
        means.append(about | {key: _defined(statistics.fmean, v) for key, v in values.items()})
        if len(of_seeds) > 1:
            deviation = {key: _defined(statistics.stdev, v) for key, v in values.items()}
            deviations.append(about | deviation)
    return means, deviations


def _defined(statistic: Callable[[list[float]], float], values: list[float]) -> float | None:
    return None if any(map(math.isnan, values)) else statistic(values)


def _rows(means: list[Row], deviations: list[Row], results: Sequence[CategoryResult]) -> list[Row]:
    if len(results) == 1:
        means = means[:1]  # their mean would say the same again
    if not deviations:
        return [*means, *(_of_types(results[0]) if len(results) == 1 else ())]
    rows = []
    for mean, deviation in zip(means, deviations, strict=False):
        rows += [mean, {**deviation, "category": "  ± over seeds"}]
    return rows


def _of_types(result: CategoryResult) -> list[Row]:
    missed = result.calibrated.missed_by_type if result.calibrated else {}
    return [
        {"category": f"  {name}", "has_masks": result.has_masks, **values}
        | ({"calibrated_found": 1 - missed[name].rate} if name in missed else {})
        for name, values in result.types.items()
    ]


def _write_json(path: Path, values: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(values, indent=1, allow_nan=False).encode())


def print_table(rows: Sequence[Row]) -> None:
    """Print a table on a terminal, else tab-separated columns under the names used in the JSON.

    Columns of what a calibrated model decided are left out where none is. A terminal has no room for
    these and the times.
    """
    decided = any(_is_known(row.get(key)) for row in rows for key in CALIBRATED)
    left_out = () if decided else CALIBRATED
    if decided and sys.stdout.isatty():
        left_out = TIMES
    columns = {key: heading for key, heading in COLUMNS.items() if key not in left_out}
    cells = [
        [shown(row["category"]), *(_cell(key, row) if key in row else "" for key in columns)]
        for row in rows
    ]
    if not sys.stdout.isatty():
        lines = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
        lines.writerows([["category", *columns], *cells])
        return
    from rich import box  # noqa: PLC0415  (of no use without a terminal)
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for key, heading in columns.items():  # in a narrow terminal, "no masks" takes two lines
        table.add_column(heading, justify="right", no_wrap=key not in PIXEL_METRICS)
    for name, *values in cells:
        table.add_row(Text(name), *values)  # a name is no markup
    Console().print(table)


def _cell(key: str, row: Row) -> str:
    value = row[key]
    if key in PIXEL_METRICS and not row["has_masks"]:
        return NO_MASKS
    if not _is_known(value):
        return "–"
    return f"{value:.1f}" if key in TIMES else f"{value:.3f}"


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
