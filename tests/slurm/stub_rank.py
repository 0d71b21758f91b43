"""In place of scripts/train.py: a rank that meets the others and saves, and computes nothing.

Files in the working directory tell it what to do: `fail` and `finish`. Rank 0 leaves a line in
writes.jsonl for each iteration, as the writer whom no other may meet.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from megaqwen.checkpoints import TRACKER, iteration_name, newest_finished
from megaqwen.training.attempts import read_attempts
from megaqwen.training.ranks import Rank, rank_from_environment

WORDS = dict(zip(sys.argv, sys.argv[1:], strict=False))
OUTPUT = Path(WORDS["--output"])
SAVE_INTERVAL = 10
SECONDS = 240.0  # that the others may take to come


def stop(number: int, frame: object) -> None:
    raise InterruptedError


def log(rank: Rank, level: str, text: str) -> None:
    with open(f"{WORDS['--log']}.rank{rank.rank}.log", "a") as stream:
        stream.write(f"2026-01-01 00:00:00,000 {level} {text}\n")


def meet(rank: Rank) -> None:
    """Each reaches rank 0 where torch.distributed would: on localhost none of another node does."""
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank.rank == 0:
        with socket.create_server(place) as server:
            server.settimeout(SECONDS)
            for _ in range(rank.world_size - 1):
                server.accept()[0].close()
        return
    end = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(place, timeout=SECONDS).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def save(checkpoints: Path, iteration: int) -> None:
    """What launch.py takes for a whole checkpoint."""
    directory = checkpoints / iteration_name(iteration)
    directory.mkdir(exist_ok=True)
    for name in (".metadata", "metadata.json"):
        (directory / name).write_text("{}")
    (checkpoints / TRACKER).write_text(str(iteration))


def train(rank: Rank, checkpoints: Path) -> None:
    iteration = newest_finished(checkpoints)
    attempt = read_attempts(checkpoints)[-1].number
    place = f"{socket.gethostname()}, one of {os.environ['LOCAL_WORLD_SIZE']} there"
    log(rank, "INFO", f"rank {rank.rank} of {rank.world_size} on {place}")
    try:
        while not Path("finish").exists():
            time.sleep(0.2)
            iteration += 1
            if rank.rank:
                continue
            record = {"attempt": attempt, "iteration": iteration}
            with open(OUTPUT / "writes.jsonl", "a") as stream:
                stream.write(json.dumps(record) + "\n")
            if iteration % SAVE_INTERVAL == 0:
                save(checkpoints, iteration)
    except InterruptedError:
        if rank.rank == 0:
            save(checkpoints, iteration)
        sys.exit(75)
    if rank.rank == 0:
        (OUTPUT / "manifest.json").write_text("{}")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    rank = rank_from_environment()
    if Path("fail").exists():
        log(rank, "ERROR", "error: told to fail")
        sys.exit(1)
    meet(rank)
    (checkpoints,) = (OUTPUT / "checkpoints").iterdir()
    train(rank, checkpoints)


if __name__ == "__main__":
    main()
