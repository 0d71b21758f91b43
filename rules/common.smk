# The run's config and layout, read once. Python lives in scripts/megaqwen; this names its results.
import os
import signal
import time

from megaqwen.config import load_config
from megaqwen.config.checks import check_model_fits
from megaqwen.config.cpu import cpu_mistakes
from megaqwen.config.rank_options import nodes_for, ranks_of_layout, ranks_of_replica
from megaqwen.data.files import corpus_files
from megaqwen.environment import has_gpu, put_this_python_first
from megaqwen.errors import InputError
from megaqwen.layout import Layout
from megaqwen.provenance import check_writable, write_text
from megaqwen.sources.known import known_hf_config
from megaqwen.stale_lock import record_running, remove_stale_lock
from megaqwen.summary import ended_lines, failed_lines, resolved_yaml
from megaqwen.submitted_jobs import watch_jobs
from megaqwen.training.attempts import check_retry, check_started
from megaqwen.training.earlier_job import wait_for_earlier_job
from megaqwen.training.launch import Allocation

try:
    overlay_files = [Path(path) for path in workflow.overwrite_configfiles or []]
    # Not Snakemake's own merge of them: it keeps a hub's fields in a model of another source.
    overrides = workflow.config_settings.config
    CONFIG = load_config(Path("config/config.yaml"), overrides, overlay_files)
    LAYOUT = Layout(config=CONFIG)
    check_writable(LAYOUT.results, named_by="results")
except InputError as error:
    raise WorkflowError(str(error)) from None

SHARDS = LAYOUT.shard_count(planning=workflow.is_main_process)
STARTED = time.time()
PLANNED_TRIES = {}  # of each training: how often it had started by each of them
RUN_CONFIG = LAYOUT.run / "config.yaml"
LOGS = LAYOUT.run / "logs"
SCRIPTS = Path(os.path.relpath(Path(workflow.basedir) / "scripts"))
put_this_python_first()
STATE = Path(".snakemake")
if workflow.is_main_process and (words := remove_stale_lock(STATE)):
    logger.info(words)


def stage_command(script):
    """How a stage is called. A param that depends on resources is no reason to run it again."""

    def command(wildcards, resources):
        return f"python {SCRIPTS / script} --config {RUN_CONFIG}"

    return command


def rank_command(wildcards, resources):
    """What each rank of training runs."""
    return f"{SCRIPTS / 'train.py'} --config {RUN_CONFIG}"


def launch_command(wildcards, resources):
    """What starts the ranks, once it is known that the training fits on them."""
    hf_config = known_hf_config(LAYOUT)
    # Resources are not resolved yet when Snakemake asks for the first time.
    if hf_config and isinstance(resources.get("nodes"), int):
        world_size = resources.nodes * resources.ranks_per_node
        mistakes = check_model_fits(CONFIG, hf_config, world_size)
        if resources.get("launcher") == "torchrun" and not has_gpu():
            mistakes += map(str, cpu_mistakes(CONFIG.train))
        if mistakes:
            raise WorkflowError("this training does not fit:", *mistakes)
    return f"python {SCRIPTS / 'launch.py'} --verify {CONFIG.checkpoints.verify}"


def parity_ranks(wildcards):
    """Ranks over which parity lays out the model as in training."""
    return ranks_of_layout(CONFIG.train)


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
        ranks = parity_ranks_per_node(rule)(wildcards)
        return " ".join(Allocation(ranks_per_node=ranks).sbatch())

    return extra


def parity_launch(wildcards, resources):
    """What starts them."""
    return f"python {SCRIPTS / 'launch.py'}"


def parity_command(wildcards, resources):
    """What each of them runs."""
    return f"{SCRIPTS / 'parity.py'} --config {RUN_CONFIG}"


def corpora_files(wildcards):
    """The corpora's own files: a newer one is tokenized again."""
    try:
        return [path for corpus in CONFIG.data.corpora for path in corpus_files(corpus)]
    except InputError as error:
        raise WorkflowError(str(error)) from None


def shard_manifests(wildcards):
    """The shards that are merged into the data; none where one job does it all."""
    manifests = gather.shards(str(LAYOUT.shards / "{scatteritem}" / "manifest.json"))
    return manifests if len(manifests) > 1 else []


def model_files(wildcards):
    """What a model that is on disk already is made of: a newer file is converted again."""
    if CONFIG.model.source != "path":
        return []
    directory = Path(CONFIG.model.path).expanduser()
    # Of a directory that is not there, download says so.
    return sorted(
        path
        for pattern in ("*.safetensors", "*.json")
        for path in directory.glob(pattern)
    )


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
    return ranks_of_replica(CONFIG.train)


def try_number(wildcards, attempt):
    """Which of Snakemake's tries of a job this is: retries stop where they get nowhere."""
    if workflow.is_main_process:
        if attempt > 1:
            wait_for_earlier_training()  # first: an attempt that is still at it has not failed
        try:
            planned = PLANNED_TRIES.setdefault(LAYOUT.checkpoints, {})
            check_started(LAYOUT.checkpoints, planned, attempt)
            if attempt > 1:
                check_retry(LAYOUT.checkpoints)
        except InputError as error:
            lines = failed_lines(LOGS, STARTED)
            raise WorkflowError(f"train: {error}", *lines) from None
    return attempt


def wait_for_earlier_training():
    """Not to submit what the lease of a living job would refuse, time and again."""
    if workflow.non_local_exec and workflow.is_main_process:
        wait_for_earlier_job(LAYOUT.checkpoints, logger.warning)


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
    executor = workflow.scheduler._executor
    if hasattr(executor, "run_uuid"):  # the one that submits to Slurm
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        watch_jobs(executor, logger.warning)


def store_resolved_config():
    """Keep the config that the run was made with, beside its results, where the stages read it."""
    write_text(RUN_CONFIG, resolved_yaml(CONFIG))
    record_running(STATE)
    LAYOUT.store_shard_count(len(gather.shards("{scatteritem}")))


def say_where_results_are():
    """The last words of a run that made its report."""
    for line in ended_lines(LAYOUT):
        logger.info(line)


def say_what_failed():
    """The last words of a run that failed: Snakemake's own say which job and not why."""
    for line in failed_lines(LOGS, STARTED):
        logger.error(line)
