"""One case of benchmark_training.py, in a process of its own."""

import ctypes
import faulthandler
import fcntl
import json
import logging
import os
import re
import signal
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy
import psutil
from training_cases import TRAIN, Case

from megaqwen.checkpoints import TRACKER
from megaqwen.environment import prepare_gpu

STARTED = (
    time.time()
    - float(Path("/proc/uptime").read_text().split()[0])
    + (
        int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        / os.sysconf("SC_CLK_TCK")
    )
)  # when this process was started
TOKENS, DOCUMENT = 4_000_000, 1_000
END = 0  # the id that ends documents
PROFILED = 3  # this iteration
KINDS = {  # of kernels, by their names; the first that fits counts
    "attention": r"fmha|flash|sdpa|cudnn.*(prop|attn)|_dot_product|softmax.*attn",
    "loss": r"cross_entropy|log_softmax|nll",
    "optimizer": r"multi_tensor|adam|l2norm|lamb",
    "quantize": r"quantize|amax|transpose|cast|scale_inv|fp8",
    "experts": r"permute|sort|topk|router|radix|chunk|scatter|gather.*probs|row_id|moe|bincount|cumsum",
    "matrix products": r"nvjet|gemm|cutlass|xmma|splitK|gemv",
    "norm": r"norm",
    "rope": r"rope|rotary",
    "SwiGLU": r"silu|sigmoid|glu|cat_",
    "embedding": r"embedding|indexing_backward|index_select",
    "memory": r"memcpy|memset|fill|copy",
}


def measure(case: Case, directory: Path, seconds: float) -> None:
    """Train, and write the case's record to DIR/CASE.json."""
    name = sys.argv[sys.argv.index("--worker") + 1]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when the parent dies: a GPU is not left occupied
    prepare_gpu()
    if case.library == "transformers":
        from transformers_worker import train
    else:
        train = train_with_megatron
        import megaqwen.training.run  # noqa: F401  the slow imports, before it is our turn
    imported = time.time()
    with open(directory / f"gpu{os.environ['CUDA_VISIBLE_DEVICES']}.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        started = time.time()
        end = threading.Timer(seconds, lambda: (print("took too long"), leave(124)))
        end.daemon = True
        end.start()
        faulthandler.dump_traceback_later(seconds - 5)
        try:
            record = train(case, directory / name)
        except BaseException as error:  # noqa: BLE001  its threads would keep the process
            traceback.print_exc()
            record = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        end.cancel()
    marks = record.pop("marks", {})
    if marks:
        record["start"] = spans({"process": STARTED, "imports": imported}, started, marks)
    (directory / f"{name}.json").write_text(json.dumps(record))
    leave(0)


def leave(code: int) -> None:
    """End at once, with all processes of ours: Megatron's groups and workers take seconds to end."""
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(code)


def spans(before: dict[str, float], started: float, marks: dict[str, float]) -> dict[str, float]:
    """Seconds that each part of the start took; the wait for the GPU is none of them."""
    found = {"imports": before["imports"] - before["process"]}
    for name, at in marks.items():
        found[name], started = at - started, at
    return {name: round(value, 1) for name, value in found.items()}


def write_corpus(directory: Path) -> None:
    """A tokenized corpus of random ids, the frequent ones more frequent, as in text."""
    prefix = directory / "corpus"
    if prefix.with_suffix(".idx").is_file():
        return
    from megaqwen.data.writing import write_index

    generator = numpy.random.default_rng(1234)
    ranks = generator.zipf(1.2, TOKENS) + generator.integers(0, 300, TOKENS)
    tokens = numpy.clip(ranks % 151_000, 1, None).astype(numpy.int32).reshape(-1, DOCUMENT)
    tokens[:, -1] = END
    tokens.tofile(prefix.with_suffix(".bin"))
    lengths = numpy.full(len(tokens), DOCUMENT)
    write_index(
        prefix.with_suffix(".idx"), numpy.dtype(numpy.int32), len(tokens), lambda: iter([lengths])
    )


def training_run(case: Case, directory: Path) -> Any:
    """What preflight makes of a command line, for a model that is a shape alone."""
    from megaqwen.config import load_config
    from megaqwen.layout import Layout
    from megaqwen.provenance import StageRecord
    from megaqwen.training.preflight import TrainingRun

    for part in ("model", "megatron/checkpoint"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    hf_config = case.hf_config()
    (directory / "model" / "config.json").write_text(json.dumps(hf_config))
    for manifest in (directory.parent / "manifest.json", directory / "megatron" / "manifest.json"):
        manifest.write_text("{}")
    train = {
        **TRAIN,
        "micro_batch_size": case.micro,
        "global_batch_size": case.micro * case.accumulate,
        "train_iters": case.iterations,
        "save_interval": case.iterations,
        **case.options,
    }
    corpus = {"name": "corpus", "source": "builtin"}
    parity = {"texts": ["unused"]}
    text = {
        "run": "benchmark",
        "results": str(directory),
        "model": {"source": "path", "path": str(directory / "model")},
        "data": {"corpora": [corpus], "split": [100, 0, 0]},
        "train": train,
        "checkpoints": {},
        "tracking": {},
        "export": {},
        "parity": parity,
    }
    (directory / "config.yaml").write_text(json.dumps(text))
    config = load_config(directory / "config.yaml")
    layout = Layout(config=config)
    facts = {"documents": TOKENS // DOCUMENT, "unigram_entropy": 0.0}
    return TrainingRun(
        config=config,
        hf_config=hf_config,
        data={
            "corpora": {"corpus": facts},
            "files": {"corpus.bin": TOKENS},
            "tokenizer": {"end_of_document": {"token": "<|endoftext|>", "id": END}},
        },
        model=directory / "model",
        checkpoint=directory / "megatron" / "checkpoint",
        data_directory=directory.parent,
        output=directory / "train",
        checkpoints=directory / "train" / "checkpoints" / layout.stage_digest("train"),
        terminal=sys.stdout,
        record=StageRecord("train", layout.stage_config("train")),
    )


def train_with_megatron(case: Case, directory: Path) -> dict[str, Any]:
    """The train stage; its record."""
    import shutil

    import torch
    from megatron.training import training

    from megaqwen.training.flops import flops_per_token
    from megaqwen.training.metrics import read_metrics
    from megaqwen.training.run import METRICS, pretrain_run

    shutil.rmtree(directory, ignore_errors=True)
    if case.saves:  # what a save's time goes to
        for name in ("training.checkpointing", "core.dist_checkpointing.strategies.async_utils"):
            logging.getLogger(f"megatron.{name}").setLevel(logging.DEBUG)
    run = training_run(case, directory)
    marks: dict[str, float] = {}
    record: dict[str, Any] = {}
    watch(training, case, run.checkpoints, marks, record)
    pretrain_run(run)
    rows = [row for row in read_metrics(run.checkpoints / METRICS) if "loss" in row]
    skipped = PROFILED if case.profiled else 2
    seconds = statistics.median(row["seconds"] for row in rows[skipped:])
    length = run.config.train["seq_length"]
    tokens = case.micro * case.accumulate * length / seconds
    shutil.rmtree(directory / "train", ignore_errors=True)
    on_gpu = torch.cuda.is_available()
    waits = [row["save_wait_seconds"] for row in rows if "save_wait_seconds" in row]
    return {
        "tokens_per_second": tokens,
        "tflops": tokens * flops_per_token(run.hf_config, length) / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        "loss": rows[-1]["loss"],
        "losses": [row["loss"] for row in rows],
        "seconds": [row["seconds"] for row in rows],
        "marks": marks,
        **({"waits": waits} if waits else {}),
        **record,
    }


def watch(
    training: Any, case: Case, checkpoints: Path, marks: dict[str, float], record: dict[str, Any]
) -> None:
    """Put random weights for loaded ones, time the start and the save, profile an iteration."""
    training.load_checkpoint = lambda *_, **__: (0, 0)
    initialize, setup, step = (
        training.initialize_megatron,
        training.setup_model_and_optimizer,
        training.train_step,
    )
    save = training.save_checkpoint_and_time
    iteration = 0

    def timed_initialize(*words: Any, **named: Any) -> Any:
        result = initialize(*words, **named)
        marks["arguments, NCCL"] = time.time()
        return result

    def timed_setup(*words: Any, **named: Any) -> Any:
        result = setup(*words, **named)
        marks["model, optimizer"] = time.time()
        return result

    def timed_step(*words: Any, **named: Any) -> Any:
        nonlocal iteration
        iteration += 1
        if iteration == 1:
            marks["data"] = time.time()
        if iteration == PROFILED and case.profiled:
            result, record["shares"], record["kernels"] = profiled(step, words, named)
        else:
            result = step(*words, **named)
        if iteration == 1:
            marks["first step"] = time.time()
        return result

    def timed_save(*words: Any, **named: Any) -> Any:
        if case.saves:
            began = time.time()
            save(*words, **named)
            record.setdefault("saves", []).append(round(time.time() - began, 2))
        else:  # the stage asks at its end whether its last iteration was saved
            (checkpoints / TRACKER).write_text(str(words[0]))

    training.initialize_megatron, training.setup_model_and_optimizer = timed_initialize, timed_setup
    training.train_step, training.save_checkpoint_and_time = timed_step, timed_save


def profiled(step: Any, words: Any, named: Any) -> tuple[Any, dict[str, float], list[Any]]:
    """A step; the share of the GPU's time that each kind of kernel took; the longest kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    began = time.time()
    with profile(activities=[activity]) as profiler:
        result = step(*words, **named)
        if on_gpu:
            torch.cuda.synchronize()
        took = time.time() - began
    events = profiler.key_averages()
    times = {
        event.key: (
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total),
            event.count,
        )
        for event in events
    }
    shares: dict[str, float] = {}
    for name, (spent, _) in times.items():
        kind = next((k for k, names in KINDS.items() if re.search(names, name, re.I)), "the rest")
        shares[kind] = shares.get(kind, 0.0) + spent
    total = sum(shares.values())
    longest = sorted(((t, n, name[:120]) for name, (t, n) in times.items()), reverse=True)[:60]
    percent = {
        kind: round(100 * spent / total, 1)
        for kind, spent in sorted(shares.items(), key=lambda s: -s[1])
    }
    return result, {**percent, "busy": round(total / 1e4 / took, 1)}, longest
