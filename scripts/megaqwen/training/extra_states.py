"""Resume on a GPU what was saved without one.

Transformer Engine's modules each keep an `_extra_state` (the scales of FP8), which the local modules on
a CPU do not have. Megatron refuses a checkpoint that lacks any key it asks for; `install` takes back
the request for extra states that are not there, and for nothing else. The modules then start with
their own, as they do in the first iteration of a training.
"""

from collections.abc import Collection
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata


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


def install() -> None:
    """Let `dist_checkpointing.load` load from a checkpoint without extra states."""
    load = dist_checkpointing.load

    def load_what_is_there(state_dict: Any, checkpoint_dir: str, *words: Any, **named: Any) -> Any:
        metadata = load_sharded_metadata(checkpoint_dir)
        drop_absent(state_dict, {entry.key for entry in metadata.values()})
        return load(state_dict, checkpoint_dir, *words, **named)

    dist_checkpointing.load = load_what_is_there
