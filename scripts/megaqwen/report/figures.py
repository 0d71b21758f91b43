"""A training's curves as SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
# The same run gives the same bytes, and text stays text.
matplotlib.rcParams.update({"svg.hashsalt": "megaqwen", "svg.fonttype": "none", "font.size": 9})

from matplotlib.axes import Axes  # noqa: E402  the backend comes first
from matplotlib.figure import Figure  # noqa: E402

Records = Sequence[Mapping[str, Any]]


def loss_figure(records: Records, unigram_entropy: float) -> str:
    """Training and validation loss in nats per token, beside the corpus's unigram entropy."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    draw(axes, records, "loss", "training")
    draw(axes, records, "validation_loss", "validation", marker="o")
    draw(axes, records, "test_loss", "test", marker="s", linestyle="none")
    axes.axhline(unigram_entropy, color="grey", linestyle=":", label="unigram entropy")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    return svg(figure)


def rates_figure(records: Records) -> str:
    """Learning rate, gradient norm and throughput by iteration."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    rows = (
        ("learning_rate", "learning rate"),
        ("gradient_norm", "gradient norm"),
        ("tokens_per_second", "tokens per second"),
    )
    for axes, (name, label) in zip(figure.subplots(len(rows), sharex=True), rows, strict=True):
        draw(axes, records, name, label)
        axes.set_ylabel(label)
    axes.set_xlabel("iteration")
    return svg(figure)


def draw(axes: Axes, records: Records, name: str, label: str, **style: Any) -> None:
    """Draw one figure of the records that have it."""
    points = [(record["iteration"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, markersize=4, **style)


def svg(figure: Figure) -> str:
    """A figure as an svg element, to stand alone or within a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
