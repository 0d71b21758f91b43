"""sbatch, squeue and the rest without a cluster, for what a sweep asks of them: each call is counted.

install() puts them into a folder for PATH. sbatch starts a job's command, or each task's of an array
with the variables that Slurm sets, and squeue says how each ended. With FAKE_SLURM_OUTPUTS no command
runs: the files that the jobs declare appear at once, so that Snakemake and its plugin alone are measured.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

TOOLS = ("sbatch", "squeue", "sacct", "sacctmgr", "sinfo", "scontrol", "scancel")
STATE = "FAKE_SLURM"
OUTPUTS = "FAKE_SLURM_OUTPUTS"
REMEMBERS = (
    "FAKE_SLURM_MIN_JOB_AGE"  # seconds; with it, scontrol gives no answer once there is a job
)


def install(directory: Path) -> dict[str, str]:
    """Make the tools in a folder; the environment in which they are found."""
    directory.mkdir()
    (directory / "jobs").mkdir()
    for name in TOOLS:
        tool = directory / name
        tool.write_text(f"#!{sys.executable} -S\nimport runpy, sys\nsys.argv.insert(1, {name!r})\n")
        with tool.open("a") as stream:
            stream.write(f"runpy.run_path({str(Path(__file__))!r}, run_name='__main__')\n")
        tool.chmod(0o755)
    return {STATE: str(directory), "PATH": f"{directory}:{os.environ['PATH']}"}


def calls(environment: dict[str, str]) -> Counter[str]:
    """How often each tool was called."""
    return Counter((Path(environment[STATE]) / "calls.txt").read_text().split())


def submit(state: Path, words: list[str]) -> str:
    """Start a job, and every task of an array; its number."""
    number = str(1000 * (len(list((state / "jobs").glob("*.submitted"))) + 1))
    (state / "jobs" / f"{number}.submitted").write_text(json.dumps(words))
    bounds = next((word.removeprefix("--array=") for word in words if "--array=" in word), "")
    command = words[-1].removeprefix("--wrap=")
    first, _, last = bounds.partition("-")
    tasks = range(int(first), int(last) + 1) if bounds else [None]
    for task in tasks:
        name = number if task is None else f"{number}_{task}"
        own = (
            {}
            if task is None
            else {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": first}
        )
        if outputs := os.environ.get(OUTPUTS):
            make(Path(outputs), command, task)
            (state / "jobs" / name).write_text("COMPLETED")
            continue
        (state / "jobs" / name).write_text("RUNNING")
        job = {**os.environ, **own, "SLURM_JOB_ID": str(int(number) + (task or 0))}
        end = f"({command}) > {state}/jobs/{name}.log 2>&1"
        end += f" && echo COMPLETED > {state}/jobs/{name} || echo FAILED > {state}/jobs/{name}"
        subprocess.Popen(
            ["sh", "-c", end],
            env=job,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return number


def make(outputs: Path, command: str, task: int | None) -> None:
    """Write the files that a job declares: by its rule, in the file `outputs` names."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from megaqwen.array_jobs import own_command

    own = own_command(command.split(), {"SLURM_ARRAY_TASK_ID": str(task)}) or command
    target = own.split("--target-jobs")[1].split()[0].strip("'\"")
    rule, _, given = target.partition(":")
    wildcards = dict(pair.split("=", 1) for pair in given.split(",") if pair)
    for pattern in json.loads(outputs.read_text())[rule]:
        path = Path(pattern.format(**wildcards))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def states(state: Path) -> str:
    """What squeue says of all jobs."""
    jobs = [path for path in (state / "jobs").iterdir() if not path.suffix]
    return "".join(f"{path.name}|{path.read_text().strip()}\n" for path in jobs)


def config(state: Path) -> str:
    """What scontrol says."""
    if REMEMBERS in os.environ and states(state):
        sys.exit("Unable to contact slurm controller (connect failure)")
    return f"MaxArraySize = 1001\nMinJobAge = {os.environ.get(REMEMBERS, 300)} sec\n"


def main() -> None:
    """A call of one of the tools."""
    name, *words = sys.argv[1:]
    state = Path(os.environ[STATE])
    with open(state / "calls.txt", "a") as stream:
        stream.write(f"{name}\n")
    said = {"sacctmgr": "lab\n", "sinfo": "gpu*\n"}
    if name == "scontrol":
        said[name] = config(state)
    if name == "sbatch":
        said[name] = submit(state, words) + "\n"
    if name == "squeue" and "--states=all" in words:
        said[name] = states(state)
    if name == "sacct" and "-X" in words:  # a task of an array is not named as squeue names it
        said[name] = re.sub(r"_\d+\|\w+", "|FAILED", states(state))
    sys.stdout.write(said.get(name, ""))


if __name__ == "__main__":
    main()
