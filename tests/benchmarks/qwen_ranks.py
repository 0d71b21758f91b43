"""Qwen's own ranks (qwen.tiktoken of the dashscope wheel) as a Hugging Face tokenizer, and as truth."""

import base64
import itertools
import json
import unicodedata
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHEEL = "dashscope"
RANKS = "dashscope/resources/qwen.tiktoken"
MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SPECIAL = ("<|im_start|>", "<|im_end|>")
COMPARED = 5_000_000  # bytes of a corpus that are held against tiktoken


def fetch_ranks(directory: Path) -> Path:
    """qwen.tiktoken out of the wheel."""
    path = directory / "qwen.tiktoken"
    if not path.is_file():
        page = f"https://pypi.org/pypi/{WHEEL}/json"
        with urllib.request.urlopen(page) as answer:
            files = json.load(answer)["urls"]
        (url,) = (each["url"] for each in files if each["packagetype"] == "bdist_wheel")
        wheel = directory / "dashscope.whl"
        urllib.request.urlretrieve(urllib.parse.urljoin(page, url), wheel)
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(RANKS))
    return path


def read_ranks(directory: Path) -> dict[bytes, int]:
    """The rank of each token, which is its id."""
    lines = fetch_ranks(directory).read_bytes().split(b"\n")
    pairs = (line.split() for line in lines if line.strip())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last merge that makes a token of several bytes, by the ranks before its own."""
    parts = [bytes([octet]) for octet in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def make_model(directory: Path) -> Path:
    """A Hugging Face directory with Qwen's tokenizer, and a config.json of its vocabulary's size."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = directory / "model" / "hf"
    if (model / "tokenizer.json").is_file():
        return model
    ranks = read_ranks(directory)
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[octet] for octet in token)

    in_order = sorted(ranks, key=ranks.__getitem__)
    merges: Any = [
        tuple(map(written, merge_of(token, ranks))) for token in in_order if len(token) > 1
    ]
    tokenizer = Qwen2Tokenizer(
        vocab={written(token): rank for token, rank in ranks.items()},
        merges=merges,
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    model.mkdir(parents=True, exist_ok=True)
    check_hard_texts(tokenizer, ranks)
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 151_936}))
    (model.parent / "manifest.json").write_text("{}")
    return model


def tiktoken_of(ranks: dict[bytes, int]) -> Any:
    """tiktoken with these ranks and the pattern of Qwen2's tokenizer."""
    import tiktoken
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    return tiktoken.Encoding(
        "qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={}
    )


def check_hard_texts(tokenizer: Any, ranks: dict[bytes, int]) -> None:
    """The ids of the hard texts are tiktoken's with the same ranks."""
    from megaqwen.data.hard_texts import HARD_TEXTS

    truth = tiktoken_of(ranks)
    for text in HARD_TEXTS:
        normal = unicodedata.normalize("NFC", text)
        if not any(token in text for token in ("<|endoftext|>", *SPECIAL, *MARKUP)):
            assert tokenizer.encode(text) == truth.encode_ordinary(normal), text


def differences(directory: Path, corpus: Path, prefix: Path) -> tuple[int, int, list[int]]:
    """How many documents were compared, their bytes, and the numbers of those that are not tiktoken's.

    Args:
        directory: Where the ranks are.
        corpus: JSON lines.
        prefix: What they were tokenized into, without .bin and .idx.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    truth = tiktoken_of(read_ranks(directory))
    dataset = IndexedDataset(str(prefix))
    every = max(corpus.stat().st_size // COMPARED, 1)
    compared = size = 0
    wrong = []
    for number, text in itertools.islice(texts(corpus), 0, None, every):
        if not any(token in text for token in MARKUP):
            compared, size = compared + 1, size + len(text.encode())
            ids = truth.encode_ordinary(unicodedata.normalize("NFC", text))
            if dataset[number].tolist() != [*ids, len(truth._mergeable_ranks)]:
                wrong.append(number)
    return compared, size, wrong


def texts(corpus: Path) -> Iterator[tuple[int, str]]:
    """The texts that are not empty, with the numbers of their documents."""
    number = 0
    with open(corpus, "rb") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if text.strip():
                yield number, text
                number += 1
