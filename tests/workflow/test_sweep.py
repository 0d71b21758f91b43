"""A sweep in one DAG: what its runs share is made once, one that fails keeps no other from going on."""

import re
import shutil
import time
from collections import Counter
from pathlib import Path

import fake_slurm
import pytest
import yaml
from checkout import (
    STATISTICS,
    Checkout,
    copy_repository,
    overlay,
    put_stubs,
    put_transformer_engine,
)

from megaqwen.training.attempts import read_attempts

SHARED = ("download", "convert", "preprocess", "parity_gate")
OWN = ("train", "parity_convert", "export", "parity_export", "report")
WORDS = ("--configfile", "config/experiments/sweep.yaml")
FITS = {"micro_batch_size": 1}  # 8 samples over the 8 replicas of the profile's 2 nodes
GRID = {"train.lr": [1.0e-3 + n * 1.0e-5 for n in range(40)], "train.seed": [1, 2, 3, 4, 5]}

FAILS = "lr-sweep.lr-0.005.seed-1"
FAILING = f"""
import pathlib, sys
from megaqwen.training import attempts
words = dict(zip(sys.argv, sys.argv[1:]))
if "/{FAILS}/" in words["--log"] and "--checkpoints" in words:
    place = pathlib.Path(words["--checkpoints"])
    place.mkdir(parents=True, exist_ok=True)
    this = attempts.next_attempt(place, resumed=0, ranks=2, log=pathlib.Path(words["--log"]))
    attempts.record_start(place, this)
    attempts.record_end(place, this, reached=0, reason="told to fail", failed=True)
    sys.exit("told to fail")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone whose stages do nothing."""
    checkout = copy_repository(tmp_path_factory.mktemp("sweep"))
    put_stubs(checkout)
    return checkout


def counted(said: str) -> dict[str, int]:
    """How many jobs of each rule a plan has."""
    table = STATISTICS.search(said)
    assert table, said
    return {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", table[0], re.MULTILINE)}


def test_two_hundred_runs_share_what_they_agree_on(checkout: Checkout) -> None:
    file = overlay(checkout, "large.yaml", run="large", sweep={"grid": GRID}, train=FITS)
    start = time.monotonic()
    done = checkout.snakemake("--profile", "slurm", "-n", "--quiet", "rules", "--configfile", file)
    print(f"a dry run of 200 runs: {time.monotonic() - start:.1f} s")
    assert done.returncode == 0, done.stdout
    plan = counted(done.stdout)
    assert {name: plan[name] for name in SHARED} == dict.fromkeys(SHARED, 1)
    assert {name: plan[name] for name in OWN} == dict.fromkeys(OWN, 200)
    assert plan["sweep"] == 1


def test_a_sweep_whose_runs_do_not_all_fit(checkout: Checkout) -> None:
    sweep = {"grid": {"train.global_batch_size": [8, 12], "train.seed": [1, 2]}}
    file = overlay(checkout, "unfit.yaml", sweep=sweep)
    done = checkout.snakemake("--profile", "local", "-n", "--configfile", file)
    assert done.returncode != 0 and "12 is not a multiple" in done.stdout, done.stdout


def test_one_run_fails_and_the_others_go_on(checkout: Checkout, tmp_path: Path) -> None:
    directory = tmp_path / "checkout"
    shutil.copytree(checkout.directory, directory, symlinks=True)
    copy = Checkout(directory)
    launch = directory / "scripts" / "launch.py"
    launch.write_text(FAILING + launch.read_text())
    (directory / "ran.txt").touch()
    retries = ("--set-resources", "train:retries=5")
    done = copy.snakemake("--profile", "local", "all", *WORDS, *retries)
    assert done.returncode != 0
    # Two attempts got nowhere: one more was made, which launch.py would have refused.
    (place,) = (directory / f"results/runs/{FAILS}/train/checkpoints").iterdir()
    assert len(read_attempts(place)) == 3
    (told,) = [line for line in done.stdout.splitlines() if "not tried again" in line]
    assert told.startswith(f"{FAILS}: train: ")
    ran = Counter((directory / "ran.txt").read_text().split())
    assert {name: ran[name] for name in SHARED} == dict.fromkeys(SHARED, 1)
    assert ran["train"] == ran["export"] == ran["report"] == 3
    # Once it is mended, it alone is redone; then there is nothing to do, nor for one of the runs alone.
    put_stubs(copy)
    again = Counter(copy.run("sweep", *WORDS))
    assert again == {"train": 1, "export": 1, "parity_export": 1, "report": 1}
    assert (directory / "results/sweeps/lr-sweep/sweep.html").is_file()
    assert copy.plan("all", *WORDS) == set()
    alone = "results/runs/lr-sweep.lr-0.002.seed-2/config.yaml"
    assert copy.plan("all", "--configfile", alone) == set()
    # One more value is one more run for each of the others'.
    more = {"sweep": {"grid": {"train.seed": [1, 2, 3]}}}
    file = overlay(copy, "more.yaml", **more)
    assert copy.plan("all", *WORDS, file) == {*OWN, "sweep"}


def hurry(checkout: Checkout) -> None:
    """Edit the Slurm profile for jobs that end at once, or fail once."""
    path = checkout.directory / "profiles" / "slurm" / "config.yaml"
    profile = yaml.safe_load(path.read_text())
    profile |= {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 5}
    profile["set-resources"]["train"]["retries"] = 0
    path.write_text(yaml.safe_dump(profile))


def test_the_trainings_are_one_array_and_each_task_trains_its_own_run(
    checkout: Checkout, tmp_path: Path
) -> None:
    copy = Checkout(tmp_path / "checkout")
    shutil.copytree(checkout.directory, copy.directory, symlinks=True)
    words = (*WORDS, overlay(copy, "fits.yaml", train=FITS))
    copy.run("all", "--until", "parity_gate", *words)
    hurry(copy)
    (copy.directory / "ran.txt").write_text("")
    # Slurm remembers jobs as long as it has to, and says so before there are some.
    environment = fake_slurm.install(tmp_path / "slurm") | {fake_slurm.REMEMBERS: "3"}
    environment |= put_transformer_engine(tmp_path / "packages")
    cluster = ("--profile", "slurm", "all", "--until", "train")
    done = copy.snakemake(*cluster, *words, environment=environment)
    logs = [path.read_text() for path in (tmp_path / "slurm" / "jobs").glob("*.log")]
    assert done.returncode == 0, done.stdout + "".join(logs)
    assert fake_slurm.calls(environment)["sbatch"] == 1
    assert (copy.directory / "ran.txt").read_text().split() == ["train"] * 4
    assert len(list((copy.directory / "results" / "runs").glob("*/train/manifest.json"))) == 4


def test_a_profile_whose_arrays_would_stall_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    environment = fake_slurm.install(tmp_path / "slurm")
    fits = overlay(checkout, "fits.yaml", train=FITS)
    environment |= put_transformer_engine(tmp_path / "packages")
    words = ("--profile", "slurm", "all", "--jobs", 3, *WORDS, fits)
    done = checkout.snakemake(*words, environment=environment | {fake_slurm.REMEMBERS: "20"})
    assert done.returncode != 0 and "sbatch" not in fake_slurm.calls(environment)
    assert "jobs is 3, and 4 jobs of a rule are ready at once" in done.stdout, done.stdout
    assert "remembers ended jobs for 20 s (MinJobAge)" in done.stdout, done.stdout
