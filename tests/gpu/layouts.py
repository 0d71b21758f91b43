"""Several GPUs of one host under every parallel layout that fits them: speed, memory, losses.

    uv run python tests/gpu/layouts.py --directory DIR                   # all, in about ten minutes
    uv run python tests/gpu/layouts.py --directory DIR dense-dp2 moe-ep2 # these alone
    uv run python tests/gpu/layouts.py --directory DIR dense-1-fp8 dense-dp2-fp8 # and in FP8
    CUDA_VISIBLE_DEVICES= uv run python tests/gpu/layouts.py --directory DIR --gpus 2   # CPU ranks

Each experiment is the train stage as the workflow runs it (scripts/launch.py, torchrun, scripts/train.py,
Transformer Engine over NCCL) on a published shape with fewer layers; all of a shape start from the same
converted weights and read the same tokens. Without a GPU the shapes are tiny, the ranks talk over gloo,
and what only Transformer Engine does is left out. DIR needs 40 GB and should be fast: /dev/shm is.

The table gets a row as each one ends, and DIR/results.json is written again. How it is measured:

- time: the median of iterations 3 to 7, as metrics.jsonl has them
- TFLOP: megaqwen.training.flops
- memory: the most that a rank's allocator gave out, as Megatron logs it
- efficiency: TFLOP/s of a GPU over those of the shape on one GPU in bf16 with 4096 tokens a sample
- communication: see communication.py; the profiled iteration is the ninth
- loss, norm: the largest difference to the first experiment of the same shape, length and precision,
  over ten iterations: nats per token, and the gradient's norm relative to it. BOUND says how large it
  may be.

Then checkpoints of tiny models are taken from layout to layout: see layout_checkpoints.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "scripts"), str(HERE.parents[1]), str(HERE.parent)]

from layout_checkpoints import Checks  # noqa: E402
from layout_models import Models  # noqa: E402
from layout_plan import DENSE, EXPERTS, LAYERS, SEQUENCE, Experiment, plan  # noqa: E402
from layout_runs import Launched  # noqa: E402

from megaqwen.provenance import write_json  # noqa: E402

BOUND = 0.02  # nats per token, in bf16 and in FP8, which are that far from each other
TUNING = ("NCCL_", "NVTE_", "CUDA_DEVICE_MAX", "PYTORCH_")  # variables that decide speed
HOPELESS = 4  # so many failures at the start, and no more is tried
MOST_SECONDS = 100.0  # of one experiment
MOST_SECONDS_ON_CPU = 400.0


def main() -> int:
    """Run the experiments; 1 if one failed or a loss is out of its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of experiments; checkpoints; fp8")
    parser.add_argument("--directory", type=Path, required=True, help="for models, logs, results")
    parser.add_argument("--gpus", type=int, help="ranks (default: the GPUs that are visible)")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after that")
    arguments = parser.parse_args()
    import torch

    found = torch.cuda.device_count()
    gpus = arguments.gpus or found
    if not gpus or (found and gpus > found):
        parser.error(f"--gpus: {found} GPUs are visible")
    return Measurement(arguments, gpus, on_gpu=bool(found)).run()


class Measurement:
    """All experiments of a call."""

    def __init__(self, arguments: argparse.Namespace, gpus: int, *, on_gpu: bool):
        self.gpus = gpus
        self.on_gpu = on_gpu
        self.end = time.monotonic() + arguments.seconds
        self.most_seconds = MOST_SECONDS if on_gpu else MOST_SECONDS_ON_CPU
        self.directory = arguments.directory.resolve()
        self.models = Models(directory=self.directory, small=not on_gpu)
        self.names = set(arguments.names)
        self.experiments: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {"machine": machine(on_gpu, gpus)}

    def run(self) -> int:
        """Everything; the exit status."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.say(json.dumps(self.results["machine"]))
        began = time.monotonic()
        checks = self.checkpoint_checks()
        steps = self.steps()
        following = next(steps, [])
        ready = self.launch(following) if self.on_gpu else []
        try:
            if following:
                self.models.make(self.shapes())
                self.say(f"models and data: {time.monotonic() - began:.0f} s")
            if checks:
                checks.wait_for_trainings(self.left() / 2)
                self.say(f"trainings from checkpoints: {time.monotonic() - began:.0f} s")
            self.say(HEADING)
            while following:
                ready = ready or self.launch(following)
                for each in ready:
                    each.go()
                running, ready = ready, []
                following = next(steps, []) if self.left() > 0 else []
                if (
                    self.on_gpu
                ):  # on a CPU, a second one that imports would take the first one's time
                    ready = self.launch(following)
                self.finish(running)
                if len(self.experiments) >= HOPELESS and all(
                    "error" in e for e in self.experiments
                ):
                    break
        finally:
            for each in ready:
                each.end()
        if checks:
            self.results["checkpoints"] = checks.results()
            self.write()
        return self.verdict()

    def left(self) -> float:
        return self.end - time.monotonic()

    def steps(self) -> Iterator[list[Experiment]]:
        """Experiments that run side by side: those of one rank, one on each GPU."""
        chosen = self.all_chosen()
        alone = [each for each in chosen if each.ranks == 1]
        size = self.gpus if self.on_gpu else 1
        yield from (alone[first : first + size] for first in range(0, len(alone), size))
        several = [each for each in chosen if each.ranks > 1]
        first = len(several) // 2  # FP8 comes before what is least telling
        yield from ([each] for each in several[:first])
        yield from ([each] for each in self.best_in_fp8())
        yield from ([each] for each in several[first:])

    def shapes(self) -> list[str]:
        """The shapes that are trained."""
        wanted = {each.shape for each in self.all_chosen()}
        return [shape for shape in LAYERS if shape in wanted]

    def all_chosen(self) -> list[Experiment]:
        """Those of the plan, and by name any of them in FP8."""
        known = plan(self.gpus)
        known += [each.in_fp8() for each in known if each.precision != "fp8" and each.ranks > 1]
        return [each for each in known if self.chosen(each)]

    def chosen(self, experiment: Experiment) -> bool:
        planned = experiment.precision != "fp8" or experiment.ranks == 1
        wanted = experiment.name in self.names or (planned and not self.names)
        return wanted and (self.on_gpu or not experiment.needs_gpu)

    def best_in_fp8(self) -> Iterator[Experiment]:
        """The fastest layout of each shape so far, in FP8."""
        by_name = {each.name: each for each in plan(self.gpus)}
        several = self.on_gpu and self.gpus > 1  # of one GPU the plan has it
        wanted = several and (not self.names or "fp8" in self.names)
        for shape in (DENSE, EXPERTS) if wanted else ():
            done = [
                each
                for each in self.experiments
                if each["shape"] == shape
                and each["sequence"] == SEQUENCE
                and each["precision"] == "bf16"
                and each["ranks"] == self.gpus
                and "error" not in each
            ]
            if done:
                best = max(done, key=lambda each: each["tokens_per_second_per_gpu"])
                yield by_name[best["name"]].in_fp8()

    def launch(self, experiments: Sequence[Experiment]) -> list[Launched]:
        """Start the ranks; those of one rank get a GPU each."""
        return [
            Launched(each, self.models, self.gpus_of(each, place), self.gpus)
            for place, each in enumerate(experiments)
        ]

    def gpus_of(self, experiment: Experiment, place: int) -> list[int]:
        if not self.on_gpu:
            return []
        return [place] if experiment.ranks == 1 else list(range(self.gpus))

    def finish(self, launched: Sequence[Launched]) -> None:
        """Wait for trainings, end them and keep what they measured."""
        end = time.monotonic() + min(self.most_seconds, max(self.left(), 0) + 40)
        while time.monotonic() < end and not all(each.done() for each in launched):
            time.sleep(0.1)
        for each in launched:
            each.end()
            record = each.record()
            self.compare(record)
            self.experiments.append(record)
            self.write()
            self.say(row(record))

    def compare(self, record: dict[str, Any]) -> None:
        """Add how far a record is from the one that it is to be held against."""
        if "error" in record:
            return
        done = [each for each in self.experiments if "error" not in each]
        alone = [each for each in done if each["shape"] == record["shape"] and each["ranks"] == 1]
        if alone:
            efficiency = record["tflops_per_gpu"] / alone[0]["tflops_per_gpu"]
            record["scaling_efficiency"] = round(efficiency, 3)
        alike = ("shape", "sequence", "precision")
        for each in done:
            if all(each[fact] == record[fact] for fact in alike):
                record["compared_with"] = each["name"]
                record["loss_difference"] = furthest(each["losses"], record["losses"])
                norms = (each["gradient_norms"], record["gradient_norms"])
                record["norm_difference"] = furthest(*norms, relative=True)
                record["losses_agree"] = record["loss_difference"] < BOUND
                return

    def checkpoint_checks(self) -> Checks | None:
        """From layout to layout, a killed rank, parity; started, while the models are made."""
        if self.gpus == 1 or (self.names and "checkpoints" not in self.names):
            return None
        directory = self.directory / "checkpoints"
        return Checks(directory, self.gpus, on_gpu=self.on_gpu, say=self.say)

    def write(self) -> None:
        self.results["experiments"] = self.experiments
        write_json(self.directory / "results.json", self.results)

    def verdict(self) -> int:
        """The table once more, and whether all is well."""
        self.say("\n".join(["", HEADING, *map(row, self.experiments)]))
        checks = self.results.get("checkpoints", {})
        if checks:
            self.say(json.dumps(checks, indent=1))
        well = [each.get("losses_agree", "error" not in each) for each in self.experiments]
        return 0 if all(well) and checks.get("passed", True) else 1

    @staticmethod
    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def machine(on_gpu: bool, gpus: int) -> dict[str, Any]:
    """What it was measured on."""
    from importlib import metadata

    import torch

    versions = {}
    for name in ("torch", "megatron-core", "transformer-engine"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    device = gpu_name() if on_gpu else "CPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else ""
    variables = {name: value for name, value in os.environ.items() if name.startswith(TUNING)}
    return {"device": device, "gpus": gpus, **versions, "nccl": nccl, "environment": variables}


def gpu_name() -> str:
    """Name, memory and driver of the first GPU, without taking memory of it as torch would."""
    words = ["nvidia-smi", "-i", "0", "--query-gpu=name,memory.total,driver_version"]
    words.append("--format=csv,noheader")
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def furthest(first: list[float], second: list[float], *, relative: bool = False) -> float:
    """The largest difference between two curves."""
    pairs = zip(first, second, strict=True)
    return round(max(abs(a - b) / (abs(a) if relative else 1) for a, b in pairs), 5)


HEADING = (
    f"{'experiment':18} {'tokens/s/GPU':>12} {'TFLOP/s/GPU':>11} {'peak GiB':>8} {'efficiency':>10}"
    f" {'comm %':>6} {'exposed %':>9} {'idle %':>6} {'loss diff':>9} {'norm diff':>9} {'took s':>6}"
)


def row(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    if "error" in record:
        return f"{record['name']:18} {record['error']}"
    comm = record["communication"] or dict.fromkeys(("communication", "exposed", "idle"), "-")
    return (
        f"{record['name']:18} {record['tokens_per_second_per_gpu']:12,.0f}"
        f" {record['tflops_per_gpu']:11.1f} {record['peak_gib']:8.1f}"
        f" {record.get('scaling_efficiency', '-'):>10} {comm['communication']:>6}"
        f" {comm['exposed']:>9} {comm['idle']:>6} {record.get('loss_difference', '-'):>9}"
        f" {record.get('norm_difference', '-'):>9} {record['seconds']:6.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
