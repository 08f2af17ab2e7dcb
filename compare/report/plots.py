"""Pictures of findings as SVG: the text takes the page's color, so that they read in light and dark."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .model import Curves, Histogram, Panels

# Stands for the page's text color until the SVG is written.
_INK = "#010203"
# Okabe and Ito's colors, told apart by color-blind readers, on white and on black.
_COLORS = {"torch": "#e69f00", "linen": "#56b4e9", "nnx": "#009e73"}
_OTHERS = ("#cc79a7", "#d55e00", "#0072b2")
_STYLE: dict[Any, Any] = {
    **{
        "svg.fonttype": "none",
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.facecolor": "none",
    },
    **{
        key: _INK
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    },
}


def picture(block: Panels | Curves | Histogram, number: int) -> str:
    """Return the block as an SVG element; `number` keeps its ids apart from those of other pictures on the page."""
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
        figure.axes[0].set_title(curves.title)
        figure.savefig(path, dpi=150, bbox_inches="tight")


def _panels(panels: Panels) -> Figure:
    matrices = {name: np.array(matrix, dtype=float) for name, matrix in panels.matrices.items()}
    figure = Figure(figsize=(3.0 * len(matrices) + 0.6, 3.0), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    finite = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices.values()])
    low, high = float(min(finite.min(initial=0.0), 0.0)), float(finite.max(initial=1.0))
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix, vmin=low, vmax=high, cmap="cividis", interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(matrix.shape[1]))
        axis.set_yticks(range(matrix.shape[0]))
        for (row, column), entry in np.ndenumerate(matrix):
            dark = np.isfinite(entry) and entry < (low + high) / 2
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
    for name, values in curves.series.items():
        # On a logarithmic scale there is no place for equality.
        positive = np.where(np.array(values) > 0, values, np.nan)
        line = _contestant(name, curves.series) if curves.log_x else _line(name, curves.series)
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


def _contestant(name: str, series: Mapping[str, Any]) -> dict[str, Any]:
    """Color by framework, marks by place; ours stand out."""
    framework = "torch" if name.startswith("torch") else "nnx"
    ours = " ours" in name
    marker = "osv^Dxp*+h"[list(series).index(name) % 10]
    return {
        "color": _COLORS[framework],
        "linewidth": 3.0 if ours else 1.0,
        "marker": marker,
        "alpha": 1.0 if ours else 0.8,
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
    implementation, _, rest = name.partition(" ")
    others = [other for other in series if other.partition(" ")[0] not in _COLORS]
    color = _COLORS.get(implementation) or _OTHERS[others.index(name) % len(_OTHERS)]
    style = {"nnx": ":", "linen": "--"}.get(implementation, "-")
    return {"color": color, "linestyle": style, "linewidth": 1.2 if rest == "float32" else 2.0}
