"""Deliberate mistakes of a conversion, each of which a gate must find and name.

A mistake of the bridge is made in both directions alike, so that the round trip of tensors sees nothing:
here a changed copy of the model is converted, and the checkpoint is held against the model itself.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaqwen.parity import measure as measuring
from megaqwen.parity.megatron import MegatronLayers
from tied_experts import choose_otherwise, tie_experts, tie_experts_of

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sabotage:
    """One mistake."""

    name: str
    architectures: tuple[str, ...]
    """By model_type."""
    tied: tuple[bool, ...] = (False, True)
    """Whether the output head is the embedding: which of the two can have it."""
    gate: str
    """Fails by it, whatever else fails; or refused, before anything is compared."""
    says: str = ""
    """In the message of what is refused."""
    point: str = ""
    """Where the models part first; nothing where no layer is touched."""
    tensors: Callable[[Tensors, Facts], None] | None = None
    """Changes the tensors that are converted."""
    config: Callable[[Facts], None] | None = None
    """Changes the config.json that is converted."""
    files: Callable[[Path], None] | None = None
    """Changes the directory that is compared."""
    model: Callable[[MegatronLayers], None] | None = None
    """Changes the Megatron model after it was built."""

    def fits(self, facts: Facts) -> bool:
        """Whether a model can have it, by its config.json."""
        tied = facts.get("tie_word_embeddings", False)
        return facts["model_type"] in self.architectures and tied in self.tied


def middle(facts: Facts) -> str:
    return f"model.layers.{facts['num_hidden_layers'] // 2}."


def swap(first: str, second: str) -> Callable[[Tensors, Facts], None]:
    """Swap two tensors of the middle layer."""

    def change(tensors: Tensors, facts: Facts) -> None:
        one, two = middle(facts) + first, middle(facts) + second
        tensors[one], tensors[two] = tensors[two], tensors[one]

    return change


def edit(name: str, how: Callable[[Tensor, Facts], Tensor]) -> Callable[[Tensors, Facts], None]:
    """Change one tensor: of the middle layer, where its name begins with no model."""

    def change(tensors: Tensors, facts: Facts) -> None:
        full = name if name.startswith(("model.", "lm_head")) else middle(facts) + name
        tensors[full] = how(tensors[full], facts).contiguous()

    return change


def set_rope(name: str, value: Any) -> Callable[[Facts], None]:
    def change(facts: Facts) -> None:
        facts["rope_parameters"] = {**facts["rope_parameters"], name: value}

    return change


def head_size(facts: Facts) -> int:
    size: int = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
    return size


def interleave_rope(tensor: Tensor, facts: Facts) -> Tensor:
    """Rows of each head as for the rotation of neighbours, where the halves are rotated."""
    heads = tensor.view(-1, 2, head_size(facts) // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def regroup(tensor: Tensor, facts: Facts) -> Tensor:
    """Query heads dealt out to the groups in turn."""
    groups = facts["num_key_value_heads"]
    heads = tensor.view(-1, groups, head_size(facts), *tensor.shape[1:])
    return heads.transpose(0, 1).reshape(tensor.shape)


def swap_layers(tensors: Tensors, facts: Facts) -> None:
    one, two = middle(facts), f"model.layers.{facts['num_hidden_layers'] // 2 + 1}."
    for name in [name for name in tensors if name.startswith(one)]:
        other = two + name.removeprefix(one)
        tensors[name], tensors[other] = tensors[other], tensors[name]


def swap_experts(tensors: Tensors, facts: Facts) -> None:
    for part in ("gate", "up", "down"):
        path = f"mlp.experts.{{}}.{part}_proj.weight"
        swap(path.format(0), path.format(1))(tensors, facts)


def round_all(tensors: Tensors, facts: Facts) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().to(tensor.dtype)


def earlier(tensors: Tensors, facts: Facts) -> None:
    """Weights as one step of a small learning rate before."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        step = torch.randn(tensor.shape, generator=generator).sign() * 1e-5
        tensors[name] = tensor + step.to(tensor.dtype)


def flip_a_bit(tensors: Tensors, facts: Facts) -> None:
    tensor = tensors[middle(facts) + "mlp.down_proj.weight"]
    tensor.view(torch.int32)[3, 5] ^= 1


def cut_vocabulary(tensors: Tensors, facts: Facts) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:-1].contiguous()


def untie(tensors: Tensors, facts: Facts) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def scale_softmax(factor: float) -> Callable[[MegatronLayers], None]:
    def change(layers: MegatronLayers) -> None:
        attention: Any = layers.modules[layers.layers // 2].self_attention
        attention.core_attention.softmax_scale = head_scale(attention) * factor
        softmax = attention.core_attention.scale_mask_softmax
        softmax.scale = (softmax.scale or 1.0) * factor

    return change


def head_scale(attention: Any) -> float:
    scale: float = attention.core_attention.softmax_scale
    return scale


def leave_dropout_on(layers: MegatronLayers) -> None:
    layer: Any = layers.modules[layers.layers // 2]
    layer.hidden_dropout = 0.01
    layer.train()


def tie_middle_experts(directory: Path) -> None:
    facts = json.loads((directory / "config.json").read_text())
    tie_experts_of(directory, facts["num_hidden_layers"] // 2)


def choose_experts_otherwise(layers: MegatronLayers) -> None:
    module: Any = layers.modules[layers.layers // 2]
    choose_otherwise(module.mlp.router)


def append(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        with open(directory / name, "a") as stream:
            stream.write(text)

    return change


def other_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    facts = json.loads(path.read_text())
    merges = facts["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]
    path.write_text(json.dumps(facts))


DENSE = ("qwen2", "qwen3")
EXPERTS = ("qwen2_moe", "qwen3_moe")
ALL = (*DENSE, *EXPERTS)
BIASED = ("qwen2", "qwen2_moe")
NORMED = ("qwen3", "qwen3_moe")

SABOTAGES = [
    Sabotage(
        name="rope base 10,000 for 1,000,000",
        architectures=ALL,
        gate="architecture",
        point="attention out",
        config=set_rope("rope_theta", 10000.0),
    ),
    Sabotage(
        name="YaRN factor 2 where there is none",
        architectures=ALL,
        gate="architecture",
        config=lambda facts: facts["rope_parameters"].update(
            rope_type="yarn", factor=2.0, original_max_position_embeddings=64
        ),
    ),
    Sabotage(
        name="rope of neighbours for rope of halves",
        architectures=ALL,
        gate="layers",
        point="attention out",
        tensors=edit("self_attn.q_proj.weight", interleave_rope),
    ),
    Sabotage(
        name="norm epsilon 1e-5 for 1e-6, or the reverse",
        architectures=ALL,
        gate="architecture",
        point="attention in",
        config=lambda facts: facts.update(
            rms_norm_eps=1e-5 if facts["rms_norm_eps"] == 1e-6 else 1e-6
        ),
    ),
    *(
        Sabotage(
            name=f"dropped {letter} bias",
            architectures=BIASED,
            gate="layers",
            point="attention out",
            tensors=edit(
                f"self_attn.{letter}_proj.bias", lambda tensor, _: torch.zeros_like(tensor)
            ),
        )
        for letter in "qkv"
    ),
    Sabotage(
        name="gate and up swapped",
        architectures=DENSE,
        gate="layers",
        point="mlp out",
        tensors=swap("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ),
    Sabotage(
        name="gate and up of one expert swapped",
        architectures=EXPERTS,
        gate="layers",
        point="mlp out",
        tensors=swap("mlp.experts.1.gate_proj.weight", "mlp.experts.1.up_proj.weight"),
    ),
    Sabotage(
        name="q and k norms swapped",
        architectures=NORMED,
        gate="layers",
        point="attention out",
        tensors=swap("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ),
    Sabotage(
        name="k and v swapped",
        architectures=ALL,
        gate="layers",
        point="attention out",
        tensors=swap("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    Sabotage(
        name="query heads dealt to the wrong groups",
        architectures=ALL,
        gate="layers",
        point="attention out",
        tensors=edit("self_attn.q_proj.weight", regroup),
    ),
    Sabotage(
        name="one expert in another's place",
        architectures=EXPERTS,
        gate="layers",
        point="mlp out",
        tensors=swap_experts,
    ),
    Sabotage(
        name="router rows shifted by one",
        architectures=EXPERTS,
        gate="experts",
        point="router",
        tensors=edit("mlp.gate.weight", lambda tensor, _: tensor.roll(1, 0)),
    ),
    Sabotage(
        name="router renormalises, or does not",
        architectures=EXPERTS,
        gate="architecture",
        point="mlp out",
        config=lambda facts: facts.update(norm_topk_prob=not facts["norm_topk_prob"]),
    ),
    Sabotage(
        name="shared expert's gate dropped",
        architectures=("qwen2_moe",),
        gate="layers",
        point="mlp out",
        tensors=edit("mlp.shared_expert_gate.weight", lambda tensor, _: torch.zeros_like(tensor)),
    ),
    Sabotage(
        name="output head off by one row",
        architectures=ALL,
        tied=(False,),
        gate="logits",
        tensors=edit("lm_head.weight", lambda tensor, _: tensor.roll(1, 0)),
    ),
    Sabotage(
        name="a head of its own for a tied one",
        architectures=ALL,
        tied=(True,),
        gate="refused",
        says="output_layer.weight: not part of the model",
        tensors=untie,
        config=lambda facts: facts.update(tie_word_embeddings=False),
    ),
    Sabotage(
        name="embedding off by one row",
        architectures=ALL,
        gate="layers",
        point="embedding",
        tensors=edit("model.embed_tokens.weight", lambda tensor, _: tensor.roll(1, 0)),
    ),
    Sabotage(
        name="the last row of the vocabulary taken for padding",
        architectures=("qwen3",),
        gate="refused",
        says="by config.json it is [2560, 192]",
        tensors=cut_vocabulary,
        config=lambda facts: facts.update(vocab_size=facts["vocab_size"] - 1),
    ),
    Sabotage(
        name="two layers in the wrong order",
        architectures=DENSE,
        gate="layers",
        point="attention in",
        tensors=swap_layers,
    ),
    Sabotage(
        name="a square matrix transposed",
        architectures=("qwen2",),
        gate="layers",
        point="attention out",
        tensors=edit("self_attn.o_proj.weight", lambda tensor, _: tensor.T),
    ),
    Sabotage(
        name="final norm left at ones",
        architectures=ALL,
        gate="layers",
        point="final norm",
        tensors=edit("model.norm.weight", lambda tensor, _: torch.ones_like(tensor)),
    ),
    Sabotage(
        name="the norm before the MLP from another layer's place",
        architectures=ALL,
        gate="layers",
        point="attention in",
        tensors=swap("input_layernorm.weight", "post_attention_layernorm.weight"),
    ),
    Sabotage(
        name="hidden dropout of 1% left on",
        architectures=ALL,
        gate="layers",
        point="mlp in",
        model=leave_dropout_on,
    ),
    Sabotage(
        name="softmax scale 0.1% off",
        architectures=ALL,
        gate="layers",
        point="attention out",
        model=scale_softmax(1.001),
    ),
    Sabotage(
        name="weights rounded to bfloat16",
        architectures=ALL,
        gate="tensors",
        point="embedding",
        tensors=round_all,
    ),
    Sabotage(
        name="one step of training behind",
        architectures=ALL,
        gate="tensors",
        point="embedding",
        tensors=earlier,
    ),
    Sabotage(name="one bit of one weight", architectures=DENSE, gate="tensors", tensors=flip_a_bit),
    Sabotage(
        name="tokenizer of another model",
        architectures=ALL,
        gate="tokenizer",
        files=other_tokenizer,
    ),
    Sabotage(
        name="chat template changed",
        architectures=ALL,
        gate="tokenizer",
        files=append("chat_template.jinja", "\n"),
    ),
]


TIES = Sabotage(
    name="no mistake: experts that tie, chosen otherwise",
    architectures=EXPERTS,
    gate="",
    tensors=lambda tensors, facts: tie_experts(tensors, facts["num_hidden_layers"] // 2),
    files=tie_middle_experts,
    model=choose_experts_otherwise,
)


def sabotaged(model: Path, copy: Path, sabotage: Sabotage) -> Path:
    """A copy of a model directory with the mistake in what is converted."""
    shutil.copytree(model, copy)
    path = copy / "config.json"
    facts = json.loads(path.read_text())
    if sabotage.tensors:
        (file,) = copy.glob("*.safetensors")
        tensors = load_file(file)
        sabotage.tensors(tensors, facts)
        save_file(tensors, file, metadata={"format": "pt"})
    if sabotage.config:
        sabotage.config(facts)
    path.write_text(json.dumps(facts))
    return copy


@contextmanager
def changed_model(change: Callable[[MegatronLayers], None] | None) -> Iterator[None]:
    """Within it, the Megatron model that is measured has the mistake."""

    class Changed(MegatronLayers):
        def __init__(self, *values: Any, **named: Any):
            super().__init__(*values, **named)
            if change:
                change(self)

    measuring.MegatronLayers = Changed  # type: ignore[misc]
    try:
        yield
    finally:
        measuring.MegatronLayers = MegatronLayers  # type: ignore[misc]
