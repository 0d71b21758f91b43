# The runs' configs and layouts, read once. Python lives in scripts/megaqwen; this names its results.
import os
import sys
import time

from megaqwen.array_jobs import own_command
from megaqwen.config.loading import as_written
from megaqwen.data.files import FilesGone, corpus_files
from megaqwen.data.gone import with_those_gone
from megaqwen.environment import put_this_python_first
from megaqwen.errors import InputError
from megaqwen.provenance import check_writable, read_json, sha256_file
from megaqwen.runs import read_runs
from megaqwen.sources.local import files_that_are_read
from megaqwen.stale_lock import remove_stale_lock

STORED_CONFIG = "MEGAQWEN_STORED_CONFIG"  # SHA-256 and path of the file that jobs read

if command := own_command(sys.argv, os.environ):
    os.execvp("sh", ["sh", "-c", command])

try:
    overlay_files = [Path(path) for path in workflow.overwrite_configfiles or []]
    # Not Snakemake's own merge of them: it keeps a hub's fields in a model of another source.
    overrides = as_written(workflow.config_settings.config, sys.argv)
    if workflow.is_main_process or STORED_CONFIG not in os.environ:
        RUNS = read_runs(Path("config/config.yaml"), overrides, overlay_files)
    else:  # a job that waited in a queue: the config's files may be another run's by now
        stored, given = os.environ[STORED_CONFIG].split(maxsplit=1)
        if sha256_file(Path(given)) != stored:
            raise InputError(
                f"{given} was replaced since this job was submitted: its run was started again"
            )
        RUNS = read_runs(Path(given))
    if workflow.is_main_process:
        RUNS.check()  # a job looks at its own run's alone
    check_writable(RUNS.results, named_by="results")
except InputError as error:
    raise WorkflowError(str(error)) from None

STARTED = time.time()
SCRIPTS = Path(os.path.relpath(Path(workflow.basedir) / "scripts"))
put_this_python_first()
STATE = Path(".snakemake")
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


def made_digest(directory):
    """What determined the result that is there; None where there is none."""
    if not is_made(directory):
        return None
    return read_json(directory / "manifest.json").get("config_digest")


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
