"""What a stage command prints: a few lines for a person on the terminal, everything in the log.

The libraries underneath (Megatron above all) print hundreds of lines. With `--log FILE` all of that
goes to the file, and the terminal keeps what this project says through `logging`.
"""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TextIO

from megaqwen.errors import (
    INTERRUPTED,
    STOPPED,
    InputError,
    Stopped,
    disk_is_full,
    is_disk_full,
)

LOGGER_NAME = "megaqwen"
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# Slurm ends a job whose time is up by the signal by which it cancels one.
OUT_OF_TIME = "; if the job's time was up, runtime in the profile gives more"


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what is unfinished is cleaned away as after Ctrl-C."""


def stage_parser(docstring: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that every stage command has."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="a run's resolved config.yaml, or any config file",
    )
    parser.add_argument(
        "--log", type=Path, help="file for everything that is printed (default: the terminal)"
    )
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers, of a command that streams weights."""

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    positive.__name__ = "number above 0"  # as argparse words its error
    parser.add_argument(
        "--workers", type=positive, help="threads (default: one for each core, at most 8)"
    )


def terminal_and_log(log: Path | None, *, quiet: bool = False) -> TextIO:
    """Send logging to the terminal and, with `log`, all other output of this process to that file.

    Args:
        log: The file; None leaves other output on the terminal.
        quiet: Only the log gets what is logged: of many ranks one speaks.

    Returns:
        The terminal's stream, for a progress line that is rewritten in place.
    """
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    handlers: list[logging.Handler] = []
    if not quiet:
        handlers.append(logging.StreamHandler(terminal))
        handlers[0].setFormatter(logging.Formatter("  %(message)s"))
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  open to the end
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        handlers.append(logging.StreamHandler(stream))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers = handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return terminal


def run_command(
    stage: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    *,
    quiet: bool = False,
    log_suffix: str = "",
) -> int:
    """Parse the command line, run `stage`, and turn its end into one message and an exit code.

    Args:
        stage: Given the parsed arguments, to which `terminal` (the terminal's stream) is added.
        parser: From `stage_parser`.
        quiet: Write nothing to the terminal.
        log_suffix: Added to the log's name, for a process of many.

    Returns:
        0; 2 after an InputError or on a full disk; 75 where the stage stopped early and can go on; 130
        after Ctrl-C and 143 after SIGTERM; 1 after anything else, whose traceback goes to the log.
    """
    arguments = parser.parse_args()
    if arguments.log and log_suffix:
        arguments.log = arguments.log.with_name(f"{arguments.log.name}.{log_suffix}")
    terminal = arguments.terminal = terminal_and_log(arguments.log, quiet=quiet)
    logger = logging.getLogger(LOGGER_NAME)
    earlier = signal.signal(signal.SIGTERM, terminate)
    try:
        stage(arguments)
    except InputError as error:
        logger.error("error: %s", error)
        return EXIT_BAD_INPUT
    except Stopped as stopped:
        logger.error("%s%s", STOPPED, stopped)
        return EXIT_STOPPED
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        advice = OUT_OF_TIME if terminated and "SLURM_JOB_ID" in os.environ else ""
        logger.error("%snothing unfinished was kept under its final name%s", INTERRUPTED, advice)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  the boundary; CheckpointException is no Exception
        if is_disk_full(error):
            logger.error("%s", disk_is_full(error))
            return EXIT_BAD_INPUT
        traceback.print_exc()
        where = f" (traceback: {arguments.log})" if arguments.log else ""
        logger.error("error: %s: %s%s", type(error).__name__, error, where)
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, earlier)
        terminal.flush()
    return 0


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a stage as Ctrl-C does."""
    raise Terminated
