"""What a run is at, told from its files: logs, manifests, training's metrics and the job it named."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megaqwen.config import load_config
from megaqwen.config.rank_options import ranks_of_layout
from megaqwen.errors import INTERRUPTED, STOPPED, InputError
from megaqwen.layout import Layout
from megaqwen.provenance import read_json, stands
from megaqwen.runs import KEYS
from megaqwen.summary import last_error
from megaqwen.training.attempts import read_attempts
from megaqwen.training.logs import rank_of
from megaqwen.training.metrics import read_metrics
from megaqwen.words import duration

JOB = "job.json"
SHARED = frozenset(KEYS)
AVERAGED = 20  # iterations, for the time left
HEADER = ("run", "stage", "job", "nodes", "iteration", "loss", "left", "changed")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A line of the table, each field as it is shown."""

    run: str
    stage: str
    """Such as `train running`, `train stopped`, `export failed`, `preprocess waiting`, or `done`."""
    job: str = ""
    nodes: str = ""
    iteration: str = ""
    loss: str = ""
    left: str = ""
    """Of training, at the pace of its last iterations."""
    changed: str = ""
    """How long ago the stage last wrote something."""


def run_status(directory: Path) -> RunStatus:
    """What the run in `results/runs/NAME` is at.

    Raises:
        InputError: There is no such run, or its config is refused, as after an update.
    """
    file = directory / "config.yaml"
    if not file.is_file():
        raise InputError(f"{file} is missing: no run of that name was started")
    config = load_config(file)
    # Where they lie now: they may have been moved, or have been started from another directory.
    moved = config.model_copy(update={"results": str(directory.parents[1])})
    layout = Layout(config=moved)
    ends = {
        "download": layout.model / "manifest.json",
        "convert": layout.megatron / "manifest.json",
        "preprocess": layout.data / "manifest.json",
        "parity_gate": layout.gate / "parity.json",
        "parity_convert": directory / "parity" / "convert" / "parity.json",
        "train": directory / "train" / "manifest.json",
        "export": directory / "export" / "manifest.json",
        "parity_export": directory / "parity" / "export" / "parity.json",
        "report": directory / "report" / "report.html",
    }
    missing = [name for name, end in ends.items() if not end.is_file()]
    if SHARED.issuperset(missing) and not any(ends[name].parent.exists() for name in missing):
        missing = []  # what was removed when nothing needed it any more
    # Another config's may be there, and stay until the stage's next job starts.
    made = {
        "train": stands(ends["train"], layout.stage_digest("train")),
        "export": stands(ends["export"], layout.stage_digest("export"), train=ends["train"]),
        "parity_export": stands(
            ends["parity_export"],
            layout.stage_digest("parity"),
            checkpoint=ends["train"],
            model=ends["export"],
        ),
    }
    missing = [name for name in ends if name in missing or not made.get(name, True)]
    # parity_convert waits for nobody and nobody for it: of two, the other is what the run is at.
    stage = next((name for name in missing if name != "parity_convert"), None)
    if stage in (None, "report") and "parity_convert" in missing:
        stage = "parity_convert"
    trained = training(layout, int(str(config.train.get("train_iters", 0))))
    if stage is None:
        trained.pop("left", None)
        return RunStatus(run=directory.name, stage="done", **trained)
    logs = sorted(stage_logs(layout, stage), key=lambda log: log.stat().st_mtime)
    state = "waiting"
    if logs:
        state = state_by(logs)
        trained["changed"] = f"{duration(time.time() - logs[-1].stat().st_mtime)} ago"
    if state != "running" or stage != "train":
        trained.pop("left", None)
    return RunStatus(run=directory.name, stage=f"{stage} {state}", **trained)


def state_by(logs: Sequence[Path]) -> str:
    """What the last words in a stage's logs tell: `running`, `failed`, or `stopped` when told to."""
    errors = [error for log in logs if (error := last_error(log))]
    told = [error for error in errors if error.startswith((STOPPED, INTERRUPTED))]
    if len(told) == len(errors) and any(error.startswith(STOPPED) for error in told):
        return "stopped"
    return "failed" if errors else "running"


def stage_logs(layout: Layout, stage: str) -> list[Path]:
    """The logs of a stage, of preprocess also its shards'; of what the runs of a sweep share the sweep's.

    Without those of ranks that it had before, under another layout.
    """
    logs: list[Path] = []
    for rule in ("preprocess_shard", stage) if stage == "preprocess" else (stage,):
        logs += (layout.run / "logs").glob(f"{rule}.*log*")
        if rule in KEYS:
            key = getattr(layout, KEYS[rule]).name
            logs += (layout.results / "sweeps").glob(f"*/logs/{rule}.{key}.*log*")
    ranks = ranks_of(layout, stage)
    return [log for log in logs if rank_of(log) < ranks]


def ranks_of(layout: Layout, stage: str) -> float:
    """How many ranks a stage has, in training's newest start; infinity where that is not known."""
    if stage != "train":
        return ranks_of_layout(layout.config.train)
    starts = read_attempts(layout.checkpoints)
    return starts[-1].ranks if starts else math.inf


def training(layout: Layout, iterations: int) -> dict[str, str]:
    """The columns that training's own files give."""
    columns: dict[str, str] = {}
    train = layout.run / "train"
    if (train / JOB).is_file():
        job: dict[str, Any] = read_json(train / JOB)
        columns |= {"job": job.get("job_id") or "", "nodes": job.get("node_list") or ""}
    metrics = layout.checkpoints / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    steps = [record for record in records if "loss" in record]
    if steps:
        last = steps[-1]
        pace = statistics.median(step["seconds"] for step in steps[-AVERAGED:])
        columns["iteration"] = f"{last['iteration']}/{iterations}"
        columns["loss"] = f"{last['loss']:.4g}"
        columns["left"] = duration(pace * (iterations - last["iteration"]))
    return columns


def table(rows: Sequence[RunStatus]) -> str:
    """The lines for a terminal."""
    cells = [HEADER, *(astuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)
