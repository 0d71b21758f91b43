rule report:
    input:
        download=place("model", "manifest.json"),
        convert=place("megatron", "manifest.json"),
        preprocess=place("data", "manifest.json"),
        train=rules.train.output.manifest,
        export=rules.export.output.manifest,
        parity_convert=rules.parity_convert.output.verdict,
        parity_export=rules.parity_export.output.verdict,
    output:
        page=report(RUNS.place("run") / "report" / "report.html", category="Run"),
        loss=report(
            RUNS.place("run") / "report" / "loss.svg",
            category="Training",
            labels={"figure": "loss and validation loss"},
        ),
        rates=report(
            RUNS.place("run") / "report" / "rates.svg",
            category="Training",
            labels={"figure": "learning rate, gradient norm, throughput"},
        ),
        parity=report(
            RUNS.place("run") / "report" / "parity.html",
            category="Parity",
            labels={"table": "gates"},
        ),
        differences_convert=report(
            RUNS.place("run") / "report" / "parity_convert.svg",
            category="Parity",
            labels={"figure": "differences after convert"},
        ),
        differences_export=report(
            RUNS.place("run") / "report" / "parity_export.svg",
            category="Parity",
            labels={"figure": "differences after export"},
        ),
        verification=report(
            RUNS.place("run") / "report" / "verification.yaml",
            category="Parity",
            labels={"file": "verification card"},
        ),
        config=report(
            RUNS.place("run") / "report" / "config.yaml",
            category="Run",
            labels={"file": "resolved config"},
        ),
        versions=report(
            RUNS.place("run") / "report" / "versions.html",
            category="Run",
            labels={"table": "versions"},
        ),
        card=RUNS.place("run") / "export" / "hf" / "README.md",
        card_of_gates=RUNS.place("run") / "export" / "hf" / "verification.yaml",
    log:
        RUNS.log("report"),
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("report.py"),
        digest=digest_of("report"),
        run=place("run"),
        directory=place("run", "report"),
    message:
        "report: curves, parity, config and versions on one page, and the model card"
    shell:
        "{params.command} --run {params.run}"
        " --manifests {input} --output {params.directory}"
        " --card {output.card} --log {log}"
