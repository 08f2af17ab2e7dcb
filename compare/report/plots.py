"""Draw findings as SVG. Text takes the color of the page, so pictures fit light and dark themes."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..files.writing import atomic_file
from .model import ContestantStyle, Curves, Histogram, Panels

# A placeholder for the text color of the page; replaced in the finished SVG.
_INK = "#010203"
# The palette of Okabe and Ito: distinguishable for color-blind readers, on white and on black.
_COLORS = {"torch": "#e69f00", "linen": "#56b4e9", "nnx": "#009e73", "jax": "#009e73"}
_OTHERS = ("#cc79a7", "#d55e00", "#0072b2")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.facecolor": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def picture(block: Panels | Curves | Histogram, number: int) -> str:
    """Return the block as an SVG element; a different `number` gives different element ids."""
    draw: Any = {Panels: _panels, Curves: _curves, Histogram: _histogram}[type(block)]
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": str(number)}):
        figure = draw(block)
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def save(curves: Curves, path: Path) -> None:
    """Write the curves to a .png or .svg file, black on white."""
    with matplotlib.rc_context({**_STYLE, "axes.facecolor": "white", "savefig.facecolor": "white"}):
        figure = _curves(curves)
        figure.axes[0].set_title(curves.title, parse_math=False)
        with atomic_file(path.resolve()) as stream:
            figure.savefig(stream, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def _panels(panels: Panels) -> Figure:
    matrices = {name: np.array(matrix, dtype=float) for name, matrix in panels.matrices.items()}
    figure = Figure(figsize=(3.0 * len(matrices) + 0.6, 3.0), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    finite = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices.values()])
    low, high = float(min(finite.min(initial=0.0), 0.0)), float(finite.max(initial=1.0))
    if low < 0:  # signed values: white is 0
        low, high, colors = -max(-low, high), max(-low, high), "PuOr"
    else:
        colors = "cividis"
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix, vmin=low, vmax=high, cmap=colors, interpolation="nearest")
        axis.set_title(name, fontsize=10, parse_math=False)
        axis.set_xticks(range(matrix.shape[1]))
        axis.set_yticks(range(matrix.shape[0]))
        axis.set_xlabel("column")
        if axis is axes[0]:
            axis.set_ylabel("row")
        for (row, column), entry in np.ndenumerate(matrix):
            share = (entry - low) / (high - low)
            dark = np.isfinite(entry) and (share < 0.5 if low == 0 else abs(share - 0.5) > 0.35)
            axis.text(
                column,
                row,
                f"{entry:.{panels.decimals}f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _curves(curves: Curves) -> Figure:
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for index, (name, values) in enumerate(curves.series.items()):
        positive = np.where(np.array(values) > 0, values, np.nan)  # a logarithmic axis has no 0
        if curves.contestants:
            line = _contestant_line(curves.contestants[name], index)
        else:
            line = _line(name, curves.series)
        axis.plot(curves.x, positive, label=name, **line)
    axis.set(
        xlabel=curves.x_label,
        ylabel=curves.y_label,
        yscale="log",
        xscale="log" if curves.log_x else "linear",
    )
    if curves.log_x:
        axis.set_xticks(curves.x, [f"{x:g}" for x in curves.x], minor=False)
        axis.minorticks_off()
    axis.grid(alpha=0.12, color=_INK)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _contestant_line(style: ContestantStyle, index: int) -> dict[str, Any]:
    """Return the line style: color by framework, marker by index, thick lines for ours."""
    return {
        "color": _COLORS[style.framework],
        "linewidth": 3.0 if style.is_ours else 1.0,
        "marker": "osv^Dxp*+h"[index % 10],
        "alpha": 1.0 if style.is_ours else 0.8,
    }


def _histogram(histogram: Histogram) -> Figure:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, counts in histogram.counts.items():
        style = _line(name, histogram.counts)
        axis.stairs(
            counts,
            histogram.edges,
            label=name,
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=2,
        )
    axis.set(xlabel=histogram.x_label, ylabel="entries", xscale="log")
    axis.grid(alpha=0.12, color=_INK)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _line(name: str, series: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line style of a series named "framework dtype", or of another series."""
    framework, _, dtype = name.partition(" ")
    others = [other for other in series if other.partition(" ")[0] not in _COLORS]
    color = _COLORS.get(framework) or _OTHERS[others.index(name) % len(_OTHERS)]
    style = {"nnx": ":", "linen": "--"}.get(framework, "-")
    return {"color": color, "linestyle": style, "linewidth": 1.2 if dtype == "float32" else 2.0}
