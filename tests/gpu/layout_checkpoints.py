"""Checkpoints of tiny models on all GPUs: from layout to layout, past a killed rank, through parity.

Three trainings side by side, since none is timed:

- a dense model saved under tensor parallelism goes on under pipeline stages with virtual ones
- a model with experts saved under expert parallelism goes on under tensor parallelism as well
- of a third, one rank is killed (SIGKILL): the launcher ends the others, and the same command goes on

Each is compared with the training that nothing happened to, by its losses; what was trained before and
after the move is exported and held against the gates.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
from layout_plan import ON_GPU_ALONE

from commands import ROOT
from megaqwen.checkpoints import TRACKER
from megaqwen.config import load_config
from megaqwen.layout import Layout
from workspace import Workspace, largest_difference, losses, prepare

SAVED, ITERATIONS = 8, 24
START_SECONDS = 280.0  # to train so far; a stage has 300
LOSS_BOUND = {True: 5e-2, False: 1e-3}  # nats per token: bfloat16 on GPUs, float32 on CPUs
OPTIONS: dict[str, Any] = {
    "bf16": True,
    "use_distributed_optimizer": True,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "train_iters": ITERATIONS,
    "save_interval": SAVED,
    "eval_interval": ITERATIONS,
}
TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE: dict[str, Any] = {
    "pipeline_model_parallel_size": 2,
    "num_virtual_stages_per_pipeline_rank": 2,
}
GROUPED: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True}
EXPERT = {"expert_model_parallel_size": 2}
# Megatron has an optimizer of their own for experts that ranks share out, and loads its state into such
# a one alone: expert parallelism is on both sides of the move.
TENSOR_AND_EXPERT = {**TENSOR, **EXPERT, "expert_tensor_parallel_size": 1}
MOVES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2 to pp2-vpp2": ("qwen3", TENSOR, PIPELINE),
    "ep2 to tp2-ep2": ("qwen3_moe", {**GROUPED, **EXPERT}, {**GROUPED, **TENSOR_AND_EXPERT}),
}
Say = Callable[[str], None]


class Checks:
    """The checks, running in threads; those of parity go on where the GPUs are not needed."""

    def __init__(self, directory: Path, gpus: int, *, on_gpu: bool, say: Say):
        self.gpus = gpus
        self.on_gpu = on_gpu
        self.say = say
        self.directory = directory
        self.pool = ThreadPoolExecutor(max_workers=8 if on_gpu else 1)
        self.trainings: list[Future[dict[str, Any]]] = []
        self.gates: dict[str, Future[Any]] = {}
        self.straight: dict[str, list[float]] = {}
        self.prepared = {
            model: self.pool.submit(self.prepare, model) for model in ("qwen3", "qwen3_moe")
        }
        self.trainings = [self.pool.submit(self.guarded, self.move, name) for name in MOVES]
        self.trainings.append(self.pool.submit(self.guarded, self.kill, "a killed rank"))

    def prepare(self, model: str) -> Workspace:
        directory = self.directory / model
        directory.mkdir(parents=True)
        return prepare(directory, model)

    def guarded(self, check: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
        """A check's facts, or its error: the others go on."""
        try:
            facts = {"name": name, **check(name)}
        except Exception as error:  # noqa: BLE001
            facts = {"name": name, "passed": False, "error": str(error)[-1500:]}
        self.say(f"checkpoints: {facts}")
        return facts

    def wait_for_trainings(self, timeout: float) -> None:
        """Until the GPUs are free, or for as many seconds."""
        wait(self.trainings, timeout=timeout)

    def results(self) -> dict[str, Any]:
        """All facts, once everything ended."""
        found = [each.result() for each in self.trainings]
        gates = {}
        for name, gate in self.gates.items():
            error = gate.exception()
            gates[name] = "passed" if error is None else str(error)[-1500:]
        if "losses" in found[-1] and "qwen3" in self.straight:  # the killed one, as if nothing was
            difference = largest_difference(found[-1]["losses"], self.straight["qwen3"])
            found[-1]["loss_difference"] = difference
            found[-1]["passed"] &= difference < LOSS_BOUND[self.on_gpu]
        passed = all(each["passed"] for each in found)
        passed = passed and all(verdict == "passed" for verdict in gates.values())
        self.pool.shutdown()
        return {"passed": passed, "trainings": found, "parity": gates}

    def options(self, layout: dict[str, Any]) -> dict[str, Any]:
        options = {**OPTIONS, **layout}
        if self.on_gpu:
            return options
        return {key: value for key, value in options.items() if key not in ON_GPU_ALONE}

    def export(
        self, workspace: Workspace, name: str, trained: Path, layout: dict[str, Any]
    ) -> None:
        """Hold against the gates what was trained, while other things go on."""
        words = (f"export-{name}", trained, self.options(layout), "source")
        self.gates[f"{workspace.architecture} {name}"] = self.pool.submit(workspace.export, *words)

    def move(self, name: str) -> dict[str, Any]:
        """Save under one layout, go on under another."""
        model, before, after = MOVES[name]
        workspace = self.prepared[model].result()
        straight = workspace.train("before", self.gpus, self.options(before))
        self.straight[model] = losses(straight)
        moved = self.take_over(workspace, straight, after)
        self.export(workspace, "before", straight, before)
        assert workspace.train("after", self.gpus, self.options(after)) == moved
        self.export(workspace, "after", moved, after)
        log = workspace.directory / f"after.log.rank{self.gpus - 1}.log"
        assert f"resuming after iteration {SAVED}" in log.read_text(errors="replace")
        went_on = losses(moved)
        difference = largest_difference(self.straight[model][SAVED:], went_on)
        return {
            "loss_difference": difference,
            "bound": LOSS_BOUND[self.on_gpu],
            "losses": went_on,
            "passed": difference < LOSS_BOUND[self.on_gpu],
        }

    def take_over(self, workspace: Workspace, saved: Path, layout: dict[str, Any]) -> Path:
        """Put a checkpoint where a training under another layout resumes from; that directory."""
        config = workspace.config("after", self.options(layout))
        place = Layout(config=load_config(config)).checkpoints.name
        checkpoints = workspace.directory / "after" / "checkpoints" / place
        iteration = f"iter_{SAVED:07d}"
        shutil.copytree(saved / iteration, checkpoints / iteration)
        (checkpoints / TRACKER).write_text(str(SAVED))
        return checkpoints

    def kill(self, name: str) -> dict[str, Any]:
        """SIGKILL to the last rank between two checkpoints; then the same command again."""
        workspace = self.prepared["qwen3"].result()
        options = self.options(TENSOR)
        words = workspace.launch_words("killed", self.gpus, options)
        with open(workspace.directory / "killed.said", "w", encoding="utf-8") as said:
            launcher = subprocess.Popen(
                [sys.executable, ROOT / "scripts" / "launch.py", *words],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
            )
        output = workspace.directory / "killed"
        end = time.monotonic() + START_SECONDS
        while self.iterations(output) < SAVED + 2:
            said = (workspace.directory / "killed.said").read_text()
            assert launcher.poll() is None and time.monotonic() < end, said
            time.sleep(0.01)
        (torchrun,) = psutil.Process(launcher.pid).children()
        ranks = [each for each in torchrun.children() if "train.py" in " ".join(each.cmdline())]
        ranks[-1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        status = launcher.wait(timeout=180)
        seconds = time.monotonic() - began
        left = [each.pid for each in ranks if each.is_running()]
        before = self.iterations(output)
        trained = workspace.train("killed", self.gpus, options)
        log = (workspace.directory / f"killed.log.rank{self.gpus - 1}.log").read_text(
            errors="replace"
        )
        resumed = int(log.rsplit("resuming after iteration ", 1)[1].split()[0])
        return {
            "killed_after_iteration": before,
            "exit_status": status,
            "seconds_until_all_ended": round(seconds, 1),
            "ranks_left": left,
            "resumed_after_iteration": resumed,
            "losses": losses(trained),
            "passed": bool(status) and not left and SAVED <= resumed <= before,
        }

    @staticmethod
    def iterations(output: Path) -> int:
        """How many iterations metrics.jsonl has."""
        return sum(len(losses(path.parent)) for path in output.glob("checkpoints/*/metrics.jsonl"))
