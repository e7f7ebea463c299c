"""Two pictures: how several models do on several benchmarks, and where a needle is found."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nybble.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.projections.polar import PolarAxes

_COLOURS = ("#6b46c1", "#0f9d8a", "#d9822b", "#c2345a", "#2b6cb0", "#8a6d3b")
# What others measured stands behind: grey, told apart by its dashes.
_GREY, _DASHES = "#8a8a8a", ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_TITLE, _LABEL = 60, 42  # characters of a line


def _figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: no display is needed and no global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("The plots need matplotlib: run `pip install '.[eval]'`.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in letters that no font here has is drawn with boxes; the tables spell it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def radar(axes: Sequence[str], lines: Mapping[str, Sequence[float | None]], measured: int) -> bytes:
    """PNG. One spoke for each benchmark, 0 to 100; one closed line for each model.

    The first `measured` lines are in colour, the others grey and dashed. A model without a figure
    for every spoke is drawn with a gap there, one without any not at all; the first is filled.
    """
    figure = _figure(7.5, 6)
    plot: PolarAxes = figure.add_subplot(projection="polar")  # type: ignore[assignment]
    angles = [2 * math.pi * index / len(axes) for index in range(len(axes))]
    plot.set_theta_offset(math.pi / 2)
    plot.set_theta_direction(-1)
    plot.set_ylim(0, 100)
    plot.set_xticks(angles, axes)
    plot.tick_params(axis="x", pad=20)
    plot.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"], color="#777777")
    plot.grid(color="#dddddd")
    for index, (name, values) in enumerate(lines.items()):
        if all(value is None for value in values):
            continue
        ours = index < measured
        colour = _COLOURS[index % len(_COLOURS)] if ours else _GREY
        closed = [math.nan if value is None else value for value in (*values, values[0])]
        (line,) = plot.plot([*angles, angles[0]], closed, "o", color=colour, markersize=4)
        line.set(
            label=textwrap.fill(name, _LABEL),
            linestyle="-" if ours else _DASHES[(index - measured) % len(_DASHES)],
            clip_on=False,
            zorder=3 if ours else 2,
        )
        if index == 0 and None not in values:
            plot.fill(angles, values, color=colour, alpha=0.12)
    figure.legend(
        loc="outside lower center",
        ncols=min(2, len(lines)),
        frameon=False,
        handlelength=3.5,
        fontsize=9,
    )
    return _png(figure)


def needle_map(title: str, cells: Mapping[tuple[int, int], float], unit: str) -> bytes:
    """PNG. (length in units, depth in per cent) -> 0 to 1: red where the needle was not found."""
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells})
    grid = [[cells.get((length, depth), math.nan) for length in lengths] for depth in depths]
    figure = _figure(max(5.0, 1.8 + 0.55 * len(lengths)), max(3.2, 1.6 + 0.34 * len(depths)))
    plot = figure.add_subplot()
    image = plot.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    plot.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    plot.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    plot.set_xlabel(f"context length in {unit}")
    plot.set_ylabel("depth of the needle")
    figure.suptitle(textwrap.fill(title, _TITLE), fontsize=9)
    # White lines between the cells.
    plot.set_xticks([edge - 0.5 for edge in range(1, len(lengths))], minor=True)
    plot.set_yticks([edge - 0.5 for edge in range(1, len(depths))], minor=True)
    plot.grid(which="minor", color="white", linewidth=1.5)
    plot.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=plot, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("facts found")
    return _png(figure)


def _short(length: int) -> str:
    return f"{length / 1000:g}k" if length >= 1000 and length % 100 == 0 else str(length)
