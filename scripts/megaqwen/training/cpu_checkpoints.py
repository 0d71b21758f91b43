"""Resume on a GPU what was saved without one. Three things differ:

- Transformer Engine's modules each keep an `_extra_state` (the scales of FP8), which the local modules
  on a CPU do not have. Megatron refuses a checkpoint that lacks any key it asks for, so the request for
  extra states that are not there is taken back, and for nothing else. The modules then start with their
  own, as they do in the first iteration of a training.
- torch's AdamW counts steps in each parameter's state, Transformer Engine's FusedAdam in the group's,
  and each has settings in its groups that the other does not know.
- The state of a CPU's random generator is none of a GPU's: there it starts from the seed again.
"""

import logging
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    load_common_state_dict,
    load_sharded_metadata,
)

from megaqwen.weights import find_checkpoint

logger = logging.getLogger("megaqwen.training")


def drop_absent(state_dict: dict[str, Any], saved: Collection[str]) -> None:
    """Remove, in place, the models' extra states whose keys are not among those saved.

    Args:
        state_dict: Megatron's sharded state dict; its models are named model, or model0 and so on.
        saved: The keys in the checkpoint.
    """
    models = [value for name, value in state_dict.items() if name.startswith("model")]
    for model in models:
        for name, value in list(model.items()):
            extra = isinstance(value, ShardedObject) and value.key.endswith("_extra_state")
            if extra and value.key not in saved:
                del model[name]


def steps_to_groups(state_dict: dict[str, Any]) -> None:
    """Move the count of steps, in place, from the parameters' states to their groups.

    Args:
        state_dict: A torch optimizer's; every parameter in it has made the same number of steps.
    """
    steps = {int(state.pop("step")) for state in state_dict["state"].values() if "step" in state}
    if len(steps) > 1:
        raise ValueError(f"parameters have made different numbers of steps: {sorted(steps)}")
    for group in state_dict["param_groups"] if steps else ():
        (group["step"],) = steps


def complete_groups(state_dict: dict[str, Any], own_groups: Sequence[Mapping[str, Any]]) -> None:
    """Give each group, in place, the settings that only the optimizer that loads it has.

    Args:
        state_dict: A torch optimizer's.
        own_groups: The param_groups of the optimizer that is to load it, in the same order.
    """
    for group, own in zip(state_dict["param_groups"], own_groups, strict=True):
        for name, value in own.items():
            group.setdefault(name, value)


def saved_on_cpu(checkpoints: Path) -> bool:
    """Whether the last checkpoint of a training was saved over gloo, as a machine without a GPU does."""
    return getattr(saved_arguments(checkpoints), "distributed_backend", None) == "gloo"


def saved_arguments(checkpoints: Path) -> Namespace | None:
    """Megatron's arguments of the training that saved the last checkpoint, which keeps them."""
    saved = load_common_state_dict(str(find_checkpoint(checkpoints)))
    return saved.get("args")


def leave_random_state(arguments: Namespace, checkpoints: Path) -> None:
    """Do not load the random state of a checkpoint that was saved on a CPU."""
    if saved_on_cpu(checkpoints):
        arguments.no_load_rng = True
        logger.info("saved on a CPU: what is random starts from train.seed again")


def install() -> None:
    """Let Megatron load such a checkpoint; call it on a GPU only."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    load_optimizer = FusedAdam.load_state_dict

    def load_with_steps(self: Any, state_dict: dict[str, Any]) -> None:
        steps_to_groups(state_dict)
        complete_groups(state_dict, self.param_groups)
        load_optimizer(self, state_dict)

    FusedAdam.load_state_dict = load_with_steps
    load = dist_checkpointing.load

    def load_what_is_there(state_dict: Any, checkpoint_dir: str, *words: Any, **named: Any) -> Any:
        metadata = load_sharded_metadata(checkpoint_dir)
        drop_absent(state_dict, {entry.key for entry in metadata.values()})
        return load(state_dict, checkpoint_dir, *words, **named)

    dist_checkpointing.load = load_what_is_there
