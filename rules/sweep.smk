# Of a config with a section sweep: what came of its runs, beside each other.
localrules:
    sweep,


rule sweep:
    input:
        of_each_run(rules.report.output.page),
    output:
        page=report(RUNS.directory / "sweep.html", category="Sweep"),
        table=RUNS.directory / "sweep.csv",
        figure=report(
            RUNS.directory / "sweep.svg",
            category="Sweep",
            labels={"figure": "losses"},
        ),
    log:
        RUNS.directory / "logs" / "sweep.log",
    conda:
        "../envs/megaqwen.yaml"
    params:
        digest=RUNS.digest,
        config=RUNS.directory / "config.yaml",
        directory=RUNS.directory,
    message:
        "sweep: the losses and parity verdicts of {RUNS.name}'s runs beside each other"
    shell:
        "python {SCRIPTS}/sweep.py --config {params.config} --output {params.directory} --log {log}"
