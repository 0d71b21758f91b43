"""transformers' model, one layer in memory at a time: the reference that Megatron is held against."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megaqwen.parity.fp8 import Fp8, ProductsInFp8
from megaqwen.parity.points import Observations, Observed, observe
from megaqwen.parity.routing import OtherChoices, following
from megaqwen.weights import HuggingFaceWeights
from megaqwen.weights.huggingface import EMBEDDING, HEAD

POINTS = {
    "attention in": "input_layernorm",
    "attention out": "self_attn",
    "mlp in": "post_attention_layernorm",
    "router": "mlp.gate",
    "mlp out": "mlp",
}


class FirstLayerReached(Exception):
    """Ends a forward pass where the decoder begins."""


class HuggingFaceLayers:
    """A Hugging Face model that computes in one dtype, with its plainest attention.

    Its own code makes everything that a layer is called with (mask, rotary embeddings); the layers
    are then called one by one, each with its weights just read.
    """

    def __init__(self, weights: HuggingFaceWeights, dtype: torch.dtype, fp8: Fp8 | None = None):
        """Build it without weights.

        Args:
            weights: Of the model directory.
            dtype: Of weights and arithmetic.
            fp8: How the layers' products are rounded, where they are. Texts are then of one length and
                computed at once, since scales are of all that is.
        """
        self.weights, self.dtype, self.fp8 = weights, dtype, fp8
        config = AutoConfig.from_pretrained(weights.directory)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            ).eval()
        rotary = type(self.model.model.rotary_emb)
        self.model.model.rotary_emb = rotary(self.model.config)  # its frequencies are no weights
        self.layers = len(self.model.model.layers)

    @torch.no_grad()
    def embed(self, texts: list[Tensor]) -> list[Tensor]:
        """[positions, hidden] embeddings of each text, [positions] token ids."""
        decoder = self.model.model
        hidden: dict[int, Tensor] = {}
        calls: dict[int, dict[str, Any]] = {}
        reached: list[tuple[Tensor, dict[str, Any]]] = []
        mask: Tensor | None = None

        def stop(module: nn.Module, args: tuple[Tensor], call: dict[str, Any]) -> None:
            reached.append((args[0][0], call))
            raise FirstLayerReached

        hook = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        with self.loaded(decoder.embed_tokens, {"weight": self.read(EMBEDDING)}):
            for index in sorted(range(len(texts)), key=lambda each: -len(texts[each])):
                with suppress(FirstLayerReached):
                    self.model(texts[index][None], use_cache=False)
                hidden[index], call = reached.pop()
                # [positions, positions] for each text would be more than all else: a shorter text's is
                # a corner of the longest one's.
                mask = call["attention_mask"] if mask is None else mask
                length = len(texts[index])
                calls[index] = {**call, "attention_mask": mask[..., :length, :length]}
        hook.remove()
        self.calls = [calls[index] for index in range(len(texts))]
        return [hidden[index] for index in range(len(texts))]

    @torch.no_grad()
    def layer(
        self, index: int, hidden: list[Tensor], other: OtherChoices | None = None
    ) -> tuple[list[Tensor], Observations]:
        """What a layer makes of each text's [positions, hidden], and what was seen within it.

        The other model's choices of experts are followed at ties; what is seen are its own.
        """
        layer, tensors = self.model.model.layers[index], self.layer_tensors(index)
        fp8 = self.fp8 if self.fp8 and self.fp8.holds(index, self.layers) else None
        with (
            self.loaded(layer, fp8.rounded_weights(tensors) if fp8 else tensors),
            ProductsInFp8(fp8) if fp8 else nullcontext(),
            observe(layer, POINTS) as seen,
            following(layer.mlp.gate, other) if other else nullcontext(),
        ):
            if self.fp8:
                outputs = list(layer(torch.stack(hidden), **self.calls[0]))
            else:
                outputs = [
                    layer(states[None], **call)[0]
                    for states, call in zip(hidden, self.calls, strict=True)
                ]
        return outputs, [self.observed(each) for each in seen]

    @contextmanager
    def head(self) -> Iterator[Any]:
        """Within it: a function from [positions, hidden] to the final norm's and the logits."""
        decoder, output = self.model.model, self.model.lm_head
        name = HEAD if HEAD in self.weights.entries else EMBEDDING
        norm = {"weight": self.read("model.norm.weight")}
        with (
            torch.no_grad(),
            self.loaded(decoder.norm, norm),
            self.loaded(output, {"weight": self.read(name)}),
        ):
            yield decoder.norm, output

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype of the arithmetic."""
        return self.weights.read(name).to(self.dtype)

    def layer_tensors(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by transformers' names, which stack the experts of the published files."""
        prefix = f"model.layers.{index}."
        names = [name for name in self.weights.entries if name.startswith(prefix)]
        experts = [name for name in names if ".mlp.experts." in name]
        tensors = {
            name.removeprefix(prefix): self.read(name) for name in names if name not in experts
        }
        if experts:
            count = 1 + max(int(name.split(".")[5]) for name in experts)

            def stacked(kind: str) -> Tensor:
                path = f"{prefix}mlp.experts.{{}}.{kind}_proj.weight"
                return torch.stack([self.read(path.format(expert)) for expert in range(count)])

            gate_up = torch.cat([stacked("gate"), stacked("up")], dim=1)
            tensors |= {
                "mlp.experts.gate_up_proj": gate_up,
                "mlp.experts.down_proj": stacked("down"),
            }
        return tensors

    @contextmanager
    def loaded(self, module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
        """The module with weights, which it has no longer than this."""
        module.load_state_dict(tensors, assign=True)
        try:
            yield
        finally:
            module.to("meta")

    @staticmethod
    def observed(seen: dict[str, Any]) -> Observed:
        """One text's observations as [positions, width]; a router's are its logits and choices."""
        found: Observed = {}
        for name, output in seen.items():
            if name == "router":
                logits, _, choices = output
                found |= {"router": logits, "choices": choices}
            else:
                first = output[0] if isinstance(output, tuple) else output
                found[name] = first.reshape(-1, first.shape[-1])
        return found
