"""The runs of a sweep beside each other: what each was given and what came of it, from its manifests."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaqwen.layout import Layout
from megaqwen.provenance import read_json, sha256_file
from megaqwen.runs import Runs

LOSSES = ("validation_loss", "loss", "test_loss")
RESULTS = ("iterations", *LOSSES, "seconds", "parity_convert", "parity_export")
MEASURED = ("validation_loss", "loss")  # the first one that a run has decides its place

Row = dict[str, Any]


def sweep_rows(runs: Runs) -> list[Row]:
    """A row for each run, the lowest validation loss first and those that are not trained last.

    Its `run`, the values that tell it from the others, by their keys, and RESULTS, None where there is
    none yet.
    """
    labels = {name: runs.label(name) for name in runs.names}
    keys = list(dict.fromkeys(key for label in labels.values() for key in label))
    rows = [
        {"run": name, **{key: labels[name].get(key) for key in keys}, **results(runs.layout(name))}
        for name in runs.names
    ]
    return sorted(rows, key=place)


def results(layout: Layout) -> Row:
    """What came of a run, as far as it was made with the config that it has now."""
    trained = layout.run / "train" / "manifest.json"
    found: Row = dict.fromkeys(RESULTS)
    if train := made(trained, layout.stage_digest("train")):
        facts = train["results"]
        found |= {
            "iterations": facts["iteration"],
            "validation_loss": facts["validation_loss"],
            "loss": facts["last_loss"],
            "test_loss": facts["test_loss"],
            "seconds": train["seconds"],
        }
        exported = {"checkpoint": trained, "model": layout.run / "export" / "manifest.json"}
        found["parity_export"] = verdict(layout, layout.run / "parity" / "export", exported)
    converted = {
        "checkpoint": layout.megatron / "manifest.json",
        "model": layout.model / "manifest.json",
    }
    own = layout.run / "parity" / "convert"
    found["parity_convert"] = verdict(layout, own, converted) or failed_gate(layout, converted)
    return found


def verdict(layout: Layout, place: Path, of: Mapping[str, Path]) -> str | None:
    """Passed or failed, or None where parity has not said it of what is there now.

    Args:
        layout: Of the run.
        place: The verdict's directory.
        of: The manifests of the stages that made what is compared, as a verdict names them.
    """
    for name in ("parity.json", "failed.json"):
        found = made(place / name, layout.stage_digest("parity"))
        if found and is_of(found, of):
            word: str = found["results"]["verdict"]
            return word
    return None


def failed_gate(layout: Layout, of: Mapping[str, Path]) -> str | None:
    """Failed, where the gate keeps the run from having a verdict of its own, whatever texts it took."""
    path = layout.gate / "failed.json"
    return "failed" if path.is_file() and is_of(read_json(path), of) else None


def is_of(verdict: Mapping[str, Any], of: Mapping[str, Path]) -> bool:
    """Whether a verdict is on what the stages whose manifests are `of` have made."""
    now = {name: sha256_file(path) for name, path in of.items() if path.is_file()}
    return {name: each["sha256"] for name, each in verdict["inputs"].items()} == now


def made(manifest: Path, digest: str) -> dict[str, Any] | None:
    """A stage's manifest, if it is of this config."""
    found: dict[str, Any] | None = read_json(manifest) if manifest.is_file() else None
    return found if found and found.get("config_digest") == digest else None


def place(row: Row) -> tuple[bool, float]:
    """By what a run is sorted: whether it has no loss, or one that is no number; and its loss."""
    loss = next((row[name] for name in MEASURED if row[name] is not None), math.nan)
    return (False, loss) if math.isfinite(loss) else (True, 0.0)


def as_csv(rows: Sequence[Row]) -> str:
    """The rows for other programs."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def sweep_lines(runs: Runs) -> list[str]:
    """A sweep's outcome in a few lines."""
    rows = sweep_rows(runs)
    passed = sum(row["parity_export"] == "passed" for row in rows)
    lines = [f"{len(rows)} runs, parity after export passed in {passed}"]
    best = rows[0]
    if not place(best)[0]:
        name = next(name for name in MEASURED if best[name] is not None)
        words = name.replace("_", " ")
        lines.append(f"lowest {words}: {best[name]:.4f} nats per token, of {best['run']}")
    page = runs.directory / "sweep.html"
    return [*lines, f"table: {page}"] if page.is_file() else lines
