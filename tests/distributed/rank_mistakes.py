"""Mistakes of training's ranks that only the gates over ranks see.

Each is made in Megatron's model after it was built, in its options or in its loss; the weights are those
of the checkpoint, so that the gates on one rank in evaluation pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tied_experts import choose_otherwise

Change = Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One of them."""

    name: str
    gates: tuple[str, ...]
    """Those that fail, and no others but what is in `also`."""
    also: tuple[str, ...] = ("losses",)
    """May fail: what follows from the others, where it is large enough to be seen."""
    worst: str = ""
    """In what the first of these gates says."""
    model: Change | None = None
    """Changes a `RankedModel`."""
    options: dict[str, Any] | None = None
    """Megatron's options that differ."""
    loss: Callable[[Any], Any] | None = None
    """Changes the loss of a micro batch."""
    milder: str = ""
    """Another that is harder to see; this one is then made only where there is time for all."""


def parameters(ranked: Any, ending: str) -> Iterator[Any]:
    """This rank's parameters of the second layer with this end of their names; or of any place."""
    for chunk in ranked.model:
        for name, parameter in chunk.named_parameters():
            if name.endswith(f"layers.1.{ending}") or name.endswith(f"module.{ending}"):
                yield parameter


def hook(ending: str, change: Callable[[Any], Any]) -> Change:
    """Change the gradient of one parameter on its way back."""

    def make(ranked: Any) -> None:
        for parameter in parameters(ranked, ending):
            parameter.register_hook(change)

    return make


def forget_sequence_parallel_sum(ranked: Any) -> None:
    for parameter in parameters(ranked, "input_layernorm.weight"):
        parameter.sequence_parallel = False


def decay_norms(ranked: Any) -> None:
    decay = max(group["weight_decay"] for group in ranked.optimizer.param_groups)
    for group in ranked.optimizer.param_groups:
        group["wd_mult"], group["weight_decay"] = 1.0, decay


def one_step_ahead(ranked: Any) -> None:
    from megatron.training import get_args

    ranked.schedule.step(increment=get_args().global_batch_size)


def wrong_split_on_second_rank(ranked: Any) -> None:
    import torch
    from megatron.core import mpu

    if mpu.get_tensor_model_parallel_rank() == 1:
        with torch.no_grad():
            for parameter in parameters(ranked, "self_attention.linear_qkv.bias"):
                parameter.copy_(parameter.roll(1, 0))


def in_bfloat16(change: Change) -> Change:
    """Make a change where training's dtype is measured, and leave float32 alone."""

    def make(ranked: Any) -> None:
        import torch

        if next(ranked.model[0].parameters()).dtype is torch.bfloat16:
            for chunk in ranked.model:
                for module in chunk.modules():
                    change(module)

    return make


def round_norm(module: Any) -> None:
    """What a norm puts out, in 8 bits."""
    import torch

    if isinstance(module, torch.nn.RMSNorm):
        module.register_forward_hook(
            lambda module, args, output: output.to(torch.float8_e4m3fn).to(output.dtype)
        )


def round_residual(module: Any) -> None:
    """What a layer puts out, as with five bits less."""
    if type(module).__name__ == "TransformerLayer":

        def rounded(module: Any, args: Any, output: Any) -> Any:
            import torch

            states, rest = output[0], output[1:]
            return ((states.to(torch.float8_e5m2).to(states.dtype)), *rest)

        module.register_forward_hook(rounded)


def choose_experts_otherwise(ranked: Any) -> None:
    from megaqwen.parity.rank_outputs import layers_of

    for layer in layers_of(ranked.model):
        if layer.layer_number - 1 == LAYER_OF_TIES:
            choose_otherwise(layer.mlp.router)


LAYER_OF_TIES = 1
TIES = Mistake(
    name="no mistake: experts that tie, chosen otherwise", gates=(), model=choose_experts_otherwise
)
MISTAKES = [
    Mistake(
        name="a gradient that is cut off",
        gates=("gradients", "trajectory"),
        worst="layers.1.mlp.down_proj.weight",
        milder="a gradient 0.1% too large",
        model=hook("mlp.linear_fc2.weight", lambda gradient: gradient * 0),
    ),
    Mistake(
        name="a gradient 0.1% too large",
        gates=("gradients",),
        worst="layers.1.mlp.down_proj.weight",
        model=hook("mlp.linear_fc2.weight", lambda gradient: gradient * 1.001),
    ),
    Mistake(
        name="a loss 0.1% too large on its way back",
        gates=("gradients",),
        loss=lambda loss: loss * 1.001,
    ),
    Mistake(
        name="a norm's gradient that is not summed over the sequence",
        gates=("gradients", "trajectory", "copies"),
        worst="layers.1.input_layernorm.weight",
        model=forget_sequence_parallel_sum,
    ),
    Mistake(
        name="dropout of 1% left on in training alone",
        gates=("gradients", "trajectory"),
        options={"hidden_dropout": 0.01},
    ),
    Mistake(
        name="norms and biases that decay",
        gates=("trajectory",),
        worst="norm",
        model=decay_norms,
    ),
    Mistake(
        name="another beta2",
        gates=("trajectory",),
        milder="another epsilon of Adam",
        options={"adam_beta2": 0.95},
    ),
    Mistake(
        name="a learning rate that is one step ahead",
        gates=("trajectory",),
        model=one_step_ahead,
    ),
    Mistake(
        name="another epsilon of Adam",
        gates=("trajectory",),
        options={"adam_eps": 1e-6},
    ),
    Mistake(
        name="biases of queries shifted on the second rank",
        gates=("layout", "gradients", "trajectory"),
        worst="first beyond it: layer 1 out",
        model=wrong_split_on_second_rank,
    ),
    Mistake(
        name="norms in 8 bits",
        gates=("dtype",),
        worst="the first beyond it: layer 0",
        model=in_bfloat16(round_norm),
    ),
    Mistake(
        name="residuals in 8 bits",
        gates=("dtype",),
        milder="norms in 8 bits",
        worst="the first beyond it: layer 0",
        model=in_bfloat16(round_residual),
    ),
]
