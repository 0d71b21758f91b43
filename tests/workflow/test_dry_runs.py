"""What Snakemake says before anything runs: each stage by its name, the cluster, and mistakes."""

import os
import resource
import shlex
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import Checkout, copy_repository, overlay, put_stubs

from commands import ROOT
from megaqwen.config.reading import read_yaml

UNTIL_GATE = {"download", "convert", "preprocess", "parity_gate"}
STAGES = {
    "download": {"download"},
    "convert": {"download", "convert"},
    "preprocess": {"download", "preprocess"},
    "train": {*UNTIL_GATE, "train"},
    "export": {*UNTIL_GATE, "train", "export"},
    "parity": {*UNTIL_GATE, "parity_convert", "train", "export", "parity_export", "parity"},
    "report": {*UNTIL_GATE, "parity_convert", "train", "export", "parity_export", "report"},
}
EXPERIMENTS = sorted((ROOT / "config" / "experiments").glob("*.yaml"))
FOR_CLUSTERS = ("cluster", "hub", "files", "qwen3-8b", "qwen3-30b-a3b")
HEAVY = ("torch", "transformers", "megatron", "huggingface_hub")
ROUNDS = 5
BOUND = 1.5  # times the dry run of a workflow of one rule


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_repository(tmp_path_factory.mktemp("dry"))


def files(directory: Path) -> set[Path]:
    """Everything but what Snakemake itself keeps and what Python caches."""
    left_out = {".snakemake", "__pycache__"}
    return {path for path in directory.rglob("*") if not left_out & set(path.parts)}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_by_its_name(checkout: Checkout, stage: str) -> None:
    assert checkout.plan(stage) == STAGES[stage]


def test_a_dry_run_says_why_and_writes_nothing(checkout: Checkout) -> None:
    before = files(checkout.directory)
    done = checkout.snakemake("--profile", "local", "-n", "all")
    assert "Reason: Missing output files: results/runs/default/train/manifest.json" in done.stdout
    assert files(checkout.directory) == before


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_plans(
    checkout: Checkout, tmp_path: Path, experiment: Path
) -> None:
    for name in ("articles/a.jsonl", "articles/b.jsonl.gz", "books/a.parquet"):
        (checkout.directory / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.directory / "data" / name).touch()
    words = ["all", "--configfile", experiment.relative_to(ROOT)]
    profile = "slurm" if experiment.stem in FOR_CLUSTERS else "local"
    shards = read_yaml(experiment).get("data", {}).get("shards", 1)
    expected = STAGES["report"] | ({"preprocess_shard"} if shards > 1 else set())
    expected |= {"sweep"} if "sweep" in read_yaml(experiment) else set()
    assert checkout.plan(*words, profile=profile) == expected


def documented() -> Iterator[str]:
    """The commands of the READMEs that run something."""
    for text in ("README.md", "config/README.md"):
        for line in (ROOT / text).read_text(encoding="utf-8").splitlines():
            if line.startswith("    snakemake ") and " --report " not in line:
                yield line.strip()


@pytest.mark.parametrize("command", sorted(set(documented())))
def test_what_the_documentation_says_plans(checkout: Checkout, command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    assert program == "snakemake"
    done = checkout.snakemake(*words, "-n")
    assert done.returncode == 0, done.stdout


def test_the_cluster_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    done = Checkout(clone).snakemake("--profile", "slurm", "all", "-n")
    assert done.returncode == 0, done.stdout
    train = done.stdout.split("train: megatron.training.pretrain", 1)[1].split("\n[", 1)[0]
    assert train.startswith(" on 2 node(s) with 8 rank(s) each")


def poison(directory: Path) -> dict[str, str]:
    """An environment in which importing a heavy package ends the process."""
    for name in HEAVY:
        (directory / f"{name}.py").write_text(
            "import os, sys\nos.write(2, b'POISON')\nos._exit(9)\n"
        )
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}


def test_no_plan_imports_a_heavy_package(tmp_path: Path) -> None:
    checkout = copy_repository(tmp_path / "checkout")
    (tmp_path / "poison").mkdir()
    environment = poison(tmp_path / "poison")
    done = checkout.snakemake("--profile", "local", "-n", "all", environment=environment)
    assert done.returncode == 0, done.stdout
    put_stubs(checkout)
    checkout.run("all")
    done = checkout.snakemake("--profile", "local", "all", environment=environment)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout
    # The poison works.
    code = "import torch"
    poisoned = subprocess.run(["python3", "-c", code], env={**os.environ, **environment})
    assert poisoned.returncode == 9


def test_all_mistakes_of_a_config_in_one_message(checkout: Checkout) -> None:
    file = overlay(
        checkout,
        "mistakes.yaml",
        train={"micro_batch_sise": 4, "lr": "fast", "global_batch_size": 0},
        export={"dtype": "float8"},
    )
    done = checkout.snakemake("--profile", "local", "all", "-n", "--configfile", file)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert done.stdout.count("the config has") == 1
    for words in (
        "train.micro_batch_sise",
        "did you mean micro_batch_size",
        "train.lr",
        '"fast"',
        "train.global_batch_size",
        "export.dtype",
        '"float8"',
        "bfloat16",
    ):
        assert words in done.stdout, words


def test_a_layout_that_does_not_fit_is_refused_before_anything_runs(checkout: Checkout) -> None:
    file = overlay(checkout, "layout.yaml", train={"tensor_model_parallel_size": 3})
    done = checkout.snakemake("--profile", "local", "all", "--configfile", file)
    assert done.returncode == 1
    assert "255 or 258 would be" in done.stdout and "Traceback" not in done.stdout
    assert not (checkout.directory / "results").exists()


def test_what_a_hub_model_is_not_needed_for_is_refused_before_it_is_downloaded(
    checkout: Checkout,
) -> None:
    model = {"source": "hub", "repo_id": "Qwen/Qwen3-0.6B"}
    file = overlay(checkout, "batch.yaml", model=model, train={"global_batch_size": 48})
    done = checkout.snakemake("--profile", "slurm", "all", "-n", "--configfile", file)
    assert done.returncode == 1
    assert "48" in done.stdout and "data parallel ranks" in done.stdout


def test_training_has_the_ranks_of_its_experts(checkout: Checkout) -> None:
    """Without a profile and without GPUs: as many as the layout takes, which parity starts, too."""
    layout = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "micro_batch_size": 4,
    }
    file = overlay(checkout, "experts.yaml", model={"architecture": "qwen3_moe"}, train=layout)
    done = checkout.snakemake("--cores", "1", "-n", "-p", "train", "--configfile", file)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" --nodes 1 --ranks-per-node 4 ") == 2  # the gate's and training's
    assert done.stdout.count(" --cpu-bind none ") == 1  # the gate's, whose last rank goes on alone


def test_tokenization_has_the_cores_that_it_is_given(checkout: Checkout) -> None:
    for words, threads in ((), 3), (("--set-threads", "preprocess=2"), 2):
        done = checkout.snakemake("--cores", "3", "-n", "-p", "preprocess", *words)
        assert done.returncode == 0, done.stdout
        assert f" RAYON_NUM_THREADS={threads} python scripts/preprocess.py" in done.stdout


ONE_RULE = """
rule all:
    output:
        "done.txt",
    shell:
        "touch {output}"
"""


def cpu_seconds(checkout: Checkout, *words: object) -> float:
    """Of Snakemake and of all that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = checkout.snakemake(*words)
    assert done.returncode == 0, done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_planning_takes_little_more_than_that_of_one_rule(tmp_path: Path) -> None:
    """In CPU time, since what else the machine does would decide the clock's; medians of rounds."""
    finished = copy_repository(tmp_path / "finished")
    put_stubs(finished)
    finished.run("all")
    fresh = copy_repository(tmp_path / "fresh")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "Snakefile").write_text(ONE_RULE)
    one = Checkout(tmp_path / "one")
    times: dict[str, list[float]] = {"one rule, -n": [], "all -n": [], "all, nothing to do": []}
    for _ in range(ROUNDS):
        times["one rule, -n"].append(cpu_seconds(one, "-n", "--cores", 1))
        times["all -n"].append(cpu_seconds(fresh, "--profile", "local", "-n", "all"))
        times["all, nothing to do"].append(cpu_seconds(finished, "--profile", "local", "all"))
    base = statistics.median(times["one rule, -n"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:20} {median:.2f} s, {median / base:.2f} times")
        assert median <= BOUND * base, times
