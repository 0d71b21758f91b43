"""A rank whose training fails ends, though what loads its data ignores SIGTERM."""

import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT

RANK = """
import signal
import torch
from megaqwen.training.workers import ended_by_failure

def ignore(_):  # as Megatron's loaders do
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

loader = iter(
    torch.utils.data.DataLoader(
        range(100), num_workers=2, persistent_workers=True, worker_init_fn=ignore
    )
)
next(loader)
with ended_by_failure():
    raise ValueError("the training's own error")
"""


SAVING = """
import multiprocessing, time
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megaqwen.training.workers import ended_by_failure

context = multiprocessing.get_context("fork")
requests = PersistentAsyncCaller._persistent_queue = context.JoinableQueue()
context.Process(target=time.sleep, args=(600,), daemon=True).start()  # it reads none
requests.put(bytes(1 << 20))  # more than a pipe holds
with ended_by_failure():
    raise ValueError("the training's own error")
"""


NOT_SENT = """
import time
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCallsQueue,
    PersistentAsyncCaller,
)
from megaqwen.training import copy_beside
from megaqwen.training.workers import ended_by_failure

if __name__ == "__main__":
    copy_beside.watch_worker()
    caller = AsyncCallsQueue._persistent_caller = PersistentAsyncCaller()
    caller.process = PersistentAsyncCaller._get_process(0)
    caller._persistent_queue.put(lambda: "cannot be pickled, and is never reckoned as done")
    while not copy_beside.UNSENT:
        time.sleep(0.01)
    with ended_by_failure():
        raise ValueError("the training's own error")
"""


@pytest.mark.parametrize(
    "rank", [RANK, SAVING, NOT_SENT], ids=["loads data", "saves", "could not send"]
)
def test_a_failed_rank_ends_with_its_own_error(rank: str, tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(rank)
    done = subprocess.run(
        [sys.executable, program],
        env={"PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "ValueError: the training's own error" in done.stderr
