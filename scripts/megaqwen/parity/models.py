"""The two models that are compared, each in float32 on the CPU: transformers' and Megatron's.

Call `cpu_emulation.install` before this is imported.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaqwen.config.megatron_options import to_arguments
from megaqwen.errors import InputError
from megaqwen.training.arguments import CPU_OPTIONS
from megaqwen.training.model import model_config
from megaqwen.weights import find_checkpoint


def recorded_options(checkpoint: Path, names: Iterable[str]) -> dict[str, Any]:
    """What a checkpoint itself records of its model, whatever config.json says now.

    Args:
        checkpoint: The directory with latest_checkpointed_iteration.txt.
        names: Megatron's options that shape a model or its arithmetic.

    Raises:
        InputError: The checkpoint records none, or not all of them.
    """
    saved = find_checkpoint(checkpoint)
    recorded = vars(load_common_state_dict(str(saved)).get("args", Namespace()))
    if missing := [name for name in names if name not in recorded]:
        raise InputError(
            f"{saved} does not record its model's options ({', '.join(missing)}):"
            " convert it again, or save it with Megatron's training"
        )
    return {name: recorded[name] for name in names}


class HuggingFaceModel:
    """transformers' model, in float32 with its plainest attention."""

    def __init__(self, directory: Path):
        """Load it.

        Args:
            directory: A Hugging Face model directory.
        """
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[positions, vocabulary] logits of [positions] token ids."""
        return self.model(tokens[None]).logits[0]


class MegatronModel:
    """Megatron's GPTModel on one rank, in float32, from a torch_dist checkpoint of any layout."""

    def __init__(
        self,
        checkpoint: Path,
        architecture: dict[str, Any],
        vocabulary: int,
        max_tokens: int,
        rounded_to: torch.dtype = torch.float32,
    ):
        """Build it as training does, and let Megatron load the checkpoint.

        Args:
            checkpoint: The directory with latest_checkpointed_iteration.txt.
            architecture: The model in Megatron's options, see `recorded_options`.
            vocabulary: Rows of the embedding that stand for tokens.
            max_tokens: The longest text.
            rounded_to: The dtype that the other model's weights are stored in: what an export in
                bfloat16 of float32 weights leaves out is chosen, not a mistake.
        """
        options = {
            **architecture,
            **CPU_OPTIONS,
            "vocab_size": vocabulary,
            "tokenizer_type": "NullTokenizer",
            "seq_length": max_tokens,
            "micro_batch_size": 1,
            "train_iters": 1,
            "lr": 1.0,
        }
        sys.argv = [sys.argv[0], *to_arguments(options)]
        arguments = parse_and_validate_args()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        builder = GPTModelBuilder(model_config(arguments))
        self.model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
        state = {"model": self.model.sharded_state_dict()}
        loaded = dist_checkpointing.load(state, str(find_checkpoint(checkpoint)))
        self.model.load_state_dict(loaded["model"])
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(rounded_to))
        self.model.eval()
        self.vocabulary = vocabulary

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[positions, vocabulary] logits of [positions] token ids, without pad rows."""
        positions = torch.arange(len(tokens))
        output = self.model(tokens[None], positions[None], None)
        return output[0, :, : self.vocabulary]
