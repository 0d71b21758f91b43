"""A config's section sweep: the runs that it names, what they share, their table and arrays."""

import base64
import csv
import json
import math
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from commands import ROOT, run_script
from megaqwen.array_jobs import OPTION, ArraySettings, array_mistakes, own_command
from megaqwen.config import load_config
from megaqwen.config.reading import ConfigError, read_yaml
from megaqwen.layout import Layout
from megaqwen.provenance import read_json, sha256_file, write_json
from megaqwen.report.sweep import cell
from megaqwen.runs import Runs, read_runs
from megaqwen.submitted_jobs import forgets_too_soon, remembered_seconds
from megaqwen.summary import as_yaml, ended_lines, failed_lines_of_all, store_configs
from megaqwen.sweep_table import results, sweep_rows

GRID = {"train.lr": [1.0e-3, 2.0e-3], "train.seed": [1, 2]}


def runs(**overlay: Any) -> Runs:
    """The embedded default with sections laid over it."""
    found = read_runs(ROOT / "config" / "config.yaml", overlay)
    found.check()
    return found


def test_a_run_for_each_combination_whose_name_tells_its_values() -> None:
    found = runs(run="lr", sweep={"grid": GRID})
    assert found.names == tuple(
        f"lr.lr-{lr}.seed-{seed}" for lr in (0.001, 0.002) for seed in (1, 2)
    )
    config = found.layout("lr.lr-0.002.seed-1").config
    assert (config.run, config.train["lr"], config.train["seed"]) == (
        "lr.lr-0.002.seed-1",
        0.002,
        1,
    )
    assert found.label("lr.lr-0.002.seed-1") == {"train.lr": 0.002, "train.seed": 1}
    # One value more renames none.
    more = runs(run="lr", sweep={"grid": {**GRID, "train.lr": [5.0e-4, 1.0e-3, 2.0e-3]}})
    assert set(found.names) < set(more.names)


def test_named_runs_and_what_all_have_in_common() -> None:
    named = {"small": {"train": {"global_batch_size": 4, "micro_batch_size": 4}}, "qwen2": {"model": {
        "source": "tiny", "architecture": "qwen2"}}}  # fmt: skip
    found = runs(sweep={"runs": named, "grid": {"train.lr": [1.0e-3, 2.0e-3]}}, train={"seed": 7})
    assert found.names == (
        "default.small.lr-0.001",
        "default.small.lr-0.002",
        "default.qwen2.lr-0.001",
        "default.qwen2.lr-0.002",
    )
    small, _, qwen2, _ = (found.layout(name) for name in found.names)
    assert small.config.train["seed"] == qwen2.config.train["seed"] == 7
    assert small.config.train["global_batch_size"] == 4
    assert small.model != qwen2.model and len(found.each("model")) == 2
    # The first run that has a key stands for all that have.
    assert found.layout_of({"model": qwen2.model.name}) is qwen2


@pytest.mark.parametrize("text", ["1e-3", "12:30", "12e4567", "true", "007"])
def test_a_text_that_looks_like_a_number_is_stored_as_a_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml({"run": text, "texts": [text]}))
    assert read_yaml(path) == {"run": text, "texts": [text]}


def test_no_sweep_is_one_run_with_the_paths_that_it_has_alone() -> None:
    found = runs(run="one")
    alone = Layout(config=load_config(ROOT / "config" / "config.yaml", {"run": "one"}))
    assert found.names == ("one",) and not found.is_sweep
    assert found.layout("one").config == alone.config
    assert found.place("gate") == alone.gate and found.log("convert").parent == alone.run / "logs"


def test_a_run_does_not_begin_with_what_it_writes(tmp_path: Path) -> None:
    def started_from(run: str) -> Runs:
        model = {"source": "path", "path": str(tmp_path / "runs" / run / "export" / "hf")}
        return runs(results=str(tmp_path), run="one", model=model)

    started_from("another").check()
    with pytest.raises(ConfigError, match=r"^model\.path lies in this run's own directory"):
        started_from("one").check()


def test_a_run_of_a_sweep_is_the_run_that_its_stored_config_describes(tmp_path: Path) -> None:
    found = runs(results=str(tmp_path), run="lr", sweep={"grid": GRID})
    store_configs(found)
    for name in found.names:
        stored = Layout(config=load_config(tmp_path / "runs" / name / "config.yaml"))
        layout = found.layout(name)
        assert stored.checkpoints == layout.checkpoints
        assert stored.stage_digest("report") == layout.stage_digest("report")
    again = read_runs(tmp_path / "sweeps" / "lr" / "config.yaml")
    assert again.names == found.names and again.digest == found.digest


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"grid": {"train.lr": []}}, "sweep.grid.train.lr: has no value"),
        ({"grid": {"train.seed": [1, 1]}}, "sweep.grid.train.seed: has 1 twice"),
        ({"grid": {"run": ["a"]}}, "is what the runs of a sweep have in common"),
        ({"runs": {"a": {"results": "b"}}}, "sweep.runs.a.results: is what"),
        ({"runs": {"a b": {}}}, "sweep.runs.a b: is no name"),
        ({"gird": {}}, "sweep.gird: there is no such key: did you mean grid"),
        ({"grid": {f"train.{n}": list(range(30)) for n in "abc"}}, "27,000 runs"),
        ({"grid": {"train.data_path": ["a/b", "a b"]}}, "two runs would be named"),
        ({"grid": {"train.lr": "fast"}}, '"fast" is given, a list'),
        (3, "sweep: 3 is given, a mapping"),
        (False, "sweep: false is given, a mapping"),
        ([], "sweep: [] is given, a mapping"),
    ],
)
def test_a_sweep_that_cannot_be_made(sweep: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="the sweep cannot be made") as error:
        runs(sweep=sweep)
    assert words in str(error.value)


@pytest.mark.parametrize("written", ["1.10", "no", "1e3", "12:30", "null", "a b"])
@pytest.mark.parametrize("sweep", [{}, {"grid": GRID}], ids=["one run", "sweep"])
def test_a_name_that_is_none(tmp_path: Path, written: str, sweep: dict[str, Any]) -> None:
    file = tmp_path / "overlay.yaml"
    file.write_text(f"run: {written}\n")
    with pytest.raises(ConfigError) as error:
        read_runs(ROOT / "config" / "config.yaml", {"sweep": sweep}, [file]).check()
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith("    run: ") and "a name of letters, digits" in line


def test_the_mistakes_of_all_runs_at_once_and_each_of_them_once() -> None:
    grid = {"train.lr": ["fast", 1.0e-3], "train.seed": [1, 2, 3, 4], "export.dtyp": ["source"]}
    with pytest.raises(ConfigError) as error:
        runs(run="x", sweep={"grid": grid})
    lines = str(error.value).splitlines()
    assert lines[0] == "the configs of the sweep have 2 mistakes:"
    assert any(
        "train.lr" in line and "x.lr-fast.seed-3.dtyp-source and 1 more)" in line for line in lines
    )
    assert any("did you mean dtype" in line and "(in all 8 runs)" in line for line in lines)


def test_a_stage_takes_one_run() -> None:
    with pytest.raises(ConfigError, match="one run is asked for"):
        load_config(ROOT / "config" / "config.yaml", {"sweep": {"grid": GRID}})


def test_values_of_the_command_line_are_what_they_write() -> None:
    found = runs(sweep={"grid": {"train.lr": ["1e-3", "2e-3"]}}, train={"min_lr": "1e-4"})
    layout = found.layout("default.lr-0.001")
    assert (layout.config.train["lr"], layout.config.train["min_lr"]) == (0.001, 0.0001)


def write_verdict(place: Path, layout: Layout, word: str, *of: Path) -> None:
    """What parity leaves behind of the stages whose manifests are `of`: checkpoint and model."""
    inputs = {
        name: {"path": str(path), "sha256": sha256_file(path)}
        for name, path in zip(("checkpoint", "model"), of, strict=True)
    }
    file = place / {"passed": "parity.json", "failed": "failed.json"}[word]
    digest = layout.stage_digest("parity")
    write_json(file, {"config_digest": digest, "inputs": inputs, "results": {"verdict": word}})


@pytest.fixture
def trained(tmp_path: Path) -> Runs:
    """A sweep of four runs: three are trained, one of them with another config than it has now.

    What the gate said is of a model that was downloaded again since; of the two that count, one was
    exported, and the other one's export failed.
    """
    found = runs(results=str(tmp_path), run="lr", sweep={"grid": GRID})
    store_configs(found)
    first = found.layout(found.names[0])
    converted = [first.megatron / "manifest.json", first.model / "manifest.json"]
    for path in converted:
        write_json(path, {})
    write_verdict(first.gate, first, "failed", *converted)
    write_json(converted[1], {"again": True})
    for number, name in enumerate(found.names[:3]):
        layout = found.layout(name)
        digest = "of another config" if number == 2 else layout.stage_digest("train")
        results = {"iteration": 40, "last_loss": 5.0, "test_loss": None}
        results["validation_loss"] = 6.0 - number
        made = [layout.run / stage / "manifest.json" for stage in ("train", "export")]
        write_json(made[0], {"config_digest": digest, "results": results, "seconds": 100.0})
        write_json(made[1], {})
        word = "failed" if number == 0 else "passed"
        write_verdict(layout.run / "parity" / "export", layout, word, *made)
    return found


def test_the_table_of_a_sweep(trained: Runs) -> None:
    config = trained.directory / "config.yaml"
    done = run_script("sweep.py", "--config", config, "--output", trained.directory)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((trained.directory / "sweep.csv").open()))
    best = {"run": "lr.lr-0.001.seed-2", "train.lr": "0.001", "train.seed": "2"}
    best |= {"iterations": "40", "validation_loss": "5.0", "loss": "5.0", "test_loss": ""}
    assert rows[0] == {**best, "seconds": "100.0", "parity_convert": "", "parity_export": "passed"}
    assert [row["validation_loss"] for row in rows] == ["5.0", "6.0", "", ""]
    assert [row["parity_export"] for row in rows] == ["passed", "failed", "", ""]
    page = (trained.directory / "sweep.html").read_text()
    assert page.count("<svg") == 1 and page.count("not yet") >= 2 and "lr.lr-0.002.seed-1" in page
    lines = ended_lines(trained)
    assert lines[:2] == [
        "4 runs, parity after export passed in 1",
        "lowest validation loss: 5.0000 nats per token, of lr.lr-0.001.seed-2",
    ]
    assert yaml.safe_load(config.read_text())["sweep"] == {"grid": GRID}


def test_a_verdict_is_of_what_is_there_now(trained: Runs) -> None:
    first, second = (trained.layout(name) for name in trained.names[:2])
    assert results(first)["parity_convert"] is None
    converted = (first.megatron / "manifest.json", first.model / "manifest.json")
    write_verdict(first.gate, first, "failed", *converted)
    failed = read_json(first.gate / "failed.json")
    write_json(first.gate / "failed.json", {**failed, "config_digest": "of a run with other texts"})
    assert results(first)["parity_convert"] == results(second)["parity_convert"] == "failed"
    write_verdict(second.run / "parity" / "convert", second, "passed", *converted)
    assert results(second)["parity_convert"] == "passed"
    for stage in ("export", "train"):  # again, with the same config
        place = second.run / stage / "manifest.json"
        earlier = read_json(place)
        write_json(place, {**earlier, "finished": "later"})
        assert results(second)["parity_export"] is None
        write_json(place, earlier)
        assert results(second)["parity_export"] == "passed"


@pytest.mark.parametrize("lost", ["validation_loss", "last_loss"])
def test_a_loss_that_is_no_number_is_last(trained: Runs, lost: str) -> None:
    for name, loss in zip(trained.names[:2], (math.nan, 7.0), strict=True):
        path = trained.layout(name).run / "train" / "manifest.json"
        manifest = read_json(path)
        manifest["results"] |= {"validation_loss": None, lost: loss}
        write_json(path, manifest)
    rows = sweep_rows(trained)
    assert [row["run"] for row in rows[:2]] == [trained.names[1], trained.names[0]]
    assert "of lr.lr-0.001.seed-2" in ended_lines(trained)[1]


def test_a_value_is_shown_as_it_was_given() -> None:
    assert cell("train.calculate_per_token_loss", True) == "true"
    assert (cell("validation_loss", 5.0), cell("validation_loss", None)) == ("5.0000", "not yet")


def test_what_failed_is_said_with_the_runs_name(tmp_path: Path) -> None:
    found = runs(results=str(tmp_path), run="lr", sweep={"grid": GRID})
    error = "2026-01-02 03:04:05,678 ERROR error: two lines:\n  the second\n"
    for log in (found.log("convert"), Path(str(found.log("export")).format(run=found.names[1]))):
        log.parent.mkdir(parents=True)
        log.write_text(error)
    assert failed_lines_of_all(found, since=0) == [
        "lr: convert failed: two lines:\n  the second",
        f"{found.names[1]}: export failed: two lines:\n  the second",
    ]
    (alone,) = failed_lines_of_all(runs(results=str(tmp_path), run=found.names[1]), since=0)
    assert alone.startswith("export failed: ")


def test_a_task_of_an_array_runs_its_own_job() -> None:
    commands = {"2": "run the second", "3": "run the third"}
    packed = {task: zlib.compress(text.encode()).hex() for task, text in commands.items()}
    payload = base64.b64encode(json.dumps(packed).encode()).decode()
    words = ["snakemake", "--cores", "1", f"{OPTION}={payload}"]
    assert own_command(words, {"SLURM_ARRAY_TASK_ID": "3"}) == "run the third"
    assert own_command(words, {"SLURM_ARRAY_TASK_ID": "1"}) is None
    assert own_command(words, {}) is None
    assert own_command(words[:-1], {"SLURM_ARRAY_TASK_ID": "3"}) is None


def test_arrays_that_would_stall_or_go_wrong_are_refused() -> None:
    good: dict[str, Any] = {"rules": "train", "limit": 25, "jobs": 200, "jobs_at_once": None}
    good |= {"status_command": "squeue", "memory_added": False}
    wrong = {"limit": 1000, "jobs": 20, "jobs_at_once": 100, "status_command": "sacct"}
    assert list(array_mistakes(ArraySettings(**good), 200, [2])) == []
    for name, value in {**wrong, "memory_added": True}.items():
        (words,) = array_mistakes(ArraySettings(**{**good, name: value}), 200, [2])
        assert name.split("_")[0] in words
    (words,) = array_mistakes(ArraySettings(**good, not_by_squeue="Slurm forgets"), 200, [2])
    assert "sacct would be asked in place of squeue. Slurm forgets" in words
    (words,) = array_mistakes(ArraySettings(**good), 200, [2, 4])
    assert "different numbers of ranks" in words
    assert list(array_mistakes(ArraySettings(**{**good, **wrong}), 1, [2])) == []


def test_squeue_is_asked_where_slurm_remembers_ended_jobs_for_a_while() -> None:
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    first_look = profile["slurm-init-seconds-before-status-checks"]
    assert forgets_too_soon(60, first_look) is None
    assert "20 s (MinJobAge)" in (words := forgets_too_soon(20, 10) or "") and words.endswith(
        "to 6"
    )
    assert (forgets_too_soon(2, 1) or "").endswith("MinJobAge has to be more")
    assert "does not tell" in (forgets_too_soon(None, 10) or "")


@pytest.mark.parametrize("told", [None, 0, 300])
def test_where_slurm_forgets_no_job_squeue_is_asked(
    monkeypatch: pytest.MonkeyPatch, told: int | None
) -> None:
    """MinJobAge=0 says so. The executor, too, then knows it of what was told once."""
    plugin: Any = ModuleType("plugin")
    plugin.get_min_job_age = lambda: told
    monkeypatch.setitem(sys.modules, "plugin", plugin)
    executor = type("Executor", (), {"__module__": "plugin"})()
    found = remembered_seconds(executor)
    assert (forgets_too_soon(found, 40) is None) == (told is not None)
    plugin_asks = plugin.get_min_job_age()
    assert plugin_asks == found and (found is None) == (told is None)
