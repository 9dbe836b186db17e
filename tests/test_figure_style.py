"""The colours that pictures and page share, and the room that a figure has for its panels."""

import itertools
import re
from importlib import resources

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from awq_pycuda.analysis import figure_style


def test_colours_are_apart_for_the_colour_blind():
    """As seen without red or green cones: F. Viénot, H. Brettel, J. Mollon, "Digital video colourmaps", 1999."""
    seen = [
        np.eye(3),
        np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
        np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    ]
    sheet = (resources.files("awq_pycuda.analysis") / "templates/report.css.j2").read_text()
    pages = [colours.split() for colours in re.findall(r"--(?:series|stages):([^;]+);", sheet)]
    assert len(pages) == 4
    for palette in (figure_style.SERIES, figure_style.STAGE_COLOURS, *pages):
        rgb = np.array([to_rgb(colour) for colour in palette])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        for matrix in seen:
            for a, b in itertools.combinations(np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2), 2):
                assert np.abs(a - b).max() > 0.095  # Okabe and Ito's closest pair: 0.099


def test_panels_and_title_keep_their_room_above_a_long_legend():
    def inches(lines):
        """Height of the panel, and how far the title's and the note's top are from the figure's."""
        figure = figure_style.new_figure(6.8, 3.7, "title", "note")
        panel = figure.subplots()
        label = "\n".join(["x" * 80] * 2)
        figure_style.legend_below(figure, [figure_style.handle(0, label) for _ in range(lines // 2)])
        figure.draw_without_rendering()
        height = figure.get_figheight()
        return panel.get_position().height * height, *(height * (1 - text.get_position()[1]) for text in figure.texts)

    with figure_style.style():
        (usual, *above), (long, *above_long) = inches(8), inches(40)
    assert usual <= long < 2 * usual
    assert above_long == pytest.approx(above)
