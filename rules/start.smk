# Before the first job and after the last.
import shutil
import signal

from megaqwen.array_jobs import ArraySettings, array_mistakes
from megaqwen.config.rank_options import ranks_of_layout
from megaqwen.environment import INSTALL_TRANSFORMER_ENGINE, has_transformer_engine
from megaqwen.errors import InputError
from megaqwen.provenance import sha256_file
from megaqwen.stale_lock import record_running
from megaqwen.submitted_jobs import forgets_too_soon, remembered_seconds, watch_jobs
from megaqwen.summary import ended_lines, failed_lines_of_all, store_configs
from megaqwen.training.trackers import check_installed
from snakemake.settings.types import DeploymentMethod


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
    stored = RUNS.directory / "config.yaml"
    os.environ[STORED_CONFIG] = f"{sha256_file(stored)} {stored}"
    record_running(STATE)
    wait_for_earlier_training([RUNS.layout(name) for name in RUNS.names])


def check_training_can_start():
    """A training that would wait in a queue, to fail there, is refused before anything runs."""
    trainings = [job for job in workflow.dag.needrun_jobs() if job.rule.name == "train"]
    if not trainings:
        return
    # The plan does not look at one that is done, whose inputs may be made again.
    for job in trainings:
        check_fits(layout_of(job.wildcards), job.resources)
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


def say_where_results_are():
    """The last words of a run that made its report."""
    for line in ended_lines(RUNS):
        logger.info(line)


def say_what_failed():
    """The last words of a run that failed: Snakemake's own say which job and not why."""
    for line in failed_lines_of_all(RUNS, STARTED):
        logger.error(line)
