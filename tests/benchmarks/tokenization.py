"""Speed and memory of tokenization with Qwen's own vocabulary, over text that this machine has.

    uv run python tests/benchmarks/tokenization.py speed --directory DIR --megabytes 250
    uv run python tests/benchmarks/tokenization.py memory --directory DIR --megabytes 50 500 2000

`speed` measures, in turn and each in a process of its own: a corpus from JSON lines to .bin, .idx and
card; gigatoken's bare encode of the same documents, which lie in memory already; and, over a part of
the corpus, the plain way, which is a document at a time in as many processes as there are cores, with
Megatron's builder. Loading a tokenizer is in none of them; `preparing` says what ours takes before it
starts: loading the tokenizer, and the comparison of gigatoken with tokenizers.

`memory` runs scripts/preprocess.py and tells its peak.

Qwen's ranks (qwen.tiktoken) come out of PyPI's dashscope wheel, which is downloaded and not installed.
They are made into the tokenizer.json of a Qwen2. What ours wrote is held against tiktoken with the same
ranks, in documents from all over the corpus. The corpus is source code and documentation below the
folders that --text names, no file twice.
"""

import argparse
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from qwen_ranks import differences, make_model  # noqa: E402

SUFFIXES = {
    *(".py", ".pyi", ".md", ".rst", ".txt", ".html", ".js", ".json", ".c", ".h", ".hpp", ".cpp"),
    *(".cc", ".cuh", ".rs", ".go", ".ts", ".css", ".po", ".xml", ".pod", ".pm", ".sh", ".tcl"),
}
LARGEST_FILE = 400_000  # bytes: larger ones are data
TEXT = (sys.prefix, sys.base_prefix, "/usr/share", "/usr/include", "/usr/lib", "/opt")
PLAIN_BYTES = 20_000_000
# What becomes of texts when all of them are not enough: other words, for gigatoken's cache.
CHANGES = (str, str.upper, str.swapcase, lambda text: text[::-1])
WARM = [b"some words " * 100_000] * 4


# The corpus


def texts(folders: list[str]) -> Iterator[str]:
    """The text files below some folders, no text twice."""
    seen: set[bytes] = set()
    for folder in dict.fromkeys(folders):
        for place, below, names in os.walk(folder):
            below.sort()
            for path in (Path(place) / name for name in sorted(names)):
                if path.suffix not in SUFFIXES or path.is_symlink():
                    continue
                try:
                    content = path.read_bytes()
                    text = content.decode()
                except (OSError, UnicodeDecodeError):
                    continue
                digest = hashlib.blake2b(content, digest_size=12).digest()
                if len(content) <= LARGEST_FILE and text.strip() and digest not in seen:
                    seen.add(digest)
                    yield text


def make_corpus(directory: Path, megabytes: int, folders: list[str]) -> Path:
    """JSON lines of about so many megabytes of text, taken evenly from what there is."""
    path = directory / f"corpus-{megabytes}.jsonl"
    if path.is_file():
        return path
    everything = directory / "everything.jsonl"
    if not everything.is_file():
        with open(directory / "everything.partial", "wb") as stream:
            stream.writelines(encoded({"text": text}) for text in texts(folders))
        (directory / "everything.partial").rename(everything)
    wanted, there = megabytes * 10**6, everything.stat().st_size
    taken, part = 0, min(wanted / there, 1)
    with open(directory / "corpus.partial", "wb") as stream:
        for change in CHANGES:
            seen = begun = 0
            with open(everything, "rb") as lines:
                for line in lines:
                    seen += len(line)
                    if begun <= part * seen and taken < wanted:
                        text = change(json.loads(line)["text"])
                        begun += len(line)
                        taken += stream.write(encoded({"text": text}))
    (directory / "corpus.partial").rename(path)
    if taken < 0.95 * wanted:
        print(f"only {taken / 1e6:.0f} MB of text are below the folders of --text")
    return path


def encoded(record: dict[str, str]) -> bytes:
    """A line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def documents_of(corpus: Path, limit: int | None = None) -> list[str]:
    """The texts of a corpus, up to so many bytes."""
    found, size = [], 0
    with open(corpus, "rb") as lines:
        for line in lines:
            found.append(json.loads(line)["text"])
            size += len(line)
            if limit and size > limit:
                break
    return found


# What is measured, each in a process of its own


def ours(directory: Path, corpus: Path) -> dict[str, float]:
    """JSON lines to .bin, .idx and card."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from megaqwen.config.sections import FilesCorpus
    from megaqwen.data import parts
    from megaqwen.data.engines import choose_engine
    from megaqwen.data.readers import sample_texts
    from megaqwen.data.tokenization import DocumentTokenizer
    from megaqwen.data.tokenize_corpus import tokenize_corpus
    from megaqwen.provenance import new_directory

    values = {"source": "files", "name": "corpus", "files": [str(corpus)]}
    section = FilesCorpus.model_validate(values)
    start = time.monotonic()
    tokenizer = DocumentTokenizer(make_model(directory))
    engine = choose_engine(tokenizer, "corpus", sample_texts(section))
    preparing = time.monotonic() - start
    assert engine.name == "gigatoken", engine.reason
    parts.choose_engine = lambda *words: engine  # it was timed already
    gc.freeze()  # as scripts/preprocess.py does
    with new_directory(directory / "data") as output:
        start = time.monotonic()
        card, _ = tokenize_corpus(section, tokenizer, output)
        seconds = time.monotonic() - start
    return {"bytes": card["bytes"], "seconds": seconds, "preparing": preparing}


def bare(directory: Path, corpus: Path) -> dict[str, float]:
    """gigatoken's encode of the documents, in memory, all at once."""
    import gigatoken

    from megaqwen.data.engines import without_specials
    from megaqwen.data.tokenization import DocumentTokenizer

    content = without_specials(DocumentTokenizer(make_model(directory)))
    documents = [text.encode() for text in documents_of(corpus)]
    tokenizer = gigatoken.Tokenizer.from_json(content)
    tokenizer.encode_batch(WARM)
    start = time.monotonic()
    tokenizer.encode_batch(documents)
    seconds = time.monotonic() - start
    return {"bytes": sum(map(len, documents)), "seconds": seconds}


def load_plain(model: Path) -> None:
    """Each worker of the plain way has its tokenizer."""
    global PLAIN  # a worker's own, as in any pool
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    PLAIN = AutoTokenizer.from_pretrained(model)


def encode_plain(line: bytes) -> tuple[list[int], int]:
    """A line of JSON to ids, ended."""
    text = json.loads(line)["text"]
    return [*PLAIN(text).input_ids, PLAIN.eos_token_id], len(text.encode())


def plain(directory: Path, corpus: Path) -> dict[str, float]:
    """A document at a time in a pool of processes, as Megatron-LM's tools/preprocess_data.py."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with open(corpus, "rb") as stream:
        every = max(corpus.stat().st_size // PLAIN_BYTES, 1)
        lines = list(itertools.islice(stream, 0, None, every))
    cores = len(os.sched_getaffinity(0))
    model = make_model(directory)
    builder = IndexedDatasetBuilder(str(directory / "plain.bin"), dtype=numpy.int32)
    with multiprocessing.Pool(cores, load_plain, (model,)) as pool:
        pool.map(encode_plain, lines[: 4 * cores])
        size = 0
        start = time.monotonic()
        for ids, count in pool.imap(encode_plain, lines, 32):
            builder.add_document(ids, [len(ids)])
            size += count
        builder.finalize(str(directory / "plain.idx"))
        seconds = time.monotonic() - start
    return {"bytes": size, "seconds": seconds}


WAYS = {"ours": ours, "bare": bare, "plain": plain}


def measured(way: str, directory: Path, corpus: Path) -> dict[str, float]:
    """A way's figures, from a new process, with nothing left to write to the disk."""
    os.sync()
    command = [
        sys.executable,
        __file__,
        way,
        "--directory",
        str(directory),
        "--corpus",
        str(corpus),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def speed(directory: Path, megabytes: int, pairs: int, folders: list[str]) -> None:
    """Print a line for each pair with the plain way before or after it, and the medians of all."""
    corpus = make_corpus(directory, megabytes, folders)
    make_model(directory)
    of_bare, of_plain = [], []
    for pair in range(pairs):
        order = tuple(WAYS) if pair % 2 else tuple(reversed(WAYS))
        found = {way: measured(way, directory, corpus) for way in order}
        rate = {way: each["bytes"] / each["seconds"] / 1e6 for way, each in found.items()}
        of_bare.append(rate["ours"] / rate["bare"])
        of_plain.append(rate["ours"] / rate["plain"])
        print(
            f"{found['ours']['bytes'] / 1e6:.0f} MB: ours {rate['ours']:6.1f} MB/s, gigatoken bare"
            f" {rate['bare']:6.1f}: {of_bare[-1]:.2f} of its speed; the plain way (over"
            f" {found['plain']['bytes'] / 1e6:.0f} MB) {rate['plain']:.2f}: {of_plain[-1]:.0f} times"
            f" as fast; preparing {found['ours']['preparing']:.1f} s; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    print(
        f"medians: {statistics.median(of_bare):.2f} of gigatoken's bare encode,"
        f" {statistics.median(of_plain):.0f} times the plain way",
        flush=True,
    )
    compared, size, wrong = differences(directory, corpus, directory / "data" / "corpus")
    print(
        f"{compared} documents ({size / 1e6:.1f} MB) held against tiktoken: {len(wrong)} differ",
        *wrong[:5],
        flush=True,
    )


def memory(directory: Path, sizes: list[int], folders: list[str]) -> None:
    """Print the peak memory of scripts/preprocess.py for each size of a corpus."""
    import yaml

    model = make_model(directory)
    for megabytes in sizes:
        corpus = make_corpus(directory, megabytes, folders)
        config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
        values = {"source": "files", "name": "corpus", "files": [str(corpus)]}
        config["data"]["corpora"] = [values]
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        words = ["--config", directory / "config.yaml", "--model", model]
        script = ROOT / "scripts" / "preprocess.py"
        command = [sys.executable, script, *words, "--output", directory / "data"]
        start = time.monotonic()
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        seconds = time.monotonic() - start
        peak = json.loads((directory / "data" / "manifest.json").read_text())["peak_memory_bytes"]
        size = corpus.stat().st_size / 1e6
        print(
            f"{size:6.0f} MB: peak {peak / 1e6:5.0f} MB; {seconds:5.1f} s with start-up,"
            f" {size / seconds:5.1f} MB/s",
            flush=True,
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "memory", *WAYS])
    parser.add_argument("--directory", type=Path, required=True, help="a disk with room")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[250], help="of text")
    parser.add_argument("--pairs", type=int, default=4, help="repetitions (default: 4)")
    parser.add_argument("--text", nargs="+", default=list(TEXT), help="folders with text files")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    if arguments.what in WAYS:
        print(json.dumps(WAYS[arguments.what](directory, arguments.corpus)))
    elif arguments.what == "speed":
        speed(directory, arguments.megabytes[0], arguments.pairs, arguments.text)
    else:
        memory(directory, arguments.megabytes, arguments.text)


if __name__ == "__main__":
    main()
