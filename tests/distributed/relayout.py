"""Ranks that load checkpoints under other layouts and save them again, with Megatron's own code.

    torchrun --nproc-per-node 4 relayout.py JOBS.json

JOBS.json is a list of {"options": Megatron's options, "load": ..., "save": ...}, done in order.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from forgetting import forget

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


def relayout(options: dict[str, Any], load: str, save: str) -> None:
    """Build the model under a layout, load it, and save it."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    from megaqwen.config.megatron_options import to_arguments
    from megaqwen.training.datasets import use_compiled_helpers
    from megaqwen.training.model import model_config
    from megaqwen.training.saving import write_without_a_process

    use_compiled_helpers()
    write_without_a_process()
    sys.argv = [sys.argv[0], *to_arguments({**options, "load": load, "save": save})]
    arguments = parse_and_validate_args()
    initialize.initialize_megatron(allow_no_cuda=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = GPTModelBuilder(model_config(arguments))
    model = builder.build_distributed_models(groups, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    save_checkpoint(1, model, None, None, 0)
    forget()


def main() -> None:
    """All jobs."""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron

    import torch

    for job in json.loads(Path(sys.argv[1]).read_text()):
        started = time.monotonic()
        relayout(**job)
        if torch.distributed.get_rank() == 0:
            print(f"{job['save']}: {time.monotonic() - started:.1f} s", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
