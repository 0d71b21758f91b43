"""One Slurm cluster for all tests here, and clones of the repository that run on it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkout import Checkout, copy_repository, put_stubs
from cluster import Cluster, reason_to_skip

from commands import ROOT

STAGES = ("convert", "export", "preprocess", "preprocess_shard")
PARITY = ("parity_gate", "parity_convert", "parity_export")
# The profile as a person edits it for this cluster: ranks on CPUs, and nobody waits for a filesystem.
PROFILE = {
    "latency-wait": 30,
    "slurm-init-seconds-before-status-checks": 2,
    "max-status-checks-per-second": 1,
    "default-resources": {"runtime": 60, "mem_mb": 3000, "slurm_account": "lab"},
    "set-threads": dict.fromkeys(STAGES, 2) | dict.fromkeys((*PARITY, "train"), 1),
    "set-resources": {
        **{rule: {"max_ranks_per_node": 2} for rule in PARITY},
        "train": {
            "nodes": 4,
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "mem_mb": 6000,
            "runtime": 60,
            "slurm_partition": "gpu",
        },
    },
}


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
    cluster_yaml = "config/experiments/cluster.yaml"
    checkout.run("parity_gate", "parity_convert", "--configfile", cluster_yaml)
    return checkout.directory


def edit_profile(clone: Path, changes: dict[str, object], profile: str = "slurm") -> None:
    """Lay values over a profile."""
    path = clone / "profiles" / profile / "config.yaml"
    path.write_text(yaml.safe_dump(laid_over(yaml.safe_load(path.read_text()), changes)))


def laid_over(values: dict, changes: dict) -> dict:  # type: ignore[type-arg]
    """`values` with `changes`, section by section."""
    result = dict(values)
    for key, change in changes.items():
        result[key] = laid_over(result.get(key, {}), change) if isinstance(change, dict) else change
    return result
