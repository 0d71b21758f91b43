"""GPUs that were asked for and are not there, said by each rank before it would train on CPUs instead."""

import os
import socket

import torch

from megaqwen.errors import InputError
from megaqwen.training.launch import GPUS_PER_NODE
from megaqwen.training.ranks import rank_from_environment


def check_gpus() -> None:
    """InputError where the launcher asked for GPUs and torch sees none for this rank.

    Without it, nodes of GPUs whose driver is too old would train on their CPUs until their time is up.
    """
    asked, seen = int(os.environ.get(GPUS_PER_NODE, "0")), torch.cuda.device_count()
    if asked and seen <= rank_from_environment().local_rank:
        raise InputError(
            f"{socket.gethostname()}: {asked} GPUs a node were asked for (gpus_per_node), and torch sees"
            f" {seen or f'none ({why_none()})'}: it takes a driver of at least 580, in a container, too"
            " (nvidia-smi says which there is), and no CUDA_VISIBLE_DEVICES that hides them. With"
            " gpus_per_node: 0, training is on CPUs"
        )


def why_none() -> str:
    """Torch's own words on it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return "it does not say why"
