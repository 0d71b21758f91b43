"""scripts/status.py and the last words of a run that failed: told from files as stages leave them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import run_script, write_config
from megaqwen.config import load_config
from megaqwen.layout import Layout
from megaqwen.provenance import write_json
from megaqwen.run_status import run_status
from megaqwen.summary import failed_lines, run_lines
from megaqwen.training.attempts import next_attempt, record_start
from megaqwen.training.logs import MORE_MEMORY, LaunchLog

SRUN = """srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=5.0
srun: error: node1: task 0: Terminated
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two runs: one that trains, and one that was only started."""
    results = tmp_path / "results"
    for name in ("waits", "trains"):
        run = results / "runs" / name
        run.mkdir(parents=True)
        write_config(run / "config.yaml", run=name, results=str(results))
    layout = Layout(config=load_config(results / "runs" / "trains" / "config.yaml"))
    for directory in (layout.model, layout.megatron, layout.data):
        write_json(directory / "manifest.json", {})
    write_json(layout.gate / "parity.json", {})
    write_json(layout.run / "train" / "job.json", {"job_id": "77", "node_list": "gpu[003-004]"})
    layout.checkpoints.mkdir(parents=True)
    with open(layout.checkpoints / "metrics.jsonl", "w") as stream:
        for number in range(1, 81):
            record = {"iteration": number, "loss": 9.0 - number / 20, "seconds": 0.5}
            stream.write(json.dumps(record) + "\n")
    logs = layout.run / "logs"
    logs.mkdir()
    (logs / "train.log").write_text("")
    (logs / "train.log.rank0.log").write_text("2026-11-25 10:00:00,000 INFO 320 iterations\n")
    return results


def status(results: Path, *runs: str) -> list[list[str]]:
    done = run_script("status.py", "--results", results, *runs)
    assert done.returncode == 0, done.stderr
    return [line.split("  ") for line in done.stdout.splitlines()]


def words(row: list[str]) -> list[str]:
    return [word.strip() for word in row if word.strip()]


def test_a_run_that_trains(results: Path) -> None:
    header, trains, waits = map(words, status(results))
    expected = ["run", "stage", "job", "nodes", "iteration", "loss", "left", "changed"]
    assert header == expected
    assert trains[:-1] == ["trains", "train running", "77", "gpu[003-004]", "80/320", "5", "2m00s"]
    assert waits == ["waits", "train waiting"]  # the model and the data are shared


def test_a_run_that_failed_and_one_that_is_done(results: Path) -> None:
    log = results / "runs" / "trains" / "logs" / "train.log.rank0.log"
    with open(log, "a") as stream:
        stream.write("2026-11-25 10:00:09,000 ERROR error: no memory\n")
    assert words(status(results, "trains")[1])[1] == "train failed"
    stages = ("train/manifest.json", "export/manifest.json")
    parities = ("parity/convert/parity.json", "parity/export/parity.json")
    for name in (*stages, *parities, "report/report.html"):
        write_json(results / "runs" / "trains" / name, {})
    row = words(status(results, "trains")[1])
    assert row == ["trains", "done", "77", "gpu[003-004]", "80/320", "5"]


def test_a_run_is_done_with_its_own_config_alone(results: Path) -> None:
    run = results / "runs" / "trains"
    layout = Layout(config=load_config(run / "config.yaml"))
    passed = {"verdict": "passed", "gates": [{"name": "logits", "value": 1e-6}], "positions": 9}
    for name in ("train/manifest.json", "export/manifest.json", "report/report.html"):
        write_json(run / name, {})
    for crossing in ("convert", "export"):
        write_json(run / "parity" / crossing / "parity.json", {"results": passed})
    (run / "export" / "hf").mkdir()
    said = run_lines(layout)
    assert len(said) == 5 and said[1].startswith("parity after export: passed")
    write_json(run / "train" / "manifest.json", {"config_digest": "of another learning rate"})
    assert run_status(run).stage == "train running"
    assert run_lines(layout) == [said[0], said[-1]]  # the crossing before training, checkpoints
    write_json(run / "train" / "manifest.json", {"config_digest": layout.stage_digest("train")})
    assert run_lines(layout) == said
    assert run_status(run).stage == "done"
    write_json(run / "export" / "manifest.json", {"inputs": {"train": {"sha256": "of another"}}})
    assert run_lines(layout) == [said[0], said[-1]]
    assert run_status(run).stage == "export waiting"
    write_json(run / "export" / "manifest.json", {})
    (layout.data / "manifest.json").unlink()
    assert run_status(run).stage == "preprocess waiting"  # it is made again
    shutil.rmtree(results / "shared")
    assert run_status(run).stage == "done"


def test_a_shard_at_work_and_one_that_failed(results: Path) -> None:
    run = results / "runs" / "trains"
    (Layout(config=load_config(run / "config.yaml")).data / "manifest.json").unlink()
    log = run / "logs" / "preprocess_shard.1-of-2.log"
    log.write_text("2026-11-25 10:00:00,000 INFO docs: 3 documents\n")
    assert run_status(run).stage == "preprocess running"
    log.with_name("preprocess_shard.2-of-2.log").write_text(
        "2026-11-25 10:00:09,000 ERROR error: docs.jsonl:3: no JSON\n"
    )
    assert run_status(run).stage == "preprocess failed"


def test_the_gate_that_only_the_report_waits_for(results: Path) -> None:
    run = results / "runs" / "trains"
    (run / "logs" / "parity_convert.log").write_text(
        "2026-11-25 10:00:09,000 ERROR error: logits differ\n"
    )
    assert run_status(run).stage == "train running"
    for name in ("train/manifest.json", "export/manifest.json", "parity/export/parity.json"):
        write_json(run / name, {})
    assert run_status(run).stage == "parity_convert failed"


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    done = run_script("status.py", "--results", tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr == f"error: no run below {tmp_path}/runs: --results names a config's results\n"
    )


def test_results_that_were_moved(results: Path, tmp_path: Path) -> None:
    results.rename(tmp_path / "elsewhere")
    assert run_status(tmp_path / "elsewhere" / "runs" / "trains").stage == "train running"


def log_of(results: Path, rank: int) -> Path:
    return results / "runs" / "trains" / "logs" / f"train.log.rank{rank}.log"


def test_a_run_that_was_told_to_stop(results: Path) -> None:
    stopped = "stopped: iteration 80 of 320 is saved"
    for rank, error in enumerate((stopped, "interrupted: nothing")):
        with open(log_of(results, rank), "a") as stream:
            stream.write(f"2026-11-25 10:00:09,000 ERROR {error}\n")
    assert run_status(results / "runs" / "trains").stage == "train stopped"
    assert f"train {stopped}" in failed_lines(results / "runs" / "trains" / "logs", 0)
    with open(log_of(results, 2), "a") as stream:
        stream.write("2026-11-25 10:00:08,000 ERROR error: no memory\n")
    assert run_status(results / "runs" / "trains").stage == "train failed"


def test_what_ranks_of_an_earlier_layout_said_is_past(results: Path) -> None:
    run = results / "runs" / "trains"
    log_of(results, 2).write_text("2026-11-25 09:00:00,000 ERROR error: no memory\n")
    assert run_status(run).stage == "train failed"
    layout = Layout(config=load_config(run / "config.yaml"))
    start = next_attempt(layout.checkpoints, resumed=0, ranks=2, log=log_of(results, 0))
    record_start(layout.checkpoints, start)
    assert run_status(run).stage == "train running"


def test_a_run_that_is_not_there_or_whose_config_is_refused_hides_no_other(results: Path) -> None:
    write_config(results / "runs" / "waits" / "config.yaml", model={"source": "nowhere"})
    done = run_script("status.py", "--results", results, "other", "waits", "trains")
    assert done.returncode == 2
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["other", "no", "config"], ["waits", "no", "config"]]
    assert rows[3][:3] == ["trains", "train", "running"]
    assert "error: other: " in done.stderr and "no run of that name was started" in done.stderr
    assert "error: waits: " in done.stderr and "nowhere" in done.stderr


def test_of_a_rank_without_memory_that_is_said(tmp_path: Path) -> None:
    killed = "slurmstepd-node2: error: StepId=5.0 exceeded memory limit (2 > 1), being killed"
    (tmp_path / "train.log").write_text("srun: error: node1: task 0: Killed\n")
    (tmp_path / "train.log.rank0.log").write_text("2026-11-25 10:00:00,000 INFO fine\n")
    log = LaunchLog(path=tmp_path / "train.log")
    log.start()
    with open(log.path, "a") as stream:
        stream.write(SRUN)
    assert MORE_MEMORY not in failed_lines(tmp_path, 0)
    assert log.reason() == SRUN.splitlines()[0]
    with open(log.path, "a") as stream:
        stream.write(f"{killed}\n")
    assert log.reason() == f"{killed} ({MORE_MEMORY})"
    assert MORE_MEMORY in failed_lines(tmp_path, 0)


@pytest.fixture
def of_ranks(tmp_path: Path) -> Callable[..., LaunchLog]:
    """A launcher's log, and what ranks said after its start, as `rank=words`, in that order of time."""

    def said(count: int, **ranks: str) -> LaunchLog:
        log = LaunchLog(path=tmp_path / "train.log", count=count)
        log.path.touch()
        log.start()
        for second, (rank, words) in enumerate(ranks.items()):
            with open(tmp_path / f"train.log.{rank}.log", "a") as stream:
                stream.write(f"2026-11-25 10:00:{second:02},000 {words}\nan ERROR of a library's\n")
        return log

    return said


def test_the_reason_is_the_error_that_came_first(of_ranks: Callable[..., LaunchLog]) -> None:
    log = of_ranks(3, rank2="ERROR error: a", rank1="ERROR error: b", rank0="ERROR interrupted: n")
    assert log.reason() == "error: a"


def test_what_ranks_that_were_told_to_end_say_comes_last(
    of_ranks: Callable[..., LaunchLog],
) -> None:
    log = of_ranks(3, rank0="ERROR interrupted: nothing", rank1="INFO fine", rank2="ERROR error: c")
    assert log.reason() == "error: c"
    log = of_ranks(2, rank0="ERROR interrupted: nothing", rank1="ERROR stopped: iteration 4")
    assert log.reason() == "stopped: iteration 4"
    log = of_ranks(2, rank0="ERROR interrupted: nothing", rank1="INFO fine")
    log.path.write_text(SRUN)
    assert log.reason() == SRUN.splitlines()[0]


def test_the_last_rank_is_the_one_that_speaks(
    of_ranks: Callable[..., LaunchLog], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {f"rank{number}": "INFO fine" for number in range(12)}
    log = of_ranks(11, **names | {"rank10": "ERROR error: said on the terminal"})
    assert [path.name for path in log.ranks()][-2:] == [
        "train.log.rank9.log",
        "train.log.rank10.log",
    ]
    log.say_failure()
    assert "ended without a message" not in capsys.readouterr().err
    log = of_ranks(11, **names | {"rank3": "ERROR error: no memory"})
    log.say_failure()
    said = capsys.readouterr().err
    assert "train.log.rank3.log: error: no memory" in said
    assert "train.log.rank10.log: ended without a message" in said and "rank11" not in said


def test_of_a_rank_that_was_killed_the_last_lines_are_said(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(SRUN)
    (tmp_path / "train.log.rank0.log").write_text("2026-11-25 10:00:00,000 INFO fine\n")
    (tmp_path / "train.log.rank1.log").write_text("".join(f"line {n}\n" for n in range(9)))
    lines = failed_lines(tmp_path, 0)
    assert lines[0] == "train failed: a rank was killed or its node was lost"
    assert "srun: error: node2: task 1: Killed" in lines
    at = lines.index(f"the last lines of {tmp_path / 'train.log.rank1.log'}:")
    assert lines[at + 1 :] == [f"  line {number}" for number in range(4, 9)]
    assert not any("rank0" in line for line in lines)
    # An error that a rank logged says more than how the others ended.
    with open(tmp_path / "train.log.rank1.log", "a") as stream:
        stream.write("2026-11-25 10:00:09,000 ERROR error: no memory\n")
    assert failed_lines(tmp_path, 0) == ["train failed: no memory"]
    os.utime(tmp_path / "train.log.rank1.log", (1, 1))
    assert failed_lines(tmp_path, 2)[0].startswith("train failed: a rank was killed")
