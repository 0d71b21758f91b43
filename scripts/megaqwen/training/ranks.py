"""Which rank this process is, whoever started it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_PORT = 20000
PORTS = 20000


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A process's place among those of a job."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def speaks(self) -> bool:
        """Whether this rank writes to the terminal: the last one, where Megatron knows the loss."""
        return self.rank == self.world_size - 1


def rank_from_environment() -> Rank:
    """This process's rank, from torchrun's variables or else from srun's; alone without either.

    In a container whose image is for PyTorch, pyxis sets some of torchrun's variables by itself.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ and "SLURM_STEP_NODELIST" in os.environ:
        os.environ.update(torch_variables(os.environ))
    return Rank(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def ranks_of_node() -> int:
    """How many ranks run on this node, once `rank_from_environment` was asked; 1 alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def torch_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from those that srun sets for each task.

    The first node of the step is the rendezvous, on a port made from the job's id, so that two jobs
    on one node do not meet.
    """
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(most_tasks(slurm["SLURM_STEP_TASKS_PER_NODE"])),
        "MASTER_ADDR": first_node(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % PORTS),
    }


def most_tasks(per_node: str) -> int:
    """The most that a node has of a step's tasks: `8(x2),3`, two nodes of 8 and one of 3, gives 8."""
    return max(int(group.partition("(")[0]) for group in per_node.split(","))


def first_node(nodes: str) -> str:
    """The first host name of a Slurm node list: `gpu[003-007,9],cpu1` gives gpu003."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.split(",")[0]
    ranges, _, suffix = rest.partition("]")
    return prefix + ranges.split(",")[0].split("-")[0] + suffix.split(",")[0]
