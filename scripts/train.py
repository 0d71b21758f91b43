"""One rank of training: Megatron's own `pretrain` over a converted Qwen checkpoint.

Started once for each rank, by torchrun or by srun (scripts/launch.py does either):

    torchrun --nproc-per-node 2 scripts/train.py --config results/runs/default/config.yaml \\
        --model HF_DIRECTORY --checkpoint MEGATRON_CHECKPOINT --data DATA_DIRECTORY --output DIRECTORY

launch.py also keeps two starts from writing to one place and sets damaged checkpoints aside.

The first start takes its weights from --checkpoint; later ones resume from DIRECTORY/checkpoints/DIGEST,
named after the config of training, which gets metrics.jsonl and tensorboard/ too. When the last one
is saved, DIRECTORY gets manifest.json.
"""

import argparse
import signal
import sys
from pathlib import Path

from megaqwen.console import run_command, stage_parser
from megaqwen.environment import prepare_gpu
from megaqwen.provenance import write_json
from megaqwen.run_status import JOB
from megaqwen.slurm_job import this_job
from megaqwen.training.ranks import rank_from_environment


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = stage_parser(__doc__)
    options.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    options.add_argument("--checkpoint", type=Path, required=True, help="convert's checkpoint")
    options.add_argument("--data", type=Path, required=True, help="preprocess's directory")
    options.add_argument("--output", type=Path, required=True, help="the run's train directory")
    return options


def train(arguments: argparse.Namespace) -> None:
    """Everything but the command line; heavy imports wait until the input was checked."""
    from megaqwen.training.preflight import check_run

    run = check_run(arguments)
    if rank_from_environment().speaks:
        record_job(run.output / JOB)
    prepare_gpu()
    from megaqwen.training.gpus import check_gpus

    check_gpus()
    from megaqwen.training.run import pretrain_run

    pretrain_run(run)


def record_job(file: Path) -> None:
    """Write which Slurm job this is, for whoever asks what the run is at; outside of one nothing."""
    if job := this_job():
        write_json(file, job)
    else:
        file.unlink(missing_ok=True)


def save_before_time_limit() -> None:
    """Take SIGUSR1, which Slurm sends before a job's time limit, as SIGTERM: to save and leave.

    Not SIGTERM itself: who cancels a job sends that, and a few seconds later SIGKILL.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))


def main() -> int:
    """Run one rank; only the last rank, which knows the loss, speaks on the terminal."""
    options = parser()
    rank = rank_from_environment()
    save_before_time_limit()
    return run_command(train, options, quiet=not rank.speaks, log_suffix=f"rank{rank.rank}.log")


if __name__ == "__main__":
    sys.exit(main())
