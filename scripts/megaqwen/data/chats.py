"""Conversations of fine-tuning: rendered by the chat template, encoded, and their targets verified.

Rendering is Python's work, so that processes of their own do it where there is much: they get blocks of
a file as they are and give back texts. The texts are encoded in this process, by the engine of documents.
"""

import multiprocessing
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy

from megaqwen.config.sections import Corpus
from megaqwen.data.blocks import Block, corpus_blocks
from megaqwen.data.documents import document_records
from megaqwen.data.engines import Engine
from megaqwen.data.files import compression_of, corpus_files
from megaqwen.data.pieces import Shard
from megaqwen.data.readers import Intake, Unnoted, sample_of
from megaqwen.data.rendering import Rendered, Rendering
from megaqwen.data.targets import Masked, lay_out, wrong_conversations
from megaqwen.data.threads import ahead, computing_threads
from megaqwen.data.tokenization import ChatTokenizer
from megaqwen.data.work import Counts, Encoded, in_order
from megaqwen.data.writing import token_type
from megaqwen.errors import InputError

PROCESSES_FROM = 8 * 2**20  # bytes of text: less is rendered sooner than processes start
UNPACKED = 4  # about how many times its size a compressed file has


def encode_conversations(
    corpus: Corpus,
    tokenizer: ChatTokenizer,
    engine: Engine,
    intake: Intake,
    shard: Shard,
    counts: Counts,
) -> Iterator[Encoded]:
    """The conversations of a shard; what cannot be used, or is too short, is left out and counted."""
    dtype = token_type(tokenizer.vocabulary_size)
    names = {index: token for token, index in tokenizer.special_ids.items()}

    def encode(given: tuple[Block, Rendered]) -> tuple[Encoded | None, dict[int, str]]:
        _, rendered = given
        if not rendered.counts:
            return None, {}
        texts = engine.encode(rendered.texts, [text.encode() for text in rendered.texts])
        masked = lay_out(rendered.plan(), texts, dtype)
        whole, said = rendered.whole_texts(names)
        wrong = wrong_conversations(masked, said, rendered.prompt_turns, tokenizer)
        return encoded_of(masked, whole, wrong.keys(), corpus.deduplicate), wrong

    at_once = computing_threads() + 1
    with ThreadPoolExecutor(at_once) as pool:
        blocks = ahead(render_blocks(corpus, tokenizer, intake, shard))
        for (block, rendered), (encoded, wrong) in in_order(pool, encode, blocks, at_once):
            counts.short_documents += rendered.short
            for error in rendered.errors:
                intake.refuse(error)
            for number, reason in sorted(wrong.items()):
                where = block.where(rendered.indices[number])
                intake.refuse(InputError(f"{where}: what is trained on cannot be told: {reason}"))
            if encoded is not None:
                yield encoded


def encoded_of(
    masked: Masked, texts: list[str], wrong: Collection[int], deduplicate: bool
) -> Encoded | None:
    """Conversations as they are written, without the wrong ones; None where that leaves none."""
    keep = numpy.ones(len(texts), numpy.bool_)
    keep[list(wrong)] = False
    if not keep.any():
        return None
    tokens = numpy.repeat(keep, masked.lengths) if wrong else slice(None)
    texts = [text for text, stays in zip(texts, keep, strict=True) if stays]
    documents = [text.encode() for text in texts]
    return Encoded(
        ids=masked.ids[tokens],
        targets=masked.targets[tokens],
        lengths=masked.lengths[keep],
        characters=sum(map(len, texts)),
        bytes=sum(map(len, documents)),
        records=document_records(texts, documents) if deduplicate else None,
    )


def render_blocks(
    corpus: Corpus, tokenizer: ChatTokenizer, intake: Intake, shard: Shard
) -> Iterator[tuple[Block, Rendered]]:
    """The blocks of a shard, rendered in this process or, where there is much, in several others."""
    render = rendering_of(corpus, tokenizer)
    blocks = corpus_blocks(corpus, intake, shard)
    processes = computing_threads()
    if text_bytes(corpus) // shard.count < PROCESSES_FROM or processes == 1:
        for block in blocks:
            yield block, render(block)
        return
    context = multiprocessing.get_context("spawn")  # this process has threads, which fork forgets
    with ProcessPoolExecutor(processes, context) as pool:
        yield from in_order(pool, render, blocks, processes + 1)


def rendering_of(corpus: Corpus, tokenizer: ChatTokenizer) -> Rendering:
    """What renders a corpus."""
    return Rendering(
        chat=tokenizer.chat,
        conversation_field=getattr(corpus, "conversation_field", None),
        min_characters=corpus.min_characters,
    )


def text_bytes(corpus: Corpus) -> int:
    """About how many bytes of text a corpus has."""
    return sum(
        path.stat().st_size * (UNPACKED if compression_of(path) else 1)
        for path in corpus_files(corpus)
    )


def sample_turns(corpus: Corpus, tokenizer: ChatTokenizer) -> list[str]:
    """The texts between special tokens of conversations at places all over a corpus."""
    render = rendering_of(corpus, tokenizer)

    def read(shard: Shard, size: int) -> Iterator[list[str]]:
        for block in corpus_blocks(corpus, Unnoted(corpus.name), shard, size):
            yield render(block).texts

    return list(sample_of(read))
