"""Start the ranks of a script, by torchrun on this machine or by srun in a Slurm allocation.

    python scripts/launch.py --launcher torchrun --ranks-per-node 2 --log LOG scripts/train.py ...
    python scripts/launch.py --launcher srun --nodes 2 --ranks-per-node 8 --gpus-per-node 8 \\
        --log LOG scripts/train.py ...

Each rank writes to LOG.rankN.log and the launcher itself to LOG; the terminal shows what the last rank
says. --dry-run prints the command. Exits as the ranks do.

With --checkpoints DIRECTORY no second start writes there while this one does (lease.json), ranks find its
newest whole checkpoint there (damaged ones are set aside), and attempts.jsonl tells what each start did.
With --trained-from MANIFEST, once for each stage that made what is trained from, the training of other
files is set apart. With --gpus-per-node, a rank of training that sees no GPU fails.

SIGINT (Ctrl-C), SIGTERM and SIGHUP stop the ranks: the running iteration is finished and saved first. So
does the end of the Snakemake that started it. A second signal ends them at once. No rank outlives this
command, which exits with 128 plus the signal.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megaqwen.checkpoints import beside, newest_finished, prepare
from megaqwen.console import EXIT_BAD_INPUT
from megaqwen.errors import STOPPED, InputError, disk_is_full, is_disk_full
from megaqwen.provenance import check_writable
from megaqwen.training import attempts
from megaqwen.training.launch import CONTAINERS, GPUS_PER_NODE, Launch
from megaqwen.training.lease import Lease, leased
from megaqwen.training.logs import LaunchLog
from megaqwen.training.origins import set_apart
from megaqwen.training.supervise import Ranks, stop_with_snakemake


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    code: int
    """The exit status."""
    signal: str | None
    """The first signal that asked to stop."""


def main() -> int:
    """The command."""
    options = parser()
    arguments = options.parse_args()
    if arguments.launcher == "torchrun" and arguments.nodes > 1:
        options.error("torchrun starts ranks on this machine alone: --nodes 1, or --launcher srun")
    launch = Launch(
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_rank=arguments.cpus_per_rank,
        cpu_bind=arguments.cpu_bind,
        modules=arguments.modules,
        container=arguments.container,
        container_runtime=arguments.container_runtime,
        mounts=arguments.mounts,
    )
    words = [*arguments.command, "--log", str(arguments.log)]
    command = launch.torchrun(words) if arguments.launcher == "torchrun" else launch.srun(words)
    if arguments.dry_run:
        sys.stdout.write(shlex.join(command) + "\n")
        return 0
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    log = LaunchLog(path=arguments.log, count=arguments.nodes * arguments.ranks_per_node)
    stop_with_snakemake()
    try:
        if arguments.checkpoints:
            return attempt(arguments, command, log)
        return run_ranks(arguments, command, {}, log).code
    except InputError as error:
        log.say(f"error: {error}", "ERROR")
    except OSError as error:
        what = f"error: {error.filename or 'the launcher'}: {error.strerror or error}"
        log.say(disk_is_full(error) if is_disk_full(error) else what, "ERROR")
    return EXIT_BAD_INPUT


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--launcher", choices=("torchrun", "srun"), default="torchrun")
    options.add_argument("--nodes", type=int, default=1)
    options.add_argument("--ranks-per-node", type=int, default=1)
    options.add_argument("--gpus-per-node", type=int, default=0)
    options.add_argument("--cpus-per-rank", type=int, default=1)
    options.add_argument("--cpu-bind", default="", help="srun's option of this name")
    options.add_argument("--modules", default="", help="environment modules to load before srun")
    options.add_argument("--container", default="", help="an image in which srun starts the ranks")
    options.add_argument("--container-runtime", choices=CONTAINERS, default="apptainer")
    options.add_argument(
        "--mounts", default="", help="what it shows beside this directory: PATH,PATH"
    )
    options.add_argument(
        "--environment", type=variables, default="", help="of the ranks: 'NAME=VALUE NAME=VALUE'"
    )
    options.add_argument("--log", type=Path, required=True)
    options.add_argument("--checkpoints", type=Path, help="where they save")
    options.add_argument(
        "--trained-from",
        type=Path,
        action="append",
        default=[],
        metavar="MANIFEST",
        help="of a stage whose files are trained from; may be given more than once",
    )
    options.add_argument(
        "--verify",
        choices=("checksums", "sizes"),
        default="checksums",
        help="what a checkpoint is checked by before it is resumed from",
    )
    options.add_argument(
        "--try-number",
        type=int,
        default=1,
        help="above 1, a scheduler's retry: refused where the last two attempts got nowhere",
    )
    options.add_argument("--dry-run", action="store_true", help="print the command only")
    options.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    return options


def attempt(arguments: argparse.Namespace, command: list[str], log: LaunchLog) -> int:
    """Run the ranks as the only ones that write to the checkpoints, and record what became of it."""
    directory = arguments.checkpoints
    check_writable(directory, named_by="the checkpoints' directory")
    lease = Lease(directory=directory, say=log.say)
    with leased(lease) as environment:
        if changed := set_apart(directory, arguments.trained_from):
            log.say(changed)
        prepared = prepare(directory, arguments.verify)
        for text in prepared.said:
            log.say(text)
        if not (prepared.iteration or changed) and (other := beside(directory)):
            log.say(other)
        record = attempts.next_attempt(
            directory,
            resumed=prepared.iteration,
            ranks=arguments.nodes * arguments.ranks_per_node,
            log=arguments.log,
        )
        if arguments.try_number > 1:
            attempts.check_progress(directory, record)
        attempts.record_start(directory, record)
        try:
            ended = run_ranks(arguments, command, environment, log, lease)
        except OSError as error:  # no rank was started, or the log took no more
            reached = newest_finished(directory)
            attempts.record_end(directory, record, reached=reached, reason=str(error), failed=True)
            raise
        reason = "finished" if not ended.code else ended.signal or log.reason()
        attempts.record_end(
            directory,
            record,
            reached=newest_finished(directory),
            reason=reason,
            # Before a time limit Slurm tells the ranks alone to stop.
            failed=bool(ended.code) and not (ended.signal or reason.startswith(STOPPED)),
        )
    if ended.code and ended.signal:
        log.say(f"interrupted; {what_was_kept(directory)}")
    return ended.code


def run_ranks(
    arguments: argparse.Namespace,
    command: list[str],
    environment: Mapping[str, str],
    log: LaunchLog,
    lease: Lease | None = None,
) -> Ended:
    """Start the ranks and wait for the last of them."""
    own = {
        "OMP_NUM_THREADS": str(arguments.cpus_per_rank),
        GPUS_PER_NODE: str(arguments.gpus_per_node),
        **arguments.environment,
    }
    log.start()
    # The launchers' own words (a traceback of torchrun for each failure) go to the log.
    with open(arguments.log, "a", encoding="utf-8") as stream:
        ranks = Ranks(
            command,
            hands_on_signals=arguments.launcher == "srun",
            say=log.say,
            stderr=stream,
            env={**os.environ, **own, **environment},
        )
        if lease:
            lease.lost = ranks.kill
        code = ranks.wait()
    if code and not ranks.signal:
        log.say_failure()
    return Ended(code=code, signal=ranks.signal.name if ranks.signal else None)


def variables(text: str) -> dict[str, str]:
    """`NAME=VALUE NAME=VALUE` as a mapping."""
    words = shlex.split(text)
    if wrong := [word for word in words if not word.partition("=")[1]]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is not NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def what_was_kept(checkpoints: Path) -> str:
    """Where the same command goes on."""
    if iteration := newest_finished(checkpoints):
        return f"the same command goes on after iteration {iteration}"
    return "no checkpoint was saved yet: the same command starts again"


if __name__ == "__main__":
    sys.exit(main())
