"""Launching the experiments of layouts.py, one after the other, and reading what they left."""

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from communication import read_shares
from layout_models import Models
from layout_plan import Experiment, small_options

from commands import ROOT
from megaqwen.training.flops import flops_per_token
from megaqwen.training.metrics import read_metrics

TIMED = range(3, 8)  # iterations; those before warm up
PROFILED = 9  # the profiler warms up in the one before, and writes in the one after
LAST = PROFILED + 1
NEVER = 100_000  # iterations to train and between checkpoints: it is ended after LAST
PROFILER: dict[str, Any] = {
    "profile": True,
    "use_pytorch_profiler": True,
    "profile_step_start": PROFILED,
    "profile_step_end": PROFILED + 1,
}


class Launched:
    """A training that scripts/launch.py started, and that waits until it is told to go."""

    def __init__(self, experiment: Experiment, models: Models, gpus: Sequence[int], total: int):
        """Start the ranks.

        Args:
            experiment: What it will train.
            models: What it starts from.
            gpus: The GPUs that it may see; none leaves the environment as it is.
            total: GPUs of the machine, which the global batch is for.
        """
        self.experiment = experiment
        self.models = models
        self.total = total
        self.directory = models.directory / "runs" / experiment.name
        shutil.rmtree(self.directory, ignore_errors=True)  # of an earlier call
        self.directory.mkdir(parents=True)
        self.config = self.directory.with_suffix(".yaml")
        self.turn = self.directory / "turn"
        self.log = self.directory / "log"
        self.started = 0.0
        environment = {**os.environ, "LAYOUT_TURN": str(self.turn), "OMP_NUM_THREADS": "1"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with open(self.directory / "launcher.log", "w", encoding="utf-8") as said:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, ROOT / "scripts" / "launch.py", "--log", self.log),
                    *("--ranks-per-node", str(experiment.ranks)),
                    Path(__file__).with_name("layout_rank.py"),
                    *models.words(self.config, experiment.shape, self.directory),
                ],
                env=environment,
                stdout=said,
                stderr=said,
            )

    def go(self) -> None:
        """Its turn has come."""
        options = self.experiment.options(self.total)
        if self.models.small:
            options = small_options(options)
        options |= {**PROFILER, "train_iters": NEVER, "save_interval": NEVER}
        options |= {"log_memory_interval": PROFILED - 2}
        self.models.config(self.config, self.experiment.shape, options)
        self.turn.touch()
        self.started = time.monotonic()

    def done(self) -> bool:
        """Whether it got to LAST, or ended by itself."""
        return self.process.poll() is not None or len(self.rows()) >= LAST

    def rows(self) -> list[dict[str, Any]]:
        """The iterations so far, from metrics.jsonl."""
        found = list(self.directory.glob("checkpoints/*/metrics.jsonl"))
        return [row for row in read_metrics(found[0]) if "loss" in row] if found else []

    def end(self) -> None:
        """End it at once; nothing is saved."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in (*launcher.children(recursive=True), launcher):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def record(self) -> dict[str, Any]:
        """What is known of it once it ended."""
        facts = {**asdict(self.experiment), "seconds": round(time.monotonic() - self.started, 1)}
        rows = self.rows()[:LAST]  # before it ended it may have done more
        if len(rows) < LAST:
            return {**facts, "error": self.failure() or f"{len(rows)} iterations in its time"}
        return {**facts, **self.figures(rows)}

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Speed, memory, communication, losses."""
        seconds = statistics.median(rows[iteration - 1]["seconds"] for iteration in TIMED)
        length = rows[-1]["tokens"] // rows[-1]["iteration"] // self.experiment.samples(self.total)
        tokens = rows[0]["tokens"] / seconds / self.experiment.ranks
        flops = flops_per_token(self.models.hf_config(self.experiment.shape), length)
        return {
            "iteration_seconds": seconds,
            "tokens_per_second_per_gpu": tokens,
            "tflops_per_gpu": tokens * flops / 1e12,
            "peak_gib": self.peak_gib(),
            "communication": self.communication(),
            "losses": [row["loss"] for row in rows],
            "gradient_norms": [row.get("gradient_norm") for row in rows],
            "all_seconds": [row["seconds"] for row in rows],
        }

    def peak_gib(self) -> float:
        """The most memory that a rank's allocator gave out, of those that Megatron reports."""
        logs = self.directory.glob("log.rank*.log")
        found = [
            float(size)
            for log in logs
            for size in re.findall(r"\| max allocated: ([\d.]+)", log.read_text(errors="replace"))
        ]
        return max(found, default=0.0) / 1024

    def communication(self) -> dict[str, float] | None:
        """The ranks' mean shares of the profiled iteration, in percent; None without a GPU."""
        traces = sorted(self.directory.glob("checkpoints/*/torch_profile/rank-*.json.gz"))
        found = [asdict(each) for each in map(read_shares, traces) if each]
        if not found:
            return None
        return {
            name: round(100 * statistics.mean(each[name] for each in found), 1) for name in found[0]
        }

    def failure(self) -> str:
        """The last error of a rank, or of Megatron's, or nothing where it was only slow."""
        errors = [
            line.split(" ERROR ", 1)[1]
            for log in sorted(self.directory.glob("log.rank*.log"))
            for line in log.read_text(errors="replace").splitlines()
            if " ERROR " in line
        ]
        code = self.process.poll()
        return errors[-1][:300] if errors else (f"exit {code}" if code and code > 0 else "")
