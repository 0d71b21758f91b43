"""Ranks that take Megatron through its start more than once."""


def forget() -> None:
    """Leave Megatron as before its start, but for the group of all ranks."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import global_vars
    from torch.distributed import distributed_c10d

    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):  # or their threads pile up
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    global_vars.destroy_global_vars()
    global_vars.unset_global_variables()
