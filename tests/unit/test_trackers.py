"""Trackers that are not installed are refused in words; those that are get the records, offline."""

import importlib
import json
import sqlite3
from pathlib import Path

import pytest

from megaqwen.config.sections import Tracking
from megaqwen.errors import InputError
from megaqwen.training import trackers
from megaqwen.training.trackers import (
    Tracker,
    check_installed,
    numbers,
    start_trackers,
    training_key,
)


@pytest.mark.parametrize(
    ("field", "install"),
    [
        ("wandb_project", "uv sync --inexact"),  # Transformer Engine would go
        ("mlflow_experiment", "uv sync --inexact --extra mlflow"),
    ],
)
def test_one_that_is_not_installed(
    field: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    package = field.split("_")[0]
    with pytest.raises(InputError, match=f"tracking.{field} is 'qwen', but {package} .*{install},"):
        check_installed(Tracking(**{field: "qwen"}))
    check_installed(Tracking())


def test_nothing_is_started_unasked(tmp_path: Path) -> None:
    assert start_trackers(Tracking(), run="run", key="0123", directory=tmp_path) == []


def test_words_are_no_figures() -> None:
    record = {"iteration": 3, "loss": 2.5, "alarm": "the loss is nan"}
    assert numbers(record) == {"iteration": 3.0, "loss": 2.5}


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs this
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.delenv("WANDB_MODE")
    settings = {"run": "run", "key": "0123", "directory": tmp_path}
    (log,) = start_trackers(Tracking(wandb_project="qwen"), **settings)  # type: ignore[arg-type]
    log({"iteration": 1, "loss": 2.5, "alarm": "words"})
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.name == "run-0123.wandb"
    assert file.stat().st_size > 0


def test_mlflow_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = importlib.import_module("mlflow")  # in the group dev, so that this is never skipped
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for iteration in (1, 2):  # started, and resumed in the same curve
        settings = {"run": "run", "key": "0123", "directory": tmp_path}
        tracking = Tracking(mlflow_experiment="qwen")
        (log,) = start_trackers(tracking, **settings)  # type: ignore[arg-type]
        log({"iteration": iteration, "loss": 2.5 / iteration})
        mlflow.end_run()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("select run_uuid, key, step, value from metrics order by step")
        found = rows.fetchall()
    assert [row[1:] for row in found] == [("loss", 1, 2.5), ("loss", 2, 1.25)]
    assert len({row[0] for row in found}) == 1, json.dumps(found)


def test_a_server_that_is_away_is_said_once_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[int] = []

    def log(record: trackers.Record) -> None:
        asked.append(int(record["iteration"]))
        if record["iteration"] == 2:
            raise ConnectionError("503 from mlflow.example")

    tracker = Tracker("tracking.mlflow_experiment", lambda: log)
    tracker({"iteration": 1, "alarm": "only words"})
    for iteration in (1, 2, 3):
        tracker({"iteration": iteration, "loss": 2.5})
    assert asked == [1, 2]
    assert caplog.text.count("tracking.mlflow_experiment gets no more records: 503 from") == 1

    def start() -> trackers.Log:
        raise PermissionError("no such key")

    Tracker("tracking.wandb_project", start)({"iteration": 1, "loss": 2.5})
    assert caplog.text.count("tracking.wandb_project gets no more records: no such key") == 1


def test_two_trainings_of_one_config_have_curves_of_their_own(tmp_path: Path) -> None:
    """As those of a sweep over micro batches, whose checkpoints' directories are named alike."""
    one, two, old = (tmp_path / run / "digest" for run in ("one", "two", "old"))
    keys = [training_key(place, 0) for place in (one, two)]
    assert len(set(keys)) == 2 and keys[0] == training_key(one, 0) == training_key(one, 50)
    assert training_key(old, 50) == "digest"  # began before keys were kept
