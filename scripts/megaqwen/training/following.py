"""Megatron's training loop, followed by the figures that `MetricsWriter` records."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, global_vars
from megatron.training import training as megatron_training
from megatron.training.training import get_train_valid_test_num_samples

from megaqwen.provenance import peak_memory_bytes
from megaqwen.training import cpu_emulation
from megaqwen.training.copy_beside import COPY
from megaqwen.training.evaluation import Evaluations
from megaqwen.training.flops import flops_per_token, peak_of
from megaqwen.training.metrics import MetricsWriter
from megaqwen.training.preflight import TrainingRun
from megaqwen.training.trackers import start_trackers, training_key
from megaqwen.training.waits import Waits

METRICS = "metrics.jsonl"


@contextmanager
def whole_evaluation(arguments: Namespace) -> Iterator[None]:
    """Within it time is never up: Megatron would leave an evaluation halfway, and the last one out.

    Its loop looks at exit_duration_in_mins right after.
    """
    limit, arguments.exit_duration_in_mins = arguments.exit_duration_in_mins, None
    try:
        yield
    finally:
        arguments.exit_duration_in_mins = limit


def watch_metrics(run: TrainingRun, resumed: int, waits: Waits) -> None:
    """Put our writer in front of Megatron's on the rank that has one, and follow its iterations."""
    writer = metrics_writer(run, resumed) if get_tensorboard_writer() else None
    megatron_log = megatron_training.training_log

    def training_log(*values: Any, **named: Any) -> Any:
        result = megatron_log(*values, **named)
        waited = waits.exchange() | COPY.taken()
        if writer:
            writer.end_iteration(values[3], waited)
        return result

    megatron_training.training_log = training_log
    if writer is None:
        return
    global_vars._GLOBAL_TENSORBOARD_WRITER = writer
    writer.stalls.start()
    writer.trackers = start_trackers(
        run.config.tracking,
        run=run.config.run,
        key=training_key(run.checkpoints, resumed),
        directory=run.checkpoints,
    )
    megatron_train = megatron_training.train

    def train(*values: Any, **named: Any) -> Any:
        writer.end_pause()  # what was set up and loaded before is no iteration's time
        return megatron_train(*values, **named)

    megatron_training.train = train
    megatron_finalize = megatron_training.maybe_finalize_async_save

    def maybe_finalize_async_save(*values: Any, **named: Any) -> Any:
        if not named.get("blocking"):
            return megatron_finalize(*values, **named)
        writer.begin_pause()
        result = megatron_finalize(*values, **named)
        writer.end_pause()
        return result

    megatron_training.maybe_finalize_async_save = maybe_finalize_async_save
    megatron_evaluate = megatron_training.evaluate_and_print_results
    evaluations = Evaluations(run.checkpoints, get_train_valid_test_num_samples())

    def evaluate_and_print_results(prefix: str, *values: Any, **named: Any) -> Any:
        # Megatron gives the test set's loss the validation set's name.
        writer.begin_pause()
        writer.evaluated = "test" if prefix.endswith("test set") else "validation"
        evaluations.begin(writer.evaluated, get_args())
        writer.last_evaluation = None
        with whole_evaluation(get_args()):
            # Megatron would leave out what is measured where no training was left to do.
            result = megatron_evaluate(prefix, *values, **named | {"write_to_tensorboard": True})
        if writer.last_evaluation:
            rank = mpu.get_data_parallel_rank()
            evaluations.end(*writer.last_evaluation, get_args(), rank)
        return result

    megatron_training.evaluate_and_print_results = evaluate_and_print_results
    megatron_save = megatron_training.save_checkpoint_and_time

    def save_checkpoint_and_time(*values: Any, **named: Any) -> Any:
        started = time.monotonic()
        writer.begin_pause()
        result = megatron_save(*values, **named)
        writer.end_save(values[0], time.monotonic() - started)
        return result

    megatron_training.save_checkpoint_and_time = save_checkpoint_and_time


def metrics_writer(run: TrainingRun, resumed: int) -> MetricsWriter:
    """Ours, in front of Megatron's."""
    arguments = get_args()
    gpu = not cpu_emulation.available()
    peak = peak_of(torch.cuda.get_device_name())
    return MetricsWriter(
        get_tensorboard_writer(),
        file=run.checkpoints / METRICS,
        terminal=run.terminal,
        iterations=arguments.train_iters,
        tokens_per_iteration=arguments.global_batch_size * arguments.seq_length,
        ranks=arguments.world_size,
        first_iteration=resumed,
        flops_per_token=flops_per_token(run.hf_config, arguments.seq_length),
        peak_tflops=peak.of(fp8=bool(arguments.fp8)) if peak else None,
        memory=torch.cuda.max_memory_allocated if gpu else peak_memory_bytes,
    )
