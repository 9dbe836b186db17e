"""How every figure looks: palette, type, title block, axes, legend, and the two files that each is saved as."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from awq_pycuda.analysis.selection import Variant, format_value, spans_decades
from awq_pycuda.names import shorten

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart (M. Okabe, K. Ito, "Color Universal
# Design", 2008), without the yellow, which vanishes on white. Every series differs by its marker as well.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#222222", "#8C8C8C"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, "#B3B3B3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STAGE_COLOURS = (SKY, ORANGE, PURPLE, GREEN, BLUE, VERMILLION)  # in the order of the stages; markers likewise
MOST_SERIES = len(SERIES)
MOST_POINTS_AS_PATHS = 400  # larger clouds are an image within the SVG

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # names come from result files: a $ in them opens no formula
    "svg.fonttype": "none",  # text stays text: small files, searchable, and set in the paper's own font
    "svg.hashsalt": "awq_pycuda",  # the same results give the same bytes
}
_TITLE, _NOTE = 11.5, 8.5  # points
_MARGIN = 0.10  # inches
_PAD = 0.06  # inches
_CHARACTERS = 14.6  # of a note, per inch
_LEGEND_LINES = 8  # of a legend that a figure's own height has room for
_LEGEND_LINE = 0.19  # inches
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # a name may hold what no XML file may


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, whatever the user's own matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float, title: str, note: str) -> Figure:
    """An empty figure with its title, and below it in grey what is shown; sizes in inches, without the title block."""
    lines = textwrap.wrap(note, width=int((width - 2 * _MARGIN) * _CHARACTERS))
    block = (1.45 * _TITLE + 1.3 * _NOTE * len(lines)) / 72
    height += block
    room = (0, 0, 1, 1 - (block + _MARGIN) / height)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(rect=room, h_pad=_PAD, w_pad=_PAD))
    FigureCanvasAgg(figure)
    left, top = _MARGIN / width, 1 - _MARGIN / height
    figure.text(left, top, title, fontsize=_TITLE, fontweight="bold", va="top", color=BLACK)
    below = top - 1.45 * _TITLE / 72 / height
    figure.text(left, below, "\n".join(lines), fontsize=_NOTE, va="top", color="#555555", linespacing=1.25)
    return figure


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Writes `stem`.png and `stem`.svg."""
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    with warnings.catch_warnings():
        # A name in a script that the font lacks: boxes in the PNG, whole in the SVG.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)  # once for both files; saving with an engine would draw each of them twice, too
        figure.set_layout_engine(None)
        figure.savefig(paths[0], dpi=150)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", dpi=200, metadata={"Date": None})
    paths[1].write_text(_NOT_XML.sub("\ufffd", svg.getvalue()), encoding="utf-8")
    return paths


def depth_colours() -> Colormap:
    """Colours from the first layer to the last: viridis without its palest end, which vanishes on white."""
    return LinearSegmentedColormap.from_list("depth", mpl.colormaps["viridis"](np.linspace(0, 0.88, 64)))


def marked_line(panel: Axes, x: Any, y: Any, series: int, **options: Any) -> None:
    """A line with markers, in the colour and shape of its series."""
    options = {"markersize": 4.5, "linewidth": 1.3} | options
    panel.plot(x, y, color=SERIES[series], marker=MARKERS[series], **options)


def handle(series: int, label: str, colour: str | None = None, markerfacecolor: Any = None, **options: Any) -> Line2D:
    """The legend's sign for a series; a colour of its own where it stands for all series."""
    face = {"markerfacecolor": markerfacecolor} if markerfacecolor else {}
    label = f" {label}" if label.startswith("_") else label  # matplotlib leaves such names out of legends
    look: dict[str, Any] = {"marker": MARKERS[series], "markersize": 5, "color": colour or SERIES[series]}
    return Line2D([], [], label=label, **look | face | options)


def variant_handles(groups: Sequence[Variant], marker: str | None = None) -> list[Line2D]:
    """The legend's signs for groups of runs, with how many runs each stands for; `marker` where all have the same."""
    counts = ["" if len(group.runs) == 1 else f" ({len(group.runs)} runs)" for group in groups]
    own = {} if marker is None else {"marker": marker}
    return [handle(series, group.label + counts[series], **own) for series, group in enumerate(groups)]


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """One legend under all panels, in as many columns as fit side by side; what is wider than the figure is folded.

    The figure grows by the lines of a long legend: the panels keep their room.
    """
    most = int(figure.get_figwidth() * 14) - 7
    for one in handles:
        if len(label := str(one.get_label())) > most:
            one.set_label(textwrap.fill(shorten(label, 2 * most), most))
    lines = [line for one in handles for line in str(one.get_label()).splitlines()]
    widest = max(map(len, lines), default=0)
    columns = max(1, min(6, len(handles), int(figure.get_figwidth() * 14 / (widest + 7))))
    _heighten(figure, _LEGEND_LINE * max(0, -(-len(lines) // columns) - _LEGEND_LINES))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def _heighten(figure: Figure, inches: float) -> None:
    """Makes a figure of `new_figure` higher; its title block stays at the top, of the same size."""
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    height = figure.get_figheight()
    share = height / (height + inches)
    figure.set_figheight(height + inches)
    left, bottom, width, top = layout.get()["rect"]
    layout.set(rect=(left, bottom, width, 1 - (1 - top) * share))
    for text in figure.texts:
        text.set_y(1 - (1 - text.get_position()[1]) * share)


def _axis(panel: Axes, name: Literal["x", "y"]) -> Axis:
    return panel.xaxis if name == "x" else panel.yaxis


def log_axis(panel: Axes, name: Literal["x", "y"], values: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 where it spans few decades, at powers of ten beyond."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array) & (array > 0)]
    decades = np.log10(array.max() / array.min())
    panel.set(**{f"{name}scale": "log"})
    axis = _axis(panel, name)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.6 else (1.0,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.10g}" if 1e-4 <= value < 1e6 else f"{value:.0e}")
    )


def scale_to(panel: Axes, name: Literal["x", "y"], values: Any) -> None:
    """Logarithmic where the values span decades, linear otherwise."""
    if spans_decades(np.asarray(values, dtype=float)):
        log_axis(panel, name, values)


def value_ticks(panel: Axes, values: Sequence[float], most: int = 10) -> None:
    """Ticks of the x axis at the very values of a sweep, as long as they are few and not crowded."""
    places = np.log(values) if panel.get_xscale() == "log" else np.asarray(values)
    crowded = len(values) > 1 and np.diff(places).min() < 0.04 * (places[-1] - places[0])
    if len(values) <= most and not crowded:
        panel.xaxis.set_major_locator(FixedLocator(list(values)))
        panel.xaxis.set_major_formatter(FixedFormatter([format_value(value) for value in values]))
        panel.xaxis.set_minor_locator(NullLocator())


def category_ticks(panel: Axes, name: Literal["x", "y"], labels: Sequence[str], most: int = 40) -> None:
    """A label at 0, 1, 2 ...; only every so many where there are too many to read."""
    step = -(-len(labels) // most)
    axis = _axis(panel, name)
    axis.set_major_locator(FixedLocator(list(range(0, len(labels), step))))
    axis.set_major_formatter(FixedFormatter(list(labels[::step])))


def layer_ticks(panel: Axes, layers: Sequence[int], most: int = 20) -> None:
    """A tick of the x axis at each layer index, or at every so many."""
    panel.xaxis.set_major_locator(FixedLocator(list(layers)[:: -(-len(layers) // most)]))


def label_lowest(axes: NDArray[Any], label: str) -> None:
    """The x label, and its numbers, under the lowest visible panel of each column of a grid that shares its x axis."""
    for column in axes.T:
        lowest = [panel for panel in column if panel.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(label)


def hide(panels: Iterable[Axes]) -> None:
    """Panels of a grid that nothing is left for."""
    for panel in panels:
        panel.set_visible(False)
