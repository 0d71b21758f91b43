"""The table between Hugging Face's tensors and Megatron's: what to read beside the two models.

Megatron's names are its checkpoint's keys, which are the same for its local layers and for those of
Transformer Engine. Hugging Face numbers the layers in its names; Megatron stacks the layers of one
name along a first axis.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megaqwen.architecture import Architecture, tensor_shapes
from megaqwen.weights.transforms import Copy, GateUp, QueryKeyValue, Transform

MEGATRON_LAYERS = "decoder.layers."
HUGGINGFACE_LAYERS = "model.layers."


def always(qwen: Architecture) -> bool:
    """Every model has this row."""
    return True


def with_qkv_bias(qwen: Architecture) -> bool:
    """Qwen2 has this row."""
    return qwen.qkv_bias


def with_qk_norm(qwen: Architecture) -> bool:
    """Qwen3 has this row."""
    return qwen.qk_norm


def untied(qwen: Architecture) -> bool:
    """A tied output head is the embedding, in both models: then there is no such row."""
    return not qwen.tied_embeddings


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    megatron: str
    """The key in Megatron's checkpoint."""
    transform: str
    """What makes Megatron's tensor of Hugging Face's, see `transforms_of`."""
    huggingface: tuple[str, ...]
    """The tensors that it is made of, in this order."""
    models: Callable[[Architecture], bool] = always
    """Which models have it."""
    padded: bool = False
    """Whether Megatron's tensor may have more rows: they stand for no token and are left out."""


FIRST = (
    Row("embedding.word_embeddings.weight", "copy", ("model.embed_tokens.weight",), padded=True),
)
# Within decoder.layers. on the left, within model.layers.N. on the right.
IN_EACH_LAYER = (
    Row("self_attention.linear_qkv.layer_norm_weight", "copy", ("input_layernorm.weight",)),
    Row(
        "self_attention.linear_qkv.weight",
        "query_key_value",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    Row(
        "self_attention.linear_qkv.bias",
        "query_key_value",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        with_qkv_bias,
    ),
    Row("self_attention.q_layernorm.weight", "copy", ("self_attn.q_norm.weight",), with_qk_norm),
    Row("self_attention.k_layernorm.weight", "copy", ("self_attn.k_norm.weight",), with_qk_norm),
    Row("self_attention.linear_proj.weight", "copy", ("self_attn.o_proj.weight",)),
    Row("mlp.linear_fc1.layer_norm_weight", "copy", ("post_attention_layernorm.weight",)),
    Row("mlp.linear_fc1.weight", "gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Row("mlp.linear_fc2.weight", "copy", ("mlp.down_proj.weight",)),
)
LAST = (
    Row("decoder.final_layernorm.weight", "copy", ("model.norm.weight",)),
    Row("output_layer.weight", "copy", ("lm_head.weight",), untied, padded=True),
)

# Where Transformer Engine keeps FP8 state and local layers nothing. A model asks a checkpoint for
# the entries of its own kind of layer: a checkpoint for both kinds has them all, empty.
EXTRA_STATES_IN_EACH_LAYER = (
    "self_attention.core_attention._extra_state",
    "self_attention.linear_qkv._extra_state",
    "self_attention.linear_proj._extra_state",
    "self_attention.q_layernorm._extra_state",
    "self_attention.k_layernorm._extra_state",
    "mlp.linear_fc1._extra_state",
    "mlp.linear_fc2._extra_state",
)
EXTRA_STATES = ("decoder.final_layernorm._extra_state",)


def transforms_of(qwen: Architecture) -> dict[str, Transform]:
    """The transforms by the names that the table has for them."""
    return {
        "copy": Copy(),
        "gate_up": GateUp(),
        "query_key_value": QueryKeyValue(
            heads=qwen.heads, query_groups=qwen.query_groups, head_dim=qwen.head_dim
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One row for one layer: the unit that is streamed."""

    row: Row
    transform: Transform
    layer: int | None
    """None where the row is not in a layer."""
    layers: int
    huggingface: tuple[str, ...]
    """Full names."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the Hugging Face tensors."""
    shape: tuple[int, ...]
    """The shape of Megatron's tensor, without the layer axis."""

    @property
    def key(self) -> str:
        """Megatron's key where the layers are stacked, as its dense models save them."""
        return self.row.megatron if self.layer is None else MEGATRON_LAYERS + self.row.megatron

    @property
    def key_of_layer(self) -> str:
        """Megatron's key where each layer has its own, as models with unequal layers save them."""
        if self.layer is None:
            return self.key
        return f"{MEGATRON_LAYERS}{self.layer}.{self.row.megatron}"

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape of the tensor under `key`."""
        return self.shape if self.layer is None else (self.layers, *self.shape)

    def __str__(self) -> str:
        """Names and shapes on both sides, as a dry run prints them."""
        parts = zip(self.huggingface, self.shapes, strict=True)
        left = " + ".join(f"{name} {list(shape)}" for name, shape in parts)
        place = "" if self.layer is None else f"[{self.layer}]"
        return f"{left} <-> {self.key}{place} {list(self.shape)} ({self.row.transform})"


def plan_transfers(qwen: Architecture) -> list[Transfer]:
    """Every transfer of a model, in the model's order: neighbours belong to one layer."""
    shapes = tensor_shapes(qwen)
    transforms = transforms_of(qwen)

    def transfer(row: Row, layer: int | None) -> Transfer:
        prefix = "" if layer is None else f"{HUGGINGFACE_LAYERS}{layer}."
        names = tuple(prefix + name for name in row.huggingface)
        parts = tuple(shapes[name] for name in names)
        transform = transforms[row.transform]
        return Transfer(
            row=row,
            transform=transform,
            layer=layer,
            layers=qwen.layers,
            huggingface=names,
            shapes=parts,
            shape=transform.fused_shape(parts),
        )

    order: list[tuple[Row, int | None]] = [(row, None) for row in FIRST]
    order += [(row, layer) for layer in range(qwen.layers) for row in IN_EACH_LAYER]
    order += [(row, None) for row in LAST]
    return [transfer(row, layer) for row, layer in order if row.models(qwen)]
