"""What training measures: metrics.jsonl, and one live line for a person.

Megatron writes each figure to its TensorBoard writer on the last rank. `MetricsWriter` stands in front of
that writer: it passes everything on and gathers the figures of an iteration into one record.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megaqwen.provenance import end_last_line
from megaqwen.training.alarms import Alarms, StallWatch
from megaqwen.words import duration

logger = logging.getLogger("megaqwen.training")

# Megatron's TensorBoard tag -> the name in metrics.jsonl.
NAMES = {
    "lm loss": "loss",
    "learning-rate": "learning_rate",
    "grad-norm": "gradient_norm",
    "target tokens": "target_tokens",  # of the global batch, in SFT
}
EVALUATION = "lm loss validation"
EVALUATED = ("validation_loss", "test_loss")
# What has a record of its own, beside the one of its iteration.
APART = (*EVALUATED, "save_seconds", "alarm")
AVERAGED_ITERATIONS = 20
BAR = 20  # cells of the progress bar
FEWEST_ITERATIONS = 3  # before that many were timed, nothing is said of the time left


class MetricsWriter:
    """A TensorBoard writer that also writes metrics.jsonl and the live line."""

    def __init__(
        self,
        tensorboard: Any,
        *,
        file: Path,
        terminal: TextIO,
        iterations: int,
        tokens_per_iteration: int,
        ranks: int,
        first_iteration: int,
        flops_per_token: float = 0.0,
        peak_tflops: float | None = None,
        memory: Callable[[], int] | None = None,
    ):
        """Stand in front of a writer.

        Args:
            tensorboard: The writer that Megatron made.
            file: metrics.jsonl; records are appended.
            terminal: Where the live line goes; rewritten in place on a terminal.
            iterations: The iteration at which training ends.
            tokens_per_iteration: Global batch size times sequence length.
            ranks: World size, by which throughput is divided.
            first_iteration: The iteration that a resumed training starts after.
            flops_per_token: By flops.py; 0 leaves TFLOP/s out.
            peak_tflops: Of the device that each rank has; None leaves MFU out.
            memory: Gives the bytes that this rank needed at most.
        """
        self.tensorboard = tensorboard
        self.file = file
        self.terminal = terminal
        self.iterations = iterations
        self.tokens_per_iteration = tokens_per_iteration
        self.ranks = ranks
        self.first_iteration = first_iteration
        self.flops_per_token = flops_per_token
        self.peak_tflops = peak_tflops
        self.memory = memory
        self.trackers: Sequence[Callable[[Mapping[str, Any]], None]] = ()
        self.alarms = Alarms()
        self.stalls = StallWatch(self.alarms, self.alarm)
        self.iteration = first_iteration
        self.pending: dict[str, float] = {}
        self.last_step = time.monotonic()
        self.timed: deque[float] = deque(maxlen=AVERAGED_ITERATIONS)
        self.live_line_open = False
        self.evaluated = "validation"
        self.last_evaluation: tuple[float, int] | None = None
        end_last_line(file)
        self.evaluations = evaluations_at(file, first_iteration)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the wrapped writer's."""
        return getattr(self.tensorboard, name)

    def add_scalar(self, tag: str, value: Any, iteration: int, *rest: Any) -> None:
        """Pass a figure on, and keep those that metrics.jsonl names."""
        self.tensorboard.add_scalar(tag, value, iteration, *rest)
        if tag == EVALUATION:
            self.end_evaluation(float(value), iteration)
        elif tag in NAMES:
            self.pending[NAMES[tag]] = float(value)

    def end_evaluation(self, loss: float, iteration: int) -> None:
        """Write the loss on the validation or the test set; Megatron's last one comes twice."""
        self.last_evaluation = loss, iteration
        if (self.evaluated, iteration) not in self.evaluations:
            self.evaluations.add((self.evaluated, iteration))
            self.append({"iteration": iteration, f"{self.evaluated}_loss": loss})
            self.say(f"iteration {iteration}: {self.evaluated} loss {loss:.4f}")
        self.end_pause()

    def begin_pause(self) -> None:
        """An evaluation or a save begins: until its end no iteration is expected."""
        self.stalls.paused = True

    def end_pause(self) -> None:
        """An evaluation or a checkpoint is done: its time is no iteration's."""
        self.stalls.alive()
        self.last_step = time.monotonic()

    def end_save(self, iteration: int, seconds: float) -> None:
        """A checkpoint was saved, for which training stood still."""
        self.append({"iteration": iteration, "save_seconds": round(seconds, 3)})
        self.tensorboard.add_scalar("save-seconds", seconds, iteration)
        self.end_pause()

    def alarm(self, text: str) -> None:
        """Say what a person should look at, and keep it."""
        self.end_live_line()
        logger.warning("ALARM after iteration %d: %s", self.iteration, text)
        self.append({"iteration": self.iteration, "alarm": text})

    def end_iteration(self, iteration: int, waits: Mapping[str, float] | None = None) -> None:
        """Write the iteration's record and its live line, and what is alarming about it.

        Args:
            iteration: The one that has ended.
            waits: Figures of all ranks' waiting, when there are new ones.
        """
        self.iteration = iteration
        self.stalls.alive()
        if iteration == self.iterations:
            self.stalls.ended.set()
        now = time.monotonic()
        seconds, self.last_step = now - self.last_step, now
        # The first iteration after a start also warms up: it would spoil the time left.
        if iteration > self.first_iteration + 1:
            self.timed.append(seconds)
        tokens_per_second = self.tokens_per_iteration / seconds
        if "target_tokens" in self.pending:
            self.pending["target_tokens"] = round(self.pending["target_tokens"])
        record = {
            "iteration": iteration,
            **self.pending,
            "tokens": iteration * self.tokens_per_iteration,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens_per_second, 1),
            "tokens_per_second_per_rank": round(tokens_per_second / self.ranks, 1),
            **self.arithmetic(tokens_per_second / self.ranks),
            **({"memory_bytes": self.memory()} if self.memory else {}),
            **(waits or {}),
        }
        left = self.seconds_left(iteration)
        self.append(record if left is None else {**record, "seconds_left": round(left, 1)})
        for name in ("tflops_per_rank", "mfu", "memory_bytes", *(waits or {})):
            if name in record:
                self.tensorboard.add_scalar(name.replace("_", "-"), record[name], iteration)
        mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        self.live(
            f"iteration {iteration}/{self.iterations}  loss {self.pending.get('loss', math.nan):.4f}"
            f"  {tokens_per_second:,.0f} tokens/s{mfu}"
            f"{'' if left is None else f'  {duration(left)} left'}",
            last=iteration == self.iterations,
            iteration=iteration,
        )
        loss, norm = self.pending.get("loss"), self.pending.get("gradient_norm", 0.0)
        if loss is not None:
            # The first iteration after a start says nothing of how long one takes.
            timed = seconds if iteration > self.first_iteration + 1 else None
            for text in self.alarms.observe(
                iteration, loss=loss, gradient_norm=norm, seconds=timed
            ):
                self.alarm(text)
        self.pending = {}

    def arithmetic(self, tokens_per_second: float) -> dict[str, float]:
        """A rank's TFLOP/s by its tokens per second, and its share of the device's peak."""
        if not self.flops_per_token:
            return {}
        tflops = tokens_per_second * self.flops_per_token / 1e12
        figures = {"tflops_per_rank": round(tflops, 4)}
        return figures | ({"mfu": round(tflops / self.peak_tflops, 4)} if self.peak_tflops else {})

    def seconds_left(self, iteration: int) -> float | None:
        """How long the iterations after this one will take, by the mean of the last ones."""
        left = self.iterations - iteration
        if not left or len(self.timed) < FEWEST_ITERATIONS:
            return None
        return left * sum(self.timed) / len(self.timed)

    def append(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        for log in self.trackers:
            log(record)  # which raises nothing

    def live(self, text: str, *, last: bool, iteration: int) -> None:
        """Show the live line: rewritten on a terminal; elsewhere about twenty lines a training."""
        if self.terminal.isatty():
            full = BAR * iteration // max(1, self.iterations)
            bar = "█" * full + "░" * (BAR - full)
            self.terminal.write(f"\r\033[K  {bar} {text}" + ("\n" if last else ""))
            self.live_line_open = not last
        elif last or iteration % max(1, self.iterations // 20) == 0:
            self.terminal.write(f"  {text}\n")
        self.terminal.flush()

    def say(self, text: str) -> None:
        """Log a line below the live line."""
        self.end_live_line()
        logger.info(text)

    def end_live_line(self) -> None:
        """What comes next on the terminal gets a line of its own."""
        if self.live_line_open:
            self.terminal.write("\n")
            self.live_line_open = False


def evaluations_at(file: Path, iteration: int) -> set[tuple[str, int]]:
    """The sets that were evaluated at an iteration before training was stopped there."""
    records = read_metrics(file) if file.is_file() else []
    return {
        (name.removesuffix("_loss"), iteration)
        for record in records
        for name in EVALUATED
        if name in record and record["iteration"] == iteration
    }


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order of iteration; a resumed iteration's last record counts.

    A line that a kill cut short is left out.
    """
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        kind = next((name for name in APART if name in record), "loss")
        kind = record.get("alarm", kind)  # an iteration can have several
        records[record["iteration"], kind] = record
    return [records[key] for key in sorted(records)]
