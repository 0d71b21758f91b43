"""What is missing for training on GPUs, said by each rank: they, or Transformer Engine."""

import logging
import os
import socket

from megaqwen.environment import (
    INSTALL_TRANSFORMER_ENGINE,
    has_transformer_engine,
    hide_gpu_of_no_use,
)
from megaqwen.errors import InputError
from megaqwen.training.launch import GPUS_PER_NODE
from megaqwen.training.ranks import rank_from_environment

logger = logging.getLogger("megaqwen.training")


def check_gpus() -> None:
    """InputError where torch does not see this rank's GPU, which was asked for, or cannot train on it.

    Without it, nodes of GPUs whose driver is too old would train on their CPUs until their time is up.
    A GPU that nobody asked for is left alone where there is no Transformer Engine; the log says so.
    """
    asked = int(os.environ.get(GPUS_PER_NODE, "0"))
    if not asked and (words := hide_gpu_of_no_use()):
        logger.warning(words)
    import torch

    # Not the count alone: where there is no GPU, Megatron is told of one that is emulated.
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked and seen <= rank_from_environment().local_rank:
        raise InputError(
            f"{socket.gethostname()}: {asked} GPUs a node were asked for (gpus_per_node), and torch sees"
            f" {seen or f'none ({why_none()})'}: it takes a driver of at least 580, in a container, too"
            " (nvidia-smi says which there is), and no CUDA_VISIBLE_DEVICES that hides them. With"
            " gpus_per_node: 0, training is on CPUs"
        )
    if 0 < seen <= rank_from_environment().local_rank:
        raise InputError(
            f"{socket.gethostname()}: a rank trains on each GPU, and there are more ranks than the {seen}"
            f" that torch sees: give as many (ranks_per_node: {seen} in profiles/local/config.yaml), with"
            " a layout that they hold (tensor_model_parallel_size), or train on CPUs, which an empty"
            " CUDA_VISIBLE_DEVICES does"
        )
    if seen and not has_transformer_engine():
        raise InputError(
            f"{socket.gethostname()}: training on a GPU takes Transformer Engine, which is not installed:"
            f" {INSTALL_TRANSFORMER_ENGINE}"
        )


def why_none() -> str:
    """Torch's own words on it."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return "it does not say why"
