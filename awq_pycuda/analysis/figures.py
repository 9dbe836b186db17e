"""Figures of a collection as files, PNG and SVG each, drawn by matplotlib: 0.3 s a figure, the same bytes every time.

The page's are drawn a second time, by plotly.js in the reader's browser, by the choices made there. Nothing makes one
drawing of both without a browser. Plotly writes pictures through Kaleido: Kaleido 1.5 starts a Chrome of the machine,
takes 4 to 6 s a figure and gives other bytes of SVG each time; 0.2.1, the last to bring its own (80 MB, Chromium 88 of
2021), fails on the plotly.js of Plotly 7, which refuses it. vl-convert 1.9 needs no browser and repeats its bytes
(34 MB, 0.1 s a figure after the first), but draws Vega-Lite, not Plotly's figures. So only what is drawn has one home:
the tables of `collect`, and what `selection` and `roofline` make of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from awq_pycuda.analysis import (
    figure_style,
    figures_error,
    figures_evaluation,
    figures_product,
    figures_quality,
    figures_recipes,
    figures_search,
    figures_sweep,
    figures_time,
)
from awq_pycuda.analysis.collect import Collection
from awq_pycuda.analysis.guard import Failure, left_out
from awq_pycuda.analysis.selection import key_name

_STEMS = {
    "error_curves": figures_search.error_curves,
    "channel_scales": figures_search.channel_scales,
    "sqnr": figures_error.sqnr,
    "propagation": figures_error.propagation,
    "stage_times": figures_time.stage_times,
    "roofline": figures_time.roofline,
    "product_rate": figures_product.product_rate,
    "curves_by_grid": figures_quality.curves_by_grid,
    "propagation_by_sweep": figures_quality.propagation_by_sweep,
    "held_out": figures_sweep.held_out,
    "curves_by_sweep": figures_sweep.curves_by_sweep,
}
_FAMILIES = {  # and the swept key, or, where they are several, the evaluation
    "time_against_": figures_time.times_against,
    "error_removed_against_": figures_quality.error_removed_against,
    "evaluation_recipes": figures_evaluation.recipes,
    "evaluation_layers": figures_evaluation.layers_alone,
    "evaluation_tokens": figures_evaluation.tokens,
    "evaluation_gains": figures_recipes.gains,
    "evaluation_draws": figures_recipes.draws,
}


def write_figures(collection: Collection, folder: Path) -> tuple[list[Path], list[Failure]]:
    """Writes every figure that the results have data for; removes an earlier call's that they have none for.

    They are error_curves, channel_scales, sqnr, propagation, stage_times, roofline, product_rate, curves_by_grid,
    propagation_by_sweep, held_out, curves_by_sweep, and for each swept key time_against_<key> and
    error_removed_against_<key>, of the complete runs; and of evaluations evaluation_recipes, evaluation_layers,
    evaluation_tokens, evaluation_gains and evaluation_draws, with _<name> where they are several. Many runs are shown
    as medians and quartiles; each figure says in its second line what it shows.

    Args:
        collection: what to draw.
        folder: where to; made if missing.

    Returns:
        The files, PNG and SVG in turn; and the figures that could not be drawn.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    failures: list[Failure] = []
    with figure_style.style():
        for stem, draw in _figures(collection, failures):
            with left_out(f"figure {stem}", failures):
                figure = draw()
                if figure is not None:
                    paths += figure_style.save(figure, folder, stem)
    for suffix in ("png", "svg"):
        for path in folder.glob(f"*.{suffix}"):
            if path not in paths and (path.stem in _STEMS or path.stem.startswith(tuple(_FAMILIES))):
                path.unlink()
    return paths, failures


def _figures(collection: Collection, failures: list[Failure]) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    """Each figure's name, and how it is drawn: one by one, so that no more than one is in memory."""
    for stem, draw in _STEMS.items():
        yield stem, partial(draw, collection)
    for start, family in _FAMILIES.items():
        with left_out(f"figures {start}…", failures):
            for key, draw_one in family(collection):
                yield f"{start}{_file_part(key)}", draw_one


def _file_part(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", key_name(key))
