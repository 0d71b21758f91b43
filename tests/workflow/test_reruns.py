"""Which edit makes which stages run again: Snakemake's own plan after a finished run.

Only the bodies of the stages are replaced (see checkout.py): the rules, their shell commands and what
Snakemake records of a job are the real ones.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import Checkout, copy_repository, overlay, put_stubs

from megaqwen.config import load_config
from megaqwen.config.tiny_shapes import tiny_hf_config
from megaqwen.layout import Layout
from megaqwen.provenance import sha256_file

CORPUS = {"name": "lines", "source": "files", "files": ["data/*.jsonl"], "text_field": "text"}
BASE: dict[str, Any] = {
    "model": {"source": "hub", "repo_id": "Qwen/Qwen3-0.6B", "revision": "main"},
    "data": {"corpora": [{**CORPUS, "weight": 1.0}, {**CORPUS, "name": "more", "weight": 2.0}]},
    "train": {
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "micro_batch_size": 4,
    },
}

EXPORT = {"export", "parity_export", "report"}
TRAIN = {"train", *EXPORT}
DATA = {"preprocess", "parity_gate", "parity_convert", *TRAIN}
ALL = {"download", "convert", *DATA}
# The gate's ranks compute what training's would.
GATE = {"parity_gate", "parity_convert", *TRAIN}
PARITY = {"parity_convert", "parity_export", "report"}
# A run of another name shares download, convert, preprocess and the gate.
ANOTHER_RUN = {"parity_convert", *TRAIN}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone whose run of BASE is done; tests copy it."""
    checkout = copy_repository(tmp_path_factory.mktemp("finished"))
    put_stubs(checkout)
    (checkout.directory / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (checkout.directory / "data" / name).write_text('{"text": "a"}\n')
    overlay(checkout, "base.yaml", **BASE)
    ran = checkout.run("all", "--configfile", "base.yaml")
    assert ran == sorted(ALL), "each stage once"
    assert checkout.plan("all", "--configfile", "base.yaml") == set()
    return checkout


@pytest.fixture
def checkout(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy to edit, with every file's time kept."""
    directory = tmp_path / "checkout"
    shutil.copytree(finished.directory, directory, symlinks=True)
    return Checkout(directory)


def section(name: str, **values: Any) -> dict[str, Any]:
    """BASE with other values in one of its sections."""
    return {name: values}


def corpora(*changes: dict[str, Any]) -> dict[str, Any]:
    """BASE with its corpora changed, in order."""
    pairs = zip(BASE["data"]["corpora"], changes, strict=True)
    return section("data", corpora=[{**corpus, **change} for corpus, change in pairs])


CONFIG_EDITS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the learning rate": (section("train", lr=0.004), TRAIN),
    "the seed of training": (section("train", seed=7), TRAIN),
    "more iterations": (section("train", train_iters=640), TRAIN),
    "a parallel size": (section("train", pipeline_model_parallel_size=2), GATE),
    "the dtype of training": (section("train", bf16=True), GATE),
    "the length of a sample": (section("train", seq_length=64), GATE),
    "the optimizer's memory": (section("train", adam_beta2=0.95), GATE),
    "a train option at the value that it has": (section("train", lr=0.005), set()),
    "the revision": (section("model", revision="v1.0"), ALL),
    "the repository": (section("model", repo_id="Qwen/Qwen3-1.7B"), ALL),
    "the model's source": ({"model": {"source": "tiny", "architecture": "qwen3", "seed": 1}}, ALL),
    "the seed of the samples": (section("data", seed=7), TRAIN),
    "a weight": (corpora({}, {"weight": 5.0}), TRAIN),
    "the split": (section("data", split=[90, 5, 5]), GATE),
    "a text field": (corpora({"text_field": "body"}, {}), DATA),
    "the files of a corpus": (corpora({"files": ["data/a.jsonl"]}, {}), DATA),
    "the parity prompts": (section("parity", texts=["Another text."]), PARITY),
    "the parity bound": (section("parity", max_logit_difference=1e-5), PARITY),
    "the held-out documents": (section("parity", held_out_documents=2), PARITY),
    "the steps that are compared": (section("parity", trajectory_iterations=0), PARITY),
    "whether gradients are compared": (section("parity", gradients=False), PARITY),
    "the parity prompts and the learning rate": (
        section("parity", texts=["Another text."]) | section("train", lr=0.004),
        {"parity_convert", *TRAIN},
    ),
    "when it is logged and saved": (section("train", log_interval=5, save_interval=40), set()),
    "which checkpoints stay": (section("checkpoints", keep_last=2, verify="sizes"), set()),
    "where curves go": (section("tracking", wandb_project="qwen"), set()),
    "a disk of each node's own": (section("scratch", directory="$TMPDIR", keep=True), set()),
    "the export's dtype": (section("export", dtype="bfloat16"), EXPORT),
    "the export's shard size": (section("export", max_shard_gigabytes=1.0), EXPORT),
    "the run's name": ({"run": "another"}, ANOTHER_RUN),
    "the place of the results": ({"results": "elsewhere"}, ALL),
}


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_an_edit_of_the_config(finished: Checkout, edit: str) -> None:
    changes, expected = CONFIG_EDITS[edit]
    file = overlay(finished, f"{edit.replace(' ', '-')}.yaml", **changes)
    assert finished.plan("all", "--configfile", "base.yaml", file) == expected


SFT = ("--configfile", "base.yaml", "sft.yaml")
SFT_EDITS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "what becomes of long conversations": (section("data", too_long="drop"), TRAIN),
    "a field of conversations": (corpora({"conversation_field": "chat"}, {}), DATA),
    "pretraining again": (section("data", kind="pretrain"), ANOTHER_RUN),  # its data is there
}


@pytest.fixture(scope="module")
def tuned(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A copy whose run is SFT now: the data, and what is made of it, was redone."""
    directory = tmp_path_factory.mktemp("tuned") / "checkout"
    shutil.copytree(finished.directory, directory, symlinks=True)
    checkout = Checkout(directory)
    overlay(checkout, "sft.yaml", data={"kind": "sft"})
    assert set(checkout.run("all", *SFT)) == DATA
    return checkout


@pytest.mark.parametrize("edit", SFT_EDITS)
def test_an_edit_of_the_config_of_sft(tuned: Checkout, edit: str) -> None:
    changes, expected = SFT_EDITS[edit]
    file = overlay(tuned, f"{edit.replace(' ', '-')}.yaml", **changes)
    assert tuned.plan("all", *SFT, file) == expected


def remove(path: Path) -> None:
    path.unlink()


def append(text: str) -> Callable[[Path], None]:
    """An edit that adds a line."""

    def edit(path: Path) -> None:
        path.write_text(path.read_text() + text)

    return edit


FILE_EDITS: dict[str, tuple[str, Callable[[Path], None], set[str]]] = {
    "a comment in the config": ("config/config.yaml", append("# a comment\n"), set()),
    "a comment in a script": ("scripts/train.py", append("# a comment\n"), set()),
    "a comment in a rule": ("rules/train.smk", append("# a comment\n"), set()),
    "a comment in the library": ("scripts/megaqwen/layout.py", append("# a comment\n"), set()),
    "a profile": ("profiles/local/config.yaml", append("keep-going: true\n"), set()),
    "a longer file of a corpus": ("data/b.jsonl", append("{}"), DATA),
    "another file of a corpus": ("data/c.jsonl", lambda path: path.write_text("{}"), DATA),
    "a report that is gone": ("results/runs/default/report/report.html", remove, {"report"}),
    "an export that is gone": ("results/runs/default/export/manifest.json", remove, EXPORT),
    "a verdict that is gone": (
        "results/runs/default/parity/export/parity.json",
        remove,
        {"parity_export", "report"},
    ),
    # Its products are there: to train again takes more than a missing file.
    "a training that is gone": ("results/runs/default/train/manifest.json", remove, set()),
}


@pytest.mark.parametrize("edit", FILE_EDITS)
def test_an_edit_of_a_file(checkout: Checkout, edit: str) -> None:
    name, change, expected = FILE_EDITS[edit]
    change(checkout.directory / name)
    assert checkout.plan("all", "--configfile", "base.yaml") == expected


def test_training_needs_no_corpus_that_is_tokenized(checkout: Checkout) -> None:
    shutil.rmtree(checkout.directory / "data")
    assert checkout.plan("all", "--configfile", "base.yaml") == set()
    file = overlay(checkout, "rate.yaml", train={"lr": 0.004})
    assert checkout.plan("all", "--configfile", "base.yaml", file) == TRAIN
    done = checkout.snakemake("--profile", "local", "preprocess", "--configfile", "base.yaml")
    assert done.returncode != 0 and "data/*.jsonl" in done.stdout


def test_training_needs_no_file_of_a_corpus_that_is_tokenized(checkout: Checkout) -> None:
    """Of two that one pattern matches, one is gone: tokenized anew, training would begin anew."""
    words = ("all", "--configfile", "base.yaml")
    (manifest,) = (checkout.directory / "results/shared/data").glob("*/manifest.json")
    made, when = json.loads(manifest.read_text()), manifest.stat()
    files = [checkout.directory / "data" / name for name in ("a.jsonl", "b.jsonl")]
    relative = [str(file.relative_to(checkout.directory)) for file in files]
    sources = [{"path": path, "bytes": files[0].stat().st_size} for path in relative]
    made["results"]["corpora"] = {"mine": {"sources": sources}}
    manifest.write_text(json.dumps(made))
    os.utime(manifest, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert checkout.plan(*words) == set()
    files[1].unlink()
    assert checkout.plan(*words) == set()
    then = files[0].stat()
    files[0].write_text('{"text": "other"}\n')  # with the time of the one before
    os.utime(files[0], ns=(then.st_atime_ns, then.st_mtime_ns))
    assert checkout.plan(*words) >= {"preprocess", "train"}


def test_what_is_made_of_a_model_directory_stays_when_that_is_gone(checkout: Checkout) -> None:
    model = checkout.directory / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = ("--configfile", "base.yaml", "path.yaml")
    overlay(checkout, "path.yaml", model={"source": "path", "path": str(model)})
    assert checkout.run("convert", *words) == ["convert", "download"]
    shutil.rmtree(model)
    assert checkout.plan("convert", *words) == set()
    shutil.rmtree(checkout.directory / "results")
    assert checkout.plan("convert", *words) == {"convert", "download"}


def test_an_edit_of_a_model_on_disk(checkout: Checkout) -> None:
    """Whatever makes tokens of text is part of the model, as its weights are."""
    model = checkout.directory / "model"
    model.mkdir()
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "merges.txt"):
        (model / name).write_text("{}")
    here = overlay(checkout, "here.yaml", model={"source": "path", "path": str(model)})
    words = ("download", "--configfile", "base.yaml", here)
    assert checkout.run(*words) == ["download"]
    for name in ("chat_template.jinja", "merges.txt"):
        append("\n")(model / name)
        assert checkout.plan(*words) == {"download"}, name
        shutil.copystat(model / "config.json", model / name)  # as it was


@pytest.mark.parametrize("stage", ["download", "convert", "preprocess", "gate", "train", "export"])
def test_a_new_recipe_of_a_stage(checkout: Checkout, stage: str) -> None:
    again = {
        "download": ALL,
        "convert": ALL - {"download", "preprocess"},
        "preprocess": DATA,
        "gate": {"parity_gate", "parity_convert", *TRAIN},
        "train": TRAIN,
        "export": EXPORT,
    }
    path = checkout.directory / "scripts/megaqwen/layout.py"
    lines = path.read_text().splitlines(keepends=True)
    (line,) = (number for number, text in enumerate(lines) if f'    "{stage}": ' in text)
    lines[line] = f'    "{stage}": 99,\n'
    path.write_text("".join(lines))
    assert checkout.plan("all", "--configfile", "base.yaml") == again[stage]


@pytest.fixture
def digested(checkout: Checkout) -> Checkout:
    """Its training's manifest tells the config's digest, as a real one does."""
    run = checkout.directory / "results" / "runs" / "default"
    layout = Layout(config=load_config(run / "config.yaml"))
    manifest = run / "train" / "manifest.json"
    made = manifest.stat()
    digest = {"config_digest": layout.stage_digest("train")}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **digest}))
    os.utime(manifest, ns=(made.st_atime_ns, made.st_mtime_ns))
    hf = checkout.directory / layout.model / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(tiny_hf_config("qwen3")))
    return checkout


def test_a_training_that_is_done_need_not_fit_other_ranks(digested: Checkout) -> None:
    ranks = ("--set-resources", "train:ranks_per_node=3")
    assert digested.plan("all", "--configfile", "base.yaml", *ranks) == set()
    words = ("--profile", "local", "-n", "all", "--configfile", "base.yaml", *ranks)
    done = digested.snakemake(*words, "--forcerun", "train")
    assert done.returncode != 0 and "this training does not fit" in done.stdout


def test_another_config_is_noticed_where_snakemake_has_no_record(digested: Checkout) -> None:
    shutil.rmtree(digested.directory / ".snakemake")
    given = (
        "--configfile",
        overlay(digested, "lr.yaml", **{**BASE, "train": {**BASE["train"], "lr": 1}}),
    )
    assert digested.plan("all", "--configfile", "base.yaml") == set()
    done = digested.snakemake("--profile", "local", "-n", "all", *given)
    assert done.returncode != 0
    assert "train was made with another config, or by another version" in done.stdout
    assert "add --forcerun train" in done.stdout
    assert digested.plan("all", *given, "--forcerun", "train") == TRAIN


def test_a_job_that_waited_runs_the_config_that_it_was_submitted_with(checkout: Checkout) -> None:
    overlay(checkout, "base.yaml", **BASE, run="another")
    words = ("--profile", "local", "--configfile", "base.yaml", "--target-jobs", "train:")
    job = ("--mode", "remote", "-n", "-p", "--force", *words)
    config = checkout.directory / "results" / "runs" / "default" / "config.yaml"
    given = f"{sha256_file(config)} results/runs/default/config.yaml"
    done = checkout.snakemake(*job, environment={"MEGAQWEN_STORED_CONFIG": given})
    assert done.returncode == 0, done.stdout
    assert "--output results/runs/default/train" in done.stdout
    assert "another" not in done.stdout
    config.write_text("run: default")
    done = checkout.snakemake(*job, environment={"MEGAQWEN_STORED_CONFIG": given})
    assert done.returncode != 0 and "was replaced since this job was submitted" in done.stdout


def test_the_number_of_ranks_and_nodes_retrains_nothing(finished: Checkout) -> None:
    resources = ["--set-resources", "train:ranks_per_node=4", "train:nodes=1"]
    assert finished.plan("all", "--configfile", "base.yaml", *resources) == set()
    assert finished.plan("all", "--configfile", "base.yaml", profile="slurm") == set()
    words = ["--set-threads", "train=3", "--configfile", "base.yaml"]
    assert finished.plan("all", *words) == set()


@pytest.mark.parametrize("failing", ["parity_gate", "parity_convert"])
def test_nothing_trains_before_the_gate_has_passed(checkout: Checkout, failing: str) -> None:
    shutil.rmtree(checkout.directory / "results")
    (checkout.directory / "failing.json").write_text(f'["{failing}"]')
    (checkout.directory / "ran.txt").write_text("")
    done = checkout.snakemake("--profile", "local", "all", "--configfile", "base.yaml")
    assert done.returncode != 0
    ran = (checkout.directory / "ran.txt").read_text().split()
    assert ("train" in ran) == (failing != "parity_gate")
    assert "report" not in ran


SHARDED = ("--configfile", "base.yaml", "sharded.yaml")
SHARDS = {"preprocess_shard_1", "preprocess_shard_2", "preprocess_shard_3"}


@pytest.fixture
def sharded(finished: Checkout, checkout: Checkout) -> Checkout:
    """A finished run whose data is to be made of three shards, without its data."""
    overlay(checkout, "sharded.yaml", data={"shards": 3})
    shutil.rmtree(checkout.directory / "results" / "shared" / "data")
    return checkout


def test_the_number_of_shards_tokenizes_nothing_again(
    sharded: Checkout, finished: Checkout
) -> None:
    more = overlay(finished, "more-shards.yaml", data={"shards": 5})
    assert finished.plan("all", "--configfile", "base.yaml", more) == set()
    assert SHARDS | {"preprocess"} <= set(sharded.run("all", *SHARDED))
    data = sharded.directory / "results" / "shared" / "data"
    shutil.rmtree(next(data.glob("*.shards")))  # as the merge does
    overlay(sharded, "sharded.yaml", data={"shards": 5})
    for words in (SHARDED, ("--configfile", "base.yaml")):
        assert sharded.plan("all", *words) == set()
    append("{}")(sharded.directory / "data" / "b.jsonl")
    assert sharded.plan("all", *SHARDED) == DATA | {"preprocess_shard"}


def test_a_shard_that_failed_is_done_again_alone(sharded: Checkout) -> None:
    (sharded.directory / "failing.json").write_text('["preprocess_shard_2"]')
    words = ("--profile", "local", "preprocess", *SHARDED)
    assert sharded.snakemake(*words, "--keep-going").returncode != 0
    (sharded.directory / "failing.json").write_text("[]")
    assert sharded.run("preprocess", *SHARDED) == ["preprocess", "preprocess_shard_2"]
