"""The training itself: Megatron's `pretrain` with our model, data and metrics around it."""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megaqwen.training import cpu_emulation

if cpu_emulation.available():
    cpu_emulation.install()

from megatron.core.enums import ModelType
from megatron.training import get_args, get_tensorboard_writer, pretrain
from megatron.training import training as megatron_training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import get_train_valid_test_num_samples

from megaqwen.checkpoints import tracked_iteration
from megaqwen.config.blends import corpus_split, corpus_weights
from megaqwen.data.splits import check_ends, check_shares
from megaqwen.errors import InputError, Stopped
from megaqwen.provenance import digest, peak_memory_bytes
from megaqwen.training import (
    async_saving,
    cpu_checkpoints,
    fused_adam_resume,
    fused_kernels,
    optimizer_states,
    torch_adam_resume,
)
from megaqwen.training.arguments import RunPaths, training_arguments
from megaqwen.training.conversations import check_conversations, conversation_provider
from megaqwen.training.datasets import (
    Corpora,
    dataset_provider,
    run_corpora,
    use_compiled_helpers,
    without_training,
)
from megaqwen.training.epochs import Planned, conversation_epochs, epochs
from megaqwen.training.evaluation import read_evaluations
from megaqwen.training.following import METRICS, watch_metrics
from megaqwen.training.forward import forward_step
from megaqwen.training.lease import check_held, token_of_launcher
from megaqwen.training.meeting import Meeting
from megaqwen.training.memory import memory_advice
from megaqwen.training.metrics import MetricsWriter, read_metrics
from megaqwen.training.model import model_config
from megaqwen.training.packed_forward import PackedForwardStep
from megaqwen.training.preflight import TrainingRun
from megaqwen.training.ranks import rank_from_environment
from megaqwen.training.saving import (
    Saving,
    changed_layout,
    check_experts,
    write_without_a_process,
)
from megaqwen.training.scratch import copied
from megaqwen.training.waits import Waits
from megaqwen.training.workers import ended_by_failure

logger = logging.getLogger("megaqwen.training")
NOT_FINITE = "Unexpected result"
"""In Megatron's words for a loss or a norm of gradients that is no number, or none that is finite."""


def pretrain_run(run: TrainingRun) -> None:
    """Train from the last checkpoint, or from the converted weights, to the last iteration.

    Raises:
        InputError: Megatron refuses the options, or a share of a corpus has no document.
        Stopped: A signal or one of Megatron's exit options ended training early.
    """
    names = [corpus.name for corpus in run.config.data.corpora]
    meeting = Meeting(rank_from_environment()) if run.config.scratch.directory else None
    with copied(run.config.scratch, run.data_directory, run.data["files"], names) as copy:
        if meeting:
            meeting.wait()
            logger.info("every node has its copy of the data")
        pretrain_on(replace(run, copy=copy))


def pretrain_on(run: TrainingRun) -> None:
    """`pretrain_run` with the data where this node reads it."""
    if rank_from_environment().rank == 0:
        check_data(run)
    gpu = not cpu_emulation.available()
    if gpu:
        cpu_checkpoints.install()
        fused_adam_resume.install()
        fused_kernels.install()
        async_saving.install()
    else:
        cpu_emulation.install_training()
        torch_adam_resume.install()
    optimizer_states.install()
    paths = RunPaths(
        pretrained=run.checkpoint,
        checkpoints=run.checkpoints,
        tensorboard=run.checkpoints / "tensorboard",
    )
    use_compiled_helpers()
    for directory in (paths.checkpoints, paths.tensorboard):
        directory.mkdir(parents=True, exist_ok=True)
    # Megatron has one entry for its options: the command line.
    sys.argv = [sys.argv[0], *training_arguments(run.config, run.hf_config, paths, gpu=gpu)]
    arguments = validated_arguments()
    check_held(run.checkpoints, token_of_launcher())
    resumed = tracked_iteration(run.checkpoints)
    saving = Saving(run.checkpoints, run.config.checkpoints)
    saving.install()
    if not arguments.async_save:
        write_without_a_process()
    trained = resumed == arguments.train_iters
    if trained:  # and stopped after its last save: what is left is to evaluate
        arguments.no_load_optim = True
    check_experts(run.checkpoints, arguments, resumed)
    if gpu and resumed:
        cpu_checkpoints.leave_random_state(arguments, run.checkpoints)
    waits = Waits()
    watch_metrics(run, resumed, waits)
    say_start(run, arguments, resumed)
    model = model_config(arguments)
    if run.config.data.kind == "sft":
        step: Any = PackedForwardStep(model.transformer, arguments)
        too_long = run.config.data.too_long
        provider = conversation_provider(corpora(run), too_long, lambda: say_epochs(run))
    else:
        step, provider = forward_step, dataset_provider(corpora(run))
        say_epochs(run)
    container = pretrain_cfg_container_from_args(arguments, model)
    if trained:
        evaluate_alone()
        container.validation.skip_train = True
        provider = without_training(provider)
    try:
        with memory_advice(arguments.micro_batch_size), finite(), ended_by_failure():
            pretrain(container, provider, ModelType.encoder_or_decoder, waits.timed(step))
    except SystemExit as stop:
        if isinstance(writer := get_tensorboard_writer(), MetricsWriter):
            writer.end_live_line()
        if stop.code != 0:  # it does where it cannot read a checkpoint
            raise InputError(
                f"Megatron ended training by itself (exit code {stop.code}): its log says why"
            ) from stop
        saving.finish_stopped()  # what is resumed from has checksums as well
        raise Stopped(
            f"iteration {tracked_iteration(run.checkpoints)} of {arguments.train_iters} is saved"
        ) from stop
    saving.finish()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        finish(run)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def evaluate_alone() -> None:
    """Let Megatron set up a model without an optimizer, and know nothing of it where it draws samples.

    By skip_train of its arguments it would evaluate on others than at the end of a training.
    """
    set_up = megatron_training.setup_model_and_optimizer

    def set_up_model(*values: Any, **named: Any) -> Any:
        get_args().skip_train = True
        try:
            return set_up(*values, **named)
        finally:
            get_args().skip_train = False

    megatron_training.setup_model_and_optimizer = set_up_model


@contextmanager
def finite() -> Iterator[None]:
    """Megatron's error at a loss or a gradient that is no number is an InputError, and an alarm."""
    try:
        yield
    except RuntimeError as error:
        if NOT_FINITE not in str(error):
            raise
        if isinstance(writer := get_tensorboard_writer(), MetricsWriter):
            writer.alarm(str(error))
        raise InputError(
            f"a loss or a gradient is no number: {error}. Nothing of that iteration was saved, and from"
            " the last checkpoint it would come again: a smaller train.lr, a longer"
            " train.lr_warmup_iters, a train.clip_grad or other data may help"
        ) from error


def validated_arguments() -> Namespace:
    """Megatron's arguments from sys.argv; what its own checks refuse is an InputError."""
    # Megatron asks for it with tensor parallelism, so that communication overlaps computation.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        return parse_and_validate_args()
    except (AssertionError, ValueError) as error:
        raise InputError(f"Megatron refuses the options under train: {error}") from error


def check_data(run: TrainingRun) -> None:
    """InputError where a share of a corpus is empty, or its documents are not what training takes."""
    data, cards = run.config.data, run.data["corpora"]
    check_shares(
        {
            corpus.name: (cards[corpus.name]["documents"], corpus_split(data, corpus))
            for corpus in data.corpora
        }
    )
    for corpus in data.corpora:
        prefix = run.files / corpus.name
        if data.kind == "sft":
            check_conversations(prefix, run.config)
        else:
            check_ends(prefix, run.data["tokenizer"]["end_of_document"])


def corpora(run: TrainingRun) -> Corpora:
    """The run's corpora on disk, in the config's order."""
    # Megatron's key of its sample indices has a corpus's path, and nothing of what is in it.
    cache = run.output / "cache" / digest(run.data["files"])
    vocabulary = run.hf_config["vocab_size"]
    return run_corpora(run.config, run.data_directory, run.data, vocabulary, cache, run.copy)


def say_start(run: TrainingRun, arguments: Any, resumed: int) -> None:
    """Say in words what is trained, over which ranks, and from where."""
    layout = ", ".join(
        f"{name} {size}"
        for name, size in (
            ("tensor", arguments.tensor_model_parallel_size),
            ("pipeline", arguments.pipeline_model_parallel_size),
            ("context", arguments.context_parallel_size),
            ("data", arguments.data_parallel_size),
        )
        if size > 1
    )
    speaks = rank_from_environment().speaks
    if speaks and (changes := changed_layout(run.checkpoints, arguments, resumed)):
        logger.info("the checkpoint was saved under another layout: %s", changes)
    device = "CPU" if cpu_emulation.available() else torch.cuda.get_device_name()
    start = f"resuming after iteration {resumed}" if resumed else "from the converted weights"
    logger.info(
        "%s on %d %s rank%s (%s parallel), %s",
        f"{arguments.train_iters} iterations of {arguments.global_batch_size} x {arguments.seq_length}"
        f" tokens",
        arguments.world_size,
        device,
        "s" if arguments.world_size > 1 else "",
        layout or "not",
        start,
    )


def finish(run: TrainingRun) -> None:
    """Write the manifest: what was trained, the losses, and the unigram entropy to hold against it."""
    records = read_metrics(run.checkpoints / METRICS)
    losses = [record["loss"] for record in records if "loss" in record]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    test = [record["test_loss"] for record in records if "test_loss" in record]
    entropy = unigram_entropy(run)
    arguments = get_args()
    iteration = tracked_iteration(run.checkpoints)
    if iteration != arguments.train_iters:
        raise RuntimeError(f"saved {iteration} of {arguments.train_iters} iterations")
    results = {
        "iteration": iteration,
        "checkpoints": os.path.relpath(run.checkpoints, run.output),
        "metrics": os.path.relpath(run.checkpoints / METRICS, run.output),
        "tokens": iteration * arguments.global_batch_size * arguments.seq_length,
        "world_size": arguments.world_size,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss": validation[-1] if validation else None,
        "test_loss": test[-1] if test else None,
        "evaluations": read_evaluations(run.checkpoints),
        "unigram_entropy": entropy,
        **target_tokens(run, records),
        "data": planned_epochs(run),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    run.record.write(
        run.output / "manifest.json",
        inputs={
            "data": run.data_directory / "manifest.json",
            "convert": run.checkpoint.parent / "manifest.json",
        },
        results=results,
    )
    logger.info(
        "loss %.3f -> %.3f (unigram entropy of the corpus %.3f), validation %s nats per token",
        losses[0],
        losses[-1],
        entropy,
        f"{validation[-1]:.3f}" if validation else "not measured",
    )


def planned_epochs(run: TrainingRun) -> Planned:
    """How often the whole run goes through each corpus."""
    names = [corpus.name for corpus in run.config.data.corpora]
    arguments = get_args()
    samples, size = get_train_valid_test_num_samples(), arguments.seq_length
    if run.config.data.kind == "sft":
        facts = conversation_epochs(corpora(run), samples, size, run.config.data.too_long)
    else:
        facts = epochs(corpora(run), samples, size)
    return dict(zip(names, facts, strict=True))


def target_tokens(run: TrainingRun, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of SFT, how many tokens counted in the loss; None where not every iteration's record tells."""
    if run.config.data.kind == "pretrain":
        return {}
    counts = [record.get("target_tokens") for record in records if "seconds" in record]
    known = len(counts) == get_args().train_iters and None not in counts
    return {"target_tokens": sum(filter(None, counts)) if known else None}


def say_epochs(run: TrainingRun) -> None:
    """Say of each corpus how often it is trained on; on one rank, which reads each document's length."""
    if not rank_from_environment().speaks:
        return
    for name, splits in planned_epochs(run).items():
        if "train" in splits:
            facts = splits["train"]
            logger.info(
                "%s: %s epochs of %s tokens", name, f"{facts['epochs']:.3g}", f"{facts['tokens']:,}"
            )
            if "packs" in facts:
                logger.info(
                    "%s: %s target tokens of %s conversations in %s packs, %.2f%% full; too long: %s"
                    " truncated, %s left out",
                    name,
                    *(f"{facts[key]:,}" for key in ("target_tokens", "documents", "packs")),
                    100 * facts["packing_efficiency"],
                    *(f"{facts[key]:,}" for key in ("truncated", "dropped")),
                )


def unigram_entropy(run: TrainingRun) -> float:
    """Nats per token of the corpora's token frequencies, averaged by their training weights.

    A model that has learned no more than how frequent each token is has this loss.
    """
    data, cards = run.config.data, run.data["corpora"]
    weights = [corpus_weights(data, corpus)[0] for corpus in data.corpora]
    entropies = [cards[corpus.name]["unigram_entropy"] for corpus in data.corpora]
    return sum(w * h for w, h in zip(weights, entropies, strict=True)) / sum(weights)
