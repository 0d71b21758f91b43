"""What scripts/launch.py would start: the words that torchrun and srun get."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from commands import options, run_script
from megaqwen.training.attempts import read_attempts

COMMAND = ["scripts/train.py", "--config", "a b.yaml", "--model", "hf"]
FORBIDDEN = {"torch", "megatron", "transformers", "numpy"}


def launch(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    words += ("--log", str(tmp_path / "deep/log"), "--dry-run", *COMMAND)
    return run_script("launch.py", *words, environment={"PYTHONPROFILEIMPORTTIME": "1"})


def dry_run(tmp_path: Path, *words: str) -> list[str]:
    """The words of the command that is printed; they can be pasted into a shell."""
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "megaqwen.training.launch" in imported and not FORBIDDEN & imported
    assert not list(tmp_path.iterdir())
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


def test_torchrun_starts_the_ranks_of_this_machine(tmp_path: Path) -> None:
    assert dry_run(tmp_path, "--launcher", "torchrun", "--ranks-per-node", "2") == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--", *COMMAND, "--log", str(tmp_path / "deep/log")),
    ]


def test_one_rank_is_started_alike_and_torchrun_is_the_default(tmp_path: Path) -> None:
    assert "--nproc-per-node=1" in dry_run(tmp_path)


@pytest.mark.parametrize("gpus", [0, 8])
def test_srun_has_every_flag_spelled_out(tmp_path: Path, gpus: int) -> None:
    flags = {"nodes": 2, "ranks_per_node": 8, "cpus_per_rank": 12, "gpus_per_node": gpus}
    bound = {"cpu_bind": "none"} if gpus else {}
    found = dry_run(tmp_path, *options(launcher="srun", **flags, **bound))
    end = found.index(sys.executable)
    assert found[0] == "srun"
    assert set(found[1:end]) >= {
        *("--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"),
        *("--kill-on-bad-exit=1", "--wait=0"),
    }
    assert ("--cpu-bind=none" in found) == bool(gpus)
    assert any(word.startswith("--cpu-bind") for word in found) == bool(gpus)
    assert ("--gpus-per-node=8" in found) == bool(gpus)
    assert any(word.startswith("--gpus-per-node") for word in found) == bool(gpus)
    assert found[end + 1 :] == [*COMMAND, "--log", str(tmp_path / "deep/log")]


def test_torchrun_over_nodes_is_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "--launcher", "torchrun", "--nodes", "2")
    assert done.returncode == 2
    assert "--nodes 1, or --launcher srun" in done.stderr


def test_srun_starts_the_ranks_in_a_container(tmp_path: Path) -> None:
    image = {"container": "/shared/megaqwen.sif", "mounts": "/shared,/scratch"}
    words = options(launcher="srun", gpus_per_node=8, **image)
    start = "apptainer exec --nv --bind /shared --bind /scratch /shared/megaqwen.sif python"
    assert f" {start} {COMMAND[0]} " in shlex.join(dry_run(tmp_path, *words))
    found = dry_run(tmp_path, *words, "--container-runtime", "pyxis", "--modules", "cuda/12 nccl")
    assert found[:5] == ["bash", "-lc", 'module load $0 && exec "$@"', "cuda/12 nccl", "srun"]
    here = Path.cwd()
    assert found[found.index("--quit-on-interrupt") + 1 : found.index(COMMAND[0]) + 1] == [
        "--container-image=/shared/megaqwen.sif",
        f"--container-workdir={here}",
        f"--container-mounts={here}:{here},/shared:/shared,/scratch:/scratch",
        *("python", COMMAND[0]),
    ]


def test_an_environment_that_is_none_is_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "--environment", "NCCL_DEBUG=INFO ib0")
    assert done.returncode == 2
    assert "--environment: ib0 is not NAME=VALUE" in done.stderr


def test_ranks_that_cannot_be_started_are_a_line_and_an_attempt(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    checkpoints = tmp_path / "checkpoints" / "digest"
    words = ("--launcher", "srun", "--log", tmp_path / "log", "--checkpoints", checkpoints)
    path = {"PATH": str(tmp_path / "bin")}  # without srun
    done = run_script("launch.py", *words, "train.py", environment=path)
    assert done.returncode == 2 and "error: srun: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (attempt,) = read_attempts(checkpoints)
    assert attempt.failed and "srun" in attempt.reason


@pytest.mark.parametrize("place", ["/dev/null", "/sys/checkpoints"])
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path, place: str) -> None:
    words = ("--log", tmp_path / "log", "--checkpoints", place, "train.py")
    done = run_script("launch.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "error: " in done.stderr and place.split("/")[1] in done.stderr
