"""Where asynchronous saves put tensors, as far as a machine without a GPU can tell."""

import io
import multiprocessing
import resource
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megaqwen.config.sections import Checkpoints
from megaqwen.training import async_saving, cpu_emulation, saving
from megaqwen.training.copy_beside import COPY
from megaqwen.training.ranks import Rank, rank_from_environment, torch_variables

# What srun sets for the tenth of 16 tasks on two nodes.
TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def buckets(seed: int) -> list[async_saving.Bucket]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(3, 5, generator=generator),
        torch.randn(4, 6, generator=generator).bfloat16().T,  # not contiguous
        torch.randn(7, generator=generator)[2:4],  # a view of a larger storage
        torch.tensor(seed),
        torch.empty(0, 3),
    ]
    items = [(f"item {number}", tensor) for number, tensor in enumerate(tensors)]
    return [("a", "a.distcp", (["bytes"], items[:2])), ("b", "b.distcp", ([], items[2:]))]


def tensors_of(these: list[async_saving.Bucket]) -> list[torch.Tensor]:
    return [tensor for *_, (_, tensors) in these for _, tensor in tensors]


def test_each_tensor_is_staged_with_a_storage_of_its_own() -> None:
    wanted = buckets(1)
    staged = async_saving.stage(wanted)
    assert [(file, key, data) for file, key, (data, _) in staged] == [
        (file, key, data) for file, key, (data, _) in wanted
    ]
    for place, original in zip(tensors_of(staged), tensors_of(wanted), strict=True):
        torch.testing.assert_close(place, original, rtol=0, atol=0)
        assert place.untyped_storage().nbytes() == original.nbytes
        written = io.BytesIO()
        torch.save(place, written)
        written.seek(0)
        assert torch.equal(torch.load(written), original)


def test_the_next_save_takes_the_same_memory() -> None:
    first = [place.data_ptr() for place in tensors_of(async_saving.stage(buckets(1)))]
    staged = async_saving.stage(buckets(2))
    assert [place.data_ptr() for place in tensors_of(staged)][:4] == first[:4]
    assert all(map(torch.equal, tensors_of(staged), tensors_of(buckets(2))))


def test_more_than_the_host_has_is_not_kept() -> None:
    staging = async_saving.Staging()
    (original,) = (torch.ones(1 << 10),)
    assert staging.tensors([original.expand(1 << 45, -1)]) is None
    assert staging.tensors([original])
    assert staging.memory.nbytes == 1 << 12


@pytest.mark.parametrize(
    "by_pyxis", [{}, {"RANK": "9", "LOCAL_RANK": "1"}, {"RANK": "9", "WORLD_SIZE": "16"}]
)
def test_the_ranks_of_a_node_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, by_pyxis: dict[str, str]
) -> None:
    """Under srun as well, which tells each of its tasks how many there are."""
    for name in torch_variables(TASK):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    for name, value in (TASK | by_pyxis).items():
        monkeypatch.setenv(name, value)
    assert rank_from_environment() == Rank(rank=9, world_size=16, local_rank=1)
    size = 1 << 12
    memory = Namespace(available=int(async_saving.SPARE * size * 8) - 1)
    monkeypatch.setattr(async_saving, "free_memory", lambda: memory.available)
    assert not async_saving.is_kept(size)
    memory.available += 1
    assert async_saving.is_kept(size)


def test_a_save_does_not_wait_for_checksums_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        go_on = threading.Event()
        digested: list[str] = []

        def slowly(directory: Path, *words: object) -> None:
            assert go_on.wait(60)
            digested.append(directory.name)

        monkeypatch.setattr(saving, "write_checksums", slowly)
        monkeypatch.setattr(saving, "check_held", lambda *words: None)
        around = saving.Saving(tmp_path, Checkpoints())
        places = [tmp_path / f"iter_{number:07}" for number in (1, 2)]
        for place in places:
            place.mkdir()
            (place / "__0_0.distcp").write_bytes(b"tensors")
            around.begin(place)
            around.end(place)
        assert not digested
        # A training that is told to stop waits for them as well, but not longer than its time allows.
        last = around.background
        monkeypatch.setattr(saving, "STOPPING_SECONDS", 0.1)
        around.finish_stopped()
        assert not digested
        around.background = last
        monkeypatch.setattr(saving, "STOPPING_SECONDS", 60.0)
        threading.Timer(0.2, go_on.set).start()
        around.finish_stopped()
        assert digested == [place.name for place in places]
    finally:
        torch.distributed.destroy_process_group()


def test_memory_is_reserved_where_there_is_something_to_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = [torch.nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)]
    optimizer = torch.optim.AdamW(model[0].parameters())
    arguments = Namespace(
        async_save=True,
        data_parallel_size=2,
        use_distributed_optimizer=False,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
    )
    found: list[int] = []
    monkeypatch.setattr(async_saving, "reserve", found.append)
    async_saving.reserve_for(model, None, arguments)  # stopped after its last save: evaluated alone
    async_saving.reserve_for(model, optimizer, Namespace(async_save=False))
    assert not found
    async_saving.reserve_for(model, optimizer, arguments)
    # Weights, their copies and moments, on two ranks.
    assert found == [int(async_saving.MORE * ((2 + 4 + 8) * 8 // 2))]
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(async_saving, "is_kept", lambda size, beside: asked.append((size, beside)))
    async_saving.reserve_for(model, optimizer, arguments)
    arguments.use_distributed_optimizer = True
    async_saving.reserve_for(model, optimizer, arguments)
    assert len(found) == 1
    # Adam's state and its copy, which the distributed optimizer gathers of all ranks' shares.
    assert [beside for _, beside in asked] == [0, 12 * 8]


def test_what_is_put_in_the_place_of_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker's staging and its end, the wait for it, and where training waits for the copy."""
    cpu_emulation.install()
    from megatron.training import training

    for owner, name in (
        (FileSystemWriterAsync, "preload_tensors"),
        (PersistentAsyncCaller, "is_current_async_call_done"),
        (PersistentAsyncCaller, "_persistent_preload_q"),
        (training, "setup_model_and_optimizer"),
        (training, "finalize_model_grads"),
        (COPY, "beside"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    done, finalize = PersistentAsyncCaller.is_current_async_call_done, training.finalize_model_grads
    arguments = Namespace(async_save=False, cuda_graph_impl="local")
    monkeypatch.setattr("megatron.training.get_args", lambda: arguments)
    training.setup_model_and_optimizer = lambda: ([], None, None)
    PersistentAsyncCaller._persistent_preload_q = multiprocessing.JoinableQueue()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] // 2, limits[1]))
    async_saving.install()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert FileSystemWriterAsync.preload_tensors is async_saving.stage
    assert PersistentAsyncCaller.is_current_async_call_done is not done
    assert training.finalize_model_grads is not finalize
    training.setup_model_and_optimizer()
    queue: Any = PersistentAsyncCaller._persistent_preload_q
    assert COPY.beside is queue and not queue.beside  # a graph that is replayed waits for nothing
    arguments.cuda_graph_impl = "none"
    training.setup_model_and_optimizer()
    queue = PersistentAsyncCaller._persistent_preload_q
    assert COPY.beside is queue and queue.beside
