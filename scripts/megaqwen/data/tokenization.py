"""A model's own tokenizer, set up for documents that are trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megaqwen.data.chat import END, HEADER, START, ChatTemplate
from megaqwen.data.conversations import Conversation
from megaqwen.errors import InputError
from megaqwen.provenance import read_json, sha256_file

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def tokenizer_digests(model: Path) -> dict[str, str]:
    """SHA-256 of the tokenizer's files and the chat template in a model directory, by their names."""
    paths = (model / name for name in TOKENIZER_FILES)
    return {path.name: sha256_file(path) for path in paths if path.is_file()}


class DocumentTokenizer:
    """Encodes documents in batches, each one ended by the end-of-document token.

    Text is only ever text: where a document has the characters of a special token, such as
    <|im_end|>, they are split like other characters. Tokens that the vocabulary adds without
    calling them special (<think>, <tool_call>) are encoded as themselves.

    The end of a document is <|endoftext|>, whatever the tokenizer calls its eos_token: Instruct
    models name <|im_end|> there, which ends a turn of a conversation.
    """

    def __init__(self, model: Path):
        """Load the tokenizer of a Hugging Face directory, without the network.

        Raises:
            InputError: No fast tokenizer there, no <|endoftext|> in it, or ids that the model's
                embedding does not have.
        """
        self.model = model
        self.vocabulary_size = model_vocabulary_size(model)
        self.tokenizer = load_tokenizer(model)
        self.backend: Tokenizer = self.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # the backend's name for: as text, not as tokens
        self.end_of_document = self.check_vocabulary()

    def encode(self, texts: Sequence[str]) -> list[NDArray[numpy.int32]]:
        """The token ids of each document, with the end of document last; all cores work on it."""
        rows = self.ids(texts)
        return [numpy.array([*each, self.end_of_document], numpy.int32) for each in rows]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts: what every other engine is held against."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encodings]

    def added_tokens(self) -> list[str]:
        """What the vocabulary adds to the words that were learnt: special tokens and others."""
        return [each.content for each in self.backend.get_added_tokens_decoder().values()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps: class, files with digests, vocabulary size, end of document."""
        return {
            "class": type(self.tokenizer).__name__,
            "files": tokenizer_digests(self.model),
            "vocabulary_size": self.vocabulary_size,
            "end_of_document": {"token": END_OF_DOCUMENT, "id": self.end_of_document},
        }

    def check_vocabulary(self) -> int:
        """The id of the end of document, after making sure of what the class promises."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        own = self.model / "tokenizer.json"
        own_id = Tokenizer.from_file(str(own)).token_to_id if own.is_file() else vocabulary.get
        if own_id(END_OF_DOCUMENT) is None:  # where it is missing, transformers makes a new id
            raise InputError(
                f"{self.model}: its vocabulary has no {END_OF_DOCUMENT}, which ends a document of "
                "every Qwen model: is this a Qwen tokenizer?"
            )
        token, largest = max(vocabulary.items(), key=lambda item: item[1])
        if largest >= self.vocabulary_size:
            raise InputError(
                f"{self.model}: the tokenizer's token {token!r} has the id {largest}, but "
                f"config.json gives the model a vocabulary of {self.vocabulary_size}: "
                "they do not fit together"
            )
        for index, added in self.backend.get_added_tokens_decoder().items():
            encoded = self.backend.encode(added.content, add_special_tokens=False)
            if (added.special or added.content == END_OF_DOCUMENT) and index in encoded.ids:
                raise InputError(
                    f"{self.model}: the text {added.content!r} in a document would become the "
                    "special token itself: mark it as special in tokenizer.json"
                )
        return int(vocabulary[END_OF_DOCUMENT])


class ChatTokenizer(DocumentTokenizer):
    """A model's tokenizer with its chat template, for conversations.

    A special token comes from the template alone: in a message its characters are text, as in a document.
    """

    def __init__(self, model: Path):
        """Load it.

        Raises:
            InputError: As for documents; or there is no chat template, or one that does not render
                turns as Qwen's do.
        """
        super().__init__(model)
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{model}: its tokenizer has no chat template, which says how a conversation is"
                " written: put the one of the model's Instruct version there, as chat_template.jinja"
            )
        added = self.backend.get_added_tokens_decoder().items()
        self.special_ids = {token.content: index for index, token in added if token.special}
        if not {START, END} <= self.special_ids.keys():
            raise InputError(
                f"{model}: its vocabulary lacks the special tokens {START} and {END}, between which a"
                " turn of a conversation stands in every Qwen model: is this a Qwen tokenizer?"
            )
        self.header = self.ids([HEADER])[0]
        self.chat = ChatTemplate(
            template=self.tokenizer.get_chat_template(),
            tools_template=self.tokenizer.get_chat_template(tools=[{}]),
            variables=dict(self.tokenizer.special_tokens_map),
            special_ids=self.special_ids,
        )
        said = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
        try:
            self.chat.spans(Conversation(messages=said))
        except InputError as error:
            raise InputError(
                f"{model}: its chat template cannot be trained with: {error}"
            ) from error

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of rows of token ids, special tokens included."""
        return list(self.backend.decode_batch([*map(list, rows)], skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        """A text as the tokenizer changes it before it splits it: Qwen's composes characters (NFC)."""
        normalizer = self.backend.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps: as for documents, and the end of a turn."""
        turn = {"token": END, "id": self.special_ids[END]}
        return {**super().describe(), "end_of_turn": turn}


def load_tokenizer(model: Path) -> Any:
    """The fast tokenizer that transformers finds in a directory."""
    if not any((model / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{model}: no tokenizer.json and no vocab.json: a tokenizer is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # damaged files end in exceptions of every kind
        raise InputError(f"{model}: its tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"{model}: {type(tokenizer).__name__} is not a fast tokenizer: "
            "a tokenizer.json is needed"
        )
    return tokenizer


def model_vocabulary_size(model: Path) -> int:
    """`vocab_size` of a model's config.json: the rows of its embedding."""
    path = model / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file: a Hugging Face model directory has one")
    try:
        size = read_json(path)["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no vocab_size can be read from it: {error}") from error
    if type(size) is not int or size < 1:
        raise InputError(f"{path}: vocab_size is {size!r}: a positive number is expected")
    return size
