"""Products in FP8 as Transformer Engine has them, for transformers, which has none of its recipes.

In FP8 a layer's matrix products have both factors rounded to E4M3, each times a scale that fills the
format. Here they are float32's of the rounded factors, on any machine; a GPU's sums, which may be less
exact, have the same error within 1% (tests/gpu/test_fp8_products.py). Those products are of attention and
of MLPs, experts and shared ones included; routers, the gate of a shared expert and the head remain in
bfloat16. Recipes are those of Transformer Engine: one scale for each tensor, by what it has (tensorwise)
or had before (delayed, here the same); or for each 128 numbers of a token's inputs and for each 128 x 128
of a weight a scale that is a power of two (blockwise).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGEST = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 128
PRODUCTS = "_proj"
"""How transformers names the weights of products in FP8, experts' too."""
JOINED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Of Megatron's one tensor, which has one scale."""


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """How training rounds, by Megatron's options."""

    recipe: str
    """tensorwise, delayed or blockwise."""
    margin: int = 0
    """Of delayed scaling: by so many powers of two numbers stay below the format's largest."""
    first: int = 0
    """So many layers at the start are in bfloat16."""
    last: int = 0
    """And so many at the end."""

    def holds(self, layer: int, layers: int) -> bool:
        """Whether a layer's products are in FP8."""
        return self.first <= layer < layers - self.last

    def rounded_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors by transformers' names, those of products in FP8 rounded, in float32."""
        products = {
            name: tensor for name, tensor in tensors.items() if PRODUCTS in name and tensor.ndim > 1
        }
        largest: dict[str, Tensor] = {}
        for name, tensor in products.items():
            own = largest_of(tensor).float()
            largest[joined(name)] = torch.maximum(own, largest.get(joined(name), own))
        rounded = {name: torch.empty(each.shape) for name, each in products.items()}
        for name, tensor in products.items():
            each = (tensor, largest[joined(name)], rounded[name])
            # One by one: of a layer's experts each has a share of the memory alone.
            for matrix, most, place in zip(*map(matrices_of, each), strict=True):
                place.copy_(self.rounded(matrix.float(), BLOCK, most))
        return {**tensors, **rounded}

    def rounded(self, matrices: Tensor, rows: int, largest: Tensor | None = None) -> Tensor:
        """[..., height, width] of float32, each number what FP8 makes of it.

        Args:
            matrices: Each with a scale of its own.
            rows: Blockwise, of the blocks.
            largest: [..., 1, 1], of a matrix that these are part of.
        """
        if self.recipe == "blockwise":
            return to_e4m3_by_blocks(matrices, rows)
        scale = LARGEST / (largest_of(matrices) if largest is None else largest) / 2.0**self.margin
        return to_e4m3(matrices, scale)


def fp8_of(train: Mapping[str, Any]) -> Fp8 | None:
    """What training's options ask for; None where that is no FP8."""
    if not train.get("fp8"):
        return None
    ends = bool(train.get("first_last_layers_bf16"))
    recipe = train.get("fp8_recipe", "delayed")
    return Fp8(
        recipe=recipe,
        margin=train.get("fp8_margin", 0) if recipe == "delayed" else 0,  # others have none
        first=train.get("num_layers_at_start_in_bf16", 1) if ends else 0,
        last=train.get("num_layers_at_end_in_bf16", 1) if ends else 0,
    )


def joined(name: str) -> str:
    """The same for tensors that Megatron has as one."""
    for part, whole in JOINED.items():
        name = name.replace(f".{part}", f".{whole}")
    return name


def matrices_of(tensor: Tensor) -> Tensor:
    """[matrices, height, width] of [..., height, width], in the same memory."""
    return tensor.view(-1, *tensor.shape[-2:])


def largest_of(matrices: Tensor) -> Tensor:
    """[..., 1, 1] magnitudes."""
    return matrices.abs().amax((-2, -1), keepdim=True)


def to_e4m3(matrices: Tensor, scale: Tensor) -> Tensor:
    """Numbers times their scale, rounded, and the scale taken off; of zeros it is infinite."""
    finite = scale.where(scale.isfinite(), 1.0)
    scaled = (matrices * finite).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).float() / finite


def to_e4m3_by_blocks(matrices: Tensor, rows: int) -> Tensor:
    """[..., height, width], each `rows` x 128 by the largest power of two that fits, or fewer."""
    height, width = matrices.shape[-2:]
    edges = nn.functional.pad(matrices, (0, -width % BLOCK, 0, -height % rows))
    blocks = edges.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows)).transpose(-3, -2)
    scale = torch.exp2(torch.log2(LARGEST / largest_of(blocks)).floor())
    whole = to_e4m3(blocks, scale).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return whole[..., :height, :width]


class ProductsInFp8(TorchFunctionMode):
    """Within it products are in FP8 whose weights are those of `rounded_weights`, in float32."""

    def __init__(self, fp8: Fp8):
        super().__init__()
        self.fp8 = fp8

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Every function of torch's that is called meanwhile."""
        if function is nn.functional.linear:
            return self.linear(*args, **(named or {}))
        return function(*args, **(named or {}))

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of [..., columns], in their dtype."""
        if weight.dtype == inputs.dtype:
            return nn.functional.linear(inputs, weight, bias)
        flat = self.fp8.rounded(inputs.flatten(0, -2).float(), 1)
        added = None if bias is None else bias.float()
        output = nn.functional.linear(flat, weight, added)
        return output.to(inputs.dtype).view(*inputs.shape[:-1], -1)
