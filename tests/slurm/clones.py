"""Clones of the repository that run on the cluster: their profile, their configs and their tools."""

from pathlib import Path

import yaml

STAGES = ("convert", "export", "preprocess", "preprocess_shard")
PARITY = ("parity_gate", "parity_convert", "parity_export")
# The profile as a person edits it for this cluster: ranks on CPUs, and nobody waits for long.
PROFILE = {
    "latency-wait": 30,
    "slurm-init-seconds-before-status-checks": 2,
    "seconds-between-status-checks": 3,
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
# The embedded default over two stages and for fewer iterations: four ranks hold one copy of the model.
ITERATIONS = 40
SMALL = {
    "pipeline_model_parallel_size": 2,
    "train_iters": ITERATIONS,
    "lr_warmup_iters": 2,
    "save_interval": 10,
    "eval_interval": 20,
    "eval_iters": 1,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}
# Less of each comparison than by default, and each of them.
PARITY_OF_LITTLE = {
    "held_out_documents": 1,
    "max_tokens": 64,
    "generated_tokens": 2,
    "trajectory_iterations": 1,
}
# Over four stages: eight ranks.
WIDE_ITERATIONS = 10
WIDE = {
    **SMALL,
    "pipeline_model_parallel_size": 4,
    "train_iters": WIDE_ITERATIONS,
    "eval_interval": 5,
}
CONFIGS = {
    "small.yaml": {"train": SMALL, "data": {"shards": 2}, "parity": PARITY_OF_LITTLE},
    "wide.yaml": {"train": WIDE, "data": {"shards": 2}, "parity": PARITY_OF_LITTLE},
}
# Two nodes of two ranks each, beside others.
SHARED = {
    "nodes": 2,
    "ranks_per_node": 2,
    "mem_mb": 3000,
    "sbatch_options": "",
    "slurm_partition": "third",
}
REQUEUE = {"slurm-no-requeue": False, "slurm-requeue": True}
# A squeue that takes its time, and that can be away.
SQUEUE = """#!/bin/sh
if [ -e away ]; then
  printf . >>unanswered
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
case "$*" in *--states=all*) touch asking && sleep 10 ;; esac
/usr/bin/squeue "$@"
code=$?
rm -f asking
exit $code
"""


def put_configs(clone: Path) -> None:
    """The configs of the scenarios."""
    for name, values in CONFIGS.items():
        (clone / name).write_text(yaml.safe_dump(values))


def put_squeue(clone: Path) -> Path:
    """A directory with a slow squeue in it."""
    tool = clone / "tools" / "squeue"
    tool.parent.mkdir()
    tool.write_text(SQUEUE)
    tool.chmod(0o755)
    return tool.parent


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
