"""Lets Megatron's distributed optimizer save and resume over FusedAdam, and beside the CPU's Adam.

In three places megatron-core 0.19.2 does not agree with Transformer Engine 2.20.2:

- with use_precision_aware_optimizer FusedAdam keeps of a float32 weight what bfloat16 lacks, as int16; a
  checkpoint has it in float32, in which FusedAdam does not take it back;
- of FusedAdam's state_dict a save wants the groups, and gets copies of all narrow moments in float32 with
  them, on the GPU: 8 bytes a weight that a training which just fits has not;
- with optimizer_cpu_offload a loaded count of steps stays in the outer optimizer's groups, from where it
  sets back the inner ones' at each step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Mend all; call it on a GPU only."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    set_state = FusedAdam.set_scaled_state

    def set_remainders(self: Any, param: Any, name: str, state: Tensor) -> None:
        remain = self.store_param_remainders and param.dtype == torch.bfloat16
        if name == "master_param" and remain and state.dtype == torch.float32:
            state = remainders(state)
        set_state(self, param, name, state)

    FusedAdam.set_scaled_state = set_remainders
    # What else asks for the states of an optimizer has them in float32, where nothing is converted.
    FusedAdam.state_dict = torch.optim.Optimizer.state_dict
    give_groups = HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers

    def give_steps_once(self: Any) -> None:
        give_groups(self)
        forget_steps(self.param_groups)

    HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers = give_steps_once


def remainders(saved: Tensor) -> Tensor:
    """int16 of the same numbers in float32.

    Raises:
        ValueError: They are no int16, but weights.
    """
    found = saved.to(torch.int16)
    if not torch.equal(found.to(saved.dtype), saved):
        raise ValueError(
            "the checkpoint has whole float32 weights where use_precision_aware_optimizer keeps what"
            " bfloat16 lacks of them"
        )
    return found


def forget_steps(groups: Iterable[dict[str, Any]]) -> None:
    """Leave the count to the optimizers that have it now and go on counting."""
    for group in groups:
        group.pop("step", None)
