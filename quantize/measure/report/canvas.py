"""How every figure looks: fonts, colours, size and the bytes of its PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from qtool.quantize.measure.report.words import number

WIDTH, DPI = 10.0, 160  # inches and dots: 1600 pixels wide
INK, MUTED, RULE = "#1c2430", "#5b6573", "#d7dce2"
# Okabe and Ito's colours, which stay apart for every kind of colour vision; their yellow is too faint for a line.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7a5195", "#8c6d31", "#6b7a8f")
BLUE, ORANGE, GREEN, PINK, SKY, AMBER = PALETTE[:6]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
HEAT = "viridis"
MASSIVE = "#e9ebee"

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "path.simplify": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The report's look, whatever the user's own matplotlib settings are, for figures made and drawn inside."""
    with style.context(_STYLE, after_reset=True):
        yield


def panels(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of WIDTH × height inches and its axes, row by row; options as of Figure.subplots."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def png_of(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis whose ticks are plain numbers: powers of ten, and 2 and 5 between where few fit.

    It stays linear where nothing drawn is positive.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    if axis.get_view_interval()[0] <= 0 and not np.isfinite(axis.get_minpos()):
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    narrow = np.log10(high / low) < 1.6
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    return f"{value:,.6g}" if 1e-3 <= value < 1e6 else number(value, digits=1).removeprefix("1×")


def block_ticks(axes: Axes, blocks: int) -> None:
    """Whole block numbers on the x axis, at most about 16 of them."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100) if blocks / s <= 16)
    axes.set_xticks(range(0, blocks, step))


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the nth line: different in all three, so that grey prints can be read."""
    dash = ("-", "--", ":")[index // len(PALETTE) % 3]
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)], "linestyle": dash}
