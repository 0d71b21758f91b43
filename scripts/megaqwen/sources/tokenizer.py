"""A real Qwen2 tokenizer (byte-level BPE) for the tiny models, trained on the built-in text."""

import json
from itertools import islice
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from megaqwen.config.tiny_shapes import BPE_TOKENS, MARKUP_TOKENS, SPECIAL_TOKENS
from megaqwen.data.builtin import builtin_documents

TRAINING_DOCUMENTS = 250  # enough text for 2528 tokens, and read in a second or two
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(max_positions: int) -> Qwen2Tokenizer:
    """Train the tokenizer; the same text gives the same tokenizer.

    Normalizer, pre-tokenizer and decoder are those of transformers' Qwen2 tokenizer; special tokens
    are as in Qwen's base models: <|endoftext|> ends a document and pads.

    Args:
        max_positions: The longest sequence, in tokens, that the model takes.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer = qwen.normalizer
    trained.pre_tokenizer = qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(islice(builtin_documents(), TRAINING_DOCUMENTS), trainer)
    bpe = json.loads(trained.to_str())["model"]
    vocabulary = bpe["vocab"]
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    merges: Any = [tuple(merge) for merge in bpe["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKUP_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
