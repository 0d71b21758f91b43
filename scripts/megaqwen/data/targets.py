"""Rendered conversations to token ids and targets, verified from the ids backwards.

An array of targets has a 1 where the token is trained on, and is as long as that of the ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from megaqwen.data.chat import END, START
from megaqwen.data.engines import Tokens
from megaqwen.data.rendering import TEXT, Plan
from megaqwen.data.tokenization import ChatTokenizer


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Token ids of some conversations, one after another."""

    ids: NDArray[Any]
    """Of shape [tokens]."""
    targets: NDArray[numpy.uint8]
    """Of shape [tokens]."""
    lengths: NDArray[numpy.int32]
    """The tokens of each conversation, of shape [conversations]."""


def lay_out(plan: Plan, texts: Tokens, dtype: DTypeLike) -> Masked:
    """The texts' tokens and the special tokens where the plan has them.

    Args:
        plan: Of the conversations.
        texts: The tokens of the texts between their special tokens, in order.
        dtype: Of an id in the result.
    """
    is_text = plan.ids == TEXT
    sizes = numpy.ones(len(plan.ids), numpy.int64)
    sizes[is_text] = texts.lengths
    ends = numpy.cumsum(sizes)
    of_text = numpy.ones(int(ends[-1]), numpy.bool_)
    special = (ends - 1)[~is_text]
    of_text[special] = False
    ids = numpy.empty(len(of_text), dtype)
    ids[of_text] = texts.ids
    ids[special] = plan.ids[~is_text]
    return Masked(
        ids=ids,
        targets=numpy.repeat(plan.targets, sizes),
        lengths=numpy.add.reduceat(sizes, plan.firsts).astype(numpy.int32),
    )


def wrong_conversations(
    masked: Masked,
    expected: Sequence[str],
    prompt_turns: Sequence[int],
    tokenizer: ChatTokenizer,
) -> dict[int, str]:
    """Which conversations do not have the targets that they are to have, and why.

    Both are looked at without the plan that made them: the text of the target ids, which is to be what
    the template renders of the assistant, and the turns as the ids alone tell them.

    Args:
        masked: The conversations.
        expected: What each one is to be trained on, in text, ends of turns included.
        prompt_turns: How many turns of the assistant, from the first, each one is not to be trained on.
        tokenizer: The model's.
    """
    starts = numpy.cumsum(masked.lengths, dtype=numpy.int64) - masked.lengths
    of_ids = targets_of_ids(masked.ids, starts, prompt_turns, tokenizer)
    differ = numpy.add.reduceat(of_ids != masked.targets, starts, dtype=numpy.int64)
    wrong = {int(n): "the targets are not its turns" for n in numpy.flatnonzero(differ)}
    counts = numpy.add.reduceat(masked.targets, starts, dtype=numpy.int64)
    chosen = masked.ids[masked.targets.view(numpy.bool_)]
    rows = [row.tolist() for row in numpy.split(chosen, numpy.cumsum(counts)[:-1])]
    for number, (found, text) in enumerate(
        zip(tokenizer.decode_batch(rows), expected, strict=True)
    ):
        if found != text and found != tokenizer.normalized(text):
            wrong[number] = (
                f"the target tokens are {found[:60]!r} in text, and the assistant says {text[:60]!r}"
            )
    for number in numpy.flatnonzero((counts == 0) | (counts == masked.lengths)).tolist():
        wrong[number] = "no token or every token is a target"
    return wrong


def targets_of_ids(
    ids: NDArray[Any],
    starts: NDArray[numpy.int64],
    prompt_turns: Sequence[int],
    tokenizer: ChatTokenizer,
) -> NDArray[numpy.uint8]:
    """The targets by the ids alone: from after each header of the assistant to the next end of a turn.

    Args:
        ids: Of some conversations, one after another.
        starts: The first token of each conversation.
        prompt_turns: How many turns of the assistant, from the first, are no targets in each.
        tokenizer: The model's.
    """
    start, end = (tokenizer.special_ids[token] for token in (START, END))
    header = tokenizer.header
    (begins,) = numpy.nonzero(ids[: len(ids) - len(header)] == start)
    for offset, token in enumerate(header, start=1):
        begins = begins[ids[begins + offset] == token]
    begins += 1 + len(header)
    if any(prompt_turns):
        mine = numpy.searchsorted(starts, begins, side="right") - 1  # whose conversation it is
        before = numpy.searchsorted(begins, starts)  # turns of earlier conversations
        numbers = numpy.arange(len(begins)) - before[mine]
        begins = begins[numbers >= numpy.asarray(prompt_turns)[mine]]
    (ends,) = numpy.nonzero(ids == end)
    places: Any = numpy.searchsorted(ends, begins)
    begins, places = begins[places < len(ends)], places[places < len(ends)]
    steps = numpy.zeros(len(ids) + 1, numpy.int8)
    steps[begins] = 1
    steps[ends[places] + 1] -= 1
    return numpy.cumsum(steps[:-1], dtype=numpy.int8).view(numpy.uint8)
