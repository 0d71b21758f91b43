"""What the Slurm profile asks of sbatch and srun, word for word, for clusters that no test has.

sbatch and srun are recorders here: their arguments are the outcome. tests/slurm has the real ones.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import yaml
from checkout import (
    Checkout,
    copy_repository,
    overlay,
    put_stubs,
    put_transformer_engine,
)

from commands import ROOT
from megaqwen.provenance import sha256_file

RECORDER = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
name, *words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open("{{records}}", "a") as stream:
    stream.write(json.dumps([name, *words]) + chr(10))
if name == "sacctmgr":
    print("lab")
if name == "sbatch":
    run = pathlib.Path("run-the-job")
    if run.exists() and "rule_" + run.read_text() in words:
        subprocess.run(words[-1].removeprefix("--wrap="), shell=True)
    sys.exit("recorded")
if name == "srun":
    pathlib.Path("environment.json").write_text(json.dumps(dict(os.environ)))
    sys.exit(1)
"""
CONDA = f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
if words[0] == "--version":
    print("conda 25.1.0")
elif words[0] == "info":
    print(json.dumps({{"conda_prefix": "/opt/conda", "platform": "linux-64"}}))
elif words[0] == "config":
    print(json.dumps({{"get": {{"channel_priority": "strict"}}}}))
elif "create" in words:
    pathlib.Path(words[words.index("--prefix") + 1], "conda-meta").mkdir(parents=True)
"""
TOOLS = ("sbatch", "srun", "sacctmgr", "sinfo", "scontrol", "squeue", "sacct")
PACKAGES = "packages"
# 128 ranks of one replica each.
TRAIN = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "micro_batch_size": 1,
    "global_batch_size": 128,
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone where all that training needs is there, and recorders in place of Slurm."""
    checkout = copy_repository(tmp_path_factory.mktemp("cluster"))
    put_stubs(checkout)
    shutil.copy2(ROOT / "scripts" / "launch.py", checkout.directory / "scripts")
    overlay(checkout, "one.yaml", run="one", train=TRAIN)
    checkout.run("parity_gate", "--configfile", "one.yaml")
    tools = checkout.directory / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).write_text(RECORDER.format(records=checkout.directory / "records.jsonl"))
        (tools / name).chmod(0o755)
    put_transformer_engine(checkout.directory / PACKAGES)
    return checkout


def recorded(checkout: Checkout, tool: str) -> list[list[str]]:
    """The words that each call of a tool got."""
    lines = (checkout.directory / "records.jsonl").read_text().splitlines()
    return [words for name, *words in map(json.loads, lines) if name == tool]


def snakemake(
    checkout: Checkout,
    *words: str,
    config: str = "one.yaml",
    environment: Mapping[str, str],
) -> str:
    """What Snakemake says of a run with the profile, among the recorders."""
    tools = {"PATH": f"{checkout.directory / 'tools'}:/usr/bin:/bin"}
    words = ("--profile", "slurm", *words, "--configfile", config)
    return checkout.snakemake(*words, environment={**tools, **environment}).stdout


def train_on(checkout: Checkout, **settings: Any) -> list[str]:
    """sbatch's words for training with settings of the profile's section train."""
    return ask(checkout, "train", retries=0, **settings)


def ask(
    checkout: Checkout, rule: str, *words: str, config: str = "one.yaml", **settings: Any
) -> list[str]:
    """sbatch's words for a rule's job with settings of its section in the profile.

    Without those that differ from run to run, and without the command of the job.
    """
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    resources = {**profile["set-resources"][rule], **settings}
    profile |= {"slurm-init-seconds-before-status-checks": 1, "retries": 0}
    profile["set-threads"][rule] = resources.pop("threads", profile["set-threads"][rule])
    profile["set-resources"][rule] = {k: v for k, v in resources.items() if v is not None}
    (checkout.directory / "profiles" / "slurm" / "config.yaml").write_text(yaml.safe_dump(profile))
    (checkout.directory / "records.jsonl").write_text("")
    packages = {"PYTHONPATH": str(checkout.directory / PACKAGES)}
    said = snakemake(checkout, rule, *words, config=config, environment=packages)
    assert "recorded" in said, said
    given = recorded(checkout, "sbatch")[-1]
    own = ("--job-name", "--output", "-D")
    return [
        word
        for before, word in zip(["", *given], given, strict=False)
        if before not in own and word not in own and not word.startswith("--wrap=")
    ]


def sbatch(before: str, after: str, rule: str = "train") -> list[str]:
    """The words around which those of the allocation are."""
    return shlex.split(
        f"--parsable --export=ALL --comment rule_{rule} {before} --no-requeue {after}"
    )


SHAPES = {
    "1x1": (
        {"nodes": 1, "gpus_per_node": 1},
        sbatch(
            "-t 1440 --nodes=1",
            "--ntasks=1 --cpus-per-task=12 --gpus-per-node=1 --ntasks-per-node=1"
            " --signal=USR1@300 --exclusive",
        ),
    ),
    "1x8": (
        {"nodes": 1},
        sbatch(
            "-t 1440 --nodes=1",
            "--ntasks=8 --cpus-per-task=12 --gpus-per-node=8 --ntasks-per-node=8"
            " --signal=USR1@300 --exclusive",
        ),
    ),
    "16x8, every option": (
        {
            "nodes": 16,
            "gpu_type": "h100",
            "slurm_account": "lab",
            "slurm_partition": "gpu-long",
            "qos": "high",
            "constraint": "infiniband&nvlink",
            "sbatch_options": "--exclusive --switches=1 --mail-type=FAIL",
            "mem_mb": 900000,
            "runtime": 2880,
            "save_seconds": 600,
            "threads": 6,
        },
        sbatch(
            "-A lab -p gpu-long -t 2880 -C 'infiniband&nvlink' --qos=high --mem 900000 --nodes=16",
            "--ntasks=128 --cpus-per-task=6 --gpus-per-node=h100:8 --ntasks-per-node=8"
            " --signal=USR1@600 --exclusive --switches=1 --mail-type=FAIL",
        ),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_sbatch_is_asked_for(checkout: Checkout, shape: str) -> None:
    settings, expected = SHAPES[shape]
    assert train_on(checkout, **settings) == expected


def test_two_nodes_and_a_container(checkout: Checkout) -> None:
    (checkout.directory / "run-the-job").write_text("train")
    image = {"container": "/shared/megaqwen.sif", "mounts": "/shared,/scratch"}
    # One CPU a rank, since of more the job is given what the machine has.
    settings = {"threads": 1, "environment": "NCCL_SOCKET_IFNAME=ib0"}
    assert train_on(checkout, **image, **settings) == sbatch(
        "-t 1440 --nodes=2",
        "--ntasks=16 --cpus-per-task=1 --gpus-per-node=8 --ntasks-per-node=8"
        " --signal=USR1@300 --exclusive",
    )
    # The job itself runs, up to srun.
    (words,) = recorded(checkout, "srun")
    assert words[: words.index("scripts/train.py")] == shlex.split(
        "--nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=1 --gpus-per-node=8"
        " --kill-on-bad-exit=1 --wait=0 --quit-on-interrupt"
        " apptainer exec --nv --bind /shared --bind /scratch /shared/megaqwen.sif python"
    )
    environment = json.loads((checkout.directory / "environment.json").read_text())
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0" and environment["OMP_NUM_THREADS"] == "1"
    digest, stored = environment["MEGAQWEN_STORED_CONFIG"].split()  # by which its job was planned
    assert sha256_file(checkout.directory / stored) == digest
    assert environment["MEGAQWEN_GPUS_PER_NODE"] == "8"


def test_parity_over_two_nodes_has_a_gpu_of_each(checkout: Checkout) -> None:
    """Of which that of the last rank computes."""
    (checkout.directory / "run-the-job").write_text("parity_gate")
    overlay(checkout, "two.yaml", run="two", train={"tensor_model_parallel_size": 2})
    settings = {"max_ranks_per_node": 1, "gpus_per_node": 1, "slurm_partition": "gpu", "threads": 1}
    # A second try, which has twice the time and memory.
    second = ("parity_gate", "--attempt", "2")
    assert ask(checkout, *second, config="two.yaml", **settings) == sbatch(
        "-p gpu -t 120 --mem 32000 --nodes=2",
        "--ntasks=2 --cpus-per-task=1 --gpus-per-node=1 --ntasks-per-node=1",
        "parity_gate",
    )
    (words,) = recorded(checkout, "srun")
    assert words[: words.index(sys.executable)] == shlex.split(
        "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=1"
        " --cpu-bind=none --kill-on-bad-exit=1 --wait=0 --quit-on-interrupt"
    )


@pytest.mark.skipif(bool(find_spec("transformer_engine")), reason="Transformer Engine is here")
def test_no_training_waits_for_gpus_to_fail_on_them(checkout: Checkout) -> None:
    (checkout.directory / "records.jsonl").write_text("")
    refused(checkout, (), "takes Transformer Engine, which is not installed here: uv sync --extra")


def test_conda_has_nothing_for_gpus(checkout: Checkout) -> None:
    conda = checkout.directory / "tools" / "conda"
    conda.write_text(CONDA)
    conda.chmod(0o755)
    refused(checkout, ("--sdm", "conda"), "of which conda's environment has none: name a container")


def test_the_command_line_takes_nothing_from_the_profile_unsaid(checkout: Checkout) -> None:
    """Snakemake has the one or the other: training would be one of CPUs, in the default's memory."""
    words = ("--set-resources", "parity_gate:mem_mb=470000")
    refused(checkout, words, "how the ranks of training are started.* takes the place of all")


def refused(checkout: Checkout, words: Sequence[str], why: str) -> None:
    """Before any job is submitted."""
    (checkout.directory / "records.jsonl").write_text("")
    said = snakemake(checkout, "train", *words, environment={})
    assert re.search(why, said), said
    assert not recorded(checkout, "sbatch")
