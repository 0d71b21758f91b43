"""The command that starts the ranks: torchrun on one machine, srun in a Slurm allocation."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many ranks, and where."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    cpus_per_rank: int = 1

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
        return [
            "srun",
            f"--nodes={self.nodes}",
            f"--ntasks={self.nodes * self.ranks_per_node}",
            f"--ntasks-per-node={self.ranks_per_node}",
            f"--cpus-per-task={self.cpus_per_rank}",
            *([f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []),
            "--kill-on-bad-exit=1",
            "--quit-on-interrupt",
            sys.executable,
            *command,
        ]
