"""One HTML file that shows how well a model does: figures, curves, and the images it gets wrong.

The page needs nothing but itself: pictures and plots are part of it, and there is no script. Its
size is bounded by thumbnails and by the number of images that `npad.evaluation.measure` picks.
"""

from __future__ import annotations

import base64
import io
import math
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from npad.atomic_file import replacing
from npad.evaluation.metrics import PIXEL_METRICS
from npad.evaluation.overlay import color_map, draw_overlay
from npad.evaluation.plots import draw_curve, draw_histogram, draw_p_values
from npad.evaluation.results import (
    CALIBRATED,
    METRICS,
    NO_MASKS,
    PRO_LIMIT,
    CategoryResult,
    Picture,
    summarize,
    versions,
)
from npad.file_names import shown
from npad.images.decoding import read_thumbnail
from npad.images.masks import resample_mask
from npad.images.samples import Reading

__all__ = ["write_report"]

_THUMBNAIL = 224  # pixels of the longer side
_LABELS = {
    "auroc": "Image AUROC",
    "ap": "Image AP",
    "f1_max": "Image F1‑max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1‑max",
    "aupro": f"AUPRO {PRO_LIMIT}",
    "calibrated_false_alarms": "False alarms",
    "calibrated_found": "Found",
}
_GROUPS = {
    "good": "Good images, highest score first",
    "defective": "Defective images, lowest score first",
    "typical": "A typical image of each type: the one with the median score",
}


def write_report(
    results: Sequence[CategoryResult],
    path: str | os.PathLike[str],
    *,
    title: str = "Anomaly detection report",
) -> None:
    """Write one self-contained HTML file.

    Parameters
    ----------
    results : of one category or of many; their image files are read again for the thumbnails
    path : of the file, which appears only once it is whole; missing folders are made
    title : heading of the page

    Raises
    ------
    ValueError
        There are no results.
    ImageError
        An image is not there any more.
    OSError
        The file cannot be written.
    """
    import jinja2  # noqa: PLC0415  (heavy, and only reports need it)

    if not results:
        raise ValueError("write_report: results is empty; evaluate at least one category")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: shown(value) if type(value) is str else value,  # not of Markup
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metric": _metric,
        "number": _number,
        "percent": _percent,
        "interval": _interval,
        "seconds": _seconds,
    }
    shared = _shared([_settings(result) for result in results])
    page = environment.get_template("report.html.j2").render(
        title=title,
        written=datetime.now(timezone.utc),
        versions=versions(),
        labels=_LABELS,
        metrics=METRICS,
        shares=CALIBRATED,
        limit=PRO_LIMIT,
        no_masks=NO_MASKS,
        any_calibrated=any(result.calibrated for result in results),
        with_masks=all(result.has_masks for result in results),
        rows=summarize(results),
        settings=shared,
        color_bar=_data_uri(color_map(np.linspace(0, 1, 256)[None]), "PNG"),
        categories=[_category(i, result, shared) for i, result in enumerate(results)],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())


def _category(number: int, result: CategoryResult, shared: dict[str, str]) -> dict[str, Any]:
    from markupsafe import Markup  # noqa: PLC0415

    n_good = sum(not image.is_anomalous for image in result.images)
    groups = []
    for group, heading in _GROUPS.items():
        pictures = [_row(picture, result) for picture in result.pictures if picture.group == group]
        of = {"good": n_good, "defective": len(result.images) - n_good, "typical": len(pictures)}
        if pictures:
            left_out = of[group] - len(pictures)
            masks = group != "good" and result.has_masks
            groups.append(
                {"heading": heading, "rows": pictures, "left_out": left_out, "masks": masks}
            )
    curves = {
        "roc": ("Image ROC", "false positive rate", "true positive rate", "auroc"),
        "pixel_roc": ("Pixel ROC", "false positive rate", "true positive rate", "pixel_auroc"),
        "pro": ("Per-region overlap", "false positive rate", "mean overlap", "aupro"),
    }
    if not result.has_masks:
        curves = {"roc": curves["roc"]}
    flatness = result.calibrated and result.calibrated.flatness
    own = {key: value for key, value in _settings(result).items() if key not in shared}
    return {
        "id": f"category-{number + 1}",
        "result": result,
        "n_good": n_good,
        "model_size": _bytes(result.model_bytes),
        "own_settings": own,
        "groups": groups,
        "histogram": Markup(draw_histogram(result, f"Scores of {result.name} by type")),
        "p_values": flatness
        and Markup(draw_p_values(flatness, f"p-values of the good images of {result.name}")),
        "curves": [
            Markup(
                draw_curve(
                    result.curves[key],
                    (x, y),
                    1 if key != "pro" else PRO_LIMIT,
                    f"{heading} of {result.name}",
                )
            )
            for key, (heading, x, y, _) in curves.items()
        ],
        "curve_titles": [(heading, result.metrics[m]) for heading, _, _, m in curves.values()],
    }


# --- pictures ---


def _row(picture: Picture, result: CategoryResult) -> dict[str, Any]:
    image = picture.image
    # The size was agreed to before.
    reading = Reading(result.settings.get("bit_depth"), sys.maxsize)
    photo = read_thumbnail(image.path, _THUMBNAIL, reading)
    size = photo.shape[1], photo.shape[0]
    levels = np.asarray(Image.fromarray(picture.levels).resize(size, Image.Resampling.BILINEAR))
    heat = levels / np.float32(255)
    overlay = draw_overlay(photo, heat)
    pictures: dict[str, tuple[NDArray[Any], str]] = {
        "image": (photo, "JPEG"),
        "anomaly map": (color_map(heat), "JPEG"),
        "overlay": (overlay, "JPEG"),  # the outline of the defect is drawn below
    }
    if picture.mask is not None:
        mask = resample_mask(picture.mask, photo.shape[:2])
        overlay[ndimage.binary_dilation(mask, iterations=2) & ~mask] = (90, 220, 255)
        if image.is_anomalous:
            pictures["mask"] = mask, "PNG"
    decision = image.decision
    alarm = decision.anomalous if decision else image.score >= result.threshold
    if image.is_anomalous:
        verdict = "found" if alarm else "missed"
    else:
        verdict = "false alarm" if alarm else "passed"
    return {
        "name": f"{image.path.parent.name}/{image.path.name}",
        "path": str(image.path),
        "defect_type": image.defect_type,
        "score": image.score,
        "verdict": verdict if decision or not math.isnan(result.threshold) else "",
        "width": size[0],
        "height": size[1],
        "pictures": {what: _data_uri(*picture) for what, picture in pictures.items()},
    }


def _data_uri(pixels: NDArray[Any], kind: str) -> str:
    buffer = io.BytesIO()
    options = {"quality": 82} if kind == "JPEG" else {"optimize": True}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- words ---


def _settings(result: CategoryResult) -> dict[str, str]:
    metric_size = "{} x {}".format(*result.metric_size)
    values = {**result.settings, **result.fitted, "metric_size": metric_size}
    return {key: "none" if value is None else str(value) for key, value in values.items()}


def _shared(settings: list[dict[str, str]]) -> dict[str, str]:
    """Settings that all categories have in common."""
    return {k: v for k, v in settings[0].items() if all(other.get(k) == v for other in settings)}


def _metric(value: float, name: str = "", has_masks: bool = True) -> str:
    if name in PIXEL_METRICS and not has_masks:
        return NO_MASKS
    return "–" if math.isnan(value) else f"{value:.3f}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:#.4g}".rstrip(".")


def _percent(rate: float) -> str:
    return f"{100 * rate:.{2 if rate < 0.1 else 3}g}\u00a0%"


def _interval(interval: tuple[float, float]) -> str:
    low, high = map(_percent, interval)
    return f"{low[:-2]} to {high}"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
