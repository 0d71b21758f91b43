"""The part of the parity stage that every rank of its job runs; afterwards the last one is alone.

Call `cpu_emulation.install` before this is imported.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megaqwen.architecture import megatron_options, read_architecture, tensor_shapes
from megaqwen.config import Config
from megaqwen.environment import Surroundings
from megaqwen.parity.affordable import GPU_GATE, LONG, Size, long_positions
from megaqwen.parity.batches import long_batch
from megaqwen.parity.fp8 import fp8_of
from megaqwen.parity.gpu import (
    THRESHOLDS,
    Forwarded,
    computes_in,
    forward_elsewhere,
    forward_options,
)
from megaqwen.parity.megatron import recorded_options
from megaqwen.parity.on_all_ranks import FromRanks, ModelOf, measure_on_ranks
from megaqwen.parity.texts import (
    operations_per_second,
    positions_in_memory,
    tokenized_texts,
)
from megaqwen.training.ranks import rank_from_environment, ranks_of_node
from megaqwen.weights.bridge import checked_model


def over_ranks(
    *,
    model: Path,
    checkpoint: Path,
    data: Path,
    config: Config,
    rounded: bool,
    outside: Surroundings,
) -> FromRanks | None:
    """What Megatron computes over the ranks of this job, on the last of them; elsewhere None.

    Args:
        model: The Hugging Face directory.
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        data: Preprocess's directory.
        config: The run's.
        rounded: The model was exported from the checkpoint, so that its dtypes may be narrower.
        outside: What this process had before it hid the GPUs.

    Raises:
        InputError: The model's files are not what its config.json says, or the checkpoint's are
            not; or a GPU is there and the forward pass on it fails.
    """
    weights, _ = checked_model(model)
    described = megatron_options(weights.config)
    recorded = recorded_options(checkpoint, described)
    shapes = tensor_shapes(read_architecture(weights.config))
    limit = min(
        config.parity.max_tokens,
        weights.config["max_position_embeddings"],
        int(str(config.train["seq_length"])),
    )
    stored = set(weights.dtypes.values()) if rounded else set()
    rounded_to = stored.pop() if len(stored) == 1 else None
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    in_experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    size = Size(parameters=sum(sizes.values()), in_experts=in_experts)

    @cache  # the gates over ranks ask for them, and the one on a GPU
    def texts() -> list[list[int]]:
        return list(tokenized_texts(model, data, config, limit, limit).values())

    join()
    found = measure_on_ranks(
        config=config,
        checkpoint=checkpoint,
        architecture=recorded,
        vocabulary=weights.config["vocab_size"],
        size=size,
        texts=texts,
        positions=limit,
        rounded_to=rounded_to,
        with_steps=not rounded,
    )
    leave()
    if found is None:
        return None
    model_of = ModelOf(
        architecture=recorded,
        checkpoint=checkpoint,
        vocabulary=weights.config["vocab_size"],
        rounded_to=rounded_to,
    )

    def long() -> tuple[torch.Tensor | None, str]:
        in_memory = positions_in_memory(weights.config["num_attention_heads"])
        positions, limit = long_positions(
            config, weights.config, operations_per_second(), in_memory
        )
        return (long_batch(texts(), positions) if positions else None), limit

    return with_gpu(found, dict(config.train), model_of, size.parameters, outside, long)


OTHER_SCALES = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"}
"""By which Transformer Engine makes the scales of a recipe otherwise."""


def switched_on(variables: Mapping[str, str]) -> set[str]:
    """The variables of an environment that switch something on."""
    return {name for name, value in variables.items() if value == "1"}


def with_gpu(
    found: FromRanks,
    train: Mapping[str, Any],
    model: ModelOf,
    parameters: int,
    outside: Surroundings,
    long: Callable[[], tuple[torch.Tensor | None, str]],
) -> FromRanks:
    """With what a GPU computes in training's dtype, or with the reason why none was asked.

    Args:
        found: What the ranks computed.
        train: Megatron's options.
        model: Megatron's.
        parameters: Of it.
        outside: What this process had before it hid the GPUs.
        long: Makes [1, positions + 1] tokens of training's length, or fewer or none, and says why so few.
    """
    dtype = computes_in(train)
    if dtype is None or GPU_GATE in found.unmeasured or found.sampled is None:
        return found
    started = time.perf_counter()
    forwarded: Forwarded | str
    batch, limit = None, ""
    if dtype not in THRESHOLDS:
        forwarded = f"what {dtype} does to a healthy model is not known here"
    elif train.get("te_precision_config_file"):
        forwarded = (
            "which products are in which dtype by te_precision_config_file is not known here"
        )
    elif dtype != "bfloat16" and (others := OTHER_SCALES & switched_on(outside.variables)):
        forwarded = f"what a healthy model has with {min(others)}=1 is not known here"
    elif outside.no_gpu:
        forwarded = outside.no_gpu
    else:
        batch, limit = long()
        longest = found.sampled if batch is None else batch
        shape = (len(found.sampled), longest.shape[1] - 1)
        forwarded = forward_elsewhere(
            forward_options(train, model.architecture, model.checkpoint, model.vocabulary, shape),
            found.sampled,
            batch,
            vocabulary=model.vocabulary,
            parameters=parameters,
            rounded_to=model.rounded_to,
            variables=outside.variables,
        )
    if isinstance(forwarded, str):
        return replace(found, unmeasured=found.unmeasured | {GPU_GATE: forwarded})
    reason = forwarded.without_long or limit
    seconds = found.seconds | {"gpu": time.perf_counter() - started}
    return replace(
        found,
        outputs_on_gpu=forwarded.outputs,
        long=batch,
        long_on_gpu=forwarded.long,
        unmeasured=found.unmeasured | ({LONG: reason} if reason else {}),
        computes_in=dtype,
        fp8=fp8_of(train),
        seconds=seconds,
    )


def join() -> None:
    """Meet the other ranks, if there are any."""
    if rank_from_environment().world_size > 1:
        torch.distributed.init_process_group("gloo")
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def leave() -> None:
    """Part from the other ranks: what comes now is for one process."""
    ranks_here = ranks_of_node()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone)
    # The threads of all of this node's ranks, as far as there are CPUs that this process may use.
    threads = torch.get_num_threads() * ranks_here
    torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
