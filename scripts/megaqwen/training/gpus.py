"""What is missing for training on GPUs, said by each rank: they, or Transformer Engine."""

import os
import socket

import torch

from megaqwen.environment import INSTALL_TRANSFORMER_ENGINE, has_transformer_engine
from megaqwen.errors import InputError
from megaqwen.training.launch import GPUS_PER_NODE
from megaqwen.training.ranks import rank_from_environment


def check_gpus() -> None:
    """InputError where torch does not see this rank's GPU, which was asked for, or cannot train on it.

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
    if seen and not has_transformer_engine():
        raise InputError(
            f"{socket.gethostname()}: training on a GPU takes Transformer Engine, which is not installed:"
            f" {INSTALL_TRANSFORMER_ENGINE}, or hide the GPU with CUDA_VISIBLE_DEVICES= to train on CPUs"
        )


def why_none() -> str:
    """Torch's own words on it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return "it does not say why"
