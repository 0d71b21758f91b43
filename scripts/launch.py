"""Start the ranks of a script, by torchrun on this machine or by srun in a Slurm allocation.

    python scripts/launch.py --launcher torchrun --ranks-per-node 2 --log LOG scripts/train.py ...
    python scripts/launch.py --launcher srun --nodes 2 --ranks-per-node 8 --gpus-per-node 8 \\
        --log LOG scripts/train.py ...

Each rank writes to LOG.rankN.log and the launcher itself to LOG; the terminal shows what the last rank
says. --dry-run prints the command. Exits as the ranks do.

SIGINT (Ctrl-C), SIGTERM and SIGHUP stop the ranks: the running iteration is finished and saved first.
A second one ends them at once. No rank outlives this command, which exits with 128 plus the signal.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from megaqwen.training.launch import Launch
from megaqwen.training.supervise import Ranks


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launcher", choices=("torchrun", "srun"), default="torchrun")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--cpus-per-rank", type=int, default=1)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, help="where they save, to say what was kept")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    arguments = parser.parse_args()
    if arguments.launcher == "torchrun" and arguments.nodes > 1:
        parser.error("torchrun starts ranks on this machine alone: --nodes 1, or --launcher srun")
    launch = Launch(
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_rank=arguments.cpus_per_rank,
    )
    words = [*arguments.command, "--log", str(arguments.log)]
    command = launch.torchrun(words) if arguments.launcher == "torchrun" else launch.srun(words)
    if arguments.dry_run:
        sys.stdout.write(shlex.join(command) + "\n")
        return 0
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.cpus_per_rank)}
    # The launchers' own words (a traceback of torchrun for each failure) go to the log.
    with open(arguments.log, "a", encoding="utf-8") as log:
        ranks = Ranks(
            command,
            hands_on_signals=arguments.launcher == "srun",
            say=say,
            stderr=log,
            env=environment,
        )
        code = ranks.wait()
    if code and ranks.signal:
        say(f"interrupted; {what_was_kept(arguments.checkpoints)}")
    elif code:
        show_failure(arguments.log)
    return code


def say(text: str) -> None:
    """Write a line to the terminal."""
    sys.stderr.write(f"  {text}\n")


def what_was_kept(checkpoints: Path | None) -> str:
    """Where the same command goes on."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt" if checkpoints else None
    if tracker and tracker.is_file():
        return f"the same command goes on after iteration {tracker.read_text().strip()}"
    return "no checkpoint was saved yet: the same command starts again"


def show_failure(log: Path) -> None:
    """Say which rank failed and with what, unless the last one has said it on the terminal."""
    errors = {}
    for path in sorted(log.parent.glob(f"{log.name}.rank*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line for line in lines if " ERROR " in line]
        errors[path] = found[-1].split(" ERROR ", 1)[1] if found else ""
    if errors and not list(errors.values())[-1]:
        for path, error in errors.items():
            say(f"{path.name}: {error or 'ended without a message'}")
    say(f"logs of the ranks: {log}.rank*.log")


if __name__ == "__main__":
    sys.exit(main())
