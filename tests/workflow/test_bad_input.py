"""What a user gets wrong: one message that says what and where, a failing exit status, nothing left.

What the checks of one room refuse is tested with that room; here are the stages' commands, and what
somebody sees who runs Snakemake.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import NOTHING_TO_DO, Checkout, copy_repository, overlay

from commands import options, run_script, write_config
from megaqwen.summary import failed_lines
from workspace import Workspace

LINE = json.dumps({"text": "Some words that make up a document."}) + "\n"
CORPUS = {"name": "mine", "source": "files", "text_field": "text", "weight": 1.0}


def paths_below(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*")) if directory.exists() else []


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a stage that refused its input."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("  error: ")]
    return message


def words(workspace: Workspace, stage: str, **changed: object) -> list[str]:
    """The command line of a stage whose input is complete, but for what is changed."""
    stages = workspace.directory
    given: dict[str, object] = {"config": stages / "stages.yaml"}
    if stage not in ("download", "report"):
        given["model"] = stages / "model" / "hf"
    if stage in ("train", "parity"):
        given |= {"checkpoint": stages / "megatron" / "checkpoint", "data": stages / "data"}
    if stage == "parity":
        given |= {"crossing": "convert"}
    return options(**given | changed)


NO_STAGE: dict[tuple[str, str], str] = {
    ("convert", "model"): "there is no such model directory",
    (
        "preprocess",
        "model",
    ): "run the stage that makes it (snakemake --profile PROFILE all --forcerun download)",
    (
        "train",
        "model",
    ): "run the stage that makes it (snakemake --profile PROFILE all --forcerun download)",
    (
        "train",
        "checkpoint",
    ): "run the stage that makes it (snakemake --profile PROFILE all --forcerun convert)",
    (
        "train",
        "data",
    ): "run the stage that makes it (snakemake --profile PROFILE all --forcerun preprocess)",
    ("export", "checkpoint"): "no checkpoint",
    (
        "parity",
        "model",
    ): "run the stage that makes it (snakemake --profile PROFILE all --forcerun download)",
    ("parity", "checkpoint"): "no checkpoint",
    (
        "parity",
        "data",
    ): "run the stage that makes it (snakemake --profile PROFILE all --forcerun preprocess)",
    ("report", "manifests"): "run the stage that makes it",
}


@pytest.mark.parametrize(("stage", "missing"), NO_STAGE)
def test_an_input_that_was_not_made_is_named(
    workspace: Workspace, tmp_path: Path, stage: str, missing: str
) -> None:
    changed: dict[str, object] = {missing: tmp_path / "absent", "output": tmp_path / "out" / "x"}
    if stage == "report":
        changed |= {"run": tmp_path}
    message = refused(run_script(f"{stage}.py", *words(workspace, stage, **changed)))
    assert str(tmp_path / "absent") in message
    assert NO_STAGE[stage, missing] in message
    assert paths_below(tmp_path) == []


@pytest.mark.parametrize(
    "stage", ["download", "convert", "preprocess", "train", "export", "parity", "report"]
)
def test_no_config_file(workspace: Workspace, tmp_path: Path, stage: str) -> None:
    changed: dict[str, object] = {"config": tmp_path / "absent.yaml", "output": tmp_path / "out"}
    if stage == "export":
        changed |= {"checkpoint": tmp_path}
    if stage == "report":
        changed |= {"run": tmp_path, "manifests": tmp_path / "manifest.json"}
    message = refused(run_script(f"{stage}.py", *words(workspace, stage, **changed)))
    assert f"there is no config file {tmp_path / 'absent.yaml'}" in message
    assert paths_below(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (2 * LINE + "{no\n" + LINE, "second.jsonl:3: not JSON"),
        (2 * LINE + '{"txt": "a"}\n', "second.jsonl:3: no field 'text'"),
        ('{"text": " "}\n', "corpus empty is empty: 1 documents"),
    ],
)
def test_a_wrong_corpus_leaves_no_data_of_the_right_one(
    workspace: Workspace, tmp_path: Path, text: str, message: str
) -> None:
    corpora = []
    for name, content in (("first", 3 * LINE), ("second" if LINE in text else "empty", text)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(content)
        corpora.append({**CORPUS, "name": name, "files": [str(file)]})
    config = write_config(tmp_path / "config.yaml", data={"corpora": corpora})
    given = words(workspace, "preprocess", config=config, output=tmp_path / "out" / "data")
    assert message in refused(run_script("preprocess.py", *given))
    assert paths_below(tmp_path / "out") == []


def test_gpus_that_were_asked_for_and_are_not_there(workspace: Workspace, tmp_path: Path) -> None:
    given = words(workspace, "train", output=tmp_path / "out")
    hidden = {"MEGAQWEN_GPUS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}
    message = refused(run_script("train.py", *given, environment=hidden))
    assert "8 GPUs a node were asked for (gpus_per_node), and torch sees none (" in message
    assert "nvidia-smi" in message
    assert paths_below(tmp_path) == []


def test_no_share_for_validation(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config("no-validation", {}, data={"split": [100, 0, 0]})
    given = words(workspace, "train", config=config, output=tmp_path / "out")
    done = run_script("train.py", *given)
    refused(done)
    assert "data.split[1]: 0 is given" in done.stdout
    assert "train.eval_iters 0 (it is 1)" in done.stdout
    assert paths_below(tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_iters": 0, "eval_interval": None},
        pytest.param({"eval_iters": 1, "eval_interval": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_without_evaluations(workspace: Workspace, changes: dict[str, Any]) -> None:
    name = "-".join(f"{key}-{value}" for key, value in changes.items())
    checkpoints = workspace.train(name, 1, {"train_iters": 2, **changes})
    results = json.loads((checkpoints.parents[1] / "manifest.json").read_text())["results"]
    assert results["iteration"] == 2
    assert (results["validation_loss"] is None) == (changes["eval_iters"] == 0)


def test_a_verdict_stays_where_parity_cannot_start(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config("two-ranks", {"tensor_model_parallel_size": 2})
    verdict = tmp_path / "parity.json"
    verdict.write_text("{}")
    done = run_script("parity.py", *words(workspace, "parity", config=config, output=verdict))
    assert done.returncode == 2 and "takes 2 ranks" in done.stdout
    assert verdict.read_text() == "{}"


def test_parity_needs_no_held_out_documents(workspace: Workspace, tmp_path: Path) -> None:
    parity = {"held_out_documents": 0, "texts": ["Some words."]}
    data = {"split": [98, 2, 0]}
    config = workspace.config("no-held-out", {}, data=data, parity=parity)
    given = words(workspace, "parity", config=config, output=tmp_path / "parity.json")
    done = run_script("parity.py", *given)
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "parity.json").read_text())["results"]
    texts = {"given text 1", "chat"}  # what the config gives, and the same as a chat
    assert {text["text"] for text in results["texts"]} == texts | {
        f"{name} continued" for name in texts
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_repository(tmp_path_factory.mktemp("checkout"))


def no_config_file(checkout: Checkout) -> list[object]:
    (checkout.directory / "config" / "config.yaml").rename(checkout.directory / "moved.yaml")
    return ["all"]


def unknown_key(checkout: Checkout) -> list[object]:
    return ["all", "--configfile", overlay(checkout, "key.yaml", train={"learning_rate": 1.0})]


def results_are_a_file(checkout: Checkout) -> list[object]:
    (checkout.directory / "occupied").write_text("")
    return ["all", "--config", "results=occupied/below"]


def too_many_ranks(checkout: Checkout) -> list[object]:
    train = {"tensor_model_parallel_size": 1, "sequence_parallel": False, "micro_batch_size": 8}
    return ["all", "--configfile", overlay(checkout, "ranks.yaml", train=train)]


def no_corpus(checkout: Checkout) -> list[object]:
    data = {"corpora": [{**CORPUS, "files": ["absent/*.jsonl"]}]}
    return ["all", "--configfile", overlay(checkout, "corpus.yaml", data=data)]


def no_tracker(checkout: Checkout) -> list[object]:
    """Of MLflow a part is not to be found: `without_alembic`."""
    tracking = {"mlflow_experiment": "curves"}
    return ["all", "--configfile", overlay(checkout, "tracked.yaml", tracking=tracking)]


def without_alembic(checkout: Checkout) -> dict[str, str]:
    """The environment of a Python that has no such package."""
    directory = checkout.directory / "without"
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text("import sys\nsys.modules['alembic'] = None\n")
    return {"PYTHONPATH": str(directory)}


def broken_config_json(checkout: Checkout) -> list[object]:
    model = checkout.directory / "broken"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text('{"model_type": "qwen3",')
    changed = {"source": "path", "path": str(model)}
    return ["all", "--configfile", overlay(checkout, "broken.yaml", model=changed)]


@pytest.mark.parametrize(
    ("make", "message", "lines"),
    [
        (no_config_file, "there is no config file config/config.yaml", 6),
        (unknown_key, "train.learning_rate: Megatron has no such option", 8),
        (results_are_a_file, "occupied is a file: choose a directory", 6),
        (too_many_ranks, "train.global_batch_size", 40),
        (broken_config_json, "broken/config.json: not valid JSON", 40),
        (no_corpus, "corpus mine: no file matches 'absent/*.jsonl'", 40),
        (no_tracker, "tracking.mlflow_experiment is 'curves', but alembic is not installed", 45),
    ],
)
def test_snakemake_refuses_before_anything_runs(
    checkout: Checkout,
    make: Callable[[Checkout], list[object]],
    message: str,
    lines: int,
) -> None:
    try:
        words = ("--profile", "local", *make(checkout))
        done = checkout.snakemake(*words, environment=without_alembic(checkout))
    finally:
        if (checkout.directory / "moved.yaml").exists():
            (checkout.directory / "moved.yaml").rename(checkout.directory / "config/config.yaml")
    assert done.returncode != 0
    assert message in done.stdout
    assert "Traceback (most recent" not in done.stdout
    assert len(done.stdout.splitlines()) <= lines, done.stdout
    assert not (checkout.directory / "results").exists()


def test_a_failed_run_ends_with_why_and_goes_on_when_that_is_mended(
    checkout: Checkout, tiny_qwen3: Path
) -> None:
    model = checkout.directory / "model"
    shutil.copytree(tiny_qwen3, model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1])
    source = {"source": "path", "path": str(model)}
    given = ("download", "--configfile", overlay(checkout, "path.yaml", model=source))
    done = checkout.snakemake("--profile", "local", *given)
    assert done.returncode != 0
    (message,) = [line for line in done.stdout.splitlines()[-6:] if "download failed: " in line]
    assert "model.safetensors" in message and "truncated or damaged; fetch it again" in message
    assert not list((checkout.directory / "results" / "shared").rglob("*.json"))

    (model / "model.safetensors").write_bytes(weights)
    done = checkout.snakemake("--profile", "local", *given)
    assert done.returncode == 0, done.stdout
    assert "failed: " not in done.stdout
    assert NOTHING_TO_DO in checkout.snakemake("--profile", "local", *given).stdout


def test_the_last_error_of_each_stage_is_said_once(tmp_path: Path) -> None:
    def record(level: str, text: str) -> str:
        return f"2026-01-02 03:04:05,678 {level} {text}\n"

    wrong = record("ERROR", "error: two lines:\n  the second") + "[W101 03:04:05] a library\n"
    for rank in range(2):
        (tmp_path / f"train.log.rank{rank}.log").write_text(record("INFO", "started") + wrong)
    (tmp_path / "export.log").write_text(wrong + record("INFO", "done the second time"))
    (tmp_path / "train.log").write_text("torchrun: ERROR of its own\n")
    assert failed_lines(tmp_path, since=0) == ["train failed: two lines:\n  the second"]
    assert failed_lines(tmp_path, since=4e9) == []
