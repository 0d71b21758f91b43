"""A conversation rendered by the model's own chat template, and which parts of it are trained on.

What is trained on are the assistant's turns: all that the template writes after `<|im_start|>assistant`
and its newline, which is what generation is prompted with, up to `<|im_end|>`, which is trained on too.
So thinking blocks and tool calls are trained on as the template renders them; where Qwen3's leaves the
thinking of earlier turns out, it is in no target. Thinking that the last turn lacks is refused, and so
is a content that the template would take apart at </think> and not write whole. Where a completion has
a prompt, the prompt's turns are not trained on.

Turns are told by the special tokens that the template itself writes. The same characters in a message
are kept apart from them: before rendering, a character that Unicode keeps out of texts is put into them,
and taken out afterwards. So they end no turn, and become no special token.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from megaqwen.data.conversations import REASONING, Conversation, Message
from megaqwen.data.guarding import broken, holds, unused_character, with_texts
from megaqwen.data.records import usable
from megaqwen.data.thinking import CLOSE, OPEN, block_of
from megaqwen.errors import InputError

START, END = "<|im_start|>", "<|im_end|>"
HEADER = "assistant\n"
UNLIKELY = "unlikely_name_of_a_tool"
SHAPES = 10_000  # of conversations that are remembered


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a rendered conversation."""

    text: str
    """A special token's own text, or text between two of them."""
    special: bool = False
    target: bool = False
    """Whether it is trained on."""


@dataclass(kw_only=True)
class ChatTemplate:
    """A model's chat template with what it needs; it can be sent to other processes."""

    template: str
    tools_template: str
    """For conversations with tools; most models have one template for both."""
    variables: dict[str, Any]
    """Special tokens by their roles, such as eos_token, which templates may use."""
    special_ids: dict[str, int]
    """The vocabulary's special tokens: none of them comes out of a message."""
    shapes: set[Any] = field(default_factory=set)
    """Of conversations for which the template was seen to write the assistant's words, and nothing
    else of theirs, where they are looked for."""
    shown: dict[str, bool] = field(default_factory=dict)
    """Whether the template was seen to write tools, and reasoning in a field or in the content."""

    def spans(self, conversation: Conversation) -> list[Span]:
        """The conversation as the template renders it, cut at special tokens and at targets.

        Raises:
            InputError: The template refuses it, or does not render it in turns as Qwen's do.
        """
        messages: Any = conversation.messages
        tools: Any = conversation.tools
        self.check_reasoning(messages)
        self.check_tools(tools)
        tokens = any_of(tuple(self.special_ids))
        break_up = None
        if holds([messages, tools], lambda text: tokens.search(text) is not None):
            break_up = unused_character([messages, tools])
            guard = functools.partial(broken, tokens=tokens, character=break_up)
            messages, tools = with_texts(messages, guard), with_texts(tools, guard)
        text = usable(self.render(messages, tools), "as rendered")
        spans = cut(text, tokens)
        self.check_turns(spans, messages, conversation.prompt_turns)
        self.check_shape(messages, tools, spans)
        spans = without_first(spans, conversation.prompt_turns)
        if break_up is None:
            return spans
        if f"\\u{ord(break_up):04x}" in text.lower():
            raise InputError(
                "a message has the characters of a special token, and the chat template"
                " writes them as escapes: leave the conversation out"
            )
        return [Span(span.text.replace(break_up, ""), span.special, span.target) for span in spans]

    def render(self, messages: Sequence[Message], tools: Any) -> str:
        """What `apply_chat_template` of the model's tokenizer gives."""
        template = self.tools_template if tools else self.template
        try:
            rendered: Any = render_jinja_template(
                [list(messages)], tools=tools, chat_template=template, **self.variables
            )
        except Exception as error:  # the template's own, and any that its expressions end in
            raise InputError(f"the model's chat template refuses it: {error}") from error
        return str(rendered[0][0])

    def check_turns(
        self, spans: Sequence[Span], messages: Sequence[Message], prompt_turns: int
    ) -> None:
        """InputError unless each of the assistant's messages is a turn that has words, and its own."""
        turns = targets(spans)
        said = [message for message in messages if message["role"] == "assistant"]
        if len(turns) != len(said):
            raise InputError(
                f"the model's chat template renders {len(turns)} turns of the assistant for"
                f" {len(said)} messages: as {START}{HEADER!r} is expected, one for each"
            )
        for number, (turn, message) in enumerate(zip(turns, said, strict=True), start=1):
            where = f"the assistant's turn {number}"
            if CLOSE in message["content"]:
                self.check_thinking(message, turn, message is messages[-1], where)
            for name in REASONING if message is messages[-1] else ():
                thinking = str(message.get(name) or "").strip()
                if thinking not in turn:
                    raise InputError(f"{where} leaves out its {name} {thinking[:60]!r}")
            for words in own_words(message):
                if words not in turn:
                    raise InputError(
                        f"{where} as the model's chat template renders it"
                        f" lacks its words {words[:60]!r}"
                    )
            if number > prompt_turns and not turn.removesuffix(END).strip():
                raise InputError(
                    f"{where} is empty as the model's chat template renders it,"
                    " perhaps without its thinking: the assistant would learn to say nothing"
                )

    def check_thinking(self, message: Message, turn: str, last: bool, where: str) -> None:
        """InputError where the template takes a content apart at </think> and does not write it whole.

        The thinking of a turn that is not the last may be left out, by a template that writes it there.
        """
        content = message["content"]
        fields = [name for name in REASONING if message.get(name)]
        if fields and content.lstrip().startswith(OPEN):
            raise InputError(
                f"{where} has thinking in its content and in {fields[0]!r}, and would think twice:"
                " leave one of them out"
            )
        if content.strip() in turn:
            return
        try:
            thinking, words = block_of(content), own_words(message)[0]
            before = turn.rpartition(words)[0] if words else turn
            if thinking and not (self.shows("content") and (thinking in before or not last)):
                raise InputError(f"leaves out the thinking {thinking[:60]!r}")
        except InputError as error:
            move = (
                "move the thinking to reasoning_content, or put an empty one beside a content that only"
                " mentions the tags; or "
            )
            raise InputError(
                f"{where}: the model's chat template takes its content apart at {CLOSE}, and {error}:"
                f" {move if self.shows('reasoning_content') else ''}use a chat template that writes"
                " the content as it is"
            ) from error

    def check_reasoning(self, messages: Sequence[Message]) -> None:
        """InputError where reasoning stands in a field that the template never writes, not even last."""
        for name in REASONING:
            if any(message.get(name) for message in messages) and not self.shows(name):
                raise InputError(
                    f"the model's chat template does not write {name!r}, so that it would not be"
                    " trained on: put the reasoning into the content, or leave the field out"
                )

    def shows(self, name: str) -> bool:
        """Whether the template writes the reasoning in a field of the assistant's last message.

        In the content it stands as a block.
        """
        if name not in self.shown:
            reasons = "Reasons of the assistant."
            answer = {"role": "assistant", "content": "Answer.", name: reasons}
            if name == "content":
                answer[name] = f"{OPEN}\n{reasons}\n{CLOSE}\n\nAnswer."
            rendered = self.render([{"role": "user", "content": "Question?"}, answer], None)
            self.shown[name] = reasons in rendered
        return self.shown[name]

    def check_tools(self, tools: Any) -> None:
        """InputError where a conversation has tools and the template leaves no trace of any."""
        if tools and "tools" not in self.shown:
            function = {"name": UNLIKELY, "description": "", "parameters": {"type": "object"}}
            messages = [
                {"role": "user", "content": "Question?"},
                {"role": "assistant", "content": "Answer."},
            ]
            rendered = self.render(messages, [{"type": "function", "function": function}])
            self.shown["tools"] = UNLIKELY in rendered
        if tools and not self.shown["tools"]:
            raise InputError(
                "the model's chat template does not write 'tools', so that the assistant would learn to"
                " call what it was not told of: use a template that does, such as that of the model's"
                " Instruct version, or leave the tools out"
            )

    def check_shape(self, messages: Sequence[Message], tools: Any, spans: Sequence[Span]) -> None:
        """InputError unless only targets change, and in the right turns, when the assistant's words do.

        It is seen by rendering the conversation again with other words, once for each sequence of
        roles, tool calls and reasoning: a template does not look at the words themselves.
        """
        shape = (bool(tools), *map(message_shape, messages))
        if shape in self.shapes:
            return
        others: list[Message] = []
        for message in messages:
            if message["role"] == "assistant":
                message = {"role": "assistant", "content": f"Words {len(others)} of the assistant."}
            others.append(message)
        rendered = cut(self.render(others, tools), any_of(tuple(self.special_ids)))
        same = [s for s in spans if not s.target] == [s for s in rendered if not s.target]
        words = [message["content"] for message in others if message["role"] == "assistant"]
        turns = targets(rendered)
        placed = len(turns) == len(words) and all(
            turn.removesuffix(END).endswith(word) and turn.count("Words ") == 1
            for turn, word in zip(turns, words, strict=True)
        )
        if not same or not placed:
            raise InputError(
                "the model's chat template writes what the assistant says outside of its"
                " turns, so that it cannot be told what is to be trained on"
            )
        if len(self.shapes) < SHAPES:
            self.shapes.add(shape)


def cut(text: str, tokens: re.Pattern[str]) -> list[Span]:
    """A rendered conversation in spans: its turns are told by START and END."""
    spans: list[Span] = []
    turn: str | None = None  # "" after START, then whose turn it is
    for number, piece in enumerate(tokens.split(text)):
        special = number % 2 == 1
        if special and piece == (START if turn is not None else END):
            raise InputError("the model's chat template renders turns that do not end")
        mine = turn == "assistant"
        if special and piece == START:
            spans.append(Span(piece, special=True))
            turn = ""
        elif special:
            spans.append(Span(piece, special=True, target=mine))
            turn = None if piece == END else turn
        elif turn == "" and piece.startswith(HEADER):
            spans.append(Span(HEADER))
            if body := piece.removeprefix(HEADER):
                spans.append(Span(body, target=True))
            turn = "assistant"
        elif piece:
            spans.append(Span(piece, target=mine))
            turn = "other" if turn == "" else turn
    if turn is not None:
        raise InputError("the model's chat template renders turns that do not end")
    return spans


def without_first(spans: list[Span], count: int) -> list[Span]:
    """Spans in which so many turns of the assistant, from the first, are no targets."""
    changed = []
    for span in spans:
        changed.append(replace(span, target=False) if count else span)
        count -= bool(count and span.target and span.special and span.text == END)
    return changed


def targets(spans: Sequence[Span]) -> list[str]:
    """The assistant's turns, each with its end."""
    turns, turn = [], ""
    for span in spans:
        if span.target:
            turn += span.text
            if span.special and span.text == END:
                turns.append(turn)
                turn = ""
    return turns


def own_words(message: Message) -> list[str]:
    """What of a message stands in its turn whatever the template: not its thinking, nor white space."""
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [message["content"].split(CLOSE)[-1].strip(), *calls]


def message_shape(message: Message) -> tuple[Any, ...]:
    """What of a message a template looks at besides its words."""
    content = message["content"]
    return (
        message["role"],
        bool(content),
        CLOSE in content,
        content.startswith("<tool_response>") and content.endswith("</tool_response>"),
        len(message.get("tool_calls", ())),
        *(name in message for name in REASONING),
    )


@functools.cache
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that splits a text at tokens and keeps them."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")
