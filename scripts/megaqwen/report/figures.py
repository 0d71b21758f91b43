"""A training's curves, and where two models differ, as SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
# The same run gives the same bytes, and text stays text.
matplotlib.rcParams.update({"svg.hashsalt": "megaqwen", "svg.fonttype": "none", "font.size": 9})

from matplotlib.axes import Axes  # noqa: E402  the backend comes first
from matplotlib.figure import Figure  # noqa: E402

RATES = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "tflops_per_rank": "TFLOP/s a rank",
    "mfu": "MFU",
    "memory_bytes": "memory (bytes)",
    "save_seconds": "save (s)",
    "save_wait_seconds": "wait for a save's copy (s)",
    "data_wait_seconds": "data wait (s)",
    "straggler_seconds": "straggler (s)",
}
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
    """Learning rate, gradient norm, throughput, memory and waiting by iteration, as far as recorded."""
    always = ("learning_rate", "gradient_norm", "tokens_per_second")
    rows = [
        (name, label)
        for name, label in RATES.items()
        if name in always or any(name in record for record in records)
    ]
    figure = Figure(figsize=(8, 1.6 * len(rows)), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(len(rows), sharex=True), rows, strict=True):
        draw(axes, records, name, label)
        axes.set_ylabel(label)
    axes.set_xlabel("iteration")
    return svg(figure)


def parity_figure(results: Mapping[str, Any]) -> str:
    """Where two models differ: by position, by point of a layer beside rounding, and logit by logit.

    Args:
        results: Those in a parity stage's manifest.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    positions, layers, logits = figure.subplots(3)
    for text in results["texts"]:
        positions.semilogy(*visible(text["by_position"]), label=text["text"], linewidth=0.9)
    positions.set_xlabel("position")
    positions.set_ylabel("max |difference| of the logits")
    positions.legend(ncols=3, fontsize=7)
    points = results["layers"]
    for name, label in (("error", "Megatron"), ("null", "transformers' own rounding")):
        layers.semilogy(*visible([point[name] for point in points]), label=label, marker=".")
    labels = ["" if each["layer"] is None else str(each["layer"]) for each in points]
    firsts = [index for index, label in enumerate(labels) if label not in labels[:index]]
    layers.set_xticks(firsts, [labels[index] or "embedding" for index in firsts])
    layers.set_xlabel("layer, each with its points in the order of computation")
    layers.set_ylabel("relative error")
    layers.legend()
    pairs = [pair for text in results["texts"] for pair in text["pairs"]]
    logits.plot(*zip(*pairs, strict=True), linestyle="none", marker=".", markersize=2)
    logits.axline((0, 0), slope=1, color="grey", linewidth=0.6)
    logits.set_xlabel("logit of transformers")
    logits.set_ylabel("logit of Megatron")
    return svg(figure)


def visible(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Places and values of those that a logarithmic axis can show: equal results are left out."""
    places = [index for index, value in enumerate(values) if value > 0]
    return places, [values[index] for index in places]


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
