"""The part of the parity stage that every rank of its job runs; afterwards the last one is alone.

Call `cpu_emulation.install` before this is imported.
"""

import os
from pathlib import Path

import torch

from megaqwen.architecture import megatron_options, read_architecture, tensor_shapes
from megaqwen.config import Config
from megaqwen.parity.megatron import recorded_options
from megaqwen.parity.on_all_ranks import FromRanks, measure_on_ranks
from megaqwen.parity.texts import tokenized_texts
from megaqwen.training.ranks import rank_from_environment
from megaqwen.weights.bridge import checked_model


def over_ranks(
    *, model: Path, checkpoint: Path, data: Path, config: Config, rounded: bool
) -> FromRanks | None:
    """What Megatron computes over the ranks of this job, on the last of them; elsewhere None.

    Args:
        model: The Hugging Face directory.
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        data: Preprocess's directory.
        config: The run's.
        rounded: The model was exported from the checkpoint, so that its dtypes may be narrower.

    Raises:
        InputError: The model's files are not what its config.json says, or the checkpoint's are not.
    """
    weights, _ = checked_model(model)
    described = megatron_options(weights.config)
    recorded = recorded_options(checkpoint, described)
    shapes = tensor_shapes(read_architecture(weights.config)).values()
    limit = min(
        config.parity.max_tokens,
        weights.config["max_position_embeddings"],
        int(str(config.train["seq_length"])),
    )
    stored = set(weights.dtypes.values()) if rounded else set()
    join()
    found = measure_on_ranks(
        config=config,
        checkpoint=checkpoint,
        architecture=recorded,
        vocabulary=weights.config["vocab_size"],
        parameters=sum(torch.Size(shape).numel() for shape in shapes),
        texts=lambda: list(tokenized_texts(model, data, config, limit, limit).values()),
        positions=limit,
        rounded_to=stored.pop() if len(stored) == 1 else None,
        with_steps=not rounded,
    )
    leave()
    return found


def join() -> None:
    """Meet the other ranks, if there are any."""
    if rank_from_environment().world_size > 1:
        torch.distributed.init_process_group("gloo")
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def leave() -> None:
    """Part from the other ranks: what comes now is for one process."""
    ranks = torch.distributed.get_world_size()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ[name] = value
    torch.set_num_threads(torch.get_num_threads() * ranks)
