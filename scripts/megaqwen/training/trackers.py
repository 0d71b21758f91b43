"""Weights & Biases and MLflow: they get the records of metrics.jsonl, where the config asks for them.

The first comes with Megatron, the second with this project's extra `mlflow`. Without a key or a server
what they record stays beside the checkpoints, from where `wandb sync` sends it and `mlflow ui` shows it.
"""

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaqwen.config.sections import Tracking
from megaqwen.errors import InputError
from megaqwen.provenance import read_json, write_json

KEY = "tracking.json"  # beside the checkpoints
logger = logging.getLogger("megaqwen.training")

Record = Mapping[str, Any]
Log = Callable[[Record], None]


def check_installed(tracking: Tracking) -> None:
    """InputError where the config names a tracker that is not installed."""
    wanted = (
        ("wandb_project", ["wandb"], "uv sync --inexact"),
        (
            "mlflow_experiment",
            ["mlflow", "sqlalchemy", "alembic"],
            "uv sync --inexact --extra mlflow",
        ),
    )
    for field, packages, install in wanted:
        absent = [package for package in packages if find_spec(package) is None]
        if (name := getattr(tracking, field)) and absent:
            raise InputError(
                f"tracking.{field} is {name!r}, but {absent[0]} is not installed: {install}, or leave"
                " it out"
            )


def start_trackers(tracking: Tracking, *, run: str, key: str, directory: Path) -> list[Log]:
    """Start those that the config names; each function takes one record of metrics.jsonl.

    Args:
        tracking: The section of the config.
        run: The run's name, which they show.
        key: Of the training: one that is resumed goes on in the same curve.
        directory: Where they write.
    """
    wanted = {
        "wandb_project": (tracking.wandb_project, wandb_log),
        "mlflow_experiment": (tracking.mlflow_experiment, mlflow_log),
    }
    return [
        Tracker(f"tracking.{field}", partial(start, name, run, key, directory))
        for field, (name, start) in wanted.items()
        if name
    ]


class Tracker:
    """Takes records until it fails once: a server that is away ends no training."""

    def __init__(self, name: str, start: Callable[[], Log]):
        """Start it, if that can be done; `name` is the config's key."""
        self.name = name
        self.log: Log | None = None
        self.log = self.tried(start)

    def __call__(self, record: Record) -> None:
        """Pass the record on."""
        if self.log is not None and numbers(record).keys() != {"iteration"}:
            self.tried(partial(self.log, record))

    def tried(self, work: Callable[[], Any]) -> Any:
        """What it gives; at an error that is said, and nothing is asked of it any more."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - whatever a client of a server raises
            self.log = None
            logger.warning(
                "%s gets no more records: %s. metrics.jsonl has all of them", self.name, error
            )
            return None


def training_key(directory: Path, resumed: int) -> str:
    """Of one training: the directory's is that of its config, which several may have.

    Args:
        directory: The checkpoints.
        resumed: The iteration that training goes on after; 0 where it begins.
    """
    file = directory / KEY
    if not file.is_file():
        write_json(file, {"key": directory.name if resumed else uuid.uuid4().hex})
    return str(read_json(file)["key"])


def numbers(record: Record) -> dict[str, float]:
    """The figures of a record; alarms are words."""
    return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}


def wandb_log(project: str, run: str, key: str, directory: Path) -> Log:
    """Weights & Biases; offline where there is no key."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or (None if wandb.login(prompt=False) else "offline")
    started: Any = wandb.init(
        project=project,
        name=run,
        id=key,
        dir=str(directory),
        mode=mode,
        resume=None if mode == "offline" else "allow",
    )
    # Not its own steps: they never go back, as a training does that resumes.
    started.define_metric("*", step_metric="iteration")
    return lambda record: started.log(numbers(record))


def mlflow_log(experiment: str, run: str, key: str, directory: Path) -> Log:
    """MLflow; a database beside the checkpoints where MLFLOW_TRACKING_URI names no server."""
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{directory.absolute()}/mlflow.db")
    mlflow.set_experiment(experiment)
    known = mlflow.search_runs(filter_string=f"tags.training = '{key}'", output_format="list")
    started = mlflow.start_run(
        run_id=known[0].info.run_id if known else None, run_name=run, tags={"training": key}
    )

    def log(record: Record) -> None:
        figures = numbers(record)
        step = int(figures.pop("iteration"))
        mlflow.log_metrics(figures, step=step, run_id=started.info.run_id)  # from whatever thread

    return log
