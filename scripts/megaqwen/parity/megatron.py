"""Megatron's GPTModel on one rank, one layer in memory at a time, by Megatron's own loader.

Call `cpu_emulation.install` before this is imported.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training import global_vars
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor, nn

from megaqwen.config.megatron_options import to_arguments
from megaqwen.errors import InputError
from megaqwen.parity.huggingface import FirstLayerReached
from megaqwen.parity.one_layer import PartialLoad
from megaqwen.parity.points import Observations, Observed, observe
from megaqwen.training.arguments import CPU_OPTIONS
from megaqwen.training.model import model_config
from megaqwen.weights import find_checkpoint

POINTS = {
    "attention in": "input_layernorm",
    "attention out": "self_attention",
    "mlp in": "pre_mlp_layernorm",
    "router": "mlp.router",
    "mlp out": "mlp",
}


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


class MegatronLayers:
    """The model that training trains, in float32 with Megatron's local layers, on one rank."""

    def __init__(
        self,
        checkpoint: Path,
        architecture: dict[str, Any],
        vocabulary: int,
        max_tokens: int,
        rounded_to: torch.dtype = torch.float32,
    ):
        """Build it as training does, without weights.

        Args:
            checkpoint: The directory with latest_checkpointed_iteration.txt, of any layout.
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
        # Megatron keeps what it parsed for the whole process; another model may have been here.
        global_vars.unset_global_variables()
        unset_num_microbatches_calculator()
        sys.argv = [sys.argv[0], *to_arguments(options)]
        config = model_config(parse_and_validate_args())
        config.transformer.perform_initialization = False
        one_rank()
        with torch.device("meta"):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            self.model = GPTModelBuilder(config).build_model(groups).eval()
        self.saved = str(find_checkpoint(checkpoint))
        self.vocabulary, self.rounded_to = vocabulary, rounded_to
        self.modules = list(self.model.decoder.layers)
        self.layers = len(self.modules)

    @torch.no_grad()
    def embed(self, texts: list[Tensor]) -> list[Tensor]:
        """[positions, hidden] embeddings of each text, [positions] token ids."""
        self.calls: list[dict[str, Any]] = []
        hidden = []

        def stop(module: nn.Module, args: tuple[()], call: dict[str, Any]) -> None:
            hidden.append(call.pop("hidden_states")[:, 0])
            self.calls.append(call)
            raise FirstLayerReached

        hook = self.modules[0].register_forward_pre_hook(stop, with_kwargs=True)
        with self.loaded(self.model.embedding, "embedding."):
            for tokens in texts:
                try:
                    self.model(tokens[None], torch.arange(len(tokens))[None], None)
                except FirstLayerReached:
                    continue
        hook.remove()
        return hidden

    @torch.no_grad()
    def layer(self, index: int, hidden: list[Tensor]) -> tuple[list[Tensor], Observations]:
        """What a layer makes of each text's [positions, hidden], and what was seen within it."""
        layer = self.modules[index]
        with (
            self.loaded(layer, f"decoder.layers.{index}."),
            observe(layer, POINTS) as seen,
            router_logits(layer, seen),
        ):
            outputs = [
                layer(hidden_states=states[:, None], **call)[0][:, 0]
                for states, call in zip(hidden, self.calls, strict=True)
            ]
        return outputs, [self.observed(each) for each in seen]

    @contextmanager
    def head(self) -> Iterator[Any]:
        """Within it: the final norm, and a function from its [positions, hidden] to the logits."""
        model, norm = self.model, self.model.decoder.final_layernorm
        tied = model.share_embeddings_and_output_weights
        module, prefix = (
            (model.embedding, "embedding.") if tied else (model.output_layer, "output_layer.")
        )
        with (
            torch.no_grad(),
            self.loaded(norm, "decoder.final_layernorm."),
            self.loaded(module, prefix),
        ):
            weight = model.shared_embedding_or_output_weight() if tied else None

            def logits(states: Tensor) -> Tensor:
                return model.output_layer(states[:, None], weight=weight)[0][
                    :, 0, : self.vocabulary
                ]

            yield norm, logits

    @contextmanager
    def loaded(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """The module with the weights that Megatron loads for it, no longer than this."""
        module.to_empty(device="cpu")
        decoder = self.model.decoder
        # Each layer knows its own number, and by it its place in the tensors of all layers.
        if module in self.modules:
            decoder.layers = nn.ModuleList([module])
        wanted = {
            name: value
            for name, value in self.model.sharded_state_dict().items()
            if name.startswith(prefix)
        }
        decoder.layers = nn.ModuleList(self.modules)
        loaded = dist_checkpointing.load(
            {"model": wanted}, self.saved, PartialLoad(), validate_access_integrity=False
        )
        names = {name: value for name, value in loaded["model"].items() if name.startswith(prefix)}
        module.load_state_dict({name.removeprefix(prefix): t for name, t in names.items()})
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.to(self.rounded_to))
        try:
            yield
        finally:
            module.to("meta")

    @staticmethod
    def observed(seen: dict[str, Any]) -> Observed:
        """One text's observations as [positions, width]; a router's are its logits and choices."""
        found: Observed = {}
        for name, output in seen.items():
            if name == "router logits":
                found["router"] = output.reshape(-1, output.shape[-1])
            elif name == "router":
                found["choices"] = output[1].nonzero()[:, 1].reshape(len(output[1]), -1)
            else:
                first = output[0] if isinstance(output, tuple) else output
                found[name] = first.reshape(-1, first.shape[-1])
        return found


@contextmanager
def router_logits(layer: nn.Module, seen: list[dict[str, Any]]) -> Iterator[None]:
    """Keep the logits of a layer's router, if it has one, which its output does not tell."""
    router = getattr(layer.mlp, "router", None)
    if router is None:
        yield
        return
    gating = router.gating

    def kept(states: Tensor) -> Tensor:
        logits: Tensor = gating(states)
        seen[-1]["router logits"] = logits.clone()
        return logits

    router.gating = kept
    try:
        yield
    finally:
        router.gating = gating


def one_rank() -> None:
    """Megatron's process groups, of this process alone."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
