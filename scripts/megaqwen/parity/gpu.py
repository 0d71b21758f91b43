"""Training's dtype as a GPU computes it: a process of its own does, with Transformer Engine.

Parity itself runs as if the machine had no GPU. Of its ranks the one that measures starts that process,
megaqwen.parity.gpu_process, in the surroundings that parity had before.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megaqwen.config.rank_options import DTYPE, ON_GPU, number_format, taken
from megaqwen.errors import InputError
from megaqwen.parity.ranked_model import model_options
from megaqwen.training.arguments import gpu_options
from megaqwen.training.supervise import end_with_parent

THRESHOLDS = {
    "bfloat16": 1.1,
    "fp8 tensorwise": 1.5,
    "fp8 blockwise": 1.2,
    "fp8 delayed": 1.5,
}
"""By what training computes in: of FP8's recipes, those of which it is known what a healthy model has.

By scales that are no powers of two all numbers are rounded otherwise where the largest is another by one
rounding; in a model whose positions are alike, as early in training, that does not average out.
"""
SECONDS = 1800
"""No forward pass takes so long: something hangs."""
SCRIPTS = Path(__file__).parents[2]

logger = logging.getLogger("megaqwen.parity")


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """Of two batches each layer's [sequences, positions, hidden], then the logits."""

    outputs: list[Tensor]
    long: list[Tensor] | None = None
    without_long: str = ""
    """Why the second was not computed, where it was asked for."""


def last_error(said: str) -> str:
    """The last line that names an error, which warnings may follow; else the last one."""
    lines = [line.removeprefix("[rank0]:").strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["nothing"])[-1]


def computes_in(train: Mapping[str, Any]) -> str | None:
    """bfloat16, or what is narrower with its recipe; None in float32 and float16."""
    dtype = number_format(train)
    if dtype in ("fp8", "fp4"):
        default = "delayed" if dtype == "fp8" else "nvfp4"
        return f"{dtype} {train.get(f'{dtype}_recipe', default)}"
    return dtype if dtype == "bfloat16" else None


def forward_options(
    train: Mapping[str, Any],
    architecture: Mapping[str, Any],
    checkpoint: Path,
    vocabulary: int,
    shape: tuple[int, int],
    device: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Megatron's options for training's forward pass of the whole model on one GPU.

    Args:
        train: Training's.
        architecture: What the checkpoint records of its model.
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        vocabulary: Rows of the embedding that stand for tokens.
        shape: Sequences of a batch, and positions of the longest.
        device: What the machine needs; what training takes on a GPU, if it is left out.
    """
    chosen = {name: value for name, value in train.items() if name != "async_save"}
    own = gpu_options(chosen, architecture) if device is None else device
    options = model_options(
        architecture, checkpoint, vocabulary, taken(train, DTYPE, ON_GPU), shape, own
    )
    if (dispatcher := train.get("moe_token_dispatcher_type")) in ("allgather", "alltoall"):
        options["moe_token_dispatcher_type"] = dispatcher  # the third one is for several GPUs
    return {
        **options,
        "micro_batch_size": shape[0],  # FP8's scales are of all that is computed at once
        # Weights alone are in memory: no optimizer, and no gradients for products to be added to.
        "skip_train": True,
        "gradient_accumulation_fusion": False,
    }


def forward_elsewhere(
    options: Mapping[str, Any],
    batch: Tensor,
    long: Tensor | None = None,
    *,
    vocabulary: int,
    parameters: int,
    rounded_to: torch.dtype | None,
    variables: Mapping[str, str],
) -> Forwarded | str:
    """What Megatron computes in a process of its own; or in words why it was not measured.

    With CPU_OPTIONS among the options it does so on the CPU: the tests on machines without a GPU do.

    Args:
        options: Megatron's.
        batch: [sequences, positions + 1] tokens.
        long: More of them, of which a few positions are asked for.
        vocabulary: Logits at a position.
        parameters: Of the model.
        rounded_to: The dtype that the other model's weights are stored in, if it is narrower.
        variables: The process's environment, but for what tells a rank its place.

    Raises:
        InputError: The process failed.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    path = os.pathsep.join(filter(None, (str(SCRIPTS), variables.get("PYTHONPATH"))))
    with TemporaryDirectory(prefix="megaqwen-gpu-") as directory:
        asked, told = Path(directory) / "asked", Path(directory) / "told"
        request = {
            "options": dict(options),
            "batch": batch,
            "long": long,
            "vocabulary": vocabulary,
            "parameters": parameters,
            "rounded_to": rounded_to,
        }
        torch.save(request, asked)
        words = [sys.executable, "-m", "megaqwen.parity.gpu_process", str(asked), str(told)]
        try:
            done = subprocess.run(
                words,
                env={**variables, **alone, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=SECONDS,
                preexec_fn=end_with_parent,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"the forward pass on a GPU did not end within {SECONDS / 60:.0f} minutes: look at the"
                " GPU with nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES= and go without this gate"
            ) from error
        sys.stdout.write(done.stdout)  # into the stage's log
        sys.stdout.flush()
        if done.returncode:
            raise InputError(
                "the forward pass on a GPU failed, as training's would with these options and this"
                f" installation: it exited with {done.returncode} and said last:"
                f" {last_error(done.stdout)}. All that it said is in the stage's log"
            )
        answer: dict[str, Any] = torch.load(told)
    if reason := answer.get("unmeasured"):
        return str(reason)
    return Forwarded(**answer)
