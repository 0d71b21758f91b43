# The runs' configs and layouts, read once. Python lives in scripts/megaqwen; this names its results.
import os
import shutil
import signal
import sys
import time

from megaqwen.array_jobs import ArraySettings, array_mistakes, own_command
from megaqwen.config.checks import check_model_fits
from megaqwen.config.cpu import cpu_mistakes
from megaqwen.config.rank_options import nodes_for, ranks_of_layout, ranks_of_replica
from megaqwen.data.files import FilesGone, corpus_files
from megaqwen.data.gone import with_those_gone
from megaqwen.environment import (
    INSTALL_TRANSFORMER_ENGINE,
    can_train_on_gpu,
    has_transformer_engine,
    put_this_python_first,
)
from megaqwen.errors import InputError
from megaqwen.provenance import check_writable
from megaqwen.runs import read_runs
from megaqwen.sources.known import known_hf_config
from megaqwen.sources.local import files_that_are_read
from megaqwen.stale_lock import record_running, remove_stale_lock
from megaqwen.summary import (
    ended_lines,
    failed_lines,
    failed_lines_of_all,
    store_configs,
)
from megaqwen.submitted_jobs import (
    forgets_too_soon,
    remembered_seconds,
    watch_jobs,
)
from megaqwen.training.attempts import check_retry, check_started
from megaqwen.training.earlier_job import wait_for_earlier_jobs
from megaqwen.training.launch import Allocation
from megaqwen.training.trackers import check_installed
from snakemake.settings.types import DeploymentMethod

if command := own_command(sys.argv, os.environ):
    os.execvp("sh", ["sh", "-c", command])

try:
    overlay_files = [Path(path) for path in workflow.overwrite_configfiles or []]
    # Not Snakemake's own merge of them: it keeps a hub's fields in a model of another source.
    overrides = workflow.config_settings.config
    RUNS = read_runs(Path("config/config.yaml"), overrides, overlay_files)
    if workflow.is_main_process:
        RUNS.check()  # a job looks at its own run's alone
    check_writable(RUNS.results, named_by="results")
except InputError as error:
    raise WorkflowError(str(error)) from None

STARTED = time.time()
PLANNED_TRIES = {}  # of each training: how often it had started by each of them
SCRIPTS = Path(os.path.relpath(Path(workflow.basedir) / "scripts"))
put_this_python_first()
STATE = Path(".snakemake")
GIVEN_UP = set()  # runs of a sweep whose training gets nowhere
if workflow.is_main_process and (words := remove_stale_lock(STATE)):
    logger.info(words)


wildcard_constraints:
    run=r"[\w.-]+",
    model=r"[0-9a-f]+",
    megatron=r"[0-9a-f]+",
    data=r"[0-9a-f]+",
    gate=r"[0-9a-f]+",
    scatteritem=r"\d+-of-\d+",


def layout_of(wildcards):
    """The layout of a job's run; of a stage that runs share, of the first run that needs it."""
    try:
        return RUNS.layout_of(dict(wildcards.items()))
    except InputError as error:
        raise WorkflowError(str(error)) from None


def place(kind, *names):
    """A path of a job's run, by the Layout's name for its directory and names inside it."""

    def path(wildcards):
        return Path(getattr(layout_of(wildcards), kind), *names)

    return path


def digest_of(stage):
    """What determines the result of a job's stage."""

    def digest(wildcards):
        return layout_of(wildcards).stage_digest(stage)

    return digest


def of_each_run(pattern):
    """A file of every run."""
    return expand(pattern, run=RUNS.names)


def run_config(wildcards):
    """The config of a job's run, as it is stored when Snakemake starts."""
    return layout_of(wildcards).run / "config.yaml"


def stage_command(script):
    """How a stage is called. A param that depends on resources is no reason to run it again."""

    def command(wildcards, resources):
        return f"python {SCRIPTS / script} --config {run_config(wildcards)}"

    return command


def rank_command(wildcards, resources):
    """What each rank of training runs."""
    return f"{SCRIPTS / 'train.py'} --config {run_config(wildcards)}"


def launch_command(wildcards, resources):
    """What starts the ranks, once it is known that the training fits on them."""
    layout = layout_of(wildcards)
    known = known_hf_config(layout)  # of a Hub model not before it is there
    to_check = known or not is_made(layout.run / "train")
    # Resources are not resolved yet when Snakemake asks for the first time.
    if to_check and isinstance(resources.get("nodes"), int):
        world_size = resources.nodes * resources.ranks_per_node
        mistakes = check_model_fits(layout.config, known or None, world_size)
        if resources.get("launcher") == "torchrun" and not can_train_on_gpu():
            mistakes += map(str, cpu_mistakes(layout.config.train))
        if mistakes:
            raise WorkflowError("this training does not fit:", *mistakes)
    return f"python {SCRIPTS / 'launch.py'} --verify {layout.config.checkpoints.verify}"


def parity_ranks(wildcards):
    """Ranks over which parity lays out the model as in training."""
    return ranks_of_layout(layout_of(wildcards).config.train)


def parity_nodes(rule):
    """The nodes over which a parity job's ranks are spread: one, unless the profile has a limit."""

    def nodes(wildcards):
        most = setting_of(rule, "max_ranks_per_node", 0)
        return nodes_for(parity_ranks(wildcards), most)

    return nodes


def parity_ranks_per_node(rule):
    """Its ranks on each of them."""

    def ranks(wildcards):
        return parity_ranks(wildcards) // parity_nodes(rule)(wildcards)

    return ranks


def parity_extra(rule):
    """sbatch's options for it that Snakemake has no resource for."""

    def extra(wildcards):
        return " ".join(
            Allocation(
                ranks_per_node=parity_ranks_per_node(rule)(wildcards),
                gpus_per_node=setting_of(rule, "gpus_per_node", 0),
                gpu_type=setting_of(rule, "gpu_type", ""),
            ).sbatch()
        )

    return extra


def parity_launch(wildcards, resources):
    """What starts them: unbound, since the last one takes the CPUs of the others when they are through."""
    return f"python {SCRIPTS / 'launch.py'} --cpu-bind none"


def parity_command(wildcards, resources):
    """What each of them runs."""
    return f"{SCRIPTS / 'parity.py'} --config {run_config(wildcards)}"


def corpora_files(wildcards):
    """The corpora's own files: a newer one is tokenized again."""
    layout = layout_of(wildcards)
    corpora = layout.config.data.corpora
    try:
        found = [path for corpus in corpora for path in corpus_files(corpus)]
        return with_those_gone(found, layout.data / "manifest.json")
    except InputError as error:
        if isinstance(error, FilesGone) and is_made(layout.data):
            return [error.pattern]
        raise WorkflowError(str(error)) from None


def is_made(directory):
    """Whether a stage made it: from inputs that are gone since, Snakemake then keeps what it made.

    To see that they are gone it has to be given them.
    """
    return (directory / "manifest.json").is_file()


def shard_manifests(wildcards):
    """The shards that are merged into the data; none where one job does it all."""
    layout = layout_of(wildcards)
    count = layout.shard_count(planning=workflow.is_main_process)
    shards = [f"{number}-of-{count}" for number in range(1, count + 1)]
    return (
        [layout.shards / shard / "manifest.json" for shard in shards]
        if count > 1
        else []
    )


def model_files(wildcards):
    """What a model that is on disk already is made of: with a newer file all begins again."""
    layout = layout_of(wildcards)
    model = layout.config.model
    if model.source != "path":
        return []
    directory = Path(model.path).expanduser()
    if not directory.is_dir() and is_made(layout.model):
        return [directory]
    # Of a directory that is not there, download says so.
    return files_that_are_read(directory)


def setting_of(rule, name, default):
    """What the profile, or --set-resources, says of a rule: a resource's function sees no others."""
    settings = workflow.resource_settings.overwrite_resources.get(rule, {})
    given = settings[name].raw if name in settings else default
    return given.strip("'\"") if isinstance(given, str) else given


def train_setting(name, default):
    """What they say of training."""
    return setting_of("train", name, default)


def train_retries():
    """Jobs that may follow the first; None leaves it to --retries."""
    # A job would try again inside its own allocation.
    return train_setting("retries", None) if workflow.is_main_process else None


def ranks_per_node(wildcards):
    """One for each GPU; without GPUs those of one replica of the model, the fewest that can train it."""
    if gpus := train_setting("gpus_per_node", 0):
        return gpus
    return ranks_of_replica(layout_of(wildcards).config.train)


def try_number(wildcards, attempt):
    """Which of Snakemake's tries of a job this is: retries stop where they get nowhere."""
    if not workflow.is_main_process:
        return attempt
    layout = layout_of(wildcards)
    if attempt > 1:
        # First: an attempt that is still at it has not failed.
        wait_for_earlier_training([layout])
    try:
        planned = PLANNED_TRIES.setdefault(layout.checkpoints, {})
        check_started(layout.checkpoints, planned, attempt)
        if attempt > 1:
            check_retry(layout.checkpoints)
    except InputError as error:
        words = f"train: {error}"
        if not RUNS.is_sweep:
            lines = failed_lines(layout.run / "logs", STARTED)
            raise WorkflowError(words, *lines) from None
        give_up(wildcards, f"{wildcards.run}: {words}")
    return attempt


def give_up(wildcards, words):
    """Let the next try of a run's training be the last: an error here would end all other runs."""
    if wildcards.run not in GIVEN_UP:
        GIVEN_UP.add(wildcards.run)
        logger.error(words)
    for job in workflow.dag.needrun_jobs():
        if job.rule.name == "train" and job.wildcards.run == wildcards.run:
            job.attempt = job.restart_times + 1


def wait_for_earlier_training(layouts):
    """Not to submit what the lease of a living job would refuse, time and again."""
    if workflow.non_local_exec and workflow.is_main_process:
        places = [layout.checkpoints for layout in layouts]
        wait_for_earlier_jobs(places, logger.warning)


def slurm_tasks(wildcards):
    """Ranks of the whole job, as sbatch wants to know."""
    ranks = train_setting("ranks_per_node", ranks_per_node(wildcards))
    return train_setting("nodes", 1) * ranks


def slurm_extra(wildcards):
    """sbatch's options for training that Snakemake has no resource for."""
    return " ".join(
        Allocation(
            ranks_per_node=train_setting("ranks_per_node", ranks_per_node(wildcards)),
            gpus_per_node=train_setting("gpus_per_node", 0),
            gpu_type=train_setting("gpu_type", ""),
            save_seconds=train_setting("save_seconds", 0),
            options=train_setting("sbatch_options", ""),
        ).sbatch()
    )


def watch_slurm_jobs():
    """On a cluster, SIGTERM does as Ctrl-C: Snakemake would wait for its jobs to end, for a day if need be."""
    executor, settings = workflow.scheduler._executor, workflow.executor_settings
    if not hasattr(
        executor, "run_uuid"
    ):  # another one than that which submits to Slurm
        return
    remembered = remembered_seconds(executor)
    first_look = settings.init_seconds_before_status_checks
    # Without sacct squeue is asked in any case.
    not_by_squeue = shutil.which("sacct") and forgets_too_soon(remembered, first_look)
    check_arrays(not_by_squeue)
    if settings.status_command == "squeue" and not_by_squeue:
        logger.warning(
            f"That somebody cancels a job will not be noticed: {not_by_squeue}"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watch_jobs(executor, logger.warning, None if not_by_squeue else remembered)


def check_arrays(not_by_squeue):
    """An array that would never be submitted, or run wrongly, is refused before anything runs."""
    settings, scheduling = workflow.executor_settings, workflow.scheduling_settings
    if not getattr(settings, "array_jobs", None):
        return
    given = ArraySettings(
        rules=settings.array_jobs,
        limit=settings.array_limit,
        jobs=workflow.resource_settings.nodes,
        jobs_at_once=getattr(scheduling.max_jobs_per_timespan, "max_jobs", None),
        status_command=settings.status_command,
        memory_added=not settings.disable_memory_fudge,
        not_by_squeue=not_by_squeue,
    )
    layouts = [RUNS.layout(name) for name in RUNS.names]
    ranks = {ranks_of_layout(layout.config.train) for layout in layouts}
    if mistakes := list(array_mistakes(given, len(layouts), ranks)):
        raise WorkflowError("this profile cannot run a sweep in arrays:", *mistakes)


def check_training_can_start():
    """A training that would wait in a queue, to fail there, is refused before anything runs."""
    if not any(job.rule.name == "train" for job in workflow.dag.needrun_jobs()):
        return
    if workflow.non_local_exec and not train_setting("launcher", ""):
        raise WorkflowError(
            "nothing says how the ranks of training are started on the cluster (set-resources: train: launcher:"
            " srun). --set-resources on the command line takes the place of all of the profile's: what you give"
            " there goes into the profile"
        )
    if train_setting("container", ""):  # it brings packages of its own
        return
    in_conda = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    if train_setting("gpus_per_node", 0) and (in_conda or not has_transformer_engine()):
        mend = "name a container in the profile, or set gpus_per_node: 0 there to train on CPUs"
        here = f"which is not installed here: {INSTALL_TRANSFORMER_ENGINE}, {mend}"
        words = f"of which conda's environment has none: {mend}" if in_conda else here
        raise WorkflowError(f"training on GPUs takes Transformer Engine, {words}")
    if in_conda:
        return
    try:
        for name in RUNS.names:
            check_installed(RUNS.layout(name).config.tracking)
    except InputError as error:
        raise WorkflowError(str(error)) from None


def start():
    """Before the first job: what is left of an earlier start is seen to, and the configs are stored."""
    check_training_can_start()
    if workflow.non_local_exec:
        watch_slurm_jobs()
    if RUNS.is_sweep:
        workflow.scheduler.keepgoing = (
            True  # a run that fails keeps no other from going on
        )
    store_configs(RUNS)
    record_running(STATE)
    wait_for_earlier_training([RUNS.layout(name) for name in RUNS.names])


def say_where_results_are():
    """The last words of a run that made its report."""
    for line in ended_lines(RUNS):
        logger.info(line)


def say_what_failed():
    """The last words of a run that failed: Snakemake's own say which job and not why."""
    for line in failed_lines_of_all(RUNS, STARTED):
        logger.error(line)
