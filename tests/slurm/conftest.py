"""One Slurm cluster for all tests, clones of the repository on it, and what came of each scenario."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkout import Checkout, copy_repository, put_stubs
from clones import PROFILE, REQUEUE, SHARED, edit_profile, put_configs, put_squeue
from cluster import Cluster, reason_to_skip
from real_scenarios import real_trainings
from scenarios import (
    cancelled_and_lost,
    failing,
    lost_and_requeued,
    preempted,
    preempted_by_qos,
    stopped,
    swept,
    time_limit,
    together,
    unanswered,
)
from trainings import stub

from commands import ROOT

EXPERIMENTS = "config/experiments"
SWEEP = ("--configfile", f"{EXPERIMENTS}/cluster.yaml", f"{EXPERIMENTS}/sweep.yaml")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, or a skip that says what it takes."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    # MariaDB's user has to reach it; pytest's own directories are root's alone.
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    state.chmod(0o755)
    started = None
    try:
        started = Cluster(state)
        yield started
    finally:
        if started:
            started.stop()
        shutil.rmtree(state)
        state.with_name(f"{state.name}.log").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def clone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone whose profile is set for the cluster."""
    directory = copy_repository(tmp_path_factory.mktemp("clone") / "megaqwen").directory
    edit_profile(directory, PROFILE)
    put_configs(directory)
    return directory


@pytest.fixture(scope="session")
def stubs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with real launching of ranks that compute nothing, before its training; to be copied."""
    checkout: Checkout = copy_repository(tmp_path_factory.mktemp("stubs") / "megaqwen")
    put_stubs(checkout)
    scripts = checkout.directory / "scripts"
    shutil.copy2(ROOT / "scripts" / "launch.py", scripts)
    shutil.copy2(Path(__file__).with_name("stub_rank.py"), scripts / "train.py")
    edit_profile(checkout.directory, PROFILE)
    checkout.run("parity_gate", "parity_convert", "--configfile", f"{EXPERIMENTS}/cluster.yaml")
    return checkout.directory


@pytest.fixture(scope="session")
def ended(cluster: Cluster, clone: Path, stubs: Path) -> dict[str, Any]:
    """What came of each scenario: its training, or the exception that ended it."""

    def stubbed(name: str, profile: dict[str, object] | None = None, **settings: object) -> Any:
        return stub(cluster, stubs, name, profile or {}, **{**SHARED, **settings})

    low = {"slurm_partition": "low", "sbatch_options": "--exclusive"}
    requeued = stubbed("requeued", REQUEUE, **low)
    lost = stubbed("lost and requeued", REQUEUE, slurm_partition="fifth")
    busy = stubbed("unanswered")
    busy.environment = {"PATH": f"{put_squeue(busy.clone)}:{os.environ['PATH']}"}
    sweep = stubbed("swept")
    sweep.words = ("all", "--until", "train", *SWEEP)
    real = real_trainings(cluster, clone)
    others = (requeued, real["interrupted"][0], real["wide"][0])
    by_qos = partial(preempted_by_qos, others=others)
    return together(
        {
            **real,
            "requeued": (requeued, preempted),
            "preempted by QOS": (stubbed("qos", **low), by_qos),
            "cancelled and lost": (stubbed("lost", slurm_partition="second"), cancelled_and_lost),
            "lost and requeued": (lost, lost_and_requeued),
            "time limit": (stubbed("limit", runtime=3, save_seconds=60), time_limit),
            "stopped": (stubbed("stopped"), stopped),
            "unanswered": (busy, unanswered),
            "failing": (stubbed("failing"), failing),
            "swept": (sweep, swept),
        }
    )
