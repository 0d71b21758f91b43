"""Weights & Biases and MLflow: they get the records of metrics.jsonl, where the config asks for them.

The first comes with Megatron, the second with this project's extra `mlflow`. Without a key or a server
what they record stays beside the checkpoints, from where `wandb sync` sends it and `mlflow ui` shows it.
"""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaqwen.config.sections import Tracking
from megaqwen.errors import InputError

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
    logs = []
    if tracking.wandb_project:
        logs.append(wandb_log(tracking.wandb_project, run, key, directory))
    if tracking.mlflow_experiment:
        logs.append(mlflow_log(tracking.mlflow_experiment, run, key, directory))
    return logs


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
    mlflow.start_run(
        run_id=known[0].info.run_id if known else None, run_name=run, tags={"training": key}
    )

    def log(record: Record) -> None:
        figures = numbers(record)
        mlflow.log_metrics(figures, step=int(figures.pop("iteration")))

    return log
