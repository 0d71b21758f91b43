"""The page of a sweep: its runs in a table, and their losses over each key that they differ in."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaqwen.report.figures import svg
from megaqwen.report.pages import page, table
from megaqwen.sweep_table import LOSSES, RESULTS, Row, place
from megaqwen.words import duration

WIDEST = 20  # times the smallest value: a wider range of numbers is drawn on a logarithmic axis
PANELS = 3  # in a row


def sweep_page(name: str, rows: Sequence[Row], figure: str) -> str:
    """A self-contained page.

    Args:
        name: The sweep's.
        rows: `sweep_rows`.
        figure: `sweep_figure`; empty for none.
    """
    header = [column.replace("_", " ") for column in rows[0]]
    cells = [[cell(column, value) for column, value in row.items()] for row in rows]
    sections = [("Runs, the lowest validation loss first", table(header, cells))]
    if figure:
        sections.insert(0, ("Loss by what the runs differ in", figure))
    return page(f"Sweep {name}", sections)


def cell(column: str, value: Any) -> str:
    """A value as it is shown; nothing where there is none."""
    if value is None:
        return "" if column not in RESULTS else "not yet"
    if column == "seconds":
        return duration(value)
    if column in LOSSES:
        return f"{value:.4f}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def sweep_figure(rows: Sequence[Row]) -> str:
    """Each run's loss over each key whose values differ, as SVG; empty where no run is trained."""
    trained = [row for row in rows if not place(row)[0]]
    keys = [key for key in rows[0] if key != "run" and key not in RESULTS]
    keys = [key for key in keys if len({str(row[key]) for row in rows}) > 1]
    if not trained or not keys:
        return ""
    lines = math.ceil(len(keys) / PANELS)
    columns = min(len(keys), PANELS)
    figure = Figure(figsize=(2.8 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, key in zip(panels, keys, strict=False):
        draw(axes, key, trained)
    for axes in list(panels):
        axes.set_visible(False)
    return svg(figure)


def draw(axes: Axes, key: str, rows: Sequence[Row]) -> None:
    """The losses over one key."""
    values = [row[key] for row in rows]
    losses = [place(row)[1] for row in rows]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        if min(numbers) > 0 and max(numbers) > WIDEST * min(numbers):
            axes.set_xscale("log")
        axes.plot(numbers, losses, linestyle="none", marker="o", markersize=4)
    else:
        axes.plot([str(value) for value in values], losses, linestyle="none", marker="o")
    axes.set_xlabel(key)
    axes.set_ylabel("validation loss" if rows[0]["validation_loss"] is not None else "loss")
