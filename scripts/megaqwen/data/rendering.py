"""Blocks of records to the spans of their conversations, in this process or in another one."""

from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from megaqwen.data.blocks import Block
from megaqwen.data.chat import ChatTemplate, Span
from megaqwen.data.conversations import conversation_of
from megaqwen.errors import InputError

TEXT = -1  # in place of a special token's id


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the spans of some conversations lie: all of shape [spans] but `firsts`."""

    ids: NDArray[numpy.int32]
    """A special token's id, or TEXT for the next text."""
    targets: NDArray[numpy.uint8]
    firsts: NDArray[numpy.int64]
    """The first span of each conversation, of shape [conversations]."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Renders blocks; it can be sent to other processes."""

    chat: ChatTemplate
    conversation_field: str | None = None
    min_characters: int = 0

    def __call__(self, block: Block) -> "Rendered":
        """The conversations of a block as the chat template renders them."""
        rendered = Rendered()
        for index, record in block.records():
            if isinstance(record, InputError):
                rendered.errors.append(record)
                continue
            try:
                conversation = conversation_of(record, self.conversation_field)
                spans = self.chat.spans(conversation)
            except InputError as error:
                rendered.errors.append(InputError(f"{block.where(index)}: {error}"))
                continue
            if sum(len(s.text) for s in spans if s.target and not s.special) < self.min_characters:
                rendered.short += 1
            else:
                rendered.add(index, spans, self.chat, conversation.prompt_turns)
        return rendered


@dataclass(kw_only=True)
class Rendered:
    """The conversations of a block in spans, one after another."""

    texts: list[str] = field(default_factory=list)
    """Those of the spans that are no special tokens."""
    ids: list[int] = field(default_factory=list)
    """Of each span, as in a Plan."""
    targets: list[bool] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """The spans of each conversation."""
    prompt_turns: list[int] = field(default_factory=list)
    """How many turns of the assistant, from the first, are the prompt in each conversation."""
    indices: list[int] = field(default_factory=list)
    """Which of the block's records each conversation is."""
    errors: list[InputError] = field(default_factory=list)
    """What is wrong with the records that cannot be used."""
    short: int = 0
    """Conversations in which the assistant says less than is asked for."""

    def add(self, index: int, spans: list[Span], chat: ChatTemplate, prompt_turns: int = 0) -> None:
        """Add a conversation."""
        for span in spans:
            if span.special:
                self.ids.append(chat.special_ids[span.text])
            else:
                self.ids.append(TEXT)
                self.texts.append(span.text)
            self.targets.append(span.target)
        self.counts.append(len(spans))
        self.prompt_turns.append(prompt_turns)
        self.indices.append(index)

    def plan(self) -> Plan:
        """How the spans lie."""
        counts = numpy.array(self.counts, numpy.int64)
        return Plan(
            ids=numpy.array(self.ids, numpy.int32),
            targets=numpy.array(self.targets, numpy.uint8),
            firsts=numpy.cumsum(counts) - counts,
        )

    def whole_texts(self, names: dict[int, str]) -> tuple[list[str], list[str]]:
        """The text of each conversation, and of its targets.

        Args:
            names: The special tokens by their ids.
        """
        texts = iter(self.texts)
        pieces = [next(texts) if each == TEXT else names[each] for each in self.ids]
        whole, said, first = [], [], 0
        for count in self.counts:
            mine = range(first, first + count)
            whole.append("".join([pieces[n] for n in mine]))
            said.append("".join([pieces[n] for n in mine if self.targets[n]]))
            first += count
        return whole, said
