"""What befalls trainings whose ranks are real, and the same trainings on one machine, alone.

A clone takes the stages before training from the first one, which makes them as jobs.
"""

import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clones import edit_profile
from cluster import Cluster
from disks import quota
from scenarios import Scenario
from trainings import Training, Until

SHARED = "results/shared"
TAKEN = ("models", "megatron", "data")  # of it
SMALL = ("--configfile", "config/experiments/cluster.yaml", "small.yaml")
WIDE = ("--configfile", "config/experiments/cluster.yaml", "wide.yaml")
Real = dict[str, tuple[Training, Callable[[Any], Scenario]]]


def real_trainings(cluster: Cluster, clone: Path) -> Real:
    """Each with its scenario: the whole run beside others, one by one, up to their gates after export."""
    whole = Training(cluster=cluster, clone=clone, words=("all", *SMALL))

    def copied(
        name: str, words: tuple[str, ...], changes: dict[str, object], profile: str = "slurm"
    ) -> Training:
        directory = Path(shutil.copytree(clone, clone.parent / name, symlinks=True))
        edit_profile(directory, changes, profile=profile)
        return Training(cluster=cluster, clone=directory, words=("parity", *words), profile=profile)

    def on_one_machine(name: str, words: tuple[str, ...], ranks: int) -> Training:
        settings = {"set-resources": {"train": {"ranks_per_node": ranks}}}
        return copied(name, words, settings, profile="local")

    alone = on_one_machine("alone", SMALL, ranks=4)
    nodes = {"slurm_partition": "wide"}
    train = {"nodes": 4, "ranks_per_node": 2, **nodes}
    wide = copied("wide", WIDE, {"default-resources": nodes, "set-resources": {"train": train}})
    wide_alone = on_one_machine("wide-alone", WIDE, ranks=8)
    return {
        "interrupted": (whole, interrupted),
        "alone": (alone, partial(undisturbed, whole=whole)),
        "wide": (wide, partial(undisturbed, whole=whole, before=alone)),
        "wide alone": (wide_alone, partial(undisturbed, whole=whole, before=wide)),
    }


def undisturbed(training: Training, whole: Training, before: Training | None = None) -> Scenario:
    """A training that nothing befalls, and its gates."""
    stages = [f"{SHARED}/{each}/*/manifest.json" for each in TAKEN]

    def are_made() -> bool:
        return whole.over or all(any(whole.clone.glob(each)) for each in stages)

    yield Until(what="the stages before training", holds=are_made)
    if before:
        yield training.after(before)
    on_their_way = shutil.ignore_patterns("*.shards")
    for place in TAKEN:
        source = whole.clone / SHARED / place
        shutil.copytree(source, training.clone / SHARED / place, ignore=on_their_way)
    training.start()
    yield training.ended(0)


def interrupted(training: Training) -> Scenario:
    """The whole run: one training that is stopped, starved, loses a node, its nodes and its quota."""
    image = training.clone / "quota.img"
    disk = quota(training.cluster, training.place, image)
    training.put(disk)
    run = training.start()
    yield training.writes(attempt=1)
    job = training.job()
    run.send(signal.SIGTERM)
    yield training.ended(1)
    yield training.gone(job)

    training.ask_for(nodes=2, ranks_per_node=2, mem_mb=700)
    training.start()
    yield training.ended(1)
    starved = len(training.attempts)

    training.ask_for(mem_mb=6000)
    training.start()
    yield training.writes(attempt=starved + 1, count=6)
    training.cluster.kill_node(training.cluster.nodes(training.job())[-1])
    yield training.writes(attempt=starved + 2)
    yield training.take_nodes("--partition=high")
    yield training.writes(attempt=starved + 3)
    disk.leave(kilobytes=2000)
    yield training.ended(1)

    disk.leave(kilobytes=500_000)
    training.start()
    yield training.ended(0)
