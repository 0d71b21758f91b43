"""Lets Megatron's distributed optimizer resume over torch's AdamW, which is what it has on a CPU.

megatron-core 0.19.2 expects Transformer Engine's or Apex's Adam, which count steps in a parameter group;
torch's AdamW counts them in a tensor for each parameter. Three places do not agree with that:

- before a load the optimizer has no state, but is asked for its step;
- parameters are copied in place outside no_grad, together with a `step` that no checkpoint holds;
- after a load all parameters share one step tensor, which AdamW then counts up once for each of them,
  so that training goes on, silently different.
"""

from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def install() -> None:
    """Mend the three places, where neither Transformer Engine nor Apex is installed."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    sharded_state_dict = DistributedOptimizer.sharded_state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def sharded(self: Any, model: Any, is_loading: bool = False, *rest: Any, **named: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model, is_loading, *rest, **named)

    def load(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            set_states(self, model_param, {"step": None, **tensors})

    DistributedOptimizer.sharded_state_dict = sharded
    DistributedOptimizer.load_state_dict = load
    DistributedOptimizer._set_main_param_and_optimizer_states = set_without_step
