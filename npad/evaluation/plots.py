"""The report's plots, as SVG that stands in the page: in its font and its colours, light and dark."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from npad.evaluation.calibrated import BINS, Flatness
from npad.evaluation.datasets import GOOD
from npad.evaluation.metrics import Curve
from npad.evaluation.results import CategoryResult
from npad.file_names import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curve", "draw_histogram", "draw_p_values"]

_HISTOGRAM_BINS = 48
# Colours that stand for the page's own in the plots, so that they follow its light and dark scheme.
_THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--good)",
    "#050505": "var(--bad)",
    "#060606": "var(--accent)",
}
_DASHES = 0, (4, 3)
_INK, _MUTED, _LINE, _GOOD, _BAD, _ACCENT = _THEME


def draw_histogram(result: CategoryResult, label: str) -> str:
    """One histogram of image scores under the other, good images first, on one scale.

    A line is the threshold of the best F1; those of a calibrated model stand beside it, with names.
    """
    kinds = (
        [GOOD, *result.types] if any(not i.is_anomalous for i in result.images) else [*result.types]
    )
    scores = {k: [i.score for i in result.images if i.defect_type == k] for k in kinds}
    calibrated = result.calibrated.thresholds if result.calibrated else ()
    every = np.concatenate([*scores.values(), calibrated])
    low, high = float(every.min()), float(every.max())
    log = low > 0 and high > 20 * low  # a few huge scores would squeeze the rest into one bin
    if high == low:
        low, high = low - 0.5, high + 0.5
    edges = (np.geomspace if log else np.linspace)(low, high, _HISTOGRAM_BINS + 1)
    figure = _figure(9.6, 0.55 + 0.52 * len(kinds) + (0.4 if calibrated else 0))
    axes = figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0]
    for ax, kind in zip(axes, kinds, strict=True):
        color = _GOOD if kind == GOOD else _BAD
        counts, _ = np.histogram(scores[kind], edges)
        ax.stairs(counts, edges, fill=True, color=color, alpha=0.75)
        ax.axvline(result.threshold, color=_INK, linewidth=1, linestyle=_DASHES)
        for threshold in calibrated:
            ax.axvline(threshold, color=_ACCENT, linewidth=1.5)
        name = shown(kind)
        name = name if len(name) <= 24 else name[:23] + "…"
        ax.set_ylabel(
            f"{name} · {len(scores[kind])}",
            rotation=0,
            ha="right",
            va="center",
            color=_INK,
            parse_math=False,  # $ is a letter of a name
        )
        ax.set(yticks=[], ylim=(0, max(counts.max(), 1) * 1.08), xlim=(low, high))
        if log:
            ax.set_xscale("log")
        for side in ("top", "left", "right"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_color(_LINE)
        ax.tick_params(which="both", length=0, colors=_MUTED)
    if calibrated:
        names = [(calibrated[-1], "calibrated", _ACCENT), (result.threshold, "best F1", _INK)]
        _name_lines(axes[0], [line for line in names if not np.isnan(line[0])])
    axes[-1].tick_params(which="major", length=3, color=_LINE)
    axes[-1].set_xlabel("image score" + (", logarithmic" if log else ""), color=_MUTED)
    return _svg(figure, label)


def _name_lines(ax: Axes, lines: list[tuple[float, str, str]]) -> None:
    """Write (x, name, colour) of lines above the axes, in rows and where no line crosses a name."""
    to_axes = ax.transData + ax.transAxes.inverted()
    to_left = np.mean([to_axes.transform((x, 0))[0] for x, *_ in lines]) > 0.5
    for row, (x, name, color) in enumerate(sorted(lines, reverse=not to_left)):
        ax.annotate(
            name,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2 + 11 * row),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="bottom",
            color=color,
            arrowprops={  # the line goes on up to its name
                "arrowstyle": "-",
                "color": color,
                "relpos": (int(to_left), 0),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def draw_p_values(flatness: Flatness, label: str) -> str:
    """Histogram of the p-values of nominal images, and what it is expected to be."""
    edges = np.linspace(0, 1, BINS + 1)
    figure = _figure(9.6, 2.2)
    ax = figure.subplots()
    ax.stairs(flatness.high, edges, baseline=flatness.low, fill=True, color=_MUTED, alpha=0.2)
    ax.stairs(flatness.counts, edges, fill=True, color=_GOOD, alpha=0.75)
    ax.stairs(flatness.expected, edges, baseline=None, color=_INK, linewidth=1, linestyle=_DASHES)
    top = max(flatness.counts.max(), flatness.high.max())
    ax.set(xlim=(0, 1), ylim=(0, top * 1.08), xticks=edges)
    ax.set_xlabel("p-value", color=_MUTED)
    ax.set_ylabel("good images", color=_MUTED)
    ax.locator_params(axis="y", integer=True, nbins=5)
    ax.tick_params(length=3, color=_LINE, labelcolor=_MUTED)
    for side in ("top", "left", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(_LINE)
    return _svg(figure, label)


def draw_curve(curve: Curve, axis_names: tuple[str, str], end: float, label: str) -> str:
    """One curve from 0 to `end`, and the diagonal that guessing would give."""
    figure = _figure(3.3, 2.9)
    ax = figure.subplots()
    ax.plot([0, end], [0, end], color=_LINE, linewidth=1, linestyle=(0, (2, 3)))
    if len(curve[0]):
        ax.fill_between(*curve, color=_ACCENT, alpha=0.10, linewidth=0)
        ax.plot(*curve, color=_ACCENT, linewidth=1.8, solid_joinstyle="round")
    else:
        ax.text(end / 2, 0.5, "undefined: one class only", ha="center", color=_MUTED)
    ax.set(xlim=(0, end), ylim=(0, 1.01))
    ax.set_xlabel(axis_names[0], color=_MUTED)
    ax.set_ylabel(axis_names[1], color=_MUTED)
    ax.tick_params(length=3, color=_LINE, labelcolor=_MUTED)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_color(_LINE)
    return _svg(figure, label)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import)

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _svg(figure: Figure, label: str) -> str:
    """Draw as inline SVG in the page's own font and colours, without names that could collide."""
    import matplotlib as mpl  # noqa: PLC0415  (slow to import)
    from markupsafe import escape  # noqa: PLC0415

    label = shown(label)
    buffer = io.StringIO()
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has other fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", svg)
    svg = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", svg, count=1)
    for color, name in _THEME.items():
        svg = svg.replace(color, name)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
