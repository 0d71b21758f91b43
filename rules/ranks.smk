# The ranks of training and parity: how many, on which nodes, what starts them, and how often.
from megaqwen.config.checks import check_model_fits
from megaqwen.config.cpu import cpu_mistakes
from megaqwen.config.rank_options import nodes_for, ranks_of_layout, ranks_of_replica
from megaqwen.environment import can_train_on_gpu
from megaqwen.errors import InputError
from megaqwen.sources.known import known_hf_config
from megaqwen.summary import failed_lines
from megaqwen.training.attempts import check_retry, check_started
from megaqwen.training.earlier_job import wait_for_earlier_jobs
from megaqwen.training.launch import Allocation
from snakemake.io import IOFile

PLANNED_TRIES = {}  # of each training: how often it had started by each of them
GIVEN_UP = set()  # runs of a sweep whose training gets nowhere


def rank_command(wildcards, resources):
    """What each rank of training runs."""
    return f"{SCRIPTS / 'train.py'} --config {run_config(wildcards)}"


def launch_command(wildcards, resources):
    """What starts the ranks, once it is known that the training fits on them."""
    layout = layout_of(wildcards)
    made = None if is_forced("train") else made_digest(layout.run / "train")
    # Where it is trained, on how many ranks is no question.
    if made != layout.stage_digest("train"):
        if made is not None:
            refuse_unknown(layout.run / "train")
        check_fits(layout, resources)
    return f"python {SCRIPTS / 'launch.py'} --verify {layout.config.checkpoints.verify}"


def is_forced(rule):
    """Whether the command line says that it is to run in any case."""
    settings = workflow.dag_settings
    target = settings.forcetargets and rule in settings.targets
    return settings.forceall or target or rule in settings.forcerun


def refuse_unknown(made):
    """WorkflowError for a result of another config that Snakemake has no record of: it would keep it."""
    manifest = IOFile(str(made / "manifest.json"))
    if workflow.is_main_process and not workflow.persistence.metadata(manifest):
        raise WorkflowError(
            f"{made} was made with another config, or by another version, of which .snakemake has no record:"
            f" add --forcerun {made.name} to make it again with this one, or give the run another name"
        )


def check_fits(layout, resources):
    """WorkflowError where the training does not fit on the ranks that it would get."""
    try:
        known = known_hf_config(layout)  # of a Hub model not before it is there
    except InputError as error:
        raise WorkflowError(str(error)) from None
    to_check = known or not is_made(layout.run / "train")
    # Resources are not resolved yet when Snakemake asks for the first time.
    if not to_check or not isinstance(resources.get("nodes"), int):
        return
    world_size = resources.nodes * resources.ranks_per_node
    mistakes = check_model_fits(layout.config, known or None, world_size)
    if resources.get("launcher") == "torchrun" and not can_train_on_gpu():
        mistakes += map(str, cpu_mistakes(layout.config.train))
    if mistakes:
        raise WorkflowError("this training does not fit:", *mistakes)


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
