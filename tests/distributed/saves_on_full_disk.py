"""A rank whose checkpoint has no room, waited for and asynchronous, with Megatron's own code.

python saves_on_full_disk.py DIRECTORY

DIRECTORY is a filesystem of less than CHECKPOINT bytes. It prints what each of the two saves raises.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
CHECKPOINT = 32 << 20  # bytes


def main() -> None:
    """Both."""
    from megaqwen.training import cpu_emulation

    cpu_emulation.install()  # before anything imports Megatron

    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    from megaqwen.config.sections import Checkpoints
    from megaqwen.training.saving import Saving

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    directory = Path(sys.argv[1])
    Saving(directory, Checkpoints()).install()
    weight = ShardedTensor.from_rank_offsets("weight", torch.rand(CHECKPOINT // 4))
    settings = {"async_sharded_save": True, "async_strategy": "mcore"}
    for name, words in {"waited for": {}, "asynchronous": settings}.items():
        try:
            request = dist_checkpointing.save({"weight": weight}, directory, **words)
            if request:
                request.execute_sync()  # as at the end of training, in this process
        except (OSError, RuntimeError) as error:
            print(f"{name}: {error!r}", flush=True)
        for path in directory.iterdir():
            path.unlink()


if __name__ == "__main__":
    main()
