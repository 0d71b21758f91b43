rule report:
    input:
        download=rules.download.output.manifest,
        convert=rules.convert.output.manifest,
        preprocess=rules.preprocess.output.manifest,
        train=rules.train.output.manifest,
        export=rules.export.output.manifest,
        parity_convert=rules.parity_convert.output.verdict,
        parity_export=rules.parity_export.output.verdict,
    output:
        page=report(LAYOUT.run / "report" / "report.html", category="Run"),
        loss=report(
            LAYOUT.run / "report" / "loss.svg",
            category="Training",
            labels={"figure": "loss and validation loss"},
        ),
        rates=report(
            LAYOUT.run / "report" / "rates.svg",
            category="Training",
            labels={"figure": "learning rate, gradient norm, throughput"},
        ),
        parity=report(
            LAYOUT.run / "report" / "parity.html",
            category="Parity",
            labels={"table": "gates"},
        ),
        differences_convert=report(
            LAYOUT.run / "report" / "parity_convert.svg",
            category="Parity",
            labels={"figure": "differences after convert"},
        ),
        differences_export=report(
            LAYOUT.run / "report" / "parity_export.svg",
            category="Parity",
            labels={"figure": "differences after export"},
        ),
        verification=report(
            LAYOUT.run / "report" / "verification.yaml",
            category="Parity",
            labels={"file": "verification card"},
        ),
        config=report(
            LAYOUT.run / "report" / "config.yaml",
            category="Run",
            labels={"file": "resolved config"},
        ),
        versions=report(
            LAYOUT.run / "report" / "versions.html",
            category="Run",
            labels={"table": "versions"},
        ),
        card=LAYOUT.run / "export" / "hf" / "README.md",
        card_of_gates=LAYOUT.run / "export" / "hf" / "verification.yaml",
    log:
        LOGS / "report.log",
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("report.py"),
        digest=LAYOUT.stage_digest("report"),
        run=LAYOUT.run,
        directory=LAYOUT.run / "report",
    message:
        "report: curves, parity, config and versions on one page, and the model card"
    shell:
        "{params.command} --run {params.run}"
        " --manifests {input} --output {params.directory}"
        " --card {output.card} --log {log}"
