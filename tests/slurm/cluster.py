"""A Slurm cluster on this machine: real daemons, in namespaces that end with the tests.

`unshare` gives cluster.sh processes, mounts, host name and network of its own, so nothing that it starts
can stay behind and no other Slurm of this machine is touched. Commands are run on its login node.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from megaqwen.training.supervise import PARENT_DEATH_SIGNAL, end_with_parent

HERE = Path(__file__).parent
NODES = 21
CPUS = 16
GPUS = 8
MEMORY = 64000  # MB that a node declares
PACKAGES = "slurm-wlm slurmdbd munge mariadb-server iproute2 util-linux btrfs-progs"
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "ip", "unshare", "nsenter")
START_SECONDS = 300


def reason_to_skip() -> str | None:
    """Why no cluster is started here; None where one is."""
    if not os.environ.get("SLURM_CLUSTER"):
        return (
            f"SLURM_CLUSTER=1 starts a Slurm cluster of {NODES} nodes for these tests, minutes long"
        )
    missing = [
        name for name in NEEDED if not shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    ]
    if missing:
        return (
            f"a Slurm cluster needs {', '.join(missing)}:"
            f" apt-get install --no-install-recommends {PACKAGES}"
        )
    if os.geteuid() != 0:
        return "a Slurm cluster is started by root, in namespaces of its own"
    bridge = "ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1"
    tried = subprocess.run(
        [
            "unshare",
            *NAMESPACES,
            "sh",
            "-ec",
            f"mount -t tmpfs tmpfs /run; {bridge}; ip netns add node",
        ],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"a Slurm cluster needs namespaces and a network of its own: {tried.stderr.strip()}"
    return None


NAMESPACES = (
    "--mount",
    "--net",
    "--uts",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)


def killed_with_parent() -> None:
    """In `unshare` before it starts: SIGKILL to it when the tests are killed; it ignores SIGTERM."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


class Cluster:
    """NODES nodes of CPUS processors and GPUS GPUs each that are not there."""

    def __init__(self, state: Path):
        """Start it, and wait until every node is idle."""
        self.state = state
        self.output = state.with_name(f"{state.name}.log")
        sizes = map(str, (NODES, CPUS, GPUS, MEMORY))
        with open(self.output, "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                ["unshare", *NAMESPACES, HERE / "cluster.sh", state, *sizes],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=killed_with_parent,
            )
        try:
            self.wait_until((state / "ready").exists, START_SECONDS)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it: with the first process of its namespaces every other ends."""
        self.process.kill()  # whose child the kernel then kills
        self.process.wait()

    def wait_until(self, true: Callable[[], object], seconds: float) -> None:
        """Wait until `true` is; an AssertionError when that takes long or the cluster has ended."""
        end = time.monotonic() + seconds
        while not true():
            alive = self.process.poll() is None
            assert alive and time.monotonic() < end, self.output.read_text() + self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        return "".join(
            f"--- {path.name}\n" + "".join(path.read_text().splitlines(keepends=True)[-20:])
            for path in sorted(self.state.glob("*.log"))
        )

    @property
    def first_process(self) -> psutil.Process:
        """cluster.sh, as seen from outside."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def on_login_node(self, *command: object) -> list[str]:
        """The words that run a command on the login node."""
        place = ("--target", self.first_process.pid, "--mount", "--net", "--uts", "--ipc", "--pid")
        return ["nsenter", *map(str, place), "--", *map(str, command)]

    def seen(self, path: Path) -> Path:
        """A path as its processes see it, with what is mounted there."""
        return Path(f"/proc/{self.first_process.pid}/root{path}")

    def run(self, *command: object, seconds: float = 60) -> str:
        """What a command says on the login node; an AssertionError when it fails."""
        done = subprocess.run(
            self.on_login_node(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def nodes(self, job: str) -> list[int]:
        """The numbers of a job's nodes, in order."""
        listed = self.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        names = self.run("scontrol", "show", "hostnames", listed).split()
        return [int(name.removeprefix("node")) for name in names]

    def kill_node(self, number: int) -> None:
        """Let a node die: its slurmd and every process of its jobs at once."""
        node = f"node{number}"
        self.run("bash", "-c", f"kill -9 $(ip netns pids {node})")
        # By itself Slurm notices after SlurmdTimeout, which is long here for the sake of loaded machines.
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=died")

    def preempt_by_qos(self) -> None:
        """Start the controller anew, beside running jobs, so that QOS decide who takes whose nodes."""
        control = self.seen(Path("/run/slurmctld.pid")).read_text().strip()
        self.run("scontrol", "shutdown", "slurmctld")
        process = self.seen(Path("/proc") / control)
        self.wait_until(lambda: not process.exists(), START_SECONDS)
        file = self.state / "etc/slurm.conf"
        text = file.read_text().replace("preempt/partition_prio", "preempt/qos")
        file.write_text(text)
        self.run("slurmctld")

    def is_queued(self, job: str) -> bool:
        """Whether a job waits, runs or ends."""
        return job in self.run("squeue", "--noheader", "--format=%i").split()


class OnCluster:
    """A command that goes on running on the login node; its output is in a file."""

    def __init__(
        self,
        cluster: Cluster,
        command: list[object],
        directory: Path,
        environment: Mapping[str, str],
    ):
        """Start it."""
        self.output = directory / f"output-{time.monotonic_ns()}.txt"
        with open(self.output, "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                cluster.on_login_node("env", "--chdir", directory, *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                preexec_fn=end_with_parent,
            )

    @property
    def said(self) -> str:
        """Its output until now."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """A signal to the command; nsenter, its parent, would keep it."""
        (child,) = psutil.Process(self.process.pid).children()
        child.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said}") from None
