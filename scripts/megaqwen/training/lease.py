"""One writer at a time in a checkpoint directory: a file that names its owner and is kept fresh.

The launcher holds it for its ranks. It does nothing else meanwhile, so that no save, however long, keeps
the heartbeat from coming. Ranks find the lease's token in their environment and look, before they write,
whether the file still has it.

It needs of a shared filesystem that O_EXCL and rename are atomic, as NFS, Lustre and GPFS promise; locks
are not used. Ages are differences of two times that the file server gave, so that no host's clock counts.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megaqwen.errors import InputError
from megaqwen.provenance import iso_time
from megaqwen.training.supervise import is_alive
from megaqwen.words import duration

NAME = "lease.json"
VARIABLE = "MEGAQWEN_LEASE"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # more than an NFS client may keep a file's times (60 s by default)
ENDING_SECONDS = 60.0  # what ranks that a dead launcher left may take to end
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lease."""

    token: str
    """Of this lease and no other."""
    host: str
    machine: str
    """One boot of one machine, and its process numbers: where `pid` means something."""
    pid: int
    process_began: float
    """So that another process of the same number is not taken for it: see `beginning`."""
    slurm_job_id: str | None
    since: str

    def __str__(self) -> str:
        """For a message."""
        job = f", Slurm job {self.slurm_job_id}" if self.slurm_job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_here(self) -> bool:
        """Whether it ran on this machine, so that its process can be looked for."""
        return self.machine == this_machine()

    def is_running(self) -> bool:
        """Whether its process is there; ask only where `is_here`."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return abs(beginning(process) - self.process_began) < 1 and is_alive(process)
        return False

    def is_gone(self) -> bool:
        """Whether it has certainly ended: another process cannot be looked for but after a reboot."""
        if self.is_here():
            return not self.is_running()
        boot, now = self.machine.split()[0], this_machine().split()[0]
        return self.host == socket.gethostname() != now and boot != now


def this_machine() -> str:
    """This boot of this machine and its process namespace, on Linux; elsewhere its name."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def beginning(process: psutil.Process) -> float:
    """When a process began, in ticks since the machine did: a clock that is set changes nothing.

    Where /proc does not tell, in seconds of that clock.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        told = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        return float(
            told.rpartition(")")[2].split()[19]
        )  # the 22nd field, after a name with any bytes
    return process.create_time()


def this_process() -> Owner:
    """This process as an owner, with a new token."""
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=this_machine(),
        pid=os.getpid(),
        process_began=beginning(psutil.Process()),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        since=iso_time(time.time()),
    )


def read_owner(path: Path) -> Owner | None:
    """The owner that a lease names; None where there is none, or it is just being written."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    return None


def token_of_launcher() -> str | None:
    """The token of the lease that this rank's launcher holds; None where no launcher started it."""
    return os.environ.get(VARIABLE)


def check_held(directory: Path, token: str | None) -> None:
    """InputError where another start has the lease: this one must not write, or not any more.

    Args:
        directory: The checkpoints.
        token: Of this start's lease; None where no launcher took one.
    """
    owner = read_owner(directory / NAME)
    if token is None and owner is not None:
        raise InputError(f"{directory} is in use: {owner} trains there. Start with launch.py")
    if token and (owner is None or owner.token != token):
        raise InputError(
            f"{directory} was taken over by {owner or 'another start, which has ended'}:"
            " this training stops without saving"
        )


@dataclass(kw_only=True)
class Lease:
    """A lease on a directory, from `take` to `release`."""

    directory: Path
    say: Callable[[str], None]
    """Tells a person."""
    lost: Callable[[], None] = lambda: None
    """Called from another thread when somebody took it over."""
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    stale_seconds: float = STALE_SECONDS
    ending_seconds: float = ENDING_SECONDS
    owner: Owner = field(default_factory=this_process)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        """The lease's file."""
        return self.directory / NAME

    def take(self) -> None:
        """Take the lease and keep it fresh.

        Raises:
            InputError: Somebody holds it who is alive.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        first_seen: dict[str, float] = {}  # when each other owner was fresh at our first look
        while not self.create():
            owner = read_owner(self.path)
            fresh = self.freshness()
            if fresh is None:
                continue  # released since
            age = self.now() - fresh
            token = owner.token if owner else ""
            if owner and owner.is_here():
                self.wait_for_ranks(owner, age)
                self.take_over(owner, "whose process is gone", age)
            elif age > self.stale_seconds:
                self.take_over(owner, "which gave no sign of life for that long", age)
            elif fresh != first_seen.setdefault(token, fresh):
                raise self.refusal(owner, age)
            else:
                time.sleep(POLL_SECONDS)
            if (holder := read_owner(self.path)) and holder.token == self.owner.token:
                break
        threading.Thread(target=self.keep_fresh, name="lease", daemon=True).start()

    def create(self) -> bool:
        """Make the file, if there is none."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(self.text())
        except OSError:  # a full disk: an empty file would keep everybody out
            self.path.unlink(missing_ok=True)
            raise
        return True

    def text(self) -> str:
        """What the file says."""
        return json.dumps(self.owner.__dict__, indent=2) + "\n"

    def freshness(self) -> float | None:
        """When the file was last touched, by the file server's clock; None without a file."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_mtime
        return None

    def now(self) -> float:
        """The file server's clock."""
        probe = self.directory / f".{NAME}.{self.owner.token}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def refusal(self, owner: Owner | None, age: float) -> InputError:
        """The lease is somebody's who is alive."""
        return InputError(
            f"{self.directory} is in use: {owner or 'another start'} trains there (its last sign of"
            f" life was {age:.0f} s ago). Two trainings must not write to one place: wait until it has"
            " ended, or stop it"
            + (f" (scancel {owner.slurm_job_id})" if owner and owner.slurm_job_id else "")
        )

    def wait_for_ranks(self, owner: Owner, age: float) -> None:
        """Refuse an owner of this machine who is alive; else wait until its ranks have ended."""
        if owner.is_running():
            raise self.refusal(owner, age)
        end = time.monotonic() + self.ending_seconds
        said = False
        while ranks := left_behind(owner.token):
            if not said:
                self.say(
                    f"waiting for what an earlier start left running: processes {listed(ranks)}"
                )
                said = True
            if time.monotonic() > end:
                raise InputError(
                    f"{self.directory} is in use: {owner} was killed, but its ranks live on and may"
                    f" still write: end processes {listed(ranks)} first (kill -9)"
                )
            time.sleep(POLL_SECONDS)

    def take_over(self, owner: Owner | None, why: str, age: float) -> None:
        """Replace a stale lease by ours; only one of several that try does."""
        claim = self.directory / f".{NAME}.taken-from-{owner.token if owner else 'unknown'}"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:  # another one is at it, or died at it
            with contextlib.suppress(FileNotFoundError):
                if self.now() - claim.stat().st_mtime > self.stale_seconds:
                    claim.unlink()
            time.sleep(POLL_SECONDS)
            return
        try:
            if read_owner(self.path) != owner:
                return  # it was replaced before our claim
            partial = self.directory / f".{NAME}.partial-{self.owner.token}"
            partial.write_text(self.text(), encoding="utf-8")
            partial.replace(self.path)
        finally:
            claim.unlink(missing_ok=True)
        who = owner or "an unfinished start"
        self.say(f"taking over from {who}, {why} (last sign of life {duration(age)} ago)")

    def keep_fresh(self) -> None:
        """Touch the file until the lease is released, or somebody else's."""
        while not self.ended.wait(self.heartbeat_seconds):
            owner = read_owner(self.path)
            if owner and owner.token != self.owner.token:
                self.say(f"{self.directory} was taken over by {owner}: ending at once, unsaved")
                self.lost()
                return
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                os.utime(self.path)

    def release(self) -> None:
        """Give it back, if it is still ours."""
        self.ended.set()
        owner = read_owner(self.path)
        if owner and owner.token == self.owner.token:
            self.path.unlink(missing_ok=True)


def left_behind(token: str) -> list[int]:
    """Processes on this machine that were started under a lease and are still running."""
    return sorted(process.pid for process in psutil.process_iter() if has_token(process, token))


def has_token(process: psutil.Process, token: str) -> bool:
    """Whether a process was started under a lease; of another user's nothing is known."""
    try:
        return is_alive(process) and process.environ().get(VARIABLE) == token
    except (psutil.Error, OSError):
        return False


def listed(pids: list[int]) -> str:
    """Process numbers for a message."""
    return ", ".join(map(str, pids))


@contextlib.contextmanager
def leased(lease: Lease) -> Iterator[dict[str, str]]:
    """Hold a lease; the environment by which ranks know it."""
    lease.take()
    try:
        yield {VARIABLE: lease.owner.token}
    finally:
        lease.release()
