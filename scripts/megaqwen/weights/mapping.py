"""The table between Hugging Face's tensors and Megatron's: what to read beside the two models.

Megatron's names are its checkpoint's keys, which are the same for its local layers and for those of
Transformer Engine, and for experts one by one and in groups. Hugging Face numbers layers and experts
in its names. Megatron stacks the experts of one name along an axis, and where all layers are of one
kind, the layers along a first one; otherwise it numbers the layers too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megaqwen.architecture import Architecture, tensor_shapes
from megaqwen.weights.transforms import Copy, GateUp, QueryKeyValue, Transform

MEGATRON_LAYERS = "decoder.layers."
HUGGINGFACE_LAYERS = "model.layers."
MEGATRON_EXPERTS = "mlp.experts.experts."
HUGGINGFACE_EXPERTS = "mlp.experts."


def always(qwen: Architecture) -> bool:
    """Every model has this row."""
    return True


def with_qkv_bias(qwen: Architecture) -> bool:
    """Qwen2 and Qwen2-MoE have this row."""
    return qwen.qkv_bias


def with_qk_norm(qwen: Architecture) -> bool:
    """Qwen3 and Qwen3-MoE have this row."""
    return qwen.qk_norm


def with_shared_expert(qwen: Architecture) -> bool:
    """Qwen2-MoE has this row."""
    return qwen.experts is not None and qwen.experts.shared_ffn_size is not None


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
    also: str = ""
    """A second key of the same tensor: that of Megatron's local layers as they come."""


FIRST = (
    Row("embedding.word_embeddings.weight", "copy", ("model.embed_tokens.weight",), padded=True),
)
# Within decoder.layers. on the left, within model.layers.N. on the right: first what every layer has.
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
)
WITHOUT_EXPERTS = (
    Row("mlp.linear_fc1.layer_norm_weight", "copy", ("post_attention_layernorm.weight",)),
    Row("mlp.linear_fc1.weight", "gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Row("mlp.linear_fc2.weight", "copy", ("mlp.down_proj.weight",)),
)
WITH_EXPERTS = (
    Row(
        "pre_mlp_layernorm.weight",
        "copy",
        ("post_attention_layernorm.weight",),
        also="mlp.linear_fc1.layer_norm_weight",
    ),
    Row("mlp.router.weight", "copy", ("mlp.gate.weight",)),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "gate_up",
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        with_shared_expert,
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        "copy",
        ("mlp.shared_expert.down_proj.weight",),
        with_shared_expert,
    ),
    Row(
        "mlp.shared_experts.gate_weight",
        "copy",
        ("mlp.shared_expert_gate.weight",),
        with_shared_expert,
    ),
)
# Within mlp.experts.experts. on the left, within mlp.experts.N. on the right.
IN_EACH_EXPERT = (
    Row("linear_fc1.weight", "gate_up", ("gate_proj.weight", "up_proj.weight")),
    Row("linear_fc2.weight", "copy", ("down_proj.weight",)),
)
LAST = (
    Row("decoder.final_layernorm.weight", "copy", ("model.norm.weight",)),
    Row("output_layer.weight", "copy", ("lm_head.weight",), untied, padded=True),
)


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
class Place:
    """Where in a checkpoint a tensor lies: a key, and a position on each of the leading axes."""

    key: str
    position: tuple[int, ...] = ()
    """Layer and expert, as far as they are axes."""
    lengths: tuple[int, ...] = ()
    """How many layers and experts there are."""

    def named(self, key: str) -> "Place":
        """The same position of another key."""
        return Place(key=key, position=self.position, lengths=self.lengths)

    @property
    def object_key(self) -> str:
        """Megatron's key of an object that is no tensor, which has its place in its name."""
        position, lengths = self.position or (0,), self.lengths or (1,)
        return f"{self.key}/shard_{dotted(position)}_{dotted(lengths)}"


def dotted(numbers: Iterable[int]) -> str:
    """Numbers in a name."""
    return ".".join(map(str, numbers))


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One row for one layer, or for one expert of one layer: the unit that is streamed."""

    row: Row
    transform: Transform
    places: tuple[Place, ...]
    """Where Megatron's tensor may lie; the first is where convert writes it."""
    copies: tuple[Place, ...]
    """Where convert writes it as well, see `Row.also`."""
    huggingface: tuple[str, ...]
    """Full names."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the Hugging Face tensors."""
    shape: tuple[int, ...]
    """The shape of Megatron's tensor, without the axes of layers and experts."""

    @property
    def key(self) -> str:
        """Megatron's key, as convert writes it."""
        return self.places[0].key

    def __str__(self) -> str:
        """Names and shapes on both sides, as a dry run prints them."""
        parts = zip(self.huggingface, self.shapes, strict=True)
        left = " + ".join(f"{name} {list(shape)}" for name, shape in parts)
        place = "".join(f"[{index}]" for index in self.places[0].position)
        return f"{left} <-> {self.key}{place} {list(self.shape)} ({self.row.transform})"


def plan_transfers(qwen: Architecture) -> list[Transfer]:
    """Every transfer of a model, in the model's order: neighbours belong to one layer."""
    shapes = tensor_shapes(qwen)
    transforms = transforms_of(qwen)

    def transfer(row: Row, layer: int | None, expert: int | None) -> Transfer:
        names = tuple(huggingface_name(name, layer, expert) for name in row.huggingface)
        parts = tuple(shapes[name] for name in names)
        transform = transforms[row.transform]
        kinds = [True, False] if qwen.equal_layers else [False, True]
        keys = [row.megatron, *([row.also] if row.also else [])]
        places = [
            [megatron_place(qwen, key, layer, expert, stacked=kind) for kind in kinds]
            for key in keys
        ]
        return Transfer(
            row=row,
            transform=transform,
            places=tuple(place for of_key in places for place in of_key),
            copies=tuple(of_key[0] for of_key in places[1:]),
            huggingface=names,
            shapes=parts,
            shape=transform.fused_shape(parts),
        )

    return [transfer(*each) for each in order(qwen) if each[0].models(qwen)]


def order(qwen: Architecture) -> Iterator[tuple[Row, int | None, int | None]]:
    """Each row with its layer and expert, where it has one."""
    for row in FIRST:
        yield row, None, None
    for layer in range(qwen.layers):
        has_experts = qwen.has_experts(layer)
        for row in (*IN_EACH_LAYER, *(WITH_EXPERTS if has_experts else WITHOUT_EXPERTS)):
            yield row, layer, None
        if has_experts and qwen.experts:
            for expert in range(qwen.experts.count):
                for row in IN_EACH_EXPERT:
                    yield row, layer, expert
    for row in LAST:
        yield row, None, None


def huggingface_name(name: str, layer: int | None, expert: int | None) -> str:
    """A row's name with what stands before it."""
    if expert is not None:
        name = f"{HUGGINGFACE_EXPERTS}{expert}.{name}"
    return name if layer is None else f"{HUGGINGFACE_LAYERS}{layer}.{name}"


def megatron_place(
    qwen: Architecture, key: str, layer: int | None, expert: int | None, *, stacked: bool
) -> Place:
    """A row's place, the layers being stacked along the first axis or numbered in the key."""
    axes: list[tuple[int, int]] = []
    if layer is not None and stacked:
        axes.append((layer, qwen.layers))
    if expert is not None and qwen.experts:
        axes.append((expert, qwen.experts.count))
        key = MEGATRON_EXPERTS + key
    if layer is not None:
        key = MEGATRON_LAYERS + ("" if stacked else f"{layer}.") + key
    return Place(
        key=key,
        position=tuple(index for index, _ in axes),
        lengths=tuple(length for _, length in axes),
    )


# The modules in which Transformer Engine keeps FP8 state, and local layers nothing.
MODULES_WITH_STATE = (
    *("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"),
    *("pre_mlp_layernorm", "linear_fc1", "linear_fc2", "final_layernorm"),
)


def extra_states(transfers: Iterable[Transfer]) -> Iterator[Place]:
    """Where a model of Transformer Engine's layers asks a checkpoint for FP8 state.

    A checkpoint for both kinds of layers has all of these entries, empty.
    """
    for transfer in transfers:
        place = transfer.places[0]
        module, _, name = place.key.rpartition(".")
        parent, _, last = module.rpartition(".")
        if name == "weight" and last in MODULES_WITH_STATE:
            yield place.named(f"{module}._extra_state")
        if name == "weight" and last == "linear_proj":
            yield place.named(f"{parent}.core_attention._extra_state")
