"""The commands that start the ranks: torchrun on one machine, srun in an allocation of Slurm's."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The place of the repository and its results inside the container is that outside.
CONTAINERS = ("apptainer", "pyxis")
# The variable that tells the ranks how many GPUs their node was asked for.
GPUS_PER_NODE = "MEGAQWEN_GPUS_PER_NODE"
# A shell that has `module`, as a login shell does.
LOAD_MODULES = 'module load $0 && exec "$@"'


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What sbatch is asked for beside the number of nodes and ranks."""

    ranks_per_node: int
    gpus_per_node: int = 0
    gpu_type: str = ""
    """Of the cluster's GRES, such as h100; any where empty."""
    save_seconds: int = 0
    """How long before the time limit the ranks are told to save and leave; 0: not at all."""
    options: str = ""
    """Further ones, such as --exclusive."""

    def sbatch(self) -> list[str]:
        """sbatch's options."""
        gpus = f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else self.gpus_per_node
        return [
            *([f"--gpus-per-node={gpus}"] if self.gpus_per_node else []),
            f"--ntasks-per-node={self.ranks_per_node}",
            # Without `B:` it goes to the ranks, and not to the shell that runs Snakemake.
            *([f"--signal=USR1@{self.save_seconds}"] if self.save_seconds else []),
            *self.options.split(),
        ]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many ranks, where, and in what surroundings."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    cpu_bind: str = ""
    """How srun binds each rank to CPUs; empty: as Slurm does by itself."""
    modules: str = ""
    """Environment modules that are loaded before srun: names with spaces between."""
    container: str = ""
    """An image in which srun starts the ranks; empty for none."""
    container_runtime: str = "apptainer"
    """One of CONTAINERS."""
    mounts: str = ""
    """Directories that the container shows beside the working directory: paths with commas between."""

    def torchrun(self, command: Sequence[str]) -> list[str]:
        """Start the ranks on this machine; torchrun finds a free port by itself."""
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.ranks_per_node}",
            "--",
            *command,
        ]

    def srun(self, command: Sequence[str]) -> list[str]:
        """Start the ranks over the allocation, every flag spelled out.

        Snakemake's job step strips the SLURM_* variables from which srun would inherit them.
        """
        srun = [
            "srun",
            f"--nodes={self.nodes}",
            f"--ntasks={self.nodes * self.ranks_per_node}",
            f"--ntasks-per-node={self.ranks_per_node}",
            f"--cpus-per-task={self.cpus_per_rank}",
            *([f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []),
            *([f"--cpu-bind={self.cpu_bind}"] if self.cpu_bind else []),
            "--kill-on-bad-exit=1",
            # The last rank of parity works on alone: a cluster's WaitTime is not for it.
            "--wait=0",
            "--quit-on-interrupt",
            *self.rank(command),
        ]
        return ["bash", "-lc", LOAD_MODULES, self.modules, *srun] if self.modules else srun

    def rank(self, command: Sequence[str]) -> list[str]:
        """What srun starts for each rank; the last of srun's own options may come before it."""
        if not self.container:
            return [sys.executable, *command]
        mounts = [mount for mount in self.mounts.split(",") if mount]
        if self.container_runtime == "pyxis":
            # It shows no directory by itself, and begins in none of those outside.
            here = str(Path.cwd())
            same = ",".join(f"{mount}:{mount}" for mount in (here, *mounts))
            return [
                f"--container-image={self.container}",
                f"--container-workdir={here}",
                f"--container-mounts={same}",
                *("python", *command),
            ]
        return [
            *("apptainer", "exec", *(["--nv"] if self.gpus_per_node else [])),
            *(word for mount in mounts for word in ("--bind", mount)),
            *(self.container, "python", *command),
        ]
