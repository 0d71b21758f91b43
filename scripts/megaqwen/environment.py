"""The environment of the stages' shell commands."""

import ctypes
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

INSTALL_TRANSFORMER_ENGINE = "uv sync --extra gpu, where the CUDA toolkit is (envs/README.md)"
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


def put_this_python_first() -> None:
    """Let `python` in a shell command be this one, unless --sdm conda puts another before it."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


def has_gpu() -> bool:
    """Whether torch would find a GPU on this machine, without importing it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # The driver's own entry under /proc is not shown by every container; the device is.
    return visible != "" and any(map(Path.exists, map(Path, DRIVER)))


def has_transformer_engine() -> bool:
    """Whether this Python has what training on GPUs takes, without importing it."""
    return find_spec("transformer_engine") is not None


def can_train_on_gpu() -> bool:
    """Whether a GPU of this machine is of use."""
    return has_gpu() and has_transformer_engine()


def hide_gpu_of_no_use() -> str:
    """Before torch is imported: without Transformer Engine training is on CPUs; what to say of it."""
    if not has_gpu() or has_transformer_engine():
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return (
        "this machine has a GPU, and no Transformer Engine, which training on it takes: it is on CPUs."
        f" For the GPU: {INSTALL_TRANSFORMER_ENGINE}"
    )


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """A process's environment, and whether a GPU is there for it."""

    variables: dict[str, str]
    no_gpu: str
    """Why there is none, in words; empty where there is one."""


def surroundings() -> Surroundings:
    """This process's, before it hides the GPUs from itself."""
    no_gpu = "" if has_gpu() else "this machine has no GPU that may be used"
    if not no_gpu and not has_transformer_engine():
        no_gpu = f"there is no Transformer Engine: {INSTALL_TRANSFORMER_ENGINE}"
    # Where Slurm does not keep a job from GPUs of others, a job that asked for none would take one.
    if "SLURM_JOB_ID" in os.environ and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        no_gpu = "this Slurm job has no GPU"
    return Surroundings(variables=dict(os.environ), no_gpu=no_gpu)


def use_huge_pages() -> None:
    """Have torch, not yet imported, ask for huge pages: large tensors cost few page faults."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def use_cudnn_of_torch() -> None:
    """Load the cuDNN of torch's wheel for Transformer Engine as well, unless CUDNN_HOME names another.

    It would look for the machine's first, and for parts of the machine's where torch's is in the search
    path. Of two versions in a process torch refuses its own, or fused attention is not found and every
    attention is unfused, five times as slow: seen with 9.14 of the machine beside torch's 9.19.
    """
    found = find_spec("nvidia.cudnn") if find_spec("nvidia") else None
    for place in map(os.path.realpath, (found and found.submodule_search_locations) or ()):
        libraries = sorted(Path(place).glob("lib/libcudnn*.so.*"))
        others = {name for name in loaded_libraries("libcudnn") if not name.startswith(place)}
        if libraries and not others and os.environ.setdefault("CUDNN_HOME", place) == place:
            for library in libraries:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def loaded_libraries(name: str) -> set[str]:
    """The files of this process's shared libraries with that name's beginning."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in lines if "/" in line}
    return {file for file in files if Path(file).name.startswith(name)}


def prepare_gpu() -> None:
    """Settings of torch and Transformer Engine, not yet imported, that training on a GPU takes.

    What is set already stays. Expandable segments keep memory from being cut into pieces that are too
    small (NCCL then has to leave CUDA graphs' buffers alone). Experts in groups are one matrix product of
    CUTLASS on Hopper GPUs instead of one of cuBLAS each: twice the tokens of 128 experts a second.
    cuDNN's norms are faster than Transformer Engine's; it is torch's (`use_cudnn_of_torch`). Transformer
    Engine pickles the scales of delayed FP8, and loads no pickle unless it is told that it may be
    trusted: each checkpoint that is loaded was written by convert or by the same training.
    """
    if has_gpu():
        use_cudnn_of_torch()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    os.environ.setdefault("NVTE_USE_CUTLASS_GROUPED_GEMM", "1")
    os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    os.environ.setdefault("NVTE_NORM_FWD_USE_CUDNN", "1")
    os.environ.setdefault("NVTE_NORM_BWD_USE_CUDNN", "1")
