"""metrics.jsonl and the live line: what a kill and a resumption leave, and how the time is told."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from megaqwen.training import metrics
from megaqwen.training.metrics import MetricsWriter, read_metrics
from megaqwen.words import counted, duration, readable_bytes


class Terminal(io.StringIO):
    """A terminal that keeps what was written to it."""

    def isatty(self) -> bool:
        return True


class TensorBoard:
    """Stands where Megatron's writer does."""

    def __init__(self) -> None:
        self.scalars: list[tuple[Any, ...]] = []

    def add_scalar(self, *values: Any) -> None:
        self.scalars.append(values)

    def add_text(self, tag: str, text: str) -> str:
        return f"{tag}: {text}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def writer(
    file: Path,
    iterations: int = 10,
    first_iteration: int = 0,
    terminal: Any = None,
    **settings: Any,
) -> MetricsWriter:
    return MetricsWriter(
        TensorBoard(),
        file=file,
        terminal=terminal or io.StringIO(),
        iterations=iterations,
        tokens_per_iteration=1000,
        ranks=4,
        first_iteration=first_iteration,
        **settings,
    )


def iterate(writer: MetricsWriter, clock: list[float], iteration: int, seconds: float) -> str:
    """One iteration as Megatron makes it; what the terminal got of it."""
    before = len(writer.terminal.getvalue())  # type: ignore[attr-defined]
    clock[0] += seconds
    writer.add_scalar("lm loss", 8 - iteration / 10, iteration)
    writer.add_scalar("learning-rate", 1e-3, iteration)
    writer.add_scalar("grad-norm", 2.5, iteration)
    writer.add_scalar("batch-size", 8, iteration)
    writer.end_iteration(iteration)
    return str(writer.terminal.getvalue()[before:])  # type: ignore[attr-defined]


def evaluate(writer: MetricsWriter, kind: str, loss: float, iteration: int) -> None:
    writer.evaluated = kind
    writer.add_scalar("lm loss validation", loss, iteration)


# Reading


def test_a_record_has_its_iterations_figures(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "metrics.jsonl"
    iterate(writer(file), clock, 1, 2.0)
    assert read_metrics(file) == [
        {
            "iteration": 1,
            "loss": 7.9,
            "learning_rate": 1e-3,
            "gradient_norm": 2.5,
            "tokens": 1000,
            "seconds": 2.0,
            "tokens_per_second": 500.0,
            "tokens_per_second_per_rank": 125.0,
        }
    ]


def test_arithmetic_memory_and_waits_are_recorded(tmp_path: Path, clock: list[float]) -> None:
    """4 ranks at 125 tokens/s of 8 TFLOP each: 1000 TFLOP/s, of a device that promises 2000."""
    file = tmp_path / "metrics.jsonl"
    ours = writer(file, flops_per_token=8e12, peak_tflops=2000.0, memory=lambda: 77)
    clock[0] += 2.0
    ours.end_iteration(1, {"data_wait_seconds": 0.5, "straggler_rank": 3})
    (record,) = read_metrics(file)
    assert (record["tflops_per_rank"], record["mfu"], record["memory_bytes"]) == (1000.0, 0.5, 77)
    assert (record["data_wait_seconds"], record["straggler_rank"]) == (0.5, 3)
    assert "MFU 50.0%" in ours.terminal.getvalue()  # type: ignore[attr-defined]
    tags = {values[0] for values in ours.tensorboard.scalars}
    assert {"mfu", "tflops-per-rank", "data-wait-seconds"} <= tags


def test_a_save_stall_is_no_iterations_time(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "metrics.jsonl"
    ours = writer(file)
    iterate(ours, clock, 1, 1.0)
    clock[0] += 30
    ours.end_save(1, 30.0)
    iterate(ours, clock, 2, 1.0)
    first, save, second = read_metrics(file)
    assert (first["seconds"], second["seconds"]) == (1.0, 1.0)
    assert save == {"iteration": 1, "save_seconds": 30.0}


def test_alarms_are_kept_and_said(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    ours = writer(file)
    iterate(ours, clock, 1, 1.0)
    clock[0] += 1
    ours.add_scalar("lm loss", float("nan"), 2)
    with caplog.at_level("WARNING", logger="megaqwen.training"):
        ours.end_iteration(2)
    assert "ALARM after iteration 2: the loss is nan" in caplog.text
    assert {"iteration": 2, "alarm": "the loss is nan"} in read_metrics(file)


def test_the_first_iteration_after_a_start_may_be_no_number_too(
    tmp_path: Path, clock: list[float]
) -> None:
    resumed = writer(tmp_path / "metrics.jsonl", first_iteration=3)
    clock[0] += 1
    resumed.add_scalar("lm loss", float("nan"), 4)
    resumed.end_iteration(4)
    (alarm,) = (row for row in read_metrics(tmp_path / "metrics.jsonl") if "alarm" in row)
    assert alarm == {"iteration": 4, "alarm": "the loss is nan"}
    assert list(resumed.alarms.seconds) == []


def test_an_iteration_of_which_no_loss_is_told_is_no_usual_one(
    tmp_path: Path, clock: list[float]
) -> None:
    file = tmp_path / "metrics.jsonl"
    ours = writer(file, iterations=100)
    for iteration in range(1, 31):
        if iteration % 2:
            clock[0] += 1.0
            ours.end_iteration(iteration)
        else:
            iterate(ours, clock, iteration, 1.0)
    assert not [record for record in read_metrics(file) if "alarm" in record]
    assert len(ours.alarms.losses) == 15


def test_time_left_is_recorded_once_it_is_known(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "metrics.jsonl"
    ours = writer(file)
    for iteration in range(1, 6):
        iterate(ours, clock, iteration, 2.0)
    assert [row.get("seconds_left") for row in read_metrics(file)] == [None, None, None, 12.0, 10.0]


def test_a_terminal_gets_a_bar(tmp_path: Path, clock: list[float]) -> None:
    ours = writer(tmp_path / "metrics.jsonl", terminal=Terminal())
    assert "█" * 6 + "░" * 14 + " iteration 3/10" in iterate(ours, clock, 3, 1.0)


def test_everything_reaches_megatrons_own_writer(tmp_path: Path, clock: list[float]) -> None:
    ours = writer(tmp_path / "metrics.jsonl")
    iterate(ours, clock, 1, 1.0)
    tags = [values[0] for values in ours.tensorboard.scalars]
    assert tags == ["lm loss", "learning-rate", "grad-norm", "batch-size"]
    assert ours.add_text("a", "b") == "a: b"


def test_a_resumed_iteration_counts_as_it_was_last(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "metrics.jsonl"
    first = writer(file)
    for iteration in range(1, 6):
        iterate(first, clock, iteration, 1.0)
        if iteration == 4:
            evaluate(first, "validation", 7.7, 4)
    resumed = writer(file, first_iteration=3)  # the checkpoint that was saved last
    for iteration in range(4, 7):
        iterate(resumed, clock, iteration, 0.5)
        if iteration == 4:
            evaluate(resumed, "validation", 7.25, 4)
    records = read_metrics(file)
    rows = [record for record in records if "loss" in record]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["seconds"] for row in rows] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    validation = [record for record in records if "validation_loss" in record]
    assert validation == [{"iteration": 4, "validation_loss": 7.25}]


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_a_line_that_a_kill_cut_short_costs_no_other(
    tmp_path: Path, clock: list[float], kept: int
) -> None:
    file = tmp_path / "metrics.jsonl"
    first = writer(file)
    iterate(first, clock, 1, 1.0)
    whole = file.read_bytes()
    iterate(first, clock, 2, 1.0)
    file.write_bytes(file.read_bytes()[: len(whole) + kept])
    assert [record["iteration"] for record in read_metrics(file)] == [1]
    resumed = writer(file, first_iteration=1)
    iterate(resumed, clock, 2, 3.0)
    assert [record["seconds"] for record in read_metrics(file)] == [1.0, 3.0]


def test_validation_and_test_are_told_apart(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    ours = writer(file)
    iterate(ours, clock, 1, 1.0)
    for kind, loss in (("validation", 7.5), ("validation", 7.5), ("test", 7.6), ("test", 7.6)):
        evaluate(ours, kind, loss, 1)  # Megatron reports the last one twice
    assert [record for record in read_metrics(file) if "loss" not in record] == [
        {"iteration": 1, "test_loss": 7.6},
        {"iteration": 1, "validation_loss": 7.5},
    ]
    assert len(file.read_text().splitlines()) == 3


def test_an_iteration_without_a_loss_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"iteration": 2, "loss": 1.0}, {"iteration": 1, "seconds": 0.5}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(file) == rows[::-1]


# The live line


def test_the_time_left_is_steady_and_never_nothing(tmp_path: Path, clock: list[float]) -> None:
    ours = writer(tmp_path / "metrics.jsonl", iterations=100, terminal=Terminal())
    lines = [iterate(ours, clock, 1, 30.0)]  # warms up
    for iteration in range(2, 101):
        lines.append(iterate(ours, clock, iteration, 0.3 if iteration % 2 else 0.1))
        if iteration % 10 == 0:
            clock[0] += 60.0
            ours.end_pause()  # a checkpoint was saved
    told = [line.rpartition("tokens/s")[2].strip() for line in lines]
    assert told[:3] == ["", "", ""] and told[-1] == ""
    assert all(told[3:-1]) and "0s left" not in told
    assert told[-2] == "1s left"
    for iteration, text in enumerate(told[20:-1], start=21):
        seconds = int(text.removesuffix("s left"))
        assert abs(seconds - 0.2 * (100 - iteration)) <= 1.01, (iteration, text)


def test_neither_saving_nor_evaluating_is_an_iterations_time(
    tmp_path: Path, clock: list[float]
) -> None:
    file = tmp_path / "metrics.jsonl"
    ours = writer(file)
    iterate(ours, clock, 1, 1.0)
    clock[0] += 50
    evaluate(ours, "validation", 7.0, 1)
    clock[0] += 50
    ours.end_pause()
    iterate(ours, clock, 2, 2.0)
    seconds = [record["seconds"] for record in read_metrics(file) if "loss" in record]
    assert seconds == [1.0, 2.0]


def test_a_terminal_has_one_line_and_a_file_about_twenty(
    tmp_path: Path, clock: list[float]
) -> None:
    shown = []
    for terminal in (Terminal(), io.StringIO()):
        ours = writer(tmp_path / "metrics.jsonl", iterations=200, terminal=terminal)
        for iteration in range(1, 201):
            iterate(ours, clock, iteration, 1.0)
        shown.append(terminal.getvalue())
    assert shown[0].count("\n") == 1 and shown[0].count("\r\033[K") == 200
    lines = shown[1].splitlines()
    assert len(lines) == 20
    assert lines[0] == "  iteration 10/200  loss 7.0000  1,000 tokens/s  3m10s left"
    assert lines[-1] == "  iteration 200/200  loss -12.0000  1,000 tokens/s"


# Words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.01, "1s"), (59, "59s"), (59.5, "1m00s"), (185, "3m05s"), (7620, "2h07m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_counts() -> None:
    assert [readable_bytes(size) for size in (1, 999, 1000, 1.94e6, 5e9, 2e12, 0.4)] == [
        *("1 byte", "999 bytes", "1.0 kB", "1.9 MB", "5.0 GB", "2.0 TB", "0 bytes")
    ]
    assert [counted(n, "document") for n in (1, 2000)] == ["1 document", "2,000 documents"]
