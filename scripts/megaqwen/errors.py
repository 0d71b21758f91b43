"""The exceptions that a user is meant to read, and the one accident that any stage can meet."""

import errno


class InputError(Exception):
    """Something that the user gave is wrong: what, where, and what to do.

    A stage command prints its message alone, without a traceback, and exits with 2.
    """


class Stopped(Exception):
    """A stage was told to stop, and what it did is kept: the same command goes on from there.

    A stage command prints its message behind STOPPED and exits with 75, sysexits.h's "try again".
    """


# How the last words of a process begin that was told to end: as asked, or at once.
STOPPED, INTERRUPTED = "stopped: ", "interrupted: "


def disk_is_full(error: BaseException) -> str:
    """The message of an error that `is_disk_full`."""
    return f"error: the disk is full ({error}): free some space, and run it again"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or an exhausted quota.

    Libraries written in Rust (safetensors, tokenizers) say so in their message only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
