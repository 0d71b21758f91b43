"""Greedy generation: the tokens that the Hugging Face model chooses, and whether Megatron would."""

from collections.abc import Mapping, Sequence

import torch

from megaqwen.parity.walk import Layers


@torch.no_grad()
def continue_greedily(
    model: Layers, prompts: Mapping[str, Sequence[int]], count: int
) -> dict[str, list[int]]:
    """Each prompt with `count` tokens more, the likeliest one by one.

    A model that finds each of these tokens the likeliest after those before it, which the comparison
    of all positions tells in one pass, would itself have generated them.
    """
    texts = {name: list(ids) for name, ids in prompts.items()}
    for _ in range(count):
        hidden = model.embed([torch.tensor(ids) for ids in texts.values()])
        for index in range(model.layers):
            hidden, _ = model.layer(index, hidden)
        with model.head() as (norm, logits):
            for ids, states in zip(texts.values(), hidden, strict=True):
                ids.append(int(logits(norm(states[-1:]))[0].argmax()))
    return texts
