# Hugging Face Qwen -> Megatron training -> Hugging Face, proven at both crossings.
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")

sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))


include: "rules/common.smk"
include: "rules/ranks.smk"
include: "rules/download.smk"
include: "rules/convert.smk"
include: "rules/preprocess.smk"
include: "rules/gate.smk"
include: "rules/train.smk"
include: "rules/export.smk"
include: "rules/parity.smk"
include: "rules/report.smk"
include: "rules/start.smk"


if RUNS.is_sweep:

    include: "rules/sweep.smk"


localrules:
    all,
    download,
    parity,


rule all:
    default_target: True
    input:
        of_each_run(rules.export.output.manifest),
        of_each_run(rules.report.output.page),
        # By name, too: a verdict that is gone since a gate failed is asked for again.
        rules.parity.input,
        rules.sweep.output if RUNS.is_sweep else [],


onstart:
    start()


onsuccess:
    say_where_results_are()


onerror:
    say_what_failed()
