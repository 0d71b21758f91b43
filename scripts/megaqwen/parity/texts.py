"""The texts whose logits are compared: the config's, a chat, and documents held out from training.

What is held out from SFT are conversations as the chat template renders them.
"""

import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megaqwen.config import Config
from megaqwen.config.blends import corpus_split
from megaqwen.data.splits import heldout_documents
from megaqwen.errors import InputError
from megaqwen.machine import free_memory

PASSES = 5
"""What the comparison costs in passes of float32: the float64 one counts for two, and one to spare."""
LEAST_TOKENS = 16
PROMPTS = 4
JOINED = 64
"""Held-out documents of a corpus that are joined to one text of full length."""
ATTENTION_BYTES = 24
"""Of the plainest attention, for a head and two positions: a float64 score and what becomes of it."""
MEMORY_SHARE = 0.25
"""Of the memory that is available, for them."""
PROMPT_TOKENS = 16
FULL_LENGTH = "full length"


def tokenized_texts(
    model: Path, data: Path, config: Config, limit: int, full: int
) -> dict[str, list[int]]:
    """Token ids of every text that is compared, by its name.

    Args:
        model: A Hugging Face directory with a tokenizer.
        data: Preprocess's directory.
        config: What to compare, and how much of it.
        limit: Tokens of a text; longer ones are cut.
        full: Tokens of one more text, of held-out documents joined.

    Raises:
        InputError: None of them has two tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    given = config.parity.texts
    # Named so that no corpus, whose name has no space, has texts of the same name.
    texts = {f"given text {number}": tokenizer.encode(text) for number, text in enumerate(given, 1)}
    if tokenizer.chat_template:
        texts["chat"] = chat_prompt(tokenizer, given[0])
    wanted, joined = config.parity.held_out_documents, []
    for corpus in config.data.corpora if wanted else []:
        split = corpus_split(config.data, corpus)
        pretraining = config.data.kind == "pretrain"
        documents = heldout_documents(
            data / corpus.name, split, max(wanted, JOINED), end_of_document=pretraining
        )
        texts |= {
            f"{corpus.name} {number}": document
            for number, document in enumerate(documents[:wanted], 1)
        }
        joined += list(chain.from_iterable(documents))
    texts = {name: tokens[:limit] for name, tokens in texts.items() if len(tokens) > 1}
    if len(joined) > limit:
        texts[FULL_LENGTH] = joined[:full]
    if not texts:
        raise InputError("parity.texts and the held-out documents have no text of two tokens")
    return texts


def positions_in_memory(heads: int) -> int:
    """How long a text may be, so that the plainest attention fits beside everything else."""
    memory = MEMORY_SHARE * free_memory()
    return int((memory / (ATTENTION_BYTES * heads)) ** 0.5)


def memory_for(positions: int, heads: int) -> float:
    """Bytes of free memory at which `positions_in_memory` allows a text."""
    return positions**2 * ATTENTION_BYTES * heads / MEMORY_SHARE


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """What a model is given when a user says a text."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return ids


def cut_to_budget(texts: Mapping[str, list[int]], budget: float) -> dict[str, list[int]]:
    """The texts, each cut to one length at which all of them are compared in time.

    Args:
        texts: Token ids by name.
        budget: Tokens that a float32 model takes in the time that there is.
    """
    affordable = budget / PASSES
    limit = max(len(ids) for ids in texts.values())
    while limit > LEAST_TOKENS and sum(min(len(ids), limit) for ids in texts.values()) > affordable:
        limit = max(LEAST_TOKENS, limit * 7 // 8)
    return {name: ids[:limit] for name, ids in texts.items()}


def why_cut(
    made: Mapping[str, list[int]], compared: Mapping[str, list[int]], full: int, wanted: int
) -> dict[str, str]:
    """By name of the text of full length, what it was cut to and why; {} where it was not.

    Args:
        made: What `tokenized_texts` made.
        compared: The same after `cut_to_budget`.
        full: Tokens that it could have, by memory.
        wanted: Tokens of a sample in training.
    """
    if FULL_LENGTH not in made:
        return {}
    reached, had = len(compared[FULL_LENGTH]), len(made[FULL_LENGTH])
    limit = "parity.minutes" if reached < had else "memory" if had == full < wanted else ""
    words = f"{limit} is enough for {reached:,} of {wanted:,} tokens in one text"
    return {FULL_LENGTH: words} if limit else {}


def operations_per_second(size: int = 1024) -> float:
    """Of float32 matrix products on this machine, as they are measured just now."""
    matrix = torch.ones(size, size)
    matrix @ matrix
    started = time.perf_counter()
    matrix @ matrix
    return 2 * size**3 / (time.perf_counter() - started)


def prompts(texts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The beginnings of some texts, to be continued, by a name that says so."""
    some = list(texts.items())[:PROMPTS]
    return {f"{name} continued": ids[:PROMPT_TOKENS] for name, ids in some}
